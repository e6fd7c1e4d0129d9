import re
from collections import Counter
from math import log, sqrt
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sfubm.contracts import Catalogue, RankBatch, TrainHistories
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.baselines.late_fusion import LateFusion
from lightning_sfubm.modules.layers.count_affinity import COUNT_AFFINITIES, WINDOW, CountAffinities, WithCounts
from lightning_sfubm.seeds import torch_generator

WORDS = ["soap", "Rose", "soap, soap", "large", "mint", "Crème", "2oz", "alone"]


def catalogue(num_items: int = 30, users: int = 40, seed: int = 0, **settings: Any) -> Catalogue:
    """Titles of up to four words, sequences of 2 to 9 items of which the last two are not for training."""
    random = np.random.default_rng(seed)
    titles = [""] + [" ".join(random.choice(WORDS[:-1], random.integers(1, 5))) for _ in range(num_items)]
    titles[num_items] = "alone"
    sequences = [random.integers(1, num_items + 1, random.integers(4, 12)) for _ in range(users)]
    ends = np.cumsum([len(s) for s in sequences])
    starts = np.concatenate([[0], ends[:-1]])
    counts = np.bincount(np.concatenate([s[:-2] for s in sequences]), minlength=num_items + 1)
    given: dict[str, Any] = {
        "name": "shop",
        "num_items": num_items,
        "titles": titles,
        "text_embeddings": None,
        "train_counts": torch.from_numpy(counts),
        "histories": TrainHistories(np.concatenate(sequences), starts, ends - 2),
    }
    return Catalogue(**{**given, **settings})


