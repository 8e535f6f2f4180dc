"""Eq. 4 computed by hand."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from c2al.errors import OperandError
from c2al.nn.objective import lambda_scale, objective, targets


def bce(logit, label):
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p if label else 1 - p)


LOGITS = [[0.3, -1.2, 2.0], [-0.7, 0.4, 0.1], [1.5, -0.2, -0.6]]
LABELS = [1.0, 1.0, 0.0]
WEIGHTS = [1.0, 2.0, 0.5]
MEMBERS = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]


LAMBDAS = (0.5, 0.25)


def tensors():
    label_B, weight_B, member_BC = map(torch.tensor, (LABELS, WEIGHTS, MEMBERS))
    return torch.tensor(LOGITS, requires_grad=True), targets(label_B, member_BC), weight_B


def test_three_samples_by_hand():
    loss = objective(*tensors(), lambda_C=LAMBDAS, rows=4.0)
    tasks = [0.0, 0.0, 0.0]
    for logits, label, weight, (head, tail) in zip(LOGITS, LABELS, WEIGHTS, MEMBERS, strict=True):
        for task, target in enumerate((label, label * head, label * tail)):
            tasks[task] += weight * bce(logits[task], target) / 4
    assert loss.task_T.tolist() == pytest.approx(tasks, rel=1e-6)
    assert not loss.task_T.requires_grad
    assert loss.total.item() == pytest.approx(tasks[0] + 0.5 * tasks[1] + 0.25 * tasks[2], rel=1e-6)


def test_gradient_by_hand():
    logit_BT, *rest = tensors()
    objective(logit_BT, *rest, lambda_C=LAMBDAS, rows=4.0).total.backward()
    for b in range(3):
        targets = (LABELS[b], LABELS[b] * MEMBERS[b][0], LABELS[b] * MEMBERS[b][1])
        for t, scale in enumerate((1.0, 0.5, 0.25)):
            p = 1 / (1 + math.exp(-LOGITS[b][t]))
            assert logit_BT.grad[b, t].item() == pytest.approx(scale * WEIGHTS[b] * (p - targets[t]) / 4, rel=1e-5)


def test_padding_and_uneven_shards_are_exact():
    whole = objective(*tensors(), lambda_C=LAMBDAS, rows=3.0).total
    parts = []
    for rows in (slice(0, 2), slice(2, 3)):
        pad = 2 - len(LABELS[rows])  # both ranks hold two rows
        padded = [torch.cat([t[rows], torch.zeros(pad, *t.shape[1:])]) for t in tensors()]
        parts.append(objective(*padded, lambda_C=LAMBDAS, rows=3.0 / 2).total)
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_lambdas_of_zero_leave_the_primary_loss():
    logit_BT, target_BT, weight_B = tensors()
    one = objective(logit_BT[:, :1], target_BT[:, :1], weight_B, lambda_C=(), rows=3.0)
    three = objective(logit_BT, target_BT, weight_B, lambda_C=(0.0, 0.0), rows=3.0)
    assert one.task_T.shape == (1,)
    torch.testing.assert_close(one.total, three.total)


@pytest.mark.parametrize("cohorts", [1, 2, 5])
def test_any_number_of_cohorts_by_hand(cohorts):
    generator = torch.Generator().manual_seed(cohorts)
    logit_BT = torch.randn(7, 1 + cohorts, generator=generator)
    label_B = torch.randint(2, (7,), generator=generator).float()
    member_BC = torch.randint(2, (7, cohorts), generator=generator).float()
    lambda_C = [0.1 * (c + 1) for c in range(cohorts)]
    loss = objective(logit_BT, targets(label_B, member_BC), torch.ones(7), lambda_C=lambda_C, rows=7.0)
    expected = 0.0
    for b in range(7):
        expected += bce(logit_BT[b, 0].item(), label_B[b]) / 7
        for c in range(cohorts):
            expected += lambda_C[c] * bce(logit_BT[b, 1 + c].item(), label_B[b] * member_BC[b, c]) / 7
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.task_T.shape == (1 + cohorts,)


def test_targets_of_both_kinds():
    label_B, member_BC = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert targets(label_B, member_BC).tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert targets(label_B, member_BC, "membership").tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 1]]
    assert targets(label_B, member_BC[:, :0]).tolist() == [[1], [0], [1]]


def test_schedules_of_lambda_by_hand():
    def scales(schedule, share, steps=10):
        return [lambda_scale(schedule, share, step, steps) for step in range(steps)]

    assert scales("constant", 0.2) == [1] * 10
    assert scales("warmup", 0.4) == pytest.approx([0, 0.25, 0.5, 0.75] + [1] * 6)
    assert scales("early", 0.3) == [1] * 3 + [0] * 7
    assert scales("decay", 0.4) == pytest.approx([1] * 6 + [0.75, 0.5, 0.25, 0])
    assert scales("decay", 1.0) == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0])
    # One step is too few for a share of the steps; it must still be a number.
    assert all(0 <= lambda_scale(s, 0.01, 0, 1) <= 1 for s in ("constant", "warmup", "decay", "early"))


def test_bfloat16_logits_are_summed_in_float32():
    logit_BT, *rest = tensors()
    loss = objective(logit_BT.bfloat16(), *rest, lambda_C=LAMBDAS, rows=3.0)
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(
        objective(logit_BT, *rest, lambda_C=LAMBDAS, rows=3.0).total.item(), rel=0.02
    )


@pytest.mark.parametrize(
    ("logit", "target", "weight", "lambdas"),
    [((3, 2), (3, 3), 3, 1), ((3, 3), (2, 3), 3, 2), ((3, 3), (3, 3), 2, 2), ((3, 3), (3, 3), 3, 3)],
)
def test_shapes_that_do_not_fit_are_named(logit, target, weight, lambdas):
    with pytest.raises(OperandError, match=r"needs \(B, T\), \(B, T\), \(B,\) and T - 1 lambdas"):
        objective(*map(torch.zeros, (logit, target, weight)), lambda_C=[0.0] * lambdas, rows=3.0)


class Dispatched(TorchDispatchMode):
    """Names of the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_no_tensor_is_made_from_host_values():
    """On a GPU such a tensor is a copy to the device, which every step would wait for."""
    tensors_of_objective = tensors()
    with Dispatched() as dispatched:
        objective(*tensors_of_objective, lambda_C=LAMBDAS, rows=4.0)
    made = {"aten::lift_fresh", "aten::_to_copy", "aten::scalar_tensor", "aten::_local_scalar_dense"}
    assert dispatched.names
    assert not made & set(dispatched.names)
