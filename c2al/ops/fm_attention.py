"""FM attention, the heart of every DHEN layer: G = X X^T Y (C2AL, Eq. 3).

Legend: B batch, M fields, D embedding dim, K columns of Y. Each layout is the same product over a
p x q matrix A per sample: G = A (A^T Y), with A a view of x.

    layout      A        p    q    Y        mixes
    "paper"     x^T      D    M    D x K    embedding dimensions
    "wukong"    x        M    D    M x K    fields

Everywhere but on a GPU this is the plain lines of `_products`: in a whole training step they are faster than a
hand-written backward that saves T, and torch.compile fuses them with what stands around (docs/LOG.md).
On a GPU it is one opaque op with a Triton kernel each way.
"""

import functools
import logging
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from c2al.errors import BackendError, OperandError
from c2al.ops.backend import Backend, device_obstacle
from c2al.ops.triton.configurations import configurations, precision_of

Layout = Literal["paper", "wukong"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_log = logging.getLogger(__name__)


def fm_attention(
    x_BMD: Tensor,
    y: Tensor,
    *,
    layout: Layout,
    norm_eps: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """G = A (A^T Y) of every sample (C2AL, Eq. 3), optionally normalised; differentiable in x and y.

    Args:
        x_BMD: fields of the batch, float64, float32, bfloat16 or float16. B may be 0.
        y: (B, p, K) per sample or (p, K) shared by the batch; p = D for "paper", M for "wukong".
            Same dtype and device as x. Under autocast both are cast to the autocast dtype.
        layout: "paper" or "wukong", see the head of this file.
        norm_eps: None returns G. A number returns LayerNorm of each row of G over K, without scale
            and shift: (G - mean) / sqrt(var + norm_eps), var the biased variance. With K = 1 that is 0.
        backend: "eager" runs matrix products of torch; "triton" the fused CUDA kernels, whose float32
            products follow torch.backends.cuda.matmul.allow_tf32 and which are differentiable once;
            "auto" takes Triton where the device and the operands allow it, else eager, and logs on
            a GPU which of the two it took, once.

    Returns:
        (B, p, K), contiguous, in x's dtype (autocast's, under autocast).

    Cost: 4 B p q K FLOPs forward and 8 B p q K backward (10 in Triton, which computes T = A^T Y again),
    never 2 p^2 (q + K): the Gram matrix A A^T is not formed.

    Raises:
        OperandError: ranks, sizes, dtypes or devices that do not fit, unknown layout or backend.
        BackendError: backend="triton" where no usable GPU is, or for a shape its kernels do not cover.
    """
    device = x_BMD.device.type
    if torch.is_autocast_enabled(device):
        x_BMD, y = (t.to(torch.get_autocast_dtype(device)) if t.dtype != torch.float64 else t for t in (x_BMD, y))
    _check(x_BMD, y, layout, norm_eps)
    if _resolve(x_BMD, y, layout, backend) == "eager":
        return _products(x_BMD, y, layout, norm_eps)
    out_BPK: Tensor = _forward_op(x_BMD, y, layout, norm_eps)[0]
    return out_BPK


def _products(x_BMD: Tensor, y: Tensor, layout: str, norm_eps: float | None) -> Tensor:
    """Eq. 3 in torch, then LayerNorm of the rows."""
    a_BPQ = x_BMD.mT if layout == "paper" else x_BMD
    if layout == "wukong" and y.dim() == 2 and not y.requires_grad:
        # matmul does just this here, but a program of torch.export with its expansion refuses a batch of one row.
        t_BQK = torch.bmm(a_BPQ.mT, y.expand(x_BMD.shape[0], -1, -1))
    else:
        t_BQK = torch.matmul(a_BPQ.mT, y)
    g_BPK = torch.bmm(a_BPQ, t_BQK)
    if norm_eps is None:
        return g_BPK
    # CUDA's autocast gives LayerNorm back in float32.
    return F.layer_norm(g_BPK, g_BPK.shape[-1:], eps=norm_eps).to(g_BPK.dtype)


def _check(x_BMD: Tensor, y: Tensor, layout: str, norm_eps: float | None) -> None:
    if layout not in ("paper", "wukong"):
        raise OperandError(f"fm_attention: layout {layout!r} is none of 'paper', 'wukong'")
    shapes = f"x is {tuple(x_BMD.shape)}, y is {tuple(y.shape)}, layout {layout!r}"
    if x_BMD.dim() != 3 or y.dim() not in (2, 3):
        raise OperandError(f"fm_attention: x must be (B, M, D) and y (B, p, K) or (p, K); {shapes}")
    p = x_BMD.shape[2 if layout == "paper" else 1]
    if y.shape[-2] != p or (y.dim() == 3 and y.shape[0] != x_BMD.shape[0]):
        raise OperandError(f"fm_attention: y must be ({x_BMD.shape[0]}, {p}, K) or ({p}, K); {shapes}")
    if 0 in (x_BMD.shape[1], x_BMD.shape[2], y.shape[-1]):
        raise OperandError(f"fm_attention: only the batch may be empty; {shapes}")
    if x_BMD.dtype != y.dtype or x_BMD.dtype not in _DTYPES:
        raise OperandError(f"fm_attention: x and y must share a floating dtype; x is {x_BMD.dtype}, y is {y.dtype}")
    if x_BMD.device != y.device:
        raise OperandError(f"fm_attention: x is on {x_BMD.device}, y on {y.device}")
    if norm_eps is not None and not norm_eps > 0:
        raise OperandError(f"fm_attention: norm_eps must be positive, is {norm_eps}")


def _resolve(x_BMD: Tensor, y: Tensor, layout: str, backend: str) -> Literal["triton", "eager"]:
    """What runs these operands."""
    if backend not in ("auto", "triton", "eager"):
        raise OperandError(f"fm_attention: backend {backend!r} is none of 'auto', 'triton', 'eager'")
    if backend == "eager" or (backend == "auto" and x_BMD.device.type == "cpu"):
        return "eager"
    obstacle = _obstacle(x_BMD, y, layout)
    if backend == "triton" and obstacle:
        raise BackendError(f"fm_attention: backend='triton' cannot run here: {obstacle}")
    if backend == "auto" and not torch.compiler.is_compiling():
        _log_choice(x_BMD.device.type, f"torch's matrix products ({obstacle})" if obstacle else "Triton kernels")
    return "eager" if obstacle else "triton"


def _obstacle(x_BMD: Tensor, y: Tensor, layout: str) -> str:
    """Why the Triton kernels cannot take these operands; empty if they can."""
    if found := device_obstacle(x_BMD, "x"):
        return found
    if x_BMD.dtype == torch.float64:
        return "no float64 kernels"
    p, q = x_BMD.shape[:0:-1] if layout == "paper" else x_BMD.shape[1:]
    k, precision = y.shape[-1], precision_of(x_BMD.dtype)
    if not all(configurations(direction, p, q, k, precision) for direction in ("forward", "backward")):
        return f"no kernels for p={p}, q={q}, K={k} in {precision} precision"
    return ""


@functools.cache
def _log_choice(device: str, choice: str) -> None:
    _log.info("fm_attention on %s: %s", device, choice)


@torch.library.custom_op("c2al::fm_attention", mutates_args=(), device_types=("cpu", "cuda"))
def _forward_op(x_BMD: Tensor, y: Tensor, layout: str, norm_eps: float | None) -> tuple[Tensor, Tensor]:
    """(out, 1 / standard deviation of the rows of G or size 0) by Triton; on the CPU in its interpreter only."""
    from c2al.ops.triton import launch

    return launch.forward(x_BMD, y, layout == "paper", norm_eps)


@_forward_op.register_fake
def _(x_BMD: Tensor, y: Tensor, layout: str, norm_eps: float | None) -> tuple[Tensor, Tensor]:
    batch, fields, dim = x_BMD.shape
    p = dim if layout == "paper" else fields
    rstd_BP = x_BMD.new_empty(0 if norm_eps is None else (batch, p), dtype=torch.float32)
    return x_BMD.new_empty(batch, p, y.shape[-1]), rstd_BP


@torch.library.custom_op("c2al::fm_attention_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward_op(
    grad_BPK: Tensor, x_BMD: Tensor, y: Tensor, out_BPK: Tensor | None, rstd_BP: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """(dx, dy); `out_BPK` is given exactly when the forward pass normalised."""
    from c2al.ops.triton import launch

    return launch.backward(grad_BPK, x_BMD, y, out_BPK, rstd_BP, layout == "paper")


@_backward_op.register_fake
def _(
    grad_BPK: Tensor, x_BMD: Tensor, y: Tensor, out_BPK: Tensor | None, rstd_BP: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    return x_BMD.new_empty(x_BMD.shape), y.new_empty(y.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_BMD, y, ctx.layout, norm_eps = inputs
    out_BPK, rstd_BP = output
    ctx.mark_non_differentiable(rstd_BP)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_BMD, y, None if norm_eps is None else out_BPK, rstd_BP)


def _backward(ctx, grad_BPK, grad_rstd):  # type: ignore[no-untyped-def]
    if grad_BPK is None:
        return None, None, None, None
    dx_BMD, dy = _backward_op(grad_BPK, *ctx.saved_tensors, ctx.layout)
    return dx_BMD, dy, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.c2al.fm_attention)
def _forward_flops(x_shape, y_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return 4 * math.prod(x_shape) * y_shape[-1]


@register_flop_formula(torch.ops.c2al.fm_attention_backward)
def _backward_flops(grad_shape, x_shape, y_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return 10 * math.prod(x_shape) * y_shape[-1]
