"""Eq. 4 computed by hand."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from c2al.errors import OperandError
from c2al.nn.objective import objective


def bce(logit, label):
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p if label else 1 - p)


LOGITS = [[0.3, -1.2, 2.0], [-0.7, 0.4, 0.1], [1.5, -0.2, -0.6]]
LABELS = [1.0, 1.0, 0.0]
WEIGHTS = [1.0, 2.0, 0.5]
MEMBERS = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]


def tensors():
    return torch.tensor(LOGITS, requires_grad=True), *map(torch.tensor, (LABELS, WEIGHTS, MEMBERS))


def test_three_samples_by_hand():
    loss = objective(*tensors(), lambda_head=0.5, lambda_tail=0.25, rows=4.0)
    tasks = [0.0, 0.0, 0.0]
    for logits, label, weight, (head, tail) in zip(LOGITS, LABELS, WEIGHTS, MEMBERS, strict=True):
        for task, target in enumerate((label, label * head, label * tail)):
            tasks[task] += weight * bce(logits[task], target) / 4
    assert loss.task_T.tolist() == pytest.approx(tasks, rel=1e-6)
    assert not loss.task_T.requires_grad
    assert loss.total.item() == pytest.approx(tasks[0] + 0.5 * tasks[1] + 0.25 * tasks[2], rel=1e-6)


def test_gradient_by_hand():
    logit_BT, *rest = tensors()
    objective(logit_BT, *rest, lambda_head=0.5, lambda_tail=0.25, rows=4.0).total.backward()
    for b in range(3):
        targets = (LABELS[b], LABELS[b] * MEMBERS[b][0], LABELS[b] * MEMBERS[b][1])
        for t, scale in enumerate((1.0, 0.5, 0.25)):
            p = 1 / (1 + math.exp(-LOGITS[b][t]))
            assert logit_BT.grad[b, t].item() == pytest.approx(scale * WEIGHTS[b] * (p - targets[t]) / 4, rel=1e-5)


def test_padding_and_uneven_shards_are_exact():
    logit_BT, label_B, weight_B, member_B2 = tensors()
    arguments = {"lambda_head": 0.5, "lambda_tail": 0.25}
    whole = objective(logit_BT, label_B, weight_B, member_B2, **arguments, rows=3.0).total
    parts = []
    for rows in (slice(0, 2), slice(2, 3)):
        pad = 2 - len(label_B[rows])  # both ranks hold two rows
        padded = [
            torch.cat([t[rows], torch.zeros(pad, *t.shape[1:])]) for t in (logit_BT, label_B, weight_B, member_B2)
        ]
        parts.append(objective(*padded, **arguments, rows=3.0 / 2).total)
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_primary_alone_ignores_the_lambdas():
    logit_BT, *rest = tensors()
    one = objective(logit_BT[:, :1], *rest, lambda_head=0.5, lambda_tail=0.25, rows=3.0)
    three = objective(logit_BT, *rest, lambda_head=0.0, lambda_tail=0.0, rows=3.0)
    assert one.task_T.shape == (1,)
    torch.testing.assert_close(one.total, three.total)


def test_bfloat16_logits_are_summed_in_float32():
    logit_BT, *rest = tensors()
    loss = objective(logit_BT.bfloat16(), *rest, lambda_head=0.5, lambda_tail=0.25, rows=3.0)
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(
        objective(logit_BT, *rest, lambda_head=0.5, lambda_tail=0.25, rows=3.0).total.item(), rel=0.02
    )


@pytest.mark.parametrize(
    ("logit", "label", "weight", "member"),
    [((3, 2), 3, 3, (3, 2)), ((3, 3), 2, 3, (3, 2)), ((3, 3), 3, 2, (3, 2)), ((3, 3), 3, 3, (3, 3))],
)
def test_shapes_that_do_not_fit_are_named(logit, label, weight, member):
    with pytest.raises(OperandError, match=r"needs \(B, 1 or 3\)"):
        objective(*map(torch.zeros, (logit, label, weight, member)), lambda_head=0.0, lambda_tail=0.0, rows=3.0)


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
        objective(*tensors_of_objective, lambda_head=0.5, lambda_tail=0.25, rows=4.0)
    made = {"aten::lift_fresh", "aten::_to_copy", "aten::scalar_tensor", "aten::_local_scalar_dense"}
    assert dispatched.names
    assert not made & set(dispatched.names)
