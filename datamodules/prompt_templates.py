"""Prompt templates: files that say how a domain is spoken of, never hard-coded names."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sfubm.errors import ConfigError

TEMPLATE_DIR = Path(__file__).resolve().parent / "templates"
WORDS = ("noun", "nouns", "verb", "past", "service")

#: text of a form -> fields it may hold besides the words, fields it must hold
FORMS: dict[str, dict[str, tuple[set[str], set[str]]]] = {
    "branch": {
        "opening": ({"user"}, set()),
        "history": ({"title", "item"}, {"title"}),
        "question": (set(), set()),
        "candidate": ({"title", "item"}, {"title"}),
        "no_history": (set(), set()),
    },
    "list": {
        "opening": ({"user"}, set()),
        "history": ({"title", "item"}, {"title"}),
        "choices": (set(), set()),
        "choice": ({"title", "item"}, {"title"}),
        "question": (set(), set()),
        "answer": ({"title"}, {"title"}),
        "no_history": (set(), set()),
    },
    "binary": {
        "opening": (set(), set()),
        "history": ({"title"}, {"title"}),
        "disliked": (set(), set()),
        "question": (set(), set()),
        "candidate": ({"title"}, {"title"}),
        "answer_yes": (set(), set()),
        "answer_no": (set(), set()),
    },
}
FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PromptTemplate:
    """The texts of one prompt form with the domain's words filled in; ``{title}``, ``{user}``, ``{item}`` remain.

    Attributes:
        form: ``branch``, ``list`` or ``binary`` (one title, to be answered with yes or no).
        noun: what an item is called.
        texts: name of the text (see :data:`FORMS`) -> text.
        chat: wrap the prompt in the tokenizer's chat format.
        system: system message of the chat format, ``""`` for none.
    """

    form: str
    noun: str
    texts: dict[str, str]
    chat: bool = False
    system: str = ""


def load_template(name: str, form: str) -> PromptTemplate:
    """Read a template: the base file with the domain file's entries on top.

    Args:
        name: a shipped template (``movies``, ``books``, ``shopping`` ...) or the path of a YAML file.
        form: ``branch``, ``list`` or ``binary``.

    Raises:
        ConfigError: naming the file and the entry, if a file cannot be read, an entry is unknown, of the wrong type,
            empty, or holds a field that has no meaning there.
    """
    if form not in FORMS:
        raise ConfigError(f"prompt form '{form}' is not one of {sorted(FORMS)}")
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else TEMPLATE_DIR / f"{name}.yaml"
    if not path.is_file():
        shipped = sorted(file.stem for file in TEMPLATE_DIR.glob("*.yaml"))
        raise ConfigError(f"no prompt template at {path}; give the path of a YAML file or one of {shipped}")
    merged = _read(TEMPLATE_DIR / "base.yaml")
    for key, value in _read(path).items():
        merged[key] = {**merged[key], **value} if key in FORMS else value
    words = {word: merged[word] for word in WORDS}
    texts = {key: _fill(path, f"{form}.{key}", text, words) for key, text in merged[form].items()}
    return PromptTemplate(form, merged["noun"], texts, merged["chat"], merged["system"])


def _read(path: Path) -> dict[str, Any]:
    """One file, every entry checked by name and type."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"prompt template {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"prompt template {path} must hold entries such as 'noun: film'")
    kinds: dict[str, Any] = {**dict.fromkeys(WORDS, str), "chat": bool, "system": str, **dict.fromkeys(FORMS, dict)}
    entries: dict[str, Any] = content
    for key, value in entries.items():
        if key not in kinds:
            raise ConfigError(f"prompt template {path}: unknown entry '{key}'; known are {sorted(kinds)}")
        if not isinstance(value, kinds[key]):
            raise ConfigError(f"prompt template {path}: entry '{key}' must be of type {kinds[key].__name__}")
        if key in WORDS and not value.strip():
            raise ConfigError(f"prompt template {path}: entry '{key}' is empty")
        if key in FORMS:
            for text in value:
                if text not in FORMS[key]:
                    raise ConfigError(
                        f"prompt template {path}: unknown entry '{key}.{text}'; known: {list(FORMS[key])}"
                    )
                if not isinstance(value[text], str):
                    raise ConfigError(f"prompt template {path}: entry '{key}.{text}' must be a text")
    return entries


def _fill(path: Path, entry: str, text: str, words: dict[str, str]) -> str:
    form, key = entry.split(".")
    allowed, needed = FORMS[form][key]
    fields = FIELD.findall(text)
    for field in fields:
        if field not in allowed and field not in words:
            known = sorted(allowed | set(words))
            raise ConfigError(f"prompt template {path}: '{entry}' holds '{{{field}}}'; it may hold {known}")
    for field in sorted(needed):
        if fields.count(field) != 1:
            raise ConfigError(f"prompt template {path}: '{entry}' must hold '{{{field}}}' exactly once")
    if key in ("question", "no_history") and not text.strip():
        raise ConfigError(f"prompt template {path}: '{entry}' is empty")
    return FIELD.sub(lambda match: words.get(match[1], match[0]), text)
