"""T14: every encoder keeps the contract, and the checks catch those that do not."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.contracts import Encoder
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.encoders.acceptance import check_lengths
from lightning_sfubm.modules.encoders.checks import CHECKS, STATES, check_encoder
from lightning_sfubm.modules.encoders.filter_mixer import FilterMixer
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.sequential import SequentialRecommender


class DecayingMean(nn.Module):
    """A stranger's encoder: exponentially weighted sum of the projected history."""

    def __init__(self, hidden_dim: int = 8, decay: float = 0.7) -> None:
        super().__init__()
        self.hidden_dim, self.decay = hidden_dim, decay
        self.project = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, item_embeddings: Tensor, mask: Tensor) -> Tensor:
        steps = torch.arange(mask.shape[1])
        age = (steps[:, None] - steps).clamp_min(0)
        weights = (self.decay**age).tril() * mask[:, None, :]
        return weights @ self.project(item_embeddings)


ENCODERS = {
    "sasrec_pre_norm": lambda: SASRec(8, num_layers=2, num_heads=2, norm_first=True),
    "sasrec_from_newest": lambda: SASRec(8, num_layers=1, num_heads=2, count_from="newest"),
    "sasrec_post_norm": lambda: SASRec(8, num_layers=2, num_heads=1, norm_first=False, activation="relu"),
    "sasrec_wide": lambda: SASRec(8, num_layers=1, num_heads=4, feedforward_dim=32, activation="silu"),
    "sasrec_normal_weights": lambda: SASRec(8, num_layers=1, num_heads=2, initializer_range=0.02),
    "gru4rec": lambda: GRU4Rec(8),
    "gru4rec_two_layers": lambda: GRU4Rec(8, num_layers=2),
    "gru4rec_official": lambda: GRU4Rec(8, num_layers=2, hidden_dropout=0.5, project=False),
    "plug_in": DecayingMean,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ENCODERS)
def test_contract(name: str, check: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name]().eval()
    assert isinstance(encoder, Encoder)
    CHECKS[check](encoder, 1e-5)


class _Broken(DecayingMean):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.kind = fault
        if fault != "arguments":
            self.fault = fault
        self.unused = nn.Parameter(torch.ones(1)) if fault == "parameters" else None

    def forward(self, item_embeddings: Tensor, mask: Tensor) -> Tensor:
        if self.kind == "padding_content":
            mask = torch.ones_like(mask)
        states = super().forward(item_embeddings, mask)
        if self.kind == "causality":
            return states + item_embeddings.sum(1, keepdim=True)
        if self.kind == "left_padding":
            return states + torch.arange(mask.shape[1])[:, None]
        if self.kind == "batching":
            return states - states.mean(0)
        if self.kind == "shape":
            return states / mask.unsqueeze(-1)
        if self.kind == "differentiable":
            return states.detach()
        if self.kind == "gradients":  # of the oldest item alone none
            return torch.cat([states[:, :1].detach() * 0 + 1, super().forward(item_embeddings[:, 1:], mask[:, 1:])], 1)
        return states


