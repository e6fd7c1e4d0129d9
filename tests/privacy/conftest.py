"""A round of secure aggregation that can be held still between its steps."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_sfubm.privacy.secagg.wire import pack, unpack
from lightning_sfubm.privacy.secure_aggregation import STEPS, SecAggClient, SecAggServer, SecAggSettings

SHAPES = {"w": (2, 3), "b": (2,)}
FOUR = SecAggSettings(num_clients=4, threshold=3)


def tensors(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 2 * torch.rand(shape, generator=generator) - 1 for name, shape in shapes.items()}


class Round:
    """A round held still between its steps: every message is kept and can be altered on its way."""

    def __init__(self, names: str = "abcd", settings: SecAggSettings = FOUR, shapes: Mapping = SHAPES, round: int = 3):
        self.settings, self.shapes, self.round = settings, shapes, round
        self.server = SecAggServer(settings, shapes, round)
        self.clients = {name: SecAggClient(name, settings, shapes, round) for name in names}
        self.inputs = {name: tensors(seed, shapes) for seed, name in enumerate(names)}
        self.sent: dict[str, dict[str, bytes]] = {}

    def to(self, step: str, gone: Mapping[str, str] | None = None) -> "Round":
        """Run until the clients' messages of ``step`` lie in ``sent[step]`` and the server has not seen them."""
        late = gone or {}

        def ask(name: str, call: Callable[[SecAggClient], bytes]) -> None:
            present = [c for c in self.clients if c not in late or STEPS.index(name) < STEPS.index(late[c])]
            self.sent[name] = {c: call(self.clients[c]) for c in present}

        self.invite = self.server.invite()
        ask("advertise_keys", lambda c: c.advertise_keys(self.invite))
        if step == "advertise_keys":
            return self
        self.roster = self.server.collect_keys(self.sent["advertise_keys"])
        ask("share_keys", lambda c: c.share_keys(self.roster))
        if step == "share_keys":
            return self
        self.boxes = self.server.collect_shares(self.sent["share_keys"])
        ask("mask_input", lambda c: c.mask_input(self.boxes[c.name], self.inputs[c.name]))
        if step == "mask_input":
            return self
        self.request = self.server.collect_inputs(self.sent["mask_input"])
        ask("unmask", lambda c: c.unmask(self.request))
        return self

    @property
    def session(self) -> str:
        return self.server._session

    def fields(self, kind: str, payload: bytes, sender: str) -> dict:
        return unpack(kind, payload, sender=sender, round=self.round, session=self.session, clients=4).fields

    def remake(self, kind: str, sender: str, fields: dict) -> bytes:
        return pack(kind, sender, self.round, self.session, fields)


def words(payload: bytes, count: int, dtype: str = "<u8") -> np.ndarray:
    return np.frombuffer(payload[-count * np.dtype(dtype).itemsize :], dtype=dtype)
