import math

import numpy as np
import pytest
import torch
from torch import nn

from c2al.errors import CheckpointError
from c2al.nn.interactions import MLPY, StaticY
from c2al.training.diagnostics import Y_EDGES, UnitRecorder, YRecorder, gramian_record, weight_change


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


def test_gramian_record_by_hand():
    gradient_TF = torch.tensor([[3.0, 4.0], [0.0, -5.0], [6.0, 8.0], [0.0, 0.0]], dtype=torch.float64)
    got = gramian_record(("primary", "head", "tail", "off"), gradient_TF @ gradient_TF.T)
    assert got["tasks"] == ["primary", "head", "tail", "off"]
    assert got["norms"] == [5, 5, 10, 0]
    # (0, -5) along (3, 4) / 5 is -4, and 3 across it.
    assert got["parallel"] == [5, -4, 10, 0]
    assert got["orthogonal"] == [0, 3, 0, 0]
    assert got["cosines"] == [[1, -0.8, 1, None], [-0.8, 1, -0.8, None], [1, -0.8, 1, None], [None] * 4]
    without = gramian_record(("primary", "head"), torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    assert (without["parallel"], without["orthogonal"], without["cosines"][0]) == ([0, 0], [0, 2], [None, None])


def test_dead_units_by_hand():
    class Over(nn.Module):
        def __init__(self):
            super().__init__()
            self.over = nn.Sequential(nn.Linear(2, 4), nn.ReLU())

        def forward(self, x):
            return self.over(x)

    model = Over()
    model.over[0].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    model.over[0].bias.data.zero_()
    with UnitRecorder(model) as recorder:
        model(torch.tensor([[1.0, -1.0], [2.0, -3.0]]))
        assert recorder.summary() == {"1": {"units": 4, "dead": 0.75}}
        model(torch.tensor([[-1.0, 0.0]]))
    assert recorder.summary() == {"1": {"units": 4, "dead": 0.5}}
    model(torch.ones(1, 2))
    assert recorder.summary() == {"1": {"units": 4, "dead": 0.5}}, "a hook is left"
