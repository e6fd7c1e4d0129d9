"""Reuse of a value derived from a module's parameters, until one of them changes."""

from collections.abc import Callable, Hashable
from itertools import chain

import torch
from torch import Tensor, nn


class VersionCache:
    """Cache of detached tensors computed from a module in evaluation mode.

    Nobody has to remember to invalidate: the version counters tell of every in-place change (``load_state_dict``, ``copy_``,
    ``+=``) but that of the fused optimisers, which leave them alone; the parameters' sums in float64 tell of those.

    Args:
        owner: the module whose parameters and buffers the values depend on.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner = owner
        self._key: Hashable = None
        self._values: dict[str, Tensor] = {}

    def get(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``compute()``, from the cache if nothing has changed since the last call under this name."""
        owner = self._owner
        versions = tuple((t.data_ptr(), t._version) for t in chain(owner.parameters(), owner.buffers()))
        with torch.no_grad():
            sums = [p.sum(dtype=torch.float64) for p in owner.parameters()]
            key = (versions, tuple(torch.stack(sums).tolist()) if sums else ())
        if key != self._key:
            self._key, self._values = key, {}
        if name not in self._values:
            training = owner.training
            owner.eval()
            try:
                # Inference tensors could not take part in a later training step.
                with torch.inference_mode(False), torch.no_grad():
                    self._values[name] = compute().detach()
            finally:
                owner.train(training)
        return self._values[name]
