"""T26: the terms of fact-counter distillation, and the chunked whole-catalogue loss that computes them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sfubm.modules.losses import exponentials, fkd
from lightning_sfubm.modules.losses.distillation import TERMS, DistilWeights, distil, without_repeats
from lightning_sfubm.seeds import torch_generator

V, N, H, S = 7, 25, 6, 5


def case(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch_generator(seed, "fkd")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    exclude = torch.randint(0, N + 1, (V, S), generator=generator)
    targets = torch.randint(1, N + 1, (V,), generator=generator)
    exclude[0, :2] = 4  # a repeated item
    exclude[1, 0] = targets[1]  # the target was seen before
    exclude[2] = 0  # no history
    return {
        "states": draw(V, H).requires_grad_(),
        "table": draw(N + 1, H).requires_grad_(),
        "teacher_states": draw(V, H).requires_grad_(),
        "teacher_table": draw(N + 1, H).requires_grad_(),
        "targets": targets,
        "exclude": exclude,
    }


def logits_of(c: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = torch.zeros(V, N + 1, dtype=torch.bool).scatter(1, c["exclude"], True)
    return (
        c["states"] @ c["table"].T,
        c["teacher_states"] @ c["teacher_table"].T,
        c["targets"],
        fkd.pool_mask(mask, c["targets"]),
    )


def test_pool_excludes_history_and_padding_but_never_the_target() -> None:
    c = case()
    *_, targets, mask = logits_of(c)
    assert mask[:, 0].all()
    assert not mask.gather(1, targets[:, None]).any()
    assert mask[0, 4]
    assert mask[2].sum() == 1


def test_equal_distributions_cost_nothing() -> None:
    student, _, targets, mask = logits_of(case())
    shifted = student.detach() + torch.randn(V, 1, generator=torch_generator(0, "shift"))
    for value in (
        fkd.full_kl(student, shifted, mask),
        fkd.fact(student, shifted, targets, mask),
        fkd.non_target(student, shifted, targets, mask),
        fkd.what_if(student, shifted, mask),
    ):
        torch.testing.assert_close(value, torch.zeros(V), atol=2e-6, rtol=0)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), scale=st.floats(0.1, 2.0))
def test_fact_and_counter_split_the_whole_divergence(seed: int, scale: float) -> None:
    student, teacher, targets, mask = logits_of(case(seed, scale))
    q_y = torch.softmax(teacher.masked_fill(mask, -torch.inf), 1).gather(1, targets[:, None]).squeeze(1)
    parts = fkd.fact(student, teacher, targets, mask) + (1 - q_y) * fkd.non_target(student, teacher, targets, mask)
    torch.testing.assert_close(parts, fkd.full_kl(student, teacher, mask), rtol=1e-4, atol=1e-5)


def test_literal_values() -> None:
    """Three items, q = (.5, .3, .2), p = (.2, .2, .6), y = the first."""
    q, p = torch.tensor([[0.0, 0.5, 0.3, 0.2]]), torch.tensor([[0.0, 0.2, 0.2, 0.6]])
    mask, y = torch.tensor([[True, False, False, False]]), torch.tensor([1])
    fact = 0.5 * torch.tensor(0.5 / 0.2).log() + 0.5 * torch.tensor(0.5 / 0.8).log()
    rest = 0.6 * torch.tensor(0.6 / 0.25).log() + 0.4 * torch.tensor(0.4 / 0.75).log()
    torch.testing.assert_close(fkd.fact(p.log(), q.log(), y, mask), fact[None])
    torch.testing.assert_close(fkd.non_target(p.log(), q.log(), y, mask), rest[None])


def test_temperature_scales_logits_and_the_square_of_t_the_loss() -> None:
    student, teacher, targets, mask = logits_of(case())
    for term in (fkd.fact, fkd.non_target):
        expected = 9 * term(student / 3, teacher / 3, targets, mask)
        torch.testing.assert_close(term(student, teacher, targets, mask, 3.0), expected)
    torch.testing.assert_close(fkd.what_if(student, teacher, mask, 3.0), fkd.what_if(student / 3, teacher / 3, mask))


def test_no_gradient_reaches_the_teacher() -> None:
    c = case()
    student, teacher, targets, mask = logits_of(c)
    total = (
        fkd.fact(student, teacher, targets, mask).sum()
        + fkd.non_target(student, teacher, targets, mask).sum()
        + fkd.what_if(student, teacher, mask).sum()
        + fkd.align(c["states"], c["teacher_states"])
        + distil(**c, weights=DistilWeights(1, 1, 1, 1))[0]
    )
    total.backward()
    assert c["states"].grad is not None
    assert c["table"].grad is not None
    assert c["teacher_states"].grad is None
    assert c["teacher_table"].grad is None


WEIGHTS = st.builds(DistilWeights, *[st.sampled_from([0.0, 0.5, 1.0]) for _ in TERMS])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999),
    scale=st.floats(0.1, 2.0),
    weights=WEIGHTS,
    temperature=st.sampled_from([1.0, 2.0, 0.5]),
    step=st.integers(1, 8),
    shifted=st.booleans(),
)
def test_chunked_distillation_equals_the_definitions(
    seed: int, scale: float, weights: DistilWeights, temperature: float, step: int, shifted: bool
) -> None:
    c = case(seed, scale)
    # The definitions in float64: where p_y is almost 1 they lose log(1 - p_y) in float32, which the chunks do not.
    exact = {name: x.detach().double().requires_grad_() if x.is_floating_point() else x for name, x in c.items()}
    student, teacher, targets, mask = logits_of(exact)
    expected = {
        "ce": F.cross_entropy(student[:, 1:], targets - 1),
        "fact": fkd.fact(student, teacher, targets, mask, temperature).mean(),
        "non_target": fkd.non_target(student, teacher, targets, mask, temperature).mean(),
        "full_kl": fkd.full_kl(student, teacher, mask, temperature).mean(),
    }
    total = sum(getattr(weights, name) * value for name, value in expected.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exponentials, "rows_per_chunk", lambda *_: step)
        patch.setattr(exponentials, "ROW_MULTIPLE", 1)
        if shifted:  # as if every logit could overflow
            patch.setattr(exponentials, "SAFE_LOGIT", 0.0)
        loss, values = distil(**c, weights=weights, temperature=temperature, precision="fp32")
    torch.testing.assert_close(loss, total.float(), rtol=1e-4, atol=1e-5)
    for name in TERMS:
        torch.testing.assert_close(values[name], expected[name].detach().float(), rtol=1e-4, atol=1e-5)
    actual = torch.autograd.grad(loss, (c["states"], c["table"]))
    wanted = torch.autograd.grad(total, (exact["states"], exact["table"]))
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (20.0, 20.0), (20.0, 0.1), (0.1, 20.0)])
def test_a_history_of_all_other_items_leaves_nothing_to_compare(scale: tuple[float, float]) -> None:
    """Whether the logits of student, teacher or both are so large that their exponentials are shifted."""
    c = case()
    c["exclude"] = torch.zeros(V, N, dtype=torch.int64)
    c["exclude"][0] = torch.arange(1, N + 1)
    for name, factor in (("states", scale[0]), ("teacher_states", scale[1])):
        c[name] = (c[name].detach() * factor).requires_grad_()
    alone = {name: x if "table" in name else x[:1] for name, x in c.items()}
    loss, values = distil(**alone, weights=DistilWeights(0.0, 0.0, 1.0), precision="fp32")
    assert loss == values["non_target"] == values["fact"] == values["full_kl"] == 0
    for gradient in torch.autograd.grad(loss, (c["states"], c["table"])):
        assert gradient.abs().max() == 0
    student, teacher, targets, mask = logits_of(c)
    expected = fkd.non_target(student, teacher, targets, mask)
    assert expected[0] == 0
    loss, values = distil(**c, weights=DistilWeights(0.0, 0.0, 1.0), precision="fp32")
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-4, atol=1e-5)
    inputs = (c["states"], c["table"])
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected.mean(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_autocast_changes_no_distillation() -> None:
    c = case()
    weights = DistilWeights(1, 1, 1, 0.5)
    plainly, _ = distil(**c, weights=weights, precision="fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = distil(**c, weights=weights, precision="fp32")
    assert torch.equal(cast, plainly)
    for a, b in zip(*(torch.autograd.grad(x, (c["states"], c["table"])) for x in (cast, plainly)), strict=True):
        assert torch.equal(a, b)


def test_distillation_in_bf16_is_close() -> None:
    c = case()
    weights = DistilWeights(1, 1, 1, 0.5)
    exact, rounded = (distil(**c, weights=weights, precision=p) for p in ("fp32", "bf16"))
    torch.testing.assert_close(rounded[0], exact[0], rtol=0.02, atol=0.02)
    gradients = [torch.autograd.grad(loss, (c["states"], c["table"])) for loss, _ in (exact, rounded)]
    for a, b in zip(*gradients, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_weights_zero_leave_cross_entropy_alone() -> None:
    c = case()
    loss, _ = distil(**c, weights=DistilWeights(), precision="fp32")
    expected = F.cross_entropy((c["states"] @ c["table"].T)[:, 1:], c["targets"] - 1)
    inputs = (c["states"], c["table"])
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_repeats() -> None:
    exclude = torch.tensor([[3, 5, 3, 0], [2, 2, 2, 7]])
    cleaned = without_repeats(exclude, torch.tensor([5, 1]))
    assert [sorted(row) for row in cleaned.tolist()] == [[0, 0, 0, 3], [0, 0, 2, 7]]


def test_swaps() -> None:
    history = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]]).repeat(500, 1)
    neighbours = torch.arange(1, 8)[:, None] + torch.tensor([10, 20])
    neighbours[0] = 0
    swapped = fkd.swap_items(history, neighbours, 0.3, torch_generator(0, "swap"))
    real = history != 0
    changed = swapped != history
    assert not changed[~real].any()
    assert 0.26 < changed[real].float().mean() < 0.34  # 3,000 draws, standard deviation .008
    assert ((swapped == history + 11) | (swapped == history + 21))[changed].all()
    again = fkd.swap_items(history, neighbours, 0.3, torch_generator(0, "swap"))
    assert torch.equal(swapped, again)
    assert torch.equal(fkd.swap_items(history, neighbours, 0.0, torch_generator(0, "x")), history)


def test_nearest_items() -> None:
    table = torch.randn(12, 3, generator=torch_generator(0, "table"))
    nearest = fkd.nearest_items(table, 4, chunk=5)
    cosines = F.cosine_similarity(table[:, None], table[None], dim=-1)
    cosines[:, 0] = -2.0
    cosines.fill_diagonal_(-2.0)
    assert torch.equal(nearest[1:], cosines.topk(4, 1).indices[1:])
    assert nearest[0].sum() == 0
    assert fkd.nearest_items(table[:3], 10).shape == (3, 1)


def test_align_is_info_nce() -> None:
    ids, semantics = torch.randn(5, 4), torch.randn(5, 4)
    cosines = F.cosine_similarity(ids[:, None], semantics[None], dim=-1) / 0.1
    torch.testing.assert_close(fkd.align(ids, semantics, 0.1), F.cross_entropy(cosines, torch.arange(5)))
    assert fkd.align(ids[:1], semantics[:1]) == 0
