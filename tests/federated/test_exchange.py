"""What clients take from the server: its own message, of the round it is due in, once; anything else changes nothing (T16)."""

from typing import Any

import pytest
import torch

from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import MessageError
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.messages import Message, pack
from lightning_sfubm.federated.server import Server
from tests.conftest import small_distiller

SENT: list[Message] = []  # what the server has sent before, for who would send it again


def repacked(server: Server, message: Message, client: str = "server", round: int | None = None) -> Message:
    schema = server.semantics if message.kind == "semantics" else server.broadcast_schema
    assert schema is not None
    return pack(schema, client, message.round if round is None else round, message.tensors)


def foreign(server: Server, message: Message) -> Message:
    return repacked(server, message, client="beta")


def of_another_round(server: Server, message: Message) -> Message:
    return repacked(server, message, round=message.round + 1)


def again(server: Server, message: Message) -> Message:
    SENT.append(message)
    return SENT[0]


@pytest.mark.parametrize(
    ("forge", "words"),
    [(foreign, "channel of 'server'"), (of_another_round, "arrived in round"), (again, "replay|arrived in round")],
)
@pytest.mark.parametrize("kind", ["semantics", "teacher"])
def test_an_answer_that_is_not_the_servers_of_this_round_and_new_is_refused(
    kind: str, forge: Any, words: str, federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    SENT.clear()
    broadcast, aggregate = Server.broadcast, Server.aggregate_semantics
    if kind == "teacher":
        monkeypatch.setattr(Server, "broadcast", lambda server: forge(server, broadcast(server)))
    else:

        def answers(server: Server, round: int, payloads: Any) -> dict[str, Message]:
            return {name: forge(server, answer) for name, answer in aggregate(server, round, payloads).items()}

        monkeypatch.setattr(Server, "aggregate_semantics", answers)
    before: dict[str, dict[str, torch.Tensor]] = {}

    class Look(FederatedCallback):
        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            before.update(
                {n: {k: v.clone() for k, v in c.module.state_dict().items()} for n, c in loop.clients.items()}
            )
            return tensors

    trainer = federated_trainer(
        exchange=kind, rounds=1, callbacks=[PrivacyNoise(0.05), Look()], flags={"limit_val_batches": 1}
    )
    with pytest.raises(MessageError, match=words):
        trainer.fit(small_distiller(), datamodule=federated_data(num_users=30))
    taken = {"alpha"} if forge is again else set()  # the first time it was new
    for name, client in trainer.loop.clients.items():
        now = client.module.state_dict()
        kept = now.keys() == before[name].keys() and all(torch.equal(now[key], before[name][key]) for key in now)
        assert kept == (name not in taken), name
    down = [e for e in read_ledger(trainer.run_dir / "ledger.jsonl") if e["direction"] == "down"]
    assert {e["client"] for e in down} == taken


def test_an_older_answer_is_refused_also_by_a_process_that_never_saw_it(
    federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nonces a process has seen die with it; the round does not."""
    kept: list[Message] = []
    broadcast = Server.broadcast

    class Stop(FederatedCallback):
        def on_round_end(self, loop: Any, round: int, metrics: Any) -> None:
            raise KeyboardInterrupt

    def keep(server: Server) -> Message:
        kept.append(broadcast(server))
        return kept[-1]

    monkeypatch.setattr(Server, "broadcast", keep)
    settings = {"exchange": "teacher", "flags": {"limit_val_batches": 1}}
    with pytest.raises(KeyboardInterrupt):
        federated_trainer(callbacks=[Stop()], **settings).fit(
            small_distiller(), datamodule=federated_data(num_users=30)
        )
    assert [message.round for message in kept] == [1, 1]
    monkeypatch.setattr(Server, "broadcast", lambda server: kept[0])
    with pytest.raises(MessageError, match="message of round 1 arrived in round 2"):
        federated_trainer(callbacks=[], **settings).fit(
            small_distiller(), datamodule=federated_data(num_users=30), ckpt_path="last"
        )
