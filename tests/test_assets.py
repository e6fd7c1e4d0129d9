"""Assets: real pip on a local wheel, no network."""

import json
import multiprocessing
import zipfile

import pytest

from lightning_sfubm import assets
from lightning_sfubm.assets import IndexPackage
from lightning_sfubm.errors import AssetError, DataError
from lightning_sfubm.federated.flower_silo import write_commands


def write_wheel(folder, members, name="sfubm_toy"):
    """A valid wheel with the given members."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that holds one wheel, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = write_wheel(folder, {"toy/a.inter": "1\t2\n", "toy/secret.txt": "no"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    package = IndexPackage("sfubm-toy==1.0", assets.sha256_of(wheel), {"toy/a.inter": "a.inter"})
    monkeypatch.setitem(assets.DATA, "toy", package)
    return package


def no_debris(tmp_path):
    return [path.name for path in (tmp_path / "cache").rglob("*") if ".partial" in path.name] == []


def test_takes_only_the_wanted_members_and_notes_their_digests(index, tmp_path):
    entry = assets.resolve_data("toy")
    assert sorted(path.name for path in entry.iterdir()) == ["a.inter", assets.MANIFEST]
    manifest = json.loads((entry / assets.MANIFEST).read_text())
    assert manifest["wheel_sha256"] == index.sha256
    assert manifest["files"] == {"a.inter": assets.sha256_of(entry / "a.inter")}
    assets.verify(entry)
    assert no_debris(tmp_path)


def test_second_call_uses_the_cache(index, monkeypatch):
    entry = assets.resolve_data("toy")
    monkeypatch.setattr(assets, "_download", lambda *a: pytest.fail("fetched again"))
    assert assets.resolve_data("toy") == entry


def test_changed_file_is_found(index):
    entry = assets.resolve_data("toy")
    (entry / "a.inter").write_text("9")
    with pytest.raises(AssetError, match=r"a\.inter is missing or was changed"):
        assets.verify(entry)


def test_an_entry_without_its_manifest_is_made_again(index, tmp_path):
    entry = assets.resolve_data("toy")
    (entry / assets.MANIFEST).unlink()
    (entry / "a.inter").write_text("half of it")
    assert assets.resolve_data("toy") == entry
    assets.verify(entry)
    assert no_debris(tmp_path)


def test_files_that_their_writer_kept_to_itself_can_be_shared(index, monkeypatch):
    unpack = assets._unpack

    def private(wheel, package, folder):
        unpack(wheel, package, folder)
        (folder / "a.inter").chmod(0o600)

    monkeypatch.setattr(assets, "_unpack", private)
    assert (assets.resolve_data("toy") / "a.inter").stat().st_mode & 0o777 == 0o644


def test_wrong_digest_is_refused_and_leaves_nothing(index, tmp_path, monkeypatch):
    monkeypatch.setitem(assets.DATA, "toy", IndexPackage("sfubm-toy==1.0", "0" * 64, index.members))
    with pytest.raises(AssetError, match=r"sha256 .* instead of 0000"):
        assets.resolve_data("toy")
    assert no_debris(tmp_path)
    assert not list((tmp_path / "cache" / "data").glob("toy-*/*"))


def test_missing_member_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setitem(assets.DATA, "toy", IndexPackage("sfubm-toy==1.0", index.sha256, {"toy/b.inter": "b.inter"}))
    with pytest.raises(AssetError, match=r"holds no toy/b\.inter"):
        assets.resolve_data("toy")
    assert no_debris(tmp_path)


def test_unreachable_package_names_the_three_ways_out(index, monkeypatch):
    monkeypatch.setitem(assets.DATA, "toy", IndexPackage("sfubm-absent==1.0", "0" * 64, {}))
    with pytest.raises(AssetError, match=r"local folder.*hub id.*package index"):
        assets.resolve_data("toy")


def test_local_folder_hub_failure_and_unknown_name(tmp_path, monkeypatch):
    with pytest.raises(AssetError, match=r"holds no config\.json"):
        assets.resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match="holds no tokenizer"):
        assets.resolve_model(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert assets.resolve_model(str(tmp_path)) == tmp_path
    assert assets.resolve_data(str(tmp_path)) == tmp_path
    with pytest.raises(AssetError, match=r"neither a folder, a hub id"):
        assets.resolve_model("nonsense")
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(AssetError, match=r"org/model.*hub \(ConnectionError\).*local folder"):
        assets.resolve_model("org/model")


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.delenv("SFUBM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "lightning-sfubm"


def _race(package, queue):
    assets.DATA["toy"] = package
    queue.put(str(assets.resolve_data("toy")))


def test_two_processes_make_one_entry(index, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_race, args=(index, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(found) == 1
    assert no_debris(tmp_path)


@pytest.mark.models
def test_embedded_defaults_resolve_and_verify():
    for name in ("smollm2-135m", "minilm"):
        entry = assets.resolve_model(name)
        assets.verify(entry)
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in entry.iterdir()}
    entry = assets.resolve_data("ml-100k")
    assert {"ml-100k.inter", "ml-100k.item", "ml-100k.user"} < {path.name for path in entry.iterdir()}
    assert len((entry / "ml-100k.inter").read_text().splitlines()) == 100_001


def test_a_cache_that_takes_no_commands_of_a_silo_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/flower-silo/.* cannot be read or written .* set SFUBM_CACHE"):
        write_commands()
