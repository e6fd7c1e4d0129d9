"""Adaptor from frozen text vectors to the encoder's space: a mixture of parametric-whitening experts (UniSRec)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.layers.dropout import Dropout
from lightning_sfubm.modules.losses.precision import Precision, matmul_dtype
from lightning_sfubm.seeds import torch_generator


class WhiteningExperts(nn.Module):
    """Mixture of affine whitening maps D -> H with a noisy softmax gate (Hou et al., UniSRec, KDD 2022, eq. 1 to 3).

    An expert is ``(x - b) W``; the equivalent ``x W + c`` is stored, so that all experts are one matrix product. While
    training, the gate's logits carry Gaussian noise of a learned scale; in evaluation mode they carry none.

    Args:
        text_dim: D.
        hidden_dim: H.
        num_experts: experts; 1 is a plain whitening map without a gate.
        dropout: dropout probability of the input vectors while training.
        seed: root of the named noise stream.
        precision: number format of the large product.

    Raises:
        ConfigError: if ``num_experts`` is below 1.
    """

    noise_draws: Tensor

    def __init__(
        self,
        text_dim: int,
        hidden_dim: int,
        num_experts: int = 8,
        dropout: float = 0.0,
        seed: int = 0,
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError(f"num_experts={num_experts}: the adaptor needs at least one expert.")
        self.hidden_dim = hidden_dim
        self.num_experts = num_experts
        self.seed = seed
        self.precision: Precision = precision
        self.drop = Dropout(dropout)
        self.experts = nn.Linear(text_dim, num_experts * hidden_dim)
        # Unit inputs: entries of 1/sqrt(D) a side, so an expert's output has about unit length (the mean of E has 1/sqrt(E)).
        generator = torch_generator(seed, "whitening", text_dim, hidden_dim, num_experts)
        with torch.no_grad():
            self.experts.weight.normal_(std=1.0 / math.sqrt(hidden_dim), generator=generator)
        nn.init.zeros_(self.experts.bias)
        if num_experts > 1:
            self.gate = nn.Linear(text_dim, 2 * num_experts, bias=False)
            nn.init.zeros_(self.gate.weight)
            # Counts the draws, so that a resumed run continues the stream where it was left.
            self.register_buffer("noise_draws", torch.zeros((), dtype=torch.int64))

    def forward(self, vectors: Tensor) -> Tensor:
        """Map text vectors (M, D) to (M, H)."""
        dtype = matmul_dtype(self.precision, vectors.device)
        inputs = vectors.to(dtype)
        weight, bias = self.experts.weight.to(dtype), self.experts.bias.to(dtype)
        dropped = self.drop(inputs)
        if self.num_experts == 1:
            return F.linear(dropped, weight, bias).to(vectors.dtype)
        shares = self._gate(inputs).to(dtype).T.contiguous()
        outputs = F.linear(dropped, weight).view(len(vectors), self.num_experts, self.hidden_dim)
        mixed = torch.bmm(shares.unsqueeze(1), outputs).squeeze(1)
        # Mixed by themselves, biases take H numbers an item instead of experts x H.
        return torch.addmm(mixed, shares, bias.view(self.num_experts, self.hidden_dim)).to(vectors.dtype)

    def _gate(self, inputs: Tensor) -> Tensor:
        """Share of each expert (experts, M), columns sum to 1: on a CPU a tenth of the time of rows so short."""
        logits, scale = torch.mm(self.gate.weight.to(inputs.dtype), inputs.T).float().chunk(2)
        if self.training:
            generator = torch_generator(self.seed, "gate_noise", int(self.noise_draws))
            noise = torch.randn(logits.T.shape, generator=generator).to(logits).T
            logits = logits + noise * (F.softplus(scale) + 1e-2)
            self.noise_draws += 1
        return torch.softmax(logits, 0)
