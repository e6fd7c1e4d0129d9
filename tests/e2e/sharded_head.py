"""Train a tiny LLM head on one or two processes and store what it has become. Run as a program by test_sharded.py."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_sfubm.modules.llm_head import LLMHead
from tests.modules.llm.stand_ins import FixedStage1, batch_of, tiny_catalogue


class Grads(L.Callback):
    """Notes which trainable parameters have had a gradient."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen |= {n for n, p in pl_module.named_parameters() if p.grad is not None}


def strategy(name: str) -> Any:
    if name == "sharded":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return {"one": "auto", "ddp": "ddp"}[name]


def main(llm: str, out: Path, name: str, form: str) -> None:
    processes = 1 if name == "one" else 2
    settings = {"adapter_dropout": 0.0, "adapter_learning_rate": 1e-2, "head_learning_rate": 1e-2, "warmup": 0.0}
    written = form in ("constrained", "generate")
    if written:
        settings["rank_mode"] = form
    if form == "list" and processes == 2:  # the same gradients by another way
        settings["activation_checkpointing"] = True
    shape = "branch" if form == "branch" else "list"
    # Titles are not cut, so that answers differ in length, and with them the terms that the ranks hold.
    head = LLMHead(llm, template="movies", history_length=4, title_tokens=24, precision="32", form=shape, **settings)
    head.attach_stage1(FixedStage1(), tiny_catalogue())
    grads = Grads()
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy=strategy(name), max_epochs=3, gradient_clip_val=1.0,
        callbacks=[grads], logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    batches = [batch_of(rows=4, seed=seed) for seed in range(4)]
    rank = trainer.global_rank
    shards = [{k: v[rank::processes] for k, v in batch.items()} for batch in batches]
    trainer.fit(head, torch.utils.data.DataLoader(shards, batch_size=None))
    factor = head.calibrate(batches) if form == "branch" else 1.0
    if written:  # users of its own on each rank, whose answers take more or fewer steps, or have more or less room
        ends = head.lm.tokenizer.eos_token
        if form == "generate":
            head.lm.tokenizer.eos_token = "<unk>"  # never written, so that an answer takes all the room that there is
        for seed in range(6):
            head.rank(batch_of(rows=1, seed=20 + seed + 100 * rank))
        head.lm.tokenizer.eos_token = ends
    one_user = {k: v[rank::processes] for k, v in batch_of(rows=1, seed=77).items()}
    assert head.rank(one_user).shape == (1 - rank, 5)  # the second rank has nobody, and computes in step all the same
    scores = head.rank(batch_of(rows=4, seed=9))
    trainer.save_checkpoint(out / f"{name}-{form}.ckpt", weights_only=True)
    if rank == 0:
        trainable = {n for n, p in head.named_parameters() if p.requires_grad}
        local = max(p._local_tensor.numel() if hasattr(p, "_local_tensor") else p.numel() for p in head.parameters())
        told = {"scores": scores, "factor": factor, "without": sorted(trainable - grads.seen), "largest": local}
        torch.save(told, out / f"{name}-{form}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])
