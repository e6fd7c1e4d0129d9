"""MovieLens: every layout gives the same films and ratings; the cut into services is a partition."""

from pathlib import Path

import pytest

from lightning_sfubm.datamodules.readers.base import Reader
from lightning_sfubm.datamodules.readers.movielens import GENRE_FLAGS, MovieLensReader, split_title
from lightning_sfubm.errors import ConfigError, DataError

FILMS = [
    (1, "Matrix, The", "1999", ["Action", "Sci-Fi"]),
    (2, "Amélie", "2001", ["Comedy", "Romance"]),
    (3, "Dances with Wolves", "1990", ["Western", "Drama"]),
    (4, "Heat", "1995", ["Action", "Drama"]),
    (5, "Unheard Of", "1996", []),
]
RATINGS = [(u, i, 5, 1000 + 7 * u + i) for u in range(1, 21) for i in range(1, 6)]


def write(folder: Path, variant: str) -> Path:
    folder = folder / variant
    folder.mkdir(exist_ok=True)
    if variant == "100k":
        (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in RATINGS))
        lines = []
        for key, title, year, genres in FILMS:
            flags = "|".join("1" if flag in genres else "0" for flag in GENRE_FLAGS)
            lines.append(f"{key}|{title} ({year})|01-Jan-{year}||http://x|{flags}\n")
        (folder / "u.item").write_text("".join(lines), encoding="latin-1")
    elif variant == "1m":
        (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in RATINGS))
        films = "".join(f"{k}::{t} ({y})::{'|'.join(g)}\n" for k, t, y, g in FILMS)
        (folder / "movies.dat").write_text(films, encoding="latin-1")
    elif variant == "latest":
        rows = "".join(",".join(map(str, row)) + "\n" for row in RATINGS)
        (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
        films = "".join(f'{k},"{t} ({y})",{"|".join(g) or "(no genres listed)"}\n' for k, t, y, g in FILMS)
        (folder / "movies.csv").write_text("movieId,title,genres\n" + films)
    else:
        rows = "".join("\t".join(map(str, row)) + "\n" for row in RATINGS)
        (folder / "ml-100k.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + rows)
        films = "".join(f"{k}\t{t}\t{y}\t{' '.join(g)}\n" for k, t, y, g in FILMS)
        header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        (folder / "ml-100k.item").write_text(header + films)
    return folder


@pytest.mark.parametrize("variant", ["100k", "1m", "latest", "recbole-100k"])
def test_layouts(tmp_path: Path, variant: str) -> None:
    reader = MovieLensReader(variant, str(write(tmp_path, variant)))
    assert isinstance(reader, Reader)
    raw = reader.read(None)
    assert raw.items.column("title").to_pylist() == [
        "The Matrix", "Amélie", "Dances with Wolves", "Heat", "Unheard Of",
    ]  # fmt: skip
    assert raw.items.column("year").to_pylist() == ["1999", "2001", "1990", "1995", "1996"]
    genres = [sorted(cell.split(", ")) if cell else None for cell in raw.items.column("genres").to_pylist()]
    assert genres == [sorted(g) or None for *_, g in FILMS]
    found = list(zip(*(raw.interactions.column(c).to_pylist() for c in ("user", "item", "order")), strict=True))
    assert found == [(str(u), str(i), t) for u, i, _, t in RATINGS]
    assert raw.order_kind == "timestamp"


def test_services_partition_films_and_users(tmp_path: Path) -> None:
    folder = str(write(tmp_path, "latest"))
    first, second = ["Action", "Sci-Fi", "Western"], ["Comedy", "Romance", "Drama"]
    a = MovieLensReader("latest", folder, first, second, (0, 2)).read(None)
    b = MovieLensReader("latest", folder, second, first, (1, 2)).read(None)
    items_a, items_b = (set(raw.items.column("item").to_pylist()) for raw in (a, b))
    assert items_a | items_b == {"1", "2", "3", "4", "5"}
    assert not items_a & items_b
    assert "1" in items_a  # two of its genres there, none here
    assert "2" in items_b
    users_a, users_b = (set(raw.interactions.column("user").to_pylist()) for raw in (a, b))
    assert users_a | users_b == {str(u) for u in range(1, 21)}
    assert not users_a & users_b
    for raw, items in ((a, items_a), (b, items_b)):
        assert set(raw.interactions.column("item").to_pylist()) == items
    assert a.notes["films_of_the_other_service"] == len(items_b)
    assert MovieLensReader("latest", folder, first, second).fingerprint(None) != MovieLensReader(
        "latest", folder, second, first
    ).fingerprint(None)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Matrix, The (1999)", ("The Matrix", "1999")),
        (
            "Horseman on the Roof, The (Hussard sur le toit, Le)",
            ("The Horseman on the Roof (Hussard sur le toit, Le)", None),
        ),
        ("Avventura, L' (1960)", ("L'Avventura", "1960")),
        ("Good, the Bad and the Ugly, The (1966)", ("The Good, the Bad and the Ugly", "1966")),
        ("2001: A Space Odyssey (1968)", ("2001: A Space Odyssey", "1968")),
        ("Paris, France (1993)", ("Paris, France", "1993")),
        ("Doctor Who (2005–)", ("Doctor Who", "2005")),
        (None, (None, None)),
    ],
)
def test_titles(raw: str | None, expected: tuple) -> None:
    assert split_title(raw) == expected


def test_bad_line_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "1m")
    with open(folder / "ratings.dat", "a") as file:
        file.write("7::3::4\n")
    with pytest.raises(DataError, match=r"ratings\.dat, line 101: 3 columns"):
        MovieLensReader("1m", str(folder)).read(None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"variant": "20m"}, "variant must be one of"),
        ({"genres": ["Drama"]}, "both or neither"),
        ({"genres": ["Drama"], "other_genres": ["Drama", "War"]}, "genres in both services: Drama"),
        ({"user_part": (2, 2)}, "user_part"),
    ],
)
def test_bad_settings(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MovieLensReader(**settings)
