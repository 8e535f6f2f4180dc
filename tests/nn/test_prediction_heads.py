"""Heads, dense arch and the promise that auxiliary heads leave the rest untouched."""

import torch

from c2al.nn.dense import DenseArch
from c2al.nn.prediction_heads import Heads


def test_auxiliary_heads_change_nothing_else():
    def build(auxiliary):
        torch.manual_seed(3)
        dense = DenseArch(5, (7,), tokens=2, dim=4)
        return dense.state_dict(), Heads(8, (6,), auxiliary)

    (dense_without, without), (dense_with, with_) = build(False), build(True)
    extra = {n for n in with_.state_dict() if n.startswith(("head.", "tail."))}
    assert with_.state_dict().keys() - extra == without.state_dict().keys()
    assert extra
    assert all(torch.equal(with_.state_dict()[n], t) for n, t in without.state_dict().items())
    assert all(torch.equal(dense_with[n], t) for n, t in dense_without.items())


def test_columns_are_primary_head_tail():
    heads = Heads(8, (6,), auxiliary=True, auxiliary_hidden=(4,))
    h_BF = torch.randn(5, 8)
    for column, name in enumerate(("primary", "head", "tail")):
        first, _, last = getattr(heads, name)
        expected = torch.clamp(h_BF @ first.weight.T + first.bias, min=0) @ last.weight.T + last.bias
        torch.testing.assert_close(heads(h_BF)[:, column : column + 1], expected, rtol=1e-5, atol=1e-6)
    assert Heads(8, (), auxiliary=False)(h_BF).shape == (5, 1)


def test_auxiliary_heads_are_linear_by_default():
    heads = Heads(8, (6,), auxiliary=True)
    h_BF = torch.randn(5, 8)
    for column, (linear,) in ((1, heads.head), (2, heads.tail)):
        torch.testing.assert_close(heads(h_BF)[:, column], h_BF @ linear.weight[0] + linear.bias)


def test_dense_arch_makes_tokens():
    arch = DenseArch(5, (7, 6), tokens=3, dim=4)
    dense_BF = torch.randn(9, 5)
    assert arch(dense_BF).shape == (9, 3, 4)
    torch.testing.assert_close(arch(dense_BF).flatten(1), arch.mlp(dense_BF))
    assert not isinstance(arch.mlp[-1], torch.nn.ReLU)
    assert arch(dense_BF[:0]).shape == (0, 3, 4)
