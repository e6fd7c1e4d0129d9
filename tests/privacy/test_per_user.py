"""Per-user gradients: equal to a plain loop (T7) and to the ordinary gradient (T5); clipping; noise (T6)."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, TrainBatch
from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.modules.encoders.filter_mixer import FilterMixer
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.semantic import SemanticTeacher
from lightning_sfubm.privacy import per_user
from lightning_sfubm.privacy.noise import NoiseStream
from lightning_sfubm.privacy.per_user import (
    PerUserGradients,
    add_noise,
    clip_users,
    clipped_sum,
    private_gradient,
)
from lightning_sfubm.privacy.teacher_loss import TeacherLoss
from lightning_sfubm.seeds import torch_generator

N, D, H, L = 30, 12, 8, 9
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "sasrec": lambda: SASRec(H, 2, 2, L, dropout=0.0),
    "sasrec_newest": lambda: SASRec(H, 1, 1, L, dropout=0.0, norm_first=False, count_from="newest"),
    "filter_mixer": lambda: FilterMixer(H, 1, L, dropout=0.0),
    "gru4rec": lambda: GRU4Rec(H, dropout=0.0),
}
VECTORIZABLE = [name for name in ENCODERS if name != "gru4rec"]


def unit_rows(count: int, name: str) -> Tensor:
    return F.normalize(torch.randn(count, D, generator=torch_generator(0, name)), dim=1)


def make_teacher(encoder: str = "sasrec", experts: int = 3, received: bool = False) -> SemanticTeacher:
    torch.manual_seed(0)
    teacher = SemanticTeacher(ENCODERS[encoder](), N, D, experts, precision="fp32")
    teacher.text[1:] = unit_rows(N, "text")
    if received:
        teacher.receive(unit_rows(N, "global view"))
    if experts > 1:
        nn.init.normal_(teacher.adaptor.gate.weight, std=0.3)  # zeros would hide the gate's gradient
    nn.init.normal_(teacher.fusion.gate.weight, std=0.3)
    return teacher


def users(lengths: tuple[int, ...] = (9, 1, 4, 9, 2, 6, 3), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Histories and targets (B, L); the last user predicts at one position less."""
    rows = torch.randint(1, N + 1, (len(lengths), L + 1), generator=torch_generator(seed, "users"))
    missing = torch.arange(L) < L - torch.tensor(lengths)[:, None]
    history, targets = rows[:, :-1].masked_fill(missing, 0), rows[:, 1:].masked_fill(missing, 0)
    targets[-1, -1] = 0
    return history, targets


