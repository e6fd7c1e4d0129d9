"""The generic reader: forms it takes, and one clear error for each broken source."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.preprocess import PreprocessSettings, build_domain
from lightning_sfubm.datamodules.readers.base import Reader, dictionary_ids
from lightning_sfubm.datamodules.readers.table import TableReader
from lightning_sfubm.errors import ConfigError, DataError

INTERACTIONS = b"user_id,item_id,timestamp\nu2,b,20\nu1,a,10\nu1,b,5\n"
ITEMS = b'item_id,title,brand,asin\na,"Alpha, the ""first""",Acme,X1\nb,Beta,,X2\n'


def test_csv_columns_order_and_texts(write_tables) -> None:
    reader = TableReader(str(write_tables(INTERACTIONS, ITEMS)))
    assert isinstance(reader, Reader)
    raw = reader.read(None)
    assert raw.order_kind == "timestamp"
    assert raw.interactions.column("user").to_pylist() == ["u2", "u1", "u1"]
    assert raw.interactions.column("order").to_pylist() == [20, 10, 5]
    assert raw.items.column_names == ["item", "title", "brand"]  # an ASIN is no language
    assert raw.items.column("title").to_pylist() == ['Alpha, the "first"', "Beta"]
    assert raw.items.column("brand").to_pylist() == ["Acme", None]


@pytest.mark.parametrize("suffix", [".csv.gz", ".tsv", ".tsv.gz", ".parquet"])
def test_all_forms_give_the_same_domain(write_tables, csv_tables, tmp_path: Path, suffix: str) -> None:
    interactions, items = csv_tables()
    plain = TableReader(str(write_tables(interactions, items)))
    expected = build_domain(plain.read(None), "x", PreprocessSettings(k_core=2))
    folder = tmp_path / "other"
    folder.mkdir()
    for stem, data in (("interactions", interactions), ("items", items)):
        if suffix == ".parquet":
            pq.write_table(pacsv.read_csv(pa.BufferReader(data)), folder / f"{stem}{suffix}")
            continue
        data = data.replace(b",", b"\t") if "tsv" in suffix else data
        (folder / f"{stem}{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    domain = build_domain(TableReader("other").read(tmp_path), "x", PreprocessSettings(k_core=2))
    assert domain.fingerprint == expected.fingerprint
    assert domain.texts[1] == "Title number 0. Brand 0"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (b"1.5 2.25".split(), [1.5, 2.25]),
        (b"2014-07-23T00:00:00 2014-07-24".split(), None),
    ],
)
def test_order_may_be_float_or_iso_time(write_tables, cells: list[bytes], expected: list | None) -> None:
    text = b"user_id,item_id,timestamp\nu,a,%s\nu,b,%s\n" % tuple(cells)
    raw = TableReader(str(write_tables(text, ITEMS))).read(None)
    domain = build_domain(raw, "x", PreprocessSettings(k_core=0))
    if expected is None:
        assert domain.times.tolist() == [1406073600, 1406160000]
    else:
        assert raw.interactions.column("order").to_pylist() == expected


