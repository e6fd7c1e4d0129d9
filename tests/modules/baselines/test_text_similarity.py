"""Untrained text similarity ranks by the mean of the newest texts, and refuses a domain without texts."""

import pytest
import torch

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.baselines.text_similarity import TextSimilarity


def catalogue_of(text: torch.Tensor | None) -> Catalogue:
    return Catalogue("a", 3, ["", "x", "y", "z"], text, torch.zeros(4, dtype=torch.int64))


def test_scores_are_cosines_to_the_mean_of_the_history() -> None:
    text = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    batch = {"history": torch.tensor([[0, 1, 3]]), "candidates": torch.tensor([[1, 2, 3]])}
    mean = torch.tensor([1.6, 0.8]) / torch.tensor([1.6, 0.8]).norm()
    scores = TextSimilarity(catalogue_of(text)).rank(batch)  # type: ignore[arg-type]
    torch.testing.assert_close(scores, (text[1:] @ mean)[None])


def test_a_domain_without_texts_is_named() -> None:
    with pytest.raises(ConfigError, match="'a' has no text vectors"):
        TextSimilarity(catalogue_of(None))
