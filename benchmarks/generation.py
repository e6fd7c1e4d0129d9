"""Generated answers: `OMP_NUM_THREADS=1 python benchmarks/generation.py [--quick]`.

The product's list prompts with 20 candidates, answered greedily in left-padded batches of 16, free and constrained to the
candidates' titles, against `generate` of transformers with one prompt at a time: the same untuned model in the same number
format, the same prompts, the same longest answer, keys and values cached. Beside it the same users and candidates ranked by
`branch`, without writing. Users a CPU second, rounds in turn, medians.
Writes benchmarks/results/generation.json.
"""

import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from llm import batch, catalogue

from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.modules.llm_head import LLMHead

RESULTS = Path(__file__).parent / "results" / "generation.json"
LIMITS = {"ratio": 3.0, "constrained_over_free": 1.0, "branch_ratio": 2.0}
USERS, CANDIDATES, HISTORY = 16, 20, 10


def heads(layers: int | None) -> dict[str, LLMHead]:
    """One head for each way to answer."""
    made = {}
    for mode in ("generate", "constrained"):
        made[mode] = LLMHead(form="list", template="movies", num_layers=layers, rank_mode=mode, tuning="frozen").eval()
    made["branch"] = LLMHead(template="movies", num_layers=layers, tuning="frozen").eval()
    for head in made.values():
        head.attach_stage1(None, catalogue())
    return made


@torch.no_grad()
def one_at_a_time(head: LLMHead, data: Any) -> int:
    """Tokens written by transformers' own loop."""
    none = data["target"].new_zeros(len(data["target"]), 0)
    prompts = head.prompts.build(data["history"], data["candidates"], none)
    written = 0
    for tokens, branch in zip(prompts.tokens, prompts.branch, strict=True):
        row = tokens[branch >= 0].unsqueeze(0)
        with head.lm.autocast():
            answer = head.lm.causal_lm.generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                do_sample=False,
                max_new_tokens=head.settings.title_tokens + 4,
                pad_token_id=head.prompts.pad_id,
            )
        written += answer.shape[1] - row.shape[1]
    return written


def main() -> None:
    """Command line; see the head of this file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    quick = "--quick" in sys.argv
    made = heads(2 if quick else None)
    seconds: dict[str, list[float]] = {"free": [], "constrained": [], "branch": [], "one at a time": []}
    for turn in range(1 if quick else 4):
        data: Any = batch(USERS, CANDIDATES, HISTORY, turn)
        calls = {
            "free": lambda data=data: made["generate"].rank(data),
            "constrained": lambda data=data: made["constrained"].rank(data),
            "branch": lambda data=data: made["branch"].rank(data),
            "one at a time": lambda data=data: one_at_a_time(made["generate"], data),
        }
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn or quick:  # the first round warms up
                seconds[name].append((time.process_time() - start) / USERS)
    ratios = [single / ours for single, ours in zip(seconds["one at a time"], seconds["free"], strict=True)]
    ranked = [single / ours for single, ours in zip(seconds["one at a time"], seconds["branch"], strict=True)]
    forced = [ours / free for ours, free in zip(seconds["constrained"], seconds["free"], strict=True)]
    result = {
        "backbone": "smollm2-135m",
        "layers": 2 if quick else 30,
        "users_a_batch": USERS,
        "rounds": len(ratios),
        "cpu_s_a_user": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "branch_ratio": round(statistics.median(ranked), 2),
        "constrained_over_free": round(statistics.median(forced), 3),
        "limits": LIMITS,
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }
    if not quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
