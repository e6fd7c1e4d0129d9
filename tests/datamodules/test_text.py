import errno
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_sfubm.datamodules import text as text_module
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder
from lightning_sfubm.datamodules.text import HFTextEncoder, _cast_once, _key, _read_store, encode_cached
from lightning_sfubm.errors import AssetError, ConfigError, DataError
from lightning_sfubm.modules.llm.tiny import write_tiny_text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_tiny_text_encoder(tmp_path_factory.mktemp("encoder")))


class Counting:
    """A text encoder that counts; vectors from a text's length."""

    dim = 3
    fingerprint = "counting"

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        vectors = torch.tensor([[len(t), 1.0, 0.0] for t in texts]).reshape(-1, 3)
        return torch.nn.functional.normalize(vectors, dim=-1)


def test_unit_vectors_in_the_order_of_the_texts(folder):
    encoder = HFTextEncoder(folder, max_tokens=32, batch_tokens=64, precision="32")
    texts = ["abc", "a much longer text", "b", "", "abc", "  "]
    vectors = encoder.encode(texts)
    assert vectors.shape == (6, 32)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors[[0, 1, 2, 4]].norm(dim=-1), torch.ones(4))
    assert vectors[3].abs().sum() == 0
    assert vectors[5].abs().sum() == 0
    for row, text in enumerate(texts):
        torch.testing.assert_close(encoder.encode([text])[0], vectors[row], atol=1e-5, rtol=0)
    assert (vectors[0] - vectors[2]).abs().max() > 1e-2


def test_equals_plain_mean_pooling(folder):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("some title", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state[0].mean(0), dim=-1)
    torch.testing.assert_close(
        HFTextEncoder(folder, precision="32").encode(["some title"])[0], plain, atol=1e-6, rtol=0
    )


def test_casting_once_leaves_every_bit(folder):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("some title", return_tensors="pt")["input_ids"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state[0].float().mean(0), dim=-1)
    encoder = HFTextEncoder(folder, precision="bf16")
    torch.testing.assert_close(encoder.encode(["some title"])[0], plain, atol=1e-6, rtol=0)
    hooked = [module for module in encoder._network.modules() if module._forward_pre_hooks]
    assert len(hooked) == model.config.num_hidden_layers  # the attentions of a BERT


def test_an_input_with_other_readers_is_not_cast():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.dense = (torch.nn.Linear(8, 8) for _ in range(4))

        def forward(self, states):
            return states + self.dense(self.query(states) * self.key(states) * self.value(states))

    attention, states = Attention(), torch.arange(80.0).reshape(10, 8) / 77
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = attention(states)
        _cast_once(attention)
        torch.testing.assert_close(attention(states), plain, atol=0, rtol=0)
        assert (attention(states.to(torch.bfloat16)) - plain).abs().max() > 0  # what a cast would change


def test_long_texts_are_cut_and_counted(folder):
    encoder = HFTextEncoder(folder, max_tokens=10, batch_tokens=64, precision="32")
    vectors = encoder.encode(["abcdefgh" + "x" * 500, "abcdefgh", "z"])
    assert encoder.truncated == 1
    torch.testing.assert_close(vectors[0], vectors[1])  # 8 letters and 2 special tokens fill the limit


def test_vectors_do_not_hang_on_the_size_of_a_batch(folder):
    texts = [f"title number {i}" * (1 + i % 4) for i in range(40)]
    small = HFTextEncoder(folder, max_tokens=64, batch_tokens=64, precision="32").encode(texts)
    torch.testing.assert_close(HFTextEncoder(folder, precision="32").encode(texts), small, atol=1e-5, rtol=0)


def test_a_batch_holds_one_text_of_any_length():
    assert HFTextEncoder(max_tokens=8000).batch_tokens == 8000


def test_bf16_stays_close(folder):
    texts = [f"title number {i}" for i in range(20)]
    exact = HFTextEncoder(folder, precision="32").encode(texts)
    assert (HFTextEncoder(folder, precision="bf16").encode(texts) - exact).abs().max() < 2e-2


def test_fingerprint_changes_with_model_and_settings(folder, tmp_path):
    other = str(write_tiny_text_encoder(tmp_path / "other", seed=1))
    prints = {
        HFTextEncoder(folder, precision="32").fingerprint,
        HFTextEncoder(folder, precision="bf16").fingerprint,
        HFTextEncoder(folder, max_tokens=64, precision="32").fingerprint,
        HFTextEncoder(folder, layers=2, precision="32").fingerprint,
        HFTextEncoder(other, precision="32").fingerprint,
    }
    assert len(prints) == 5
    assert HFTextEncoder(folder, precision="32").fingerprint in prints


