"""The oracle of the FM attention tests: Eq. 3 in float64, and the runs it is compared with.

Tolerances. float32: relative Frobenius error 1e-6, sums of a few hundred products at 6e-8 each.
bfloat16 (unit roundoff 2^-9): T or S and the result are each rounded once, so an element errs by at
most 2^-8 of its product of absolute values, 1.1x for the accumulation, and the independent errors
average to well under 4e-3 in relative Frobenius norm; float16 (2^-11) a quarter of that. tf32 (2^-11,
inputs too): 1e-3.
"""

import torch

FROBENIUS = {"float32": 1e-6, "tf32": 1e-3, "bfloat16": 4e-3, "float16": 1e-3}
ELEMENTWISE = {"float32": 1e-6, "tf32": 1.1 * 2**-9, "bfloat16": 1.1 * 2**-8, "float16": 1.1 * 2**-10}


def reference(x, y, layout, norm_eps=None):
    """Eq. 3 by its Gram matrix, the order the product never takes; then LayerNorm by its definition."""
    x, y = x.double(), y.double()
    gram = torch.einsum("bmi,bmj->bij", x, x) if layout == "paper" else torch.einsum("bmd,bnd->bmn", x, x)
    g = torch.einsum("bij,bjk->bik", gram, y) if y.dim() == 3 else torch.einsum("bij,jk->bik", gram, y)
    if norm_eps is None:
        return g
    variance = ((g - g.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    return (g - g.mean(-1, keepdim=True)) / (variance + norm_eps).sqrt()


def operands(size, layout, shared, dtype=torch.float64, seed=0):
    batch, m, d, k = size
    generator = torch.Generator().manual_seed(seed)
    p = d if layout == "paper" else m
    x = torch.randn(batch, m, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    shape = (p, k) if shared else (batch, p, k)
    y = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(batch, p, k, generator=generator, dtype=torch.float64).to(dtype)
    return x, y, grad


def run(function, x, y, grad):
    """[out, dx, dy] of `function` from fresh leaves, so that calls do not share gradients."""
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    out = function(x, y)
    return [out.detach(), *torch.autograd.grad(out, (x, y), grad.to(out.dtype))]


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_within_rounding(function, x, y, grad, layout, kind):
    """Output and both gradients of `function` against the oracle on the same rounded operands."""
    actual = run(function, x, y, grad)
    expected = run(lambda x, y: reference(x, y, layout), x.double(), y.double(), grad)
    magnitude = run(lambda x, y: reference(x, y, layout), x.double().abs(), y.double().abs(), grad.abs())
    for a, e, bound in zip(actual, expected, magnitude, strict=True):
        assert a.dtype == x.dtype
        assert a.shape == e.shape
        assert relative(a, e) <= FROBENIUS[kind]
        assert ((a.double() - e).abs() <= ELEMENTWISE[kind] * bound).all()
