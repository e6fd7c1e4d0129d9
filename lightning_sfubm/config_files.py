"""Configuration files of the command line: faults are said of the file, not of a stream without a name."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lightning_sfubm.errors import ConfigError


def check_config_files(arguments: Sequence[object]) -> None:
    """Refuse files given with ``--config`` or ``-c`` that are no YAML mapping, or name a key twice: the first would be lost.

    Args:
        arguments: of the command line. What names no file is left to the parser.

    Raises:
        ConfigError: naming the file, and the line where there is one.
    """
    words = [str(word) for word in arguments]
    given = [after for before, after in pairwise(words) if before in ("--config", "-c")]
    given += [word.partition("=")[2] for word in words if word.startswith(("--config=", "-c="))]
    given += [word[2:] for word in words if word.startswith("-c") and word[2:3] not in ("", "=")]
    for name in given:
        path = os.path.expanduser(name)
        # Path.is_file() fails for a text longer than a file name, such as settings given inline.
        if os.path.isfile(path):
            _check(Path(path))


def _check(path: Path) -> None:
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be read") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{path} holds no settings: a configuration is a mapping of keys to values")
    _walk(path, tree, set(), set())


def _walk(path: Path, node: yaml.Node, done: set[int], above: set[int]) -> None:
    """Refuse a key that its mapping has already, and an alias of what it stands in; what an alias repeats is looked at once."""
    if id(node) in above:
        line = node.start_mark.line + 1
        raise ConfigError(f"{path} has what stands in line {line} within itself, by an alias: it has no end")
    if id(node) in done:
        return
    above.add(id(node))
    keys: set[str] = set()
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = child if isinstance(child, tuple) else (None, child)
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in keys:
                line = key.start_mark.line + 1
                raise ConfigError(
                    f"{path} names '{key.value}' a second time in line {line}, so that what stands under the first would be "
                    "lost: put both under one key"
                )
            keys.add(key.value)
        _walk(path, value, done, above)
    above.remove(id(node))
    done.add(id(node))
