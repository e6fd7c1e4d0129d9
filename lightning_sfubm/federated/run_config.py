"""The run config of the Flower app: the schedule and nothing else, as the flat TOML values that Flower carries."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.federated.envelopes import check_across_machines
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.membership import Patience
from lightning_sfubm.names import path_part

#: settings of the schedule that a coordinator needs; those of the local phases are each silo's own
_SCHEDULE = (
    "rounds",
    "local_epochs",
    "exchange",
    "aggregator",
    "weights",
    "weighting",
    "participation",
    "min_updates",
    "max_items",
    "client_epochs",
    "joins",
    "leaves",
)
Value = bool | int | float | str


@dataclass(frozen=True)
class RunConfig:
    """What the ServerApp is told.

    Attributes:
        federation: the schedule.
        silos: names of all silos.
        seed: root seed.
        run_dir: folder of the server's states, an absolute path on the machine of the SuperLink.
        min_silos: silos that must be there before the run starts; ``None`` = all that take part from the start.
        patience: deadlines.
    """

    federation: Federation
    silos: list[str]
    seed: int
    run_dir: str
    min_silos: int | None
    patience: Patience

    @classmethod
    def read(cls, values: Mapping[str, Value]) -> "RunConfig":
        """Read a run config.

        Raises:
            ConfigError: a value is missing, or no schedule.
        """
        try:
            settings = {key: _decode(values[_kebab(key)]) for key in _SCHEDULE}
            silos = [name.strip() for name in str(values["silos"]).split(",") if name.strip()]
            patience = Patience(float(values["start-s"]), float(values["round-s"]), float(values["finish-s"]))
            seed, run_dir, min_silos = int(values["seed"]), str(values["run-dir"]), int(values["min-silos"])
        except KeyError as missing:
            raise ConfigError(f"the run config lacks {missing}: generate the app again with flower-app") from None
        except ValueError as error:
            raise ConfigError(f"the run config cannot be read: {error}") from None
        for name in silos:
            path_part(name, "the run config, silos")
        if not Path(run_dir).is_absolute():
            raise ConfigError(
                f"run-dir = '{run_dir}' must be an absolute path: the ServerApp starts in some other folder"
            )
        federation = build_federation({key: value for key, value in settings.items() if value != ""})
        return cls(federation, silos, seed, run_dir, min_silos or None, patience)


def run_config(
    settings: Mapping[str, Any], seed: int, silos: list[str], run_dir: Path, min_silos: int, patience: Patience
) -> dict[str, Value]:
    """The values of a run config; what :meth:`RunConfig.read` reads.

    Args:
        settings: ``init_args`` of the federation, as they stand in a configuration file.
        seed: root seed.
        silos: names of all silos.
        run_dir: of the server.
        min_silos: 0 = all.
        patience: deadlines.

    Raises:
        ConfigError: the settings make no schedule, or one that cannot be carried.
    """
    federation = build_federation(settings)
    check_across_machines(federation)  # what is refused has no place in the values below
    values: dict[str, Value] = {
        "silos": ",".join(silos),
        "seed": seed,
        "run-dir": str(run_dir.absolute()),
        "min-silos": min_silos,
        "start-s": patience.start_s,
        "round-s": patience.round_s,
        "finish-s": patience.finish_s,
    }
    for key in _SCHEDULE:
        plain, own = getattr(federation, key), settings.get(key)
        if isinstance(plain, (bool, int, float, str)):
            values[_kebab(key)] = plain
        elif isinstance(own, str):  # the path of a class, with its defaults
            values[_kebab(key)] = own
        else:
            values[_kebab(key)] = json.dumps(own) if own else ""
    return values


def build_federation(settings: Mapping[str, Any]) -> Federation:
    """A federation from ``init_args``, checked as those of a configuration file are.

    Raises:
        ConfigError: an unknown or wrong setting.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Federation, "federation")
    name = f"{Federation.__module__}.{Federation.__qualname__}"
    try:
        parsed = parser.parse_object({"federation": {"class_path": name, "init_args": dict(settings)}})
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name of the same
        built: Federation = instantiate(parsed).federation
    except (ArgumentError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        reason = re.search(r"Errors: - (.+?)(?: - Expected|\Z)", words)  # the parser lists what else the value is not
        raise ConfigError(f"trainer.federation: {(reason[1] if reason else words)[:400]}") from None
    return built


def _kebab(key: str) -> str:
    return key.replace("_", "-")


def _decode(value: Value) -> Any:
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