@pytest.mark.parametrize(
    "cells",
    [
        ("2014-07-23T02:00:01+02:00", "2014-07-23T00:00:00Z"),
        ("2014-07-22 19:30:01-0430", "2014-07-23 00:00:00Z"),
        ("2014-07-23T00:00:01.250Z", "2014-07-23T00:00:00.123456Z"),
        ("2014-07-23T00:00:01.25", "2014-07-23T00:00:00"),
        ("2014-07-23T00:00:01.1234567", "2014-07-23T00:00:00.999999999"),
    ],
)
def test_iso_times_may_have_zones_and_fractions(write_tables, cells: tuple[str, str]) -> None:
    text = "user_id,item_id,timestamp\nu,a,{}\nu,b,{}\n".format(*cells)
    raw = TableReader(str(write_tables(text.encode(), ITEMS))).read(None)
    domain = build_domain(raw, "x", PreprocessSettings(k_core=0))
    assert domain.times.tolist() == [1406073600, 1406073601]
    assert domain.items.tolist() == [2, 1]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_parquet_times_keep_their_order_within_a_second(tmp_path: Path, unit: str) -> None:
    times = pa.array([1002, 1001, 1001, 1999], pa.timestamp("ms")).cast(pa.timestamp(unit, "Europe/Berlin"))
    interactions = pa.table({"user_id": ["u"] * 4, "item_id": [1, 2, 2, 3], "timestamp": times})
    pq.write_table(interactions, tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": [1, 2, 3], "title": ["A", "B", "C"]}), tmp_path / "items.parquet")
    domain = build_domain(TableReader("").read(tmp_path), "x", PreprocessSettings(k_core=0))
    assert domain.items.tolist() == [2, 1, 3]
    assert domain.times.tolist() == [1, 1, 1]
    assert domain.card.rules["duplicates"] == 1
    assert domain.card.tied_share == 0


def test_positions_and_no_order_at_all(write_tables, caplog) -> None:
    folder = write_tables(b"user_id,item_id,pos\nu,a,1\nu,b,0\n", ITEMS)
    domain = build_domain(TableReader(str(folder)).read(None), "x", PreprocessSettings(k_core=0))
    assert (domain.times, domain.items.tolist()) == (None, [2, 1])
    folder = write_tables(b"user_id,item_id\nu,b\nu,a\nu,b\n", ITEMS)
    assert not caplog.records
    raw = TableReader(str(folder)).read(None)
    assert raw.order_kind == "none"
    assert "no column timestamp, pos, position" in caplog.text
    assert (
        "Its columns are user_id, item_id; if one of them is the time, name it by reader.init_args.order_"
        in caplog.text
    )
    assert build_domain(raw, "x", PreprocessSettings(k_core=0)).items.tolist() == [2, 1, 2]


def test_fingerprint_follows_content_and_settings(write_tables) -> None:
    folder = str(write_tables(INTERACTIONS, ITEMS))
    first = TableReader(folder).fingerprint(None)
    assert TableReader(folder).fingerprint(None) == first
    assert TableReader(folder, text_columns=[]).fingerprint(None) != first
    write_tables(INTERACTIONS + b"u9,a,1\n", ITEMS)
    assert TableReader(folder).fingerprint(None) != first


def late(cell: str) -> bytes:
    """Interactions with one more row, line 5, at this time."""
    return INTERACTIONS + f"u3,a,{cell}\n".encode()


ZIPPED = gzip.compress(b"user_id,item_id,timestamp\n" + b"u1,a,10\n" * 5000)
BROKEN = [
    ("missing column", b"user,item_id,timestamp\nu1,a,1\n", ITEMS, ".csv", ["interactions.csv", "'user_id'", "user,"]),
    ("missing title", INTERACTIONS, b"item_id,name\na,A\n", ".csv", ["items.csv", "'title'"]),
    ("wrong type", INTERACTIONS + b"u3,a,soon\n", ITEMS, ".csv", ["interactions.csv, line 5", "'timestamp'", "'soon'"]),
    ("short line", INTERACTIONS + b"u3,a\n", ITEMS, ".csv", ["interactions.csv, line 5", "2 columns"]),
    ("bad bytes", INTERACTIONS, ITEMS + b"c,\xff\xfe,Acme,X3\n", ".csv", ["items.csv, line 4", "utf-8"]),
    ("open quote", INTERACTIONS, ITEMS + b'c,"never closed,Acme,X3\n', ".csv", ["items.csv, line 4"]),
    ("open quote in the last column", INTERACTIONS, ITEMS + b'c,Gamma,Acme,"X3\nd,Delta,,X4\n', ".csv", ["items.csv, line 4"]),
    ("open quote before quotes", INTERACTIONS, ITEMS + b'c,"Gamma,X\nd,"Delta",X,X4\n', ".csv", ["items.csv, line 4"]),
    ("open quote in a long file", INTERACTIONS, ITEMS + b'c,C,,"X3\n' + b"d,D,,X4\n" * 40_000, ".csv", ["items.csv, line 4"]),
    ("open quote after breaks", INTERACTIONS, ITEMS + b'c,"C\nc",,X\nd,D,,"X4\ne,E,,X5\n', ".csv", ["items.csv, line 6"]),
    ("open quote of a user", b'user_id,item_id\nu1,a\nu1,"b\nu2,a\n', ITEMS, ".csv", ["interactions.csv, line 3"]),
    ("infinite time", late("inf"), ITEMS, ".csv", ["interactions.csv, line 5", "'timestamp'", "'inf'"]),
    ("huge time", late("9" * 30), ITEMS, ".csv", ["interactions.csv, line 5", "within 64 bits"]),
    ("year out of range", late("10000-01-01"), ITEMS, ".csv", ["interactions.csv, line 5", "'10000-01-01'"]),
    ("mixed times", late("2014-07-23"), ITEMS, ".csv", ["interactions.csv, line 5", "not written like those before"]),
    ("mixed zones", b"user_id,item_id,timestamp\nu,a,2014-07-23T00:00Z\nu,b,2014-07-23T00:00\n", ITEMS, ".csv",
     ["interactions.csv, line 3", "not written like those before"]),
    ("no rows", b"user_id,item_id,timestamp\n", ITEMS, ".csv", ["interactions.csv: holds no rows"]),
    ("no rows, no line break", b"user_id,item_id,timestamp", ITEMS, ".csv", ["interactions.csv: holds no rows"]),
    ("UTF-16", "user_id,item_id\nu1,a\n".encode("utf-16"), ITEMS, ".csv", ["interactions.csv: is not utf-8", "UTF-16"]),
    ("UTF-16 without its mark", INTERACTIONS, ITEMS.decode().encode("utf-16-le"), ".csv", ["items.csv: is not utf-8"]),
    ("name in Latin-1", INTERACTIONS, b"item_id,t\xeftre\na,A\n", ".csv", ["items.csv, line 1: text is not valid utf-8"]),
    ("item twice", b"user_id,item_id,item_id\nu1,a,b\n", ITEMS, ".csv",
     ["interactions.csv: 2 columns are called 'item_id'", "reader.init_args.item_column"]),
    ("usual text twice", INTERACTIONS, b"item_id,title,brand,brand\na,A,B,C\n", ".csv", ["items.csv: 2 columns", "'brand'"]),
    ("semicolons", b"user_id;item_id\nu1;a\n", ITEMS, ".csv", ["has user_id;item_id; columns must be parted by ','"]),
    ("empty file", b"", ITEMS, ".csv", ["interactions.csv", "no column"]),
    ("truncated gzip", ZIPPED[:60], gzip.compress(ITEMS), ".csv.gz", ["interactions.csv.gz", "gzip"]),
    ("damaged gzip", ZIPPED[:40] + b"?" * 9 + ZIPPED[49:], gzip.compress(ITEMS), ".csv.gz", ["interactions.csv.gz", "gzip"]),
    ("no gzip", INTERACTIONS, gzip.compress(ITEMS), ".csv.gz", ["interactions.csv.gz", "gzip"]),
    ("no parquet", b"PAR1nonsense", b"PAR1nonsense", ".parquet", ["interactions.parquet", "Parquet"]),
    ("ids do not meet", INTERACTIONS, b"item_id,title\n1,A\n2,B\n", ".csv", ["none of the interactions' items"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("interactions", "items", "suffix", "words"), [row[1:] for row in BROKEN], ids=[r[0] for r in BROKEN]
)
def test_broken_source_gives_one_clear_error_and_leaves_nothing(
    write_tables, cache: Path, interactions: bytes, items: bytes, suffix: str, words: list[str]
) -> None:
    folder = write_tables(interactions, items, suffix)
    with pytest.raises(DataError) as caught:
        DomainDataModule("x", TableReader(str(folder)), k_core=0).setup()
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert not list(cache.rglob("*.*"))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("option", "name", "settings"),
    [
        ("user_column", "user_id", {}),
        ("item_column", "item_id", {}),
        ("title_column", "title", {}),
        ("order_column", "when", {"order_column": "when"}),
        ("text_columns", "brand", {"text_columns": ["brand"]}),
    ],
)
def test_a_column_that_is_not_there_is_told_with_the_option_that_names_another(
    tmp_path: Path, suffix: str, option: str, name: str, settings: dict
) -> None:
    columns = {
        "interactions": {"user_id": ["u"], "item_id": ["a"], "when": [1]},
        "items": {"item_id": ["a"], "title": ["A"], "brand": ["B"]},
    }
    for stem, table in columns.items():
        write = pacsv.write_csv if suffix == ".csv" else pq.write_table
        write(
            pa.table({"other" if key == name else key: cells for key, cells in table.items()}),
            tmp_path / (stem + suffix),
        )
    words = rf"{suffix}: no column '{name}'; the file has .*other.*; name another one by reader\.init_args\.{option}$"
    with pytest.raises(DataError, match=words):
        TableReader("", **settings).read(tmp_path)


def test_a_column_that_is_twice_in_parquet_is_refused(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["u"]), pa.array(["a"]), pa.array(["b"])], ["user_id", "item_id", "item_id"])
    pq.write_table(twice, tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": ["a"], "title": ["A"]}), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"interactions\.parquet: 2 columns are called 'item_id'; rename all but one"):
        TableReader("").read(tmp_path)


def test_a_column_that_is_not_read_may_be_there_twice_or_be_no_utf8(
    write_tables, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tables(b"user_id,item_id,prix \xe9,n,n\nu,a,1,2,3\n", ITEMS)
    assert TableReader(str(folder)).read(None).interactions.to_pylist() == [{"user": "u", "item": "a"}]
    assert r"Its columns are user_id, item_id, prix \udce9, n, n;" in caplog.text
    assert caplog.text.encode()  # can be written


@pytest.mark.parametrize("stem", ["interactions", "items"])
@pytest.mark.parametrize("suffix", [".csv.gz", ".parquet"])
def test_of_two_files_of_a_name_none_is_guessed(write_tables, stem: str, suffix: str) -> None:
    folder = write_tables(INTERACTIONS, ITEMS)
    plain = (folder / f"{stem}.csv").read_bytes()
    if suffix == ".parquet":
        pq.write_table(pacsv.read_csv(pa.BufferReader(plain)), folder / f"{stem}{suffix}")
    else:
        (folder / f"{stem}{suffix}").write_bytes(gzip.compress(plain))
    words = rf"source: holds {stem}\.csv and {stem}\{suffix}; name the one to be read by reader\.init_args\.{stem}, or"
    for step in (TableReader(str(folder)).read, TableReader(str(folder)).fingerprint):
        with pytest.raises(DataError, match=words):
            step(None)
    assert TableReader(str(folder), **{stem: f"{stem}{suffix}"}).read(None).interactions.num_rows == 3


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a kilobyte, where the reader asks for eight megabytes."""
    options = pacsv.ReadOptions
    monkeypatch.setattr(
        "lightning_sfubm.datamodules.readers.delimited.pacsv.ReadOptions",
        lambda **given: options(**{**given, "block_size": 1000}),
    )


@pytest.mark.parametrize("times", ["{}", "2014-07-23T00:00:00.{:06}"])
def test_line_breaks_in_a_column_that_is_not_read(write_tables, small_blocks, times: str) -> None:
    """A block of the file may end within such a cell."""
    rows = "".join(f'u{n % 7},a,{times.format(n)},"good,\n5,{n},"\n' for n in range(400))
    folder = write_tables(f"user_id,item_id,timestamp,review\n{rows}".encode(), ITEMS)
    read = TableReader(str(folder)).read(None).interactions
    assert read.num_rows == 400
    assert read.column("user").to_pylist()[:3] == ["u0", "u1", "u2"]
    assert str(read.column("order")[399]).endswith("399")


def test_what_arrow_says_of_the_lines_is_told(write_tables, small_blocks, monkeypatch) -> None:
    """And not what it says of the last type that was tried for the order column."""
    monkeypatch.setattr("lightning_sfubm.datamodules.readers.delimited._name_bad_line", lambda *_: None)
    folder = write_tables(INTERACTIONS + b"u3,a,10\n" * 1000 + b"u3,a,10,9\n", ITEMS)
    with pytest.raises(DataError, match=r"cannot be read as delimited text .*Expected 3 columns, got 4"):
        TableReader(str(folder)).read(None)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
@pytest.mark.parametrize("name", ["interactions", "items"])
def test_a_file_of_another_account_is_not_called_broken(tmp_path: Path, closed, name: str, suffix: str) -> None:
    for stem, data in (("interactions", INTERACTIONS), ("items", ITEMS)):
        if suffix == ".parquet":
            pq.write_table(pacsv.read_csv(pa.BufferReader(data)), tmp_path / f"{stem}{suffix}")
        else:
            (tmp_path / f"{stem}{suffix}").write_bytes(gzip.compress(data) if suffix == ".csv.gz" else data)
    closed(tmp_path / f"{name}{suffix}")
    with pytest.raises(DataError, match=rf"{name}\{suffix}: belongs to account .*, and this account may not read it"):
        DomainDataModule("x", TableReader(""), root=str(tmp_path), k_core=0).setup()


def test_a_file_that_cannot_be_read_is_called_broken_gzip_only_where_it_is_gzipped(write_tables, monkeypatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("Input/output error")

    reader = TableReader(str(write_tables(INTERACTIONS, ITEMS)))
    monkeypatch.setattr("lightning_sfubm.datamodules.readers.delimited.pa.input_stream", fails)
    with pytest.raises(DataError, match=r"interactions\.csv: cannot be read \(Input/output error\)"):
        reader.read(None)


def test_quotes_that_swallow_nothing_are_read_as_before(write_tables) -> None:
    items = ITEMS + b'c,"Two\nlines, ""quoted""",Acme,X3\n\nd,Pipe 5" long,,X4\ne,E,,"X5"'
    raw = TableReader(str(write_tables(INTERACTIONS, items))).read(None)
    assert raw.items.column("title").to_pylist()[2:] == ['Two\nlines, "quoted"', 'Pipe 5" long', "E"]
    raw = TableReader(str(write_tables(INTERACTIONS, ITEMS + b'c,"Al" Y.,Acme,X3\n'))).read(None)
    assert raw.items.column("title").to_pylist()[2:] == ["Al Y."]
    raw = TableReader(str(write_tables(INTERACTIONS, ITEMS + b'\nc,"Al" Y.,Acme,X3\n\n'))).read(None)
    assert raw.items.column("title").to_pylist()[2:] == ["Al Y."]  # empty lines swallow nothing either
    long = b"x" * 140_000
    raw = TableReader(str(write_tables(INTERACTIONS, ITEMS + b'c,"' + long + b"\n" + long + b'",Acme,X3\n'))).read(None)
    assert len(raw.items.column("title").to_pylist()[2]) == 280_001


@pytest.mark.parametrize("time", [pa.array([1.0, float("inf")]), pa.array([1, 2**64 - 1], pa.uint64())])
def test_times_beyond_64_bits_in_parquet(tmp_path: Path, time: pa.Array) -> None:
    interactions = pa.table({"user_id": ["u", "u"], "item_id": [1, 1], "timestamp": time})
    pq.write_table(interactions, tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": [1], "title": ["A"]}), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"interactions\.parquet, row 2: column 'timestamp' holds"):
        TableReader("").read(tmp_path)


def test_surrogates_in_parquet(tmp_path: Path) -> None:
    titles = pa.array([b"fine", b"half \xed\xa0\xbd"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"user_id": ["u"], "item_id": [1]}), tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": [1, 2], "title": titles}), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"items\.parquet, row 2: column 'title' holds text that is not valid utf-8"):
        TableReader("").read(tmp_path)


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., TableReader]:
    """A reader of two Parquet tables: three interactions of one user, and three items; columns may be given."""

    def write(items: dict | None = None, **interactions: object) -> TableReader:
        rows = {"user_id": ["u"] * 3, "item_id": [1, 2, 3], "timestamp": [3, 2, 1], **interactions}
        pq.write_table(pa.table(rows), tmp_path / "interactions.parquet")
        named = {"item_id": [1, 2, 3], "title": ["A", "B", "C"], **(items or {})}
        pq.write_table(pa.table(named), tmp_path / "items.parquet")
        return TableReader(str(tmp_path), text_columns=[name for name in named if name not in ("item_id", "title")])

    return write


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"user_id": [1.5, 2, 3]}, r"interactions\.parquet: column 'user_id' holds double, but ids must be"),
        ({"timestamp": [True, False, True]}, r"interactions\.parquet: column 'timestamp' holds bool, but must be a number"),
        ({"timestamp": ["3", "2", "soon"]}, r"interactions\.parquet, row 3: column 'timestamp' holds 'soon', .*no ISO time"),
        ({"timestamp": ["3", "", "2014-07-23"]}, r"row 3: column 'timestamp' holds '2014-07-23', .*not written like"),
        ({"items": {"item_id": [True, False, True]}}, r"items\.parquet: column 'item_id' holds bool"),
        ({"items": {"title": [b"A", b"B", b"\xff"]}}, r"items\.parquet, row 3: column 'title' holds bytes .*not valid utf-8"),
        ({"items": {"tags": [[b"a"], [None, b"\xff"], None]}}, r"items\.parquet, row 2: column 'tags' holds bytes"),
    ],
)  # fmt: skip
def test_cells_in_parquet_that_cannot_be_used(write_parquet, columns: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        write_parquet(**columns).read(None)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array(["Toy", None, "Äpfel"], pa.string_view()), ["Toy", "untitled 2", "Äpfel"]),
        (pa.array([b"Toy", None, "Äpfel".encode()]), ["Toy", "untitled 2", "Äpfel"]),
        (pa.array([b"Toy", None, b"Toy"], pa.large_binary()).dictionary_encode(), ["Toy", "untitled 2", "Toy"]),
        (pa.array([1995.0, float("nan"), 1995.5]), ["1995", "untitled 2", "1995.5"]),
        (pa.array([1995, None, 7]), ["1995", "untitled 2", "7"]),
        (pa.array([["x", None], [], ["y", "z", ""]]), ["x", "untitled 2", "y, z,"]),
        (pa.array([[b"x", None, b"y"], None, [b"z"]]), ["x, y", "untitled 2", "z"]),
        (pa.array([[1995.0, float("nan")], None, [0.5, 2.0]]), ["1995", "untitled 2", "0.5, 2"]),
        (pa.array([1e300, None, float("inf")]), ["1e+300", "untitled 2", "inf"]),
    ],
)
def test_cells_of_other_types_in_parquet_are_written_as_a_person_would(
    write_parquet, column: pa.Array, told: list[str]
) -> None:
    domain = build_domain(write_parquet({"title": column}).read(None), "x", PreprocessSettings(k_core=0))
    assert domain.titles[1:] == told
    domain = build_domain(write_parquet({"more": column}).read(None), "x", PreprocessSettings(k_core=0))
    said = ["" if text.startswith("untitled") else f". {text}" for text in told]
    assert domain.texts[1:] == [f"{title}{text}" for title, text in zip("ABC", said, strict=True)]


