"""Amazon reviews: the three releases, literal and JSON metadata, broken streams."""

import gzip
import json
from pathlib import Path

import pytest

from lightning_sfubm.datamodules.preprocess import PreprocessSettings, build_domain
from lightning_sfubm.datamodules.readers.amazon import AmazonReader, clean
from lightning_sfubm.datamodules.readers.base import Reader
from lightning_sfubm.errors import ConfigError, DataError

NAMES = {"2014": ("reviewerID", "asin", "unixReviewTime"), "2018": ("reviewerID", "asin", "unixReviewTime"),
         "2023": ("user_id", "parent_asin", "timestamp")}  # fmt: skip


def review(version: str, user: str, item: str, day: int) -> dict:
    names = NAMES[version]
    scale = 1000 if version == "2023" else 1
    return {
        names[0]: user,
        names[1]: item,
        names[2]: day * 86400 * scale,
        "overall": 5.0,
        "reviewText": "private words",
    }


def write(folder: Path, version: str, extra: bytes = b"") -> AmazonReader:
    rows = [review(version, "A", "B1", 2), review(version, "A", "B2", 1), review(version, "A", "B1", 2)]
    reviews = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    item = NAMES[version][1]
    metadata = [
        {item: "B1", "title": "Salt &amp; <b>Pepper</b>  Mill", "brand": "Acme", "store": "Acme",
         "category": ["Home", "Kitchen"], "categories": [["Home", "Kitchen"], ["Home", "Tools"]]},
        {item: "B3", "title": "nobody reviewed this"},
        {item: "B2", "brand": "It's \"quoted\""},
    ]  # fmt: skip
    form = repr if version == "2014" else json.dumps
    (folder / "meta.json").write_text("".join(form(row) + "\n" for row in metadata))
    (folder / "reviews.json.gz").write_bytes(gzip.compress(reviews + extra))
    return AmazonReader(version, str(folder / "reviews.json.gz"), str(folder / "meta.json"))


@pytest.mark.parametrize("version", ["2014", "2018", "2023"])
def test_releases(tmp_path: Path, version: str) -> None:
    reader = write(tmp_path, version)
    assert isinstance(reader, Reader)
    raw = reader.read(None)
    assert raw.interactions.column("order").to_pylist() == [172800, 86400, 172800]
    assert raw.items.column("item").to_pylist() == ["B1", "B2"]
    assert raw.items.column("title").to_pylist() == ["Salt & Pepper Mill", None]
    assert raw.notes == {"metadata_of_items_without_reviews": 1}
    domain = build_domain(raw, "x", PreprocessSettings(k_core=0))
    assert domain.items.tolist() == [2, 1]  # the duplicate review is gone, time order restored
    assert domain.card.rules["duplicates"] == 1
    assert domain.titles[2] == "untitled B2"
    tools = ", Tools" if version != "2018" else ""
    assert domain.texts[1] == f"Salt & Pepper Mill. Acme. Home, Kitchen{tools}"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (b'{"reviewerID": "A", "asin": "B1", "unixRev', r"reviews\.json\.gz, line 4: no complete JSON object"),
        (b"[1, 2]\n", r"line 4: a list where a JSON object"),
        (b'{"reviewerID": "A", "asin": "B1"}\n', r"line 4: field 'unixReviewTime' is missing"),
        (
            b'{"reviewerID": "A", "asin": "B1", "unixReviewTime": "now"}\n',
            r"line 4: field 'unixReviewTime' holds 'now'",
        ),
        (b'{"reviewerID": 3, "asin": "B1", "unixReviewTime": 1}\n', r"line 4: field 'reviewerID' holds 3"),
        (b"__import__('os').system('true')\n", r"line 4: no complete JSON object"),
        (b"{[]: 1}\n", r"line 4: no complete JSON object"),
        (b'{"a": ' + b"[" * 100_000, r"line 4: lists or objects nested too deeply"),
        *(
            (
                b'{"reviewerID": "A", "asin": "B1", "unixReviewTime": %s}\n' % time,
                r"line 4: .*outside the years 1 to 9999",
            )
            for time in (b"1e999", b"-Infinity", b"NaN", b"9" * 30, b"253402300800", b"-62135596801")
        ),
        (b'{"reviewerID": "\\ud83d", "asin": "B1", "unixReviewTime": 1}\n', r"line 4: field 'reviewerID' holds half"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, extra: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        write(tmp_path, "2014", extra).read(None)


def test_half_a_surrogate_pair_is_dropped_from_a_title(tmp_path: Path) -> None:
    reader = write(tmp_path, "2018")
    with open(tmp_path / "meta.json", "a") as file:
        file.write('{"asin": "B2", "title": "Cut off \\ud83d"}\n')
    items = reader.read(None).items
    assert dict(zip(items["item"].to_pylist(), items["title"].to_pylist(), strict=True))["B2"] == "Cut off"


def test_milliseconds_order_reviews_of_one_second(tmp_path: Path) -> None:
    stamps = {"B1": 1_600_000_000_900, "B2": 1_600_000_000_001, "B3": 1_600_000_000_002}
    rows = [{"user_id": "A", "parent_asin": item, "timestamp": time} for item, time in stamps.items()]
    (tmp_path / "reviews").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "meta").write_text("".join(f'{{"parent_asin": "{item}", "title": "{item}"}}\n' for item in stamps))
    raw = AmazonReader("2023", "reviews", "meta").read(tmp_path)
    domain = build_domain(raw, "x", PreprocessSettings(k_core=0))
    assert domain.items.tolist() == [2, 3, 1]
    assert domain.times.tolist() == [1_600_000_000] * 3
    assert domain.card.tied_share == 0
    assert domain.card.after.first == "2020-09-13"


def test_truncated_gzip(tmp_path: Path) -> None:
    reader = write(tmp_path, "2018")
    path = tmp_path / "reviews.json.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="truncated gzip"):
        reader.read(None)


def test_a_file_of_another_account_is_not_called_broken(tmp_path: Path, closed) -> None:
    reader = write(tmp_path, "2018")
    closed(tmp_path / "meta.json")
    for use in (reader.read, reader.fingerprint):
        with pytest.raises(DataError, match=r"meta\.json: belongs to account .* may not read it"):
            use(None)


def test_wrong_release_is_named(tmp_path: Path) -> None:
    write(tmp_path, "2018")
    with pytest.raises(DataError, match=r"line 1: field .user_id. is missing.*right release"):
        AmazonReader("2023", "reviews.json.gz", "meta.json").read(tmp_path)
    with pytest.raises(ConfigError, match="version must be one of"):
        AmazonReader("2020", "a", "b")


def test_clean() -> None:
    assert clean("  A &lt;i&gt; B ") == "A B"
    assert clean("<p class='x'>I <3 Jazz, 5 > 4</p><br/><!-- old --> a<b") == "I <3 Jazz, 5 > 4 a<b"
    assert clean([["a", "b"], ["a", ["c"]], None]) == "a, b, c"
    assert clean([]) is None
    assert clean(7) is None
