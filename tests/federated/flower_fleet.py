"""A SuperLink and SuperNodes on 127.0.0.1 with TLS and node authentication, for tests; and the environment they run in."""

import contextlib
import datetime
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.assets import cache_dir
from lightning_sfubm.federated.flower_app import FLOWER, QUIET

ROOT = Path(__file__).resolve().parent.parent.parent


def flower_bin() -> Path:
    """Folder of Flower's commands: this environment's, or an environment of its own, made once and kept in the cache.

    Flower's own dependencies win there; whatever else is needed comes from this environment.
    """
    here = Path(sys.executable).parent
    if _works(here / "python"):
        return here
    name = f"flower-{FLOWER}-python{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_dir() / "test-environments" / name
    if not _works(folder / "bin/python"):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        install = [folder / "bin/python", "-m", "pip", "install", "-q", f"flwr=={FLOWER}.*"]
        try:
            done = subprocess.run(install, capture_output=True, text=True, timeout=480, check=False)
            problem = (done.stderr.strip() or "no reason given").splitlines()[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = "pip took more than 8 minutes"
        if problem:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"Flower cannot be installed: {problem}")
    site = next((folder / "lib").glob("python*/site-packages"))
    borrowed = [p for p in sys.path if p.endswith("site-packages")]
    (site / "zz_borrowed.pth").write_text("\n".join(borrowed) + "\n")  # after its own packages
    return folder / "bin"


def _works(python: Path) -> bool:
    code = f"import flwr; assert flwr.__version__.startswith('{FLOWER}.')"
    return python.exists() and not subprocess.run([python, "-c", code], capture_output=True, check=False).returncode


def write_certificates(folder: Path, names: list[str]) -> None:
    """A CA, a server certificate for 127.0.0.1, and a key pair for every SuperNode."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True)
    now = datetime.datetime.now(datetime.timezone.utc)

    def write_key(path: Path, form: serialization.PrivateFormat) -> ec.EllipticCurvePrivateKey:
        key = ec.generate_private_key(ec.SECP384R1())
        path.touch(mode=0o600)
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        return key

    def certificate(subject: str, public: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test CA")]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    authority = write_key(folder / "ca.key", serialization.PrivateFormat.PKCS8)
    server = write_key(folder / "server.key", serialization.PrivateFormat.PKCS8)
    root = certificate("test CA", authority.public_key()).add_extension(
        x509.BasicConstraints(True, None), critical=True
    )
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    issued = certificate("127.0.0.1", server.public_key()).add_extension(address, critical=False)
    for path, unsigned in ((folder / "ca.crt", root), (folder / "server.pem", issued)):
        signed = unsigned.sign(authority, hashes.SHA256())
        path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    for name in names:
        key = write_key(folder / f"{name}.key", serialization.PrivateFormat.OpenSSH)
        form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (folder / f"{name}.key.pub").write_bytes(key.public_key().public_bytes(*form))


def free_port() -> int:
    """A port nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll until a condition holds; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds:g} s")


class Fleet:
    """Processes of a federation; every one is ended with :meth:`stop`.

    Args:
        folder: of logs, keys and ``$FLWR_HOME``.
        app: output folder of ``lightning-sfubm flower-app``.
        port: of the SuperLink.
        extra_path: more folders of modules.
    """

    def __init__(self, folder: Path, app: Path, port: int, extra_path: str = "") -> None:
        self.bin, self.folder, self.app, self.port = flower_bin(), folder, app, port
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            **QUIET,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{extra_path}",
            "FLWR_HOME": str(app / "home"),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.environment.pop("PL_GLOBAL_SEED", None)
        (folder / "logs").mkdir(parents=True)

    def start(self, name: str, *command: str) -> None:
        """Start a process in a session of its own."""
        with open(self.folder / f"logs/{name}.log", "ab") as out:
            self.running[name] = subprocess.Popen(
                [self.bin / command[0], *command[1:]],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        """What a process has printed."""
        return (self.folder / f"logs/{name}.log").read_text(errors="replace")

    def superlink(self) -> None:
        """Start the SuperLink and wait until it listens."""
        keys = self.folder / "keys"
        files = ["--ssl-ca-certfile", f"{keys}/ca.crt", "--ssl-certfile", f"{keys}/server.pem"]
        self.start(
            "superlink",
            *("flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)),
            *(*files, "--ssl-keyfile", f"{keys}/server.key"),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        )
        wait_for(lambda: "Application startup complete" in self.log("superlink"), 120, "SuperLink")

    def register(self, silo: str, connection: str = "federation") -> None:
        """Make a silo's public key known to the SuperLink."""
        key = str(self.folder / f"keys/{silo}.key.pub")
        command = [self.bin / "flwr", "supernode", "register", key, connection, "--name", silo]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def supernode(self, silo: str, *configs: str) -> None:
        """Start a silo's SuperNode and wait until it is connected."""
        seen = (self.folder / f"logs/{silo}.log").exists() and self.log(silo).count("SuperNode ID")
        self.start(
            silo,
            *("python", "-m", "lightning_sfubm", "flower-silo", "--silo", silo),
            *(part for path in configs for part in ("--config", path)),
            *("--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())),
            *("--root-certificates", str(self.folder / "keys/ca.crt")),
            *("--key", str(self.folder / f"keys/{silo}.key")),
        )
        wait_for(lambda: self.log(silo).count("SuperNode ID") > int(seen), 120, f"SuperNode {silo}")

    def run(self, name: str = "run") -> None:
        """Start a run; its log ends with the ServerApp."""
        self.start(name, "flwr", "run", str(self.app / "app"), "federation", "--stream")

    def kill(self, name: str) -> None:
        """End a process and all it started, as a machine that loses power."""
        for process in [self.running[name].pid, *descendants(self.running[name].pid)]:
            _send(process, signal.SIGKILL)
        self.running.pop(name).wait()

    def kill_server_app(self) -> None:
        """End the ServerApp alone."""
        started = descendants(self.running["superlink"].pid)
        apps = [process for process in started if b"flwr-serverapp" in _command(process)]
        assert apps, f"there is no ServerApp among {[_command(process) for process in started]}"
        for process in apps:
            _send(process, signal.SIGKILL)

    def stop(self) -> None:
        """End every process and what it started, also where a test has failed."""
        started = [p for process in self.running.values() for p in (process.pid, *descendants(process.pid))]
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        for pid in started:  # children of theirs may have sessions of their own
            if b"flwr" in _command(pid) or b"flower" in _command(pid):
                _send(pid, signal.SIGKILL)
        for process in self.running.values():
            process.wait(timeout=10)
        self.running.clear()


def descendants(process: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [process]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
