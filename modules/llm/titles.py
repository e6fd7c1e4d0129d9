"""What the LLM's own token embeddings say of a title."""

import torch
from torch import Tensor

from lightning_sfubm.modules.llm.backbone import Backbone


@torch.no_grad()
def mean_title_embeddings(llm: str, titles: list[str], title_tokens: int) -> tuple[Tensor, float]:
    """Mean token embedding of each title's first tokens.

    Args:
        llm: the base model.
        titles: N + 1 titles; a blank one gives a zero row.
        title_tokens: tokens that count.

    Returns:
        (N + 1, d) float32 and the mean norm of the LLM's token embeddings.
    """
    backbone = Backbone(llm, num_layers=1)
    ids = backbone.tokenizer([" " + title for title in titles], add_special_tokens=False)["input_ids"]
    table = torch.zeros(len(titles), backbone.embedding_dim)
    spoken = [row[:title_tokens] if title.strip() else [] for row, title in zip(ids, titles, strict=True)]
    lengths = torch.tensor([len(row) for row in spoken])
    flat = torch.tensor([token for row in spoken for token in row])
    rows = torch.repeat_interleave(torch.arange(len(titles)), lengths)
    for start in range(0, len(flat), 65536):
        part = slice(start, start + 65536)
        table.index_add_(0, rows[part], backbone.embed(flat[part]))
    return table / lengths.clamp_min(1).unsqueeze(1), backbone.token_norm
