"""Attention among fields on the CPU, and what it refuses. Its kernel: triton_interpreter_cases.py and the GPU tests."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from c2al.errors import BackendError, OperandError
from c2al.ops.field_attention import field_attention


@pytest.mark.parametrize("fields", [1, 7])
def test_it_is_torchs_attention_head_by_head(fields):
    qkv = torch.randn(3, fields, 30, dtype=torch.float64, requires_grad=True)
    heads = [t.unflatten(2, (2, 5)).transpose(1, 2) for t in qkv.chunk(3, dim=-1)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    actual, grad = field_attention(qkv, 2), torch.randn(3, fields, 10, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    of_actual, of_expected = (torch.autograd.grad(out, qkv, grad)[0] for out in (actual, expected))
    torch.testing.assert_close(of_actual, of_expected, rtol=1e-12, atol=1e-12)


def test_an_empty_batch():
    assert field_attention(torch.zeros(0, 4, 24), 2).shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("shape", "heads"), [((2, 4, 25), 2), ((2, 4, 24), 3), ((4, 24), 2), ((2, 4, 24), 0), ((2, 4, 0), 1)]
)
def test_operands_that_do_not_fit_are_named(shape, heads):
    with pytest.raises(OperandError, match=r"qkv must be \(B, M, 3 D\)") as raised:
        field_attention(torch.zeros(shape), heads)
    assert str(tuple(shape)) in str(raised.value)


def test_unknown_and_unusable_backends():
    with pytest.raises(OperandError, match="'cuda' is none of"):
        field_attention(torch.zeros(2, 4, 24), 2, backend="cuda")
    with pytest.raises(BackendError, match="qkv is on cpu"):
        field_attention(torch.zeros(2, 4, 24), 2, backend="triton")


def test_the_kernels_flops_are_counted():
    """Two products of M x M x S per head forward, five backward."""
    with FlopCounterMode(display=False) as flops, torch.device("meta"):
        qkv = torch.zeros(3, 7, 30, requires_grad=True)
        torch.ops.c2al.field_attention(qkv, 2).sum().backward()
    assert flops.get_total_flops() == 14 * 3 * 7 * 7 * 10