def test_a_model_of_which_one_layer_was_tuned_has_vectors_of_its_own(tmp_path: Path) -> None:
    """Wherever in a large file the layer lies."""
    model, prints = write_tiny_text_encoder(tmp_path / "model"), set()
    weights = bytearray(1 << 20)
    for place in (None, 0.3, 0.7):
        if place is not None:
            weights[int(len(weights) * place)] ^= 1
        (model / "more.safetensors").write_bytes(weights)
        prints.add(HFTextEncoder(str(model), precision="32").fingerprint)
    assert len(prints) == 3
    shutil.copytree(model, tmp_path / "copy")
    assert HFTextEncoder(str(tmp_path / "copy"), precision="32").fingerprint in prints


@pytest.mark.parametrize("name", ["spiece.model", "source.spm", "words.tiktoken"])
def test_a_tokenizer_of_another_vocabulary_has_vectors_of_its_own(tmp_path: Path, name: str) -> None:
    model, prints = write_tiny_text_encoder(tmp_path / "model"), []
    for content in (None, b"one", b"two"):
        if content is not None:
            (model / name).write_bytes(content)
        prints.append(HFTextEncoder(str(model), precision="32").fingerprint)
    assert len(set(prints)) == 3


@pytest.mark.parametrize("torn", ["model.safetensors", "config.json"])
def test_a_torn_model_is_one_sentence(tmp_path: Path, torn: str) -> None:
    model = write_tiny_text_encoder(tmp_path / "model")
    (model / torn).write_bytes((model / torn).read_bytes()[:40])
    with pytest.raises(ConfigError, match=r"text encoder '.*' cannot be loaded: "):
        HFTextEncoder(str(model), precision="32").encode(["a title"])


def test_a_refused_model_is_refused_again(folder):
    encoder = HFTextEncoder(folder, layers=99, precision="32")
    for _ in range(2):
        with pytest.raises(ConfigError, match="layers 99 exceeds"):
            encoder.encode(["a title"])


def test_bad_settings():
    with pytest.raises(ConfigError, match="precision 'half'"):
        HFTextEncoder(precision="half")
    with pytest.raises(ConfigError, match="max_tokens"):
        HFTextEncoder(max_tokens=100, batch_tokens=50)
    with pytest.raises(ConfigError, match="layers must be at least 1, not 0"):
        HFTextEncoder(layers=0)


def test_limit_beyond_the_models_positions(folder):
    with pytest.raises(ConfigError, match="exceeds the 512 positions"):
        HFTextEncoder(folder, max_tokens=600).encode(["x"])


def test_layers_beyond_those_of_the_model(folder):
    with pytest.raises(ConfigError, match="layers 9 exceeds the"):
        HFTextEncoder(folder, layers=9).encode(["x"])


