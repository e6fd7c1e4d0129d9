"""A silo on a machine of its own: the federated loop's part for one client, driven by requests instead of by a loop.

Every request may find a new process, so the silo opens its run folder each time: it goes on from the newest whole state,
as a resumed loop does, and writes one after every piece of work. A request that comes twice (the coordinator was restarted
and cannot know what arrived) is answered twice and trained once.
"""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock
from torch import Tensor

from lightning_sfubm.errors import ConfigError, MessageError, PrivacyError
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.envelopes import (
    Reply,
    Request,
    check_across_machines,
    describe_shapes,
    read_terms,
    terms,
)
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.hooks import ClientDropped
from lightning_sfubm.federated.ledger import INITIAL_WEIGHTS
from lightning_sfubm.federated.loop import FederatedLoop
from lightning_sfubm.federated.messages import Message, MessageSchema, ReplayGuard, pack, unpack
from lightning_sfubm.federated.server import SERVER
from lightning_sfubm.federated.settings import named_difference
from lightning_sfubm.federated.state import OF_SILO
from lightning_sfubm.locks import locked

if TYPE_CHECKING:
    from lightning_sfubm.cli import SFUBMCLI
    from lightning_sfubm.federated.trainer import FederatedTrainer

log = logging.getLogger(__name__)


