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

Addresses and strides are in bytes, as integers: numba has no type for what LLVM's vectors hold.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import itertools

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS, PANEL = 8, 32
RECORD = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("next_sample", "next_thread"),
            *("batch", "m", "d", "k", "paper", "piece"),
            *("x", "x_sample", "x_stride", "z", "inner", "out", "y", "t", "dx"),
            *("scratch", "x_bytes", "z_bytes", "thread_bytes"),
        )
    ]
)
"""What a worker reads: two counters that the threads share, sizes, addresses of the operands (0: none) and strides,
and the scratch of all threads with the bytes of its parts."""
PANEL_ROW = PANEL * 4
"""Bytes of one pair of rows in a panel."""


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

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


def _at(builder, address, offset, element):
    """Pointer to `element` at `address` + `offset` bytes; the offset a constant or a value."""
    if isinstance(offset, int):
        offset = ir.Constant(_I64, offset)
    return builder.inttoptr(builder.add(address, offset), element.as_pointer())


def _times(builder, stride, number):
    return builder.mul(stride, ir.Constant(_I64, number))


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _mask(builder, bits, lanes):
    return builder.bitcast(builder.trunc(bits, ir.IntType(lanes)), ir.VectorType(ir.IntType(1), lanes))


def _load_masked(builder, pointer, mask, vector):
    """Lanes outside the mask are 0 and not read."""
    name = f"llvm.masked.load.v{vector.count}i{vector.element.width}.p0"
    kind = ir.FunctionType(vector, [vector.as_pointer(), _I32, mask.type, vector])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [pointer, ir.Constant(_I32, 2), mask, ir.Constant(vector, None)])


def _make_tile(packed: bool, halves: int):
    """c[8, 16 halves] = sum over both terms of a[8, 2 pairs] b[2 pairs, 16 halves]; b a panel of a packed operand.

    A row of `a` lies `stride` bytes behind the one before, its pairs side by side; a packed `a` is
    eight columns of a panel. `columns` is the mask of c's columns to store.
    """

    @intrinsic
    def tile(typing, c, c_stride, columns, a1, b1, pairs1, a2, b2, pairs2, stride):
        def generate(context, builder, signature, arguments):
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
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(halves)] for _ in range(ROWS)]
            for slot in itertools.chain.from_iterable(sums):
                builder.store(zero, slot)
            for a, b, pairs in ((a1, b1, pairs1), (a2, b2, pairs2)):
                with cgutils.for_range(builder, pairs) as loop:
                    row = builder.add(b, _times(builder, loop.index, PANEL_ROW))
                    b_vectors = [builder.load(_at(builder, row, half * 64, _PAIRS), align=64) for half in range(halves)]
                    pair = builder.add(a, _times(builder, loop.index, PANEL_ROW if packed else 4))
                    for r in range(ROWS):
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


_wide_tile_of_rows, _wide_tile_of_panel = _make_tile(packed=False, halves=2), _make_tile(packed=True, halves=2)
_narrow_tile_of_rows, _narrow_tile_of_panel = _make_tile(packed=False, halves=1), _make_tile(packed=True, halves=1)


