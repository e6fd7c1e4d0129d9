"""What a silo's own counts say of a candidate: words and buyers in common with the history, and popularity."""

import re
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch, Stage1
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.metrics import user_blocks
from lightning_sfubm.modules.layers.cooccurrence import cooccurrences

COUNT_AFFINITIES = ("term_mean", "term_last", "cooccurrence_sum", "cooccurrence_last", "popularity")
WINDOW = 5  #: largest distance of two items in a training sequence that counts
MAX_TERMS = 32  #: words kept of a title, the rarest ones
_WORD = re.compile(r"\w+")


class CountAffinities(nn.Module):
    """Five columns for each candidate that cost nothing to learn [choice; figures in docs/results.md].

    ``term_mean`` and ``term_last``: cosine of TF-IDF vectors of titles (a word counts once a title, words of one title alone
    are left out), mean over the history and that of the last item: brand, kind and size, which a sentence vector blurs.
    ``cooccurrence_sum`` and ``cooccurrence_last``: how often candidate and item of the history stand near each other in
    training sequences, over the root of both items' degrees; sum over the history and the last item. ``popularity``:
    logarithm of one more than the training interactions.

    Everything is of the domain's own training data and stays there: no buffer is written to checkpoints.

    Args:
        catalogue: of the domain, with its training sequences.

    Raises:
        ConfigError: the catalogue has no training sequences (that of several domains together).
    """

    terms: Tensor
    term_weights: Tensor
    pairs: Tensor
    pair_weights: Tensor
    popularity: Tensor

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__()
        if catalogue.histories is None:
            raise ConfigError(
                f"count affinities need training sequences, which the catalogue {catalogue.name!r} does not have: "
                "take the datamodule of a single domain"
            )
        terms, weights, self.num_terms = _term_vectors(catalogue.titles)
        rows, columns, values = cooccurrences(catalogue.histories, catalogue.num_items, WINDOW)
        degrees = np.bincount(rows, values, catalogue.num_items)
        values = values / np.sqrt(degrees[rows] * degrees[columns])
        self.width = catalogue.num_items + 1
        keys = (rows + 1) * self.width + columns + 1  # sorted, since rows and columns are
        buffers = {
            "terms": terms,
            "term_weights": weights,
            "pairs": torch.from_numpy(keys),
            "pair_weights": torch.from_numpy(values).float(),
            "popularity": catalogue.train_counts.float().log1p(),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        """Raw features, columns as in :data:`COUNT_AFFINITIES`.

        Args:
            history: (B, L) item ids, left-padded.
            candidates: (B, C) item ids.

        Returns:
            (B, C, 5); all but popularity are 0 for an empty history.
        """
        near = self._near(history, candidates)
        by_term = [
            self._in_common(history[rows], candidates[rows])
            for rows in user_blocks(len(history), self.num_terms + 1, history.device)
        ]
        popularity = self.popularity[candidates].unsqueeze(-1)
        return torch.cat([torch.cat(by_term), near.sum(1).unsqueeze(-1), near[:, -1].unsqueeze(-1), popularity], -1)

    def _in_common(self, history: Tensor, candidates: Tensor) -> Tensor:
        """(B, C, 2) cosines of title words, mean over the history and for the last item."""
        real = (history != 0).float()
        mean = real / real.sum(1, keepdim=True).clamp_min(1)
        last = torch.zeros_like(real)
        last[:, -1] = 1.0
        words, columns = self.terms[history].flatten(1), self.terms[candidates].flatten(1)
        cosines = []
        for share in (mean, last):
            weights = (self.term_weights[history] * share.unsqueeze(-1)).flatten(1)
            profile = weights.new_zeros(len(history), self.num_terms + 1).scatter_add_(1, words, weights)
            met = profile.gather(1, columns).view(*candidates.shape, -1)
            cosines.append((met * self.term_weights[candidates]).sum(-1))
        return torch.stack(cosines, -1)

    def _near(self, history: Tensor, candidates: Tensor) -> Tensor:
        """(B, L, C) co-occurrence weight of each pair; 0 where the two never stood near each other."""
        if not len(self.pairs):
            return self.pair_weights.new_zeros(*history.shape, candidates.shape[1])
        keys = history.unsqueeze(2) * self.width + candidates.unsqueeze(1)
        places = torch.searchsorted(self.pairs, keys).clamp_max(len(self.pairs) - 1)
        return torch.where(self.pairs[places] == keys, self.pair_weights[places], 0.0)


def _term_vectors(titles: list[str]) -> tuple[Tensor, Tensor, int]:
    """TF-IDF vectors of titles as word ids from 1 (N + 1, T) and weights (N + 1, T), both padded with 0; number of words."""
    words = [list(dict.fromkeys(_WORD.findall(title.lower()))) for title in titles]
    known = Counter(word for title in words for word in title)
    ids = {word: place for place, word in enumerate((w for w, n in known.items() if n > 1), 1)}
    rarity = {word: float(np.log(len(titles) / known[word])) for word in ids}
    kept = [sorted((w for w in title if w in ids), key=lambda w: (known[w], w))[:MAX_TERMS] for title in words]
    width = max(1, max(map(len, kept), default=1))
    terms, weights = torch.zeros(len(titles), width, dtype=torch.long), torch.zeros(len(titles), width)
    for row, title in enumerate(kept):
        terms[row, : len(title)] = torch.tensor([ids[w] for w in title], dtype=torch.long)
        weights[row, : len(title)] = torch.tensor([rarity[w] for w in title])
    return terms, F.normalize(weights, dim=-1), len(ids)


class WithCounts(nn.Module):
    """A stage 1 whose affinities have the columns of :class:`CountAffinities` besides; all else is the stage 1's.

    Args:
        stage1: trained module; not copied, not changed.
        catalogue: of its domain, with training sequences.

    Raises:
        ConfigError: the catalogue has no training sequences.
    """

    def __init__(self, stage1: Stage1, catalogue: Catalogue) -> None:
        super().__init__()
        self.stage1 = stage1
        self.counts = CountAffinities(catalogue)
        self.hidden_dim = stage1.hidden_dim

    @property
    def affinity_names(self) -> tuple[str, ...]:
        """Names of the columns of :meth:`affinities`."""
        return (*self.stage1.affinity_names, *COUNT_AFFINITIES)

    def user_states(self, batch: RankBatch) -> Tensor:
        """(B, H) state after the newest item."""
        return self.stage1.user_states(batch)

    def item_tables(self) -> tuple[Tensor, Tensor]:
        """ID embeddings e (N + 1, H) and semantic embeddings z (N + 1, H)."""
        return self.stage1.item_tables()

    def affinities(self, batch: RankBatch) -> Tensor:
        """(B, C, F + 5) raw affinity features, first column the stage-1 score itself."""
        return torch.cat([self.stage1.affinities(batch), self.counts(batch["history"], batch["candidates"])], -1)
