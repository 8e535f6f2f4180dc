"""The CPU's bfloat16 kernel: every edge of its panels and tiles, and nothing written beyond its results."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from fm_reference import assert_within_rounding, operands, reference, relative, run

from c2al.ops import _avx512 as KERNEL
from c2al.ops import eager as eager_ops
from c2al.ops import fm_attention as module
from c2al.ops.fm_attention import fm_attention

pytestmark = pytest.mark.skipif(bool(KERNEL.obstacle()), reason=KERNEL.obstacle())

SIZES = {  # B, M, D, K
    "one tile": (1, 8, 8, 8),
    "odd fields": (5, 9, 16, 8),
    "overlapping tiles": (7, 23, 40, 24),
    "two panels and a narrow one": (3, 37, 72, 40),
    "more than a block of pairs": (2, 31, 264, 136),
    "pieces of several samples": (200, 11, 24, 16),
    "full panels": (4, 64, 96, 64),
}
LAYOUTS = ("paper", "wukong")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_output_and_every_gradient_are_rounded_no_worse_than_eager(size, layout):
    x, y, grad = operands(size, layout, False, torch.bfloat16)
    assert KERNEL.covers(x, y)
    assert_within_rounding(lambda x, y: fm_attention(x, y, layout=layout), x, y, grad, layout, "bfloat16")
    actual = run(lambda x, y: fm_attention(x, y, layout=layout), x, y, grad)
    eager = run(lambda x, y: fm_attention(x, y, layout=layout, backend="eager"), x, y, grad)
    expected = run(lambda x, y: reference(x, y, layout), x.double(), y.double(), grad)
    for a, e, plain in zip(actual, expected, eager, strict=True):
        assert relative(a, e) <= 1.2 * relative(plain, e)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_nothing_is_written_beyond_the_results(size, layout):
    x, y, grad = (t.detach() for t in operands(size, layout, False, torch.bfloat16))
    paper, guard = layout == "paper", 4096
    _, t = eager_ops.products(x, y, paper)

    def guarded(like):
        store = torch.full((like.numel() + 2 * guard,), 7.0, dtype=torch.bfloat16)
        return store, store[guard:-guard].view(like.shape)

    results = [guarded(like) for like in (t, y, y, x)]
    inner, out, dy, dx = (view for _, view in results)
    KERNEL._run(x, y, inner, out, paper)
    KERNEL._run(x, grad, None, dy, paper, (y, t, dx))
    for store, view in results:
        assert (store[:guard] == 7).all()
        assert (store[-guard:] == 7).all()
        assert not (view == 7).all(-1).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_beyond_an_operand_is_used(layout):
    """Rows and samples of NaN between those of the operands leave every result as it was."""
    x, y, grad = (t.detach() for t in operands((6, 9, 24, 8), layout, False, torch.bfloat16))
    wide = torch.full((12, 20, 40), float("nan"), dtype=torch.bfloat16)
    wide[::2, 1:10, 3:27] = x
    strided = wide[::2, 1:10, 3:27]
    expected = run(lambda x, y: fm_attention(x, y, layout=layout), x, y, grad)
    g, t = KERNEL.products(strided, y, layout == "paper")
    dx, dy = KERNEL.gradients(grad, strided, y, t, layout == "paper")
    for a, e in zip((g, dx, dy), expected, strict=True):
        assert torch.equal(a, e)


def test_other_strides_are_copied():
    x, y, grad = (t.detach() for t in operands((6, 16, 24, 8), "paper", False, torch.bfloat16))
    expected = run(lambda x, y: fm_attention(x, y, layout="paper"), x, y, grad)
    g, t = KERNEL.products(x.mT.contiguous().mT, y.mT.contiguous().mT, True)
    t = t.mT.contiguous().mT
    dx, dy = KERNEL.gradients(grad.mT.contiguous().mT, x.mT.contiguous().mT, y.mT.contiguous().mT, t, True)
    for a, e in zip((g, dx, dy), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads(layout):
    x, y, grad = operands((50, 17, 40, 24), layout, False, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run(lambda x, y: fm_attention(x, y, layout=layout), x, y, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_not_a_number_stays_in_its_sample():
    x, y, _ = (t.detach() for t in operands((4, 8, 8, 8), "paper", False, torch.bfloat16))
    x[1, 2, 3], x[3, 0, 0] = float("nan"), float("inf")
    g, _ = KERNEL.products(x, y, True)
    assert g[0].isfinite().all()
    assert g[2].isfinite().all()
    assert g[1].isnan().any()
    assert not g[3].isfinite().all()


COVERED = {  # (B, M, D, K), shared, dtype: whether the kernel takes it
    "smallest": ((1, 8, 8, 8), False, torch.bfloat16, True),
    "few fields": ((3, 7, 8, 8), False, torch.bfloat16, False),
    "odd dim": ((3, 8, 12, 8), False, torch.bfloat16, False),
    "odd columns": ((3, 8, 8, 3), False, torch.bfloat16, False),
    "shared": ((3, 8, 8, 8), True, torch.bfloat16, False),
    "float16": ((3, 8, 8, 8), False, torch.float16, False),
    "empty": ((0, 8, 8, 8), False, torch.bfloat16, False),
}


@pytest.mark.parametrize(("size", "shared", "dtype", "taken"), COVERED.values(), ids=COVERED.keys())
def test_other_operands_take_the_eager_path(size, shared, dtype, taken):
    x, y, grad = operands(size, "paper", shared, dtype)
    assert module._implementation(x, y, "auto") is (KERNEL if taken else eager_ops)
    assert module._implementation(x, y, "eager") is eager_ops
    actual = run(lambda x, y: fm_attention(x, y, layout="paper"), x, y, grad)
    eager = run(lambda x, y: fm_attention(x, y, layout="paper", backend="eager"), x, y, grad)
    for a, e in zip(actual, eager, strict=True):
        torch.testing.assert_close(a, e, rtol=2**-6, atol=2**-3)


def test_the_choice_is_logged_once(caplog):
    module._log_choice.cache_clear()
    x, y, _ = operands((2, 8, 8, 8), "paper", False, torch.bfloat16)
    with caplog.at_level(logging.INFO):
        fm_attention(x, y, layout="paper")
        fm_attention(x, y, layout="paper")
    assert [r.getMessage() for r in caplog.records if "AVX-512" in r.getMessage()] == [
        "fm_attention on cpu in bfloat16: AVX-512 kernels where sizes allow"
    ]


def test_opcheck_and_layer_norm_and_one_graph():
    x, y, grad = operands((3, 9, 16, 8), "wukong", False, torch.bfloat16)
    torch.library.opcheck(torch.ops.c2al.fm_attention.default, (x, y, "wukong", 1e-3, "auto"))

    def step(x, y):
        return fm_attention(x * 2, y, layout="wukong", norm_eps=1e-3)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, e in zip(run(compiled, x, y, grad), run(step, x, y, grad), strict=True):
        assert torch.equal(a, e)
    expected = run(lambda x, y: reference(x * 2, y, "wukong", 1e-3), x.double(), y.double(), grad)
    plain = run(lambda x, y: fm_attention(x * 2, y, layout="wukong", norm_eps=1e-3, backend="eager"), x, y, grad)
    for a, e, c in zip(run(step, x, y, grad), expected, plain, strict=True):
        assert relative(a, e) <= 1.2 * relative(c, e)


@pytest.mark.parametrize("setting", ["NUMBA_CPU_NAME=generic", "NUMBA_DISABLE_JIT=1", "NUMBA_CPU_FEATURES=+avx2"])
def test_a_compiler_for_another_processor_is_not_asked(setting):
    """LLVM would end the process; the op runs eager and says so."""
    code = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from c2al.ops.fm_attention import fm_attention
x, y = torch.ones(2, 8, 8, dtype=torch.bfloat16), torch.ones(2, 8, 8, dtype=torch.bfloat16)
assert (fm_attention(x, y, layout="paper") == 64).all()
"""
    environment = os.environ | dict([setting.split("=")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "eager kernels (numba does not compile" in done.stderr