class Silo(FederatedLoop):
    """The loop of one client whose server is elsewhere.

    Hooks run as in the loop, but for ``on_aggregate``, which belongs to the server; ``on_round_end`` comes when the silo's
    part of a round is done and knows this client alone.

    Args:
        federation: of the silo's own configuration: what it agreed to.
        client: of this silo.
        callbacks: hooks; noise is added here, before a message leaves.
        run_dir: where states, the ledger and the history are kept between requests.
        seed: root seed, the same for all.
        loggers: experiment loggers that callbacks may write to.
        settings: of its configuration; see :func:`~lightning_sfubm.federated.settings.lasting_settings`.

    Raises:
        ConfigError: the schedule cannot be carried across machines.
    """

    def __init__(
        self,
        federation: Federation,
        client: Client,
        callbacks: Sequence[object],
        run_dir: Path,
        seed: int,
        loggers: Any = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_across_machines(federation)
        self.agreed, self.name = federation, client.name
        super().__init__(federation.of(client.name), {client.name: client}, callbacks, run_dir, seed, loggers, settings)
        self._simulated = [
            type(c).__name__
            for c in callbacks
            if getattr(c, "secret_dir", "none needed") is None and getattr(c, "sigma", None) != 0
        ]
        self._global: Message | None = None
        self.ledger.durable = True

    @property
    def client(self) -> Client:
        """The one client."""
        return self.clients[self.name]

    @property
    def shares_teacher(self) -> bool:
        """Whether what a round trains leaves this machine."""
        return self.federation.sends_teacher

    def answer(self, request: Request) -> Reply:
        """Do what is asked, if the silo agreed to it.

        Raises:
            SFUBMError: it is refused. Nothing has left then.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # An abandoned request may still be at work in another process, and is waited for; a ``fit`` in this folder is not.
        with FileLock(self.run_dir / ".flower.lock"), locked(self.run_dir, "--trainer.default_root_dir"):
            self._check_terms(request)
            self._check_due(request)
            self._open(request)
            self._check_untrained(request)
            if request.action == "hello":
                return self._hello()
            if request.action == "semantics":
                self._check_protected()
                vectors = {"vectors": self.client.semantics()}
                return Reply(self.name, semantics=self._send(self.name, self.server.semantics, request.round, vectors))
            self._turn_to(request.round)
            self._take(request)
            if request.action == "train":
                return self._train_round(request.round)
            self._finish()
            return Reply(self.name)

    # ------------------------------------------------------------------ what is agreed

    def _check_terms(self, request: Request) -> None:
        """Refuse a run that asks for more, or for something else, than this silo's own configuration says."""
        asked, own = read_terms(request.terms), json.loads(terms(self.agreed, self.seed))
        rounds, agreed = asked.pop("rounds", None), own.pop("rounds")
        if differs := named_difference(asked, own, "{} is {!r} and here {!r}"):
            raise ConfigError(f"the run asks for other terms than trainer.federation of this silo: {differs}")
        if not isinstance(rounds, int) or isinstance(rounds, bool) or not 0 <= rounds <= agreed:
            raise ConfigError(f"the run asks for {rounds} rounds, this silo agreed to {agreed}")
        if self._simulated:
            raise PrivacyError(
                f"the noise of {', '.join(self._simulated)} is derived from the run's seed, which the server knows: set its "
                "secret_dir to a folder of this silo"
            )
        if self.agreed.sends_semantics and self.client.order_seed == self.seed:
            raise PrivacyError(
                "the order in which item vectors leave is drawn from the run's seed, which the server knows: set the "
                "secret_dir of PrivacyNoise to a folder of this silo, or give a callback of your own that protects them a "
                "method order_seed(seed, client)"
            )

    def _check_due(self, request: Request) -> None:
        """Refuse what the agreed terms do not ask of this silo in this round: terms alone bound nothing that is sent."""
        own, number = self.agreed, request.round
        if request.action == "semantics":
            if not own.sends_semantics:
                raise ConfigError(f"the run asks for item vectors, which exchange: {own.exchange} does not send")
            due = number == 0 or number in own.joins.values()
        elif request.action == "train":
            due = 1 <= number <= own.rounds
        elif request.action == "finish":
            last = int(str(read_terms(request.terms)["rounds"]))
            if number != last + 1:
                raise ConfigError(f"the run asks to finish in round {number}, and its terms say {last} rounds")
            return
        else:
            return
        if not due or number > own.rounds or not own.active([self.name], number):
            raise ConfigError(
                f"the run asks for '{request.action}' in round {number}, which this silo did not agree to: it takes part in "
                f"rounds {own.joins.get(self.name, 1)} to {min(own.rounds, own.leaves.get(self.name, own.rounds))}"
            )

    def _check_untrained(self, request: Request) -> None:
        """Refuse to send what was trained for this silo alone, or item vectors that training may have changed."""
        client, counters = self.client, self.counters
        if request.action in ("train", "semantics") and client.phases_done:
            raise MessageError(
                f"'{request.action}' of round {request.round} arrived after this silo had finished: what it has trained "
                "since then stays here"
            )
        texts_alone = getattr(client.module, "semantics_of_texts", False)
        if (
            request.action == "semantics"
            and not texts_alone
            and (request.round or 1) <= counters.round + bool(counters.trained)
        ):
            raise MessageError(
                f"'semantics' of round {request.round} arrived after this silo had trained in round "
                f"{counters.round + bool(counters.trained)}: its item vectors are not those of round {request.round} any more"
            )

    def _open(self, request: Request) -> None:
        """Go on where the last request ended."""
        marker, states = self.run_dir / OF_SILO, any(self.checkpoints.glob("state-*"))
        if (marker.read_text() != request.federation) if marker.exists() else states:
            raise ConfigError(
                f"{self.run_dir} holds another run: move it away, or give this silo another trainer.default_root_dir"
            )
        if not states and self.ledger.messages():
            raise ConfigError(
                f"{self.run_dir} has the record of what left it, but no state: what was spent cannot be counted on. Put "
                "its checkpoints back, or give this silo another trainer.default_root_dir"
            )
        if not marker.exists() and request.action != "hello":
            raise MessageError(f"'{request.action}' from a federated run that never said hello to this silo")
        write_atomically(marker, request.federation.encode(), durable=True)
        self.answers = ReplayGuard()  # what comes again with a request that comes again is not new, and yet no replay
        if states:
            self.resume(self.checkpoints)
        else:
            self._start()
            self._checkpoint()  # before anything leaves: a ledger is never begun twice

    # ------------------------------------------------------------------ requests

    def _hello(self) -> Reply:
        first = self.server.global_teacher  # as built from the seed: no data has touched it
        shape = describe_shapes(int(self.client.module.semantics().shape[1]), first)
        if self.server.broadcast_schema is None:
            return Reply(self.name, shape=shape)
        message = self._record_up(self.server.broadcast_schema, 0, first, {"content": INITIAL_WEIGHTS})
        return Reply(self.name, shape=shape, teacher=message)

    def _take(self, request: Request) -> None:
        """What came with the request: the server's view of the items now, the global teacher when it is needed."""
        if request.semantics:
            message = _from_server(
                self.server.semantics, request.semantics, self.counters.exchanged or 0, request.round
            )
            view = self._receive(self.name, self.server.semantics, message, message.round)
            self.client.receive_semantics(view["vectors"])
            self.counters.exchanged = message.round
        if request.teacher:
            if self.server.broadcast_schema is None:
                raise MessageError("the server sent teacher weights, and this silo agreed to none")
            held = self.counters.versions.get(self.name, 0)
            self._global = _from_server(self.server.broadcast_schema, request.teacher, held, request.round - 1)

    def _catch_up(self, name: str) -> None:
        if self._global is None or self._global.round == self.counters.versions.get(name, 0):
            return
        assert self.server.broadcast_schema is not None
        version = self._global.round
        self.client.receive_teacher(self._receive(name, self.server.broadcast_schema, self._global, version))
        self.counters.versions[name] = version

    def _train_round(self, number: int) -> Reply:
        if self.name not in self.counters.trained and self.name not in self.counters.dropped:
            for callback in self.callbacks:
                callback.on_round_start(self, number)
            self._train(self.name, number)
            self._checkpoint()
        if self.name in self.counters.dropped:
            return Reply(self.name, error=ClientDropped.__name__)
        update = b""
        if self.shares_teacher:
            self._check_guarantees(number)
            assert self.server.teacher is not None
            update = self._send(self.name, self.server.teacher, number, self._update(self.name))
        for callback in self.callbacks:
            callback.on_round_end(self, number, dict(self.counters.trained))
        return Reply(self.name, teacher=update)

    def _finish(self) -> None:
        self._catch_up(self.name)
        self._checkpoint()
        todo = [p for p in self.client.module.local_phases if p not in self.client.phases_done]  # type: ignore[union-attr]
        for phase in todo:
            self._local_phase(self.name, self.client, phase, last=phase == todo[-1])
        self.client.finish()

    def _turn_to(self, number: int) -> None:
        """Leave earlier rounds behind; whatever came of what was sent in them, they are over."""
        if number <= self.counters.round:
            raise MessageError(f"round {number} arrived after round {self.counters.round} was over (replay)")
        if number > self.counters.round + 1:
            self.counters.turn_to(number - 1)

    def _record_up(
        self, schema: MessageSchema, round: int, tensors: Mapping[str, Tensor], mechanism: dict[str, object]
    ) -> bytes:
        message = pack(schema, self.name, round, tensors)
        self.ledger.record(self.name, "up", message, mechanism)
        return message.payload


def _from_server(schema: MessageSchema, payload: bytes, held: int, latest: int) -> Message:
    """A message of the server, of a round from ``held``, whose answer this silo has, to ``latest``, whose answer there can be.

    The one it has may come again: the coordinator cannot know that it arrived.
    """
    message = unpack(schema, payload)
    if message.client != SERVER:
        raise MessageError(f"a message of '{message.client[:40]}' arrived in the place of one of the server")
    if message.round < held:
        raise MessageError(f"the {message.kind} of round {message.round} arrived after that of round {held} (replay)")
    if message.round > latest:
        raise MessageError(
            f"the {message.kind} of round {message.round} arrived in round {latest + 1}, before there can be one"
        )
    return message


def open_silo(configs: Sequence[str], name: str) -> Silo:
    """Build a silo from its own configuration files, which never leave its machine, and prepare its data.

    Args:
        configs: paths, later ones win: the federation's common part, then this silo's ``data``.
        name: of the silo and of its domain in ``data.domains``.

    Raises:
        ConfigError: no federation is agreed to, or there is no such domain.
    """
    cli, federation = read_silo(configs, name)
    trainer = cast("FederatedTrainer", cli.trainer)
    clients = trainer.build_clients(cli.model, cli.datamodule)
    return Silo(
        federation,
        clients[name],
        trainer.loop_callbacks,
        trainer.run_dir,
        trainer.seed,
        trainer.shared_loggers,
        cli.lasting_settings,
    )


def read_silo(configs: Sequence[str], name: str) -> "tuple[SFUBMCLI, Federation]":
    """What a silo's configuration files say, no data read: trainer, model and the silo's own domain, and its federation.

    Args:
        configs: as those of :func:`open_silo`.
        name: of the silo.

    Raises:
        ConfigError: no federation is agreed to, there is no such domain, or the trainer asks for several processes.
    """
    from lightning_sfubm.cli import SFUBMCLI
    from lightning_sfubm.federated.trainer import FederatedTrainer

    arguments = [part for path in configs for part in ("--config", path)]
    with (
        warnings.catch_warnings()
    ):  # Lightning would print the arguments of this process, among them a token of Flower's
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended.*")
        cli = SFUBMCLI(args=arguments, run=False)
    trainer, data = cli.trainer, cast(Any, cli.datamodule)
    assert isinstance(trainer, FederatedTrainer)
    if trainer.federation is None:
        raise ConfigError(f"{configs[-1]}: trainer.federation is missing: it says what this silo agrees to send")
    if trainer.world_size > 1:  # each further process would start as another task of the same message
        raise ConfigError(
            f"{configs[-1]}: a silo trains in one process, and its trainer asks for {trainer.world_size}: set trainer.devices "
            "and trainer.num_nodes to 1"
        )
    domains = getattr(data, "domains", {})
    if name not in domains:
        raise ConfigError(
            f"{configs[-1]}: data must be a FederatedDataModule with the domain '{name}', the name of this silo; its domains "
            f"are {sorted(domains)}"
        )
    data.domains = {name: domains[name]}  # whatever else there is, it is not this silo's
    return cli, trainer.federation
