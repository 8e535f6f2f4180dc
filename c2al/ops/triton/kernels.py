"""The Triton kernels of FM attention, one a direction and schedule.

Legend: B batch, M fields, D embedding dim, p x q the matrix A of a sample (x^T or x), K columns of
Y; BLOCK_* the same, padded to a power of two of at least 16, or a tile of it.

Forward  T = A^T Y, G = A T. Backward S = A^T dG, dY = A S, dA = dG T^T + Y S^T, T recomputed.
T and S of some columns of A need those columns, all of Y and all of dG. Hence two schedules:

    columns  A passes once, a tile of its columns at a time; G or dY stays in registers (p K of them).
    rows     A passes twice, a tile of its rows at a time; first T and S gather in registers (q K of
             them), then G, dA and dY follow tile by tile. For p too long to hold.

One program takes one sample, or, where Y is shared and dY sums over the batch, every n-th sample
into a float32 partial of its own; the partials are added in a fixed order, so dY is reproducible.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _tile(x, rows, cols, stride_m, P: tl.constexpr, Q: tl.constexpr, PAPER: tl.constexpr):
    """Pointers to and mask of A[rows, cols] in one sample; x's last dimension has stride 1."""
    offsets = cols[None, :] * stride_m + rows[:, None] if PAPER else rows[:, None] * stride_m + cols[None, :]
    return x + offsets, (rows[:, None] < P) & (cols[None, :] < Q)


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """float32 operands of a tf32 product at their nearest tf32 value: the hardware cuts the low 13 bits off, and
    products of numbers that are all too small are too small by 0.14% on average."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN must not become a number
    return x


@triton.jit
def _normalise(g, ks, eps, K: tl.constexpr):
    """LayerNorm of the rows of g over its first K columns; the padding stays 0."""
    mean = tl.sum(g, 1) / K
    centred = tl.where(ks[None, :] < K, g - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / K + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def _load_dg(grad, out, rstd, rows, ks, P: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of rows of G in the inputs' dtype, through LayerNorm where the forward pass normalised."""
    offsets = rows[:, None] * K + ks[None, :]
    mask = (rows[:, None] < P) & (ks[None, :] < K)
    dg = tl.load(grad + offsets, mask, 0.0)
    if NORM:
        g = dg.to(tl.float32)
        n = tl.load(out + offsets, mask, 0.0).to(tl.float32)
        scale = tl.load(rstd + rows, rows < P, 0.0)
        centred = g - (tl.sum(g, 1) / K)[:, None] - n * (tl.sum(g * n, 1) / K)[:, None]
        dg = tl.where(ks[None, :] < K, centred * scale[:, None], 0.0).to(dg.dtype)
    return _rounded(dg, PRECISION)


