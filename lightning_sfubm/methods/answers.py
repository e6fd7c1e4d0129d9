"""Rows that rank by one tuned head in several ways: by what it writes, or by the likelihood of the candidates' titles."""

import copy
from collections.abc import Callable, Mapping
from functools import partial

from lightning_sfubm.contracts import Ranker
from lightning_sfubm.methods.base import DomainRun
from lightning_sfubm.modules.llm.ranking import RankingLM


def answering(
    key: str, build: Callable[[DomainRun], RankingLM], modes: Mapping[str, str | None]
) -> dict[str, Callable[[DomainRun], Ranker]]:
    """How the ranker of each row is made, from one head that is tuned once.

    Where a process makes several of the rows, the costs of the tuning stand in the row that comes first. Where an earlier one
    made some of them, its head is read again.

    Args:
        key: names the head.
        build: makes and tunes it.
        modes: by row, the ``rank_mode`` in which the head ranks there; ``None`` is the one it was configured with.
    """

    def row(run: DomainRun, name: str) -> Ranker:
        shared = f"head {key} {run.name}"
        head = run.shared.pop(shared, None)
        if head is None:
            if run.kept.intersection(modes):  # then it was stored whole
                run.tuned.add(key)
            head = build(run)
        if any(other in run.to_come for other in modes if other != name):
            run.shared[shared] = head
        mode = modes[name]
        if mode is not None:
            head = copy.copy(head)  # the weights are those of the other rows
            head.rank_mode = mode
        return head  # type: ignore[no-any-return]

    return {name: partial(row, name=name) for name in modes}
