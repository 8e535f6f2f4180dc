"""Conflict methods at h against two-task problems solved by hand, in float64.

For g_1 = (1, 0) and g_2 = (a, b): G = [[1, a], [a, a^2 + b^2]].
"""

import math
import typing
from itertools import product

import pytest
import torch
from torch import nn

from c2al.config import TrainConfig
from c2al.errors import ConfigError
from c2al.nn.combine import Combine
from c2al.nn.methods import check_method, make_method
from c2al.nn.methods.upgrad_feat import least_squares
from c2al.nn.prediction_heads import Heads

NAMES = tuple(typing.get_type_hints(TrainConfig)["combine"].__args__)
METHODS = tuple(n for n in NAMES if n not in ("sum", "selective-groups"))
CONFLICT = ((1.0, 0.0), (-0.6, 0.8))
OBLIQUE = ((1.0, 0.0), (-1.0, 2.0))
ALIGNED = ((1.0, 0.0), (0.6, 0.8))


def combined(name: str, gradients) -> list[float]:
    """What reaches h when each task's gradient at h is one of `gradients` (rows of F values)."""
    gradient_TF = torch.tensor(gradients, dtype=torch.float64)
    combine = Combine(name, len(gradient_TF), seed=0)
    h = torch.zeros(1, gradient_TF.shape[1], dtype=torch.float64, requires_grad=True)
    views = combine(h)
    sum((view * g).sum() for view, g in zip(views, gradient_TF, strict=True)).backward()
    return h.grad[0].tolist()


def weights(name: str, gradients) -> list[float]:
    gradient_TF = torch.tensor(gradients, dtype=torch.float64)
    return Combine(name, len(gradient_TF), seed=0).weights(gradient_TF @ gradient_TF.T)


def test_every_method_of_the_config_has_its_module():
    assert len(METHODS) == 8
    assert make_method("sum", 2) is None
    for name in METHODS:
        assert make_method(name, 2) is not None


def test_pcgrad_by_hand():
    # g_1' = g_1 - (-0.6 / 1) g_2 and g_2' = g_2 + 0.6 g_1: weights 1.6 of both.
    assert combined("pcgrad-feat", CONFLICT) == pytest.approx([1.6 * 0.4, 1.6 * 0.8], rel=1e-12)
    # Of (1, 0) and (-1, 2): g_1' = g_1 + g_2 / 5, g_2' = g_2 + g_1.
    assert weights("pcgrad-feat", OBLIQUE) == pytest.approx([2.0, 1.2], rel=1e-12)


def test_mgda_by_hand():
    # gamma = g_2 . (g_2 - g_1) / |g_1 - g_2|^2 is the weight of g_1; (5 + 1) / (4 + 4) for (1, 0) and (-1, 2).
    assert weights("mgda-ub", OBLIQUE) == pytest.approx([2 * 0.75, 2 * 0.25], rel=1e-9)
    # g_2 = (2, 1): gamma = (5 - 2) / 2 > 1, so the shorter gradient alone.
    assert weights("mgda-ub", ((1.0, 0.0), (2.0, 1.0))) == pytest.approx([2.0, 0.0], abs=1e-9)


def test_imtl_g_by_hand():
    # u_t = g_t / |g_t|; w_1 g_1 + w_2 g_2, w_1 + w_2 = 2, with equal products with u_1 and u_2.
    # (1, 0), (-1, 2): d = (w_1 - w_2, 2 w_2); w_1 - w_2 = (-(w_1 - w_2) + 4 w_2) / sqrt 5
    # -> w_1 (sqrt 5 + 1) = w_2 (sqrt 5 + 5) -> w_1 = w_2 sqrt 5.
    total = 1 + math.sqrt(5)
    assert weights("imtl-g-feat", OBLIQUE) == pytest.approx([2 * math.sqrt(5) / total, 2 / total], rel=1e-9)


def test_aligned_mtl_by_hand():
    # G = [[1, c], [c, 1]] has eigenvalues 1 + c, 1 - c along (1, 1) and (1, -1); (1, 1) is an eigenvector, so
    # w = sqrt(smallest / (1 + c)) (1, 1). c = -0.6: the smallest is 0.4 = 1 + c itself. c = 0.6: sqrt(0.4 / 1.6).
    assert weights("aligned-mtl-feat", CONFLICT) == pytest.approx([1.0, 1.0], rel=1e-9)
    assert weights("aligned-mtl-feat", ALIGNED) == pytest.approx([0.5, 0.5], rel=1e-9)
    assert weights("aligned-mtl-feat", ((2.0, 0.0), (0.0, 2.0))) == pytest.approx([1.0, 1.0], rel=1e-9)


