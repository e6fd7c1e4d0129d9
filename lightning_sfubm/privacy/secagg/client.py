"""A client's side of one round of secure aggregation."""

import hashlib
import secrets
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from lightning_sfubm.errors import MessageError, PrivacyError
from lightning_sfubm.privacy.secagg import primitives as crypto
from lightning_sfubm.privacy.secagg import shamir
from lightning_sfubm.privacy.secagg.encoding import SecAggSettings, Shapes, agreement, encode, num_words
from lightning_sfubm.privacy.secagg.wire import SERVER, Envelope, Steps, check_name, check_round, pack, unpack

STEPS = ("advertise_keys", "share_keys", "mask_input", "unmask")


def mask_purpose(first: str, second: str) -> bytes:
    """Purpose of the key of a pair's mask; the same for either order of the two."""
    return crypto.label("pair mask", *sorted((first, second)))


def seed_purpose(name: str) -> bytes:
    """Purpose of the key of a client's own mask."""
    return crypto.label("self mask", name)


def adds(first: str, second: str) -> bool:
    """Whether ``first`` adds the mask it shares with ``second``, who then subtracts it."""
    return first < second


class SecAggClient:
    """One client in one round: four steps, each from the server's message to the client's answer, and then spent.

    Keys and seeds are drawn in the object and never leave it but as shares sealed for the other clients; a new round needs
    a new object. What the server hands out is not trusted beyond honesty in carrying messages: the client refuses a roster
    under the threshold, and it answers one request to unmask, with one kind of share for each client.

    Args:
        name: the client's name, unique among the clients.
        settings: agreed by all parties.
        shapes: names and shapes of the tensors to be summed, agreed by all parties.
        round: the federated round.

    Raises:
        ConfigError: the package ``cryptography`` is missing.
    """

    def __init__(self, name: str, settings: SecAggSettings, shapes: Shapes, round: int = 0) -> None:
        crypto.require_cryptography()
        self.name, self.settings, self.round = check_name(name), settings, check_round(round)
        self._shapes = {key: tuple(shape) for key, shape in shapes.items()}
        self._steps = Steps(f"client '{name}'", STEPS)
        self._session: str | None = None
        self._secrets: dict[str, bytes] = {}
        self._shares: dict[str, bytes] = {}  # by owner: its seed's share, then its mask key's

    def advertise_keys(self, invite: bytes) -> bytes:
        """Step 1: answer the invitation with two fresh public keys.

        Raises:
            MessageError: the invitation is malformed, of another round, or of a server with other settings or shapes.
        """
        self._steps.check("advertise_keys")
        envelope = self._unpack("invite", invite)
        if envelope.fields["agreement"] != agreement(self.settings, self._shapes):
            raise MessageError(
                f"client '{self.name}' and the server hold different secure-aggregation settings or tensor shapes: "
                "give both the same"
            )
        self._session = envelope.session
        self._secrets = {"channel": crypto.new_private_key(), "mask": crypto.new_private_key()}
        self._public = {kind: crypto.public_key(private) for kind, private in self._secrets.items()}
        self._steps.done()
        return self._pack("keys", {"channel_key": self._public["channel"], "mask_key": self._public["mask"]})

    def share_keys(self, roster: bytes) -> bytes:
        """Step 2: split the mask key and a fresh seed among the clients of the roster, sealed for each.

        Raises:
            PrivacyError: fewer clients than the threshold.
            MessageError: the roster is malformed, lacks this client's keys or names a key twice.
        """
        self._steps.check("share_keys")
        fields = self._unpack("roster", roster).fields
        channel_keys, mask_keys = fields["channel_keys"], fields["mask_keys"]
        self._refuse_few(len(channel_keys), "are on the roster")
        own = {"channel": channel_keys.get(self.name), "mask": mask_keys.get(self.name)}
        if set(channel_keys) != set(mask_keys) or own != self._public:
            raise MessageError(f"the roster does not carry the keys of client '{self.name}' as it sent them")
        if len({*channel_keys.values(), *mask_keys.values()}) < 2 * len(channel_keys):
            raise MessageError("the roster names one public key for two clients")
        salt = hashlib.sha256(roster).digest()
        names = sorted(channel_keys)
        seed = secrets.token_bytes(crypto.KEY_BYTES)
        pairs = zip(
            names,
            shamir.split(seed, self.settings.t, len(names)),
            shamir.split(self._secrets["mask"], self.settings.t, len(names)),
            strict=True,
        )
        shares = {name: of_seed + of_key for name, of_seed, of_key in pairs}
        sealed = {}
        for other in names:
            if other != self.name:
                purpose = crypto.label("channel", self.name, other)
                key = crypto.agree(self._secrets["channel"], channel_keys[other], salt, purpose)
                sealed[other] = crypto.seal(key, shares[other], purpose)
        self._salt, self._channel_keys, self._mask_keys = salt, channel_keys, mask_keys
        self._secrets["seed"], self._shares = seed, {self.name: shares[self.name]}
        self._steps.done()
        return self._pack("shares", {"commitment": crypto.commitment(seed, salt), "sealed": sealed})

    def mask_input(self, mailbox: bytes, tensors: Mapping[str, Tensor], weight: float = 1.0) -> bytes:
        """Step 3: the weighted tensors and the weight under this client's own mask and its masks with all others.

        Args:
            mailbox: the shares the others sealed for this client; the mask of whoever is missing is left out.
            tensors: by name, in the agreed shapes. They are multiplied by ``weight`` here.
            weight: 0 to ``max_weight``.

        Raises:
            PrivacyError: fewer clients than the threshold.
            MessageError: the mailbox is malformed, a share was altered, or the tensors are not as agreed.
        """
        self._steps.check("mask_input")
        sealed = self._unpack("mailbox", mailbox).fields["sealed"]
        if not set(sealed) <= set(self._channel_keys) - {self.name}:
            raise MessageError(
                f"the mailbox of client '{self.name}' holds shares of clients that are not on the roster"
            )
        self._refuse_few(len(sealed) + 1, "have shared their keys")
        received = {}
        for other in sorted(sealed):
            purpose = crypto.label("channel", other, self.name)
            key = crypto.agree(self._secrets["channel"], self._channel_keys[other], self._salt, purpose)
            received[other] = crypto.open_sealed(key, sealed[other], purpose)
        words = encode(tensors, weight, self._shapes, self.settings)
        words += self._mask(crypto.derive(self._secrets["seed"], self._salt, seed_purpose(self.name)), len(words))
        for other in received:
            purpose = mask_purpose(self.name, other)
            key = crypto.agree(self._secrets["mask"], self._mask_keys[other], self._salt, purpose)
            if adds(self.name, other):
                words += self._mask(key, len(words))
            else:
                words -= self._mask(key, len(words))
        self._shares |= received
        self._secrets.clear()  # what may still be asked of this client lies in the shares
        self._steps.done()
        return self._pack("input", {}, words.tobytes())

    def unmask(self, request: bytes) -> bytes:
        """Step 4: for each survivor the share of its seed, for each client that dropped the share of its mask key.

        Raises:
            PrivacyError: the request asks for both secrets of a client, or names fewer survivors than the threshold.
            MessageError: the request is malformed, or its two lists are not the clients that shared keys.
        """
        self._steps.check("unmask")
        fields = self._unpack("request", request).fields
        survivors, dropped = fields["survivors"], fields["dropped"]
        both = sorted(set(survivors) & set(dropped))
        if both:
            raise PrivacyError(
                f"the server asks client '{self.name}' for both secrets of {both[:5]}, which would uncover their inputs"
            )
        self._refuse_few(len(survivors), "have sent their inputs")
        if self.name not in survivors or {*survivors, *dropped} != set(self._shares):
            raise MessageError(f"the request to unmask is not about the clients that shared keys with '{self.name}'")
        seeds = {name: self._shares[name][: shamir.SHARE_BYTES] for name in survivors}
        keys = {name: self._shares[name][shamir.SHARE_BYTES :] for name in dropped}
        self._shares = {}
        self._steps.done()
        return self._pack("reveal", {"seed_shares": seeds, "key_shares": keys})

    def _refuse_few(self, number: int, what: str) -> None:
        if number < self.settings.t:
            raise PrivacyError(
                f"client '{self.name}' leaves round {self.round} of secure aggregation: {number} clients {what}, "
                f"fewer than the threshold of {self.settings.t}"
            )

    def _mask(self, key: bytes, words: int) -> np.ndarray:
        return crypto.mask(key, words, self.settings.dtype)

    def _pack(self, kind: str, fields: Mapping[str, object], body: bytes = b"") -> bytes:
        assert self._session is not None
        return pack(kind, self.name, self.round, self._session, fields, body)

    def _unpack(self, kind: str, payload: bytes) -> Envelope:
        return unpack(
            kind,
            payload,
            sender=SERVER,
            round=self.round,
            session=self._session,
            clients=self.settings.num_clients,
        )


def input_bytes(shapes: Shapes, settings: SecAggSettings) -> int:
    """Size of the body of a masked input."""
    return num_words(shapes) * settings.dtype.itemsize
