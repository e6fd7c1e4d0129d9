"""The item side of FFMSR: what an item is to a client that knows its text, its users and the server's clusters."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.modules.layers.cache import VersionCache
from lightning_sfubm.modules.layers.items import id_table
from lightning_sfubm.modules.layers.whitening import WhiteningExperts
from lightning_sfubm.modules.losses.precision import Precision
from lightning_sfubm.seeds import derive_seed, seeded


class ItemVectors(NamedTuple):
    """What FFMSR knows of all items; four tables (N + 1, H), row 0 zero."""

    text: Tensor  #: t, the domain's own text
    inputs: Tensor  #: v = gate(e) e + t, read by the encoder together with the filtered prompts
    prompts: Tensor  #: p, from the vectors the server sent; zero, without a gradient, before anything was received
    outputs: Tensor  #: c = v + gate(p) p, what states are compared with


class LayerAttention(nn.Module):
    """Weights of a language model's layers, for each item from its ID embedding and its text as each layer has it.

    Starts with equal weights [choice], so that what leaves before any training is not weighed at random.

    Args:
        hidden_dim: H.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        last = nn.Linear(16, 1, bias=False)  # the softmax does not see a bias
        nn.init.zeros_(last.weight)
        self.score = nn.Sequential(
            nn.Linear(2 * hidden_dim, hidden_dim), nn.LeakyReLU(), nn.Linear(hidden_dim, 16), nn.LeakyReLU(), last
        )

    def forward(self, ids: Tensor, layers: Tensor) -> Tensor:
        """Weights (N, layers, 1), summing to 1 for each item, of ID embeddings (N, H) and texts (N, layers, H)."""
        both = torch.cat([ids.unsqueeze(1).expand_as(layers), layers], -1)
        return torch.softmax(self.score(both), 1)


class FFMSRItems(nn.Module):
    """The item side of FFMSR: ID embeddings, layer-wise text and the vectors of the server's clusters.

    Args:
        num_items: N.
        hidden_dim: H.
        text_dim: D, all layers together.
        text_layers: layers that lie side by side in a text vector.
        attention: weigh the layers by :class:`LayerAttention` rather than equally.
        gate: scale an ID embedding by a learned gate on itself.
        num_experts: whitening experts of each of the two adaptors.
        dropout: dropout of the text vectors while training.
        seed: root of the named streams.
        precision: number format of the adaptors' products.
    """

    text: Tensor
    global_text: Tensor | None

    def __init__(
        self,
        num_items: int,
        hidden_dim: int,
        text_dim: int,
        text_layers: int,
        attention: bool,
        gate: bool,
        num_experts: int,
        dropout: float,
        seed: int,
        precision: Precision,
    ) -> None:
        super().__init__()
        width = text_dim // text_layers
        self.text_layers = text_layers
        self.ids = id_table(num_items, hidden_dim, seed)
        self.adaptor = WhiteningExperts(width, hidden_dim, num_experts, dropout, seed, precision)
        # Another stream: with the same one both adaptors would start as the same map and draw the same gate noise.
        other = derive_seed(seed, "global adaptor")
        self.global_adaptor = WhiteningExperts(width, hidden_dim, num_experts, dropout, other, precision)
        with seeded(seed, "ffmsr", "gates"):
            # With one layer there is nothing to weigh.
            self.attention = LayerAttention(hidden_dim) if attention and text_layers > 1 else None
            self.id_gate = nn.Linear(hidden_dim, 1) if gate else None
            self.prompt_gate = nn.Linear(hidden_dim, 1)
        self.register_buffer("text", torch.zeros(num_items + 1, text_dim))
        self.register_buffer("global_text", None)
        self._cache = VersionCache(self)

    def load_text(self, vectors: Tensor) -> None:
        """Take text vectors (N + 1, D).

        Raises:
            ConfigError: if they are no layers side by side, which would all have the same length within an item.
        """
        lengths = vectors.unflatten(1, (self.text_layers, -1)).norm(dim=-1)
        if (lengths.amax(1) - lengths.amin(1)).max() > 1e-3:
            raise ConfigError(
                f"FFMSR: the text vectors are not text_layers={self.text_layers} layers side by side; "
                "set text_layers and the text encoder's 'layers' to the same number."
            )
        self.text.copy_(vectors)

    def receive(self, vectors: Tensor) -> None:
        """Take the server's vectors (N, D / layers).

        Raises:
            MessageError: if the shape is another one or a value is not finite.
        """
        expected = (len(self.text) - 1, self.text.shape[1] // self.text_layers)
        if tuple(vectors.shape) != expected:
            raise MessageError(f"Aggregated semantics have shape {tuple(vectors.shape)}, this domain needs {expected}.")
        if not vectors.isfinite().all():
            raise MessageError("Aggregated semantics hold values that are not finite.")
        self.allocate_global()
        assert self.global_text is not None
        self.global_text[1:].copy_(vectors)

    def allocate_global(self) -> None:
        """Make room for the server's vectors, for :meth:`receive` and for checkpoints that hold them."""
        if self.global_text is None:
            self.global_text = self.text.new_zeros(len(self.text), self.text.shape[1] // self.text_layers)

    def _layers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unit text vectors of all layers (N, layers, D / layers), the adaptor's view of them and their weights."""
        layers = self.text[1:].unflatten(1, (self.text_layers, -1)) * math.sqrt(self.text_layers)
        adapted = self.adaptor(layers.flatten(0, 1)).unflatten(0, (-1, self.text_layers))
        if self.attention is None:
            return layers, adapted, adapted.new_full((1, self.text_layers, 1), 1.0 / self.text_layers)
        # The attention reads the ID embeddings but does not train them.
        return layers, adapted, self.attention(self.ids.weight[1:].detach(), adapted)

    def forward(self) -> ItemVectors:
        """The tables, with gradients."""
        ids = self.ids.weight[1:]
        _, adapted, weights = self._layers()
        text = (weights * adapted).sum(1)
        inputs = text + (ids if self.id_gate is None else torch.sigmoid(self.id_gate(ids)) * ids)
        prompts = torch.zeros_like(text) if self.global_text is None else self.global_adaptor(self.global_text[1:])
        outputs = inputs + torch.sigmoid(self.prompt_gate(prompts)) * prompts
        return ItemVectors(*(F.pad(table, (0, 0, 1, 0)) for table in (text, inputs, prompts, outputs)))

    def frozen(self) -> ItemVectors:
        """The detached tables in evaluation mode, computed once per change of their parameters."""
        return ItemVectors(*self._cache.get("vectors", lambda: torch.stack(self())).unbind(0))

    def semantics(self) -> Tensor:
        """(N, D / layers) unit vectors: each item's layers in the weights the attention gives them now."""

        def compute() -> Tensor:
            layers, _, weights = self._layers()
            return F.normalize((weights * layers).sum(1), dim=-1)

        return self._cache.get("semantics", compute).clone()
