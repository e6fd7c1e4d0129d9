"""Speed of the LLM stage, in CPU seconds on one thread: `OMP_NUM_THREADS=1 python benchmarks/llm.py`.

(a) tuning through Lightning against a bare transformers + PEFT loop on the very same tokens, steps interleaved;
(b) ranking 20 candidates by `branch` and by `score` against one plain forward pass over prefix + all candidates (what
cannot be saved), and against a separate row for each candidate (what is saved), rounds interleaved.
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.datamodules.prompt_batch import PromptBatch
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.modules.llm.tree import separate_states
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.seeds import torch_generator

RESULT = Path(__file__).parent / "results" / "llm.json"
ITEMS = 500
WORDS = ("The", "Story", "Night", "of", "River", "Stone", "Return", "Last", "Garden", "King", "House", "Summer")


def catalogue() -> Catalogue:
    generator = torch_generator(0, "titles")
    picks = torch.randint(len(WORDS), (ITEMS, 5), generator=generator).tolist()
    titles = ["", *(" ".join(WORDS[p] for p in row) + f" ({1950 + i % 70})" for i, row in enumerate(picks))]
    return Catalogue("benchmark", ITEMS, titles, None, torch.zeros(ITEMS + 1, dtype=torch.long))


def batch(rows: int, candidates: int, history: int, seed: int) -> dict[str, torch.Tensor]:
    """A ranking batch with histories and candidates drawn at random; the first candidate is the target."""
    generator = torch_generator(seed, "batch")
    chosen = torch.stack([torch.randperm(ITEMS, generator=generator)[:candidates] + 1 for _ in range(rows)])
    return {
        "history": torch.randint(1, ITEMS + 1, (rows, history), generator=generator),
        "candidates": chosen,
        "target": chosen[:, 0],
        "target_index": torch.zeros(rows, dtype=torch.long),
        "user": torch.arange(rows),
    }


class BareLoop(L.Callback):
    """Takes a step of a bare loop after every step of the Trainer, on the same prompts, and times both.

    Two bare loops take turns in one callback: base weights in fp32 (the common way) and, where the head itself does
    so, in bf16. The faster one counts.
    """

    def __init__(self, head: LLMHead, layers: int | None) -> None:
        dtypes = [torch.float32, *([torch.bfloat16] if head.lm.bf16 else [])]
        self.models = [self._model(layers, dtype) for dtype in dtypes]
        self.optimizers = [
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-4, fused=True)
            for model in self.models
        ]
        self.head = head
        self.ours: list[float] = []
        self.bare: list[list[float]] = [[] for _ in dtypes]
        self.tokens: list[int] = []

    @staticmethod
    def _model(layers: int | None, dtype: torch.dtype) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from lightning_sfubm.assets import resolve_model

        model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m"), dtype=dtype)
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
        config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config).train()

    def on_train_start(self, *_: Any) -> None:
        """Start the Trainer's clock."""
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, data: Any, batch_idx: int) -> None:
        """Stop the Trainer's clock, take the bare steps, start it again."""
        self.ours.append(time.process_time() - self.start)
        prompts = self.head.prompts.build(data["history"], data["candidates"], data["target"].unsqueeze(1))
        self.tokens.append(prompts.tokens.numel())
        for model, optimizer, seconds in zip(self.models, self.optimizers, self.bare, strict=True):
            start = time.process_time()
            self._step(model, optimizer, prompts)
            seconds.append(time.process_time() - start)
        self.start = time.process_time()

    def _step(self, model: Any, optimizer: torch.optim.Optimizer, prompts: PromptBatch) -> None:
        answer = int((prompts.branch == 1).sum(1).max())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.head.lm.bf16):
            logits = model(
                input_ids=prompts.tokens,
                attention_mask=(prompts.branch >= 0).long(),
                position_ids=prompts.positions,
                logits_to_keep=answer + 1,
            ).logits
        labels = torch.where(prompts.branch == 1, prompts.tokens, -100)[:, -answer:]
        F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def tuning(layers: int | None, steps: int) -> dict[str, float]:
    """Rates of the Trainer and of the faster bare loop, steps in turn."""
    head = LLMHead(form="list", template="movies", num_layers=layers, history_length=9)
    head.attach_stage1(None, catalogue())
    bare = BareLoop(head, layers)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[bare],
    )
    data: Any = [batch(4, 8, 9, seed) for seed in range(steps)]
    trainer.fit(head, torch.utils.data.DataLoader(data, batch_size=None))
    warm = slice(2, None)
    tokens = sum(bare.tokens[warm])
    started = time.process_time()
    for one in data:
        head.prompts.build(one["history"], one["candidates"], one["target"].unsqueeze(1))
    building = (time.process_time() - started) / steps
    fastest = min(bare.bare, key=lambda seconds: sum(seconds[warm]))
    return {
        "tokens_per_row": tokens / len(bare.tokens[warm]) / 4,
        "ours_tokens_per_cpu_second": tokens / sum(bare.ours[warm]),
        "bare_tokens_per_cpu_second": tokens / sum(fastest[warm]),
        "ratio": statistics.median(b / o for o, b in zip(bare.ours[warm], fastest[warm], strict=True)),
        "prompt_building_share_of_step": building / statistics.median(bare.ours[warm]),
    }


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call, all calls in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return seconds


@torch.no_grad()
def ranking(layers: int | None, rounds: int) -> dict[str, float]:
    """Time of both ways to rank over one forward pass, and of separate rows over branches."""
    by_head = LLMHead(template="movies", num_layers=layers).eval()
    by_head.attach_stage1(None, catalogue())
    by_score = LLMHead(template="movies", num_layers=layers, rank_mode="score", tuning="frozen").eval()
    by_score.attach_stage1(None, catalogue())
    data: Any = batch(2, 20, 10, 0)
    prompts = by_head.prompts.build(data["history"], data["candidates"])
    title_tokens = int((prompts.branch > 0).sum(1).max())

    def forward(head: LLMHead, logits: bool) -> None:
        """One plain causal pass over prefix + all candidates, logits for the candidates' tokens if asked."""
        states = head.lm.states(head.lm.embed(prompts.tokens), prompts.branch >= 0, prompts.positions)
        if logits:
            head.lm.logits(states[:, -title_tokens:]).logsumexp(-1)

    seconds = interleaved(
        {
            "branch": lambda: by_head.rank(data),
            "branch_forward": lambda: forward(by_head, False),
            "score": lambda: by_score.rank(data),
            "score_forward": lambda: forward(by_score, True),
        },
        rounds,
    )
    start = time.process_time()
    separate_states(by_head.lm, by_head.lm.embed(prompts.tokens), prompts)
    naive = time.process_time() - start
    result: dict[str, float] = {"tokens_per_row": prompts.tokens.shape[1]}
    for mode in ("branch", "score"):
        result[f"{mode}_cpu_seconds_per_user"] = statistics.median(seconds[mode]) / 2
        pairs = zip(seconds[mode], seconds[f"{mode}_forward"], strict=True)
        result[f"{mode}_over_one_forward"] = statistics.median(ours / plain for ours, plain in pairs)
    result["separate_rows_over_branch"] = naive / statistics.median(seconds["branch"])
    return result


def main() -> None:
    """Command line; see the head of this file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    quick = "--quick" in sys.argv
    layers = 4 if quick else None
    result = {
        "unit": "CPU seconds, one thread; SmolLM2-135M",
        "layers": layers or 30,
        "environment": environment(),
        "tuning": tuning(layers, 5 if quick else 10),
        "ranking": ranking(layers, 2 if quick else 5),
    }
    print(json.dumps(result, indent=2))
    if not quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
