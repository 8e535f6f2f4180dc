"""fm_attention on the CPU against its formula, written again in fm_reference.py in float64."""

import pytest
import torch
from fm_reference import assert_within_rounding, operands, reference, run
from torch.utils.flop_counter import FlopCounterMode

from c2al.errors import BackendError, OperandError
from c2al.ops.fm_attention import fm_attention
from c2al.ops.triton.configurations import configurations, precision_of

SIZES = {  # B, M, D, K
    "odd": (3, 5, 7, 3),
    "one field": (4, 1, 6, 2),
    "one column": (4, 6, 5, 1),
    "one row": (1, 9, 4, 2),
    "one dim": (2, 3, 1, 2),
    "all one": (1, 1, 1, 1),
    "wide": (2, 33, 20, 17),
    "empty": (0, 5, 7, 3),
}
LAYOUTS = ("paper", "wukong")


@pytest.mark.parametrize("norm_eps", [None, 1e-3])
@pytest.mark.parametrize("shared", [False, True], ids=["per sample", "shared"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_output_and_every_gradient_match_the_formula(size, layout, shared, norm_eps):
    x, y, grad = operands(size, layout, shared)
    actual = run(lambda x, y: fm_attention(x, y, layout=layout, norm_eps=norm_eps), x, y, grad)
    expected = run(lambda x, y: reference(x, y, layout, norm_eps), x, y, grad)
    assert actual[0].is_contiguous()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True], ids=["per sample", "shared"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, shared):
    x, y, _ = operands((2, 4, 3, 3), layout, shared)
    for norm_eps in (None, 0.1):
        assert torch.autograd.gradcheck(lambda x, y, e=norm_eps: fm_attention(x, y, layout=layout, norm_eps=e), (x, y))


@pytest.mark.parametrize("shared", [False, True], ids=["per sample", "shared"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_stays_within_its_bound(dtype, layout, shared):
    x, y, grad = operands((16, 24, 40, 8), layout, shared, dtype)
    assert_within_rounding(lambda x, y: fm_attention(x, y, layout=layout), x, y, grad, layout, str(dtype)[6:])


@pytest.mark.parametrize("shared", [False, True], ids=["per sample", "shared"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands_need_no_copy_by_the_caller(layout, shared):
    x, y, grad = operands((4, 6, 5, 3), layout, shared)
    expected = run(lambda x, y: reference(x, y, layout), x, y, grad)
    views = {
        "slice of wider rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        "transposed storage": lambda t: t.mT.contiguous().mT,
        "every second": lambda t: t.repeat_interleave(2, 0)[::2],
    }
    for view in views.values():
        assert not view(x).is_contiguous()
        actual = run(lambda x, y, v=view: fm_attention(v(x), v(y), layout=layout), x, y, grad)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    actual = run(lambda x, y: fm_attention(x, y, layout=layout), x, y, grad.mT.contiguous().mT)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_gradient_of_one_operand_alone():
    x, y, grad = operands((3, 5, 7, 3), "paper", False)
    _, dx, dy = run(lambda x, y: reference(x, y, "paper"), x, y, grad)
    torch.testing.assert_close(torch.autograd.grad(fm_attention(x, y.detach(), layout="paper"), x, grad)[0], dx)
    torch.testing.assert_close(torch.autograd.grad(fm_attention(x.detach(), y, layout="paper"), y, grad)[0], dy)


def test_second_derivative():
    x, y, _ = operands((2, 3, 4, 2), "paper", False)
    assert torch.autograd.gradgradcheck(lambda x, y: fm_attention(x, y, layout="paper", norm_eps=0.1), (x, y))


def test_compiled_training_is_one_graph_and_equal():
    x, y, grad = operands((6, 5, 8, 4), "paper", False, torch.float32)

    def step(x, y):
        return fm_attention(x * 2, y.tanh(), layout="paper", norm_eps=1e-5).relu()

    actual = run(torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager"), x, y, grad)
    torch.testing.assert_close(actual, run(step, x, y, grad), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_compiled_by_inductor_is_equal():
    x, y, grad = operands((6, 5, 8, 4), "paper", False, torch.float32)

    def step(x, y):
        return fm_attention(x * 2, y.tanh(), layout="paper", norm_eps=1e-5).relu()

    actual = run(torch.compile(step, fullgraph=True), x, y, grad)
    torch.testing.assert_close(actual, run(step, x, y, grad), rtol=1e-5, atol=1e-5)


def test_exported_with_a_dynamic_batch():
    class Attend(torch.nn.Module):
        def forward(self, x, y):
            return fm_attention(x, y, layout="wukong", norm_eps=1e-3)

    x, y, _ = operands((4, 5, 7, 3), "wukong", False, torch.float32)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Attend(), (x.detach(), y.detach()), dynamic_shapes=({0: batch}, {0: batch}))
    # Plain lines, so that a compiler fuses them with what stands around and a server needs no op of ours.
    assert not [n for n in program.graph.nodes if "c2al" in str(n.target)]
    for size in (2, 9):
        x, y, _ = operands((size, 5, 7, 3), "wukong", False, torch.float32)
        torch.testing.assert_close(program.module()(x, y), Attend()(x, y), rtol=0, atol=0)


def test_autocast_casts_both_operands_and_gradients_keep_their_dtype():
    x, y, _ = operands((4, 5, 7, 3), "paper", False, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = fm_attention(x, y.detach().bfloat16().requires_grad_(), layout="paper")
        mixed = fm_attention(x.double(), y.double(), layout="paper")
    assert out.dtype == torch.bfloat16
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(out, fm_attention(x.bfloat16(), y.bfloat16(), layout="paper"), rtol=0, atol=0)
    assert torch.autograd.grad(out.float().sum(), x)[0].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flops_are_counted(layout):
    batch, m, d, k = 3, 5, 7, 2
    x, y, grad = operands((batch, m, d, k), layout, False)
    with FlopCounterMode(display=False) as forward:
        out = fm_attention(x, y, layout=layout)
    with FlopCounterMode(display=False) as backward:
        out.backward(grad)
    assert forward.get_total_flops() == 4 * batch * m * d * k
    assert backward.get_total_flops() == 8 * batch * m * d * k


def test_gram_matrix_is_not_formed():
    """With p much longer than q and K, the Gram order would allocate p x p a sample."""
    x, y, _ = operands((1, 2, 4096, 2), "paper", False, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        fm_attention(x, y, layout="paper")
    largest = max(e.cpu_memory_usage for e in profile.events())
    assert 0 < largest < 4 * 4096 * 64


BAD = {
    "x of rank 2": ({"x": (5, 7)}, r"x must be \(B, M, D\)"),
    "y of rank 1": ({"y": (7,)}, r"\(p, K\)"),
    "y of the other layout": ({"y": (3, 5, 2)}, r"y must be \(3, 7, K\)"),
    "y of another batch": ({"y": (4, 7, 2)}, r"y must be \(3, 7, K\)"),
    "no columns": ({"y": (3, 7, 0)}, "only the batch may be empty"),
    "no fields": ({"x": (3, 0, 7)}, "only the batch may be empty"),
    "mixed dtypes": ({"y_dtype": torch.float64}, r"x is torch.float32, y is torch.float64"),
    "integers": ({"x_dtype": torch.int64, "y_dtype": torch.int64}, "floating dtype"),
    "mixed devices": ({"y_device": "meta"}, "x is on cpu, y on meta"),
    "unknown layout": ({"layout": "papr"}, "'papr' is none of 'paper', 'wukong'"),
    "unknown backend": ({"backend": "cuda"}, "'cuda' is none of"),
    "norm_eps of 0": ({"norm_eps": 0.0}, "must be positive, is 0.0"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_operands_that_do_not_fit_are_named(change, message):
    given = {
        "x": (3, 5, 7),
        "y": (3, 7, 2),
        "x_dtype": torch.float32,
        "y_dtype": torch.float32,
        "y_device": "cpu",
    } | change
    x = torch.zeros(given.pop("x"), dtype=given.pop("x_dtype"))
    y = torch.zeros(given.pop("y"), dtype=given.pop("y_dtype"), device=given.pop("y_device"))
    with pytest.raises(OperandError, match=message):
        fm_attention(x, y, **{"layout": "paper", **given})


def test_triton_on_the_cpu_is_refused():
    x, y, _ = operands((3, 5, 7, 3), "paper", False, torch.float32)
    with pytest.raises(BackendError, match=r"backend='triton'.*cpu"):
        fm_attention(x, y, layout="paper", backend="triton")


def test_the_choice_of_kernels_can_be_traced():
    """On a GPU torch.compile traces the look-up; the CPU path never reaches it."""

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def covered(x):
        m, d = x.shape[1:]
        return x + bool(configurations("backward", d, m, 8, precision_of(x.dtype)))

    assert covered(torch.zeros(3, 20, 16)).max() == 1
    assert covered(torch.zeros(3, 2000, 1600)).max() == 0
