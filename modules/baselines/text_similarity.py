"""The reference that learns nothing at all: how close a candidate's text is to the texts of the newest items."""

from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.layers.text_affinity import text_affinities


class TextSimilarity(nn.Module):
    """Cosine of a candidate's text vector and the mean text vector of the last five items, without any training.

    Whatever a silo gains by joining others, it must gain over this. A ``Ranker``.

    Args:
        catalogue: items of the domain, with text vectors.

    Raises:
        ConfigError: the catalogue has no text vectors.
    """

    text: Tensor

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__()
        if catalogue.text_embeddings is None:
            raise ConfigError(f"domain '{catalogue.name}' has no text vectors: give it a text_encoder")
        self.register_buffer("text", catalogue.text_embeddings)

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C)."""
        return text_affinities(self.text, batch["history"], batch["candidates"])[..., 0]
