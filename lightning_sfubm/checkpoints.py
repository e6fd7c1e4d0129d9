"""Which file ``--ckpt_path last`` and ``best`` mean, also in a process that has trained nothing, and what may go on from it."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.federated.settings import difference, lasting_settings
from lightning_sfubm.safe_load import load_checkpoint

#: below a run's folder: where Lightning writes without a logger, and with one, in a folder for each start
_PLACES = ("checkpoints", "*/*/checkpoints")
_LAST = re.compile(r"last(-v\d+)?\.ckpt")
_SHARED = "meta.pt"  #: in a checkpoint in shards, the file of what is not divided
_OF_TRAINING = ("model.", "data.", "seed_everything")  #: the trainer's own, such as a patience, may change on the way
_OF_LIGHTNING = ("hpc", "registry")  #: what a ``ckpt_path`` begins with, up to a colon, that names no file
_SETTINGS = "sfubm_settings"  #: entry of a checkpoint
log = logging.getLogger(__name__)


class SettingsKeeper(Callback):
    """Write the model, data and seed of a training into its checkpoints, for :func:`check_same_settings` to compare.

    The command line adds one by itself; there is nothing to configure.

    Args:
        settings: see :func:`~lightning_sfubm.federated.settings.lasting_settings`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = _of_training(settings)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Runs for every checkpoint that training can go on from."""
        checkpoint[_SETTINGS] = self._settings


def resolve(trainer: L.Trainer, ckpt_path: Any, fitting: bool = False) -> Any:
    """What to hand to Lightning for a ``ckpt_path``: a file where ``last`` or ``best`` is of an earlier process.

    It is read here already: Lightning makes the folder of its logs before it looks.

    Args:
        trainer: whose folder is searched, unless its own callbacks know the file.
        ckpt_path: as given.
        fitting: whether training may start from the beginning where there is no last checkpoint.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
    """
    own = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if any(c.best_model_path or c.last_model_path for c in own):
        return ckpt_path  # this process has trained
    places = [Path(trainer.default_root_dir), *(Path(c.dirpath) for c in own if c.dirpath is not None)]
    if ckpt_path is None and not fitting and _last_files(places):
        log.warning("no ckpt_path is given: the weights are those of the model as it is; 'last' is %s", _newest(places))
    if ckpt_path is None or str(ckpt_path).partition(":")[0] in _OF_LIGHTNING:
        return ckpt_path
    if ckpt_path not in ("last", "best"):
        load_checkpoint(_file_of(ckpt_path))
        return ckpt_path
    try:
        path = find_checkpoint(places, ckpt_path)
    except CheckpointError as error:
        if not (fitting and ckpt_path == "last"):
            raise
        log.warning("%s; training starts from the beginning", error)
        return None
    log.info("checkpoint %s", path)
    loaded = load_checkpoint(_file_of(path))
    if fitting and path.is_file():
        _go_on(trainer, own, path, loaded)
    return path


def _file_of(path: str | Path) -> str | Path:
    """The file that tells of a checkpoint: itself, or of one in shards what is not divided."""
    return Path(path) / _SHARED if Path(path).is_dir() else path


def _go_on(trainer: L.Trainer, own: list[ModelCheckpoint], path: Path, loaded: Mapping[str, Any]) -> None:
    """Prepare a training for going on from a file: what was best so far is remembered in the folder it was written to alone.

    Raises:
        CheckpointError: more epochs were begun than are asked for.
    """
    begun = _epochs_begun(loaded)
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs < begun:
        raise CheckpointError(
            f"{path}: {begun} epochs had begun when it was written, and trainer.max_epochs is {trainer.max_epochs}: set it "
            "higher, or start anew in another trainer.default_root_dir"
        )
    states = loaded.get("callbacks", {})
    for callback in own:
        if callback.dirpath is None:
            named = states.get(callback.state_key, {}).get("dirpath")
            same = named is not None and Path(named).exists() and Path(named).samefile(path.parent)
            callback.dirpath = named if same else str(path.parent)


def _epochs_begun(loaded: Mapping[str, Any]) -> int:
    """Epochs begun when a checkpoint was written; its ``epoch`` is the number of the last one, from 0, also at its end."""
    loop = loaded.get("loops", {}).get("fit_loop")
    return int(loaded["epoch"] if loop is None else loop["epoch_progress"]["current"]["started"])


def check_same_settings(path: Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on with a training under another model, data or seed than it was begun with, where that is known.

    The optimiser's own settings come back with its state: another learning rate would be written down and not be used.

    Args:
        path: of the checkpoint gone on from.
        now: settings, see :func:`~lightning_sfubm.federated.settings.lasting_settings`; empty where nothing is known.

    Raises:
        CheckpointError: naming what differs, or it cannot be read.
    """
    if changed := difference(_stored_settings(path), _of_training(now)):
        raise CheckpointError(
            f"{path}: was trained with other settings: {changed}; set them back, or start anew without --ckpt_path, in another "
            "trainer.default_root_dir"
        )


def _stored_settings(path: Path) -> dict[str, Any]:
    """Those that a checkpoint holds; else, for an earlier version wrote none, those of its run's folder; empty without."""
    if isinstance(stored := load_checkpoint(_file_of(path)).get(_SETTINGS), dict):
        return stored
    try:
        config = yaml.safe_load((path.parent.parent / "config.yaml").read_text(encoding="utf-8"))
        return _of_training(lasting_settings(config))
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return {}  # none, or not one of ours


def _of_training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of model, data and seed, as values that a checkpoint may hold: YAML knows dates besides."""
    kept = {key: value for key, value in settings.items() if key.startswith(_OF_TRAINING)}
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in kept.items()}


def find_checkpoint(places: list[Path], which: str) -> Path:
    """The newest ``last.ckpt`` of a run, or the best one that it names.

    Lightning looks in the folder of the process at work alone, which is a new one for each start, and trains or evaluates
    fresh weights where it finds none.

    Args:
        places: the run's folder, ``trainer.default_root_dir``, and folders that checkpoints are written to besides.
        which: ``"last"`` or ``"best"``.

    Raises:
        CheckpointError: there is no such file.
    """
    if not _last_files(places):
        raise CheckpointError(
            f"{places[0]}: no last.ckpt of an earlier run: fit with the callback ModelCheckpoint and filename: last, or "
            "give the path of a checkpoint"
        )
    last = _newest(places)
    if which == "last":
        return last
    if last.is_dir():
        raise CheckpointError(f"{last}: a checkpoint in shards names no best one: give its path")
    states = load_checkpoint(last).get("callbacks", {})
    chosen = [state for state in states.values() if state.get("monitor") is not None]
    named = [state["best_model_path"] for state in chosen if state.get("best_model_path")]
    if not named:
        raise CheckpointError(f"{last}: names no best checkpoint: give ModelCheckpoint a monitor, or a path instead")
    best = Path(named[0])
    beside = last.parent / best.name  # the folder may have been moved
    for path in (beside, best):
        if path.exists():
            return path
    raise CheckpointError(f"{beside}: the best checkpoint that {last} names is gone; give another path")


def _last_files(places: list[Path]) -> list[Path]:
    """Files, or folders where a model is divided among processes."""
    folders = [*places, *(folder for place in places for pattern in _PLACES for folder in place.glob(pattern))]
    return [path for folder in folders for path in folder.glob("last*.ckpt") if _LAST.fullmatch(path.name)]


def _newest(places: list[Path]) -> Path:
    return max(_last_files(places), key=lambda path: (path.stat().st_mtime_ns, str(path)))
