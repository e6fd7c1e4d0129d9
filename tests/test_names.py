"""Names that become parts of paths: what would lead elsewhere is refused where it is read."""

from pathlib import Path

import pytest
import torch

from lightning_sfubm.__main__ import main
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.federated_datamodule import FederatedDataModule
from lightning_sfubm.datamodules.synthetic import SyntheticReader
from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.federated.messages import pack, semantics_schema, unpack
from lightning_sfubm.names import path_part
from lightning_sfubm.privacy.secret import client_secret

ROOT = Path(__file__).resolve().parent.parent
BAD = ["../x", "a/b", "/etc", ".", "..", "", "a\0b", "a\nb", "\ud800", "x" * 129, "é" * 65]
UNSEEN = ["a\u00a0b", "a\u200db", "a\u200cb", "a\u200b", "\ufeffa", "a\u202eb", "a\u2028b", "a\u3000b", "a\ue000"]


@pytest.mark.parametrize("name", ["alpha", "drama films", "beauté", "東京", ".x", "a..b", "a\\b", "x" * 128])
def test_a_name_of_a_file_stays_as_it_is(name: str) -> None:
    assert path_part(name, "here") == name


@pytest.mark.parametrize("name", BAD + UNSEEN)
def test_a_name_that_leads_elsewhere_or_nowhere_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^here: the name .* cannot be a file name.* choose one of") as refusal:
        path_part(name, "here")
    assert len(str(refusal.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="secret_dir, client: the name"):
        client_secret(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("name", ["a", "drama films", "beauté", "東京", "😀", *UNSEEN])
def test_what_is_accepted_as_a_name_is_read_from_a_message(name: str) -> None:
    schema = semantics_schema(2)
    payload = pack(schema, name, 0, {"vectors": torch.eye(2)}).payload
    try:
        assert unpack(schema, payload).client == path_part(name, "here")
    except MessageError:
        with pytest.raises(ConfigError):
            path_part(name, "here")


@pytest.mark.parametrize("name", [1, None, True, ["a"]])
def test_a_name_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match=r"here: the name .* is no text; write it in quotes"):
        path_part(name, "here")


@pytest.mark.parametrize("name", ["../x", "a/b", ".", "", "a\0b", *UNSEEN])
def test_a_domain_is_not_called_by_a_path(name: str) -> None:
    with pytest.raises(ConfigError, match=r"a domain \(init_args\.name\): the name"):
        DomainDataModule(name, SyntheticReader(0))
    domain = DomainDataModule("a", SyntheticReader(0))
    domain.name = name
    with pytest.raises(ConfigError, match=r"data\.domains: the name"):
        FederatedDataModule({name: domain})


def test_the_command_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored afterwards: the configuration sets it
    text = (ROOT / "configs/debug/synthetic.yaml").read_text(encoding="utf-8")
    config = tmp_path / "here/synthetic.yaml"
    config.parent.mkdir()
    config.write_text(text.replace("name: alpha", "name: ../alpha").replace("alpha:", '"../alpha":'), encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "run")])
    assert exit.value.code == 2
    assert "the name '../alpha' cannot be a file name" in capsys.readouterr().err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
