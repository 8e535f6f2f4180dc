"""FM attention in bfloat16 for processors with avx512_bf16: all products of a sample before the next sample.

Legend: m fields, d embedding dim, p x q the matrix A of a sample (x^T or x), k columns of Y.

Batched products read x from memory once each; here a sample's operands stay in the second-level
cache over all of them. vdpbf16ps adds the products of two neighbours along the inner dimension to a
float32, so every operand is wanted in pairs along it:

    x Z,   inner d:  x as it lies        Z packed
    x^T Z, inner m:  x packed            Z packed
    dX = U1 V1^T + U2 V2^T, inner k:     U as they lie, V transposed in pairs

"Packed" is [columns / 32][rows / 2][32][2]: panels of 32 columns, in which the two elements of a pair
lie side by side, filled up with zeros. A tile of 8 rows by 32 columns of a result (16 where no more are
left) stays in registers over the whole inner dimension and is rounded once; dX's two products share
their accumulators. The last tile of the rows overlaps the one before, so any m from 8 up fits.

Compiled by numba at first use and cached beside this file, so no compiler is needed where it runs.
It runs on torch's own OpenMP threads: a second pool would fight them for the cores.
"""

import ctypes

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

_ROWS, _PANEL = 8, 32
_RECORD = 21
"""Fields of the record that a worker reads."""
_PANEL_ROW = _PANEL * 4
"""Bytes of one pair of rows in a panel."""


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), 16)
_PAIRS = ir.VectorType(_BFloat(), 32)
_WORDS = ir.VectorType(_I32, 16)
_HALVES = ir.VectorType(_I16, 32)


def _at(builder, address, offset, element):  # type: ignore[no-untyped-def]
    """Pointer to `element` at `address` + `offset` bytes; the offset a constant or a value."""
    if isinstance(offset, int):
        offset = ir.Constant(_I64, offset)
    return builder.inttoptr(builder.add(address, offset), element.as_pointer())


def _times(builder, stride, number):  # type: ignore[no-untyped-def]
    return builder.mul(stride, ir.Constant(_I64, number))


def _shuffle(builder, a, b, lanes):  # type: ignore[no-untyped-def]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _mask(builder, bits, lanes):  # type: ignore[no-untyped-def]
    return builder.bitcast(builder.trunc(bits, ir.IntType(lanes)), ir.VectorType(ir.IntType(1), lanes))


def _load_masked(builder, pointer, mask, vector):  # type: ignore[no-untyped-def]
    """Lanes outside the mask are 0 and not read."""
    name = f"llvm.masked.load.v{vector.count}i{vector.element.width}.p0"
    kind = ir.FunctionType(vector, [vector.as_pointer(), _I32, mask.type, vector])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [pointer, ir.Constant(_I32, 2), mask, ir.Constant(vector, None)])


def _make_tile(packed: bool, halves: int):  # type: ignore[no-untyped-def]
    """c[8, 16 halves] = sum over both terms of a[8, 2 pairs] b[2 pairs, 16 halves]; b a panel of a packed operand.

    A row of `a` lies `stride` bytes behind the one before, its pairs side by side; a packed `a` is
    eight columns of a panel. `columns` is the mask of c's columns to store.
    """

    @intrinsic
    def tile(typing, c, c_stride, columns, a1, b1, pairs1, a2, b2, pairs2, stride):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            c, c_stride, columns, a1, b1, pairs1, a2, b2, pairs2, stride = arguments
            module = builder.module
            multiply_add = cgutils.get_or_insert_function(
                module, ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS]), "llvm.x86.avx512bf16.dpbf16ps.512"
            )
            round_both = cgutils.get_or_insert_function(
                module, ir.FunctionType(_PAIRS, [_FLOATS, _FLOATS]), "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
            )
            zero, undefined = ir.Constant(_FLOATS, None), ir.Constant(_WORDS, ir.Undefined)
            # Stack slots that LLVM turns into registers.
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(halves)] for _ in range(_ROWS)]
            for slot in sum(sums, []):
                builder.store(zero, slot)
            for a, b, pairs in ((a1, b1, pairs1), (a2, b2, pairs2)):
                with cgutils.for_range(builder, pairs) as loop:
                    row = builder.add(b, _times(builder, loop.index, _PANEL_ROW))
                    b_vectors = [builder.load(_at(builder, row, half * 64, _PAIRS), align=64) for half in range(halves)]
                    pair = builder.add(a, _times(builder, loop.index, _PANEL_ROW if packed else 4))
                    for r in range(_ROWS):
                        offset = 4 * r if packed else _times(builder, stride, r)
                        word = builder.load(_at(builder, pair, offset, _I32), align=2)
                        first = builder.insert_element(undefined, word, ir.Constant(_I32, 0))
                        a_vector = builder.bitcast(_shuffle(builder, first, undefined, [0] * 16), _PAIRS)
                        for slot, b_vector in zip(sums[r], b_vectors, strict=True):
                            builder.store(builder.call(multiply_add, [builder.load(slot), a_vector, b_vector]), slot)
            mask = _mask(builder, columns, 32)
            kind = ir.FunctionType(ir.VoidType(), [_HALVES, _HALVES.as_pointer(), _I32, mask.type])
            store = cgutils.get_or_insert_function(module, kind, "llvm.masked.store.v32i16.p0")
            for r, slots in enumerate(sums):
                low, high = [builder.load(slot) for slot in slots] + [zero] * (2 - halves)
                rounded = builder.call(round_both, [high, low])
                target = _at(builder, c, _times(builder, c_stride, r), _HALVES)
                builder.call(store, [builder.bitcast(rounded, _HALVES), target, ir.Constant(_I32, 2), mask])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return tile


