"""The federated loop: exchange, privacy, checkpoints and exact resume (T1, T3, T5, T6, T15, T18, T19)."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder
from lightning_sfubm.errors import CheckpointError, ConfigError, MessageError, PrivacyError
from lightning_sfubm.federated.aggregation import KMeans, NoAggregation
from lightning_sfubm.federated.checkpoint import find_state
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.state import RunState
from lightning_sfubm.modules.fkd import FKDDistiller
from tests.conftest import small_distiller
from tests.federated.hard_run import data, finished_state, make
from tests.federated.hard_run import same as equal


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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class StopAfter(FederatedCallback):
    """Die after a round, as a killed process does: nothing is cleaned up."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_round_end(self, loop: Any, round: int, metrics: Any) -> None:
        if round == self.round:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_resumed_after_a_round_equals_one_that_never_stopped(
    stop: int, federated_data: Any, federated_trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = federated_trainer("straight", rounds=3)
    straight.fit(small_distiller(), datamodule=federated_data())

    broken = federated_trainer("broken", rounds=3, callbacks=[PrivacyNoise(0.05), StopAfter(stop)])
    with pytest.raises(KeyboardInterrupt):
        broken.fit(small_distiller(), datamodule=federated_data())
    torch.manual_seed(999)  # a new process has another global stream
    state = find_state(broken.run_dir / "checkpoints").name
    resumed = federated_trainer("broken", rounds=3)
    resumed.fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")

    said = capsys.readouterr().out
    assert f"Goes on from {state}: {stop} of 3 rounds and 0 of 4 local phases are done" in said.replace("\n", " ")
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
        assert straight.loop.clients[name].train_cpu_s > 0
        assert resumed.loop.clients[name].train_cpu_s is None  # what the first process spent is not known


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
    shared = alpha.shared_state()
    assert same(shared, {name: p.detach() for name, p in alpha.teacher.named_parameters()})
    # The student's encoder has the names and shapes of the teacher's: they must differ, or what is shared could be either.
    assert not any(
        torch.equal(shared[f"encoder.{name}"], p) for name, p in alpha.encoder.named_parameters() if p.dim() > 1
    )


class LayerOfItsOwn(FKDDistiller):
    """Initialises a shared part from torch's own generator, as a plug-in may."""

    def build(self, num_items: int, text_dim: int) -> None:
        super().build(num_items, text_dim)
        self.teacher.more = torch.nn.Linear(4, 4)


def test_a_shared_teacher_starts_equal_whatever_draws_its_weights(federated_data: Any, federated_trainer: Any) -> None:
    encoder = small_distiller().encoder
    clients = federated_trainer().build_clients(LayerOfItsOwn(encoder, num_experts=1), federated_data())
    alpha, beta = (clients[name].module.shared_state() for name in ("alpha", "beta"))
    assert "more.weight" in alpha
    assert same(alpha, beta)


class Seeds(Callback):
    """What torch was seeded with when a training began, by client; their trainers get copies of the callback."""

    seen: dict[str, list[int]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.setdefault(trainer.datamodule.name, []).append(torch.initial_seed())


def test_every_round_and_phase_of_every_client_draws_from_a_stream_of_its_own(
    federated_data: Any, federated_trainer: Any
) -> None:
    drawn = []
    for folder in ("first", "again"):
        Seeds.seen = {}
        trainer = federated_trainer(folder, rounds=2, exchange="teacher", local_max_epochs=1, callbacks=[Seeds()])
        trainer.fit(small_distiller(), datamodule=federated_data(num_users=30))
        drawn.append(Seeds.seen)
    assert drawn[0] == drawn[1]
    assert {name: len(seeds) for name, seeds in drawn[0].items()} == {"alpha": 4, "beta": 4}  # two rounds, two phases
    assert len({seed for seeds in drawn[0].values() for seed in seeds}) == 8


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


def test_an_upload_is_the_teachers_parameters_and_id_tables_have_not_even_a_gradient(
    federated_data: Any, federated_trainer: Any
) -> None:
    uploads: list[str] = []
    before: dict[str, torch.Tensor] = {}

    class Look(FederatedCallback):
        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            own = loop.clients[client].module
            if kind == "teacher":
                assert same(tensors, {name: p.detach() for name, p in own.teacher.named_parameters()})
                private = [p for n, p in own.named_parameters() if not n.startswith("teacher.")]
                assert any(p is own.ids.weight for p in private)
                assert all(p.grad is None and not p.requires_grad for p in private)
                uploads.append(client)
                before[client] = own.ids.weight.clone()
            return tensors

    trainer = federated_trainer(rounds=2, callbacks=[PrivacyNoise(0.05), Look()])
    trainer.fit(small_distiller(), datamodule=federated_data())
    assert uploads == ["alpha", "beta"] * 2  # and none from the local phases, which do train the tables
    for name, client in trainer.loop.clients.items():
        assert not torch.equal(client.module.ids.weight, before[name])


def test_uploads_are_perturbed_once_and_in_a_private_order(federated_data: Any, federated_trainer: Any) -> None:
    class Spy(FederatedCallback):
        def __init__(self) -> None:
            self.clean: dict[str, torch.Tensor] = {}

        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            if kind == "semantics":
                self.clean.setdefault(client, tensors["vectors"])
            return tensors

    before, noise, after = Spy(), PrivacyNoise(0.1), Spy()
    trainer = federated_trainer(callbacks=[before, noise, after], rounds=1)
    trainer.fit(small_distiller(), datamodule=federated_data())
    for name, client in trainer.loop.clients.items():
        stored = client.module.semantics()
        assert not torch.equal(before.clean[name], stored)  # permuted
        assert torch.equal(before.clean[name].sort(0).values, stored.sort(0).values)
        cosine = (before.clean[name] * after.clean[name]).sum(1).mean()
        assert abs(float(cosine) - (1 + 32 * 0.01) ** -0.5) < 0.05
        first = client.semantics()
        mechanism = noise.mechanism(trainer.seed, name, names=client.text_names())
        assert torch.equal(mechanism(first), after.clean[name])
        # The answer lands on the right rows: undoing the private order gives it back.
        client.receive_semantics(first)
        torch.testing.assert_close(client.module.teacher.global_text[1:], stored)


class _OnAnotherMachine(HashingTextEncoder):
    """Vectors with other last bits under the same fingerprint."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        vectors = super().encode(texts)
        noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.normalize(vectors + 1e-4 * noise, dim=1)


def test_what_two_machines_send_of_an_item_has_the_same_noise(
    federated_data: Any, federated_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T6: a silo whose texts are encoded anew elsewhere gives nobody a second draw to average with the first."""
    sent = []
    for machine, encoder in (("here", HashingTextEncoder(32)), ("there", _OnAnotherMachine(32))):
        monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / machine))
        data = federated_data(num_users=30)
        for domain in data.domains.values():
            domain.text_encoder = encoder
        trainer = federated_trainer(machine, callbacks=[PrivacyNoise(0.1)], rounds=0, exchange="semantics")
        client = trainer.build_clients(small_distiller(), data)["alpha"]
        loop = SimpleNamespace(seed=trainer.seed, clients={"alpha": client})
        tensors = PrivacyNoise(0.1).on_upload(loop, "alpha", "semantics", {"vectors": client.semantics()})
        sent.append((client.semantics(), tensors["vectors"]))
    (clean, first), (other, second) = sent
    assert 0 < float((clean - other).abs().max()) < 1e-3
    assert float((first - second).abs().max()) < 1e-3


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


