"""Who takes part in a round, what only rounds do, and rounds under secure aggregation (T16, T17, T18)."""

import copy
import json
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.callbacks.fedprox import FedProx
from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.hooks import ClientDropped, FederatedCallback
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.robust import CoordinateMedian
from lightning_sfubm.federated.secure import SecureAggregation
from lightning_sfubm.federated.server_optimizers import FedAdam
from tests.conftest import small_distiller
from tests.federated.hard_run import same

NAMES = ["a", "b", "c", "d", "e"]


@given(st.permutations(NAMES), st.integers(1, 50), st.floats(0.1, 1.0), st.integers(0, 9))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_the_draw_depends_on_round_and_seed_alone(order: list[str], round: int, share: float, seed: int) -> None:
    federation = Federation(participation=share)
    drawn = federation.sample(order, round, seed)
    assert drawn == federation.sample(NAMES, round, seed) == sorted(drawn)
    assert len(drawn) == max(1, -(-share * 5 // 1))


def test_every_client_is_drawn_about_equally_often() -> None:
    federation = Federation(participation=0.4)
    counts = dict.fromkeys(NAMES, 0)
    for number in range(1, 501):
        for name in federation.sample(NAMES, number, seed=1):
            counts[name] += 1
    assert sum(counts.values()) == 1000
    assert all(150 < count < 250 for count in counts.values())  # 200 expected, standard deviation 11


def test_clients_come_late_and_leave_early() -> None:
    federation = Federation(joins={"b": 3}, leaves={"a": 2})
    assert [federation.active(["a", "b", "c"], n) for n in (0, 2, 3)] == [["a", "c"], ["a", "c"], ["b", "c"]]
    assert federation.joined(["a", "b", "c"], 3) == ["b"]
    assert federation.joined(["a", "b", "c"], 1) == []
    assert federation.smallest_round(["a", "b", "c"]) == 2
    with pytest.raises(ConfigError, match="joins names 'b'"):
        federation.check_clients(["a", "c"])


@pytest.mark.parametrize(
    "bad",
    [{"participation": 0.0}, {"participation": 1.2}, {"min_updates": 0}, {"joins": {"a": 0}}, {"leaves": {"a": -1}}],
)
def test_settings_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="federation"):
        Federation(**bad)


class Away(FederatedCallback):
    def __init__(self, rounds: dict[int, set[str]]) -> None:
        self.rounds = rounds

    def on_client_start(self, loop: Any, client: str, round: int) -> None:
        if client in self.rounds.get(round, set()):
            raise ClientDropped("away")


def test_a_round_without_enough_updates_changes_nothing_and_is_logged(
    federated_data: Any, federated_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[int, Any] = {}

    class Watch(FederatedCallback):
        def on_aggregate(self, loop: Any, round: int) -> None:
            seen[round] = copy.deepcopy(loop.server.state_dict())  # teacher, its version, moments, nonces

    away = Away({2: {"alpha", "beta"}, 3: {"alpha"}})
    trainer = federated_trainer(
        rounds=4,
        exchange="teacher",
        weights=FedAdam(),
        min_updates=2,
        callbacks=[away, Watch()],
        flags={"limit_val_batches": 1},
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit(small_distiller(), datamodule=federated_data())
    assert same(seen[2], seen[1])
    assert same(seen[3], seen[1])
    for moving in seen[1]:
        assert not same(seen[4][moving], seen[1][moving]), moving
    assert "0 updates arrived, 2 are needed" in caplog.text
    assert "client 'alpha' dropped out (away)" in caplog.text
    assert trainer.loop.clients["alpha"].rounds_done == 2
    assert trainer.loop.clients["beta"].rounds_done == 3


def test_whoever_was_not_drawn_has_the_last_teacher_before_its_local_phases(
    federated_data: Any, federated_trainer: Any
) -> None:
    class Stop(FederatedCallback):
        def on_round_end(self, loop: Any, round: int, metrics: Any) -> None:
            self.trained = set(metrics)
            if round == 2:
                raise KeyboardInterrupt

    stop = Stop()
    trainer = federated_trainer(rounds=2, exchange="teacher", participation=0.5, callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(small_distiller(), datamodule=federated_data(domains=3, num_users=30))
    assert len(stop.trained) == 2
    for name, client in trainer.loop.clients.items():
        assert same(client.module.shared_state(), trainer.loop.server.global_teacher), name
        assert trainer.loop.counters.versions[name] == 2


def test_who_has_left_for_good_is_sent_nothing_more(federated_data: Any, federated_trainer: Any) -> None:
    class Stop(FederatedCallback):
        def on_round_end(self, loop: Any, round: int, metrics: Any) -> None:
            if round == 2:
                raise KeyboardInterrupt

    trainer = federated_trainer(rounds=2, exchange="teacher", leaves={"gamma": 1}, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(small_distiller(), datamodule=federated_data(domains=3, num_users=30))
    lines = read_ledger(trainer.run_dir / "ledger.jsonl")
    sent = {name: [line["round"] for line in lines if line["client"] == name] for name in trainer.loop.clients}
    assert sent == {"alpha": [1, 1, 2, 2], "beta": [1, 1, 2, 2], "gamma": [1, 1]}
    assert trainer.loop.counters.versions == {"alpha": 2, "beta": 2, "gamma": 1}


class WatchedFedProx(FedProx):
    """Notes in which trainings it is there, and that it pulls; trainers get copies, so the notes are the class's."""

    started: list[tuple[str, str]] = []
    pulled: set[str] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.started.append((trainer.datamodule.name, pl_module.phase))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        before = [p.grad.clone() for p in pl_module.teacher.parameters() if p.grad is not None]
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        after = [p.grad for p in pl_module.teacher.parameters() if p.grad is not None]
        if not all(map(torch.equal, before, after)):
            self.pulled.add(trainer.datamodule.name)


def test_fedprox_pulls_in_rounds_and_nowhere_else(federated_data: Any, federated_trainer: Any) -> None:
    class Moved(FederatedCallback):
        """How far each client's update lies from the weights that all started from."""

        def __init__(self) -> None:
            self.by: dict[str, float] = {}

        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            gaps = [(value - loop.server.global_teacher[name]).square().sum() for name, value in tensors.items()]
            self.by[client] = float(sum(gaps)) ** 0.5
            return tensors

    def run(mu: float, exchange: str) -> dict[str, float]:
        WatchedFedProx.started, WatchedFedProx.pulled, moved = [], set(), Moved()
        callbacks = [WatchedFedProx(mu), moved]
        trainer = federated_trainer(
            f"{mu} {exchange}", exchange=exchange, callbacks=callbacks, rounds=1, local_max_epochs=1
        )
        trainer.fit(small_distiller(), datamodule=federated_data())
        assert {c.phases_done == list(c.module.local_phases) for c in trainer.loop.clients.values()} == {True}
        return moved.by

    free = run(0.0, "teacher")
    assert WatchedFedProx.pulled == set()
    held = run(1e4, "teacher")
    assert WatchedFedProx.started == [("alpha", "teacher"), ("beta", "teacher")]  # the round, and no local phase
    assert WatchedFedProx.pulled == {"alpha", "beta"}
    assert all(held[name] < 0.8 * free[name] for name in ("alpha", "beta"))
    assert run(1e4, "nothing") == {}  # a round that stays at home is held near nothing
    assert WatchedFedProx.started == []


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_secure_rounds_give_the_plain_mean_and_send_nothing_in_the_clear(
    weighting: str, federated_data: Any, federated_trainer: Any
) -> None:
    pytest.importorskip("cryptography")
    runs = {}
    for name, secure in (("plain", None), ("secure", SecureAggregation()), ("again", SecureAggregation())):
        runs[name] = federated_trainer(
            name,
            exchange="teacher",
            weighting=weighting,
            secure_aggregation=secure,
            rounds=1,
            callbacks=[],
            flags={"limit_val_batches": 1},
        )
        runs[name].fit(small_distiller(), datamodule=federated_data(domains=3))
    plain, secure, again = (runs[n].loop.server.global_teacher for n in ("plain", "secure", "again"))
    assert all(
        (plain[k] - secure[k]).abs().max() < 1e-4 for k in plain
    )  # one round's rounding, a round of training on it
    assert all(torch.equal(secure[k], again[k]) for k in secure)  # masks are fresh, sums are exact
    up = [e for e in read_ledger(runs["secure"].run_dir / "ledger.jsonl") if e["direction"] == "up"]
    assert {e["kind"] for e in up} == {"secagg keys", "secagg shares", "secagg masked input", "secagg unmask"}
    assert all(e["tensors"] == {} and "secure aggregation" in e["mechanism"] for e in up)
    assert "__weight__" not in (runs["secure"].run_dir / "ledger.jsonl").read_text()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_beyond_the_clip_range_is_found_on_either_side(sign: int) -> None:
    secure = SecureAggregation(clip=2.0)
    secure.check({"w": sign * torch.tensor([2.0, 0.0]), "nothing": torch.zeros(0)})
    with pytest.raises(MessageError, match=r"'w' holds a value beyond the clip range \+-2"):
        secure.check({"w": sign * torch.tensor([2.01, 0.0])})


def test_where_all_weigh_the_same_the_largest_weight_takes_no_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = {name: {"w": torch.rand(5, generator=generator)} for name in "abc"}
    secure = SecureAggregation(modulus_bits=32, max_weight=1e6)
    mean = secure.mean(1, updates, None, lambda *message: None)["w"]
    torch.testing.assert_close(mean, torch.stack([update["w"] for update in updates.values()]).mean(0))
    with pytest.raises(ConfigError, match="could wrap"):
        secure.mean(1, updates, dict.fromkeys("abc", 1.0), lambda *message: None)


def test_a_secure_round_with_one_client_left_leaves_the_teacher_as_it_was(
    federated_data: Any, federated_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("cryptography")
    trainer = federated_trainer(
        exchange="teacher", secure_aggregation=SecureAggregation(), rounds=1, callbacks=[Away({1: {"beta"}})]
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit(small_distiller(), datamodule=federated_data())
    assert "a sum needs two at least" in caplog.text
    assert trainer.loop.server.version == 0
    assert [json.loads(line) for line in (trainer.run_dir / "ledger.jsonl").read_text().splitlines()] == []


def test_a_client_beyond_the_clip_range_is_left_out_of_a_secure_round(
    federated_data: Any, federated_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Found out within the protocol it would end the run, and again whenever the run went on."""
    pytest.importorskip("cryptography")

    class Grown(FederatedCallback):
        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            grown = client == "beta" and kind == "teacher"
            return {name: value + 100.0 * grown for name, value in tensors.items()}

    trainer = federated_trainer(
        exchange="teacher", secure_aggregation=SecureAggregation(), rounds=1, callbacks=[Grown()]
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit(small_distiller(), datamodule=federated_data(domains=3))
    assert "client 'beta' dropped out (tensor" in caplog.text
    assert "beyond the clip range +-16 of secure aggregation: raise secure_aggregation.clip" in caplog.text
    senders = {e["client"] for e in read_ledger(trainer.run_dir / "ledger.jsonl") if e["direction"] == "up"}
    assert trainer.loop.server.version == 1
    assert len(senders) == 2
    assert "beta" not in senders


@pytest.mark.parametrize("secure", [False, True])
def test_a_client_whose_weights_diverged_is_left_out_of_the_round(
    secure: bool, federated_data: Any, federated_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The schema refuses them; the run would end, and end again whenever it went on."""
    if secure:
        pytest.importorskip("cryptography")

    class Diverged(FederatedCallback):
        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            if (client, kind) == ("beta", "teacher"):
                return {name: torch.full_like(value, float("nan")) for name, value in tensors.items()}
            return tensors

    trainer = federated_trainer(
        exchange="teacher",
        secure_aggregation=SecureAggregation() if secure else None,
        rounds=1,
        callbacks=[Diverged()],
        flags={"limit_val_batches": 1},
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit(small_distiller(), datamodule=federated_data(domains=3))
    assert "client 'beta' dropped out (" in caplog.text
    assert "finite" in caplog.text
    senders = {e["client"] for e in read_ledger(trainer.run_dir / "ledger.jsonl") if e["direction"] == "up"}
    assert len(senders) == 2
    assert "beta" not in senders
    assert all(torch.isfinite(value).all() for value in trainer.loop.server.global_teacher.values())
    assert trainer.loop.server.version == 1


def test_twins_train_in_the_rounds_that_their_clients_were_drawn_for(
    federated_data: Any, federated_trainer: Any
) -> None:
    """A second twin has a seed of its own; who is drawn is the run's, so that both take as many steps."""
    trainer = federated_trainer(
        exchange="teacher", rounds=4, participation=0.3, local_max_epochs=1, flags={"limit_val_batches": 1}
    )
    trainer.fit(small_distiller(), datamodule=federated_data(domains=3))
    drawn = {name: client.rounds_done for name, client in trainer.loop.clients.items()}
    assert sum(drawn.values()) == 4
    assert len(set(drawn.values())) > 1
    for number in (1, 2):
        twins = {name: trainer.local_twin(small_distiller(), name, number) for name in drawn}
        assert {name: twin.rounds_done for name, twin in twins.items()} == drawn


def test_a_share_of_the_clients_is_no_more_than_it() -> None:
    """In floating point .28 of 25 is 7.000000000000001."""
    names = [f"c{number}" for number in range(25)]
    federation = Federation(participation=0.28)
    assert len(federation.sample(names, 1, seed=0)) == 7 == federation.smallest_round(names)
    assert SecureAggregation(threshold=0.56).survivors(25) == 14
    assert [len(Federation(participation=share).sample(names, 1, 0)) for share in (0.01, 0.281, 1.0)] == [1, 8, 25]


def test_robust_means_need_single_updates(federated_trainer: Any) -> None:
    with pytest.raises(ConfigError, match="CoordinateMedian"):
        federated_trainer(weights=CoordinateMedian(), secure_aggregation=SecureAggregation())
    with pytest.raises(ConfigError, match="threshold"):
        SecureAggregation(threshold=0.5)


def test_unprotected_noise_callbacks_still_see_what_is_masked(federated_data: Any, federated_trainer: Any) -> None:
    """A callback that perturbs the teacher acts before the masks."""
    pytest.importorskip("cryptography")
    kinds: list[str] = []

    class Spy(FederatedCallback):
        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            kinds.append(kind)
            return {k: torch.zeros_like(v) for k, v in tensors.items()} if kind == "teacher" else tensors

    trainer = federated_trainer(secure_aggregation=SecureAggregation(), rounds=1, callbacks=[PrivacyNoise(0.05), Spy()])
    trainer.fit(small_distiller(), datamodule=federated_data())
    assert kinds.count("teacher") == 2
    assert all(not value.any() for value in trainer.loop.server.global_teacher.values())
