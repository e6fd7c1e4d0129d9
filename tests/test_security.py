"""Nothing that outside data could use to run code: looked for in the source, and tried (T3, T31)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lightning_sfubm", "modules", "datamodules", "callbacks", "benchmarks")
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
NETWORK = {"requests", "urllib.request", "urllib3", "http.client", "httpx", "aiohttp", "ftplib", "socket", "torch.hub"}
CALLS = {
    "eval": "evaluates text",
    "exec": "evaluates text",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
    "subprocess.getoutput": "goes through a shell",
    "subprocess.getstatusoutput": "goes through a shell",
    "tempfile.mktemp": "names a file that another process can make first",
    "hashlib.md5": "is broken",
    "hashlib.sha1": "is broken",
    "yaml.unsafe_load": "builds any object",
    "yaml.unsafe_load_all": "builds any object",
    "yaml.full_load": "builds more than plain data",
    "pandas.read_pickle": "reads pickles",
    "numpy.fromregex": "reads pickles",
}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}


class Checker(ast.NodeVisitor):
    """Collects what is forbidden, with its line. Names are followed through imports and their aliases."""

    def __init__(self, network: bool) -> None:
        self.network, self.names, self.found = network, dict[str, str](), list[tuple[int, str]]()

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imported(node, alias.name)
            self.names[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            dotted = f"{node.module}.{alias.name}"
            self.imported(node, dotted)
            self.names[alias.asname or alias.name] = dotted

    def imported(self, node: ast.stmt, dotted: str) -> None:
        if dotted.split(".")[0] in MODULES:
            self.note(node, f"{dotted} reads pickles")
        if not self.network and any(f"{dotted}.".startswith(f"{name}.") for name in NETWORK):
            self.note(node, f"{dotted} reaches the network")

    def visit_Call(self, node: ast.Call) -> None:
        name = self.dotted(node.func)
        given = {word.arg: word.value for word in node.keywords}
        if name in CALLS:
            self.note(node, f"{name} {CALLS[name]}")
        if name == "__import__" or name == "importlib.import_module":
            self.dynamic(node)
        last = name.rsplit(".", 1)[-1]
        if (name == "torch.load" or last == "load_from_checkpoint") and not is_constant(
            given.get("weights_only"), True
        ):
            self.note(node, f"{last} without weights_only=True reads pickles")
        if name == "numpy.load" and not is_constant(given.get("allow_pickle", ast.Constant(False)), False):
            self.note(node, "numpy.load with allow_pickle reads pickles")
        if name in ("yaml.load", "yaml.load_all"):
            loader = given.get("Loader", node.args[1] if len(node.args) > 1 else None)
            if loader is None or self.dotted(loader) not in SAFE_LOADERS:
                self.note(node, f"{name} without a safe loader builds any object")
        if not is_constant(given.get("shell", ast.Constant(False)), False):
            self.note(node, "shell=True goes through a shell")
        if not is_constant(given.get("trust_remote_code", ast.Constant(False)), False):
            self.note(node, "trust_remote_code runs a model's own code")
        if name == "hashlib.new" and not (node.args and is_constant(node.args[0], "sha256")):
            self.note(node, "hashlib.new of another hash than sha256")
        reaches = any(f"{name}.".startswith(f"{module}.") for module in NETWORK)
        if reaches and not self.network and self.is_imported(node.func):  # a variable may be called ``requests``
            self.note(node, f"{name} reaches the network")
        self.generic_visit(node)

    def dynamic(self, node: ast.Call) -> None:
        if node.args and isinstance(node.args[0], ast.Constant) and str(node.args[0].value) in MODULES:
            self.note(node, f"import of {node.args[0].value} reads pickles")

    def dotted(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        return f"{self.dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""

    def is_imported(self, node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self.names

    def note(self, node: ast.AST, words: str) -> None:
        self.found.append((getattr(node, "lineno", 0), words))


def is_constant(node: ast.expr | None, value: object) -> bool:
    return (isinstance(node, ast.Constant) and node.value is value) or (
        isinstance(node, ast.Constant) and isinstance(value, str) and node.value == value
    )


def faults(source: str, network: bool = False) -> list[str]:
    checker = Checker(network)
    checker.visit(ast.parse(source))
    return [f"line {line}: {words}" for line, words in checker.found]


def test_no_source_reads_pickles_evaluates_text_or_reaches_the_network() -> None:
    files = {path.resolve() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert len(files) > 150
    found = []
    for path in sorted(files):
        for fault in faults(path.read_text(encoding="utf-8"), network=path.name == "assets.py"):
            found.append(f"{path.relative_to(ROOT)}, {fault}")
    assert found == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from pickle import loads", "pickle"),
        ("import dill as safe", "dill"),
        ("import joblib", "joblib"),
        ("import shelve", "shelve"),
        ("import marshal", "marshal"),
        ("__import__('pickle')", "pickle"),
        ("import importlib as i\ni.import_module('dill')", "dill"),
        ("import torch\ntorch.load(p)", "weights_only"),
        ("import torch as t\nt.load(p, weights_only=False)", "weights_only"),
        ("from torch import load as read\nread(p, 'cpu')", "weights_only"),
        ("import torch\ntorch.load(p, weights_only=flag)", "weights_only"),
        ("M.load_from_checkpoint(p)", "weights_only"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "allow_pickle"),
        ("from numpy import load\nload(p, allow_pickle=x)", "allow_pickle"),
        ("import pandas as pd\npd.read_pickle(p)", "read_pickle"),
        ("import yaml\nyaml.load(t)", "safe loader"),
        ("import yaml\nyaml.load(t, Loader=yaml.FullLoader)", "safe loader"),
        ("import yaml\nyaml.load(t, yaml.UnsafeLoader)", "safe loader"),
        ("import yaml\nyaml.unsafe_load(t)", "unsafe_load"),
        ("from yaml import full_load\nfull_load(t)", "full_load"),
        ("eval('1')", "eval"),
        ("exec(code)", "exec"),
        ("import os\nos.system('ls')", "shell"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell"),
        ("from subprocess import run\nrun(c, shell=flag)", "shell"),
        ("import tempfile\ntempfile.mktemp()", "mktemp"),
        ("import requests", "network"),
        ("from urllib.request import urlopen", "network"),
        ("from urllib import request", "network"),
        ("import torch\ntorch.hub.load('a', 'b')", "network"),
        ("import hashlib\nhashlib.md5(b'')", "md5"),
        ("from hashlib import sha1\nsha1(b'')", "sha1"),
        ("import hashlib\nhashlib.new('md5')", "hashlib.new"),
        ("A.from_pretrained(p, trust_remote_code=True)", "trust_remote_code"),
    ],
)
def test_the_check_finds_each_fault(source: str, words: str) -> None:
    assert words in " ".join(faults(source))


def test_the_check_lets_sound_code_pass() -> None:
    sound = [
        "import torch, yaml, subprocess, hashlib, numpy as np",
        "torch.load(p, weights_only=True), np.load(p), np.load(p, allow_pickle=False)",
        "yaml.safe_load(t), yaml.load(t, Loader=yaml.CSafeLoader)",
        "subprocess.run(['ls']), hashlib.sha256(b''), hashlib.new('sha256')",
        "module.eval(), M.load_from_checkpoint(p, weights_only=True), json.load(f)",
        "import urllib.parse",
        "def f(requests):\n    return requests.items()",
    ]
    assert faults("\n".join(sound)) == []
    assert faults("import urllib.request", network=True) == []
