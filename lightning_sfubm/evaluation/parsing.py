"""Free text to candidate: the one of the offered titles that an answer names."""

import re
import unicodedata

WORD = re.compile(r"\w")
QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})


def normalise_title(text: str) -> str:
    """Case-folded, NFKC-normalised, typographic quotes and dashes made plain, white space collapsed.

    Candidates are told apart by the same rule as answers: two titles that a reader would take for one are equal.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).translate(QUOTES).casefold())
    return " ".join(folded.split())


class TitleParser:
    """Finds the candidate an answer names.

    The longest title is looked for first, on word boundaries, and every matched span is removed before shorter
    titles are tried; so "Aliens" is not "Alien", and "The Matrix Reloaded" is not "The Matrix" as well.
    An answer is valid if and only if exactly one candidate is matched. Titles that are equal after normalisation
    cannot be told apart: an answer that names one of them is invalid. Blank titles are never matched.

    Args:
        titles: C candidate titles.
        cut: whether each was cut short; such a one is also named by an answer that completes its last word.

    Example:
        >>> TitleParser(["Alien", "Aliens"]).parse('I would watch "ALIENS".')
        1
    """

    def __init__(self, titles: list[str], cut: list[bool] | None = None) -> None:
        self._indices: dict[str, list[int]] = {}
        open_ended = set()
        for index, title in enumerate(titles):
            if name := normalise_title(title):
                self._indices.setdefault(name, []).append(index)
                if cut is not None and cut[index]:
                    open_ended.add(name)
        names = sorted(self._indices, key=lambda n: (-len(n), n))
        self._patterns = [(_pattern(name, name in open_ended), name) for name in names]

    def matches(self, text: str) -> list[int]:
        """Indices of all candidates named, ascending."""
        rest = normalise_title(text)
        found: list[int] = []
        for pattern, name in self._patterns:
            # a line break can stand in no normalised title, so a removed span never joins its neighbours
            rest, count = pattern.subn("\n", rest)
            if count:
                found += self._indices[name]
        return sorted(found)

    def parse(self, text: str) -> int | None:
        """Index of the one candidate named, or ``None`` where none or several are."""
        found = self.matches(text)
        return found[0] if len(found) == 1 else None


def _pattern(name: str, open_ended: bool) -> re.Pattern[str]:
    """The title on word boundaries; a boundary is asked for only where the title ends in a word character.

    An open-ended one takes in the rest of its last word.
    """
    before = r"(?<!\w)" if WORD.match(name[0]) else ""
    after = r"(?!\w)" if WORD.match(name[-1]) else ""
    if open_ended:
        after = r"\w*"
    return re.compile(before + re.escape(name) + after)
