"""The federated loop: exchange, privacy, checkpoints and exact resume (T1, T3, T5, T6, T15, T18, T19)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import CheckpointError, ConfigError, PrivacyError
from lightning_sfubm.federated.aggregation import KMeans, NoAggregation
from lightning_sfubm.federated.checkpoint import find_state
from lightning_sfubm.federated.hooks import FederatedCallback
from tests.conftest import small_distiller


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name, client in trainer.loop.clients.items()
        for key, value in client.module.state_dict().items()
    }


def ledger(trainer: Any) -> list[dict]:
    return [json.loads(line) for line in (trainer.run_dir / "ledger.jsonl").read_text().splitlines()]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class StopAfter(FederatedCallback):
    """Die after a round, as a killed process does: nothing is cleaned up."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_round_end(self, loop: Any, round: int, metrics: Any) -> None:
        if round == self.round:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_resumed_after_a_round_equals_one_that_never_stopped(
    stop: int, federated_data: Any, federated_trainer: Any
) -> None:
    straight = federated_trainer("straight", rounds=3)
    straight.fit(small_distiller(), datamodule=federated_data())

    broken = federated_trainer("broken", rounds=3, callbacks=[PrivacyNoise(0.05), StopAfter(stop)])
    with pytest.raises(KeyboardInterrupt):
        broken.fit(small_distiller(), datamodule=federated_data())
    torch.manual_seed(999)  # a new process has another global stream
    resumed = federated_trainer("broken", rounds=3)
    resumed.fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")

    assert same(weights(straight), weights(resumed))
    for file in ("history.jsonl",):
        assert (straight.run_dir / file).read_text() == (resumed.run_dir / file).read_text()
    hide = {"sha256", "previous"}  # nonces differ, contents do not
    strip = [
        [{k: v for k, v in e.items() if k not in hide} for e in ledger(t) if not e.get("resent")]
        for t in (straight, resumed)
    ]
    assert strip[0] == strip[1]
    assert same(straight.loop.server.global_teacher, resumed.loop.server.global_teacher)
    last = [find_state(t.run_dir / "checkpoints") for t in (straight, resumed)]
    for name in straight.loop.clients:
        first, second = (torch.load(s / "clients" / f"{name}.ckpt", weights_only=True) for s in last)
        assert first["global_step"] == second["global_step"] > 0
        assert same(first["state_dict"], second["state_dict"])


