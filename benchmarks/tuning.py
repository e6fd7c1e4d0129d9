"""LLM tuning on real prompts, in tokens of text a CPU second: `python benchmarks/tuning.py --data-root DIR [--quick]`.

DIR holds beauty/. The product tunes as configs/experiment/health_beauty.yaml does (SmolLM2-135M, 15 layers, LoRA on q, k, v
and o, batches of 8, history of 6, titles of 10 tokens), through Lightning, on its own batches of that experiment's samples: in
the `branch` form with the soft tokens of a stage 1 and 8 candidates, in the `list` form with titles alone and 20 candidates.
The other side is the common loop: transformers and PEFT with the same layers and adapters, under bf16 autocast, weights in
fp32 and, where the head itself has them so, in bf16 (the faster of the two counts), `model(..., labels=...)`, so logits at
every position; prompts of the same users and candidates in the list template, in a shuffled order, right-padded to the
longest of the batch, labels on the answer only. Steps in turn, one thread. Soft tokens and
padding are computed but not counted as tokens of text; samples a CPU second stand beside, because a branch prompt is shorter.
Without --data-root the prompts are generated. Takes about 8 minutes of CPU; writes benchmarks/results/tuning.json.
"""

import argparse
import itertools
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
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_sfubm.assets import resolve_model
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.prompt_templates import load_template
from lightning_sfubm.datamodules.prompts import PromptBuilder
from lightning_sfubm.datamodules.ranking_datamodule import RankingDataModule
from lightning_sfubm.datamodules.readers.table import TableReader
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.seeds import torch_generator

RESULTS = Path(__file__).parent / "results" / "tuning.json"
LIMIT = 1.5
TEMPLATE, TARGETS, RANK, ALPHA, RATE = "beauty", r".*\.(q|k|v|o)_proj", 8, 32, 2e-3
HISTORY, TITLE_TOKENS = 6, 10
CANDIDATES = {"branch": 8, "list": 20}


def samples(root: str | None, candidates: int) -> RankingDataModule:
    """The samples of the experiment; text vectors by hashing, because their values do not change the time."""
    reader = TableReader("beauty") if root else SyntheticReader(0, num_users=600, num_items=2000)
    settings: dict[str, Any] = {"max_users": 10000, "stage2_users": 2000} if root else {"k_core": 0}
    source = DomainDataModule(
        "beauty", reader, root=root, text_encoder=HashingTextEncoder(dim=384), stage2_positions=1, **settings
    )
    data = RankingDataModule(source, batch_size=8, train_candidates=candidates, max_train_users=600)
    data.prepare_data()
    data.setup("fit")
    return data


def head_of(form: str, layers: int | None, data: RankingDataModule, checkpointing: bool = False) -> LLMHead:
    """SF-UBM's head (`branch`), or the head of a list prompt without soft tokens."""
    head = LLMHead(
        form=form,
        template=TEMPLATE,
        num_layers=layers,
        history_length=HISTORY,
        title_tokens=TITLE_TOKENS,
        adapter_rank=RANK,
        adapter_alpha=ALPHA,
        adapter_targets=TARGETS,
        adapter_dropout=0.0,
        adapter_learning_rate=RATE,
        activation_checkpointing=checkpointing,
    )
    stage1 = None
    if form == "branch":
        stage1 = FKDDistiller(SASRec(hidden_dim=64, num_layers=2, num_heads=2, max_length=50), num_experts=1)
        stage1.bind(data.catalogue)
    head.attach_stage1(stage1, data.catalogue)
    return head


