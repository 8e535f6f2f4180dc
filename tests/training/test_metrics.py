import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from c2al.training.metrics import BinaryMetrics, Metric, SavedSums, Sums
from c2al.typed import build


def batch(rows: int, seed: int, tasks: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logit = 2 * torch.randn(rows, tasks, generator=g) - 1
    label = (torch.rand(rows, tasks, generator=g) < logit.sigmoid()).float()
    weight = torch.randint(0, 4, (rows,), generator=g).float()
    member = (torch.rand(rows, 2, generator=g) < 0.3).float()
    return logit, label, weight, member


def oracle(logit: torch.Tensor, label: torch.Tensor, weight: torch.Tensor) -> tuple[float, float, float]:
    """NE, calibration and exact AUC, pair by pair, in numpy float64."""
    z, y, w = (t.double().numpy() for t in (logit, label, weight))
    p = 1 / (1 + np.exp(-z))
    loss = -(w * (y * np.log(p) + (1 - y) * np.log(1 - p))).sum() / w.sum()
    q = (w * y).sum() / w.sum()
    pairs = (y[:, None] == 1) & (y[None, :] == 0)
    pair_weight = w[:, None] * w[None, :] * pairs
    win = (z[:, None] > z[None, :]) + 0.5 * (z[:, None] == z[None, :])
    return (
        loss / -(q * math.log(q) + (1 - q) * math.log(1 - q)),
        (w * p).sum() / (w * y).sum(),
        (pair_weight * win).sum() / pair_weight.sum(),
    )


def one(metrics: BinaryMetrics | Sums) -> Metric:
    sums = metrics.lifetime if isinstance(metrics, BinaryMetrics) else metrics
    return sums.compute()[sums.tasks[0]]["all"]


def test_three_samples_by_hand():
    m = BinaryMetrics(("primary",))
    m.update(torch.tensor([[0.0], [math.log(3)], [-math.log(3)]]), torch.tensor([[1.0], [1.0], [0.0]]), torch.ones(3))
    # p = 1/2, 3/4, 1/4; losses log 2, log 4/3, log 4/3; entropy of 2/3; every positive above the negative.
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    got = one(m)
    assert got.ne == pytest.approx((math.log(2) + 2 * math.log(4 / 3)) / 3 / entropy, rel=1e-7)
    assert got.calibration == pytest.approx(1.5 / 2, rel=1e-7)
    assert (got.auc, got.auc_error, got.weight, got.positives) == (1.0, 0.0, 3.0, 2.0)


def test_every_task_and_cohort_against_the_formula():
    logit, label, weight, member = batch(500, seed=1)
    m = BinaryMetrics(("primary", "head"), ("h", "t"))
    for rows in (slice(0, 123), slice(123, 123), slice(123, 500)):  # an empty batch adds nothing
        m.update(logit[rows], label[rows], weight[rows], member[rows])
    got = m.lifetime.compute()
    for t, task in enumerate(m.tasks):
        for cohort, mask in (("all", torch.ones(500)), ("h", member[:, 0]), ("t", member[:, 1])):
            ne, calibration, auc = oracle(logit[:, t], label[:, t], weight * mask)
            value = got[task][cohort]
            # float64 sums of the same terms in another order
            assert value.ne == pytest.approx(ne, rel=1e-12)
            assert value.calibration == pytest.approx(calibration, rel=1e-12)
            assert value.auc is not None
            assert value.auc_error is not None
            # one tied pair can reach the bound, which then holds up to rounding
            assert abs(value.auc - auc) <= value.auc_error + 1e-12
            assert value.auc_error < 0.01


def test_two_ranks_merge_to_one():
    logit, label, weight, member = batch(301, seed=2)
    whole, *ranks = (BinaryMetrics(("primary", "head"), ("h", "t")) for _ in range(3))
    whole.update(logit, label, weight, member)
    ranks[0].update(logit[:100], label[:100], weight[:100], member[:100])
    ranks[1].update(logit[100:], label[100:], weight[100:], member[100:])
    merged = ranks[0].lifetime + ranks[1].lifetime
    torch.testing.assert_close(merged.sums_CTS, whole.lifetime.sums_CTS, rtol=1e-13, atol=0)
    reduced = dataclasses.replace(merged, sums_CTS=sum(r.lifetime.sums_CTS for r in ranks))
    assert reduced.compute() == merged.compute()


def test_window_holds_the_batches_since_its_reset():
    m = BinaryMetrics(("primary",))
    last = BinaryMetrics(("primary",))
    for seed in range(8):
        if seed == 5:
            m.reset_window()
        logit, label, weight, _ = batch(50, seed, tasks=1)
        m.update(logit, label, weight)
        if seed >= 5:
            last.update(logit, label, weight)
    assert torch.equal(m.window.sums_CTS, last.lifetime.sums_CTS)
    assert one(m.window).weight < one(m).weight


def test_memory_does_not_depend_on_the_window():
    m = BinaryMetrics(("primary", "head", "tail"), ("head", "tail"))
    held = sum(t.numel() * t.element_size() for t in vars(m).values() if isinstance(t, torch.Tensor))
    assert held < 4 * m.lifetime.sums_CTS.numel() * 8


def test_a_nan_row_spoils_only_the_cohorts_it_is_in():
    logit, label, weight, member = batch(200, seed=5)
    weight[3], member[3] = 1.0, torch.tensor([1.0, 0.0])  # in cohort "h", not in "t"
    sound, spoiled = (BinaryMetrics(("primary", "head"), ("h", "t")) for _ in range(2))
    sound.update(logit, label, weight, member)
    logit[3, 0] = float("nan")  # of the task "primary" alone
    spoiled.update(logit, label, weight, member)
    got, want = spoiled.lifetime.compute(), sound.lifetime.compute()
    for cohort in ("all", "h"):
        assert all(math.isnan(v) for v in (got["primary"][cohort].ne, got["primary"][cohort].calibration))
    assert got["primary"]["t"] == want["primary"]["t"]
    assert got["head"] == want["head"]


def test_sums_survive_a_checkpoint_bit_for_bit():
    m = BinaryMetrics(("primary", "head"), ("h", "t"))
    for seed in range(3):
        m.update(*batch(100, seed))
    problems: list[str] = []
    tree = json.loads(json.dumps(dataclasses.asdict(m.lifetime.saved())))
    read = build(SavedSums, tree, "", problems).restored()
    assert not problems
    assert (read.tasks, read.cohorts) == (m.lifetime.tasks, m.lifetime.cohorts)
    assert torch.equal(read.sums_CTS, m.lifetime.sums_CTS)


def test_damaged_saved_sums_are_refused():
    saved = BinaryMetrics(("primary",)).lifetime.saved()
    for damage in ({"sums": "%"}, {"sums": saved.sums[8:]}, {"tasks": ("a", "b")}, {"cohorts": ()}):
        with pytest.raises(ValueError, match="sums: "):
            dataclasses.replace(saved, **damage).restored()
    with pytest.raises(ValueError, match="these are metrics of primary on all"):
        BinaryMetrics(("primary",), ("h",), lifetime=saved.restored())


def test_resumed_lifetime_equals_uninterrupted():
    whole, first = BinaryMetrics(("primary",)), BinaryMetrics(("primary",))
    for seed in range(4):
        logit, label, weight, _ = batch(50, seed, tasks=1)
        whole.update(logit, label, weight)
        if seed == 2:
            first = BinaryMetrics(("primary",), lifetime=first.lifetime)
        first.update(logit, label, weight)
    assert torch.equal(first.lifetime.sums_CTS, whole.lifetime.sums_CTS)


@pytest.mark.parametrize(("label", "calibration"), [(0.0, None), (1.0, 0.5)])
def test_one_class_is_undefined_not_huge(label: float, calibration: float | None):
    m = BinaryMetrics(("primary",))
    m.update(torch.zeros(4, 1), torch.full((4, 1), label), torch.ones(4))
    got = one(m)
    assert (got.ne, got.auc, got.auc_error, got.calibration) == (None, None, None, calibration)


def test_no_rows_is_undefined():
    got = one(BinaryMetrics(("primary",)))
    assert got == Metric(ne=None, calibration=None, auc=None, auc_error=None, weight=0.0, positives=0.0)


def test_padding_and_zero_weight_do_not_count():
    logit, label, weight, _ = batch(40, seed=3, tasks=1)
    m, padded = BinaryMetrics(("primary",)), BinaryMetrics(("primary",))
    m.update(logit, label, weight)
    pad = torch.zeros(7)
    padded.update(torch.cat((logit, pad[:, None] + 9)), torch.cat((label, pad[:, None])), torch.cat((weight, pad)))
    assert one(padded) == one(m)


def test_extreme_logits_stay_finite_and_ties_count_half():
    m = BinaryMetrics(("primary",))
    m.update(torch.tensor([[1e4], [1e4], [-1e4]]), torch.tensor([[1.0], [0.0], [0.0]]), torch.ones(3))
    got = one(m)
    assert got.ne == pytest.approx(1e4 / 3 / -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3))
    assert got.auc == pytest.approx((0.5 + 1) / 2)
    assert got.auc_error == pytest.approx(0.25)


def test_nan_prediction_shows():
    m = BinaryMetrics(("primary",))
    m.update(torch.tensor([[float("nan")], [0.0]]), torch.tensor([[1.0], [0.0]]), torch.ones(2))
    got = one(m)
    assert all(v is not None and math.isnan(v) for v in (got.ne, got.calibration, got.auc, got.auc_error))


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    logit, label, weight, member = batch(1000, seed=4)
    cpu, cuda = (BinaryMetrics(("primary", "head"), ("h", "t"), device=d) for d in ("cpu", "cuda"))
    cpu.update(logit, label, weight, member)
    cuda.update(logit.cuda(), label.cuda(), weight.cuda(), member.cuda())
    torch.testing.assert_close(cuda.lifetime.sums_CTS.cpu(), cpu.lifetime.sums_CTS, rtol=1e-12, atol=1e-12)
