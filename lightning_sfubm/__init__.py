"""lightning-sfubm: federated, semantics-enhanced user behaviour modelling on PyTorch Lightning.

Nothing heavy is imported here, so that ``lightning-sfubm --help`` answers quickly. Start reading at
:mod:`lightning_sfubm.contracts`.
"""

__version__ = "0.1.0"