def test_optimizer_and_counters_go_on_over_rounds(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(rounds=3, local_epochs=2, callbacks=[PrivacyNoise(0.05), StopAfter(3)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(small_distiller(), datamodule=federated_data())
    checkpoint = torch.load(find_state(trainer.run_dir / "checkpoints") / "clients" / "alpha.ckpt", weights_only=True)
    steps = {int(state["step"]) for state in checkpoint["optimizer_states"][0]["state"].values()}
    batches = len(trainer.loop.clients["alpha"].datamodule.train_dataloader())
    assert steps == {3 * 2 * batches}
    assert checkpoint["epoch"] in (5, 6)


def test_the_teacher_is_averaged_and_id_parameters_are_not(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(rounds=1, callbacks=[PrivacyNoise(0.05), StopAfter(1)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(small_distiller(), datamodule=federated_data())
    alpha, beta = (trainer.loop.clients[n].module for n in ("alpha", "beta"))
    assert same(alpha.shared_state(), beta.shared_state())
    assert same(alpha.shared_state(), trainer.loop.server.global_teacher)
    shared = set(alpha.shared_state())
    assert shared
    own = dict(alpha.named_parameters())
    identities = [n for n in own if n.startswith(("items", "encoder", "id_"))]
    assert identities
    assert not any(name.split(".", 1)[-1] in shared and name.startswith("items") for name in identities)


def test_what_leaves_is_vectors_and_teacher_weights_only(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer()
    trainer.fit(small_distiller(), datamodule=federated_data(num_items=53))
    template = set(trainer.loop.clients["alpha"].module.shared_state())
    up = [e for e in ledger(trainer) if e["direction"] == "up"]
    assert {e["kind"] for e in up} == {"semantics", "teacher"}
    for entry in up:
        allowed = {"vectors"} if entry["kind"] == "semantics" else template
        assert set(entry["tensors"]) == allowed
    items = {n: c.datamodule.num_items for n, c in trainer.loop.clients.items()}
    sizes = [e["tensors"]["vectors"]["shape"] for e in up if e["kind"] == "semantics"]
    assert sizes == [[items["alpha"], 32], [items["beta"], 32]]
    for entry in up:
        if entry["kind"] == "teacher":
            assert not any(
                items["alpha"] in t["shape"] or items["alpha"] + 1 in t["shape"] for t in entry["tensors"].values()
            )


def test_uploads_are_perturbed_once_and_in_a_private_order(federated_data: Any, federated_trainer: Any) -> None:
    class Spy(FederatedCallback):
        def __init__(self) -> None:
            self.clean: dict[str, torch.Tensor] = {}

        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            if kind == "semantics":
                self.clean.setdefault(client, tensors["vectors"])
            return tensors

    before, after = Spy(), Spy()
    trainer = federated_trainer(callbacks=[before, PrivacyNoise(0.1), after], rounds=1)
    trainer.fit(small_distiller(), datamodule=federated_data())
    for name, client in trainer.loop.clients.items():
        stored = client.module.semantics()
        assert not torch.equal(before.clean[name], stored)  # permuted
        assert torch.equal(before.clean[name].sort(0).values, stored.sort(0).values)
        cosine = (before.clean[name] * after.clean[name]).sum(1).mean()
        assert abs(float(cosine) - (1 + 32 * 0.01) ** -0.5) < 0.05
        first = client.semantics()
        mechanism = trainer._user_callbacks[1].mechanism(trainer.seed, name)
        assert torch.equal(mechanism(first), after.clean[name])
        # The answer lands on the right rows: undoing the private order gives it back.
        client.receive_semantics(first)
        torch.testing.assert_close(client.module.teacher.global_text[1:], stored)


def test_semantics_never_leave_unprotected(federated_data: Any, federated_trainer: Any) -> None:
    with pytest.raises(PrivacyError, match="PrivacyNoise"):
        federated_trainer(callbacks=[]).fit(small_distiller(), datamodule=federated_data())


def test_without_exchange_nothing_leaves_and_clients_do_not_depend_on_each_other(
    federated_data: Any, federated_trainer: Any
) -> None:
    both = federated_trainer("both", exchange="nothing", callbacks=[])
    both.fit(small_distiller(), datamodule=federated_data())
    assert ledger(both) == []
    alone = federated_trainer("alone", exchange="nothing", callbacks=[])
    alone.fit(small_distiller(), datamodule=federated_data(domains=1))
    for key, value in weights(alone).items():
        assert torch.equal(value, weights(both)[key])


def test_one_domain_runs_and_exchanges_nothing(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer()
    trainer.fit(small_distiller(), datamodule=federated_data(domains=1))
    assert ledger(trainer) == []
    assert trainer.loop.clients["alpha"].phases_done == list(trainer.loop.clients["alpha"].module.local_phases)


@pytest.mark.parametrize("aggregator", [KMeans(num_clusters=4), NoAggregation()])
def test_three_domains_with_other_aggregators(aggregator: Any, federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(rounds=1, aggregator=aggregator)
    trainer.fit(small_distiller(), datamodule=federated_data(domains=3))
    kinds = {e["kind"] for e in ledger(trainer)}
    assert kinds == ({"teacher"} if isinstance(aggregator, NoAggregation) else {"semantics", "teacher"})


def test_checkpoints_are_safe_whole_and_the_last_two(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(rounds=3)
    trainer.fit(small_distiller(), datamodule=federated_data())
    folder = trainer.run_dir / "checkpoints"
    assert len(list(folder.iterdir())) == 2  # the two newest; neither shares a file with the other
    newest = find_state(folder)
    assert "global_teacher" in torch.load(newest / "server.ckpt", weights_only=True)
    for file in (newest / "clients").rglob("*.ckpt"):
        assert "state_dict" in torch.load(file, weights_only=True)
    # A torn newest state is recognised and the one before is used.
    victim = newest / "clients" / "alpha.ckpt"
    victim.write_bytes(victim.read_bytes()[:-100])
    assert find_state(folder) != newest
    with pytest.raises(CheckpointError, match=r"alpha\.ckpt"):
        find_state(newest)
    with pytest.raises(CheckpointError, match="no federated checkpoint"):
        trainer.fit(small_distiller(), datamodule=federated_data(), ckpt_path=str(folder / "elsewhere"))


def test_resume_refuses_other_clients_models_and_schedules(federated_data: Any, federated_trainer: Any) -> None:
    federated_trainer(rounds=1).fit(small_distiller(), datamodule=federated_data())
    with pytest.raises(CheckpointError, match="clients"):
        federated_trainer(rounds=1).fit(small_distiller(), datamodule=federated_data(domains=3), ckpt_path="last")
    with pytest.raises(CheckpointError, match="schedule"):
        federated_trainer(local_epochs=2).fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    with pytest.raises(CheckpointError):
        federated_trainer(rounds=1).fit(small_distiller(), datamodule=federated_data(num_items=60), ckpt_path="last")


def test_test_after_fit_equals_test_from_the_checkpoint(
    federated_data: Any, federated_trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = federated_trainer(rounds=1)
    trainer.fit(small_distiller(), datamodule=federated_data())
    live = trainer.test(small_distiller(), datamodule=federated_data())
    assert all(name in capsys.readouterr().out for name in list(live[0])[:1])
    fresh = federated_trainer(rounds=1).test(
        small_distiller(), datamodule=federated_data(), ckpt_path="last", verbose=False
    )
    assert live == fresh
    assert {k.split("/")[0] for row in live for k in row} == {"alpha", "beta"}
    assert all(0 <= v <= 1 for row in live for k, v in row.items() if "hit" in k)


def test_test_items_reach_neither_statistics_nor_uploads(federated_data: Any, federated_trainer: Any) -> None:
    data = federated_data(num_users=40)
    trainer = federated_trainer(rounds=1)
    trainer.fit(small_distiller(), datamodule=data)
    for domain in data.domains.values():
        counted = int(domain.catalogue.train_counts.sum())
        held_out = 2 * len(domain.splits.eval_users) + len(domain.splits.stage2)
        assert counted + held_out == len(domain.domain.items)


@pytest.mark.parametrize(
    "bad", [{"rounds": -1}, {"local_epochs": 0}, {"patience": 0}, {"local_min_epochs": 5, "local_max_epochs": 2}]
)
def test_bad_schedules_are_refused(bad: dict, federated_trainer: Any) -> None:
    with pytest.raises(ConfigError, match="federation"):
        federated_trainer(**bad)


def test_noise_secrets_are_made_once_and_kept_private(tmp_path: Path) -> None:
    noise = PrivacyNoise(0.1, secret_dir=str(tmp_path / "secrets"))
    vectors = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    first = noise.mechanism(1, "shop")(vectors)
    assert torch.equal(first, PrivacyNoise(0.1, secret_dir=str(tmp_path / "secrets")).mechanism(2, "shop")(vectors))
    assert not torch.equal(first, noise.mechanism(1, "films")(vectors))
    key = tmp_path / "secrets" / "shop.key"
    assert key.stat().st_mode & 0o077 == 0
    key.write_bytes(b"short")
    with pytest.raises(PrivacyError, match=r"shop\.key"):
        noise.mechanism(1, "shop")
    with pytest.raises(ConfigError, match="sigma"):
        PrivacyNoise(-0.1)
