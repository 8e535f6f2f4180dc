"""The Triton kernels of attention among fields, one each way.

Legend: B batch, M fields, D embedding dim, H heads of S = D / H dims each; BLOCK_* the same, padded to a power of two
of at least 16. qkv is (B, M, 3 D): queries, keys and values of a field behind one another, head by head.

A sample's scores of one head are one tile of M x M, which never leaves the chip. One program takes one sample, head
after head; the loads of the next head run beside the products of this one. Backward computes the scores again:

    P = softmax(Q K^T / sqrt(S)),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P (dP - sum(P dP)) / sqrt(S),  dQ = dS K,  dK = dS^T Q
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _weights(q_MS, k_MS, scale, fields, M: tl.constexpr):
    """softmax over the keys; columns beyond the last field are 0."""
    s_MM = tl.dot(q_MS, tl.trans(k_MS)) * scale
    s_MM = tl.where(fields[None, :] < M, s_MM, float("-inf"))
    e_MM = tl.exp(s_MM - tl.max(s_MM, 1)[:, None])
    return e_MM / tl.sum(e_MM, 1)[:, None]


@triton.jit
def _head(qkv, b, h, fields, mask, dims, M: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):
    """Queries, keys and values of one head of a sample, their offsets in qkv, and the columns of the head."""
    part = h * (D // HEADS) + dims[None, :]
    offsets = b * M * 3 * D + fields[:, None] * 3 * D + part
    tile = qkv + offsets
    return tl.load(tile, mask, 0.0), tl.load(tile + D, mask, 0.0), tl.load(tile + 2 * D, mask, 0.0), offsets, part


@triton.jit
def forward(
    qkv, out, scale, M: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    fields, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_S)
    mask = (fields[:, None] < M) & (dims[None, :] < D // HEADS)
    for h in range(HEADS):
        q_MS, k_MS, v_MS, _, part = _head(qkv, b, h, fields, mask, dims, M, D, HEADS)
        p_MM = _weights(q_MS, k_MS, scale, fields, M)
        o_MS = tl.dot(p_MM.to(v_MS.dtype), v_MS)
        tl.store(out + b * M * D + fields[:, None] * D + part, o_MS.to(v_MS.dtype), mask)


@triton.jit
def backward(
    grad, qkv, dqkv, scale, M: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    fields, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_S)
    mask = (fields[:, None] < M) & (dims[None, :] < D // HEADS)
    for h in range(HEADS):
        q_MS, k_MS, v_MS, offsets, part = _head(qkv, b, h, fields, mask, dims, M, D, HEADS)
        do_MS = tl.load(grad + b * M * D + fields[:, None] * D + part, mask, 0.0)
        p_MM = _weights(q_MS, k_MS, scale, fields, M)
        dp_MM = tl.dot(do_MS, tl.trans(v_MS))
        ds_MM = p_MM * (dp_MM - tl.sum(p_MM * dp_MM, 1)[:, None]) * scale
        dv_MS = tl.dot(tl.trans(p_MM.to(v_MS.dtype)), do_MS)
        ds_MM = ds_MM.to(v_MS.dtype)
        dq_MS, dk_MS = tl.dot(ds_MM, k_MS), tl.dot(tl.trans(ds_MM), q_MS)
        target = dqkv + offsets
        tl.store(target, dq_MS.to(v_MS.dtype), mask)
        tl.store(target + D, dk_MS.to(v_MS.dtype), mask)
        tl.store(target + 2 * D, dv_MS.to(v_MS.dtype), mask)