def test_upgrad_by_hand():
    # g_1 projected onto the cone of non-negative products with both: g_1 + s g_2 with (g_1 + s g_2) . g_2 = 0.
    # (1, 0), (-1, 2): s = 1 / 5 for g_1, and g_2 + 1 g_1: the same as PCGrad for two tasks.
    assert weights("upgrad-feat", OBLIQUE) == pytest.approx([2.0, 1.2], rel=1e-9)


def test_cagrad_by_hand():
    # Unit gradients of cosine c: by symmetry w = (1/2, 1/2), g_w = g_0, so d = (1 + 0.4) g_0, times T = 2.
    for gradients in (CONFLICT, ALIGNED):
        assert weights("cagrad-feat", gradients) == pytest.approx([1.4, 1.4], rel=1e-9)
    # F(w) = g_w . g_0 + 0.4 |g_0| |g_w| on a fine grid, for gradients of different lengths.
    g_2F = torch.tensor(((1.0, 0.0), (-0.5, 0.3)), dtype=torch.float64)
    w_N = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    g_w = w_N[:, None] * g_2F[0] + (1 - w_N)[:, None] * g_2F[1]
    g_0 = g_2F.mean(0)
    best = (g_w @ g_0 + 0.4 * g_0.norm() * g_w.norm(dim=1)).argmin()
    direction = g_0 + 0.4 * g_0.norm() * g_w[best] / g_w[best].norm()
    # The grid's step is 1e-6 of a weight.
    assert combined("cagrad-feat", g_2F.tolist()) == pytest.approx((2 * direction).tolist(), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_cagrad_of_three_tasks_serves_the_worst_best(seed):
    """Of all updates within c |g_0| of the mean, none has a larger smallest product with a task (Eq. 3)."""
    generator = torch.Generator().manual_seed(seed)
    g_TF = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    update = torch.tensor(combined("cagrad-feat", g_TF.tolist()), dtype=torch.float64) / 3
    g_0 = g_TF.mean(0)
    assert (update - g_0).norm().item() == pytest.approx(0.4 * g_0.norm().item(), rel=1e-9)
    worst = (g_TF @ update).min()
    ball = torch.nn.functional.normalize(torch.randn(20_000, 3, generator=generator, dtype=torch.float64), dim=1)
    others = g_0 + 0.4 * g_0.norm() * ball
    assert (others @ g_TF.T).min(dim=1).values.max() <= worst + 1e-9


def test_gradvac_by_hand():
    """The first step from averages of 0 is PCGrad; the second aims at 0.01 times the first step's cosines."""
    gradient_2F = torch.tensor(CONFLICT, dtype=torch.float64)
    combine = Combine("gradvac-feat", 2, seed=0)
    assert combine.weights(gradient_2F @ gradient_2F.T) == pytest.approx([1.6, 1.6], rel=1e-9)
    phi, target = -0.6, 0.01 * -0.6
    assert combine.method.average_TT.tolist() == [[0, pytest.approx(target)], [pytest.approx(target), 0]]
    step = (target * math.sqrt(1 - phi**2) - phi * math.sqrt(1 - target**2)) / math.sqrt(1 - target**2)
    assert combine.weights(gradient_2F @ gradient_2F.T) == pytest.approx([1 + step, 1 + step], rel=1e-9)
    # What it is for: the turned gradient has the cosine that it aimed at.
    turned = gradient_2F[0] + step * gradient_2F[1]
    assert (turned @ gradient_2F[1] / turned.norm()).item() == pytest.approx(target, rel=1e-9)


def test_cosine_gate_by_hand():
    assert combined("cosine-gate-feat", CONFLICT) == [1.0, 0.0]
    assert weights("cosine-gate-feat", ((1.0, 0.0), (-0.1, 5.0), (0.0, 2.0), (3.0, 1.0))) == [1, 0, 1, 1]


@pytest.mark.parametrize("name", ["sum", "pcgrad-feat", "upgrad-feat", "gradvac-feat", "cosine-gate-feat"])
def test_without_a_conflict_it_is_the_plain_sum(name):
    gradients = ((1.0, 0.0, 0.0), (0.6, 0.8, 0.0), (0.1, 0.1, 0.1))
    assert combined(name, gradients) == pytest.approx([1.7, 0.9, 0.1], rel=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_the_scale_of_the_loss_changes_no_weight(name):
    small = [[x * 1e-6 for x in g] for g in OBLIQUE]
    assert weights(name, small) == pytest.approx(weights(name, OBLIQUE), rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_a_task_whose_lambda_is_zero_takes_no_part(name):
    """A gradient of 0 would be the shortest combination of MGDA, and would leave IMTL-G and Aligned-MTL undefined."""
    with_zero = combined(name, ((1.0, 0.0), (0.0, 0.0), (-1.0, 2.0)))
    assert with_zero == pytest.approx([v * 1.0 for v in combined(name, OBLIQUE)], rel=1e-9)
    assert combined(name, ((1.0, 0.5), (0.0, 0.0))) == pytest.approx(
        [1.4 * v if name == "cagrad-feat" else v for v in (1.0, 0.5)], rel=1e-9
    )
    assert combined(name, ((0.0, 0.0), (0.0, 0.0))) == [0.0, 0.0]


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_that_is_not_finite_reaches_h(name):
    assert math.isnan(combined(name, ((1.0, 0.0), (math.nan, 1.0)))[0])


@pytest.mark.parametrize("name", METHODS)
def test_collinear_and_opposite_gradients_give_finite_weights(name):
    for gradients in (((1.0, 0.0), (1.0, 0.0)), ((1.0, 0.0), (-1.0, 0.0)), ((1.0, 0.0), (2.0, 0.0), (-1.0, 1e-9))):
        assert all(math.isfinite(w) for w in weights(name, gradients))


def test_random_draws_depend_on_the_step_and_leave_the_generator_alone():
    gradient_TF = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.6, -0.8]], dtype=torch.float64)
    gramian_TT = gradient_TF @ gradient_TF.T
    combine = Combine("pcgrad-feat", 3, seed=1)
    before = torch.get_rng_state()
    drawn = {}
    for step in range(40):
        combine.step = step
        drawn[step] = tuple(combine.weights(gramian_TT))
        assert tuple(combine.weights(gramian_TT)) == drawn[step]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(drawn.values())) > 1


