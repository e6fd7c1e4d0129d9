"""Ranking by the words of the LLM: likelihood of titles, greedy generation, generation among the candidates only."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sfubm.datamodules.prompt_batch import PromptBatch
from lightning_sfubm.modules.llm.backbone import Backbone

#: tokens whose logits are compared in fp32 where the backbone computes in bf16
_NEAREST = 16


def branch_log_likelihood(
    backbone: Backbone, states: Tensor, prompts: PromptBatch, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each branch's tokens given the prefix.

    The vocabulary head is applied once to each state that predicts a branch token, in chunks, and to no other: the
    last prefix state predicts the first token of all branches of its row.

    Args:
        backbone: supplies the head.
        states: (B, S, hidden_dim) from :func:`~lightning_sfubm.modules.llm.tree.tree_states`.
        prompts: the prompts with C branches; soft tokens in a branch are not scored.
        chunk: states per application of the head; bounds memory.

    Returns:
        Sums of log-probabilities (B, C) and numbers of tokens (B, C).
    """
    rows, columns = ((prompts.branch > 0) & (prompts.tokens >= 0)).nonzero(as_tuple=True)
    branches = prompts.branch[rows, columns] - 1
    first = prompts.branch[rows, columns - 1] != branches + 1
    before = torch.where(first, prompts.prefix_end[rows], columns - 1)
    sources, source_of = torch.unique(rows * states.shape[1] + before, return_inverse=True)
    order = torch.argsort(source_of)
    bounds = torch.searchsorted(source_of[order], torch.arange(0, len(sources) + chunk, chunk, device=states.device))
    predicting = states.flatten(0, 1)[sources]
    pieces = []
    for index in range(len(bounds) - 1):
        start = index * chunk
        mine = order[bounds[index] : bounds[index + 1]]
        logits = backbone.logits(predicting[start : start + chunk])
        tokens = prompts.tokens[rows[mine], columns[mine]]
        # the log-normaliser once per state, not once per token: V is large
        normaliser = torch.logsumexp(logits, dim=-1)
        local = source_of[mine] - start
        pieces.append(logits[local, tokens] - normaliser[local])
    scores = torch.cat(pieces)
    target = rows[order] * prompts.branch_end.shape[1] + branches[order]
    shape = prompts.branch_end.shape
    sums = torch.zeros(shape.numel(), device=states.device).index_add(0, target, scores)
    counts = torch.zeros(shape.numel(), device=states.device).index_add(0, target, torch.ones_like(scores))
    return sums.view(shape), counts.view(shape)


@torch.no_grad()
def greedy(
    backbone: Backbone,
    embeddings: Tensor,
    prompts: PromptBatch,
    max_tokens: int,
    eos_id: int,
    tries: list["TitleTrie"] | None = None,
    anyone: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Greedy continuation of B left-padded prompts, all rows at once, keys and values cached.

    A row whose trie leaves one way to go on is complete: what follows is written down without being computed.

    Args:
        backbone: the model.
        embeddings: (B, S, d), soft tokens spliced in; no branches.
        prompts: the prompts the embeddings belong to.
        max_tokens: longest answer.
        eos_id: ends an answer; it is not part of the result.
        tries: one per row: only its continuations are allowed. ``None``: anything.
        anyone: from whether a row here still runs to whether one does on any rank. A model that is divided among ranks
            computes in step: none may stop before the others have.

    Returns:
        B lists of token ids.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=backbone.causal_lm.base_model.config)
    mask = prompts.branch >= 0
    positions = prompts.positions
    answers: list[list[int]] = [[] for _ in range(len(embeddings))]
    running = [True] * len(answers)
    if tries is not None:
        _complete(answers, running, tries)
    for _ in range(max_tokens if anyone(any(running)) else 0):
        states = backbone.states(embeddings, mask, positions, cache)[:, -1]
        logits = backbone.logits(states)
        if tries is not None:
            allowed = torch.zeros_like(logits, dtype=torch.bool)
            for row, trie in enumerate(tries):
                allowed[row, trie.next_tokens(answers[row]) if running[row] else [eos_id]] = True
            logits = logits.masked_fill(~allowed, float("-inf"))
        coarse, nearest = logits.topk(min(_NEAREST, logits.shape[1]))
        best = backbone.refined(coarse, states, nearest).argmax(1, keepdim=True)
        chosen = nearest.gather(1, best).squeeze(1)
        for row, token in enumerate(chosen.tolist()):
            if running[row]:
                running[row] = token != eos_id
                if running[row]:
                    answers[row].append(token)
        if tries is not None:
            _complete(answers, running, tries)
        if not anyone(any(running)):
            break
        embeddings = backbone.embed(chosen.unsqueeze(1))
        mask = F.pad(mask, (0, 1), value=True)
        positions = positions[:, -1:] + 1
    return answers


@torch.no_grad()
def supports_cache(backbone: Backbone, tolerance: float = 0.02) -> bool:
    """Whether this architecture goes on from cached keys and values as from the whole text (tried on a few tokens)."""
    from transformers import DynamicCache

    device = next(backbone.parameters()).device
    number = backbone.causal_lm.get_input_embeddings().num_embeddings
    tokens = torch.arange(1, 9, device=device).remainder(number).unsqueeze(0)
    seen, positions = torch.ones_like(tokens, dtype=torch.bool), torch.arange(8, device=device).unsqueeze(0)
    was_training = backbone.training
    backbone.eval()
    try:
        embeddings = backbone.embed(tokens)
        whole = backbone.states(embeddings, seen, positions)[:, -1]
        cache = DynamicCache(config=backbone.causal_lm.base_model.config)
        backbone.states(embeddings[:, :7], seen[:, :7], positions[:, :7], cache)
        last = backbone.states(embeddings[:, 7:], seen, positions[:, 7:], cache)[:, -1]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    finally:
        backbone.train(was_training)
    scale = whole.abs().max().clamp_min(1e-6)
    return bool(((last - whole).abs().max() / scale) < (tolerance if not backbone.bf16 else 5 * tolerance))


def _complete(answers: list[list[int]], running: list[bool], tries: list["TitleTrie"]) -> None:
    for row, trie in enumerate(tries):
        rest = trie.only_rest(answers[row]) if running[row] else None
        if rest is not None:
            answers[row] += rest[:-1]  # without EOS
            running[row] = False


class TitleTrie:
    """Prefix tree over the answers of one row's candidates.

    Args:
        answers: token ids of each candidate's answer, EOS at the end.
    """

    def __init__(self, answers: list[list[int]]) -> None:
        self._root: dict[int, dict] = {}
        self._named: dict[tuple[int, ...], list[int]] = {}
        for index, answer in enumerate(answers):
            node = self._root
            for token in answer:
                node = node.setdefault(token, {})
            self._named.setdefault(tuple(answer[:-1]), []).append(index)

    def next_tokens(self, prefix: list[int]) -> list[int]:
        """Tokens that may follow; EOS among them where an answer is complete."""
        node = self._root
        for token in prefix:
            node = node[token]
        return list(node)

    def only_rest(self, prefix: list[int]) -> list[int] | None:
        """The tokens up to EOS where there is one way to go on, else ``None``."""
        node, rest = self._root, []
        for token in prefix:
            node = node[token]
        while len(node) == 1:
            ((token, node),) = node.items()
            rest.append(token)
        return None if node else rest

    def candidates(self, answer: list[int]) -> list[int]:
        """Indices of the candidates whose answer (without EOS) this is: several where titles were cut to the same tokens."""
        return self._named[tuple(answer)]
