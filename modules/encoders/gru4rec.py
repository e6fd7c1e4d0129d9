"""GRU4Rec: a recurrent encoder over item embeddings (Hidasi et al., ICLR 2016; Hidasi and Karatzoglou, CIKM 2018)."""

import torch
from torch import Tensor, nn

from lightning_sfubm.modules.layers.dropout import Dropout
from lightning_sfubm.modules.settings import check_dropout, check_positive


class GRU4Rec(nn.Module):
    """Gated recurrent sequence encoder.

    Rows are rotated so that their padding stands at the end, where a recurrence run forwards cannot see it, and rotated
    back afterwards: no packing, no loop over rows, and the hidden state starts at zero before the oldest real item.

    Args:
        hidden_dim: H, the width of item embeddings and states.
        num_layers: stacked GRU layers.
        dropout: dropout probability of the input, and between layers unless ``hidden_dropout`` is given.
        hidden_dropout: dropout probability of every layer's output, the last one's included, as in the official code;
            ``None`` leaves the last one's as it is.
        project: a linear layer from states to item space; without it the states themselves are compared with the item
            vectors, as in the official code with its constrained embedding.

    Raises:
        ConfigError: if a setting is out of range.

    Example:
        >>> encoder = GRU4Rec(hidden_dim=8)
        >>> encoder(torch.zeros(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        hidden_dim: int = 64,
        num_layers: int = 1,
        dropout: float = 0.2,
        hidden_dropout: float | None = None,
        project: bool = True,
    ) -> None:
        super().__init__()
        check_positive("GRU4Rec", hidden_dim=hidden_dim, num_layers=num_layers)
        check_dropout("GRU4Rec", dropout=dropout, hidden_dropout=hidden_dropout)
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.dropout = dropout
        self.hidden_dropout = hidden_dropout
        self.project = project
        self.drop = Dropout(dropout)
        between = dropout if hidden_dropout is None else hidden_dropout
        self.gru = nn.GRU(
            hidden_dim, hidden_dim, num_layers, batch_first=True, dropout=between if num_layers > 1 else 0.0
        )
        self.drop_out = Dropout(hidden_dropout or 0.0)
        self.out = nn.Linear(hidden_dim, hidden_dim) if project else nn.Identity()

    def forward(self, item_embeddings: Tensor, mask: Tensor) -> Tensor:
        """Encode histories.

        Args:
            item_embeddings: (B, L, H), left-padded.
            mask: (B, L) boolean, True at real items.

        Returns:
            (B, L, H) states; the one at position j depends on the items up to j only.
        """
        length = mask.shape[1]
        padding = (~mask).sum(1, keepdim=True)
        steps = torch.arange(length, device=mask.device)
        to_front = ((steps + padding) % length).unsqueeze(-1).expand_as(item_embeddings)
        states, _ = self.gru(self.drop(item_embeddings.gather(1, to_front)))
        back = ((steps - padding) % length).unsqueeze(-1).expand_as(states)
        # Padded positions were run last, so their states have seen the whole row: cleared.
        return self.out(self.drop_out(states.gather(1, back) * mask.unsqueeze(-1)))