@pytest.mark.parametrize(
    "times",
    [
        ["3", "", "1"],
        ["3.5", None, "1.25"],
        ["2014-07-24", None, "2014-07-23"],
        ["2014-07-23T00:00:01.25", "", "2014-07-23T00:00:00"],
        ["2014-07-23T02:00:01+02:00", "", "2014-07-23T00:00:00Z"],
    ],
)
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_times_written_as_text_in_parquet_are_those_of_a_csv(
    write_parquet, write_tables, times: list, kind: pa.DataType
) -> None:
    written = write_parquet(timestamp=pa.array(times).cast(kind)).read(None).interactions.column("order")
    rows = "".join(f"u,{n},{time or ''}\n" for n, time in enumerate(times))
    plain = TableReader(str(write_tables(f"user_id,item_id,timestamp\n{rows}".encode(), ITEMS))).read(None)
    assert written.type == plain.interactions.column("order").type
    assert written.equals(plain.interactions.column("order"))


def test_ids_in_a_string_view(write_parquet) -> None:
    users = pa.array(["b", "a", "b"], pa.string_view())
    domain = build_domain(write_parquet(user_id=users).read(None), "x", PreprocessSettings(k_core=0))
    assert domain.user_keys == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"text_columns": ["title", "brand"]},
            "text_columns .* names column 'title', which title_column names already",
        ),
        ({"text_columns": ["brand", "brand"]}, "text_columns .* names column 'brand', a second time"),
        ({"order_column": "user_id"}, "order_column .* names column 'user_id', which user_column names already"),
        ({"order_column": "item_id"}, "order_column .* names column 'item_id', which item_column names already"),
    ],
)
def test_a_column_named_twice_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TableReader("shop", **settings)