def test_several_layers_side_by_side(folder, tmp_path):
    """Each layer pooled on its own, the last one as without the setting; the whole row has length 1."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    torch.manual_seed(0)
    # Weights large enough that the layers differ by far more than rounding.
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=3, initializer_range=0.2)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    folder = str(tmp_path)
    encoder = HFTextEncoder(folder, layers=2, precision="32")
    assert encoder.dim == 64
    vectors = encoder.encode(["some title", "another, longer title", " "])
    assert vectors.shape == (3, 64)
    torch.testing.assert_close(vectors.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))
    last = HFTextEncoder(folder, precision="32").encode(["some title", "another, longer title"])
    torch.testing.assert_close(vectors[:2, 32:] * 2**0.5, last)

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        states = model(tokenizer("some title", return_tensors="pt")["input_ids"], output_hidden_states=True)
    plain = torch.nn.functional.normalize(states.hidden_states[-2][0].mean(0), dim=-1)
    torch.testing.assert_close(vectors[0, :32] * 2**0.5, plain, atol=1e-6, rtol=0)
    assert (plain - last[0]).abs().max() > 1e-2


def test_cache_encodes_each_distinct_text_once(tmp_path):
    encoder = Counting()
    first = encode_cached(encoder, ["a", "bb", "a"], tmp_path, chunk=1)
    assert encoder.seen == ["a", "bb"]
    assert torch.equal(first[0], first[2])
    again = encode_cached(encoder, ["bb", "ccc", "a"], tmp_path)
    assert encoder.seen == ["a", "bb", "ccc"]
    assert torch.equal(again[[0, 2]], first[[1, 0]])
    assert encode_cached(encoder, [], tmp_path).shape == (0, 3)


def test_interrupted_run_continues_and_torn_piece_is_replaced(tmp_path):
    class Failing(Counting):
        def encode(self, texts):
            if "ccc" in texts:
                raise KeyboardInterrupt
            return super().encode(texts)

    failing = Failing()
    with pytest.raises(KeyboardInterrupt):
        encode_cached(failing, ["a", "bb", "ccc"], tmp_path, chunk=1)
    assert not list(tmp_path.glob(".*partial"))
    encoder = Counting()
    encode_cached(encoder, ["a", "bb", "ccc"], tmp_path, chunk=1)
    assert encoder.seen == ["ccc"]
    piece = next(iter(sorted(tmp_path.glob("*.npz"))))
    piece.write_bytes(piece.read_bytes()[:40])
    repaired = Counting()
    vectors = encode_cached(repaired, ["a", "bb", "ccc"], tmp_path)
    assert len(repaired.seen) == 1
    np.testing.assert_allclose(vectors.numpy(), Counting().encode(["a", "bb", "ccc"]).numpy())


def test_only_what_is_wanted_is_kept_of_a_store(tmp_path):
    encode_cached(Counting(), [f"text {n}" for n in range(100)], tmp_path, chunk=10)
    known = _read_store(tmp_path, {_key("text 3"), _key("text 77"), _key("new")}, set())
    assert known.keys() == {_key("text 3"), _key("text 77")}
    assert all(vector.base is None or len(vector.base) == 1 for vector in known.values())  # no view of a whole piece


def test_two_writers_with_one_process_number(tmp_path, monkeypatch):
    """Both write the same piece, where nothing can be locked: neither finds its file gone or torn, and others may read it."""
    monkeypatch.setattr(text_module, "_in_turn", lambda store: nullcontext())
    saved = np.savez

    def meanwhile(file, **arrays):
        monkeypatch.setattr(np, "savez", saved)
        encode_cached(Counting(), ["a", "bb"], tmp_path)
        assert os.path.exists(file.name)
        saved(file, **arrays)

    monkeypatch.setattr(np, "savez", meanwhile)
    encode_cached(Counting(), ["a", "bb"], tmp_path)
    (piece,) = tmp_path.glob("*.npz")
    plain = tmp_path / "plain"
    plain.touch()
    assert piece.stat().st_mode == plain.stat().st_mode


def test_of_two_processes_that_encode_a_text_the_first_to_store_it_gives_the_vector(tmp_path):
    """Last bits depend on what is encoded beside a text, so that a run would see other vectors than the next one."""

    class Company(Counting):
        def encode(self, texts):
            return super().encode(texts) + 1e-3 * len(texts)

    class Meanwhile(Company):
        def encode(self, texts):
            self.other = encode_cached(Company(), ["a"], tmp_path)  # another process, between this one's two looks
            return super().encode(texts)

    encoder = Meanwhile()
    vectors = encode_cached(encoder, ["a", "bb", "ccc"], tmp_path)
    assert torch.equal(vectors[:1], encoder.other)
    again = Company()
    assert torch.equal(encode_cached(again, ["a", "bb", "ccc"], tmp_path), vectors)
    assert again.seen == []


def test_a_piece_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch):
    encode_cached(Counting(), ["a"], tmp_path)

    def failing(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "load", failing)
    with pytest.raises(DataError, match="Too many open files"):
        encode_cached(Counting(), ["a"], tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_a_store_of_another_account_is_neither_deleted_nor_called_damaged(tmp_path, closed):
    encode_cached(Counting(), ["a"], tmp_path)
    closed(tmp_path)
    with pytest.raises(DataError, match="is closed to this account; set SFUBM_CACHE"):
        encode_cached(Counting(), ["a"], tmp_path)
    assert list(tmp_path.glob("*.npz"))


def test_broken_encoder_is_named(tmp_path):
    class Broken(Counting):
        def encode(self, texts):
            return torch.full((len(texts), 3), float("nan"))

    with pytest.raises(DataError, match="non-finite"):
        encode_cached(Broken(), ["a"], tmp_path)


@pytest.mark.models
def test_minilm_knows_what_is_alike():
    vectors = HFTextEncoder("minilm", precision="32").encode(["Star Wars", "The Empire Strikes Back", "Bread Recipes"])
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1


def test_a_folder_without_a_tokenizer_is_refused(folder: str, tmp_path: Path) -> None:
    """transformers would make one up that knows no word, and all texts would look alike."""
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "vocab*"))
    with pytest.raises(AssetError, match="holds no tokenizer; save it there too"):
        HFTextEncoder(str(bare)).encode(["alien"])


def test_a_cache_that_has_no_place_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        DataError, match=r"file/text/.* cannot be read or written \(Not a directory\).* set SFUBM_CACHE"
    ):
        encode_cached(HashingTextEncoder(dim=8), ["one"])
