"""Branches on a shared prefix: every candidate continues the prefix in a world of its own, computed in one pass.

All branches stand behind the prefix in one row. A token sees the prefix and the earlier tokens of its own branch, and
its position is counted as if the other branches were not there. So a branch's states equal those of a separate run
over prefix + branch, the prefix is encoded once, gradients pass through it, and the order of branches is irrelevant.
"""

import torch
from torch import Tensor

from lightning_sfubm.datamodules.prompt_batch import PromptBatch
from lightning_sfubm.modules.llm.backbone import Backbone


def tree_mask(branch: Tensor) -> Tensor:
    """Attention mask (B, 1, S, S), True = may be attended, from branch numbers (B, S): -1 padding, 0 prefix, k branch.

    A padded position sees itself, so that its (unused) state is finite.
    """
    length = branch.shape[1]
    query, key = branch.unsqueeze(2), branch.unsqueeze(1)
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    mask = causal & (key >= 0) & ((key == 0) | (key == query))
    mask |= torch.eye(length, dtype=torch.bool, device=branch.device)
    return mask.unsqueeze(1)


def tree_states(backbone: Backbone, embeddings: Tensor, prompts: PromptBatch) -> Tensor:
    """States (B, S, hidden_dim) of all tokens, each branch isolated; one pass over prefix + all branches."""
    return backbone.states(embeddings, tree_mask(prompts.branch), prompts.positions)


def separate_states(backbone: Backbone, embeddings: Tensor, prompts: PromptBatch) -> Tensor:
    """The same states by the plain way: one causal row for prefix + branch, for each branch.

    For architectures that cannot take a tree mask with positions (ALiBi, recurrent models), and the oracle in tests.
    """
    states = torch.zeros(*embeddings.shape[:2], backbone.hidden_dim, device=embeddings.device)
    for row in range(len(embeddings)):
        branch = prompts.branch[row]
        prefix = (branch == 0).nonzero().flatten()
        for number in range(1, max(int(branch.max()), 1) + 1):
            columns = torch.cat([prefix, (branch == number).nonzero().flatten()])
            mask = torch.ones(1, len(columns), dtype=torch.bool, device=embeddings.device)
            positions = torch.arange(len(columns), device=embeddings.device).unsqueeze(0)
            own = backbone.states(embeddings[row : row + 1, columns], mask, positions)[0]
            states = states.index_put((torch.tensor(row, device=columns.device), columns), own)
    return states


def supports_tree(backbone: Backbone, tolerance: float = 0.02) -> bool:
    """Whether this architecture gives the same states by the tree mask as by separate runs (tried on a few tokens)."""
    if "local" in getattr(backbone.config, "attention_layers", ()):
        return False  # GPT-Neo looks back by columns in these layers, further than a few tokens show
    tokens = torch.arange(1, 9).remainder(backbone.causal_lm.get_input_embeddings().num_embeddings).unsqueeze(0)
    branch = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5]])
    none = torch.zeros_like(tokens)
    prompts = PromptBatch(tokens, branch, positions, none, none - 1, torch.tensor([3]), torch.tensor([[5, 7]]))
    prompts = prompts.to(next(backbone.parameters()).device)
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            embeddings = backbone.embed(prompts.tokens)
            shared = tree_states(backbone, embeddings, prompts)
            plain = separate_states(backbone, embeddings, prompts)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # the architecture does not take such a mask or such positions at all
    finally:
        backbone.train(was_training)
    scale = plain.abs().max().clamp_min(1e-6)
    return bool(((shared - plain).abs().max() / scale) < (tolerance if not backbone.bf16 else 5 * tolerance))
