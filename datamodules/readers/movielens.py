"""MovieLens in its published layouts, whole or cut into two services with disjoint films and users."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_sfubm.datamodules.readers.base import RawDomain, fingerprint_files, resolve
from lightning_sfubm.datamodules.readers.delimited import Dialect, read_delimited
from lightning_sfubm.errors import ConfigError

Variant = Literal["100k", "1m", "latest", "recbole-100k"]

#: Genre flags of ``u.item``, in column order.
GENRE_FLAGS = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_ITEM_NAMES = ("item", "title", "release", "video", "url", *GENRE_FLAGS)
_ARTICLES = r"The|A|An|La|Le|Les|L'|Il|Lo|Gli|El|Los|Las|Un|Une|Der|Die|Das"
_TRAILING_ARTICLE = re.compile(rf"^(?P<main>[^()]+), (?P<article>{_ARTICLES})(?P<rest>(?: \(.*)?)$")
_TRAILING_YEAR = re.compile(r"^(?P<title>.*?)\s*\((?P<year>\d{4})(?:[-–]\d{0,4})?\)\s*$")


@dataclass(frozen=True)
class _Layout:
    """File names, dialects and column names (user, item, time; item, title, genres, year) of one variant."""

    interactions: str
    items: str
    ratings: tuple[str, str, str]
    ratings_dialect: Dialect
    films: tuple[str, str, str | None, str | None]
    films_dialect: Dialect
    genre_separator: str


_TAB = Dialect("\t", quoted=False)
_LAYOUTS: dict[str, _Layout] = {
    "100k": _Layout(
        "u.data", "u.item", ("user", "item", "time"),
        Dialect("\t", ("user", "item", "rating", "time"), quoted=False),
        ("item", "title", None, None), Dialect("|", _ITEM_NAMES, "latin-1", quoted=False), "|",
    ),
    "1m": _Layout(
        "ratings.dat", "movies.dat", ("user", "item", "time"),
        Dialect("::", ("user", "item", "rating", "time"), quoted=False),
        ("item", "title", "genres", None), Dialect("::", ("item", "title", "genres"), "latin-1", quoted=False), "|",
    ),
    "latest": _Layout(
        "ratings.csv", "movies.csv", ("userId", "movieId", "timestamp"), Dialect(),
        ("movieId", "title", "genres", None), Dialect(), "|",
    ),
    "recbole-100k": _Layout(
        "ml-100k.inter", "ml-100k.item", ("user_id:token", "item_id:token", "timestamp:float"), _TAB,
        ("item_id:token", "movie_title:token_seq", "class:token_seq", "release_year:token"), _TAB, " ",
    ),
}  # fmt: skip


class MovieLensReader:
    """Reads MovieLens; every rating counts as an interaction, whatever its value.

    The cut into services is ours [choice], so that two silos with real people can be had from one public data set.
    A film belongs to the service whose genre list names more of the film's genres; where both name equally many, a
    hash of the film's id decides. So each film is in exactly one of ``(genres, other_genres)`` and its mirror image
    ``(other_genres, genres)``. Users are cut by a hash of their id.

    Args:
        variant: ``100k`` (``u.data``, ``u.item``), ``1m`` (``*.dat``), ``latest`` (``*.csv``) or ``recbole-100k`` (the
            atomic files inside the recbole package).
        folder: folder of the files, relative to the data root; ``None`` is the root itself, and for
            ``recbole-100k`` the embedded data set, fetched once.
        genres: genres of this service; ``None`` takes every film.
        other_genres: genres of the other service; needed with ``genres``.
        user_part: ``(part, parts)``, keep users whose id hashes into this part.
    """

    def __init__(
        self,
        variant: Variant = "latest",
        folder: str | None = None,
        genres: list[str] | None = None,
        other_genres: list[str] | None = None,
        user_part: tuple[int, int] | None = None,
    ) -> None:
        if variant not in _LAYOUTS:
            raise ConfigError(f"variant must be one of {', '.join(_LAYOUTS)}, not {variant!r}")
        if (genres is None) != (other_genres is None):
            raise ConfigError("genres and other_genres cut the films into two services: give both or neither")
        if genres and other_genres and (set(genres) & set(other_genres) or genres == other_genres):
            raise ConfigError(f"genres in both services: {', '.join(sorted(set(genres) & set(other_genres)))}")
        if user_part is not None and not 0 <= user_part[0] < user_part[1]:
            raise ConfigError(f"user_part must be (part, parts) with 0 <= part < parts, not {tuple(user_part)}")
        self.variant = variant
        self.folder = folder
        self.genres = genres
        self.other_genres = other_genres
        self.user_part = user_part

    def read(self, root: Path | None) -> RawDomain:
        """Read ratings and films and apply the cut.

        Raises:
            DataError: a file or column is missing, or a line cannot be read.
        """
        layout = _LAYOUTS[self.variant]
        ratings_path, films_path = self._paths(root)
        user, item, time = layout.ratings
        ratings = read_delimited(ratings_path, ids=[user, item], order=time, dialect=layout.ratings_dialect)
        ratings = ratings.rename_columns(["user", "item", "order"])
        items, genres = self._films(films_path, layout)

        notes: dict[str, int] = {}
        if self.genres and self.other_genres:
            keys = items.column("item").to_pylist()
            mine = np.array([self._in_service(key, found) for key, found in zip(keys, genres, strict=True)], dtype=bool)
            notes["films_of_the_other_service"] = int((~mine).sum())
            other = items.column("item").filter(pa.array(~mine))
            items = items.filter(pa.array(mine))
            keep = pc.invert(
                pc.is_in(ratings.column("item").cast(pa.string()), other.cast(pa.string()).combine_chunks())
            )
            notes["ratings_of_the_other_service"] = ratings.num_rows - pc.sum(keep, min_count=0).as_py()
            ratings = ratings.filter(keep)
        if self.user_part is not None:
            part, parts = self.user_part
            users = ratings.column("user").unique().cast(pa.string())
            kept = [key for key in users.to_pylist() if key is None or _hash(f"user {key}") % parts == part]
            notes["users_of_other_parts"] = len(users) - len(kept)
            ratings = ratings.filter(pc.is_in(ratings.column("user").cast(pa.string()), pa.array(kept, pa.string())))
        return RawDomain(ratings, items, "timestamp", notes)

    def fingerprint(self, root: Path | None) -> str:
        """sha256 of both files and the settings."""
        settings = {"reader": "movielens", **{k: v for k, v in vars(self).items() if k != "folder"}}
        return fingerprint_files(list(self._paths(root)), settings)

    def _paths(self, root: Path | None) -> tuple[Path, Path]:
        layout = _LAYOUTS[self.variant]
        if self.folder is None and self.variant == "recbole-100k":
            from lightning_sfubm.assets import resolve_data

            folder = resolve_data("ml-100k")
        else:
            folder = resolve(root, self.folder or "")
        return folder / layout.interactions, folder / layout.items

    def _films(self, path: Path, layout: _Layout) -> tuple[pa.Table, list[list[str]]]:
        """The items table (item, title, year, genres) and each film's genre list."""
        item, title, genre, year = layout.films
        flags = [] if genre else list(GENRE_FLAGS)
        table = read_delimited(
            path, ids=[item], texts=[c for c in (title, genre, year, *flags) if c], dialect=layout.films_dialect
        )
        if genre:
            genres = [(cell or "").split(layout.genre_separator) for cell in table.column(genre).to_pylist()]
        else:
            cells = [table.column(flag).to_pylist() for flag in flags]
            genres = [
                [flag for flag, cell in zip(flags, row, strict=True) if cell == "1"] for row in zip(*cells, strict=True)
            ]
        genres = [[g for g in row if g and g not in ("unknown", "(no genres listed)")] for row in genres]
        parsed = [split_title(cell) for cell in table.column(title).to_pylist()]
        years = table.column(year).to_pylist() if year else [found for _, found in parsed]
        films = pa.table(
            {
                "item": table.column(item),
                "title": pa.array([name for name, _ in parsed], pa.string()),
                "year": pa.array(years, pa.string()),
                "genres": pa.array([", ".join(row) or None for row in genres], pa.string()),
            }
        )
        return films, genres

    def _in_service(self, key: str, genres: list[str]) -> bool:
        own, other = self.genres or [], self.other_genres or []
        mine, theirs = len(set(genres) & set(own)), len(set(genres) & set(other))
        if mine != theirs:
            return mine > theirs
        first = sorted(own) < sorted(other)
        return (_hash(f"film {key}") % 2 == 0) == first


def split_title(raw: str | None) -> tuple[str | None, str | None]:
    """Title as people say it, and year: ``"Matrix, The (1999)"`` -> ``("The Matrix", "1999")``."""
    if raw is None:
        return None, None
    year = None
    if match := _TRAILING_YEAR.match(raw):
        raw, year = match["title"], match["year"]
    if match := _TRAILING_ARTICLE.match(raw):
        space = "" if match["article"].endswith("'") else " "
        raw = f"{match['article']}{space}{match['main']}{match['rest']}"
    return raw, year


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
