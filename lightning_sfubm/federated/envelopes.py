"""What a coordinator and a silo on different machines ask and answer: plain fields around the messages of the loop.

The messages themselves (:mod:`lightning_sfubm.federated.messages`) travel as bytes and are checked where they are read. The
fields around them are bounded here; none can hold anything of a silo's data.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, empty

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.secure_kmeans import SecureKMeans

Action = Literal["hello", "semantics", "train", "finish"]
_ID = re.compile(r"[0-9a-f]{32}")
_MAX_TENSORS, _MAX_RANK, _MAX_VALUES = 10_000, 8, 1 << 31


def is_run_name(text: str) -> bool:
    """Whether a text has the form of a federated run's name: 32 hexadecimal digits."""
    return _ID.fullmatch(text) is not None


@dataclass(frozen=True)
class Request:
    """What the coordinator asks of a silo.

    Attributes:
        action: ``"hello"`` (say who you are), ``"semantics"`` (send item vectors), ``"train"`` (a round; send the shared
            weights), ``"finish"`` (local phases; nothing is sent).
        federation: 32 hexadecimal digits that name the run.
        round: of the federation; 0 before the first.
        terms: of :func:`terms`, which the silo compares with its own configuration.
        semantics: the server's answer to the vectors this silo sent, as a message; empty where there is none to deliver.
        teacher: the global teacher, as a message; empty where there is none yet.
    """

    action: Action
    federation: str
    round: int
    terms: str
    semantics: bytes = b""
    teacher: bytes = b""

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise MessageError(f"request '{str(self.action)[:20]}' is unknown: one of {get_args(Action)} is expected")
        if not is_run_name(self.federation):
            raise MessageError("the name of the federated run must be 32 hexadecimal digits")
        if not 0 <= self.round < 1_000_000_000:
            raise MessageError(f"round {self.round} is not a round number")


@dataclass(frozen=True)
class Reply:
    """What a silo answers.

    Attributes:
        silo: its name.
        error: kind of the error where it refused or dropped out; the reason stays in the silo's own log. Empty = it complied.
        shape: of :func:`describe_shapes`, in the answer to ``"hello"``.
        semantics: its perturbed item vectors, as a message.
        teacher: its shared weights, as a message; in the answer to ``"hello"`` the ones that all silos start from.
    """

    silo: str
    error: str = ""
    shape: str = ""
    semantics: bytes = b""
    teacher: bytes = b""

    def __post_init__(self) -> None:
        if not self.silo.isprintable() or not 0 < len(self.silo) <= 128:
            raise MessageError("the name of a silo must be 1 to 128 printable characters")
        if not self.error.isidentifier() and self.error:
            raise MessageError("the kind of an error must be a name")


def check_across_machines(federation: Federation) -> None:
    """Refuse what only a loop in one process can do.

    Raises:
        ConfigError: secure aggregation is asked for.
    """
    if isinstance(federation.aggregator, SecureKMeans):
        raise ConfigError(
            "trainer.federation.aggregator SecureKMeans takes many messages an exchange and runs in one process only; across "
            "machines use KMeans or KNNMix, which see perturbed vectors, if the silos agree to that"
        )
    if federation.secure_aggregation is not None:
        raise ConfigError(
            "trainer.federation.secure_aggregation takes several messages a round and runs in one process only; across "
            "machines the server would see each update: remove it if the silos agree to that"
        )


def terms(federation: Federation, seed: int) -> str:
    """What coordinator and silos must agree on: what leaves a silo, how often, what becomes of it, and the seed; as JSON."""
    agreed = {
        "rounds": federation.rounds,
        "weighting": federation.weighting,
        "secure": federation.secure_aggregation is not None,
        "schedule": federation.schedule(seed),
        **federation.aggregation(),
    }
    return json.dumps(agreed, sort_keys=True)


def read_terms(text: str) -> dict[str, object]:
    """The inverse of :func:`terms`.

    Raises:
        MessageError: not a JSON object.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise MessageError("the terms of the federated run are not a JSON object")
    return given


def describe_shapes(dim: int, teacher: dict[str, Tensor]) -> str:
    """Text-embedding dimension and shapes of the shared weights, as JSON."""
    return json.dumps({"dim": dim, "teacher": {name: list(x.shape) for name, x in teacher.items()}}, sort_keys=True)


def read_shapes(text: str) -> tuple[int, dict[str, Tensor]]:
    """Dimension, and tensors of the described names and shapes whose values mean nothing.

    Raises:
        MessageError: not such a description, or one beyond all bounds.
    """
    try:
        given = json.loads(text)
        dim, shapes = given["dim"], given["teacher"]
        fits = _is_size(dim) and isinstance(shapes, dict) and len(shapes) <= _MAX_TENSORS
    except (ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise MessageError("a silo's description of its shared weights is not one")
    values = 0
    for name, shape in shapes.items():  # all before the first tensor: torch raises errors of its own
        values += _count(name, shape)
        if values > _MAX_VALUES:
            raise MessageError(f"a silo describes shared weights of more than 2 billion values (with {name[:80]!r})")
    return dim, {name: empty(shape, device="meta") for name, shape in shapes.items()}


def _count(name: str, shape: Any) -> int:
    """Number of values of one entry of a description; refuses a shape that is none or too large."""
    about = f"a silo's description of its shared weights: {name[:80]!r}"
    if name == "__weight__":  # a message's own entry beside the weights
        raise MessageError(f"{about} is the name of a number of examples")
    if not isinstance(shape, list):
        raise MessageError(f"{about} has no list of sizes")
    if len(shape) > _MAX_RANK:
        raise MessageError(f"{about} has {len(shape)} dimensions, at most {_MAX_RANK} are accepted")
    if not all(_is_size(size) for size in shape):
        raise MessageError(f"{about} has a size that is not a number from 1 to {_MAX_VALUES - 1}")
    return math.prod(shape)


def _is_size(size: object) -> bool:
    return type(size) is int and 0 < size < _MAX_VALUES  # ``True`` is an int to isinstance