@pytest.mark.parametrize("seed", range(20))
def test_non_negative_least_squares_meets_its_conditions(seed):
    generator = torch.Generator().manual_seed(seed)
    size = 2 + seed % 5
    j = torch.randn(size, max(2, size - seed % 2), generator=generator, dtype=torch.float64)
    gramian_TT, target_T = j @ j.T, j @ torch.randn(j.shape[1], generator=generator, dtype=torch.float64)
    s_T = least_squares(gramian_TT, target_T)
    slope_T = gramian_TT @ s_T - target_T
    assert (s_T >= 0).all()
    assert (slope_T >= -1e-9).all()
    assert (s_T * slope_T).abs().max() < 1e-9


def test_each_prediction_head_keeps_its_own_gradient():
    """Weights change what h gets, not what the heads get."""
    torch.manual_seed(0)
    x = torch.randn(5, 3)

    def gradients(name: str | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(1)
        encoder = nn.Linear(3, 4)
        heads = Heads(4, [6], 2, [5], Combine(name, 3, 0) if name else None)
        logit_BT = heads([torch.relu(encoder(x))] * 3)
        (logit_BT.square() * torch.tensor([1.0, 0.5, 2.0])).sum().backward()
        return {n: p.grad for n, p in heads.named_parameters()}, encoder.weight.grad

    own, at_encoder = gradients(None)
    for name in METHODS:
        kept, _ = gradients(name)
        assert kept.keys() == own.keys()
        assert all(torch.equal(kept[n], own[n]) for n in own), name
    assert not torch.equal(gradients("mgda-ub")[1], at_encoder)


def test_recording_leaves_the_sum_bit_for_bit_and_no_node_stands_in_eval():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    for cohorts, autocast, hidden in product((1, 2, 4), (False, True), ((), (8,))):
        got = []
        for recording in (False, True):
            torch.manual_seed(1)
            combine = Combine("sum", 1 + cohorts, 0)
            combine.recording = recording
            encoder, heads = nn.Linear(16, 16), Heads(16, [8], cohorts, hidden, combine)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                h = encoder(x)
                logit_BT = heads([h] * (1 + cohorts))
            logit_BT.float().square().sum().backward()
            got.append([p.grad for p in (*encoder.parameters(), *heads.parameters())])
            assert (combine.gramian_TT is not None) == recording
        assert all(torch.equal(a, b) for a, b in zip(*got, strict=True)), (cohorts, autocast, hidden)
    combine.eval()
    h = torch.ones(2, 3, requires_grad=True)
    assert all(view is h for view in combine(h))


def test_the_gramian_by_hand():
    combine = Combine("sum", 2, 0)
    combine.recording = True
    h = torch.zeros(2, 2, requires_grad=True)
    first, second = combine(h)
    (first.sum() + (second * torch.tensor([[1.0, 2.0], [3.0, -4.0]])).sum()).backward()
    assert combine.gramian_TT.tolist() == [[4, 2], [2, 30]]


def test_a_missing_library_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchjd", None)
    with pytest.raises(ConfigError, match=r"train\.combine: 'pcgrad-feat' needs TorchJD.*c2al\[methods\]"):
        check_method("pcgrad-feat")
    for name in ("sum", "cosine-gate-feat", "gradvac-feat", "cagrad-feat"):
        check_method(name)
