"""Poisson sampling of users: in every step each user takes part with the same probability, on its own."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from lightning_sfubm.datamodules.batching import BatchIndex
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.seeds import numpy_generator


class PoissonSampler(Sampler[BatchIndex]):
    """Batches for a fixed number of steps an epoch; use as ``DataLoader(data, sampler=this, batch_size=None)``.

    A batch has ``sample_rate * num_users`` users in the mean, and sometimes none. Accounting of subsampled steps is proved for
    this sampling; the draws must stay unknown to whoever receives the result.

    Args:
        num_users: n, rows of the data set, one a user.
        expected_users: expected batch size, in (0, n]; the sample rate is ``expected_users / n``.
        next_step: number of the next training step, asked for when an epoch starts. Draws are named by the step, so that
            none is used for two steps and a resumed run goes on as if it had not stopped.
        seed: root seed of the draws.
        name: of the stream, the client's.

    Raises:
        ConfigError: ``expected_users`` is out of range.
    """

    def __init__(
        self,
        num_users: int,
        expected_users: float,
        next_step: Callable[[], int],
        *,
        seed: int = 0,
        name: str = "",
    ) -> None:
        if not 0 < expected_users <= num_users:
            raise ConfigError(
                f"an expected batch of {expected_users} users cannot be drawn from {num_users}: choose one in (0, {num_users}]"
            )
        self.num_users = num_users
        self.sample_rate = expected_users / num_users
        self.next_step, self.seed, self.name = next_step, seed, name

    def __len__(self) -> int:
        """Steps an epoch: as many as visit every user once in the mean."""
        return max(1, round(1 / self.sample_rate))

    def __iter__(self) -> Iterator[BatchIndex]:
        first = self.next_step()
        return (BatchIndex(step, self.draw(step)) for step in range(first, first + len(self)))

    def draw(self, step: int) -> np.ndarray:
        """Rows that take part in a step, (B,) int64 with B random."""
        generator = numpy_generator(self.seed, "poisson users", self.name, step)
        return np.flatnonzero(generator.random(self.num_users) < self.sample_rate)
