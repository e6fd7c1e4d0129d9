"""Silos and coordinator without Flower: the weights of the loop, whatever is cut off or comes late (T1, T2, T17, T30)."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.errors import CheckpointError, ConfigError, MessageError
from lightning_sfubm.federated.checkpoint import find_state
from lightning_sfubm.federated.envelopes import Reply, Request, read_shapes, terms
from lightning_sfubm.federated.hooks import ClientDropped, FederatedCallback
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.messages import pack
from lightning_sfubm.federated.secure import SecureAggregation
from lightning_sfubm.federated.server_optimizers import FedAdam
from tests.federated.machines import HASTY, QUICK, coordinator

#: a schedule with everything that has state, as in test_resume
HARD: dict[str, Any] = {
    "rounds": 4,
    "participation": 0.7,
    "joins": {"gamma": 2},
    "leaves": {"alpha": 3},
    "client_epochs": {"beta": 2},
}
NAMES = ["alpha", "beta", "gamma"]


class Away(FederatedCallback):
    """A client is away in a round."""

    def __init__(self, *absent: tuple[str, int]) -> None:
        self.absent = absent

    def on_client_start(self, loop: Any, client: str, round: int) -> None:
        if (client, round) in self.absent:
            raise ClientDropped("away")


class Lost(FederatedCallback):
    """A client's update is trained, and does not arrive."""

    def __init__(self, *lost: tuple[str, int]) -> None:
        self.lost = lost

    def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
        if kind == "teacher" and (client, loop.counters.round + 1) in self.lost:
            raise ClientDropped("lost")
        return tensors


def assert_equal_runs(together: Any, tmp_path: Path, names: list[str], folder: str = "") -> None:
    """Clients' weights and steps, the global teacher and what was said are those of the loop."""
    said = [e for e in read_ledger(together.run_dir / "ledger.jsonl") if not e.get("resent")]
    keys = ("round", "direction", "kind", "content_sha256")
    for name in names:
        run = tmp_path / f"silo{folder}/{name}"
        there = torch.load(find_state(run / "checkpoints") / f"clients/{name}.ckpt", weights_only=True)
        here = torch.load(find_state(together.run_dir / "checkpoints") / f"clients/{name}.ckpt", weights_only=True)
        assert there["global_step"] == here["global_step"] > 0
        assert there["state_dict"].keys() == here["state_dict"].keys()
        for key, value in here["state_dict"].items():
            assert torch.equal(there["state_dict"][key], value), f"{name}: {key}"
        lines = [e for e in read_ledger(run / "ledger.jsonl") if not e.get("resent")]
        here_said = {tuple(e[k] for k in keys) for e in said if e["client"] == name}
        there_said = {tuple(e[k] for k in keys) for e in lines if (e["round"], e["kind"]) != (0, "teacher")}
        assert {e for e in there_said if e[1] == "up"} == {e for e in here_said if e[1] == "up"}
        assert there_said <= here_said  # a silo that was away missed a teacher that a later one replaced
    server = torch.load(find_state(tmp_path / "server/checkpoints") / "server.ckpt", weights_only=True)
    assert server["version"] == together.loop.server.version > 0
    for key, value in together.loop.server.global_teacher.items():
        assert torch.equal(server["global_teacher"][key], value)


def test_a_hard_schedule_gives_the_weights_of_the_loop(machines: Any, in_one_process: Any, tmp_path: Path) -> None:
    schedule = {**HARD, "weights": FedAdam()}
    away = Away(("beta", 2))
    together = in_one_process(NAMES, [away, Lost(("beta", 3))], **schedule)
    transport = machines(NAMES, [away], **schedule)

    def lose(name: str, request: Request, reply: Reply) -> Reply | None:
        return None if (name, request.action, request.round) == ("beta", "train", 3) else reply

    transport.after = lose
    driver = coordinator(transport, tmp_path, NAMES, **{**schedule, "weights": FedAdam()})
    driver.run()
    for name in NAMES:  # the loop counts a lost update as not sent, the silo knows that it sent it
        states = [find_state(p / "checkpoints") for p in (tmp_path / f"silo/{name}", together.run_dir)]
        there, here = (torch.load(s / f"clients/{name}.ckpt", weights_only=True) for s in states)
        assert all(torch.equal(there["state_dict"][key], here["state_dict"][key]) for key in here["state_dict"]), name
    assert all(torch.equal(driver.server.global_teacher[k], v) for k, v in together.loop.server.global_teacher.items())
    trained = [(name, number) for action, name, number in transport.asked if action == "train"]
    drawn = [(n, r) for r in (1, 2, 3, 4) for n in together.federation.sample(NAMES, r, 3)]
    assert trained == drawn  # one message a round and silo
    assert {"2": ["beta"], "3": ["beta"]}.items() >= driver.progress.dropped.items()


