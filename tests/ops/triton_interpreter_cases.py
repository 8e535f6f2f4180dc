"""The Triton kernels in Triton's interpreter, on the CPU. Run by test_triton_interpreter.py.

In this version (3.7.1) the interpreter multiplies the raw bits of bfloat16 operands in `tl.dot` and
truncates float32 to bfloat16; the shim below mends both. It knows nothing of tf32, shared memory or
registers: test_triton_compile.py sees to those.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fm_reference import assert_within_rounding, operands, reference, relative, run
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from c2al.ops.field_attention import field_attention
from c2al.ops.fm_attention import fm_attention
from c2al.ops.triton import launch
from c2al.ops.triton.configurations import configurations

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before Triton is imported"

_plain_cast = InterpreterBuilder.cast_impl


def _widen(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return TensorHandle(np.matmul(_widen(a), _widen(b), dtype=np.float32) + d.data, d.dtype.scalar)


def _cast(self, source, target):
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        bits = source.data.view(np.uint32)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(nearest_even.astype(np.uint16), tl.bfloat16)
    return _plain_cast(self, source, target)


InterpreterBuilder.create_dot = _dot
InterpreterBuilder.cast_impl = _cast

SIZES = {  # B, M, D, K
    "odd": (5, 20, 24, 5),
    "several tiles": (2, 70, 70, 17),
    "one of each": (1, 1, 1, 1),
    "long fields": (3, 260, 20, 3),
    "long dims": (3, 20, 260, 3),
    "empty": (0, 20, 24, 5),
}


def use_candidate(monkeypatch, index):
    """The autotuner needs a card: take the candidate of this index without timing."""
    monkeypatch.setattr(launch, "configurations", lambda *a: [configurations(*a)[index]])


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    use_candidate(monkeypatch, 0)
    monkeypatch.setattr(launch, "_resident_programs", lambda *_: 2)
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def kind_of(size, layout, dtype):
    """What float32 products round like: long rows have no ieee kernels."""
    _, m, d, k = size
    p, q = (d, m) if layout == "paper" else (m, d)
    if dtype != "float32" or all(configurations(way, p, q, k, "ieee") for way in ("forward", "backward")):
        return dtype
    torch.backends.cuda.matmul.allow_tf32 = True
    return "tf32"


def attention(layout, norm_eps=None):
    return lambda x, y: torch.ops.c2al.fm_attention(x, y, layout, norm_eps)[0]


@pytest.mark.parametrize("shared", [False, True], ids=["per sample", "shared"])
@pytest.mark.parametrize("layout", ["paper", "wukong"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(("dtype", "candidate"), [("float32", 0), ("float16", 0), ("bfloat16", 0), ("bfloat16", -1)])
def test_output_and_every_gradient(dtype, candidate, size, layout, shared, monkeypatch):
    use_candidate(monkeypatch, candidate)
    x, y, grad = operands(size, layout, shared, getattr(torch, dtype))
    kind = kind_of(size, layout, dtype)
    if size[0] == 0:
        out, dx, dy = run(attention(layout), x, y, grad)
        assert out.shape == grad.shape
        assert dx.shape == x.shape
        assert torch.equal(dy, torch.zeros_like(y))
    else:
        assert_within_rounding(attention(layout), x, y, grad, layout, kind)


def to_tf32(x):
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("layout", ["paper", "wukong"])
@pytest.mark.parametrize("size", [(5, 20, 24, 5), (3, 260, 20, 3), (3, 20, 260, 3)])
def test_tf32_rounds_its_operands_to_the_nearest(size, layout):
    """The tensor cores cut bits off instead, which makes every product too small."""
    torch.backends.cuda.matmul.allow_tf32 = True
    x, y, grad = operands(size, layout, False, torch.float32)
    assert not torch.equal(x, to_tf32(x))
    actual = run(attention(layout), x, y, grad)
    rounded = run(attention(layout), *(to_tf32(t.detach()) for t in (x, y, grad)))
    for a, r, e in zip(actual, rounded, run(lambda x, y: reference(x, y, layout), x, y, grad), strict=True):
        assert torch.equal(a, r)
        assert relative(a, e) <= 6e-4
    special = x.detach().clone()
    special.view(torch.int32)[0, 0, 0] = 0x7FFFFFFF  # a GPU's NaN, whose rounded bits would be those of -0
    assert attention(layout)(special, y)[0].isnan().any()


@pytest.mark.parametrize("shared", [False, True], ids=["per sample", "shared"])
@pytest.mark.parametrize("layout", ["paper", "wukong"])
@pytest.mark.parametrize("size", [(5, 20, 24, 5), (3, 260, 20, 3), (3, 20, 260, 3), (3, 7, 9, 1)])
def test_layer_norm(size, layout, shared):
    kind = kind_of(size, layout, "float32")
    x, y, grad = operands(size, layout, shared, torch.float32)
    actual = run(attention(layout, 1e-2), x, y, grad)
    expected = run(lambda x, y: reference(x, y, layout, 1e-2), x, y, grad)
    # LayerNorm of three near-equal elements amplifies any rounding: that of the operands alone is the measure.
    rounded = run(lambda x, y: reference(x, y, layout, 1e-2), *(to_tf32(t.detach()) for t in (x, y, grad)))
    for a, e, r in zip(actual, expected, rounded, strict=True):
        if kind == "tf32":
            assert relative(a, e.double()) <= 3 * relative(r, e.double())
        else:  # rstd amplifies the rounding of rows of near-equal elements; absolute for K = 1, all zero
            torch.testing.assert_close(a.double(), e.double(), rtol=1e-4, atol=1e-4 * float(e.abs().max()) + 1e-6)


@pytest.mark.parametrize("layout", ["paper", "wukong"])
def test_layer_norm_in_bfloat16_is_as_good_as_eager(layout):
    x, y, grad = operands((4, 40, 48, 16), layout, False, torch.bfloat16)
    fused = run(attention(layout, 1e-5), x, y, grad)
    eager = run(lambda x, y: fm_attention(x, y, layout=layout, norm_eps=1e-5, backend="eager"), x, y, grad)
    expected = run(lambda x, y: reference(x, y, layout, 1e-5), x.double(), y.double(), grad)
    for f, g, e in zip(fused, eager, expected, strict=True):
        assert relative(f, e) <= 1.2 * relative(g, e)


def test_strided_x_is_read_in_place():
    x, y, grad = operands((5, 20, 24, 5), "paper", False, torch.float32)
    pooled = torch.cat([x.detach(), x.detach()], dim=2)[..., :24]
    assert launch._addressable(pooled) is pooled
    actual = run(lambda x, y: attention("paper")(torch.cat([x, x], 2)[..., :24], y), x, y, grad)
    expected = run(lambda x, y: reference(x, y, "paper"), x, y, grad)
    for a, e in zip(actual, expected, strict=True):
        assert relative(a, e.double()) <= 1e-6


def test_x_strided_along_its_last_dimension_is_copied():
    x, y, grad = operands((5, 20, 24, 5), "wukong", True, torch.float32)
    actual = run(lambda x, y: attention("wukong")(x.mT.contiguous().mT, y), x, y, grad)
    expected = run(lambda x, y: reference(x, y, "wukong"), x, y, grad)
    for a, e in zip(actual, expected, strict=True):
        assert relative(a, e.double()) <= 1e-6


@pytest.mark.parametrize("norm_eps", [None, 1e-3])
@pytest.mark.parametrize("shared", [False, True], ids=["per sample", "shared"])
@pytest.mark.parametrize("layout", ["paper", "wukong"])
def test_opcheck(layout, shared, norm_eps):
    x, y, grad = operands((3, 5, 7, 3), layout, shared, torch.float32)
    torch.library.opcheck(torch.ops.c2al.fm_attention.default, (x, y, layout, norm_eps))
    with torch.no_grad():
        out, rstd = torch.ops.c2al.fm_attention(x, y, layout, norm_eps)
        saved = (out if norm_eps else None, rstd)
        torch.library.opcheck(
            torch.ops.c2al.fm_attention_backward.default, (grad, x.detach(), y.detach(), *saved, layout)
        )


def test_second_derivative_is_refused():
    x, y, grad = operands((2, 3, 4, 2), "paper", False, torch.float32)
    (dx,) = torch.autograd.grad(attention("paper")(x, y), x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def test_compiled_training_is_one_graph_and_equal():
    x, y, grad = operands((6, 5, 8, 4), "paper", False, torch.float32)

    def step(x, y):
        return attention("paper", 1e-5)(x * 2, y.tanh()).relu()

    actual = run(torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager"), x, y, grad)
    torch.testing.assert_close(actual, run(step, x, y, grad), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["paper", "wukong"])
def test_flops_are_counted(layout):
    batch, m, d, k = 3, 5, 7, 2
    x, y, grad = operands((batch, m, d, k), layout, False, torch.float32)
    with FlopCounterMode(display=False) as forward:
        out = attention(layout)(x, y)
    with FlopCounterMode(display=False) as backward:
        out.backward(grad)
    assert forward.get_total_flops() == 4 * batch * m * d * k
    assert backward.get_total_flops() == 10 * batch * m * d * k  # T once more


@pytest.mark.parametrize("size", [(3, 20, 24, 2), (2, 33, 16, 1), (2, 1, 6, 3), (0, 4, 8, 2), (1, 17, 66, 3)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attention_among_fields(dtype, size):
    """Errors are those of torch's own products in this dtype, which round the same intermediates."""
    batch, fields, dim, heads = size
    qkv = torch.randn(batch, fields, 3 * dim, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    grad = torch.randn(batch, fields, dim, generator=torch.Generator().manual_seed(1)).to(qkv.dtype)

    def both(function, qkv):
        qkv = qkv.detach().clone().requires_grad_()
        out = function(qkv, heads)
        return [out.detach(), *torch.autograd.grad(out, qkv, grad.to(out.dtype))]

    fused = both(torch.ops.c2al.field_attention, qkv)
    eager, exact = both(field_attention, qkv), both(field_attention, qkv.double())
    for f, g, e in zip(fused, eager, exact, strict=True):
        assert f.dtype == qkv.dtype
        assert f.shape == e.shape
        if batch:
            assert relative(f, e) <= 1.2 * relative(g, e) + 1e-6