@intrinsic
def _interleave(typing, target, first, second, columns, second_columns):
    """One pair of rows of a panel: 32 elements of two rows, in turn; the masks say which are there."""

    def generate(context, builder, signature, arguments):
        target, *sources, columns, second_columns = arguments
        rows = [
            _load_masked(builder, _at(builder, source, 0, _HALVES), _mask(builder, mask, 32), _HALVES)
            for source, mask in zip(sources, (columns, second_columns), strict=True)
        ]
        for half in range(2):
            lanes = [lane for i in range(16) for lane in (16 * half + i, 32 + 16 * half + i)]
            builder.store(
                _shuffle(builder, rows[0], rows[1], lanes), _at(builder, target, 64 * half, _HALVES), align=64
            )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _transpose(typing, target, source, stride, rows, words):
    """A 16 x 16 block of pairs, transposed into half a panel; rows and the mask say which are there."""

    def generate(context, builder, signature, arguments):
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
                upper = [16 + j - step if j & step else j for j in range(16)]
                lower = [16 + j if j & step else j + step for j in range(16)]
                block[i], block[i + step] = _shuffle(builder, low, high, upper), _shuffle(builder, low, high, lower)
        for r, row in enumerate(block):
            builder.store(row, _at(builder, target, PANEL_ROW * r, _WORDS), align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _fetch_add(typing, address, number):
    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _at(builder, arguments[0], 0, _I64), arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@numba.njit(cache=True)
def panels(columns):
    return (columns + PANEL - 1) // PANEL


@numba.njit(cache=True)
def _lanes(number, limit):
    """Mask of the first `number` of `limit` lanes."""
    return (1 << min(number, limit)) - 1


@numba.njit(cache=True)
def _tile_of_rows(c, c_stride, left, a1, b1, pairs1, a2, b2, pairs2, stride):
    """A tile with as many columns as are `left`, at most a panel's."""
    columns = _lanes(left, PANEL)
    if left > 16:
        _wide_tile_of_rows(c, c_stride, columns, a1, b1, pairs1, a2, b2, pairs2, stride)
    else:
        _narrow_tile_of_rows(c, c_stride, columns, a1, b1, pairs1, a2, b2, pairs2, stride)


@numba.njit(cache=True)
def _tile_of_panel(c, c_stride, left, a, b, pairs):
    """The same for eight columns of a packed operand."""
    columns = _lanes(left, PANEL)
    if left > 16:
        _wide_tile_of_panel(c, c_stride, columns, a, b, pairs, 0, 0, 0, 0)
    else:
        _narrow_tile_of_panel(c, c_stride, columns, a, b, pairs, 0, 0, 0, 0)


@numba.njit(cache=True)
def _pack(target, source, stride, rows, columns):
    """[rows][columns] to [columns / 32][rows / 2][32][2], rows in order: that is how memory is read best."""
    pairs = (rows + 1) // 2
    for pair in range(pairs):
        row = source + 2 * pair * stride
        for panel in range(panels(columns)):
            mask = _lanes(columns - panel * PANEL, PANEL)
            second = mask if 2 * pair + 1 < rows else 0
            at = target + (panel * pairs + pair) * PANEL_ROW
            _interleave(at, row + panel * PANEL * 2, row + stride + panel * PANEL * 2, mask, second)


@numba.njit(cache=True)
def _pack_transposed(target, source, rows, columns):
    """Contiguous [rows][columns] to [rows / 32][columns / 2, a multiple of 16][32][2]."""
    blocks = panels(columns)
    for i in range((rows + 15) // 16):
        half = target + (i // 2) * blocks * 16 * PANEL_ROW + (i % 2) * 64
        for j in range(blocks):
            at = source + (i * 16 * columns + j * PANEL) * 2
            _transpose(half + j * 16 * PANEL_ROW, at, columns * 2, rows - i * 16, _lanes(columns // 2 - j * 16, 16))


@numba.njit(cache=True)
def _row_times(out, x, x_stride, z, m, d, k):
    """out[m, k] = x Z, Z packed [d][k]."""
    for panel in range(panels(k)):
        b = z + panel * (d // 2) * PANEL_ROW
        for i in range(0, m, ROWS):
            row = min(i, m - ROWS)
            c, a = out + (row * k + panel * PANEL) * 2, x + row * x_stride
            _tile_of_rows(c, k * 2, k - panel * PANEL, a, b, d // 2, 0, 0, 0, x_stride)


@numba.njit(cache=True)
def _column_times(out, x, z, m, d, k):
    """out[d, k] = x^T Z, both packed over m."""
    pairs = (m + 1) // 2
    for i in range(0, d, PANEL):
        a = x + i // PANEL * pairs * PANEL_ROW
        for panel in range(panels(k)):
            b = z + panel * pairs * PANEL_ROW
            for r in range(0, min(PANEL, d - i), ROWS):
                c = out + ((i + r) * k + panel * PANEL) * 2
                _tile_of_panel(c, k * 2, k - panel * PANEL, a + r * 4, b, pairs)


@numba.njit(cache=True)
def _outer_sum(out, u1, v1, u2, v2, m, d, k):
    """out[m, d] = U1 V1^T + U2 V2^T, U [m][k] as they lie, V packed transposed."""
    panel_bytes = panels(k) * 16 * PANEL_ROW
    for panel in range(panels(d)):
        b1, b2 = v1 + panel * panel_bytes, v2 + panel * panel_bytes
        for i in range(0, m, ROWS):
            row = min(i, m - ROWS)
            c, a1, a2 = out + (row * d + panel * PANEL) * 2, u1 + row * k * 2, u2 + row * k * 2
            _tile_of_rows(c, d * 2, d - panel * PANEL, a1, b1, k // 2, a2, b2, k // 2, k * 2)


@numba.njit(cache=True)
def _both_ways(paper, x, x_stride, z, inner, out, packed, m, d, k):
    """inner[q, k] = A^T Z and out[p, k] = A inner; `packed` has room for x, Z and inner."""
    packed_x, packed_z, packed_inner = packed
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


@numba.cfunc(types.void(types.CPointer(numba.from_dtype(RECORD))), cache=True)
def worker(pointer):
    """One thread's share: takes pieces of the batch until none is left. _avx512.py fills the record."""
    records = carray(pointer, (1,))
    r, next_sample = records[0], records.ctypes.data
    paper, m, d, k = r.paper != 0, r.m, r.d, r.k
    p, q = (d, m) if paper else (m, d)
    packed_x = r.scratch + _fetch_add(next_sample + 8, 1) * r.thread_bytes
    packed_z = packed_x + r.x_bytes
    packed_inner = packed_z + r.z_bytes
    s = packed_inner + r.z_bytes
    packed = packed_x, packed_z, packed_inner
    while True:
        start = _fetch_add(next_sample, r.piece)
        if start >= r.batch:
            break
        for i in range(start, min(start + r.piece, r.batch)):
            x, z, y = r.x + i * r.x_sample, r.z + i * p * k * 2, r.y + i * p * k * 2
            t, out = r.t + i * q * k * 2, r.out + i * p * k * 2
            if r.dx == 0:
                _both_ways(paper, x, r.x_stride, z, r.inner + i * q * k * 2, out, packed, m, d, k)
                continue
            _both_ways(paper, x, r.x_stride, z, s, out, packed, m, d, k)
            # paper: dX = T dG^T + S Y^T; wukong: dX = dG T^T + Y S^T
            u1, v1, u2, v2 = (t, z, s, y) if paper else (z, t, y, s)
            _pack_transposed(packed_z, v1, d, k)
            _pack_transposed(packed_inner, v2, d, k)
            _outer_sum(r.dx + i * m * d * 2, u1, packed_z, u2, packed_inner, m, d, k)