@pytest.mark.parametrize("cut", [1, 4, 6, 9])
def test_a_coordinator_that_is_killed_goes_on(cut: int, machines: Any, in_one_process: Any, tmp_path: Path) -> None:
    names = ["alpha", "beta"]
    together = in_one_process(names, rounds=2)
    transport = machines(names, rounds=2)

    def kill(name: str, request: Request, reply: Reply) -> Reply | None:
        if len(transport.asked) == cut:
            raise KeyboardInterrupt  # the reply was on its way
        return reply

    transport.after = kill
    with pytest.raises(KeyboardInterrupt):
        coordinator(transport, tmp_path, names).run()
    coordinator(transport, tmp_path, names).run()
    assert_equal_runs(together, tmp_path, names)
    again = len(transport.asked)
    coordinator(transport, tmp_path, names).run()
    assert len(transport.asked) == again  # a finished run needs nobody


def test_a_silo_that_dies_while_it_trains_has_dropped_out_of_the_round(
    machines: Any, in_one_process: Any, tmp_path: Path
) -> None:
    class Die(FederatedCallback):
        def on_client_start(self, loop: Any, client: str, round: int) -> None:
            if (client, round) == ("beta", 2):
                raise MemoryError

    names = ["alpha", "beta"]
    together = in_one_process(names, [Away(("beta", 2))], rounds=3)
    transport = machines(names, [Die()], rounds=3)
    ask = transport.ask

    def survive(requests: Mapping[int, Request], deadline_s: float) -> dict[int, Reply]:
        replies: dict[int, Reply] = {}
        for node, request in requests.items():
            with contextlib.suppress(MemoryError):
                replies |= ask({node: request}, deadline_s)
        return replies

    transport.ask = survive
    driver = coordinator(transport, tmp_path, names, rounds=3)
    driver.run()
    assert driver.progress.dropped == {"2": ["beta"]}
    assert_equal_runs(together, tmp_path, names)


def test_a_late_silo_stalls_no_round_and_its_late_message_counts_in_none(
    machines: Any, in_one_process: Any, tmp_path: Path
) -> None:
    """Beta's answer of round 2 comes when the server waits for that of round 3."""
    names, late = ["alpha", "beta"], []
    schedule = {"rounds": 4, "exchange": "teacher", "local_max_epochs": 1, "flags": {"limit_val_batches": 1}}
    together = in_one_process(names, [Lost(("beta", 2), ("beta", 3))], **schedule)
    transport = machines(names, **schedule)

    def delay(name: str, request: Request, reply: Reply) -> Reply | None:
        if (name, request.action) != ("beta", "train") or request.round not in (2, 3):
            return reply
        late.append(reply)
        return None if request.round == 2 else late[0]

    transport.after = delay
    driver = coordinator(transport, tmp_path, names, rounds=4, exchange="teacher", local_max_epochs=1)
    driver.run()
    assert late[0].teacher != late[1].teacher
    assert driver.progress.dropped == {"2": ["beta"], "3": ["beta"]}
    assert {("train", QUICK.round_s), ("finish", QUICK.finish_s)} <= transport.deadlines
    assert driver.server.version == together.loop.server.version == 4
    assert all(torch.equal(driver.server.global_teacher[k], v) for k, v in together.loop.server.global_teacher.items())
    for name in names:
        states = [find_state(p / "checkpoints") for p in (tmp_path / f"silo/{name}", together.run_dir)]
        there, here = (torch.load(s / f"clients/{name}.ckpt", weights_only=True) for s in states)
        assert all(torch.equal(there["state_dict"][key], here["state_dict"][key]) for key in here["state_dict"]), name


def test_too_few_updates_leave_the_teacher_as_it_was(machines: Any, in_one_process: Any, tmp_path: Path) -> None:
    names, away = ["alpha", "beta"], Away(("beta", 2), ("beta", 3))
    together = in_one_process(names, [away], rounds=3, min_updates=2)
    transport = machines(names, [away], rounds=3, min_updates=2)
    driver = coordinator(transport, tmp_path, names, rounds=3, min_updates=2)
    driver.run()
    assert driver.server.version == together.loop.server.version == 1
    for key, value in together.loop.clients["alpha"].module.state_dict().items():
        state = find_state(tmp_path / "silo/alpha/checkpoints")
        assert torch.equal(torch.load(state / "clients/alpha.ckpt", weights_only=True)["state_dict"][key], value)


def test_a_bad_message_drops_its_sender_alone(machines: Any, tmp_path: Path) -> None:
    names = ["alpha", "beta"]
    transport = machines(names, exchange="teacher", rounds=2)

    def forge(name: str, request: Request, reply: Reply) -> Reply:
        if (name, request.action) != ("beta", "train"):
            return reply
        if request.round == 1:
            return replace(reply, teacher=b"\x80\x04pickle" + reply.teacher)
        schema = driver.server.teacher
        assert schema is not None
        poisoned = {k: torch.zeros(v.shape) for k, v in schema.tensors.items()}  # type: ignore[arg-type]
        return replace(reply, teacher=pack(schema, "alpha", 2, poisoned).payload)

    transport.after = forge
    driver = coordinator(transport, tmp_path, names, exchange="teacher")
    driver.run()
    assert driver.progress.dropped == {"1": ["beta"], "2": ["beta"]}
    alone = transport.silos[1][1]()
    alone.resume(alone.checkpoints)
    sent = [e for e in read_ledger(tmp_path / "server/ledger.jsonl") if e["direction"] == "up" and e["round"] == 2]
    assert [e["client"] for e in sent] == ["alpha"]
    assert driver.server.version == 2


