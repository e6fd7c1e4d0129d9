"""Where a federation across machines stands, as its coordinator writes it into every state."""

import secrets
from dataclasses import dataclass, field
from pathlib import Path

from lightning_sfubm.errors import CheckpointError


@dataclass
class Progress:
    """Where a federation across machines stands.

    Attributes:
        step: states written.
        federation: name of the run, which silos keep to.
        round: rounds that are complete.
        exchanged: round of the last exchange of semantics, 0 = before the first; ``None`` = none yet.
        start: hash of the weights that all silos start from.
        finished: silos known to have finished their local phases.
        closed: whether silos were asked to: what they train from then on learns from no further round.
        dropped: silos that dropped out, by round.
        outbox: hash of a message to deliver, by silo and kind.
        ledger: lines of the ledger.
    """

    step: int = 0
    federation: str = field(default_factory=lambda: secrets.token_hex(16))
    round: int = 0
    exchanged: int | None = None
    start: str = ""
    finished: list[str] = field(default_factory=list)
    closed: bool = False
    dropped: dict[str, list[str]] = field(default_factory=dict)
    outbox: dict[str, dict[str, str]] = field(default_factory=dict)
    ledger: int = 0

    def check_rounds(self, asked: int, where: Path) -> None:
        """Refuse to go on with fewer rounds than are done, or with more once silos were asked to finish.

        Raises:
            CheckpointError: so it is.
        """
        over = self.closed or bool(self.finished)
        if self.round > asked or (self.round < asked and over):
            raise CheckpointError(
                f"{where}: the run there has {self.round} rounds behind it{' and was finished' if over else ''}, and rounds = "
                f"{asked} are asked for: set rounds to {self.round}{'' if over else ' or more'}, or give server and silos new "
                "run folders"
            )
