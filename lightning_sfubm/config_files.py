"""Configuration files of the command line: faults are said of the file, not of a stream without a name."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lightning_sfubm.errors import ConfigError


def check_config_files(arguments: Sequence[object]) -> None:
    """Refuse files given with ``--config`` that are no YAML mapping, or name a key twice, of which the first would be lost.

    Args:
        arguments: of the command line. What names no file is left to the parser.

    Raises:
        ConfigError: naming the file, and the line where there is one.
    """
    words = [str(word) for word in arguments]
    given = [after for before, after in pairwise(words) if before == "--config"]
    given += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    for name in given:
        path = Path(name)
        if path.is_file():
            _check(path)


def _check(path: Path) -> None:
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{path} holds no settings: a configuration is a mapping of keys to values")
    if (again := _named_twice(tree, set())) is not None:
        raise ConfigError(
            f"{path} names '{again.value}' a second time in line {again.start_mark.line + 1}, so that what stands under the "
            "first would be lost: put both under one key"
        )


def _named_twice(node: yaml.Node, seen: set[int]) -> yaml.Node | None:
    """The first key that its mapping has already; what an alias repeats is looked at once."""
    if id(node) in seen:
        return None
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    return key
                keys.add(key.value)
        inner = [value for _, value in node.value]
    else:
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
    return next((found for value in inner if (found := _named_twice(value, seen)) is not None), None)