class PaddedLoop(L.Callback):
    """Takes a step of each common loop after every step of the Trainer, and times all of them."""

    def __init__(self, head: LLMHead, layers: int, rows: list[tuple[Tensor, int]]) -> None:
        self.models = {"fp32": self._model(layers, torch.float32)}
        if head.lm.bf16:
            self.models["bf16"] = self._model(layers, torch.bfloat16)
        self.optimizers = {
            name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, fused=True)
            for name, model in self.models.items()
        }
        self.head = head
        self.batches = [rows[start : start + 8] for start in range(0, len(rows), 8)]
        self.ours: list[dict[str, float]] = []
        self.padded: dict[str, list[dict[str, float]]] = {name: [] for name in self.models}

    @staticmethod
    def _model(layers: int, dtype: torch.dtype) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m"), dtype=dtype)
        model.model.layers = model.model.layers[:layers]
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
        return get_peft_model(model, config).train()

    def on_train_start(self, *_: Any) -> None:
        """Start the Trainer's clock."""
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, data: Any, batch_idx: int) -> None:
        """Stop the Trainer's clock, take the other steps, start it again."""
        spent = time.process_time() - self.start
        ends = data["target"].unsqueeze(1) if self.head.settings.form == "list" else None
        prompts = self.head.prompts.build(data["history"], data["candidates"], ends)
        taken = int((prompts.branch >= 0).sum())
        text = int(((prompts.branch >= 0) & (prompts.tokens >= 0)).sum())
        self.ours.append(
            _step(spent, len(data["target"]), text, soft=taken - text, padding=prompts.tokens.numel() - taken)
        )
        for name, steps in self.padded.items():
            steps.append(self._train(name, self.batches[batch_idx]))
        self.start = time.process_time()

    def _train(self, name: str, rows: list[tuple[Tensor, int]]) -> dict[str, float]:
        model, optimizer = self.models[name], self.optimizers[name]
        start = time.process_time()
        tokens = pad_sequence([tokens for tokens, _ in rows], batch_first=True)
        mask = pad_sequence([torch.ones_like(tokens) for tokens, _ in rows], batch_first=True)
        labels = [torch.where(torch.arange(len(tokens)) < prompt, -100, tokens) for tokens, prompt in rows]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.head.lm.bf16):
            loss = model(
                input_ids=tokens,
                attention_mask=mask,
                labels=pad_sequence(labels, batch_first=True, padding_value=-100),
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent = time.process_time() - start
        return _step(spent, len(rows), int(mask.sum()), soft=0, padding=mask.numel() - int(mask.sum()))


def _step(spent: float, rows: int, text: int, soft: int, padding: int) -> dict[str, float]:
    return {"cpu_s": spent, "samples": rows, "text": text, "soft": soft, "padding": padding}


def list_rows(head: LLMHead, batches: list[Any]) -> list[tuple[Tensor, int]]:
    """Token ids of prompt and answer in the list template, and the prompt's length, shuffled over all batches."""
    assert head.catalogue is not None
    builder = PromptBuilder(
        head.lm.tokenizer,
        load_template(TEMPLATE, "list"),
        head.catalogue.titles,
        HISTORY,
        TITLE_TOKENS,
        user_token=False,
        history_tokens=False,
        candidate_tokens=False,
    )
    rows = []
    for batch in batches:
        prompts = builder.build(batch["history"], batch["candidates"], batch["target"].unsqueeze(1))
        for tokens, branch in zip(prompts.tokens, prompts.branch, strict=True):
            rows.append((tokens[branch >= 0], int((branch == 0).sum())))
    order = torch.randperm(len(rows), generator=torch_generator(0, "order"))
    return [rows[index] for index in order.tolist()]


def compare(form: str, root: str | None, layers: int, steps: int) -> dict[str, Any]:
    """Both loops over the same users and candidates; the first step of each warms up."""
    data = samples(root, CANDIDATES[form])
    head = head_of(form, layers, data)
    loop = PaddedLoop(head, layers, list_rows(head, list(itertools.islice(data.train_dataloader(), steps))))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        limit_val_batches=0,
        callbacks=[loop],
    )
    trainer.fit(head, datamodule=data)
    ours = loop.ours[1:]
    loops = {name: steps[1:] for name, steps in loop.padded.items()}
    fastest = min(loops, key=lambda name: sum(step["cpu_s"] for step in loops[name]))
    padded = loops[fastest]
    return {
        "candidates": CANDIDATES[form],
        "steps": len(ours),
        "product": _summary(ours),
        "padded loop": {"weights": fastest, **_summary(padded)},
        "padded loops": {name: _summary(steps) for name, steps in loops.items()},
        "matrix_share": round(_matrix_share(head, ours), 3),
        "ratio": round(_ratio(ours, padded, "text"), 2),
        "ratio_of_samples": round(_ratio(ours, padded, "samples"), 2),
    }


def _matrix_share(head: LLMHead, steps: list[dict[str, float]]) -> float:
    """Share of a step's time that the products with frozen weights would take at the rate of the largest of them.

    Each token passes each weight forwards and backwards (4 operations); frozen weights have no gradient. Attention, adapters,
    norms and activations come on top.
    """
    weights = [
        module.weight
        for name, module in head.lm.causal_lm.base_model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora" not in name
    ]
    tokens = statistics.median(step["text"] + step["soft"] + step["padding"] for step in steps)
    largest = max(weights, key=torch.Tensor.numel)
    inputs = torch.randn(int(tokens), largest.shape[1]).to(largest.dtype)
    seconds = []
    for _ in range(20):
        start = time.process_time()
        inputs @ largest.T
        seconds.append(time.process_time() - start)
    rate = 2 * inputs.numel() * largest.shape[0] / statistics.median(seconds)
    needed = 4 * sum(weight.numel() for weight in weights) * tokens / rate
    return needed / statistics.median(step["cpu_s"] for step in steps)


def _summary(steps: list[dict[str, float]]) -> dict[str, float]:
    total = {key: sum(step[key] for step in steps) for key in steps[0]}
    computed = total["text"] + total["soft"] + total["padding"]
    return {
        "text_tokens_a_sample": round(total["text"] / total["samples"], 1),
        "soft_tokens_a_sample": round(total["soft"] / total["samples"], 1),
        "padding_share": round(total["padding"] / computed, 4),
        "text_tokens_per_cpu_s": round(statistics.median(step["text"] / step["cpu_s"] for step in steps), 1),
        "samples_per_cpu_s": round(statistics.median(step["samples"] / step["cpu_s"] for step in steps), 3),
    }


def _ratio(ours: list[dict[str, float]], padded: list[dict[str, float]], unit: str) -> float:
    """Median over the steps of the ratio of rates of two steps taken one after the other."""
    pairs = zip(ours, padded, strict=True)
    return statistics.median((a[unit] / a["cpu_s"]) / (b[unit] / b["cpu_s"]) for a, b in pairs)


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder that holds beauty/")
    parser.add_argument("--steps", type=int, default=11, help="steps of each loop, the first to warm up")
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--quick", action="store_true", help="2 layers, 3 steps, nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    layers, steps = (2, 3) if arguments.quick else (15, arguments.steps)
    result: dict[str, Any] = {
        "prompts": "Amazon Beauty" if arguments.data_root else "generated",
        "backbone": "smollm2-135m",
        "layers": layers,
        "batch_size": 8,
        "load_average": {"before": os.getloadavg()[0]},
    }
    for form in arguments.only:
        result[form] = compare(form, arguments.data_root, layers, steps)
        print(form, json.dumps(result[form], indent=1), flush=True)
    result["load_average"]["after"] = os.getloadavg()[0]
    result["limit"] = LIMIT
    result["environment"] = environment()
    if not arguments.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