def test_noise_of_zero_is_the_run_that_has_no_noise_bit_for_bit(federated_data: Any, federated_trainer: Any) -> None:
    class Open(FederatedCallback):
        """Lets item vectors leave as they are."""

        protects = frozenset({"semantics"})

    runs = {}
    for name, callback in (("open", Open()), ("zero", PrivacyNoise(0.0)), ("noisy", PrivacyNoise(0.05))):
        runs[name] = federated_trainer(name, rounds=1, callbacks=[callback], flags={"limit_val_batches": 1})
        runs[name].fit(small_distiller(), datamodule=federated_data(num_users=30))
    assert same(weights(runs["open"]), weights(runs["zero"]))
    assert not same(weights(runs["open"]), weights(runs["noisy"]))


def test_an_item_leaves_as_the_same_vector_in_every_exchange(federated_data: Any, federated_trainer: Any) -> None:
    """A silo that joins in round 2 makes the others send again: the same vectors, of their own noise."""
    trainer = federated_trainer(exchange="semantics", joins={"gamma": 2}, flags={"limit_val_batches": 1})
    trainer.fit(small_distiller(), datamodule=federated_data(domains=3, num_users=30))
    sent = [e for e in ledger(trainer) if e["direction"] == "up"]
    rounds = {name: [e["round"] for e in sent if e["client"] == name] for name in ("alpha", "beta", "gamma")}
    assert rounds == {"alpha": [0, 2], "beta": [0, 2], "gamma": [2]}
    contents = [{e["content_sha256"] for e in sent if e["client"] == name} for name in rounds]
    assert [len(content) for content in contents] == [1, 1, 1]
    vectors = torch.nn.functional.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    noise = PrivacyNoise(0.05)
    alpha, beta, other = (noise.mechanism(*who)._noise(vectors) for who in ((3, "alpha"), (3, "beta"), (4, "alpha")))
    for first, second in ((alpha, beta), (alpha, other)):
        assert abs(float((first * second).mean())) < 6 / first.numel() ** 0.5  # independent: sd 1 / sqrt(n)