@triton.jit
def forward_columns(
    x, y, out, rstd, stride_b, stride_m, eps,
    P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    PAPER: tl.constexpr, SHARED: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    rows, ks = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    offsets = rows[:, None] * K + ks[None, :]
    mask = (rows[:, None] < P) & (ks[None, :] < K)
    if not SHARED:
        y += b * P * K
    y_PK = _rounded(tl.load(y + offsets, mask, 0.0), PRECISION)
    g_PK = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for q in range(0, Q, BLOCK_Q):
        a, inside = _tile(x + b * stride_b, rows, q + tl.arange(0, BLOCK_Q), stride_m, P, Q, PAPER)
        a_PQ = _rounded(tl.load(a, inside, 0.0), PRECISION)
        t_KQ = _rounded(tl.dot(tl.trans(y_PK), a_PQ, input_precision=PRECISION).to(y_PK.dtype), PRECISION)
        g_PK = tl.dot(a_PQ, tl.trans(t_KQ), g_PK, input_precision=PRECISION)
    if NORM:
        g_PK, rstd_P = _normalise(g_PK, ks, eps, K)
        tl.store(rstd + b * P + rows, rstd_P, rows < P)
    tl.store(out + b * P * K + offsets, g_PK.to(y_PK.dtype), mask)


@triton.jit
def forward_rows(
    x, y, out, rstd, stride_b, stride_m, eps,
    P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    PAPER: tl.constexpr, SHARED: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    cols, ks = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    x += b * stride_b
    if not SHARED:
        y += b * P * K
    t_QK = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for p in range(0, P, BLOCK_P):
        rows = p + tl.arange(0, BLOCK_P)
        a, inside = _tile(x, rows, cols, stride_m, P, Q, PAPER)
        a_PQ = _rounded(tl.load(a, inside, 0.0), PRECISION)
        mask = (rows[:, None] < P) & (ks[None, :] < K)
        y_PK = _rounded(tl.load(y + rows[:, None] * K + ks[None, :], mask, 0.0), PRECISION)
        t_QK = tl.dot(tl.trans(a_PQ), y_PK, t_QK, input_precision=PRECISION)
    t_QK = _rounded(t_QK.to(y.dtype.element_ty), PRECISION)
    for p in range(0, P, BLOCK_P):
        rows = p + tl.arange(0, BLOCK_P)
        a, inside = _tile(x, rows, cols, stride_m, P, Q, PAPER)
        a_PQ = _rounded(tl.load(a, inside, 0.0), PRECISION)
        g_PK = tl.dot(a_PQ, t_QK, input_precision=PRECISION)
        if NORM:
            g_PK, rstd_P = _normalise(g_PK, ks, eps, K)
            tl.store(rstd + b * P + rows, rstd_P, rows < P)
        mask = (rows[:, None] < P) & (ks[None, :] < K)
        tl.store(out + b * P * K + rows[:, None] * K + ks[None, :], g_PK.to(t_QK.dtype), mask)


@triton.jit
def backward_columns(
    grad, x, y, out, rstd, dx, dy, batch, stride_b, stride_m,
    P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    PAPER: tl.constexpr, SHARED: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, ks = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    offsets = rows[:, None] * K + ks[None, :]
    mask = (rows[:, None] < P) & (ks[None, :] < K)
    dy_PK = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for sample in range(tl.program_id(0), batch, tl.num_programs(0)):
        b = tl.cast(sample, tl.int64)
        y_PK = _rounded(tl.load((y if SHARED else y + b * P * K) + offsets, mask, 0.0), PRECISION)
        dg_PK = _load_dg(grad + b * P * K, out + b * P * K, rstd + b * P, rows, ks, P, K, NORM, PRECISION)
        if not SHARED:
            dy_PK = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
        for q in range(0, Q, BLOCK_Q):
            cols = q + tl.arange(0, BLOCK_Q)
            a, inside = _tile(x + b * stride_b, rows, cols, stride_m, P, Q, PAPER)
            a_PQ = _rounded(tl.load(a, inside, 0.0), PRECISION)
            t_KQ = _rounded(tl.dot(tl.trans(y_PK), a_PQ, input_precision=PRECISION).to(y_PK.dtype), PRECISION)
            s_KQ = _rounded(tl.dot(tl.trans(dg_PK), a_PQ, input_precision=PRECISION).to(y_PK.dtype), PRECISION)
            dy_PK = tl.dot(a_PQ, tl.trans(s_KQ), dy_PK, input_precision=PRECISION)
            da_PQ = tl.dot(dg_PK, t_KQ, input_precision=PRECISION)
            da_PQ = tl.dot(y_PK, s_KQ, da_PQ, input_precision=PRECISION)
            da, inside = _tile(dx + b * P * Q, rows, cols, P if PAPER else Q, P, Q, PAPER)
            tl.store(da, da_PQ.to(y_PK.dtype), inside)
        if not SHARED:
            tl.store(dy + b * P * K + offsets, dy_PK.to(y_PK.dtype), mask)
    if SHARED:
        tl.store(dy + tl.program_id(0) * P * K + offsets, dy_PK, mask)


@triton.jit
def backward_rows(
    grad, x, y, out, rstd, dx, dy, batch, stride_b, stride_m,
    P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    PAPER: tl.constexpr, SHARED: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    cols, ks = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    dtype = y.dtype.element_ty
    first = tl.program_id(0)
    for sample in range(first, batch, tl.num_programs(0)):
        b = tl.cast(sample, tl.int64)
        y_b = y if SHARED else y + b * P * K
        t_QK = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        s_QK = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        for p in range(0, P, BLOCK_P):
            rows = p + tl.arange(0, BLOCK_P)
            a, inside = _tile(x + b * stride_b, rows, cols, stride_m, P, Q, PAPER)
            a_PQ = _rounded(tl.load(a, inside, 0.0), PRECISION)
            mask = (rows[:, None] < P) & (ks[None, :] < K)
            y_PK = _rounded(tl.load(y_b + rows[:, None] * K + ks[None, :], mask, 0.0), PRECISION)
            dg_PK = _load_dg(grad + b * P * K, out + b * P * K, rstd + b * P, rows, ks, P, K, NORM, PRECISION)
            t_QK = tl.dot(tl.trans(a_PQ), y_PK, t_QK, input_precision=PRECISION)
            s_QK = tl.dot(tl.trans(a_PQ), dg_PK, s_QK, input_precision=PRECISION)
        t_QK, s_QK = _rounded(t_QK.to(dtype), PRECISION), _rounded(s_QK.to(dtype), PRECISION)
        for p in range(0, P, BLOCK_P):
            rows = p + tl.arange(0, BLOCK_P)
            a, inside = _tile(x + b * stride_b, rows, cols, stride_m, P, Q, PAPER)
            a_PQ = _rounded(tl.load(a, inside, 0.0), PRECISION)
            offsets = rows[:, None] * K + ks[None, :]
            mask = (rows[:, None] < P) & (ks[None, :] < K)
            y_PK = _rounded(tl.load(y_b + offsets, mask, 0.0), PRECISION)
            dg_PK = _load_dg(grad + b * P * K, out + b * P * K, rstd + b * P, rows, ks, P, K, NORM, PRECISION)
            da_PQ = tl.dot(dg_PK, tl.trans(t_QK), input_precision=PRECISION)
            da_PQ = tl.dot(y_PK, tl.trans(s_QK), da_PQ, input_precision=PRECISION)
            da, inside = _tile(dx + b * P * Q, rows, cols, P if PAPER else Q, P, Q, PAPER)
            tl.store(da, da_PQ.to(dtype), inside)
            dy_PK = tl.dot(a_PQ, s_QK, input_precision=PRECISION)
            if SHARED:
                # This program's partial: nobody else reads or writes it.
                partial = dy + first * P * K + offsets
                dy_PK += tl.load(partial, mask & (sample > first), 0.0)
                tl.store(partial, dy_PK, mask)
            else:
                tl.store(dy + b * P * K + offsets, dy_PK.to(dtype), mask)
