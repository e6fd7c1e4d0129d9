"""Frozen text encoder: item texts to unit vectors, computed once and cached by content."""

import fcntl
import hashlib
import math
import os
import secrets
import zipfile
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from lightning_sfubm.access import own_cache
from lightning_sfubm.assets import cache_dir, model_parts, resolve_model
from lightning_sfubm.contracts import TextEncoder
from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.precision import has_fast_bf16


class HFTextEncoder:
    """Mean-pooled, normalised last hidden states of a transformers encoder (sentence-transformers' recipe).

    Nothing is loaded before the first call that needs weights. Texts are sorted by length and encoded in batches of
    a token budget, so that little is spent on padding. An empty (or blank) text has no meaning to compare: it gets
    the zero vector, which has cosine 0 with everything, rather than the vector of "nothing" [choice].

    Args:
        model: an embedded default (``minilm``), a local folder or a hub id.
        max_tokens: longer texts are cut there and counted in :attr:`truncated`.
        batch_tokens: tokens of a batch, padding included; by default 4,096 on CUDA and 1,536 on a CPU, whose caches do not
            hold the activations of more (.86 of the time on a CPU with AMX). Vectors hang on it by rounding only.
        precision: ``"32"``, ``"bf16"`` (autocast), or ``"auto"``: bf16 on CUDA and on CPUs with bf16 instructions
            (2.8 times the speed there at a largest difference of 1.4e-3 on unit vectors), else 32.
        layers: 1, or how many of the last layers are pooled, each into a unit vector of its own. A text's vector is then
            their concatenation, oldest layer first and divided by sqrt(layers): a unit vector again, whose cosines are the
            mean of the layers' cosines.

    Attributes:
        truncated: number of texts cut so far.

    Example:
        >>> vectors = HFTextEncoder("minilm").encode(["Toy Story (1995)", "GoldenEye"])   # (2, 384), unit rows
    """

    def __init__(
        self,
        model: str = "minilm",
        max_tokens: int = 128,
        batch_tokens: int | None = None,
        precision: str = "auto",
        layers: int = 1,
    ) -> None:
        if precision not in ("auto", "bf16", "32"):
            raise ConfigError(f"text encoder precision '{precision}' is not one of auto, bf16, 32")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if batch_tokens is None:
            batch_tokens = max(max_tokens, 4096 if self._device.type == "cuda" else 1536)
        if max_tokens < 3 or batch_tokens < max_tokens:
            raise ConfigError(f"need 3 <= max_tokens <= batch_tokens, got {max_tokens} and {batch_tokens}")
        if layers < 1:
            raise ConfigError(f"text encoder layers must be at least 1, not {layers}")
        self.model = model
        self.max_tokens = max_tokens
        self.batch_tokens = batch_tokens
        self.precision = precision
        self.layers = layers
        self.truncated = 0
        self._network: Any = None
        self._tokenizer: Any = None

    def _load(self) -> None:
        if self._network is None:
            from transformers import AutoModel, AutoTokenizer

            folder = resolve_model(self.model)
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(folder)
                # a .bin file is a pickle
                network = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            except (OSError, ValueError, SafetensorError) as error:
                words = " ".join(str(error).split())
                raise ConfigError(f"text encoder '{self.model}' cannot be loaded: {words}") from error
            if network.config.is_encoder_decoder:
                raise ConfigError(f"text encoder '{self.model}' has a decoder too: give a model that encodes alone")
            positions = getattr(network.config, "max_position_embeddings", None)
            if positions is not None and self.max_tokens > positions:
                raise ConfigError(f"max_tokens {self.max_tokens} exceeds the {positions} positions of '{self.model}'")
            available = network.config.num_hidden_layers
            if self.layers > available:
                raise ConfigError(f"layers {self.layers} exceeds the {available} layers of '{self.model}'")
            if self.bf16:
                _cast_once(network)
            self._network = network.to(self._device).eval()  # last: a model that is refused is refused again

    @property
    def bf16(self) -> bool:
        """Whether encoding runs under bf16 autocast."""
        return self.precision == "bf16" or (self.precision == "auto" and has_fast_bf16(self._device))

    @property
    def dim(self) -> int:
        """D, all layers together."""
        self._load()
        return int(self._network.config.hidden_size) * self.layers

    @property
    def fingerprint(self) -> str:
        """Changes whenever the vectors would: model weights, tokenizer, length limit, precision, layers."""
        return self._digest(f" {self.bf16}")

    @property
    def identity(self) -> str:
        """As :attr:`fingerprint`, but for the precision: the same where vectors differ by rounding only."""
        return self._digest("")

    def _digest(self, precision: str) -> str:
        layers = f" layers {self.layers}" if self.layers > 1 else ""  # nothing for 1: older caches stay valid
        digest = hashlib.sha256(f"mean-pool-1 {self.max_tokens}{precision}{layers}".encode())
        for name, content in model_parts(resolve_model(self.model)):
            digest.update(f"{name} {content}".encode())
        return digest.hexdigest()[:24]

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> Tensor:
        """(len(texts), D) float32, unit rows; a blank text gives a zero row."""
        self._load()
        vectors = torch.zeros(len(texts), self.dim)
        rows = [row for row, text in enumerate(texts) if text.strip()]
        if not rows:
            return vectors
        encoded = self._tokenizer([texts[row] for row in rows], truncation=False, verbose=False)["input_ids"]
        lengths = np.minimum([len(ids) for ids in encoded], self.max_tokens)
        self.truncated += sum(len(ids) > self.max_tokens for ids in encoded)
        order = np.argsort(lengths, kind="stable")
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and int(lengths[order[stop]]) * (stop + 1 - start) <= self.batch_tokens:
                stop += 1
            chosen = order[start:stop]
            cut = [self._cut(encoded[index]) for index in chosen]
            vectors[[rows[index] for index in chosen]] = self._pool(cut)
            start = stop
        return vectors

    def _cut(self, ids: list[int]) -> list[int]:
        """Cut the text but keep the closing special token."""
        return ids if len(ids) <= self.max_tokens else ids[: self.max_tokens - 1] + ids[-1:]

    def _pool(self, ids: list[list[int]]) -> Tensor:
        width = max(map(len, ids))
        tokens = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for row, values in enumerate(ids):
            tokens[row, : len(values)] = torch.tensor(values)
            mask[row, : len(values)] = 1
        tokens, mask = tokens.to(self._device), mask.to(self._device)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.bf16):
            output = self._network(input_ids=tokens, attention_mask=mask, output_hidden_states=self.layers > 1)
        weights = mask.unsqueeze(-1).float()
        kept = [output.last_hidden_state] if self.layers == 1 else output.hidden_states[-self.layers :]
        pooled = [F.normalize((states.float() * weights).sum(1) / weights.sum(1), dim=-1) for states in kept]
        return (pooled[0] if self.layers == 1 else torch.cat(pooled, 1) / math.sqrt(self.layers)).cpu()