def rows(num_items: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch_generator(1, "rows")
    history = torch.randint(1, num_items + 1, (5, 7), generator=generator)
    history[1, :4] = 0
    history[2] = 0
    candidates = torch.stack([torch.randperm(num_items, generator=generator)[:6] + 1 for _ in range(5)])
    candidates[:, 0] = num_items  # the item whose word no other title has
    return history, candidates


def test_columns_equal_a_loop() -> None:
    """Cosines of TF-IDF vectors and weights of pairs, counted one by one."""
    shop = catalogue()
    words = [set(re.findall(r"\w+", title.lower())) for title in shop.titles]
    known = Counter(word for title in words for word in title)
    vectors = [{w: log(len(words) / known[w]) for w in title if known[w] > 1} for title in words]
    units = [{w: v / sqrt(sum(x * x for x in vec.values())) for w, v in vec.items()} for vec in vectors]
    near: Counter[tuple[int, int]] = Counter()
    assert shop.histories is not None
    for start, end in zip(shop.histories.starts, shop.histories.ends, strict=True):
        items = shop.histories.items[start:end].tolist()
        for i, a in enumerate(items):
            for j, b in enumerate(items):
                if a != b and 0 < abs(i - j) <= WINDOW:
                    near[a, b] += 1 / abs(i - j)  # type: ignore[assignment]
    degree: Counter[int] = Counter()
    for (a, _), weight in near.items():
        degree[a] += weight

    history, candidates = rows()
    result = CountAffinities(shop)(history, candidates)
    assert result.shape == (5, 6, len(COUNT_AFFINITIES))
    for row in range(5):
        past = [i for i in history[row].tolist() if i]
        for column, item in enumerate(candidates[row].tolist()):
            cosines = [sum(v * units[item].get(w, 0.0) for w, v in units[i].items()) for i in past]
            pairs = [near[i, item] / sqrt(degree[i] * degree[item]) if near[i, item] else 0.0 for i in past]
            expected = [sum(cosines) / max(len(past), 1), [0.0, *cosines][-1], sum(pairs), [0.0, *pairs][-1]]
            expected.append(log(1 + int(shop.train_counts[item])))
            torch.testing.assert_close(result[row, column], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert (result[:, 0, :2] == 0).all()  # a word of one title alone says nothing
    assert (result[2, :, :4] == 0).all()  # an empty history
    assert (result > 0).any(dim=0).any(dim=0).all()


def test_padding_changes_nothing() -> None:
    counts, (history, candidates) = CountAffinities(catalogue()), rows()
    longer = torch.cat([torch.zeros(5, 9, dtype=torch.long), history], 1)
    torch.testing.assert_close(counts(longer, candidates), counts(history, candidates))


def test_what_is_not_for_training_is_not_counted() -> None:
    """Validation, test and held-out positions lie outside the bounds of the training sequences."""
    shop = catalogue()
    assert shop.histories is not None
    other = shop.histories.items.copy()
    for end in shop.histories.ends:
        other[end : end + 2] = 1 + other[end : end + 2] % 30
    changed = catalogue(histories=TrainHistories(other, shop.histories.starts, shop.histories.ends))
    history, candidates = rows()
    assert torch.equal(CountAffinities(shop)(history, candidates), CountAffinities(changed)(history, candidates))


def test_long_titles_keep_their_rarest_words() -> None:
    titles = ["", " ".join(f"word{i}" for i in range(40)), " ".join(f"word{i}" for i in range(20, 60)), "word0 word39"]
    shop = catalogue(num_items=3, titles=[*titles[:3], "word0 word1 word39"], train_counts=torch.ones(4))
    counts = CountAffinities(shop)
    assert counts.terms.shape[1] <= 32
    assert (counts.terms[1] > 0).sum() == 22  # those that two titles have: 20 to 39, 0 and 1


def test_without_training_sequences_it_says_so() -> None:
    with pytest.raises(ConfigError, match=r"'shop'.*single domain"):
        CountAffinities(catalogue(histories=None))


def test_shops_without_pairs_or_words_have_zeros() -> None:
    nobody = TrainHistories(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    shop = catalogue(histories=nobody, titles=[""] + [f"only{i}" for i in range(30)], train_counts=torch.zeros(31))
    result = CountAffinities(shop)(*rows())
    assert result.shape == (5, 6, 5)
    assert result.abs().max() == 0


class Stage1:
    """A score that is noise: whatever the fusion knows, the counts told it."""

    hidden_dim = 4
    affinity_names = ("score",)

    def affinities(self, batch: RankBatch) -> torch.Tensor:
        return torch.randn(*batch["candidates"].shape, 1, generator=torch_generator(0, "noise"))

    def user_states(self, batch: RankBatch) -> torch.Tensor:
        return torch.ones(len(batch["candidates"]), 4)

    def item_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(31, 4), torch.zeros(31, 4)


def test_fusion_learns_that_words_in_common_decide() -> None:
    """T32: targets share a word with the last item; of new users the fusion with counts finds three quarters and more."""
    kinds = 6
    shop = catalogue(num_items=30, titles=["", *(f"kind{i % kinds} thing" for i in range(30))])
    generator = torch_generator(3, "planted")
    last = torch.randint(1, 31, (400,), generator=generator)
    target = (last + kinds * torch.randint(1, 5, (400,), generator=generator) - 1) % 30 + 1
    others = torch.stack([torch.randperm(30, generator=generator)[:9] + 1 for _ in range(400)])
    same = (others - last.unsqueeze(1)) % kinds == 0
    others = torch.where(same, 1 + others % 30, others)
    place = torch.randint(0, 9, (400,), generator=generator)
    candidates = others.scatter(1, place.unsqueeze(1), target.unsqueeze(1))
    batch: RankBatch = {
        "history": last.unsqueeze(1),
        "candidates": candidates,
        "target": target,
        "target_index": place,
        "user": torch.arange(400),
    }
    train, test = ({k: v[s] for k, v in batch.items()} for s in (slice(0, 200), slice(200, 400)))  # type: ignore[attr-defined]
    stage1 = WithCounts(Stage1(), shop)
    assert stage1.affinity_names == ("score", *COUNT_AFFINITIES)
    fusion = LateFusion(stage1)
    fusion.fit([train])  # type: ignore[list-item]
    assert (fusion.rank(test).argmax(1) == test["target_index"]).float().mean() > 0.75  # type: ignore[arg-type]
    alone = LateFusion(Stage1())
    alone.fit([train])  # type: ignore[list-item]
    assert (alone.rank(test).argmax(1) == test["target_index"]).float().mean() < 0.3  # type: ignore[arg-type]


def test_counts_stay_out_of_checkpoints() -> None:
    assert WithCounts(Stage1(), catalogue()).state_dict() == {}
