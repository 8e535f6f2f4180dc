"""Attention among the fields of a sample: softmax(Q K^T / sqrt(S)) V, head by head (Vaswani et al. 2017, Eq. 1).

Legend: B batch, M fields, D embedding dim, H heads, S = D / H dims of a head.

Sequences of 20 to 100 fields and heads of 16 dims are not what fused attention is made for. On the CPU the plain
products are the fastest: for (1024, 4, 28, 16), forward and backward with the maps around it, torch's fused kernel
takes 331 ms in bfloat16 and they take 71, in float32 71 and 63 (one thread, Xeon with AMX). On a GPU a Triton kernel
keeps the scores of a sample on the chip (docs/LOG.md).
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from c2al.errors import BackendError, OperandError
from c2al.ops.backend import Backend, device_obstacle

MAX_FIELDS, MAX_HEAD_DIM = 128, 64
"""What one program's registers hold."""


def field_attention(qkv_BMF: Tensor, heads: int, backend: Backend = "auto") -> Tensor:
    """softmax(Q K^T / sqrt(S)) V among the fields of every sample, (B, M, D); differentiable once.

    Args:
        qkv_BMF: (B, M, 3 D), the queries, keys and values of every field behind one another. B may be 0.
        heads: H; divides D. Head h holds the dims h S to (h + 1) S of queries, keys and values.
        backend: "triton" is the fused CUDA kernel (bfloat16 or float16, at most 128 fields and 64 dims of a head),
            "eager" torch's own attention, "auto" the kernel where it can run.

    Cost: 4 B M^2 D FLOPs forward, 10 B M^2 D backward with the scores computed again.

    Raises:
        OperandError: qkv has no three equal parts that divide by the heads, unknown backend.
        BackendError: backend = "triton" where the kernel cannot run.
    """
    if backend not in ("auto", "triton", "eager"):
        raise OperandError(f"field_attention: backend {backend!r} is none of 'auto', 'triton', 'eager'")
    if qkv_BMF.dim() != 3 or heads < 1 or qkv_BMF.shape[2] % (3 * heads) or not qkv_BMF.shape[2]:
        raise OperandError(f"field_attention: qkv must be (B, M, 3 D) with D a multiple of {heads} heads, "
                           f"is {tuple(qkv_BMF.shape)}")  # fmt: skip
    obstacle = _obstacle(qkv_BMF, heads)
    if backend == "triton" and obstacle:
        raise BackendError(f"field_attention: backend='triton' cannot run here: {obstacle}")
    if backend == "eager" or obstacle:
        return _eager(qkv_BMF, heads)
    out_BMD: Tensor = _forward_op(qkv_BMF, heads)
    return out_BMD


def _eager(qkv_BMF: Tensor, heads: int) -> Tensor:
    batch, fields, width = qkv_BMF.shape
    head = (batch, fields, heads, width // (3 * heads))
    q_BHMS, k_BHMS, v_BHMS = (t.view(head).transpose(1, 2) for t in qkv_BMF.chunk(3, dim=-1))
    if qkv_BMF.device.type == "cpu":
        weights_BHMM = torch.softmax((q_BHMS * q_BHMS.shape[-1] ** -0.5) @ k_BHMS.mT, dim=-1)
        out_BHMS: Tensor = weights_BHMM @ v_BHMS
    else:
        out_BHMS = F.scaled_dot_product_attention(q_BHMS, k_BHMS, v_BHMS)
    return out_BHMS.transpose(1, 2).flatten(2)


def _obstacle(qkv_BMF: Tensor, heads: int) -> str:
    """Why the Triton kernel cannot take these operands; empty if it can."""
    if found := device_obstacle(qkv_BMF, "qkv"):
        return found
    if qkv_BMF.dtype not in (torch.bfloat16, torch.float16):
        return f"no kernel for {qkv_BMF.dtype}"
    _, fields, width = qkv_BMF.shape
    if fields > MAX_FIELDS or width // (3 * heads) > MAX_HEAD_DIM:
        return f"{fields} fields of {width // (3 * heads)} dims per head, at most {MAX_FIELDS} of {MAX_HEAD_DIM}"
    return ""


@torch.library.custom_op("c2al::field_attention", mutates_args=(), device_types=("cpu", "cuda"))
def _forward_op(qkv_BMF: Tensor, heads: int) -> Tensor:
    """The kernel; on the CPU in Triton's interpreter only."""
    from c2al.ops.triton import field_launch

    return field_launch.forward(qkv_BMF, heads)


@_forward_op.register_fake
def _(qkv_BMF: Tensor, heads: int) -> Tensor:
    batch, fields, width = qkv_BMF.shape
    return qkv_BMF.new_empty(batch, fields, width // 3)


@torch.library.custom_op("c2al::field_attention_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward_op(grad_BMD: Tensor, qkv_BMF: Tensor, heads: int) -> Tensor:
    from c2al.ops.triton import field_launch

    return field_launch.backward(grad_BMD, qkv_BMF, heads)


@_backward_op.register_fake
def _(grad_BMD: Tensor, qkv_BMF: Tensor, heads: int) -> Tensor:
    return qkv_BMF.new_empty(qkv_BMF.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv_BMF, ctx.heads = inputs
    ctx.save_for_backward(qkv_BMF)


def _backward(ctx, grad_BMD):  # type: ignore[no-untyped-def]
    (qkv_BMF,) = ctx.saved_tensors
    return _backward_op(grad_BMD, qkv_BMF, ctx.heads), None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.c2al.field_attention)
def _forward_flops(qkv_shape, heads, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    batch, fields, width = qkv_shape
    return 4 * batch * fields**2 * (width // 3)


@register_flop_formula(torch.ops.c2al.field_attention_backward)
def _backward_flops(grad_shape, qkv_shape, heads, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    batch, fields, width = qkv_shape
    return 10 * batch * fields**2 * (width // 3)
