"""Attention among fields on CUDA through Triton: launches the kernels of field_kernels.py.

Legend: B batch, M fields, D embedding dim, F = 3 D.
"""

import torch
from torch import Tensor

from c2al.ops.triton import field_kernels

STAGES = 3
"""Heads in flight; with `warps_of` the fastest of a grid on an H100 at 64, 28 and 27 fields (docs/LOG.md)."""


def forward(qkv_BMF: Tensor, heads: int) -> Tensor:
    """(B, M, D)."""
    batch, fields, width = qkv_BMF.shape
    out_BMD = qkv_BMF.new_empty(batch, fields, width // 3)
    _launch(field_kernels.forward, qkv_BMF.contiguous(), heads, out_BMD)
    return out_BMD


def backward(grad_BMD: Tensor, qkv_BMF: Tensor, heads: int) -> Tensor:
    """Gradient of qkv."""
    dqkv_BMF = torch.empty_like(qkv_BMF, memory_format=torch.contiguous_format)
    _launch(field_kernels.backward, qkv_BMF.contiguous(), heads, dqkv_BMF, grad_BMD.contiguous())
    return dqkv_BMF


def warps_of(block_m: int) -> int:
    """Warps that hold a tile of M x M in registers."""
    return {16: 1, 32: 2, 64: 4, 128: 8}[block_m]


def _launch(kernel, qkv_BMF: Tensor, heads: int, target: Tensor, *grad: Tensor) -> None:  # type: ignore[no-untyped-def]
    batch, fields, width = qkv_BMF.shape
    if not batch:
        return
    block_m, block_s = (max(16, 1 << (n - 1).bit_length()) for n in (fields, width // (3 * heads)))
    scale = (width // (3 * heads)) ** -0.5
    with torch.cuda.device_of(qkv_BMF):  # type: ignore[no-untyped-call]
        kernel[(batch,)](
            *grad, qkv_BMF, target, scale, M=fields, D=width // 3, HEADS=heads, BLOCK_M=block_m, BLOCK_S=block_s,
            num_warps=warps_of(block_m), num_stages=STAGES,
        )  # fmt: skip
