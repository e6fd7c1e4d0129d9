"""Learnable filters along the history, computed with the FFT, and FMLP-Rec, an encoder made of them (arXiv 2202.13556)."""

import math

import torch
from torch import Tensor, nn

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.layers.dropout import Dropout
from lightning_sfubm.modules.settings import check_dropout, check_positive


class CausalFilter(nn.Module):
    """A learned filter along the history, one per channel, stored as a spectrum and applied by FFT.

    FMLP-Rec multiplies the spectrum of a row of n = ``max_length`` positions by a learned one: a circular convolution, in
    which each state reads the whole row, later items included. Here the same spectrum is turned into its kernel of n steps
    and applied to the past only. On a row padded to n positions the state of the newest item is the same number either way.

    Args:
        hidden_dim: H.
        max_length: n, longest history in items, at least 1.

    Raises:
        ConfigError: if ``max_length`` is below 1.
    """

    def __init__(self, hidden_dim: int, max_length: int) -> None:
        super().__init__()
        if max_length < 1:
            raise ConfigError(f"CausalFilter: max_length={max_length} must be at least 1.")
        self.max_length = max_length
        #: real and imaginary parts; real numbers, so that optimisers and checkpoints need not know complex ones
        self.spectrum = nn.Parameter(torch.empty(max_length // 2 + 1, hidden_dim, 2))
        nn.init.normal_(self.spectrum, std=0.02)

    def kernel(self) -> Tensor:
        """Weight of the item k steps back, (n, H), k = 0 first."""
        return torch.fft.irfft(torch.view_as_complex(self.spectrum.float()), n=self.max_length, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """Filter rows (B, L, H) that hold 0 at padded positions.

        Returns:
            (B, L, H); position j depends on positions up to j only.

        Raises:
            ConfigError: if L exceeds ``max_length``.
        """
        length = x.shape[1]
        if length > self.max_length:
            raise ConfigError(
                f"CausalFilter: a history of {length} items is longer than max_length={self.max_length}; "
                "raise the filter's max_length or lower the data's."
            )
        # Twice the length: a shorter transform wraps round, and the oldest states would read the newest items.
        size = 2 * length
        spectrum = torch.fft.rfft(x.float(), n=size, dim=1) * torch.fft.rfft(self.kernel()[:length], n=size, dim=0)
        return torch.fft.irfft(spectrum, n=size, dim=1)[:, :length].to(x.dtype)


class FilterLayer(nn.Module):
    """A filter with residual and layer norm: ``norm(x + dropout(filter(x)))``.

    Args:
        hidden_dim: H.
        max_length: longest history, in items.
        dropout: dropout probability of the filtered states.
    """

    def __init__(self, hidden_dim: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.filter = CausalFilter(hidden_dim, max_length)
        self.drop = Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, L, H) to (B, L, H); positions where ``mask`` (B, L) is False are not read."""
        return self.norm(x + self.drop(self.filter(x * mask.unsqueeze(-1))))


class FilterBlock(nn.Module):
    """A filter layer and a position-wise feed-forward layer, each with a residual and a layer norm after it."""

    def __init__(self, hidden_dim: int, max_length: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.filter_layer = FilterLayer(hidden_dim, max_length, dropout)
        self.feedforward = nn.Sequential(
            nn.Linear(hidden_dim, feedforward_dim), nn.GELU(), nn.Linear(feedforward_dim, hidden_dim)
        )
        self.drop = Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, L, H) to (B, L, H); ``mask`` as in :class:`FilterLayer`."""
        x = self.filter_layer(x, mask)
        return self.norm(x + self.drop(self.feedforward(x)))


class FilterMixer(nn.Module):
    """FMLP-Rec's encoder: filters in place of self-attention (Zhou et al., WWW 2022, arXiv 2202.13556).

    Causal, so that one pass trains every position of a row; the original trains the last position of every prefix. Positions
    are counted from the oldest item, so the amount of left padding changes nothing.

    Args:
        hidden_dim: H, the width of item embeddings and states.
        num_layers: blocks.
        max_length: longest history accepted, in items.
        dropout: dropout probability of embeddings and residual branches [choice: that of the other encoders; the authors' .5].
        feedforward_dim: inner width of the feed-forward layers; ``None`` means 4 H, as in the original.

    Raises:
        ConfigError: if a setting is out of range.

    Example:
        >>> encoder = FilterMixer(hidden_dim=8)
        >>> encoder(torch.zeros(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        hidden_dim: int = 64,
        num_layers: int = 2,
        max_length: int = 50,
        dropout: float = 0.2,
        feedforward_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_positive("FilterMixer", hidden_dim=hidden_dim, max_length=max_length, feedforward_dim=feedforward_dim)
        check_dropout("FilterMixer", dropout=dropout)
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.max_length = max_length
        self.dropout = dropout
        self.feedforward_dim = feedforward_dim

        self.positions = nn.Embedding(max_length, hidden_dim)
        nn.init.normal_(self.positions.weight, std=1.0 / math.sqrt(hidden_dim))
        self.input_norm = nn.LayerNorm(hidden_dim)
        self.drop = Dropout(dropout)
        inner = 4 * hidden_dim if feedforward_dim is None else feedforward_dim
        self.blocks = nn.ModuleList(FilterBlock(hidden_dim, max_length, inner, dropout) for _ in range(num_layers))

    def forward(self, item_embeddings: Tensor, mask: Tensor) -> Tensor:
        """Encode histories.

        Args:
            item_embeddings: (B, L, H), left-padded.
            mask: (B, L) boolean, True at real items.

        Returns:
            (B, L, H) states; the one at position j depends on the items up to j only.

        Raises:
            ConfigError: if L exceeds ``max_length``.
        """
        length = mask.shape[1]
        if length > self.max_length:
            raise ConfigError(
                f"FilterMixer: a history of {length} items is longer than max_length={self.max_length}; "
                "raise the encoder's max_length or lower the data's."
            )
        index = mask.cumsum(1).sub(1).clamp_min(0)
        x = self.drop(self.input_norm(item_embeddings + self.positions(index)))
        for block in self.blocks:
            x = block(x, mask)
        return x