def test_the_order_in_which_clients_run_changes_nothing(
    federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each backwards: whose semantics leave first, who trains first in a round, whose local phases come first."""
    forwards = make(federated_trainer, "forwards")
    forwards.fit(small_distiller(), datamodule=data(federated_data))
    active, sample, build = Federation.active, Federation.sample, RunState.__init__

    def backwards(state: RunState, *args: Any, **kwargs: Any) -> None:
        build(state, *args, **kwargs)
        state.clients = dict(reversed(state.clients.items()))

    def drawn(*args: Any) -> list[str]:
        with monkeypatch.context() as forwards:
            forwards.setattr(Federation, "active", active)
            return sample(*args)[::-1]

    monkeypatch.setattr(Federation, "active", lambda *args: active(*args)[::-1])
    monkeypatch.setattr(Federation, "sample", drawn)
    monkeypatch.setattr(RunState, "__init__", backwards)
    other = make(federated_trainer, "backwards")
    other.fit(small_distiller(), datamodule=data(federated_data))
    states = [finished_state(trainer.run_dir) for trainer in (forwards, other)]
    order = [[(h["client"], h["round"]) for h in map(json.loads, s["history"].splitlines())] for s in states]
    for number in (1, 3, 4, None):  # None: the local phases
        first, second = ([client for client, round in clients if round == number] for clients in order)
        if len(set(first)) > 1:
            assert first[0] < first[-1]
            assert second[0] > second[-1]
    for state in states:
        state["history"] = sorted(state["history"].splitlines())
        state["sent"].sort(key=lambda entry: [entry[key] for key in ("round", "kind", "direction", "client")])
    assert equal(*states)


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


@pytest.mark.parametrize("messages", [2, 0])
def test_the_record_of_an_earlier_run_is_set_aside_and_said_to_be(
    messages: int, federated_data: Any, federated_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """All that a report of the new run would take for its own; of a run that sent nothing too."""
    trainer = federated_trainer(rounds=0)
    aside, file = trainer.run_dir / "record-of-the-run-before", trainer.run_dir / "ledger.jsonl"
    lines = "".join(f'{{"a": {number}}}\n' for number in range(messages))
    reports = {f"{name}.{end}": "{}" for name in ("report", "privacy_report") for end in ("html", "json")}
    facts = {f"{name}.json": "{}" for name in ("audit", "privacy", "privacy_curve", "run", "data/alpha")}
    earlier = {**reports, **facts, "messages/ab": "sent", **({"ledger.jsonl": lines} if messages else {})}
    for name, text in {**earlier, "ledger.jsonl": lines, "results/alpha/random.parquet": ""}.items():
        (trainer.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (trainer.run_dir / name).write_text(text)
    trainer.prepare(small_distiller(), federated_data())
    trainer.loop._start()
    said = f"{trainer.run_dir} holds an earlier run: the record of its {messages} messages is in {aside} now"
    assert said in caplog.text
    assert contents(aside) == {name: text.encode() for name, text in earlier.items()}
    results = trainer.run_dir / "results-of-the-run-before"
    assert (results / "alpha/random.parquet").is_file()
    left = {path.name for path in trainer.run_dir.iterdir()}
    assert left == {aside.name, results.name, "ledger.jsonl", "history.jsonl"}
    assert file.read_text() == ""
    caplog.clear()
    (trainer.run_dir / "data").mkdir()
    (trainer.run_dir / "data/ratings.csv").write_text("a user's own, where the run folder is where commands are run")
    trainer.loop._start()
    assert caplog.text == ""
    assert contents(aside) == {name: text.encode() for name, text in earlier.items()}
    assert (trainer.run_dir / "data/ratings.csv").is_file()


def test_a_record_that_was_set_aside_in_part_is_whole_in_the_end(federated_data: Any, federated_trainer: Any) -> None:
    """The process was killed between two files."""
    trainer = federated_trainer(rounds=0)
    for name in ("record-of-the-run-before/audit.json", ".record-of-the-run-before/audit.json", "ledger.jsonl"):
        (trainer.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (trainer.run_dir / name).write_text(f"{name}\n")
    trainer.prepare(small_distiller(), federated_data())
    trainer.loop._start()
    assert contents(trainer.run_dir / "record-of-the-run-before") == {
        "audit.json": b"record-of-the-run-before/audit.json\n"
    }
    assert contents(trainer.run_dir / "record-of-the-run-before-2") == {
        "audit.json": b".record-of-the-run-before/audit.json\n",
        "ledger.jsonl": b"ledger.jsonl\n",
    }


def test_no_record_is_deleted_however_many_runs_begin_in_a_folder(
    federated_data: Any, federated_trainer: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = federated_trainer(rounds=0)
    trainer.prepare(small_distiller(), federated_data())
    aside = [trainer.run_dir / f"record-of-the-run-before{end}" for end in ("", "-2", "-3", "-4")]
    for number, folder in enumerate(aside):
        (trainer.run_dir / "results/alpha").mkdir(parents=True)
        (trainer.run_dir / f"results/alpha/{number}.parquet").touch()
        (trainer.run_dir / "ledger.jsonl").write_text(f'{{"run": {number}}}\n')
        if number == 3:
            shutil.rmtree(aside[1])  # a number is not taken twice: they keep their order
        trainer.loop._start()
        assert f"the record of its 1 messages is in {folder} now" in caplog.text
        said = " ".join(capsys.readouterr().out.split())
        assert (" now, in place of those of the run before it (--ckpt_path" in said) == (number > 0)
        caplog.clear()
    kept = {folder.name: (folder / "ledger.jsonl").read_text() for folder in aside if folder.exists()}
    assert kept == {aside[number].name: f'{{"run": {number}}}\n' for number in (0, 2, 3)}
    assert [path.name for path in trainer.run_dir.glob("results-of-the-run-before*/alpha/*")] == ["3.parquet"]


def test_a_record_that_a_killed_process_had_moved_does_not_give_way_to_the_next(
    federated_data: Any, federated_trainer: Any
) -> None:
    """A run that went on without a state had begun a ledger of its own before the move was finished."""
    trainer = federated_trainer(rounds=0)
    for name in (".record-of-the-run-before/ledger.jsonl", "ledger.jsonl"):
        (trainer.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (trainer.run_dir / name).write_text(f"{name}\n")
    trainer.prepare(small_distiller(), federated_data())
    trainer.loop._start()
    for end, text in (("", ".record-of-the-run-before/ledger.jsonl\n"), ("-2", "ledger.jsonl\n")):
        assert (trainer.run_dir / f"record-of-the-run-before{end}/ledger.jsonl").read_text() == text


def test_resume_refuses_other_clients_models_and_schedules(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(rounds=1)
    trainer.fit(small_distiller(), datamodule=federated_data())
    before = contents(trainer.run_dir)
    for words, settings, other in (
        ("clients", {"rounds": 1}, {"domains": 3}),
        ("schedule", {"local_epochs": 2}, {}),
        ("other data", {"rounds": 1}, {"num_items": 60}),
    ):
        with pytest.raises(CheckpointError, match=words):
            federated_trainer(**settings).fit(small_distiller(), datamodule=federated_data(**other), ckpt_path="last")
        assert contents(trainer.run_dir) == before, words
    ledger = trainer.run_dir / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-200])
    (trainer.run_dir / "history.jsonl").write_text((trainer.run_dir / "history.jsonl").read_text() + "{}\n")
    before = contents(trainer.run_dir)
    before.pop("ledger.jsonl")  # it loses the line that is no longer whole
    with pytest.raises(CheckpointError, match="put the file back"):
        federated_trainer(rounds=1).fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    assert {k: v for k, v in contents(trainer.run_dir).items() if k != "ledger.jsonl"} == before


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


def test_a_catalogue_larger_than_agreed_is_refused_before_it_leaves(
    federated_data: Any, federated_trainer: Any
) -> None:
    items = federated_data()
    items.prepare_data()
    items.domains["alpha"].setup("fit")
    count = items.domains["alpha"].num_items
    fits = federated_trainer("fits", rounds=0, local_max_epochs=1, max_items=count)
    fits.fit(small_distiller(), datamodule=federated_data())
    assert {e["kind"] for e in ledger(fits)} == {"semantics"}
    small = federated_trainer("small", rounds=0, max_items=count - 1)
    with pytest.raises(MessageError, match=rf"{count} rows.*trainer\.federation\.max_items = {count - 1}"):
        small.fit(small_distiller(), datamodule=federated_data())
    assert not small.run_dir.exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"max_items": 0},
        {"rounds": -1},
        {"local_epochs": 0},
        {"patience": 0},
        {"local_min_epochs": 5, "local_max_epochs": 2},
    ],
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
