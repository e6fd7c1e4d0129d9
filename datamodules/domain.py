"""A domain after all rules: users' item sequences in one flat array, item texts, and the card that tells its story."""

from dataclasses import dataclass, field

import numpy as np

from lightning_sfubm.datamodules.card import DataCard


@dataclass(frozen=True)
class Domain:
    """Interactions as compressed rows: the items of user ``u``, oldest first, are ``items[offsets[u]:offsets[u + 1]]``.

    Users are numbered from 0 and items from 1, both in the order of their source keys (numeric where all keys are
    integers, else by code point), so numbering does not depend on row order in the source.

    Attributes:
        name: domain name.
        offsets: (U + 1,) int64.
        items: (M,) int32 item ids in ``1..N``.
        times: (M,) int64 seconds, rounded down, or ``None`` where only the order is known.
        titles: N + 1 strings, ``titles[0] == ""``.
        texts: N + 1 strings, what a text encoder reads: the title, then the text columns.
        user_keys: U source keys.
        item_keys: N + 1 source keys, ``item_keys[0] == ""``.
        fingerprint: sha256 of everything above but the name, and of the settings that made it.
        card: counts and statistics.
    """

    name: str
    offsets: np.ndarray = field(repr=False)
    items: np.ndarray = field(repr=False)
    times: np.ndarray | None = field(repr=False)
    titles: list[str] = field(repr=False)
    texts: list[str] = field(repr=False)
    user_keys: list[str] = field(repr=False)
    item_keys: list[str] = field(repr=False)
    fingerprint: str
    card: DataCard = field(repr=False)

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """N, without padding."""
        return len(self.titles) - 1

    @property
    def num_interactions(self) -> int:
        """M."""
        return len(self.items)

    def sequence(self, user: int) -> np.ndarray:
        """All items of a user, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]
