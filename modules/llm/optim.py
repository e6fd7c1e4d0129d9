"""The optimiser of the LLM stage."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch


def adamw_with_warmup(
    module: L.LightningModule, groups: dict[str, tuple[Callable[[str], bool], float, float]], warmup: float
) -> Any:
    """AdamW with one parameter group a name, and a linear warm-up and decay over the Trainer's steps.

    Args:
        module: its trainable parameters are divided among the groups.
        groups: name -> (which parameter names, learning rate, weight decay).
        warmup: share of the steps with rising learning rate. Where the number of steps is unknown, it stays constant.

    Returns:
        What ``configure_optimizers`` returns.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    settings = []
    for name, (belongs, rate, decay) in groups.items():
        parameters = [p for key, p in trainable if belongs(key)]
        if parameters:
            settings.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": name})
    optimizer = torch.optim.AdamW(settings, fused=True)
    total = module.trainer.estimated_stepping_batches
    if not math.isfinite(total):
        return optimizer
    rising = max(1, round(warmup * total))

    def factor(step: int) -> float:
        return min((step + 1) / rising, max(0.0, (total - step) / max(1, total - rising)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
