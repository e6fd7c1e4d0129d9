"""Settings that stand outside a configuration: the files it names."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

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
    found: dict[Path, tuple[str, str]] = {}
    for path in configs:
        _follow(path.read_bytes(), path.parent, found)
    for flag in flags:
        _follow(flag.partition("=")[2] if flag.startswith("--") else flag, Path(), found)
    return sorted(found.values())


def _follow(text: str | bytes, folder: Path, found: dict[Path, tuple[str, str]]) -> None:
    for name in _names(text):
        for path in (Path(name).expanduser(), folder / name):
            if os.path.isfile(path) and path.resolve() not in found:
                content = path.read_bytes()
                found[path.resolve()] = name, hashlib.sha256(content).hexdigest()
                _follow(content, path.parent, found)


@lru_cache(maxsize=1024)
def _names(text: str | bytes) -> tuple[str, ...]:
    """Values of a YAML text that may name a settings file; none where it is no YAML."""
    import yaml

    try:
        return tuple(_texts(yaml.safe_load(text)))
    except (yaml.YAMLError, ValueError):  # such as a date that is none
        return ()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif isinstance(value, str) and value.endswith(_SUFFIXES):
        yield value
