"""Secure aggregation within the federated loop: the server learns a mean or a sum over clients and no single summand."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sfubm.errors import ConfigError, MessageError, PrivacyError
from lightning_sfubm.federated.shares import clients_of
from lightning_sfubm.privacy.secagg.encoding import SecAggSettings
from lightning_sfubm.privacy.secagg.primitives import require_cryptography

if TYPE_CHECKING:
    from lightning_sfubm.privacy.secagg.server import SecureSum

#: (client, direction, step of the protocol, bytes that travelled)
Record = Callable[[str, str, str, bytes], None]


class SecureAggregation:
    """Settings of :mod:`lightning_sfubm.privacy.secure_aggregation` for the rounds of a federation. Needs the extra ``secagg``.

    The weighted mean of the clients' weights comes out exact to fixed-point precision, whoever dropped out, so that a run
    does not depend on the masks. The aggregator sees one update, the mean: FedAvg, FedAdam and FedYogi take it, robust means
    do not.

    Args:
        threshold: share of the round's clients that must stay to the end, more than one half.
        clip: largest absolute value of a weight; a client with a larger one is refused by its own encoder.
        fractional_bits: precision of the fixed-point form.
        max_weight: largest number of examples a client may weigh in with, where clients are weighted.
        modulus_bits: 32 or 64 bits a value; 32 halves the traffic and needs a smaller ``clip`` or fewer bits.

    Raises:
        ConfigError: a number is out of range, sums of two clients could wrap, or the package ``cryptography`` is missing.
    """

    def __init__(
        self,
        threshold: float = 0.6,
        clip: float = 16.0,
        fractional_bits: int = 24,
        max_weight: float = 1e6,
        modulus_bits: int = 64,
    ) -> None:
        require_cryptography()  # now, not after a round of training
        if not 0.5 < threshold <= 1:
            raise ConfigError(f"secure_aggregation.threshold = {threshold} must lie in (0.5, 1]")
        self.threshold, self.clip, self.fractional_bits = threshold, clip, fractional_bits
        self.max_weight, self.modulus_bits = max_weight, modulus_bits
        if not 0 < max_weight <= 1 << 53:  # false for NaN too
            raise ConfigError(f"secure_aggregation.max_weight = {max_weight} must be positive and at most 2^53")
        self.check_clients(2)

    def check_clients(self, clients: int, clip: float | None = None, weighted: bool = False) -> None:
        """Refuse settings under which a round of so many clients could never be summed.

        Args:
            clients: the most that take part in a round.
            clip: largest absolute value of an element; ``None`` for the settings' own.
            weighted: whether clients weigh in with up to ``max_weight`` examples, or each the same.

        Raises:
            ConfigError: so it is.
        """
        self._settings(clients, self.clip if clip is None else clip, self.max_weight if weighted else 1.0)

    def check_examples(self, examples: Mapping[str, float]) -> None:
        """Refuse a client that could not weigh in.

        Args:
            examples: number by client.

        Raises:
            ConfigError: one has more than ``max_weight``.
        """
        most = max(sorted(examples), key=lambda name: examples[name])
        if examples[most] > self.max_weight:
            raise ConfigError(
                f"secure_aggregation.max_weight = {self.max_weight:g} is below the {examples[most]:g} training interactions "
                f"that '{most}' would weigh in with: raise it, or set weighting to 'uniform'"
            )

    def mean(
        self,
        round: int,
        updates: Mapping[str, Mapping[str, Tensor]],
        weights: Mapping[str, float] | None,
        record: Record,
    ) -> dict[str, Tensor]:
        """The weighted mean of the clients' tensors, by the protocol, every message recorded.

        Args:
            round: of the federation.
            updates: named float tensors by client; at least two clients.
            weights: number of examples by client; ``None`` = all the same. The server learns their sum alone.
            record: called with every message.

        Returns:
            float32 tensors by name.

        Raises:
            PrivacyError: fewer than two clients, or fewer than the threshold at some step.
            MessageError: a client's tensors do not fit, or the weights are all zero.
        """
        max_weight = 1.0 if weights is None else self.max_weight
        mean = self._total(round, updates, weights, self.clip, max_weight, record, "").mean()
        if not mean:
            raise MessageError(f"round {round}: the clients' numbers of examples add up to zero")
        return {name: value.to(torch.float32) for name, value in mean.items()}

    def sum(
        self, round: int, vectors: Mapping[str, Mapping[str, Tensor]], clip: float, record: Record, prefix: str = ""
    ) -> dict[str, Tensor]:
        """The sum of the clients' tensors, by the protocol, every message recorded.

        Args:
            round: of the federation.
            vectors: named float tensors by client; at least two clients.
            clip: largest absolute value of an element, in the place of the settings' own.
            record: called with every message.
            prefix: of the kinds it is called with.

        Returns:
            float64 tensors by name.

        Raises:
            PrivacyError: fewer than two clients.
            MessageError: a client's tensors do not fit, or hold a value beyond ``clip``.
        """
        return self._total(round, vectors, None, clip, 1.0, record, prefix).tensors

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse an update that could not be encoded, before the protocol has begun with it.

        Raises:
            MessageError: a tensor holds a value beyond ``clip``.
        """
        for name, value in tensors.items():
            if value.numel() and float(value.abs().max()) > self.clip:
                raise MessageError(
                    f"tensor '{name}' holds a value beyond the clip range +-{self.clip:g} of secure aggregation: raise "
                    "secure_aggregation.clip"
                )

    def survivors(self, clients: int) -> int:
        """How many of the clients must stay to the end."""
        return max(clients_of(self.threshold, clients), clients // 2 + 1)

    def _settings(self, clients: int, clip: float, max_weight: float) -> SecAggSettings:
        return SecAggSettings(
            clients,
            self.survivors(clients),
            clip=clip,
            fractional_bits=self.fractional_bits,
            max_weight=max_weight,
            modulus_bits=self.modulus_bits,
        )

    def _total(
        self,
        round: int,
        updates: Mapping[str, Mapping[str, Tensor]],
        weights: Mapping[str, float] | None,
        clip: float,
        max_weight: float,
        record: Record,
        prefix: str,
    ) -> "SecureSum":
        from lightning_sfubm.privacy.secure_aggregation import SecAggClient, SecAggServer

        names = sorted(updates)
        if len(names) < 2:
            raise PrivacyError(
                f"round {round}: {len(names)} client is there; under secure aggregation a sum needs two at least"
            )
        settings = self._settings(len(names), clip, max_weight)
        shapes = {key: tuple(value.shape) for key, value in updates[names[0]].items()}
        server = SecAggServer(settings, shapes, round)
        clients = {name: SecAggClient(name, settings, shapes, round) for name in names}

        def up(step: str, answers: dict[str, bytes]) -> dict[str, bytes]:
            for name, payload in answers.items():
                record(name, "up", f"{prefix}secagg {step}", payload)
            return answers

        def down(step: str, payload: bytes | Mapping[str, bytes]) -> dict[str, bytes]:
            sent = dict(payload) if isinstance(payload, Mapping) else dict.fromkeys(names, payload)
            for name, content in sent.items():
                record(name, "down", f"{prefix}secagg {step}", content)
            return sent

        invited = down("invite", server.invite())
        roster = server.collect_keys(up("keys", {n: clients[n].advertise_keys(invited[n]) for n in names}))
        sent = down("roster", roster)
        mailboxes = down(
            "mailbox", server.collect_shares(up("shares", {n: clients[n].share_keys(sent[n]) for n in names}))
        )
        weighed = dict.fromkeys(names, 1.0) if weights is None else weights
        inputs = {n: clients[n].mask_input(mailboxes[n], dict(updates[n]), weighed[n]) for n in names}
        request = down("survivors", server.collect_inputs(up("masked input", inputs)))
        return server.collect_reveals(up("unmask", {n: clients[n].unmask(request[n]) for n in names}))
