"""Counts against a slow count that knows only the definition: 64 bins per octave from 2^-24 to 1."""

import math
from collections import Counter

import numpy as np
import pytest

from c2al.discovery import histogram
from c2al.discovery.histogram import (
    COARSE,
    COUNT,
    GROUPS,
    LOW,
    SLOTS,
    BlockCounter,
    Counts,
    PreparedRows,
    coarse_edges,
    slot_edges,
    to_coarse,
)
from c2al.errors import CohortError


def slot_of(p: float) -> int:
    """By the definition, in exact arithmetic on the double that holds the float32."""
    if p < 2.0**-24:
        return 0
    mantissa, exponent = math.frexp(p)  # p = mantissa * 2^exponent, mantissa in [0.5, 1)
    return 1 + (exponent - 1 + 24) * 64 + math.floor((mantissa * 2 - 1) * 64)


def predictions(rows, seed=0):
    rng = np.random.default_rng(seed)
    octave = np.float32(2.0) ** rng.integers(-30, 1, rows).astype(np.float32)
    p = np.minimum(octave * rng.random(rows, np.float32), 1)
    p[: min(rows, 8)] = [0, -0.0, 1, np.nextafter(np.float32(1), np.float32(0)), 2**-24, 2**-25, 0.5, 1e-45][:rows]
    return p.astype(np.float32), (rng.random(rows) < 0.3).astype(np.float32), rng.integers(0, GROUPS, rows, np.uint8)


def count(p, y, group, code, cohorts, block=1000):
    rows, counter = PreparedRows(block), BlockCounter(jackknife=True)
    for i in range(0, len(p), block):
        piece = slice(i, i + block)
        assert rows.fill(p[piece], y[piece], group[piece]) == len(p[piece])
        counter.add(rows, code[piece], cohorts)
    return counter


@pytest.mark.parametrize("most_rows", [2500, 1 << 23])
def test_counts_are_those_of_the_definition(monkeypatch, most_rows):
    monkeypatch.setattr(histogram, "_MOST_ROWS", most_rows)  # spills the compact cells on the way
    p, y, group = predictions(9_700)
    code = np.random.default_rng(1).integers(0, 3, len(p)).astype(np.int32)
    counts = count(p, y, group, code, 3).take([("b",), ("c",), ("a",)])
    assert counts.keys == (("a",), ("b",), ("c",))

    expected_fine = Counter(zip(code.tolist(), map(slot_of, p.tolist()), y.astype(int).tolist(), strict=True))
    coarse = [0 if s == 0 else COARSE - 1 if s == SLOTS - 1 else (s - 1) // 4 + 1 for s in map(slot_of, p.tolist())]
    expected_group = Counter(zip(code.tolist(), group.tolist(), coarse, strict=True))
    cohort = [1, 2, 0]  # of each code
    assert counts.fine_CS22[..., COUNT].sum() == counts.group_CGK.sum() == len(p)
    for (c, s, label), n in expected_fine.items():
        assert counts.fine_CS22[cohort[c], s, label, COUNT] == n
    for (c, g, k), n in expected_group.items():
        assert counts.group_CGK[cohort[c], g, k] == n


def test_low_bits_make_sums_of_predictions_exact():
    p, y, group = predictions(5_000)
    p = p[(p >= 2.0**-24) & (p < 1)]
    counts = count(p, y[: len(p)], group[: len(p)], np.zeros(len(p), np.int32), 1).take([(0,)])
    unit = np.append(np.diff(slot_edges()) / 2**17, 0)
    total = counts.fine_CS22[0, ..., COUNT].sum(1) @ slot_edges() + counts.fine_CS22[0, ..., LOW].sum(1) @ unit
    assert total == pytest.approx(math.fsum(p.tolist()), rel=1e-14)


def test_edges_bound_the_slots():
    edges = slot_edges()
    assert edges[:2].tolist() == [0, 2.0**-24]
    assert edges[-1] == 1
    assert len(edges) == SLOTS
    assert [slot_of(e) for e in edges] == list(range(SLOTS))
    assert coarse_edges()[[0, 1, 2, -1]].tolist() == [0, 2.0**-24, 2.0**-24 * (1 + 4 / 64), 1]
    assert to_coarse(np.arange(SLOTS))[[0, 1, -1]].tolist() == [0, 1 + 2 + 3 + 4, SLOTS - 1]


@pytest.mark.parametrize("p", [math.nan, -1e-30, 1.0000001, math.inf, -math.inf])
def test_a_prediction_that_is_no_probability_is_found(p):
    predictions_R, labels_R = np.full(10, 0.5, np.float32), np.zeros(10, np.float32)
    predictions_R[7] = p
    assert PreparedRows(10).fill(predictions_R, labels_R, None) == 7


@pytest.mark.parametrize("label", [0.5, 2, -1, math.nan])
def test_a_label_that_is_neither_0_nor_1_is_found(label):
    labels_R = np.ones(10, np.float32)
    labels_R[3] = label
    assert PreparedRows(10).fill(np.full(10, 0.5, np.float32), labels_R, None) == 3


def parted(seed, keys):
    rng = np.random.default_rng(seed)
    shape = (len(keys), 5)
    return Counts(tuple(keys), rng.integers(0, 9, (*shape, 2, 2)), rng.integers(0, 9, (len(keys), 3, 4)))


def test_adding_aligns_cohorts_by_value_and_does_not_depend_on_order():
    a, b, c = parted(0, [(1,), (3,), (None,)]), parted(1, [(2,), (3,)]), parted(2, [(None,)])
    total = a + b + c
    assert total.keys == ((1,), (2,), (3,), (None,))
    assert (total.fine_CS22[2] == a.fine_CS22[1] + b.fine_CS22[1]).all()
    other = c + (b + a)
    assert other.keys == total.keys
    assert (other.fine_CS22 == total.fine_CS22).all()
    assert (other.group_CGK == total.group_CGK).all()


def test_adding_numbers_to_text_is_refused():
    with pytest.raises(CohortError, match="numbers in one part"):
        parted(0, [(1,)]) + parted(1, [("a",)])


def test_a_marginal_sums_the_other_parts():
    cross = parted(0, [(1, "a"), (1, "b"), (2, "a"), (None, "b")])
    margin = cross.marginal([1])
    assert margin.keys == (("a",), ("b",))
    assert (margin.fine_CS22[1] == cross.fine_CS22[1] + cross.fine_CS22[3]).all()
    assert cross.marginal([1, 0]).keys == (("a", 1), ("a", 2), ("b", 1), ("b", None))
