"""Run any method over stored candidate lists: the one code path behind every number of a report."""

import resource
import sys
import time
from collections.abc import Iterable, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lightning_sfubm.contracts import Catalogue, CatalogueRanker, RankBatch, Ranker
from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.metrics import Ties, candidate_ranks, catalogue_ranks, user_blocks
from lightning_sfubm.evaluation.results import COLUMNS, PerUserResults, ResultMeta
from lightning_sfubm.modules.layers.modes import evaluating


@runtime_checkable
class AnsweringRanker(Ranker, Protocol):
    """A ranker whose answer may be invalid, such as an LLM that writes a title."""

    def rank_with_validity(self, batch: RankBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (B, C), the chosen column (B,) and whether the answer named exactly one candidate (B,)."""
        ...


def evaluate_ranker(
    ranker: Ranker,
    batches: Iterable[RankBatch],
    *,
    catalogue: Catalogue,
    method: str,
    domain: str,
    split: str,
    seed: int,
    candidate_hash: str,
    label: str = "",
    group: str = "",
    order: int = 0,
    data_fingerprint: str = "",
    trainable_params: int | None = None,
    extra: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    ties: Ties = "conservative",
    full: bool = True,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    progress: bool = True,
) -> PerUserResults:
    """Evaluate one method.

    Args:
        ranker: the method; an ``nn.Module`` is moved to ``device``, put into eval mode and restored afterwards. A
            ranker with ``rank_with_validity`` is asked for its answer: an invalid answer is a miss.
        batches: one row per user; users are pairwise distinct over all batches.
        catalogue: of the domain; gives the training counts of the targets.
        method: see :class:`~lightning_sfubm.evaluation.results.ResultMeta`, as all arguments up to ``extra``.
        domain: name of the domain.
        split: ``"test"`` or ``"validation"``.
        seed: seed of the run.
        candidate_hash: hash of the stored candidate lists behind ``batches``.
        label: printed name.
        group: heading in tables.
        order: place in tables.
        data_fingerprint: fingerprint of the domain's data.
        trainable_params: parameters that were trained; counted by ``requires_grad`` where ``None`` and the ranker is
            an ``nn.Module``.
        extra: further facts.
        device: where batches and ranker go.
        ties: tie policy.
        full: also rank over the whole catalogue, where the ranker can (it has ``score_all``).
        precision: ``"bf16-mixed"`` runs the ranker under autocast; ranks are taken in float32 in any case.
        progress: show a progress bar on a terminal.

    Returns:
        Results with one row per user, empty where there are no batches.

    Raises:
        DataError: scores have the wrong shape, or a user occurs twice.
        SFUBMError: a score is NaN.
    """
    module = ranker if isinstance(ranker, torch.nn.Module) else None
    if module is not None:
        module.to(device)
        if trainable_params is None:
            trainable_params = sum(p.numel() for p in module.parameters() if p.requires_grad)
    train_counts = catalogue.train_counts.to("cpu")
    columns: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in COLUMNS}
    num_candidates = 0
    total = len(batches) if isinstance(batches, Sized) else None
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad(), nullcontext() if module is None else evaluating(module):
        for host in tqdm(
            batches,
            total=total,
            desc=f"{domain}: {label or method}",
            leave=False,
            disable=None if progress else True,
        ):
            batch: RankBatch = {key: value.to(device) for key, value in host.items()}  # type: ignore[assignment, attr-defined]
            with _autocast(precision, device):
                row = _rank_batch(ranker, batch, catalogue, method, ties, full)
            row["target_train_count"] = train_counts[host["target"].cpu()]
            for name, value in row.items():
                columns[name].append(value.cpu().numpy())
            num_candidates = max(num_candidates, batch["candidates"].shape[1])
    meta = ResultMeta(
        method=method,
        domain=domain,
        split=split,
        seed=seed,
        candidate_hash=candidate_hash,
        label=label,
        group=group,
        order=order,
        data_fingerprint=data_fingerprint,
        ties=ties,
        num_candidates=num_candidates,
        num_items=catalogue.num_items,
        wall_s=time.perf_counter() - wall,
        cpu_s=time.process_time() - cpu,
        peak_rss_mb=_peak_rss_mb(),
        trainable_params=trainable_params,
        extra=dict(extra or {}),
    )
    arrays = {
        name: np.concatenate(columns[name]) if columns[name] else np.empty(0, dtype) for name, dtype in COLUMNS.items()
    }
    return PerUserResults(meta, **arrays)


def _rank_batch(
    ranker: Ranker, batch: RankBatch, catalogue: Catalogue, method: str, ties: Ties, full: bool
) -> dict[str, Tensor]:
    """Every column of a result but the training count, for one batch."""
    target_index = batch["target_index"]
    if isinstance(ranker, AnsweringRanker):
        scores, choice, valid = ranker.rank_with_validity(batch)
        _check_shape(method, "scores", scores, tuple(batch["candidates"].shape))
        rank = candidate_ranks(scores.float(), target_index, ties)
        valid, best = valid.bool(), scores == scores.amax(1, keepdim=True)
        tied = best.gather(1, target_index[:, None]).squeeze(1) & (best.sum(1) > 1)
        # Of candidates tied for the best score the first is the choice, by chance: the policy of ties decides.
        hit1 = valid & (choice == target_index) & ~(tied & (rank > 1))
    else:
        scores = ranker.rank(batch)
        _check_shape(method, "scores", scores, tuple(batch["candidates"].shape))
        rank = candidate_ranks(scores.float(), target_index, ties)
        hit1 = rank <= 1
        valid = torch.ones_like(hit1)
    known = batch.get("seen", batch["history"])
    full_rank = torch.full_like(rank, torch.nan)
    if full and isinstance(ranker, CatalogueRanker):
        blocks = user_blocks(len(target_index), catalogue.num_items + 1, target_index.device)
        full_rank = torch.cat([_catalogue_ranks(ranker, batch, rows, catalogue, method, ties) for rows in blocks])
    return {
        "user": batch["user"],
        "target": batch["target"],
        "hit1": hit1,
        "rank": rank,
        "valid": valid,
        "full_rank": full_rank,
        "history_length": (known != 0).sum(dim=1),
    }


def _catalogue_ranks(
    ranker: CatalogueRanker, batch: RankBatch, rows: slice, catalogue: Catalogue, method: str, ties: Ties
) -> Tensor:
    block: RankBatch = {key: value[rows] for key, value in batch.items()}  # type: ignore[assignment, attr-defined, index]
    scores = ranker.score_all(block)
    _check_shape(method, "catalogue scores", scores, (len(block["target"]), catalogue.num_items + 1))
    return catalogue_ranks(scores.float(), block["target"], block.get("seen", block["history"]), ties)


def _check_shape(method: str, what: str, scores: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(scores.shape) != expected:
        raise DataError(f"method {method!r} returned {what} of shape {tuple(scores.shape)}, expected {expected}.")


def _autocast(precision: str, device: str | torch.device) -> AbstractContextManager[Any]:
    if precision == "bf16-mixed":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
