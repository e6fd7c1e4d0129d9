"""The generated federation really has the structure it claims, and titles carry it across domains."""

import numpy as np
import pytest
import torch

from lightning_sfubm.contracts import TextEncoder
from lightning_sfubm.datamodules.preprocess import PreprocessSettings, build_domain
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.errors import ConfigError


def load(index: int, **settings):
    return build_domain(SyntheticReader(index, **settings).read(None), f"d{index}", PreprocessSettings(k_core=0))


def transitions(domain, vectors: torch.Tensor) -> torch.Tensor:
    """(D, D) mean outer product of consecutive text vectors: the structure in text space."""
    same = np.ones(domain.num_interactions - 1, dtype=bool)
    same[domain.offsets[1:-1] - 1] = False
    now, following = domain.items[:-1][same] - 1, domain.items[1:][same] - 1
    return vectors[now].T @ vectors[following] / len(now)


def test_domains_share_the_chain_and_nothing_else() -> None:
    readers = [SyntheticReader(index) for index in (0, 1)]
    assert np.array_equal(readers[0].successors(), readers[1].successors())
    assert not np.array_equal(readers[0].topics(), readers[1].topics())
    assert not np.array_equal(readers[0].successors(), SyntheticReader(0, seed=2).successors())
    a, b = load(0), load(1)
    assert not set(a.user_keys) & set(b.user_keys)
    assert not set(a.item_keys[1:]) & set(b.item_keys[1:])
    assert len(set(a.titles)) == len(a.titles)


def test_next_topic_follows_the_chain_as_often_as_asked() -> None:
    reader = SyntheticReader(0, num_users=1000, order=0.6)
    raw = reader.read(None)
    topics = reader.topics()
    items = np.array([int(key.split("-i")[1]) for key in raw.interactions.column("item").to_pylist()])
    order = raw.interactions.column("order").to_numpy()
    following = order[1:] > 0
    hits = reader.successors()[topics[items[:-1]]] == topics[items[1:]]
    expected = 0.6 + 0.4 / reader.num_topics
    assert abs(hits[following].mean() - expected) < 0.02


def test_structure_read_from_titles_in_one_domain_predicts_the_other() -> None:
    encoder = HashingTextEncoder(128)
    a, b = load(0), load(1)
    map_a = transitions(a, encoder.encode(a.titles[1:]))
    vectors = encoder.encode(b.titles[1:])
    last, before = b.items[b.offsets[1:] - 1] - 1, b.items[b.offsets[1:] - 2] - 1

    def rank_of_next(matrix: torch.Tensor) -> float:
        scores = vectors[before] @ matrix @ vectors.T
        own = scores.gather(1, torch.from_numpy(last.astype(np.int64))[:, None])
        return float((scores > own).float().mean())  # 0 = always first, .5 = chance

    strangers = load(0, seed=99)
    other = transitions(strangers, encoder.encode(strangers.titles[1:]))
    assert rank_of_next(map_a) < 0.25
    assert abs(rank_of_next(other) - 0.5) < 0.15


def test_encoder_is_deterministic_unit_and_blind_to_numbers() -> None:
    encoder = HashingTextEncoder(32)
    assert isinstance(encoder, TextEncoder)
    vectors = encoder.encode(["Blue shoe 12", "blue SHOE 77", "green lamp", "", "42"])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(5))
    assert torch.allclose(vectors[0], vectors[1])
    assert vectors[0] @ vectors[2] < 0.6
    assert torch.equal(HashingTextEncoder(32).encode(["green lamp"])[0], vectors[2])
    assert encoder.encode([]).shape == (0, 32)
    assert HashingTextEncoder(32, seed=1).fingerprint != encoder.fingerprint


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="num_topics"):
        SyntheticReader(num_items=3)
    with pytest.raises(ConfigError, match="order"):
        SyntheticReader(order=1.5)


def test_a_text_encoder_without_a_dimension_is_refused() -> None:
    for dim in (0, -3):
        with pytest.raises(ConfigError, match=f"HashingTextEncoder: dim must be at least 1, not {dim}"):
            HashingTextEncoder(dim=dim)
