"""Silos and a coordinator within one process, without Flower: every request finds a silo that was opened anew."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.errors import SFUBMError
from lightning_sfubm.federated.coordinator import Coordinator
from lightning_sfubm.federated.envelopes import Reply, Request
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.membership import Patience
from lightning_sfubm.federated.silo import Silo

QUICK = Patience(start_s=5, round_s=5, finish_s=5, poll_s=0.01, hello_s=1)
HASTY = replace(QUICK, start_s=0.05)


class Machines:
    """A transport within one process: every request finds a silo that was opened anew, as a new process would."""

    def __init__(self, silos: Mapping[str, Callable[[], Silo]]) -> None:
        self.silos = dict(enumerate(silos.items(), 1))
        self.asked: list[tuple[str, str, int]] = []
        self.deadlines: set[tuple[str, float]] = set()
        self.before: Callable[[str, Request], None] = lambda name, request: None
        self.after: Callable[[str, Request, Reply], Reply | None] = lambda name, request, reply: reply
        self.registered: dict[int, str] = {}
        self.offline: set[int] = set()
        self.waiting: dict[int, Reply] = {}

    def nodes(self) -> dict[int, str]:
        return {node: self.registered.get(node, "") for node in self.silos if node not in self.offline}

    def send(self, requests: Mapping[int, Request], deadline_s: float) -> None:
        self.waiting |= self.ask(requests, deadline_s)

    def arrived(self) -> dict[int, Reply | None]:
        arrived, self.waiting = {**self.waiting}, {}
        return arrived

    def ask(self, requests: Mapping[int, Request], deadline_s: float) -> dict[int, Reply]:
        replies = {}
        for node, request in requests.items():
            name, make = self.silos[node]
            self.deadlines.add((request.action, deadline_s))
            self.asked.append((request.action, name, request.round))
            torch.manual_seed(len(self.asked))  # another process has another global stream
            try:
                self.before(name, request)
                reply = make().answer(request)
            except SFUBMError as error:
                reply = Reply(name, error=type(error).__name__)
            answered = self.after(name, request, reply)
            if answered is not None:
                replies[node] = answered
        return replies


def coordinator(
    transport: Machines, tmp_path: Path, names: list[str], patience: Patience = QUICK, **federation: Any
) -> Coordinator:
    settings = {"exchange": "both", "rounds": 2, "local_max_epochs": 2, "local_min_epochs": 1, "patience": 1}
    schedule = Federation(**{**settings, **federation})
    return Coordinator(schedule, names, transport, tmp_path / "server", seed=3, patience=patience)


def cut_off_in_round(transport: Machines, number: int, driver: Coordinator) -> None:
    """Run a coordinator that is killed as the first reply of a round comes in; the next one is not."""

    def kill(name: str, request: Request, reply: Reply) -> Reply:
        if request.round == number:
            raise KeyboardInterrupt
        return reply

    whole, transport.after = transport.after, kill
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    transport.after = whole
