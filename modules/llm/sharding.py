"""An LLM head whose parameters are divided among processes (FSDP2), for models that do not fit one device."""

import torch
from lightning import LightningModule
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.llm.backbone import Backbone

#: entries into a head from outside its ``forward``: whole parameters outside the decoder layers are there within them
_ENTRIES = ("training_step", "validation_step", "test_step", "predict_step", "loss", "rank", "rank_with_validity")


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether the module's parameters are divided among processes."""
    return isinstance(module, FSDPModule)


def shard(head: LightningModule, backbone: Backbone, mesh: DeviceMesh) -> None:
    """Divide a head's parameters: each decoder layer by itself, gathered while it computes, and all others together.

    Frozen weights and adapters of a layer travel together. Embeddings, vocabulary head, projectors, head and residual are
    gathered for as long as one of the head's steps runs. Gradients are averaged over the processes, as in data parallelism.

    Args:
        head: of which ``backbone`` is a part; changed in place.
        backbone: its language model.
        mesh: one-dimensional, of the processes.

    Raises:
        ConfigError: the base is quantised.
    """
    if backbone.quantized:
        raise ConfigError(
            "a quantised LLM cannot be divided among processes: set its precision to auto, or strategy to ddp"
        )
    model = backbone.causal_lm
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(head, mesh=mesh)
    for name in _ENTRIES:
        if hasattr(head, name):
            register_fsdp_forward_method(head, name)


def settle(module: torch.nn.Module) -> None:
    """Put gathered parameters back, so that what is changed in place is what is kept and stored."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(parameter: Tensor) -> Tensor:
    """The parameter, gathered from all processes where it is divided."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