@pytest.mark.parametrize("fault", CHECKS)
def test_checks_catch_a_broken_encoder(fault: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        CHECKS[fault](_Broken(fault).eval(), 1e-5)
    with pytest.raises(AssertionError, match="_Broken breaks the encoder contract"):
        check_encoder(_Broken(fault))


@pytest.mark.parametrize("longest", range(1, 12))
def test_encoders_of_short_histories_are_held_to_the_contract_too(longest: int) -> None:
    class Short(_Broken):
        max_length = longest

        def forward(self, item_embeddings: Tensor, mask: Tensor) -> Tensor:
            assert item_embeddings.shape[1] <= longest
            return super().forward(item_embeddings, mask)

    torch.manual_seed(0)
    check_encoder(Short("none"))
    for fault in (
        "shape",
        "differentiable",
        "parameters",
        "arguments",
        *(["causality", "left_padding"] * (longest > 2)),
    ):
        with pytest.raises(AssertionError, match=f"Short breaks the encoder contract, {fault}"):
            check_encoder(Short(fault), checks=[fault])
    if longest > 2:
        with pytest.raises(ConfigError, match="Short breaks the encoder contract, causality"):
            SequentialRecommender(Short("causality"))


def test_a_module_takes_an_encoder_with_a_parameter_that_no_loss_reaches() -> None:
    SequentialRecommender(_Broken("parameters"))


@pytest.mark.parametrize("most", [None, "many"])
def test_an_encoder_whose_max_length_is_no_number_has_no_limit(most: Any) -> None:
    encoder = DecayingMean()
    encoder.max_length = most
    check_encoder(encoder)
    check_lengths(SequentialRecommender(encoder), SimpleNamespace(longest_history=50))


@pytest.mark.parametrize("fault", [*STATES, "differentiable", "arguments"])
@pytest.mark.parametrize("kind", [SequentialRecommender, FKDDistiller])
def test_a_module_refuses_an_encoder_from_outside_that_breaks_the_contract(fault: str, kind: Any) -> None:
    """One that looks ahead would train without a word, to figures too good to be true."""
    with pytest.raises(ConfigError, match=rf"_Broken breaks the encoder contract, {fault}: .*contracts\.Encoder"):
        kind(_Broken(fault))
    kind(DecayingMean())
    with pytest.raises(ConfigError, match="no integer attribute 'hidden_dim'"):
        kind(nn.Linear(2, 2))
    with pytest.raises(
        AssertionError, match="Linear breaks the encoder contract: it has no integer attribute 'hidden_dim'"
    ):
        check_encoder(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda x, mask: (x, None), "shape: forward returns a tuple, not a tensor of states"),
        (lambda x, mask: x.half(), "shape: states are torch.float16, embeddings torch.float32"),
        (
            lambda x, mask: x.view(3, 3),
            "shape: forward raised RuntimeError, shape '.3, 3.' is invalid .* on embeddings",
        ),
    ],
)
def test_what_a_foreign_forward_does_otherwise_is_said_of_the_encoder(forward: Any, words: str) -> None:
    class Odd(DecayingMean):
        def forward(self, item_embeddings: Tensor, mask: Tensor) -> Any:
            return forward(item_embeddings, mask)

    with pytest.raises(ConfigError, match=f"Odd breaks the encoder contract, {words}"):
        SequentialRecommender(Odd())


def test_check_encoder_restores_the_mode() -> None:
    encoder = GRU4Rec(8).train()
    check_encoder(encoder)
    assert encoder.training


def test_sasrec_refuses_bad_settings() -> None:
    with pytest.raises(ConfigError, match="num_heads=3 does not divide"):
        SASRec(8, num_heads=3)
    with pytest.raises(ConfigError, match="count_from='left'"):
        SASRec(8, count_from="left")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="activation='swish'"):
        SASRec(8, activation="swish")
    for std in (0.0, -0.02, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="initializer_range"):
            SASRec(8, initializer_range=std)
    with pytest.raises(ConfigError, match="history of 6 items is longer than max_length=5"):
        SASRec(8, max_length=5)(torch.zeros(1, 6, 8), torch.ones(1, 6, dtype=torch.bool))


def test_sasrec_first_weights() -> None:
    """Weights and positions are drawn with the width asked for, biases are 0, norms stay as they are."""
    torch.manual_seed(0)
    drawn = dict(SASRec(64, num_layers=2, num_heads=2, initializer_range=0.02).named_parameters())
    for name, value in drawn.items():
        if value.ndim == 2:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("norm.weight")))), name
    usual = dict(SASRec(64, num_layers=2, num_heads=2).named_parameters())
    assert usual["positions.weight"].std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert usual["blocks.0.attention.qkv.weight"].abs().max().item() == pytest.approx(64**-0.5, rel=0.05)


@pytest.mark.parametrize("encoder", [SASRec, GRU4Rec, FilterMixer])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden_dim", 0),
        ("num_heads", 0),
        ("num_layers", 0),
        ("max_length", 0),
        ("feedforward_dim", -1),
        ("dropout", 2.0),
        ("hidden_dropout", 1.0),
    ],
)
def test_sizes_and_dropouts_out_of_range_are_named(encoder: type[nn.Module], setting: str, value: float) -> None:
    if setting not in inspect.signature(encoder).parameters or (setting == "num_layers" and encoder is not GRU4Rec):
        return  # without blocks the others are their input and its positions
    with pytest.raises(ConfigError, match=f"{encoder.__name__}: {setting}={value} must"):
        encoder(**{setting: value})


