"""The fused kernels on a GPU: run with `pytest -m gpu tests/ops tests/nn`, torch and triton suffice."""

import pytest
import torch
from fm_reference import assert_within_rounding, operands, reference, relative, run

from c2al.errors import BackendError
from c2al.ops.fm_attention import fm_attention
from c2al.ops.triton.configurations import configurations, precision_of

pytestmark = pytest.mark.gpu

SIZES = {  # B, M, D, K
    "odd": (7, 20, 24, 5),
    "one of each": (1, 1, 1, 1),
    "small": (512, 16, 64, 8),
    "wide": (64, 128, 128, 32),
    "many columns": (8, 512, 128, 64),
    "long fields": (8, 300, 16, 8),
    "long dims": (8, 16, 300, 8),
    "empty": (0, 20, 24, 5),
}
KINDS = ("bfloat16", "float16", "tf32", "float32")


@pytest.fixture(params=KINDS)
def kind(request):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param == "tf32"
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(size, layout, shared, kind):
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    x, y, grad = operands(size, layout, shared, dtype)
    return x.detach().cuda().requires_grad_(), y.detach().cuda().requires_grad_(), grad.cuda()


@pytest.mark.parametrize("shared", [False, True], ids=["per sample", "shared"])
@pytest.mark.parametrize("layout", ["paper", "wukong"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_output_and_every_gradient(kind, size, layout, shared):
    x, y, grad = on_gpu(size, layout, shared, kind)

    def fused(x, y):
        return fm_attention(x, y, layout=layout, backend="triton")

    p, q = (size[2], size[1]) if layout == "paper" else (size[1], size[2])
    if not all(configurations(d, p, q, size[3], precision_of(x.dtype)) for d in ("forward", "backward")):
        assert kind in ("tf32", "float32")
        with pytest.raises(BackendError, match=f"p={p}, q={q}"):
            fused(x, y)
    elif size[0] == 0:
        assert [t.shape for t in run(fused, x, y, grad)] == [grad.shape, x.shape, y.shape]
    else:
        assert_within_rounding(fused, x, y, grad, layout, kind)


@pytest.mark.parametrize("shared", [False, True], ids=["per sample", "shared"])
@pytest.mark.parametrize("layout", ["paper", "wukong"])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_bfloat16_is_as_good_as_eager(norm_eps, layout, shared):
    x, y, grad = on_gpu((64, 48, 64, 16), layout, shared, "bfloat16")
    fused, eager = (
        run(lambda x, y, b=b: fm_attention(x, y, layout=layout, norm_eps=norm_eps, backend=b), x, y, grad)
        for b in ("triton", "eager")
    )
    expected = run(lambda x, y: reference(x, y, layout, norm_eps), x.double(), y.double(), grad)
    for f, g, e in zip(fused, eager, expected, strict=True):
        assert relative(f, e) <= 1.2 * relative(g, e)


def test_gradient_of_shared_y_is_reproducible():
    x, y, grad = on_gpu((4096, 20, 16, 8), "paper", True, "bfloat16")
    first, again = (run(lambda x, y: fm_attention(x, y, layout="paper", norm_eps=1e-5), x, y, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_offsets_beyond_32_bits():
    batch, m, d, k = 70_000, 256, 128, 8  # x has 2.3e9 elements
    x = torch.zeros(batch, m, d, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(m, d)
    y = torch.randn(batch, d, k, dtype=torch.bfloat16, device="cuda")
    out = fm_attention(x, y, layout="paper", backend="triton")
    assert relative(out[-1:], reference(x[-1:], y[-1:], "paper")) <= 4e-3


def test_compiled_training_equals_eager():
    x, y, grad = on_gpu((64, 20, 16, 8), "paper", False, "bfloat16")

    def step(x, y):
        return fm_attention(x * 2, y.tanh(), layout="paper", norm_eps=1e-5).relu()

    for a, b in zip(run(torch.compile(step, fullgraph=True), x, y, grad), run(step, x, y, grad), strict=True):
        assert relative(a, b.double()) <= 1e-2  # Inductor keeps 2x and tanh y in float32 for longer


def test_auto_falls_back_where_no_kernel_covers_the_shape(caplog):
    x, y, _ = on_gpu((2, 8, 8, 200), "paper", False, "bfloat16")
    with caplog.at_level("INFO", logger="c2al.ops.fm_attention"):
        fm_attention(x, y, layout="paper")
    assert "K=200" in caplog.text
    with pytest.raises(BackendError, match="K=200"):
        fm_attention(x, y, layout="paper", backend="triton")