def _cast_once(network: torch.nn.Module) -> None:
    """Spare autocast its repeated casts; every number stays as it is.

    Autocast casts the weights for each batch anew, and the input of BERT's query, key and value once for each of them.
    The input is cast where these three are all that reads it: ALBERT's attention, for one, adds its input to its output too.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
        children = {name for name, child in module.named_children() if isinstance(child, torch.nn.Linear)}
        if children == {"query", "key", "value"} == {name for name, _ in module.named_children()} - {"dropout"}:
            module.register_forward_pre_hook(_first_in_bf16)


def _first_in_bf16(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].to(torch.bfloat16), *inputs[1:]) if inputs and isinstance(inputs[0], Tensor) else inputs


def encode_cached(
    encoder: TextEncoder, texts: list[str], folder: str | Path | None = None, chunk: int = 2048, progress: bool = True
) -> Tensor:
    """Encode texts, each distinct text at most once per encoder on this machine.

    Vectors are stored in pieces of ``chunk`` texts under names derived from the encoder's fingerprint and the texts
    themselves, each piece written to a temporary file and renamed; an interrupted run continues after the last
    complete piece. A text keeps its vector when other texts come or go, because the cache is keyed by text. Of two processes
    that encode a text at once, the one that stores it first gives the vector to both: the last bits of a vector depend on
    what is encoded beside it.

    Args:
        encoder: any :class:`~lightning_sfubm.contracts.TextEncoder`.
        texts: n texts, duplicates allowed.
        folder: the cache folder; by default ``text/<fingerprint>`` in the product's cache.
        chunk: texts of a piece.
        progress: show a progress bar when more than one piece has to be computed.

    Returns:
        (n, D) float32, unit rows; blank texts give zero rows.

    Raises:
        DataError: if the encoder returns a wrong shape or non-finite values, or the cache is closed to this account.
    """
    store = Path(folder) if folder is not None else cache_dir() / "text" / encoder.fingerprint
    distinct = {_key(text): text for text in texts}
    with own_cache(store):
        store.mkdir(parents=True, exist_ok=True)
        read: set[str] = set()
        known = _read_store(store, distinct.keys(), read)
    missing = [key for key in distinct if key not in known]
    for start in _bar(range(0, len(missing), chunk), progress and len(missing) > chunk):
        keys = missing[start : start + chunk]
        vectors = encoder.encode([distinct[key] for key in keys])
        if vectors.shape != (len(keys), encoder.dim) or not torch.isfinite(vectors).all():
            raise DataError(
                f"the text encoder returned shape {tuple(vectors.shape)} or non-finite values for {len(keys)} texts; "
                f"expected finite ({len(keys)}, {encoder.dim})"
            )
        made = dict(zip(keys, vectors.float().numpy(), strict=True))
        with own_cache(store), _in_turn(store):
            known |= _read_store(store, made.keys(), read)  # what another process has stored meanwhile
            fresh = {key: vector for key, vector in made.items() if key not in known}
            if fresh:
                read.add(_write_piece(store, list(fresh), np.stack(list(fresh.values()))))
        known |= fresh
    if not texts:
        return torch.zeros(0, encoder.dim)
    return torch.from_numpy(np.stack([known[_key(text)] for text in texts]))


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def _in_turn(store: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks; without, two may store a text each, in other last bits."""
    with open(store / ".lock", "a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_store(store: Path, wanted: Set[str], read: set[str]) -> dict[str, np.ndarray]:
    """The cached vectors of the wanted keys: the store may hold many times as many. A damaged piece is deleted.

    Args:
        store: folder of the pieces.
        wanted: keys.
        read: names of pieces to pass over; those that are read are added.
    """
    known: dict[str, np.ndarray] = {}
    for path in sorted(store.glob("*.npz")):
        if path.name in read:
            continue
        read.add(path.name)
        try:
            with np.load(path, allow_pickle=False) as piece:
                keys = piece["keys"].tolist()
                rows = [row for row, key in enumerate(keys) if key in wanted]
                if rows:
                    chosen = piece["vectors"][rows]  # a copy: a view would keep the whole piece
                    known.update(zip([keys[row] for row in rows], chosen, strict=True))
        except FileNotFoundError:  # another process has found it damaged
            continue
        except (ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
    return known


def _write_piece(store: Path, keys: list[str], vectors: np.ndarray) -> str:
    """Write a piece as a whole or not at all; returns its name."""
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:32]
    # A name by chance, as processes in two containers may have one number. Not a file of tempfile's, which no other
    # account could read: what is said of items is no secret.
    partial = store / f".{name}.{secrets.token_hex(8)}.partial"
    try:
        with open(partial, "xb") as file:
            np.savez(file, keys=np.array(keys), vectors=vectors)
        os.replace(partial, store / f"{name}.npz")
    finally:
        partial.unlink(missing_ok=True)
    return f"{name}.npz"


def _bar(steps: range, show: bool) -> Any:
    if not show:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc="Encoding texts", unit="piece")