@pytest.mark.parametrize(("count_from", "same"), [("oldest", True), ("newest", False)])
def test_where_positions_are_counted_from(count_from: str, same: bool) -> None:
    """Counted from the oldest item, a prefix has the states it has within the longer row."""
    torch.manual_seed(0)
    encoder = SASRec(8, num_heads=1, count_from=count_from).eval()
    x, mask = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    assert torch.allclose(encoder(x, mask)[:, :4], encoder(x[:, :4], mask[:, :4]), atol=1e-5) is same


def test_sasrec_attention_equals_the_formula() -> None:
    """One head, no dropout: softmax(QK^T / sqrt(H)) V over the allowed keys."""
    torch.manual_seed(0)
    attention = SASRec(8, num_layers=1, num_heads=1).eval().blocks[0].attention
    x = torch.randn(2, 5, 8)
    q, k, v = attention.qkv(x).chunk(3, -1)
    scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    expected = attention.out(torch.softmax(scores, -1) @ v)
    actual = attention(x, torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5))
    torch.testing.assert_close(actual, expected)


def test_gru4rec_equals_row_by_row() -> None:
    torch.manual_seed(0)
    encoder = GRU4Rec(8, num_layers=2).eval()
    x, lengths = torch.randn(3, 6, 8), (6, 4, 1)
    mask = torch.stack([torch.arange(6) >= 6 - n for n in lengths])
    states = encoder(x, mask)
    for row, length in enumerate(lengths):
        alone = encoder.out(encoder.gru(x[row : row + 1, -length:])[0])
        torch.testing.assert_close(states[row, -length:], alone[0])


def test_gru4rec_dropouts() -> None:
    """Input dropout alone leaves states dense; hidden dropout zeroes states and scales the rest; neither acts in eval."""
    torch.manual_seed(0)
    x, mask = torch.randn(64, 6, 8), torch.ones(64, 6, dtype=torch.bool)
    plain = GRU4Rec(8, dropout=0.0, project=False)
    dropped = GRU4Rec(8, dropout=0.0, hidden_dropout=0.4, project=False)
    dropped.load_state_dict(plain.state_dict())
    states, thinned = plain(x, mask), dropped(x, mask)
    kept = thinned != 0
    assert (states != 0).all()
    assert abs(kept.float().mean() - 0.6) < 0.03  # standard deviation .009
    torch.testing.assert_close(thinned[kept], states[kept] / 0.6)
    torch.testing.assert_close(dropped.eval()(x, mask), states)
    assert GRU4Rec(8, num_layers=2, dropout=0.3).gru.dropout == 0.3
    assert GRU4Rec(8, num_layers=2, dropout=0.3, hidden_dropout=0.1).gru.dropout == 0.1


@pytest.mark.parametrize("name", ["sasrec_pre_norm", "gru4rec"])
def test_per_sample_gradients_by_hooks(name: str) -> None:
    """Opacus can hook the encoder: its per-sample gradients equal one backward pass per row (T7 for encoders)."""
    opacus = pytest.importorskip("opacus")
    from opacus.validators import ModuleValidator

    torch.manual_seed(0)
    encoder = ModuleValidator.fix(ENCODERS[name]().eval()).train()
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    x, mask = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[0], [1], [3]])
    hooked = opacus.GradSampleModule(encoder, loss_reduction="sum")
    F.mse_loss(hooked(x, mask)[:, -1], torch.zeros(3, 8), reduction="sum").backward()
    per_sample = [p.grad_sample.clone() for p in hooked.parameters()]
    for row in range(3):
        hooked.zero_grad()
        F.mse_loss(hooked(x[row : row + 1], mask[row : row + 1])[:, -1], torch.zeros(1, 8), reduction="sum").backward()
        for parameter, expected in zip(hooked.parameters(), per_sample, strict=True):
            torch.testing.assert_close(parameter.grad_sample[0], expected[row], atol=1e-5, rtol=1e-4)
