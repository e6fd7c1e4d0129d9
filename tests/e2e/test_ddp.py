"""Two processes take the steps of one process with the double batch, and measure the same (T9)."""

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.federated.checkpoint import find_state
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.trainer import FederatedTrainer
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.safe_load import load_checkpoint
from tests.conftest import small_distiller

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def domain(batch_size: int) -> DomainDataModule:
    # 75 users: batches of unequal sums of lengths, a last one that is short, and validation shards of 38 and 37
    reader = SyntheticReader(num_users=75, num_items=40, mean_length=9)
    return DomainDataModule(
        "films", reader, text_encoder=HashingTextEncoder(dim=16), k_core=0, max_length=12, batch_size=batch_size
    )


def sasrec() -> SASRec:
    return SASRec(hidden_dim=16, num_layers=1, num_heads=2, max_length=12, dropout=0.0)


def recommender() -> SequentialRecommender:
    return SequentialRecommender(sasrec(), features="id+text", lr=1e-2, logits_precision="fp32")


def gru4rec() -> SequentialRecommender:
    encoder = GRU4Rec(hidden_dim=16, dropout=0.0)
    return SequentialRecommender(encoder, loss="sampled", num_negatives=8, lr=1e-2, logits_precision="fp32")


def distiller() -> FKDDistiller:
    return FKDDistiller(sasrec(), num_experts=1, phase="joint", lr=1e-2, logits_precision="fp32")


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(processes: int) -> L.Trainer:
        return FederatedTrainer(
            accelerator="cpu",
            devices=processes,
            # the gate between local and global text has nothing to do before a federation has sent anything
            strategy="auto" if processes == 1 else "ddp_spawn_find_unused_parameters_true",
            max_epochs=2,
            default_root_dir=tmp_path,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    return make


@pytest.mark.parametrize("build", [recommender, gru4rec, distiller])
def test_two_processes_equal_one_with_the_double_batch(trainer: Any, build: Any) -> None:
    torch.manual_seed(0)
    template, weights, metrics = build(), {}, {}
    for processes in (1, 2):
        module, data, fit = copy.deepcopy(template), domain(batch_size=16 // processes), trainer(processes)
        data.prepare_data()
        data.setup("fit")
        module.bind(data.catalogue)  # here too: a spawned process sends its weights back to this one
        start = copy.deepcopy(module.state_dict())
        fit.fit(module, datamodule=data)
        weights[processes] = module.state_dict()
        metrics[processes] = {k: float(v) for k, v in fit.callback_metrics.items() if k.startswith("val/")}
    for name, value in weights[1].items():
        other = weights[2][name]
        if name.endswith(
            "attention.qkv.bias"
        ):  # a bias of keys has no gradient but rounding, and Adam's steps are as long
            value, other = (torch.cat([b[:16], b[32:]]) for b in (value, other))
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert any(name.startswith("encoder.") and not torch.equal(v, start[name]) for name, v in weights[1].items())
    assert metrics[1].keys() > {"val/ndcg@10", "val/full_ndcg@10"}
    assert metrics[2] == pytest.approx(metrics[1], abs=1e-4)


QUICK = [
    "--config=configs/debug/synthetic.yaml",
    "--trainer.enable_progress_bar=false",
    "--trainer.federation.init_args.exchange=both",
    "--trainer.federation.init_args.rounds=2",
    "--trainer.federation.init_args.local_max_epochs=2",
    "--trainer.federation.init_args.local_min_epochs=1",
    "--model.init_args.logits_precision=fp32",
    "--model.init_args.num_experts=1",
    "--model.init_args.encoder.init_args.dropout=0.0",
    '--experiment.init_args.methods=["encoder", "stage1"]',
]


def program(folder: Path, processes: int, *more: str, start: list[str] | None = None) -> subprocess.Popen[str]:
    """Start the program as a user does, in a process group of its own."""
    flags = [*QUICK, f"--trainer.default_root_dir={folder / 'run'}", *more]
    flags += [f"--data.domains.{name}.init_args.batch_size={32 // processes}" for name in ("alpha", "beta")]
    if processes > 1:
        flags += ["--config=configs/trainer/ddp.yaml", f"--trainer.devices={processes}"]
    inherited = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT", "PL_GLOBAL_SEED")
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    environment |= {"OMP_NUM_THREADS": "1", "SFUBM_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [*(start or [sys.executable]), "-m", "lightning_sfubm", "fit", *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def to_the_end(process: subprocess.Popen[str]) -> str:
    """What a run that succeeds writes to the terminal."""
    try:
        said, errors = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-2000:] + errors[-4000:]
    return said


def killed_within(process: subprocess.Popen[str], run: Path, states: int) -> None:
    """Kill all processes of a run as soon as it has written some states."""
    deadline = time.monotonic() + 300
    try:
        while not (run / "checkpoints" / f"state-{states:04d}").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"{run} holds no state {states} after 5 minutes"
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def left_behind(run: Path) -> tuple[dict[str, torch.Tensor], list[tuple[Any, ...]], dict[str, float]]:
    """Weights of the newest state by client and name, what the ledger says was sent first, Hit@1 by row of the tables."""
    state = find_state(run / "checkpoints")
    weights = {
        f"{path.stem}/{name}": value
        for path in sorted((state / "clients").glob("*.ckpt"))
        for name, value in load_checkpoint(path)["state_dict"].items()
    }
    lines = read_ledger(run / "ledger.jsonl")
    sent = [(e["round"], e["client"], e["direction"], e["kind"], e["bytes"]) for e in lines if "resent" not in e]
    tables = sorted((run / "results").rglob("*.parquet"))
    return weights, sent, {str(p.relative_to(run)): PerUserResults.load(p).per_user("hit@1").mean() for p in tables}


def test_a_federated_experiment_on_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """Rounds, local phases, rows and report: what is written is written once and says the same, also after a kill."""
    to_the_end(program(tmp_path / "one", 1))
    weights, sent, rows = left_behind(tmp_path / "one" / "run")
    assert len(rows) == 4

    lightning = tmp_path / "lightning"  # which starts the second process
    killed_within(program(lightning, 2), lightning / "run", states=3)
    said = to_the_end(program(lightning, 2, "--ckpt_path=last"))
    assert said.count("Stage 1: 2 domains") == said.count("Privacy report:") == 1

    torchrun = tmp_path / "torchrun"  # which starts both
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    said = to_the_end(program(torchrun, 2, start=start))
    assert said.count("Stage 1: 2 domains") == said.count("Privacy report:") == 1

    for folder in (lightning, torchrun):
        other, sent_there, rows_there = left_behind(folder / "run")
        assert sent_there == sent
        assert other.keys() == weights.keys()
        for name, value in weights.items():
            if value.is_floating_point() and not name.endswith("attention.qkv.bias"):  # see above
                torch.testing.assert_close(other[name], value, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        assert rows_there == pytest.approx(rows, abs=0.02)  # 200 users: a rank or two may turn on rounding
        assert not list((folder / "run").rglob("*.tmp"))


@pytest.mark.parametrize("strategy", ["ddp_spawn", ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)])
def test_a_strategy_that_cannot_run_a_federation_is_refused(
    federated_data: Any, federated_trainer: Any, strategy: Any
) -> None:
    trainer = federated_trainer(flags={"devices": 2, "strategy": strategy})
    with pytest.raises(ConfigError, match="set it to ddp_find_unused_parameters_true"):
        trainer.fit(small_distiller(), datamodule=federated_data())
    assert not trainer.run_dir.exists()


def test_what_the_first_process_refuses_all_refuse_in_one_sentence(tmp_path: Path) -> None:
    """It alone reads the ledger; the others would wait for it, or end with a traceback once it is gone."""
    to_the_end(program(tmp_path, 2, '--experiment.init_args.methods=["stage1"]'))
    ledger = tmp_path / "run" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[1:]))
    process = program(tmp_path, 2, '--experiment.init_args.methods=["stage1"]', "--ckpt_path=last")
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 2
    assert errors.count("lightning-sfubm: error: ") == 1 == errors.count("does not follow the line before it")
    assert "Traceback" not in errors