def by_loop(teacher: SemanticTeacher, history: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Every user's gradient (B, ...) from a whole pass of their own: table, encoder, softmax written plainly."""
    parameters = {f"teacher.{name}": p for name, p in teacher.named_parameters()}
    collected: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for row, target in zip(history, targets, strict=True):
        teacher.zero_grad()
        table = teacher.table()
        states = teacher.encoder(table[row][None], (row != 0)[None])[0]
        logits = F.normalize(states, dim=-1) @ F.normalize(table, dim=-1).T / teacher.tau
        logits = logits[target != 0]
        chosen = logits.gather(1, target[target != 0][:, None]).squeeze(1)
        (logits[:, 1:].logsumexp(1) - chosen).mean().backward()
        for name, p in parameters.items():
            collected[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return {name: torch.stack(grads) for name, grads in collected.items()}


def collect(gradients: PerUserGradients, history: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """All users' gradients in the batch's order."""
    parts = list(gradients(history, targets))
    rows = torch.cat([r for r, _ in parts])
    return {name: torch.cat([g[name] for _, g in parts])[rows.argsort()] for name in gradients.parameters()}


def norm(grads: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))


# ---------------------------------------------------------------------- T7


@pytest.mark.parametrize("received", [False, True], ids=["local view", "both views"])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize(
    ("encoder", "method"),
    [*((name, "microbatch") for name in ENCODERS), *((name, "vectorized") for name in VECTORIZABLE)],
)
def test_a_users_gradient_is_that_of_a_pass_of_their_own(
    encoder: str, method: str, experts: int, received: bool
) -> None:
    teacher = make_teacher(encoder, experts, received).eval()
    history, targets = users()
    expected = by_loop(teacher, history, targets)
    gradients = PerUserGradients(TeacherLoss(teacher, "fp32"), method)
    found = collect(gradients, history, targets)
    assert expected.keys() - found.keys() == (
        set() if received else {"teacher.fusion.gate.weight", "teacher.fusion.gate.bias"}
    )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    for name in ("teacher.adaptor.experts.weight", *(["teacher.adaptor.gate.weight"] if experts > 1 else [])):
        assert found[name].flatten(1).norm(dim=1).min() > 1e-4


@pytest.mark.parametrize("entries", [1, 3 * (N + 1) * H, 100 * (N + 1) * H])
def test_the_size_of_a_chunk_changes_nothing(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_user, "_CHUNK_CPU", entries)
    teacher = make_teacher().eval()
    history, targets = users()
    whole = clipped_sum(PerUserGradients(TeacherLoss(teacher, "fp32"), "microbatch"), history, targets, 1.0)
    parts = clipped_sum(PerUserGradients(TeacherLoss(teacher, "fp32"), "vectorized"), history, targets, 1.0)
    torch.testing.assert_close(parts.norms, whole.norms, rtol=1e-4, atol=1e-5)
    for name, value in whole.total.items():
        torch.testing.assert_close(parts.total[name], value, rtol=1e-4, atol=1e-5)


def test_all_users_of_a_step_see_one_table_with_its_noise() -> None:
    """In training the gate is noisy: one draw a step, the same for both ways, whatever the number of users."""
    teacher = make_teacher().train()
    history, targets = users()
    found = []
    for method in ("microbatch", "vectorized"):
        teacher.adaptor.noise_draws.zero_()
        found.append(collect(PerUserGradients(TeacherLoss(teacher, "fp32"), method), history, targets))
        assert int(teacher.adaptor.noise_draws) == 1
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=2e-4, atol=2e-5)
    quiet = collect(PerUserGradients(TeacherLoss(teacher.eval(), "fp32"), "vectorized"), history, targets)
    assert not torch.allclose(
        quiet["teacher.adaptor.experts.weight"], found[0]["teacher.adaptor.experts.weight"], rtol=0.01
    )


def test_dropout_differs_between_users_in_both_ways() -> None:
    torch.manual_seed(0)
    teacher = SemanticTeacher(SASRec(H, 1, 1, L, dropout=0.5), N, D, 1, precision="fp32").train()
    teacher.text[1:] = unit_rows(N, "text")
    history, targets = users((9,))
    history, targets = history.repeat(4, 1), targets.repeat(4, 1)
    for method in ("microbatch", "vectorized"):
        grads = collect(PerUserGradients(TeacherLoss(teacher, "fp32"), method), history, targets)
        value = grads["teacher.adaptor.experts.weight"].flatten(1)
        assert (value[1:] - value[0]).norm(dim=1).min() > 0.01 * value[0].norm()


# ---------------------------------------------------------------------- T5


def distiller() -> FKDDistiller:
    torch.manual_seed(0)
    module = FKDDistiller(SASRec(H, 2, 2, L, dropout=0.0), num_experts=3, logits_precision="fp32", phase="teacher")
    counts = torch.ones(N + 1, dtype=torch.int64)
    text = torch.cat([torch.zeros(1, D), unit_rows(N, "text")])
    module.bind(Catalogue("tiny", N, ["", *(f"item {i}" for i in range(N))], text, counts))
    module.log_losses = lambda batch, **terms: None  # type: ignore[method-assign]
    return module.train()


def ordinary(history: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The gradient of the module's own training step."""
    module = distiller()
    batch = TrainBatch(history=history, targets=targets, user=torch.arange(len(history)))
    module.training_step(batch, 0).backward()
    return {f"teacher.{n}": p.grad for n, p in module.teacher.named_parameters() if p.grad is not None}


def without_protection(method: str, history: Tensor, targets: Tensor) -> dict[str, Tensor]:
    gradients = PerUserGradients(TeacherLoss(distiller().teacher, "fp32"), method)
    return private_gradient(
        gradients,
        history,
        targets,
        clip_norm=math.inf,
        noise_multiplier=0.0,
        expected_users=len(history),
        noise=NoiseStream(b"0", "noise"),
    ).total


def test_one_user_without_clipping_and_noise_is_the_ordinary_gradient_bit_for_bit() -> None:
    history, targets = users((L, L))
    history, targets = history[:1], targets[:1]
    found, expected = without_protection("microbatch", history, targets), ordinary(history, targets)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("method", ["microbatch", "vectorized"])
def test_users_of_one_length_without_clipping_and_noise_give_the_ordinary_gradient(method: str) -> None:
    """The sums run over users here and over positions there: equal to the rounding of float32, 1e-5 of the largest entry."""
    history, targets = users((7,) * 7)
    targets[-1, -1] = 5
    found, expected = without_protection(method, history, targets), ordinary(history, targets)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * float(value.abs().max()) + 1e-7)


# ---------------------------------------------------------------------- clipping


@given(
    scales=st.lists(st.floats(-12, 12), min_size=1, max_size=6),
    log_clip=st.floats(-4, 4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_no_user_adds_more_than_the_clipping_norm(scales: list[float], log_clip: float, seed: int) -> None:
    generator, clip = torch.Generator().manual_seed(seed), 10**log_clip
    sizes = torch.tensor([10**s for s in scales])
    grads = {
        "a": torch.randn(len(scales), 5, 7, generator=generator) * sizes[:, None, None],
        "b": torch.randn(len(scales), 3, generator=generator) * sizes[:, None],
    }
    everyone = clip_users(grads, clip)
    total: dict[str, Tensor] = {}
    for user in range(len(scales)):
        own = {name: g[user : user + 1] for name, g in grads.items()}
        alone = clip_users(own, clip)
        assert norm(alone.total) <= clip * (1 + 1e-6)
        assert float(alone.norms) == pytest.approx(norm(own), rel=1e-6)
        if norm(own) <= clip:
            assert all(torch.equal(alone.total[name], g[0]) for name, g in own.items())
        else:
            assert norm(alone.total) == pytest.approx(clip, rel=1e-5)
        total = {name: total[name] + g if total else g for name, g in alone.total.items()}
    for name, value in total.items():
        torch.testing.assert_close(everyone.total[name], value, rtol=1e-4, atol=1e-5 * clip)


@pytest.mark.parametrize("method", ["microbatch", "vectorized"])
@pytest.mark.parametrize("clip", [0.01, 1.0, 30.0])
def test_leaving_one_user_out_moves_the_sum_by_the_clipping_norm_at_most(method: str, clip: float) -> None:
    gradients = PerUserGradients(TeacherLoss(make_teacher().eval(), "fp32"), method)
    history, targets = users()
    everyone = clipped_sum(gradients, history, targets, clip)
    moved = []
    for user in range(len(history)):
        others = [u for u in range(len(history)) if u != user]
        rest = clipped_sum(gradients, history[others], targets[others], clip)
        moved.append(norm({name: value - rest.total[name] for name, value in everyone.total.items()}))
    assert max(moved) <= clip * (1 + 1e-4)  # of a difference of sums in float32
    assert moved == pytest.approx(everyone.norms.clamp_max(clip).tolist(), rel=1e-3)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    with pytest.raises(PrivacyError, match="not finite"):
        clip_users({"a": torch.tensor([[1.0], [math.nan]])}, 1.0)
    with pytest.raises(PrivacyError, match="not finite"):
        clip_users({"a": torch.tensor([[math.inf]])}, 1.0)


# ---------------------------------------------------------------------- noise and divisor


def private(noise: NoiseStream, rows: slice = slice(None), **settings: float) -> dict[str, Tensor]:
    history, targets = users()
    return private_gradient(
        PerUserGradients(TeacherLoss(make_teacher().eval(), "fp32")),
        history[rows],
        targets[rows],
        noise=noise,
        **{"clip_norm": 0.5, "noise_multiplier": 2.0, "expected_users": 4.0, **settings},
    ).total


def test_an_empty_batch_is_noise_of_the_stated_size() -> None:
    noise = private(NoiseStream(b"0", "noise"), slice(0, 0))
    values = torch.cat([g.flatten() for g in noise.values()]).double()
    # n squared standard normals have mean n and standard deviation sqrt(2 n); six of them.
    std, count = 2.0 * 0.5 / 4.0, len(values)
    assert count > 500
    assert abs(float((values / std).square().sum()) - count) < 6 * math.sqrt(2 * count)
    assert abs(float((values / std).sum())) < 6 * math.sqrt(count)
    each = [float((g.double() / std).square().mean()) for g in noise.values() if g.numel() > 50]
    assert min(each) > 0.3
    assert max(each) < 2.0


def test_noise_is_the_stream_s_and_lies_on_top_of_the_clipped_sum() -> None:
    first, again, other = (private(NoiseStream(b"0", "noise", step)) for step in (1, 1, 2))
    empty, quiet = (
        private(NoiseStream(b"0", "noise", 1), slice(0, 0)),
        private(NoiseStream(b"0"), noise_multiplier=0.0),
    )
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
        torch.testing.assert_close(value, quiet[name] + empty[name], rtol=1e-4, atol=1e-6)


def test_the_divisor_is_the_expected_number_of_users() -> None:
    few, many = (private(NoiseStream(b"0"), noise_multiplier=0.0, expected_users=n) for n in (1.0, 64.0))
    for name, value in few.items():
        torch.testing.assert_close(many[name], value / 64)


def test_no_noise_leaves_the_sum_as_it_is() -> None:
    total = {"a": torch.randn(5)}
    assert torch.equal(add_noise(total, 0.0, NoiseStream(b"0"))["a"], total["a"])


# ---------------------------------------------------------------------- choices and refusals


def test_auto_takes_what_is_possible_and_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(encoder: str) -> int:
        gradients = PerUserGradients(TeacherLoss(make_teacher(encoder)), "auto")
        return max(len(rows) for rows, _ in gradients(*users()))

    assert chunk("sasrec") == 7
    assert chunk("gru4rec") == 1
    monkeypatch.setattr(per_user, "_CHUNK_CPU", 2 * (N + 1) * H)  # as a catalogue that leaves room for two users
    assert chunk("sasrec") == 1


def test_an_encoder_without_a_rule_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="'microbatch'"):
        PerUserGradients(TeacherLoss(make_teacher("gru4rec")), "vectorized")

    class Choosing(SASRec):
        def forward(self, item_embeddings: Tensor, mask: Tensor) -> Tensor:
            return super().forward(item_embeddings, mask) * (2.0 if bool(mask.sum() > 3) else 1.0)

    teacher = make_teacher()
    teacher.encoder = Choosing(H, 1, 1, L, dropout=0.0)
    with pytest.raises(ConfigError, match=r"Choosing cannot be vectorised.*'microbatch'"):
        list(PerUserGradients(TeacherLoss(teacher), "vectorized")(*users()))
    assert len(list(PerUserGradients(TeacherLoss(teacher), "microbatch")(*users()))) == 7


def test_a_layer_that_mixes_users_is_refused() -> None:
    teacher = make_teacher()
    teacher.encoder.output_norm = nn.BatchNorm1d(H)
    with pytest.raises(PrivacyError, match=r"encoder\.output_norm.*BatchNorm1d"):
        TeacherLoss(teacher)


@pytest.mark.parametrize(
    "settings",
    [{"clip_norm": 0.0}, {"noise_multiplier": -1.0}, {"expected_users": 0.0}, {"clip_norm": math.inf}],
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="clip_norm"):
        private(NoiseStream(b"0"), **settings)
    with pytest.raises(ConfigError, match="'hooks'"):
        PerUserGradients(TeacherLoss(make_teacher()), "hooks")  # type: ignore[arg-type]
