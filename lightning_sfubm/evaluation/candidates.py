"""Candidate lists: the target and uniform negatives, drawn once, stored with a hash, used by every method.

Protocol [choice, after the sampled evaluation of LLaRA and A-LLMRec, with their traps closed]: negatives are uniform
over the items outside a user's excluded interactions; titles within a list are pairwise distinct after normalisation,
so that an answer in words names one candidate; the target's place is uniform.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_sfubm.access import own_cache
from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.evaluation.parsing import normalise_title
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.seeds import numpy_generator

#: Rounds of vectorised rejection before the few rows left are drawn from their explicit set of allowed items.
MAX_ROUNDS = 30
#: Of the way lists are drawn, in the names of stored ones: raised with every change that would draw others.
RULE = 2


def title_groups(titles: Sequence[str]) -> np.ndarray:
    """Number the distinct normalised titles.

    Args:
        titles: N + 1 strings, row 0 padding.

    Returns:
        (N + 1,) int64; equal numbers mean equal titles. Row 0 is -1.
    """
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(normalise_title(title), len(numbers)) for title in titles[1:]]
    return np.array([-1, *groups], dtype=np.int64)


@dataclass(frozen=True)
class CandidateLists:
    """Candidates of R predictions.

    Attributes:
        candidates: (R, C) int32, the target among them.
        target_index: (R,) int32 place of the target.
    """

    candidates: np.ndarray
    target_index: np.ndarray

    @property
    def sha256(self) -> str:
        """Hash of both arrays."""
        digest = hashlib.sha256()
        for array in (self.candidates, self.target_index):
            digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array, dtype=np.int32).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file as a whole or not at all."""
        from safetensors.numpy import save

        tensors = {"candidates": self.candidates, "target_index": self.target_index}
        write_atomically(path, save(tensors, {"sha256": self.sha256}), mode=0o600)

    @classmethod
    def load(cls, path: Path) -> "CandidateLists":
        """Read a file written by :meth:`save`.

        Raises:
            DataError: the file is damaged or does not have the hash it was stored with.
            PermissionError: the file is another account's.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with open(path, "rb"):  # safetensors would call a file that is closed to this account missing
                pass
            with safe_open(str(path), framework="numpy") as file:
                stored = cls(file.get_tensor("candidates"), file.get_tensor("target_index"))
                expected = (file.metadata() or {}).get("sha256")
        except PermissionError:
            raise
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{path}: damaged candidate lists ({error}); delete the file, it will be drawn again"
            ) from error
        if stored.sha256 != expected:
            raise DataError(
                f"{path}: candidate lists differ from their stored sha256; delete the file to draw them again"
            )
        return stored


class CandidateSampler:
    """Draws candidate lists for R predictions by vectorised rejection.

    Args:
        name: domain name, for errors.
        targets: (R,) item ids.
        items: (M,) item ids of all interactions.
        starts: (R,) first of a row's excluded interactions in ``items``.
        ends: (R,) one past the last of them. For validation and test this is the complete history of the user; for
            training samples the train part only, so that test items are not singled out by their absence.
        groups: (N + 1,) title groups, see :func:`title_groups`.
        lost: what the domain has lost before, for errors that too little is left; see
            :func:`~lightning_sfubm.datamodules.card.dropped`.
    """

    def __init__(
        self,
        name: str,
        targets: np.ndarray,
        items: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        groups: np.ndarray,
        lost: str = "",
    ) -> None:
        self.name = name
        self.lost = lost
        self.targets = targets.astype(np.int64)
        self.groups = groups
        self.num_items = len(groups) - 1
        self.num_titles = int(groups.max(initial=-1)) + 1
        lengths = ends - starts
        rows = np.repeat(np.arange(len(targets)), lengths)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        excluded = items[np.repeat(starts, lengths) + within].astype(np.int64)
        #: Sorted keys ``row * (N + 1) + item`` of what may not be drawn.
        self._excluded = np.sort(rows * (self.num_items + 1) + excluded)

    def draw(self, num_candidates: int, generator: np.random.Generator) -> CandidateLists:
        """Draw lists of ``num_candidates``.

        Raises:
            ConfigError: fewer than two candidates are asked for.
            DataError: the domain, or what a user leaves of it, has too few items with distinct titles.
        """
        if num_candidates < 2:
            raise ConfigError(f"num_candidates must be at least 2, not {num_candidates}")
        if self.num_titles < num_candidates:
            raise DataError(
                f"domain '{self.name}' has {self.num_titles} items with distinct titles, too few for lists of "
                f"{num_candidates} candidates; add items or lower num_candidates{self.lost}"
            )
        size = len(self.targets)
        lists = np.zeros((size, num_candidates), dtype=np.int64)
        lists[:, 0] = self.targets
        todo = np.arange(size)
        for _ in range(MAX_ROUNDS):
            if len(todo) == 0:
                break
            block = lists[todo]
            drawn = generator.integers(1, self.num_items + 1, size=block.shape)
            block = np.where(block == 0, drawn, block)
            bad = self._is_excluded(todo, block) | self._repeats_title(block)
            bad[:, 0] = False
            block[bad] = 0
            # Accepted draws stand first: a later one never ousts an earlier one, which keeps the draw uniform.
            lists[todo] = np.take_along_axis(block, np.argsort(block == 0, axis=1, kind="stable"), axis=1)
            todo = todo[bad.any(axis=1)]
        for row in todo:
            lists[row] = self._draw_row(int(row), num_candidates, generator)
        shuffle = np.argsort(generator.random(lists.shape), axis=1)
        candidates = np.take_along_axis(lists, shuffle, axis=1)
        return CandidateLists(candidates.astype(np.int32), np.argmin(shuffle, axis=1).astype(np.int32))

    def _is_excluded(self, rows: np.ndarray, block: np.ndarray) -> np.ndarray:
        keys = rows[:, None] * (self.num_items + 1) + block
        if len(self._excluded) == 0:
            return np.zeros(keys.shape, dtype=bool)
        places = np.minimum(np.searchsorted(self._excluded, keys), len(self._excluded) - 1)
        return self._excluded[places] == keys

    def _repeats_title(self, block: np.ndarray) -> np.ndarray:
        """Mask of entries whose title group stands further left in the same row."""
        groups = self.groups[block]
        order = np.argsort(groups, axis=1, kind="stable")
        ordered = np.take_along_axis(groups, order, axis=1)
        repeated = np.zeros(block.shape, dtype=bool)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        out = np.empty_like(repeated)
        np.put_along_axis(out, order, repeated, axis=1)
        return out

    def _draw_row(self, row: int, num_candidates: int, generator: np.random.Generator) -> np.ndarray:
        """Exact draw for a row whose user leaves few items: the first of each title in a random order."""
        everything = np.arange(1, self.num_items + 1)
        allowed = everything[~self._is_excluded(np.array([row]), everything[None])[0]]
        target = self.targets[row]
        allowed = generator.permutation(allowed[self.groups[allowed] != self.groups[target]])
        _, first = np.unique(self.groups[allowed], return_index=True)
        negatives = allowed[np.sort(first)][: num_candidates - 1]
        if len(negatives) < num_candidates - 1:
            raise DataError(
                f"domain '{self.name}': a user's history leaves {len(negatives)} of {self.num_items} items as negatives "
                f"(titles distinct), too few for lists of {num_candidates} candidates; lower num_candidates{self.lost}"
            )
        return np.concatenate([[target], negatives])


def stored_candidates(
    folder: Path,
    sampler: Callable[[], CandidateSampler],
    *,
    rows: int,
    fingerprint: str,
    split: str,
    seed: int,
    num_candidates: int,
) -> CandidateLists:
    """The lists of (data, split, seed, C): read if they are stored, else drawn and stored.

    Args:
        folder: where lists are kept.
        sampler: makes the sampler, only called where lists must be drawn.
        rows: R, number of lists.
        fingerprint: of the domain.
        split: ``"val"`` or ``"test"``.
        seed: of the draw.
        num_candidates: C.

    Raises:
        DataError: stored lists are damaged, another account's, or do not fit the domain.
    """
    path = folder / f"{fingerprint[:32]}-{split}-c{num_candidates}-s{seed}-rule{RULE}.safetensors"
    with own_cache(path):
        stored = CandidateLists.load(path) if path.is_file() else None
    if stored is not None:
        if stored.candidates.shape == (rows, num_candidates):
            return stored
        raise DataError(
            f"{path}: candidate lists of shape {stored.candidates.shape} where ({rows}, {num_candidates}) is expected; "
            "delete the file to draw them again"
        )
    lists = sampler().draw(num_candidates, numpy_generator(seed, "candidates", fingerprint, split, num_candidates))
    with own_cache(path):
        lists.save(path)
    return lists