_tile_of_rows, _tile_of_panel = _make_tile(packed=False, halves=2), _make_tile(packed=True, halves=2)
_narrow_tile_of_rows, _narrow_tile_of_panel = _make_tile(packed=False, halves=1), _make_tile(packed=True, halves=1)


@intrinsic
def _interleave(typing, target, first, second, columns, second_columns):  # type: ignore[no-untyped-def]
    """One pair of rows of a panel: 32 elements of two rows, in turn; the masks say which are there."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target, *sources, columns, second_columns = arguments
        rows = [
            _load_masked(builder, _at(builder, source, 0, _HALVES), _mask(builder, mask, 32), _HALVES)
            for source, mask in zip(sources, (columns, second_columns), strict=True)
        ]
        for half in range(2):
            lanes = [lane for i in range(16) for lane in (16 * half + i, 32 + 16 * half + i)]
            builder.store(_shuffle(builder, *rows, lanes), _at(builder, target, 64 * half, _HALVES), align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _transpose(typing, target, source, stride, rows, words):  # type: ignore[no-untyped-def]
    """A 16 x 16 block of pairs, transposed into half a panel; rows and the mask say which are there."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target, source, stride, rows, words = arguments
        nothing = ir.Constant(_I64, 0)
        block = []
        for r in range(16):
            there = builder.select(builder.icmp_signed("<", ir.Constant(_I64, r), rows), words, nothing)
            pointer = _at(builder, source, _times(builder, stride, r), _WORDS)
            block.append(_load_masked(builder, pointer, _mask(builder, there, 16), _WORDS))
        for step in (1, 2, 4, 8):  # exchange the off-diagonal blocks of size `step`
            for i in (i for i in range(16) if not i & step):
                low, high = block[i], block[i + step]
                block[i] = _shuffle(builder, low, high, [j if not j & step else 16 + j - step for j in range(16)])
                block[i + step] = _shuffle(builder, low, high, [j + step if not j & step else 16 + j for j in range(16)])
        for r, row in enumerate(block):
            builder.store(row, _at(builder, target, _PANEL_ROW * r, _WORDS), align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _fetch_add(typing, address, number):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", _at(builder, arguments[0], 0, _I64), arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@numba.njit(cache=True)
def _panels(columns):  # type: ignore[no-untyped-def]
    return (columns + _PANEL - 1) // _PANEL


@numba.njit(cache=True)
def _lanes(number, limit):  # type: ignore[no-untyped-def]
    """Mask of the first `number` of `limit` lanes."""
    return (1 << min(number, limit)) - 1


@numba.njit(cache=True)
def _pack(target, source, stride, rows, columns):  # type: ignore[no-untyped-def]
    """[rows][columns] to [columns / 32][rows / 2][32][2], rows in order: that is how memory is read best."""
    pairs = (rows + 1) // 2
    for pair in range(pairs):
        row = source + 2 * pair * stride
        for panel in range(_panels(columns)):
            mask = _lanes(columns - panel * _PANEL, _PANEL)
            second = mask if 2 * pair + 1 < rows else 0
            at = target + (panel * pairs + pair) * _PANEL_ROW
            _interleave(at, row + panel * _PANEL * 2, row + stride + panel * _PANEL * 2, mask, second)


@numba.njit(cache=True)
def _pack_transposed(target, source, rows, columns):  # type: ignore[no-untyped-def]
    """Contiguous [rows][columns] to [rows / 32][columns / 2, a multiple of 16][32][2]."""
    blocks = _panels(columns)
    for i in range((rows + 15) // 16):
        half = target + (i // 2) * blocks * 16 * _PANEL_ROW + (i % 2) * 64
        for j in range(blocks):
            at = source + (i * 16 * columns + j * _PANEL) * 2
            _transpose(half + j * 16 * _PANEL_ROW, at, columns * 2, rows - i * 16, _lanes(columns // 2 - j * 16, 16))


@numba.njit(cache=True)
def _row_times(out, x, x_stride, z, m, d, k):  # type: ignore[no-untyped-def]
    """out[m, k] = x Z, Z packed [d][k]."""
    for panel in range(_panels(k)):
        b = z + panel * (d // 2) * _PANEL_ROW
        columns = _lanes(k - panel * _PANEL, _PANEL)
        for i in range(0, m, _ROWS):
            row = min(i, m - _ROWS)
            c, a = out + (row * k + panel * _PANEL) * 2, x + row * x_stride
            if k - panel * _PANEL > 16:
                _tile_of_rows(c, k * 2, columns, a, b, d // 2, 0, 0, 0, x_stride)
            else:
                _narrow_tile_of_rows(c, k * 2, columns, a, b, d // 2, 0, 0, 0, x_stride)


@numba.njit(cache=True)
def _column_times(out, x, z, m, d, k):  # type: ignore[no-untyped-def]
    """out[d, k] = x^T Z, both packed over m."""
    pairs = (m + 1) // 2
    for i in range(0, d, _PANEL):
        a = x + i // _PANEL * pairs * _PANEL_ROW
        for panel in range(_panels(k)):
            b = z + panel * pairs * _PANEL_ROW
            columns = _lanes(k - panel * _PANEL, _PANEL)
            for r in range(0, min(_PANEL, d - i), _ROWS):
                c = out + ((i + r) * k + panel * _PANEL) * 2
                if k - panel * _PANEL > 16:
                    _tile_of_panel(c, k * 2, columns, a + r * 4, b, pairs, 0, 0, 0, 0)
                else:
                    _narrow_tile_of_panel(c, k * 2, columns, a + r * 4, b, pairs, 0, 0, 0, 0)


@numba.njit(cache=True)
def _outer_sum(out, u1, v1, u2, v2, m, d, k):  # type: ignore[no-untyped-def]
    """out[m, d] = U1 V1^T + U2 V2^T, U [m][k] as they lie, V packed transposed."""
    panel_bytes = _panels(k) * 16 * _PANEL_ROW
    for panel in range(_panels(d)):
        columns = _lanes(d - panel * _PANEL, _PANEL)
        b1, b2 = v1 + panel * panel_bytes, v2 + panel * panel_bytes
        for i in range(0, m, _ROWS):
            row = min(i, m - _ROWS)
            c, a1, a2 = out + (row * d + panel * _PANEL) * 2, u1 + row * k * 2, u2 + row * k * 2
            _tile_of_rows(c, d * 2, columns, a1, b1, k // 2, a2, b2, k // 2, k * 2)


@numba.njit(cache=True)
def _both_ways(paper, x, x_stride, z, inner, out, packed_x, packed_z, packed_inner, m, d, k):  # type: ignore[no-untyped-def]
    """inner[q, k] = A^T Z and out[p, k] = A inner."""
    _pack(packed_x, x, x_stride, m, d)
    if paper:
        _pack(packed_z, z, k * 2, d, k)
        _row_times(inner, x, x_stride, packed_z, m, d, k)
        _pack(packed_inner, inner, k * 2, m, k)
        _column_times(out, packed_x, packed_inner, m, d, k)
    else:
        _pack(packed_z, z, k * 2, m, k)
        _column_times(inner, packed_x, packed_z, m, d, k)
        _pack(packed_inner, inner, k * 2, d, k)
        _row_times(out, x, x_stride, packed_inner, m, d, k)


@numba.cfunc(types.void(types.CPointer(types.int64)), cache=True)
def _worker(pointer):  # type: ignore[no-untyped-def]
    """One thread's share: takes pieces of the batch until none is left. `_run` fills the record."""
    record = carray(pointer, (_RECORD,))
    batch, m, d, k, paper, piece = record[2], record[3], record[4], record[5], record[6] != 0, record[7]
    x, x_sample, x_stride, z, inner, out = record[8], record[9], record[10], record[11], record[12], record[13]
    y, t, dx = record[14], record[15], record[16]
    p, q = (d, m) if paper else (m, d)
    packed_x = record[17] + _fetch_add(record.ctypes.data + 8, 1) * record[20]
    packed_z = packed_x + record[18]
    packed_inner = packed_z + record[19]
    s = packed_inner + record[19]
    while True:
        start = _fetch_add(record.ctypes.data, piece)
        if start >= batch:
            break
        for i in range(start, min(start + piece, batch)):
            at_p, at_q = i * p * k * 2, i * q * k * 2
            inner_i = inner + at_q if dx == 0 else s
            _both_ways(
                paper, x + i * x_sample, x_stride, z + at_p, inner_i, out + at_p, packed_x, packed_z, packed_inner, m, d, k
            )
            if dx != 0:
                # paper: dX = T dG^T + S Y^T; wukong: dX = dG T^T + Y S^T
                if paper:
                    u1, v1, u2, v2 = t + at_q, z + at_p, s, y + at_p
                else:
                    u1, v1, u2, v2 = z + at_p, t + at_q, y + at_p, s
                _pack_transposed(packed_z, v1, d, k)
                _pack_transposed(packed_inner, v2, d, k)
                _outer_sum(dx + i * m * d * 2, u1, packed_z, u2, packed_inner, m, d, k)


try:
    _PARALLEL = ctypes.CDLL(None).GOMP_parallel
except AttributeError:  # this torch was built on other threads than OpenMP's
    _PARALLEL = None
else:
    _PARALLEL.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    _PARALLEL.restype = None


def obstacle() -> str:
    """Why this processor cannot run the kernel, or should not; empty if it can."""
    processor = torch.cpu.get_capabilities()
    if not processor.get("avx512_bf16"):
        return "the processor has no avx512_bf16"
    if processor.get("amx_bf16"):
        return "the processor has amx_bf16, whose products are faster"
    return "" if _PARALLEL else "torch has no OpenMP threads"


def covers(x_BMD: Tensor, y: Tensor) -> bool:
    """bfloat16, Y per sample, m >= 8, d and k multiples of 8."""
    _, m, d = x_BMD.shape
    sizes = m >= _ROWS and d % 8 == 0 and y.shape[-1] % 8 == 0 and x_BMD.numel() > 0
    return x_BMD.dtype == torch.bfloat16 and y.dim() == 3 and sizes


def products(x_BMD: Tensor, y_BPK: Tensor, paper: bool) -> tuple[Tensor, Tensor]:
    """(G, T): T = A^T Y, G = A T."""
    batch, m, d = x_BMD.shape
    p, q = (d, m) if paper else (m, d)
    g_BPK, t_BQK = x_BMD.new_empty(batch, p, y_BPK.shape[-1]), x_BMD.new_empty(batch, q, y_BPK.shape[-1])
    _run(x_BMD, y_BPK.contiguous(), t_BQK, g_BPK, paper)
    return g_BPK, t_BQK


def gradients(grad_BPK: Tensor, x_BMD: Tensor, y_BPK: Tensor, t_BQK: Tensor, paper: bool) -> tuple[Tensor, Tensor]:
    """(dX, dY): S = A^T dG, dY = A S, dA = dG T^T + Y S^T."""
    dx_BMD, dy_BPK = x_BMD.new_empty(x_BMD.shape), y_BPK.new_empty(y_BPK.shape)
    _run(x_BMD, grad_BPK.contiguous(), None, dy_BPK, paper, (y_BPK.contiguous(), t_BQK, dx_BMD))
    return dx_BMD, dy_BPK


def _run(
    x_BMD: Tensor,
    z_BPK: Tensor,
    inner_BQK: Tensor | None,
    out_BPK: Tensor,
    paper: bool,
    backward: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """inner = A^T z and out = A inner, of every sample; in `backward`, (y, T, dx), dx too, and inner is not kept."""
    if x_BMD.stride(2) != 1:
        x_BMD = x_BMD.contiguous()
    (batch, m, d), k = x_BMD.shape, z_BPK.shape[-1]
    threads = torch.get_num_threads()
    pairs = (max(m, d) + 1) // 2
    rows_packed, columns_packed = pairs * _panels(k), _panels(max(m, d)) * _panels(k) * 16
    x_bytes, z_bytes = (m + 1) // 2 * _panels(d) * _PANEL_ROW, max(rows_packed, columns_packed) * _PANEL_ROW
    s_bytes = -(-max(m, d) * k * 2 // 64) * 64
    thread_bytes = x_bytes + 2 * z_bytes + s_bytes
    scratch = torch.empty(threads * thread_bytes + 63, dtype=torch.uint8)
    aligned = -(-scratch.data_ptr() // 64) * 64
    piece = max(1, batch // (16 * threads))
    y, t, dx = (0, 0, 0) if backward is None else (tensor.data_ptr() for tensor in backward)
    inner = 0 if inner_BQK is None else inner_BQK.data_ptr()
    strides = x_BMD.stride(0) * 2, x_BMD.stride(1) * 2
    record = np.array(
        [0, 0, batch, m, d, k, paper, piece]
        + [x_BMD.data_ptr(), *strides, z_BPK.data_ptr(), inner, out_BPK.data_ptr(), y, t, dx]
        + [aligned, x_bytes, z_bytes, thread_bytes],
        dtype=np.int64,
    )
    _PARALLEL(_worker.address, record.ctypes.data, threads, 0)
