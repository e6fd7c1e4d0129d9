"""The server's side of one round of secure aggregation."""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lightning_sfubm.errors import MessageError, PrivacyError
from lightning_sfubm.privacy.secagg import primitives as crypto
from lightning_sfubm.privacy.secagg import shamir
from lightning_sfubm.privacy.secagg.client import adds, input_bytes, mask_purpose, seed_purpose
from lightning_sfubm.privacy.secagg.encoding import SecAggSettings, Shapes, Words, agreement, decode, num_words
from lightning_sfubm.privacy.secagg.wire import SERVER, Envelope, Steps, check_name, check_round, pack, unpack

STEPS = ("invite", "collect_keys", "collect_shares", "collect_inputs", "collect_reveals")


@dataclass(frozen=True)
class SecureSum:
    """What the server learns: sums over the clients whose masked input arrived.

    Attributes:
        tensors: sums of ``weight * tensor`` by name, float64.
        weight: sum of the weights.
        clients: names of the clients in the sum, sorted.
    """

    tensors: dict[str, Tensor]
    weight: float
    clients: tuple[str, ...]

    def mean(self) -> dict[str, Tensor]:
        """The weighted mean, float64; ``{}`` where no client has weight."""
        return {name: total / self.weight for name, total in self.tensors.items()} if self.weight > 0 else {}


