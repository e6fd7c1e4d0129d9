"""What a state of a run was made with, so that a run that goes on from it is the same run."""

from collections.abc import Iterator, Mapping
from typing import Any

#: flags of the trainer that say where things are, what is shown and what it runs on, or have no effect on a federated run
_FLAGS = frozenset(
    [
        "default_root_dir",
        "logger",
        "profiler",
        "log_every_n_steps",
        "enable_progress_bar",
        "enable_model_summary",
        "enable_checkpointing",
        "enable_autolog_hparams",
        "model_registry",
        "barebones",
        "benchmark",
        "detect_anomaly",
        "accelerator",
        "strategy",
        "devices",
        "num_nodes",
        "limit_test_batches",
        "limit_predict_batches",
        "max_epochs",
        "min_epochs",
        "max_steps",
        "num_sanity_val_steps",
    ]
)
#: of the schedule: more rounds are checked where they are run, workers change no result, messages are only kept
_SCHEDULE = frozenset({"rounds", "workers", "keep_messages"})
#: of the data: places, and how they are read and evaluated; the content has a fingerprint
_DATA = frozenset({"root", "folder", "num_workers", "eval_batch_size"})
#: callbacks that only show or write
_SHOWS = frozenset(
    [
        "ProgressBar",
        "TQDMProgressBar",
        "RichProgressBar",
        "LearningRateMonitor",
        "DeviceStatsMonitor",
        "ThroughputMonitor",
        "ModelSummary",
        "RichModelSummary",
        "LabelledProgressBar",
        "PredictionWriter",
        "RoundLogger",
    ]
)


def lasting_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved configuration that stage 1 depends on, by dotted key.

    Left out are places, outputs and hardware, the number of rounds, and ``experiment``, whose rows have a hash of their own.
    Of a ``secret_dir`` is kept that there is one: states have a hash of the secrets.

    Args:
        config: as the command line resolves it: ``model``, ``data``, ``trainer``, ``seed_everything``.
    """
    trainer = {k: v for k, v in (config.get("trainer") or {}).items() if k not in _FLAGS}
    callbacks = trainer.get("callbacks") or []
    trainer["callbacks"] = [c for c in callbacks if not _only_shows(str(c.get("class_path", "")))]
    kept = {"seed_everything": config.get("seed_everything"), "model": config.get("model"), "trainer": trainer}
    flat = dict(_flatten("", kept))
    flat |= {key: value for key, value in _flatten("data", config.get("data")) if key.rpartition(".")[2] not in _DATA}
    schedule = "trainer.federation."
    flat = {k: v for k, v in flat.items() if not (k.startswith(schedule) and k.rpartition(".")[2] in _SCHEDULE)}
    return _without_places_of_secrets(flat)


def _without_places_of_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: "a folder" if k.rpartition(".")[2] == "secret_dir" else v for k, v in settings.items()}


def difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, as words; empty where none does or where one side was made without a configuration."""
    if not (stored and now):
        return ""
    # states of an earlier version hold the place
    return _words(_without_places_of_secrets(stored), _without_places_of_secrets(now), "{} was {!r} and is {!r}")


def schedule_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings in which two schedules differ, as words and by the names they are set by; empty where they do not.

    Args:
        stored: the :meth:`~lightning_sfubm.federated.federation.Federation.schedule` of a state.
        now: of this run.
    """
    one, other = ({_name(key): value for key, value in schedule.items()} for schedule in (stored, now))
    return named_difference(one, other, "{} was {!r} and is {!r}")


def _name(key: str) -> str:
    return "seed_everything" if key == "seed" else f"trainer.federation.{key}"


def named_difference(one: Mapping[str, Any], other: Mapping[str, Any], words: str) -> str:
    """The settings in which two nested mappings differ, by dotted key; empty where they do not.

    Args:
        one: settings as JSON values.
        other: likewise.
        words: format of each, for its key and its two values.
    """
    if one == other:
        return ""
    try:
        return _words(dict(_flatten("", one)), dict(_flatten("", other)), words) or "empty settings"
    except RecursionError:  # nested as nothing of this package is
        return "settings of no form that is known"


def _words(one: Mapping[str, Any], other: Mapping[str, Any], words_of: str) -> str:
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    words = [words_of.format(key, one.get(key), other.get(key)) for key in keys]
    more = [f"{len(words) - 5} more"] if len(words) > 5 else []
    return "; ".join([*words[:5], *more])


def _only_shows(class_path: str) -> bool:
    return class_path.startswith(("lightning.", "lightning_sfubm.")) and class_path.rpartition(".")[2] in _SHOWS


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists; ``null`` is no setting, like a key that is absent."""
    if isinstance(value, (Mapping, list)):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, entry in entries:
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), entry)
    elif value is not None:
        yield prefix, value
