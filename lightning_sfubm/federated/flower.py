"""The ClientApp and the ServerApp: Flower carries requests of a Coordinator to Silos, each on a machine of its own.

Nothing else imports Flower (optional extra ``flower``). The generated app (``lightning-sfubm flower-app``) names the two
objects below as its components, so that no code travels from the coordinator to a silo: each runs what is installed there.

A payload is the safetensors byte string of :mod:`lightning_sfubm.federated.messages`, put as it is into a Flower ``Array``
(which Flower cuts into chunks); it is checked against its schema where it is read.
"""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    from lightning_sfubm.errors import ConfigError

    raise ConfigError(
        "federation across machines needs Flower: install 'lightning-sfubm[flower]' in an environment of its own"
    ) from error

from lightning_sfubm.errors import ConfigError, MessageError, SFUBMError
from lightning_sfubm.federated.envelopes import Reply, Request

log = logging.getLogger(__name__)
_FORM = "lightning-sfubm.safetensors"  # no serializer of Flower's reads it
_PAYLOADS = ("semantics", "teacher")

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def answer(message: Message, context: Context) -> Message:
    """Answer a request of the coordinator. What went wrong is logged here; only the kind of an error is sent.

    The node config of the SuperNode (``lightning-sfubm flower-silo`` writes it) gives ``silo``, its name, and ``config``, the
    paths of its own configuration files, separated by ``:``.
    """
    _log_to_stderr()
    name = str(context.node_config.get("silo", "")) or "nameless"
    try:
        from lightning_sfubm.federated.silo import open_silo

        configs = [path for path in str(context.node_config.get("config", "")).split(":") if path]
        if "silo" not in context.node_config or not configs:
            raise ConfigError(
                "start this silo with lightning-sfubm flower-silo, which says its name and its configuration"
            )
        request = Request(**_unpack(message.content, {"action", "federation", "round", "terms"}))
        reply = open_silo(configs, name).answer(request)
    except SFUBMError as error:
        log.error("refused: %s", error)
        reply = Reply(name, error=type(error).__name__)
    except Exception:  # the text of any other error may hold data, and Flower would send it
        log.exception("failed")
        reply = Reply(name, error="InternalError")
    return Message(_pack({"silo": reply.silo, "error": reply.error, "shape": reply.shape}, reply), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes, to its end."""
    _log_to_stderr()
    from lightning_sfubm.federated.coordinator import Coordinator
    from lightning_sfubm.federated.run_config import RunConfig

    config = RunConfig.read(context.run_config)
    Coordinator(
        config.federation,
        config.silos,
        FlowerTransport(grid),
        Path(config.run_dir),
        config.seed,
        config.min_silos,
        config.patience,
    ).run()


class FlowerTransport:
    """A :class:`~lightning_sfubm.federated.membership.Transport` over a Flower grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._sent: dict[str, int] = {}  # node by the id of a message whose reply nobody waits for
        self._unsent: list[int] = []

    def nodes(self) -> dict[int, str]:
        """Connected SuperNodes, with the names they were registered under."""
        return {node.node_id: str(getattr(node, "name", "")) for node in self._grid.get_nodes()}

    def ask(self, requests: Mapping[int, Request], deadline_s: float) -> dict[int, Reply]:
        """One message to each SuperNode; it, and the answer to it, expire with the deadline."""
        replies = {}
        for message in self._grid.send_and_receive(_messages(requests, deadline_s), timeout=deadline_s):
            node = message.metadata.src_node_id
            if (reply := _reply(node, message)) is not None:
                replies[node] = reply
        return replies

    def send(self, requests: Mapping[int, Request], deadline_s: float) -> None:
        """One message to each SuperNode, for whose reply nobody waits."""
        # No ids at all where a message is too large, None for one that could not be sent.
        ids = list(self._grid.push_messages(_messages(requests, deadline_s)))
        sent = {message_id: node for message_id, node in zip(ids, sorted(requests), strict=False) if message_id}
        self._sent |= sent
        self._unsent += sorted(set(requests) - set(sent.values()))

    def arrived(self) -> dict[int, Reply | None]:
        """Replies that have come to what was sent so; ``None`` where Flower says that none will."""
        replies: dict[int, Reply | None] = dict.fromkeys(self._unsent)
        self._unsent = []
        for message in self._grid.pull_messages(list(self._sent)) if self._sent else []:
            node = self._sent.pop(message.metadata.reply_to_message_id, message.metadata.src_node_id)
            replies[node] = _reply(node, message)
        return replies


def _messages(requests: Mapping[int, Request], deadline_s: float) -> list[Message]:
    """A message for each request, in the order of the nodes; it and its reply expire with the deadline."""
    messages = []
    for node, request in sorted(requests.items()):
        fields = {k: getattr(request, k) for k in ("action", "federation", "round", "terms")}
        content = _pack(fields, request)
        messages.append(Message(content, node, "train", ttl=deadline_s, group_id=str(request.round)))
    return messages


def _reply(node: int, message: Message) -> Reply | None:
    """What a silo answered; ``None`` where it did not."""
    if message.has_error():
        log.warning("node %d: %s", node, message.error.reason)
        return None
    try:
        return Reply(**_unpack(message.content, {"silo", "error", "shape"}))
    except (MessageError, TypeError, AttributeError) as error:
        log.warning("node %d: not a reply of a silo (%s)", node, error)
        return None


def _pack(fields: dict[str, Any], payloads: Request | Reply) -> RecordDict:
    arrays = {}
    for kind in _PAYLOADS:
        if payload := getattr(payloads, kind):
            arrays[kind] = Array(dtype="uint8", shape=(len(payload),), stype=_FORM, data=payload)
    return RecordDict({"fields": ConfigRecord(fields), "payloads": ArrayRecord(arrays)})


def _unpack(content: RecordDict, expected: set[str]) -> dict[str, Any]:
    """Fields and payloads of a record, if it holds those and nothing else."""
    if set(content) != {"fields", "payloads"}:
        raise MessageError("a message holds other records than 'fields' and 'payloads'")
    fields, payloads = dict(content["fields"]), content["payloads"]
    if not isinstance(payloads, ArrayRecord) or set(fields) != expected or not set(payloads) <= set(_PAYLOADS):
        raise MessageError(f"a message holds other fields than {sorted(expected)} and {_PAYLOADS}")
    if any(array.stype != _FORM for array in payloads.values()):
        raise MessageError("a payload is not a safetensors byte string")
    if any(not isinstance(value, int if name == "round" else str) for name, value in fields.items()):
        raise MessageError("a field of a message has another type than it should")
    return {**fields, **{kind: array.data for kind, array in payloads.items()}}


def _log_to_stderr() -> None:
    root = logging.getLogger("lightning_sfubm")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("lightning-sfubm: %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):  # notices that would come again with every message
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)
