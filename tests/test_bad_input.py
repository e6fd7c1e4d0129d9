"""Bad input through the command line: a clear result, or one sentence and exit code 2, and nothing half-written (T31)."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_sfubm.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
ENCODER, DOMAIN = ROOT / "configs/encoder/sasrec.yaml", ROOT / "configs/domain/folder.yaml"
Tables = dict[str, list[str]]


def good(users: int = 30, items: int = 40) -> Tables:
    """Lines of both tables; every user has 8 of the items."""
    interactions = ["user_id,item_id,timestamp"]
    interactions += [f"u{u},i{(u * 3 + p * 7) % items},{100 * u + p}" for u in range(users) for p in range(8)]
    return {"interactions": interactions, "items": ["item_id,title", *(f"i{i},Title number {i}" for i in range(items))]}


def write(tables: Tables, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, lines in tables.items():
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(folder: Path, *extra: str) -> None:
    text = "lightning_sfubm.datamodules.synthetic.HashingTextEncoder"
    arguments = ["fit", "--config", str(ENCODER), "--config", str(DOMAIN), "--data.root", str(folder)]
    arguments += ["--data.init_args.text_encoder", text, "--data.init_args.k_core", "0"]
    arguments += ["--trainer.default_root_dir", str(folder / "run"), "--trainer.max_epochs", "1"]
    arguments += ["--trainer.min_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    main([*arguments, *extra])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def change(table: str, line: int, text: str) -> Callable[[Tables], None]:
    def edit(tables: Tables) -> None:
        tables[table][line] = text

    return edit


def few_items(tables: Tables) -> None:
    tables.update(good(items=12))


def equal_titles(tables: Tables) -> None:
    tables["items"] = [tables["items"][0], *(line.split(",")[0] + ",Same" for line in tables["items"][1:])]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change("interactions", 0, "user_id,thing,timestamp"), ["interactions.csv", "item_id"]),
        (change("items", 0, "item_id,name"), ["items.csv", "title"]),
        (change("interactions", 5, "u0,i3,yesterday-ish"), ["interactions.csv", "6"]),
        (change("interactions", 7, "u0,i3"), ["interactions.csv", "8"]),
        (few_items, ["12", "20"]),
        (equal_titles, ["titles"]),
    ],
)
def test_a_broken_table_is_one_sentence_that_names_the_place(
    edit: Callable[[Tables], None], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = good()
    edit(tables)
    write(tables, place)
    with pytest.raises(SystemExit) as exit:
        run(place)
    assert exit.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lightning-sfubm: error:")
    for word in words:
        assert word in message
    left = [p for p in (place.parent / "cache").rglob("*") if p.is_file() and (".tmp" in p.name or "partial" in p.name)]
    assert left == []
    assert [p for p in (place / "run").rglob("*") if p.is_file()] == []


def test_a_place_that_has_seen_broken_input_is_as_good_as_new(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken file is put right and the same command given again: what was cached before it failed does no harm."""
    broken = good()
    equal_titles(broken)
    write(broken, place)
    with pytest.raises(SystemExit):
        run(place)
    assert list((place.parent / "cache").rglob("*.arrow"))  # the tables are whole, and kept
    shutil.rmtree(place)
    write(good(), place)
    run(place)
    monkeypatch.setenv("SFUBM_CACHE", str(place.parent / "new cache"))
    shutil.move(place / "run", place.parent / "again")
    run(place)
    again, new = (sorted(folder.rglob("*.ckpt")) for folder in (place.parent / "again", place / "run"))
    assert [file.name for file in again] == [file.name for file in new] != []
    for files in zip(again, new, strict=True):
        first, second = (torch.load(file, weights_only=True)["state_dict"] for file in files)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_broken_gzip_and_missing_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(good(), place)
    whole = gzip.compress((place / "interactions.csv").read_bytes())
    (place / "interactions.csv").unlink()
    (place / "interactions.csv.gz").write_bytes(whole[: len(whole) // 2])
    for folder, word in ((place, "interactions.csv.gz"), (place / "nowhere", "nowhere")):
        with pytest.raises(SystemExit):
            run(folder)
        assert word in capsys.readouterr().err.strip().splitlines()[-1]


def odd_titles(tables: Tables) -> None:
    tables["items"][1] = "i0,"
    tables["items"][2] = "i1," + "long " * 400
    tables["items"][3] = "i2,東京物語"
    tables["items"][4] = "i3,Ночной дозор"
    tables["items"][5] = "i4,🙂"
    tables["interactions"] += ["lonely,i5,1", "ghost,not-in-the-items,5", "u0,i6,1"]


def test_odd_titles_lonely_users_and_unknown_items_are_counted_not_fatal(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = good()
    odd_titles(tables)
    write(tables, place)
    run(place)
    assert list((place / "run").rglob("*.ckpt"))


def test_users_of_three_interactions_leave_nothing_to_train_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Validation and test take two of them, and what would be predicted by the first is among these."""
    tables = good()
    header, *lines = tables["interactions"]
    tables["interactions"] = [
        header,
        *(line for line in lines if line[-1] in "012"),
    ]  # timestamps end with the position
    write(tables, place)
    with pytest.raises(SystemExit) as exit:
        run(place)
    assert exit.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "SequentialRecommender: there is no batch to train on" in said
    assert "users of more interactions than the three" in said
    assert not list((place / "run").rglob("*.ckpt"))


def test_a_missing_model_folder_names_the_ways_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(good(), place)
    encoder = "--data.init_args.text_encoder"
    with pytest.raises(SystemExit) as exit:
        run(
            place, encoder, "lightning_sfubm.datamodules.text.HFTextEncoder", f"{encoder}.init_args.model", "./no/model"
        )
    assert exit.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no/model" in message
    assert "folder" in message
    assert "hub" in message


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_run_folder_that_cannot_be_is_one_sentence(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the data are prepared."""
    write(good(), place)
    (place / "file").write_text("text")
    arguments = [
        "--config",
        str(ENCODER),
        "--config",
        str(DOMAIN),
        "--data.root",
        str(place),
        "--trainer.accelerator",
        "cpu",
    ]
    if command != "fit":
        arguments += ["--ckpt_path", "some.ckpt"]
    with pytest.raises(SystemExit) as exit:
        main([command, *arguments, "--trainer.default_root_dir", str(place / "file" / "run")])
    assert exit.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be written into (Not a directory); give another folder by --trainer.default_root_dir" in message
    assert not list((place.parent / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("federated", [False, True])
@pytest.mark.parametrize("cache", ["file", "/proc/cache"])
def test_a_cache_that_cannot_be_is_one_sentence(
    cache: str, federated: bool, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(good(), place)
    (place.parent / "file").write_text("text")
    monkeypatch.setenv("SFUBM_CACHE", cache if cache.startswith("/") else str(place.parent / cache))
    config = ["--config", str(ROOT / "configs/debug/synthetic.yaml")]
    if not federated:
        text = "lightning_sfubm.datamodules.synthetic.HashingTextEncoder"
        config = ["--config", str(ENCODER), "--config", str(DOMAIN), "--data.root", str(place)]
        config += ["--data.init_args.text_encoder", text]
    with pytest.raises(SystemExit) as exit:
        main(["fit", *config, "--trainer.default_root_dir", "run", "--trainer.accelerator", "cpu"])
    assert exit.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lightning-sfubm: error: ")
    assert f"{cache}/domains/" in message
    assert message.endswith("set SFUBM_CACHE to a folder that can be written into")
