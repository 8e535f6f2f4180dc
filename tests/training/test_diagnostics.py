import math

import numpy as np
import pytest
import torch
from torch import nn

from c2al.errors import CheckpointError
from c2al.nn.interactions import MLPY, StaticY
from c2al.training.diagnostics import Y_EDGES, YRecorder, gradient_split, weight_change


class Wrapper(nn.Module):
    """A model whose Y modules lie under "dhen.", as every wrapper of C2ALModel keeps them."""

    def __init__(self, *sources: nn.Module):
        super().__init__()
        self.dhen = nn.ModuleList(sources)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [source(x) for source in self.dhen]


def test_y_of_a_stream_against_numpy():
    torch.manual_seed(0)
    model = Wrapper(MLPY(fields=3, dim=4, hidden=8, p=4, k=5))
    batches = [torch.randn(rows, 3, 4) for rows in (7, 0, 30)]
    with YRecorder(model) as recorder:
        seen = [model(x)[0].detach().numpy().astype(np.float64) for x in batches]
    y = np.concatenate(seen)
    (name, got), *_ = recorder.summary().items()
    flat = y.ravel()
    assert (name, got["y"], got["values"]) == ("0", "mlp", flat.size)
    assert got["mean"] == pytest.approx(flat.mean(), rel=1e-9)
    assert got["std"] == pytest.approx(flat.std(), rel=1e-9)
    assert got["kurtosis"] == pytest.approx(((flat - flat.mean()) ** 4).mean() / flat.var() ** 2, rel=1e-9)
    assert got["near_zero"] == pytest.approx((np.abs(flat) < 0.01).mean())
    c = np.einsum("bpk,bqk->pq", y, y)
    assert got["participation_ratio"] == pytest.approx(np.trace(c) ** 2 / np.trace(c @ c))
    share = np.abs(y).reshape(len(y), -1)
    share /= share.sum(1, keepdims=True)
    assert got["entropy"] == pytest.approx((-(share * np.log(share)).sum(1) / math.log(20)).mean())
    edges = [-np.inf, *Y_EDGES, np.inf]
    assert got["histogram"] == np.histogram(flat, edges)[0].tolist()


def test_relative_near_zero_is_that_of_a_normal_at_any_scale():
    torch.manual_seed(0)
    expected = math.erf(0.1 / math.sqrt(2))
    for scale in (1e-3, 1.0, 5.0):
        model = Wrapper(StaticY(256, 512))
        model.dhen[0].y_PK.data.normal_(std=scale)
        with YRecorder(model) as recorder:
            model(torch.zeros(1, 1, 1))
        got = recorder.summary()["0"]
        # 131,072 draws: standard error of the share 0.0008; interpolation adds less
        assert got["near_zero_relative"] == pytest.approx(expected, abs=0.004)
        assert got["kurtosis"] == pytest.approx(3, abs=0.1)
        assert got["y"] == "static"


def test_degenerate_y():
    model = Wrapper(StaticY(4, 2), StaticY(4, 2), StaticY(4, 2))
    one_entry, constant, zero = (source.y_PK.data for source in model.dhen)
    one_entry.zero_()[0, 0] = 3.0
    constant.fill_(0.1)
    zero.zero_()
    with YRecorder(model) as recorder:
        model(torch.zeros(1, 1, 1))
    got = recorder.summary()
    assert (got["0"]["participation_ratio"], got["0"]["entropy"], got["0"]["near_zero"]) == (1.0, 0.0, 7 / 8)
    assert got["1"]["kurtosis"] is None
    assert got["1"]["entropy"] == pytest.approx(1)
    assert (got["2"]["near_zero"], got["2"]["std"], got["2"]["participation_ratio"]) == (1.0, 0.0, None)


def test_recorder_leaves_no_hook_and_skips_what_never_ran():
    model = Wrapper(StaticY(2, 2))
    with YRecorder(model) as recorder:
        pass
    model(torch.zeros(1, 1, 1))
    assert recorder.summary() == {}


def test_weight_change_by_hand():
    before = {"a.weight": torch.tensor([3.0, 4.0]), "a.bias": torch.zeros(1), "b.weight": torch.zeros(2)}
    after = {"a.weight": torch.tensor([3.0, 5.0]), "a.bias": torch.tensor([2.0]), "b.weight": torch.ones(2)}
    assert weight_change(before, after) == {"a": pytest.approx(math.sqrt(1 + 4) / 5), "b": None}


@pytest.mark.parametrize("after", [{}, {"a": torch.zeros(3)}])
def test_weight_change_of_another_model_names_the_parameter(after: dict[str, torch.Tensor]):
    with pytest.raises(CheckpointError, match="'a'"):
        weight_change({"a": torch.zeros(2)}, after)


class Lookup(torch.autograd.Function):
    """Stands for a table with a fused optimizer: its backward changes the table."""

    @staticmethod
    def forward(ctx, table, index):
        ctx.table = table
        return table[index]

    @staticmethod
    def backward(ctx, gradient):
        ctx.table.data.add_(1.0)
        return None, None


def test_gradient_split_by_hand_and_without_touching_the_table():
    table = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    pooled = Lookup.apply(table, torch.tensor([0, 1]))
    w, unused = nn.Parameter(torch.tensor([1.0, -1.0])), nn.Parameter(torch.ones(1))
    h = pooled @ w
    losses = (3 * h.sum(), h[0] - h[1] + 0 * unused.sum())
    got = gradient_split(losses, {"w": w, "pooled": pooled, "unused": unused})

    # d primary / dw = 3 * (4, 6), d aux / dw = (-2, -2)
    (at_w,) = got["w"]
    assert at_w.primary == pytest.approx(3 * math.sqrt(52))
    assert at_w.auxiliary == pytest.approx(math.sqrt(8))
    assert at_w.parallel == pytest.approx(-20 / math.sqrt(52))
    assert at_w.orthogonal == pytest.approx(math.sqrt(8 - 400 / 52))
    assert at_w.cosine == pytest.approx(-20 / math.sqrt(52 * 8))
    # d primary / d pooled = 3 (1, -1) in both rows, d aux = (1, -1) and (-1, 1): orthogonal
    (at_pooled,) = got["pooled"]
    assert (at_pooled.parallel, at_pooled.orthogonal) == (pytest.approx(0), pytest.approx(2))
    (everywhere,) = got[""]
    assert everywhere.parallel == pytest.approx(3 * -20 / math.sqrt(9 * 52 + 36))
    assert everywhere.auxiliary == pytest.approx(math.sqrt(8 + 4))
    assert got["unused"][0].cosine is None

    assert torch.equal(table.data, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert w.grad is None
    losses[0].backward()  # the graph is still there, and only now does the table move
    assert torch.equal(table.data, torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