def test_columns_that_are_called_like_parts_of_a_table(write_tables) -> None:
    folder = write_tables(
        b"timestamp,item_id,pos\nu,a,1\nu,b,0\n", b"item_id,name,title,item\na,Alpha,Dr,one\nb,Beta,Ms,two\n"
    )
    reader = TableReader(str(folder), user_column="timestamp", title_column="name", text_columns=["title", "item"])
    domain = build_domain(reader.read(None), "x", PreprocessSettings(k_core=0))
    assert domain.texts[1:] == ["Alpha. Dr. one", "Beta. Ms. two"]
    assert domain.items.tolist() == [2, 1]


def test_missing_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        TableReader("nowhere").read(tmp_path)


def test_a_relative_folder_that_is_not_there_tells_where_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for settings in ({}, {"interactions": "of_the_shop.csv"}):
        reader = TableReader("shop", **settings)
        with pytest.raises(
            DataError, match=r"^data/shop.*a relative data root starts from the folder that the command is run"
        ):
            reader.read(Path("data"))
        for root in (tmp_path / "data", Path("here")):
            reader = TableReader("", **settings)
            with pytest.raises(DataError, match="; check the data root"):
                reader.read(root)


def test_an_empty_id_is_no_user_whatever_the_file(tmp_path: Path) -> None:
    """A CSV has no other way to leave one out; in Parquet it would be one user who bought for all of them."""
    rows = {"user_id": ["a", "", "b", None], "item_id": ["x", "x", "", "y"], "timestamp": [1, 2, 3, 4]}
    for name in ("csv", "parquet"):
        (tmp_path / name).mkdir()
        items = pa.table({"item_id": ["x", "y"], "title": ["X", "Y"]})
        if name == "csv":
            pacsv.write_csv(pa.table(rows), tmp_path / name / "interactions.csv")
            pacsv.write_csv(items, tmp_path / name / "items.csv")
        else:
            pq.write_table(pa.table(rows), tmp_path / name / "interactions.parquet")
            pq.write_table(items, tmp_path / name / "items.parquet")
        read = TableReader(folder=name).read(tmp_path).interactions
        users, bought = (dictionary_ids(read.column(key), key).to_pylist() for key in ("user", "item"))
        assert (users, bought) == (["a", None, "b", None], ["x", "x", None, "y"]), name


def test_ids_that_are_in_a_dictionary_twice_are_one() -> None:
    twice = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), pa.array(["a", "a", None]))
    ids = dictionary_ids(pa.chunked_array([twice]), "user")
    assert (ids.to_pylist(), ids.dictionary.to_pylist()) == (["a", "a", None], ["a"])
