"""Prediction heads, dense arch and the promise that auxiliary ones leave the rest untouched."""

import math

import pytest
import torch

from c2al.nn.dense import DenseArch
from c2al.nn.prediction_heads import Heads


@pytest.mark.parametrize("cohorts", [1, 2, 7])
def test_auxiliary_heads_change_nothing_else(cohorts):
    def build(cohorts):
        torch.manual_seed(3)
        dense = DenseArch(5, (7,), tokens=2, dim=4)
        return dense.state_dict(), Heads(8, (6,), cohorts)

    (dense_without, without), (dense_with, with_) = build(0), build(cohorts)
    extra = {n for n in with_.state_dict() if n.startswith("auxiliary.")}
    assert with_.state_dict().keys() - extra == without.state_dict().keys()
    assert extra
    assert all(torch.equal(with_.state_dict()[n], t) for n, t in without.state_dict().items())
    assert all(torch.equal(dense_with[n], t) for n, t in dense_without.items())


def test_columns_are_the_primary_task_and_then_the_cohorts():
    heads = Heads(8, (6,), 2, auxiliary_hidden=(4,))
    h_BF = torch.randn(5, 8)
    for column, (first, _, last) in enumerate((heads.primary, *heads.auxiliary)):
        expected = torch.clamp(h_BF @ first.weight.T + first.bias, min=0) @ last.weight.T + last.bias
        torch.testing.assert_close(heads([h_BF] * 3)[:, column : column + 1], expected, rtol=1e-5, atol=1e-6)
    assert Heads(8, ())([h_BF]).shape == (5, 1)


def test_auxiliary_heads_are_linear_by_default():
    heads = Heads(8, (6,), 2)
    h_BF = torch.randn(5, 8)
    for column, (linear,) in enumerate(heads.auxiliary, 1):
        torch.testing.assert_close(heads([h_BF] * 3)[:, column], h_BF @ linear.weight[0] + linear.bias)


def test_primed_biases_are_the_log_odds_of_the_rates_and_nothing_else_moves():
    heads = Heads(8, (6,), 2, auxiliary_hidden=(4,))
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    rates, state = (0.2, 0.03, 0.9), torch.get_rng_state()
    heads.prime(rates)
    assert torch.equal(torch.get_rng_state(), state)
    last = ("primary.2.bias", "auxiliary.0.2.bias", "auxiliary.1.2.bias")
    for name, value in heads.state_dict().items():
        if name in last:
            rate = rates[last.index(name)]
            assert value.item() == pytest.approx(math.log(rate / (1 - rate)), rel=1e-6)
        else:
            assert torch.equal(value, before[name]), name


def test_dense_arch_makes_tokens():
    arch = DenseArch(5, (7, 6), tokens=3, dim=4)
    dense_BF = torch.randn(9, 5)
    assert arch(dense_BF).shape == (9, 3, 4)
    torch.testing.assert_close(arch(dense_BF).flatten(1), arch.mlp(dense_BF))
    assert not isinstance(arch.mlp[-1], torch.nn.ReLU)
    assert arch(dense_BF[:0]).shape == (0, 3, 4)
