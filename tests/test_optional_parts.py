"""Every module imports without the optional packages, and what is slow to import is loaded where it is needed (T25)."""

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys

OPTIONAL = ("wandb", "flwr", "opacus", "cryptography", "bitsandbytes")
sys.modules.update(dict.fromkeys(OPTIONAL))  # None: importing one raises ImportError
import lightning_sfubm
import lightning_sfubm.evaluation.evaluate, lightning_sfubm.evaluation.report, lightning_sfubm.evaluation.terminal
import lightning_sfubm.federated.trainer, lightning_sfubm.callbacks.dashboard
assert "lightning_sfubm.evaluation.report_plots" not in sys.modules  # figures are drawn where a report is made

found = [module.name for module in pkgutil.walk_packages(lightning_sfubm.__path__, "lightning_sfubm.")]
assert len(found) > 120, found
for name in found:
    if name not in ("lightning_sfubm.federated.flower", "lightning_sfubm.__main__"):
        importlib.import_module(name)
from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.privacy.secure_aggregation import SecAggSettings

DifferentialPrivacy(noise_multiplier=1.0)
SecAggSettings(2)
from lightning_sfubm.federated.secure import SecureAggregation
from lightning_sfubm.federated.secure_kmeans import SecureKMeans

for needs_cryptography in (SecureKMeans, SecureAggregation):
    try:
        needs_cryptography()
    except lightning_sfubm.errors.ConfigError as error:
        assert "lightning-sfubm[secagg]" in str(error)
    else:
        raise AssertionError(f"{needs_cryptography} is set up without cryptography")
try:
    importlib.import_module("lightning_sfubm.federated.flower")
except lightning_sfubm.errors.ConfigError as error:
    assert "lightning-sfubm[flower]" in str(error)
else:
    raise AssertionError("Flower is not there, and its module imports")
"""


def test_everything_imports_without_the_optional_packages() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