def test_a_silo_with_more_items_than_the_server_takes_drops_out_of_the_exchange(
    machines: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"exchange": "semantics", "rounds": 0, "local_max_epochs": 1}
    transport = machines(["alpha", "beta"], **settings)
    driver = coordinator(transport, tmp_path, ["alpha", "beta"], max_items=10, **settings)
    driver.run()
    assert driver.server.semantics.tensors["vectors"].max_rows == 10
    assert driver.progress.dropped == {"0": ["alpha", "beta"]}
    assert "max_items = 10" in caplog.text
    own = machines(["alpha"], folder="own", max_items=10, **settings)
    silo = own.silos[1][1]()
    request = Request("hello", "0" * 32, 0, terms(silo.agreed, 3))
    silo.answer(request)
    with pytest.raises(MessageError, match="max_items = 10"):  # the silo's own limit holds before anything leaves
        silo.answer(replace(request, action="semantics"))


def test_names_are_checked(machines: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transport = machines(["alpha", "beta"])
    transport.registered = {1: "alpha", 2: "gamma"}
    driver = coordinator(transport, tmp_path, ["alpha", "beta"], HASTY)
    with pytest.raises(ConfigError, match="1 silos came"):
        driver.run()
    assert "registered as 'gamma' says that it is 'beta'" in caplog.text
    twins = machines(["alpha"], folder="twins")
    twins.silos[2] = twins.silos[1]
    driver = coordinator(twins, tmp_path / "twins", ["alpha", "beta"], HASTY)
    with pytest.raises(ConfigError, match="1 silos came"):
        driver.run()
    assert "two nodes say that they are 'alpha'" in caplog.text


def test_silos_must_start_from_the_same_weights(
    machines: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transport = machines(["alpha", "beta"])

    def other(name: str, request: Request, reply: Reply) -> Reply:
        if name != "beta":
            return reply
        silo = transport.silos[2][1]()
        assert silo.server.broadcast_schema is not None
        changed = {k: v + 1 for k, v in silo.server.global_teacher.items()}
        return replace(reply, teacher=pack(silo.server.broadcast_schema, "beta", 0, changed).payload)

    transport.after = other
    driver = coordinator(transport, tmp_path, ["alpha", "beta"], HASTY)
    with pytest.raises(ConfigError, match="1 silos came"):
        driver.run()
    assert "'beta' starts from other shared weights" in caplog.text


def test_what_cannot_be_carried_is_refused(machines: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="secure_aggregation"):
        coordinator(machines(["alpha"]), tmp_path, ["alpha"], secure_aggregation=SecureAggregation())
    with pytest.raises(ConfigError, match="once"):
        coordinator(machines(["alpha"]), tmp_path, ["alpha", "alpha"])
    for text in (
        "",
        "{}",
        '{"dim": 0, "teacher": {}}',
        '{"dim": 4, "teacher": {"w": [99999999, 99999999]}}',
        "[" * 5000,
    ):
        with pytest.raises(MessageError, match="shared weights"):
            read_shapes(text)
    with pytest.raises(MessageError):
        Request("train", "../../etc", 1, "{}")


def test_a_server_folder_of_another_schedule_is_refused(machines: Any, tmp_path: Path) -> None:
    transport = machines(["alpha", "beta"], rounds=1)
    coordinator(transport, tmp_path, ["alpha", "beta"], rounds=1).run()
    with pytest.raises(CheckpointError, match="another schedule"):
        coordinator(transport, tmp_path, ["alpha", "beta"], rounds=1, local_epochs=2).run()


def test_what_differential_privacy_has_spent_is_what_the_loop_has(
    machines: Any, in_one_process: Any, tmp_path: Path
) -> None:
    """Epsilon grows over rounds although each finds the silo opened anew. Weights differ: no two runs share their noise."""
    pytest.importorskip("opacus")
    private = DifferentialPrivacy(noise_multiplier=1.0, expected_batch_size=8, secret_dir=str(tmp_path / "secrets"))
    names, schedule = ["alpha", "beta"], {"exchange": "teacher", "rounds": 3}
    together = in_one_process(names, [private], **schedule)
    driver = coordinator(machines(names, [private], **schedule), tmp_path, names, **schedule)
    driver.run()
    assert driver.server.version == 3
    assert not all(
        torch.equal(v, driver.server.global_teacher[k]) for k, v in together.loop.server.global_teacher.items()
    )

    def spent(run: Path, name: str) -> list[Any]:
        up = [
            e for e in read_ledger(run / "ledger.jsonl") if (e["direction"], e["client"]) == ("up", name) and e["round"]
        ]
        stated = [e["mechanism"]["differential privacy"] for e in up]
        return [(e["epsilon"], e["steps"], e["noise_multiplier"], e["sample_rate"]) for e in stated]

    for name in names:
        there = spent(tmp_path / f"silo/{name}", name)
        assert there == spent(together.run_dir, name)
        assert 0 < there[0][0] < there[1][0] < there[2][0]
