"""What stands outside a configuration but bears on a run: settings files and folders of models that it names."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_sfubm.assets import MODELS, model_parts

_SUFFIXES = (".yaml", ".yml", ".json")  # of settings; what data are read from is in the hash of the data


def named_files(configs: Iterable[Path], flags: Iterable[str]) -> list[tuple[str, str]]:
    """Settings files named by configurations, by options or by each other: overlays, prompt templates and the like.

    A name is looked up in the working directory and in the folder of the file it stands in.

    Args:
        configs: YAML files.
        flags: options of ``lightning-sfubm fit``.

    Returns:
        Name and sha256 of the content of each file that is there, sorted.
    """
    return sorted((name, hashlib.sha256(content).hexdigest()) for name, content in _files(configs, flags)[1].values())


def named_models(configs: Iterable[Path], flags: Iterable[str]) -> dict[str, str]:
    """Local folders of backbones and text encoders, as transformers saves them, named where :func:`named_files` looks.

    Args:
        configs: YAML files.
        flags: options of ``lightning-sfubm fit``.

    Returns:
        ``model NAME`` -> digest of what lies in the folder. Embedded models are not among them: the one version of each that
        there is was checked when it was fetched.
    """
    given, files = _files(configs, flags)
    names = {name for text in (*given, *(content for _, content in files.values())) for name in _names(text)}
    folders = {name: os.path.expanduser(name) for name in sorted(names - {*MODELS, ""})}
    return {
        f"model {name}": hashlib.sha256(json.dumps(model_parts(Path(folder))).encode()).hexdigest()
        for name, folder in folders.items()
        if os.path.isfile(os.path.join(folder, "config.json"))
    }


def _files(configs: Iterable[Path], flags: Iterable[str]) -> tuple[list[str | bytes], dict[Path, tuple[str, bytes]]]:
    """Texts of configurations and options, and the files they and each other name: where they are -> name and content."""
    found: dict[Path, tuple[str, bytes]] = {}
    texts: list[str | bytes] = []
    for path in configs:
        texts.append(path.read_bytes())
        _follow(texts[-1], path.parent, found)
    for flag in flags:
        texts.append(flag.partition("=")[2] if flag.startswith("--") else flag)
        _follow(texts[-1], Path(), found)
    return texts, found


def _follow(text: str | bytes, folder: Path, found: dict[Path, tuple[str, bytes]]) -> None:
    for name in _names(text):
        if not name.endswith(_SUFFIXES):
            continue
        for path in (Path(os.path.expanduser(name)), folder / name):
            if os.path.isfile(path) and path.resolve() not in found:
                content = path.read_bytes()
                found[path.resolve()] = name, content
                _follow(content, path.parent, found)


@lru_cache(maxsize=1024)
def _names(text: str | bytes) -> tuple[str, ...]:
    """Texts among the values of a YAML text; none where it is no YAML."""
    import yaml

    try:
        return tuple(_texts(yaml.safe_load(text)))
    except (yaml.YAMLError, ValueError):  # such as a date that is none
        return ()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value
