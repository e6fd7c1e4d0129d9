"""What stands outside a configuration but bears on a run: settings files, prompt templates and folders of models it names."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_sfubm.assets import MODELS, model_parts
from lightning_sfubm.datamodules.prompt_templates import TEMPLATE_DIR

_SUFFIXES = (".yaml", ".yml", ".json")  # of settings; what data are read from is in the hash of the data

#: Beginnings of the digests of shipped prompt templates as they were when these began to count. Such a template adds
#: nothing, so that rows of before stay valid; one that is changed does, and this table stays as it is.
_TEMPLATES_OF_BEFORE = {
    "base": "27ff580c60eacacc",
    "beauty": "83f9454e6e1ddbed",
    "books": "ce92a54e7238c7b4",
    "food": "ddbbf35ffae622e5",
    "health": "014fbaaf77930fc3",
    "kitchen": "e6cb4418bc9f7d76",
    "movies": "fb6ccd2e0c3cd430",
    "shopping": "dc5abf321d58fcc9",
}


def named_files(configs: Iterable[Path], flags: Iterable[str]) -> list[tuple[str, str]]:
    """Settings files named by configurations, by options or by each other: overlays, prompt templates and the like.

    A name is looked up in the working directory and in the folder of the file it stands in; one without ending may be that
    of a shipped prompt template.

    Args:
        configs: YAML files.
        flags: options of ``lightning-sfubm fit``.

    Returns:
        Name and sha256 of the content of each file that is there, sorted.
    """
    given, files = _files(configs, flags)
    names = {name for text in (*given, *(content for _, content in files.values())) for name in _names(text)}
    found = [(name, hashlib.sha256(content).hexdigest()) for name, content in files.values()]
    return sorted([*found, *_changed_templates(names)])


def _changed_templates(names: set[str]) -> Iterator[tuple[str, str]]:
    """Shipped prompt templates that are named, and what lies under all of them, where they are not as they were."""
    shipped = {path.stem: path for path in TEMPLATE_DIR.glob("*.yaml")}
    if not any(name in shipped or name.endswith(_SUFFIXES) for name in names):
        return
    for name in sorted({"base", *names} & shipped.keys()):
        digest = template_digest(shipped[name])
        if not digest.startswith(_TEMPLATES_OF_BEFORE.get(name, "none")):
            yield f"template {name}", digest


def template_digest(path: Path) -> str:
    """sha256 of a template's entries, whatever its comments and layout."""
    import yaml

    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


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
