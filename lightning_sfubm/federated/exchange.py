"""What travels in a federated run: protected, packed, recorded, received, aggregated."""

import hashlib
import json
import logging
import re
import secrets
from typing import Any, cast

from torch import Tensor

from lightning_sfubm.errors import CheckpointError, ConfigError, MessageError, PrivacyError, SFUBMError
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.federated.hooks import ClientDropped
from lightning_sfubm.federated.ledger import PRIVATE, TEXTS_ALONE, UNTRAINED, content_hash
from lightning_sfubm.federated.messages import Message, MessageSchema, pack, unpack
from lightning_sfubm.federated.secure_kmeans import SecureKMeans
from lightning_sfubm.federated.server import SERVER
from lightning_sfubm.federated.state import NONCE, RunState
from lightning_sfubm.federated.weights import TooFewClientsError
from lightning_sfubm.ranks import is_first, refused_by_all, wait_for_all

log = logging.getLogger(__name__)

_MASKED = "secagg masked input"  #: kind of the message that holds a client's weights under masks


class Exchange(RunState):
    """The messages of a run between its clients and its server."""

    def _exchange_semantics(self, round: int) -> None:
        if not self.federation.sends_semantics:
            return
        with self.stopwatch("stage 1: semantics exchange"):
            self.exchange_semantics(round)
        self._checkpoint()

    def check_exchange(self) -> None:
        """Refuse exchanges of semantics that are sure to be refused, before there is one.

        Raises:
            PrivacyError: no callback protects item semantics, or a client has too few items for sums to hide them.
            MessageError: a client has more items than are agreed to.
        """
        if not self.federation.sends_semantics or len(self.clients) < 2:
            return
        self._check_protected()
        aggregator, vectors = self.federation.aggregator, self.server.semantics.tensors["vectors"]
        for name, client in self.clients.items():
            rows = len(client.module.semantics())
            if isinstance(aggregator, SecureKMeans):
                aggregator.check_items(name, rows)
            elif rows > vectors.max_rows:
                raise MessageError(
                    f"client '{name}' would send {rows} rows of item vectors, at most {vectors.max_rows} are "
                    f"accepted{vectors.way_out}"
                )

    def exchange_semantics(self, round: int = 0) -> None:
        """Perturbed item vectors up, aggregated vectors down, among the clients of a round.

        Raises:
            PrivacyError: no callback protects item semantics. Add ``PrivacyNoise``; sigma 0 must be asked for.
        """
        self._check_protected()
        if isinstance(self.federation.aggregator, SecureKMeans):
            self._cluster_securely(self.federation.aggregator, round)
            return
        schema, uploads = self.server.semantics, {}
        for name in self.federation.active(self.clients, round):
            try:
                uploads[name] = self._send(name, schema, round, {"vectors": self.clients[name].semantics()})
            except ClientDropped as error:
                log.warning("exchange of semantics: client '%s' dropped out (%s)", name, error)
        for name, answer in self.server.aggregate_semantics(round, uploads).items():
            self.clients[name].receive_semantics(self._receive(name, schema, answer, round)["vectors"])
        self.counters.exchanged = round

    def _cluster_securely(self, aggregator: SecureKMeans, round: int) -> None:
        """Per-cluster sums up, masked; centroids down. The vectors stay with their clients."""
        vectors, mechanisms = {}, {}
        exchanges = self.federation.exchanges(self.clients)
        for name in self.federation.active(self.clients, round):
            try:
                tensors, perturbed = self._protect(name, "semantics", {"vectors": self.clients[name].semantics()})
            except ClientDropped as error:
                log.warning("exchange of semantics: client '%s' dropped out (%s)", name, error)
                continue
            vectors[name], mechanisms[name] = tensors["vectors"], perturbed | aggregator.describe(exchanges)

        def record(client: str, direction: str, kind: str, payload: bytes) -> None:
            about = mechanisms[client] if direction == "up" else {}
            self.ledger.record_bytes(client, direction, kind, round, payload, about)

        def deliver(client: str, message: Message) -> None:
            self.ledger.record(client, "down", message, {})

        if len(vectors) < 2:
            log.warning(
                "exchange of semantics: %d client is there, a sum needs two at least. Every client keeps its own vectors.",
                len(vectors),
            )
            views = {}
        else:
            with refused_by_all():
                self._check_same_silos(aggregator, round, set(vectors))
            views = aggregator.views(round, vectors, self.seed, exchanges, record, deliver, self._run_nonce())
        for name, view in views.items():
            self.clients[name].receive_semantics(view)
        self.counters.exchanged = round

    def _run_nonce(self) -> str:
        """A number of this run alone, kept in its folder before the first message, so that a run that goes on has the same.

        Raises:
            PrivacyError: what is kept there is no such number.
            CheckpointError: it is that of a run with other settings, data or secrets.
        """
        path = self.run_dir / NONCE
        data = {name: client.datamodule.state_dict() for name, client in self.clients.items()}
        about: list[Any] = [self.federation.schedule(self.seed), self.settings, data]
        about += [self._secrets_hash(name) for name in self.clients if self._secret_dirs]
        of = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        if is_first() and not path.exists():
            write_atomically(path, f"{secrets.token_hex(16)} {of}".encode(), durable=True)
        wait_for_all()
        nonce, _, kept = path.read_text().partition(" ")
        if not re.fullmatch("[0-9a-f]{32}", nonce):
            raise PrivacyError(
                f"{path}: holds no number of a run, without which noise could come twice: start anew in another "
                "trainer.default_root_dir"
            )
        if kept != of:
            raise CheckpointError(
                f"{path}: messages of a run with other settings, data or secrets have left from here: start anew in another "
                "trainer.default_root_dir"
            )
        return nonce

    def _check_same_silos(self, aggregator: SecureKMeans, round: int, names: set[str]) -> None:
        """Sums that were opened once and are made again, for a run cut off before its first state, are the same or none."""
        since = [line for line in self.ledger.since if line["round"] == round and line["direction"] == "up"]
        opened = any(line["kind"] == "semantics secagg unmask" for line in since)
        before = {str(line["client"]) for line in since if line["kind"] == "semantics secagg masked input"}
        if aggregator.epsilon is not None and opened and before != names:
            raise PrivacyError(
                f"exchange of semantics: sums over {sorted(before)} were opened before this run was cut off, and sums over "
                f"{sorted(names)} would be a second release that epsilon does not count: start anew in another "
                "trainer.default_root_dir"
            )

    def _check_protected(self) -> None:
        if not any("semantics" in c.protects for c in self.callbacks):
            raise PrivacyError(
                "item semantics would leave unprotected: add lightning_sfubm.callbacks.privacy_noise.PrivacyNoise to "
                "trainer.callbacks (its sigma may be 0), or set exchange to 'teacher' or 'nothing'"
            )

    def _exchange_teacher(self, number: int) -> None:
        schema = self.server.teacher
        if schema is None:
            raise ConfigError("this server was built without a teacher to exchange")
        self._check_guarantees(number)
        arrived = self._aggregate_securely if self.federation.secure_aggregation else self._aggregate
        try:
            names = arrived(number, schema)
        except (TooFewClientsError, PrivacyError) as error:
            log.warning("round %d: %s The global teacher stays as it was.", number, error)
            names = sorted(self.counters.trained)
        for name in self.clients if number == self.federation.rounds else names:
            self._catch_up(name)

    def _check_guarantees(self, number: int) -> None:
        unprotected = [name for name in self.counters.trained if name not in self.counters.privacy]
        if self._private and unprotected:
            raise PrivacyError(
                f"round {number}: the run asks for differential privacy, but what {unprotected} trained has no guarantee; "
                "nothing is sent. Give every client the callback DifferentialPrivacy"
            )
        changed = [
            name
            for name in sorted(self.counters.privacy)
            if self.counters.guaranteed.get(name) != content_hash(self.clients[name].module.shared_state())
        ]
        if changed:
            raise PrivacyError(
                f"round {number}: the weights of {changed} are not those that were trained with differential privacy in this "
                "round; nothing is sent"
            )

    def _check_spent(self, name: str, number: int) -> None:
        """Refuse to train on from a state that does not know what left after it: that spends twice and counts once."""
        known = int(self.counters.spent.get(name, {}).get("steps", 0))
        since = self.ledger.private_since(name)
        lost = [round for round, steps in since.items() if round < number and steps > known]
        with refused_by_all():  # the first process alone knows the ledger
            if self._private and self.shares_teacher and lost:
                raise PrivacyError(
                    f"{self.ledger.path}: in round {lost[0]} '{name}' sent weights with differential privacy that the newest "
                    f"whole state does not know of, so that what round {number} spends could not be counted: put the later "
                    "states back, or start anew in another trainer.default_root_dir"
                )

    def _update(self, name: str) -> dict[str, Tensor]:
        """What a client has trained, as it is sent where every update travels in a message of its own."""
        tensors = self.clients[name].module.shared_state()
        if self.federation.weighting == "examples":
            tensors["__weight__"] = Tensor([self.clients[name].num_examples])
        return tensors

    def _aggregate(self, number: int, schema: MessageSchema) -> list[str]:
        """Updates up, each in a message of its own; returns whose arrived."""
        payloads = {}
        for name in sorted(self.counters.trained):
            try:
                payloads[name] = self._send(name, schema, number, self._update(name))
            except (ClientDropped, MessageError) as error:  # weights that diverged would end each run that goes on
                self._drop(name, number, error)
        self._check_updates(len(payloads))
        self.server.aggregate_teacher(number, payloads)
        return list(payloads)

    def _aggregate_securely(self, number: int, schema: MessageSchema) -> list[str]:
        """Masked updates up: the server learns their mean; returns whose arrived."""
        secure = self.federation.secure_aggregation
        assert secure is not None
        updates: dict[str, dict[str, Tensor]] = {}
        mechanisms: dict[str, dict[str, object]] = {}
        for name in sorted(self.counters.trained):
            try:
                tensors, mechanisms[name] = self._protect(name, schema.kind, self.clients[name].module.shared_state())
                packed = pack(schema, name, number, tensors).tensors  # checked as if it were sent
                secure.check(packed)  # found out within the protocol it would end the run, and again when that went on
                updates[name] = packed
            except (ClientDropped, MessageError) as error:
                self._drop(name, number, error)
        self._check_updates(len(updates))
        # Masks are new each time, so that the bytes do not tell whether private weights are released a second time.
        released = {name: content_hash(updates[name]) for name in updates if PRIVATE in mechanisms[name]}
        for name, content in released.items():
            self._check_released_once(name, number, _MASKED, content)
        weights = None
        if self.federation.weighting == "examples":
            weights = {name: float(self.clients[name].num_examples) for name in updates}

        def record(client: str, direction: str, kind: str, payload: bytes) -> None:
            masked = {**mechanisms[client], "secure aggregation": f"threshold {secure.threshold:g}"}
            about = masked if direction == "up" else {}
            content = released.get(client) if (direction, kind) == ("up", _MASKED) else None
            self.ledger.record_bytes(client, direction, kind, number, payload, about, content=content)

        self.server.take_mean(number, secure.mean(number, updates, weights, record))
        return list(updates)

    def _check_updates(self, count: int) -> None:
        if count < self.federation.min_updates:
            raise TooFewClientsError(f"{count} updates arrived, {self.federation.min_updates} are needed.")

    def _catch_up(self, name: str) -> None:
        """Give a client the current global teacher unless it holds it, or has left for good."""
        server, versions = self.server, self.counters.versions
        left = self.federation.leaves.get(name, self.counters.round + 1) <= self.counters.round
        if not server.version or versions.get(name, 0) == server.version or left:
            return
        assert server.broadcast_schema is not None
        received = self._receive(name, server.broadcast_schema, server.broadcast(), server.version)
        self.clients[name].receive_teacher(received)
        versions[name] = server.version

    def _drop(self, name: str, number: int, error: SFUBMError) -> None:
        log.warning("round %d: client '%s' dropped out (%s)", number, name, error)
        self.counters.trained.pop(name, None)
        self.counters.dropped.append(name)

    def _send(self, name: str, schema: MessageSchema, round: int, tensors: dict[str, Tensor]) -> bytes:
        tensors, mechanism = self._protect(name, schema.kind, tensors)
        message = pack(schema, name, round, tensors)
        if PRIVATE in mechanism:
            self._check_released_once(name, round, schema.kind, content_hash(message.tensors))
        self.ledger.record(name, "up", message, mechanism)
        return message.payload

    def _check_released_once(self, name: str, round: int, kind: str, content: str) -> None:
        """Refuse what would be a second private release of one round: its noise is another, and epsilon counts one.

        A run that goes on from its newest state sends the same again. From an earlier one, whose later state was lost, it may
        train from another global teacher, or draw its noise anew.
        """
        with refused_by_all():  # the first process alone knows the ledger
            for line in self.ledger.since:
                place = line["client"], line["round"], line["kind"], line["direction"]
                private = PRIVATE in cast("dict[str, Any]", line["mechanism"])
                if private and place == (name, round, kind, "up") and line["content_sha256"] != content:
                    raise CheckpointError(
                        f"{self.ledger.path}: in round {round} '{name}' sent other weights with differential privacy than "
                        "it has now, and both would count once: put the later states back, or start anew in another "
                        "trainer.default_root_dir; nothing is sent"
                    )

    def _protect(self, name: str, kind: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, object]]:
        """What the callbacks make of a client's tensors before they leave, and the mechanisms applied."""
        mechanism: dict[str, object] = {}
        if kind == "semantics" and getattr(self.clients[name].module, "semantics_of_texts", False):
            mechanism["content"] = TEXTS_ALONE
        elif kind == "semantics" and self._untrained(name):
            mechanism["content"] = UNTRAINED
        if kind == "teacher" and name in self.counters.privacy:
            mechanism[PRIVATE] = self.counters.privacy[name]
        for callback in self.callbacks:
            tensors = callback.on_upload(self, name, kind, tensors)  # type: ignore[arg-type]  # this is the loop
            mechanism |= callback.describe_upload(kind)
        return tensors, mechanism

    def _untrained(self, name: str) -> bool:
        """Whether nothing in a client's module was trained, by it or by others."""
        client, counters = self.clients[name], self.counters
        trained = name in counters.trained or client.rounds_done or client.phases_done
        return not trained and not counters.versions.get(name, 0)

    def _receive(self, name: str, schema: MessageSchema, message: Message, round: int) -> dict[str, Tensor]:
        """What the server sent a client; refused unless it is the server's, of that round, and new."""
        received = unpack(schema, message.payload)
        self.answers.accept(received, round, SERVER)
        self.ledger.record(name, "down", message, {})
        return received.tensors
