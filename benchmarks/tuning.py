"""Tuning on real prompts against the usual loop: `python benchmarks/tuning.py --data-root DIR [--quick]`.

Held-out positions of Amazon Beauty users with 8 candidates, as SF-UBM's second stage has them, batches of 8, SmolLM2-135M (15
layers), LoRA of rank 8 on all linear layers, one thread. Compared is what a user would write with transformers and PEFT: base
weights in fp32 under bf16 autocast, rows in the order they come, padded on the right to the longest of the batch, logits of all
positions, labels at the answer.

(a) *list*: the same prompts (candidates listed, title as the answer) in both; the product's come in buckets of length, and only
    answers reach the output layer.
(b) *branch*: SF-UBM's form, candidates as branches after one prefix; the usual loop has a row of prefix and candidate for each.

Counted are tokens of text, without padding and without copies of a prefix. Steps in turn, CPU seconds, medians of the steps'
rates. Writes benchmarks/results/tuning.json.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.ranking_datamodule import RankingDataModule
from lightning_sfubm.datamodules.readers.table import TableReader
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.modules.llm_head import LLMHead

RESULTS = Path(__file__).parent / "results" / "tuning.json"
LIMIT = 1.5
LAYERS, BATCH, CANDIDATES = 15, 8, 8


class Usual:
    """A transformers + PEFT loop."""

    def __init__(self, layers: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from lightning_sfubm.assets import resolve_model

        model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m"), dtype=torch.float32)
        model.model.layers = model.model.layers[:layers]
        config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 3e-4, fused=True)

    def step(self, rows: list[Tensor], answers: list[int], pad: int) -> None:
        """One step on rows of token ids whose last ``answers`` tokens are learned."""
        width = max(map(len, rows))
        tokens = torch.full((len(rows), width), pad)
        labels = torch.full((len(rows), width), -100)
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            tokens[number, : len(row)] = row
            labels[number, len(row) - answer : len(row)] = row[-answer:]
        mask = (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(input_ids=tokens, attention_mask=mask).logits
        F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class InTurn(L.Callback):
    """Take a step of the usual loop after every step of the Trainer, on samples as they come, and time both."""

    def __init__(self, head: LLMHead, usual: Usual, samples: list[dict[str, Tensor]]) -> None:
        self.head, self.usual, self.samples = head, usual, samples
        self.rates: dict[str, list[float]] = {"product": [], "usual": []}

    def on_train_start(self, *_: Any) -> None:
        """Start the Trainer's clock."""
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, data: Any, batch_idx: int) -> None:
        """Stop the Trainer's clock, take the other step, start it again."""
        spent = time.process_time() - self.start
        self.rates["product"].append(self._text_tokens(data) / spent)
        sample = self.samples[batch_idx]
        rows, answers = self._rows(sample)
        start = time.process_time()
        self.usual.step(rows, answers, self.head.prompts.pad_id)
        self.rates["usual"].append(self._text_tokens(sample) / (time.process_time() - start))
        self.start = time.process_time()

    def _prompts(self, sample: dict[str, Tensor]) -> Any:
        branches = sample["target"].unsqueeze(1) if self.head.settings.form == "list" else None
        return self.head.prompts.build(sample["history"], sample["candidates"], branches)

    def _text_tokens(self, sample: dict[str, Tensor]) -> int:
        return int((self._prompts(sample).branch >= 0).sum())

    def _rows(self, sample: dict[str, Tensor]) -> tuple[list[Tensor], list[int]]:
        """Every branch as a row of its own, after its prefix."""
        prompts = self._prompts(sample)
        rows, answers = [], []
        for tokens, branch in zip(prompts.tokens, prompts.branch, strict=True):
            for number in range(1, int(branch.max()) + 1):
                rows.append(tokens[(branch == 0) | (branch == number)].clamp_min(0))
                answers.append(int((branch == number).sum()))
        return rows, answers


def compare(form: str, root: str, layers: int, steps: int) -> dict[str, Any]:
    """Rates of both loops on prompts of one form."""
    source = DomainDataModule("beauty", TableReader("beauty"), root=root, max_users=10_000, stage2_positions=1)
    data = RankingDataModule(source, batch_size=BATCH, train_candidates=CANDIDATES, max_train_users=600)
    data.prepare_data()
    data.setup("fit")
    head = LLMHead(form=form, template="beauty", num_layers=layers)
    head.attach_stage1(None, data.catalogue)
    plain = source.rank_dataloader("train2", BATCH, CANDIDATES, 600, data.seed, shuffle=False)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    whole = {key: [row for batch in plain for row in batch[key]] for key in ("history", "candidates", "target")}
    samples = []
    for chosen in order.split(BATCH)[:steps]:
        histories = [whole["history"][i] for i in chosen.tolist()]
        width = max(map(len, histories))
        sample = {key: torch.stack([whole[key][i] for i in chosen.tolist()]) for key in ("candidates", "target")}
        samples.append({**sample, "history": torch.stack([F.pad(h, (width - len(h), 0)) for h in histories])})
    turn = InTurn(head, Usual(layers), samples)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[turn],
    )
    trainer.fit(head, data)
    rates = {name: values[2:] for name, values in turn.rates.items()}  # the first steps warm up
    return {
        "steps": len(rates["product"]),
        "text_tokens_per_cpu_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ratio": round(statistics.median(rates["product"]) / statistics.median(rates["usual"]), 2),
    }


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="folder that holds beauty/")
    parser.add_argument("--quick", action="store_true", help="two layers, four steps, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    layers, steps = (2, 4) if arguments.quick else (LAYERS, 14)
    result: dict[str, Any] = {form: compare(form, arguments.data_root, layers, steps) for form in ("list", "branch")}
    result |= {"layers": layers, "batch": BATCH, "candidates": CANDIDATES, "limit": LIMIT}
    result |= {"load_average": os.getloadavg()[0], "environment": environment()}
    if not arguments.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