class SecAggServer:
    """The server of one round: five steps, each from the clients' messages to the answer for them, and then spent.

    Each ``collect_*`` takes the messages that arrived by the client on whose channel they came; who is missing has dropped.
    A step that raises has changed nothing: it may be taken again without the client whose message was refused.

    Args:
        settings: agreed by all parties.
        shapes: names and shapes of the tensors to be summed, agreed by all parties.
        round: the federated round.

    Raises:
        ConfigError: the package ``cryptography`` is missing.
    """

    def __init__(self, settings: SecAggSettings, shapes: Shapes, round: int = 0) -> None:
        crypto.require_cryptography()
        self.settings, self.round = settings, check_round(round)
        self._shapes = {key: tuple(shape) for key, shape in shapes.items()}
        self._session = secrets.token_hex(16)
        self._steps = Steps("secure-aggregation server", STEPS)
        self._survivors: list[str] = []
        self._dropped: list[str] = []

    def invite(self) -> bytes:
        """Step 0: the invitation for all clients; it names the session, so that nothing older fits into it."""
        self._steps.check("invite")
        self._steps.done()
        return self._pack("invite", {"agreement": agreement(self.settings, self._shapes)})

    def collect_keys(self, payloads: Mapping[str, bytes]) -> bytes:
        """Step 1: public keys in, the roster for all of their senders out.

        Raises:
            PrivacyError: fewer clients than the threshold.
            MessageError: a message is refused, or there are more clients than the settings allow for.
        """
        envelopes = self._open("collect_keys", "keys", payloads)
        if len(payloads) > self.settings.num_clients:
            raise MessageError(
                f"{len(payloads)} clients answered, but the settings keep sums from wrapping for "
                f"{self.settings.num_clients} only"
            )
        self._channel_keys = {name: envelope.fields["channel_key"] for name, envelope in envelopes.items()}
        self._mask_keys = {name: envelope.fields["mask_key"] for name, envelope in envelopes.items()}
        roster = self._pack("roster", {"channel_keys": self._channel_keys, "mask_keys": self._mask_keys})
        self._salt = hashlib.sha256(roster).digest()
        self._points = {name: point for point, name in enumerate(sorted(self._mask_keys), start=1)}
        self._steps.done()
        return roster

    def collect_shares(self, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Step 2: sealed shares in, for each of their senders a mailbox with what the others sealed for it out.

        Raises:
            PrivacyError: fewer clients than the threshold.
            MessageError: a message is refused, or does not hold one share for each other client of the roster.
        """
        envelopes = self._open("collect_shares", "shares", payloads, among=set(self._mask_keys))
        for name, envelope in envelopes.items():
            if set(envelope.fields["sealed"]) != set(self._mask_keys) - {name}:
                raise MessageError(f"client '{name}' did not seal one share for each other client of the roster")
        self._commitments = {name: envelope.fields["commitment"] for name, envelope in envelopes.items()}
        boxes = {
            name: {other: envelopes[other].fields["sealed"][name] for other in envelopes if other != name}
            for name in envelopes
        }
        self._steps.done()
        return {name: self._pack("mailbox", {"sealed": box}) for name, box in boxes.items()}

    def collect_inputs(self, payloads: Mapping[str, bytes]) -> bytes:
        """Step 3: masked inputs in, the request to unmask for all of their senders out. Only their sum is kept.

        Raises:
            PrivacyError: fewer clients than the threshold.
            MessageError: a message is refused.
        """
        size = input_bytes(self._shapes, self.settings)
        envelopes = self._open("collect_inputs", "input", payloads, among=set(self._commitments), body_bytes=size)
        total = np.zeros(num_words(self._shapes), dtype=self.settings.dtype)
        for envelope in envelopes.values():
            total += np.frombuffer(envelope.body, dtype=self.settings.dtype)
        self._total = total
        self._survivors = sorted(envelopes)
        self._dropped = sorted(set(self._commitments) - set(envelopes))
        self._steps.done()
        return self._pack("request", {"survivors": self._survivors, "dropped": self._dropped})

    def collect_reveals(self, payloads: Mapping[str, bytes]) -> SecureSum:
        """Step 4: shares in, the sum out.

        Of a client whose input arrived the seed is recovered, of one that dropped after sharing its keys the mask key;
        never both, for both together would uncover its input.

        Raises:
            PrivacyError: fewer clients than the threshold, or a message offers both secrets of one client.
            MessageError: a message is refused, or the shares of a secret do not give what its owner had committed to.
        """
        envelopes = self._open("collect_reveals", "reveal", payloads, among=set(self._survivors))
        for name, envelope in envelopes.items():
            seeds, keys = set(envelope.fields["seed_shares"]), set(envelope.fields["key_shares"])
            if seeds & keys:
                raise PrivacyError(
                    f"client '{name}' offers shares of both secrets of {sorted(seeds & keys)[:5]}, which would uncover "
                    "their inputs"
                )
            if seeds != set(self._survivors) or keys != set(self._dropped):
                raise MessageError(f"client '{name}' does not answer the request to unmask with exactly its shares")
        total = self._total.copy()
        for owner in self._survivors:
            total -= self._mask(self._own_mask_key(owner, envelopes))
        for owner in self._dropped:
            private = self._private_key(owner, envelopes)
            for other in self._survivors:
                key = crypto.agree(private, self._mask_keys[other], self._salt, mask_purpose(owner, other))
                if adds(other, owner):
                    total -= self._mask(key)
                else:
                    total += self._mask(key)
        tensors, weight = decode(total, len(self._survivors), self._shapes, self.settings)
        self._steps.done()
        return SecureSum(tensors, weight, tuple(self._survivors))

    def _own_mask_key(self, owner: str, envelopes: Mapping[str, Envelope]) -> bytes:
        seed = self._recover("seed_shares", owner, envelopes)
        if crypto.commitment(seed, self._salt) != self._commitments[owner]:
            raise MessageError(f"the shares of the seed of client '{owner}' do not fit its commitment: one was altered")
        return crypto.derive(seed, self._salt, seed_purpose(owner))

    def _private_key(self, owner: str, envelopes: Mapping[str, Envelope]) -> bytes:
        private = self._recover("key_shares", owner, envelopes)
        if private != crypto.clamp(private) or crypto.public_key(private) != self._mask_keys[owner]:
            raise MessageError(
                f"the shares of the mask key of client '{owner}' do not fit its public key: one was altered"
            )
        return private

    def _recover(self, kind: str, owner: str, envelopes: Mapping[str, Envelope]) -> bytes:
        shares = {self._points[name]: envelope.fields[kind][owner] for name, envelope in envelopes.items()}
        return shamir.recover(shares, self.settings.t)

    def _mask(self, key: bytes) -> Words:
        return crypto.mask(key, num_words(self._shapes), self.settings.dtype)

    def _open(
        self, step: str, kind: str, payloads: Mapping[str, bytes], *, among: set[str] | None = None, body_bytes: int = 0
    ) -> dict[str, Envelope]:
        self._steps.check(step)
        strangers = sorted(set(payloads) - among) if among is not None else []
        if strangers:
            raise MessageError(f"clients {strangers[:5]} sent a message for a step they have dropped out before")
        if len(payloads) < self.settings.t:
            raise PrivacyError(
                f"round {self.round} of secure aggregation ends without a sum: {len(payloads)} clients are left at step "
                f"'{step}', fewer than the threshold of {self.settings.t}"
            )
        return {
            name: unpack(
                kind,
                payloads[name],
                sender=check_name(name),
                round=self.round,
                session=self._session,
                clients=self.settings.num_clients,
                body_bytes=body_bytes,
            )
            for name in sorted(payloads)
        }

    def _pack(self, kind: str, fields: Mapping[str, object]) -> bytes:
        return pack(kind, SERVER, self.round, self._session, fields)
