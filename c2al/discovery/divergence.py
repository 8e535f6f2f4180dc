"""How far apart two cohorts' distributions of predictions are, with jackknife intervals.

Legend: C cohorts, P pairs, S fine slots, K coarse slots, B pooled bins, G jackknife groups.

All logarithms are natural (nats). A divergence is 0 for equal distributions; js is the Jensen-Shannon
divergence, whose square root is the distance scipy's `jensenshannon` returns. Plug-in values are
biased up by noise, the more so the smaller a cohort and the finer the bins, and rows of one user are
not independent. So js, kl and cosine are taken over at most 64 bins of about equal mass, and every
value carries the bias and standard error of a delete-a-group jackknife over groups of users.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import rel_entr

from c2al.discovery.histogram import COUNT, GROUPS, Counts, coarse_edges, slot_edges, to_coarse

Measure = Literal["js", "kl", "kl_head_tail", "kl_tail_head", "cosine", "wasserstein", "wasserstein_logit"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
POOLED_BINS = 64
TINY = 2.0**-25
"""A prediction of 0 or 1 counts as this far from it wherever a logit or a logarithm is needed."""

FOLDED: tuple[Measure, ...] = ("wasserstein", "wasserstein_logit")
"""Measures that are sums of absolute differences. Near 0 they behave like the absolute value of a normal
variable: their noise has the size of the standard error, where that of the others has the size of its
square. So a bound on them needs two-sided quantiles."""

_CHUNK = 2048
_Array = npt.NDArray[np.float64]
_Indices = npt.NDArray[np.int64]


def js(p: _Array, q: _Array) -> _Array:
    """Jensen-Shannon divergence over the last axis, in nats: KL(p || m)/2 + KL(q || m)/2, m = (p + q)/2."""
    m = (p + q) / 2
    return np.asarray((rel_entr(p, m) + rel_entr(q, m)).sum(-1) / 2)


def kl(p: _Array, q: _Array) -> _Array:
    """Kullback-Leibler divergence KL(p || q) over the last axis, in nats; infinite where only q is 0."""
    return np.asarray(rel_entr(p, q).sum(-1))


def cosine(p: _Array, q: _Array, width: _Array) -> _Array:
    """1 - cosine of the angle between the densities p / width and q / width as functions: last axis.

    <f, g> = sum f g width, so that the value does not depend on how finely the axis is binned.
    """
    across, own = (p * q / width).sum(-1), (p * p / width).sum(-1) * (q * q / width).sum(-1)
    return np.asarray(1 - across / np.sqrt(own))


def wasserstein(cdf_p: _Array, cdf_q: _Array, position: _Array) -> _Array:
    """Wasserstein-1 distance over the last axis of masses at ascending positions, in the positions' unit."""
    return np.asarray(np.abs(cdf_p - cdf_q)[..., :-1] @ np.diff(position))


@dataclasses.dataclass(frozen=True)
class Estimates:
    """A measure of P pairs; NaN where it is not defined (a cohort whose rows lie in one user group)."""

    value_P: _Array
    """Bias-corrected."""
    error_P: _Array
    """Jackknife standard error."""


class Comparison:
    """Compares the cohorts of one axis pair by pair."""

    def __init__(self, counts: Counts):
        fine_CS = counts.fine_CS22[..., COUNT].sum(-1)
        self._coarse_CK = to_coarse(fine_CS)
        self._group_CGK = counts.group_CGK
        self._fine_cdf_CS = np.cumsum(fine_CS, axis=1) / fine_CS.sum(1, keepdims=True)
        self._pool_K = pooled_bins(self._coarse_CK.sum(0))
        self._width_B = _pooled_widths(self._pool_K, self._coarse_CK.sum(0))
        self.groups_C = np.count_nonzero(self._group_CGK.any(axis=2), axis=1)
        """Groups that hold a cohort's users; one less are its degrees of freedom."""

    def estimate(self, head_P: _Indices, tail_P: _Indices, measure: Measure) -> Estimates:
        """`measure` of the pairs of cohorts (head_P[i], tail_P[i]).

        Wasserstein values are those of the fine slots; their bias and error, as differences, come from
        the coarse ones.
        """
        shift_P, square_P = np.zeros(len(head_P)), np.zeros(len(head_P))
        plain_P = self._measure(self._coarse_CK, head_P, tail_P, measure)
        for g in range(self._group_CGK.shape[1]):
            change_P = self._measure(self._coarse_CK - self._group_CGK[:, g], head_P, tail_P, measure) - plain_P
            shift_P += change_P
            square_P += change_P**2
        if measure in FOLDED:
            position_S = positions(slot_edges(), measure)
            plain_P = _by_chunks(
                lambda h, t: wasserstein(self._fine_cdf_CS[h], self._fine_cdf_CS[t], position_S), head_P, tail_P
            )
        if not self._group_CGK.shape[1]:
            return Estimates(plain_P, np.full(len(head_P), np.nan))
        # Noise adds c / n to a smooth measure of n rows, c / sqrt(n) to a folded one. A replicate without
        # one group has (1 - 1/G) n rows; its distance from the full value gives c.
        rate = 0.5 if measure in FOLDED else 1.0
        bias_P = shift_P / GROUPS / ((GROUPS / (GROUPS - 1)) ** rate - 1)
        variance_P = (GROUPS - 1) / GROUPS * (square_P - shift_P**2 / GROUPS)
        return Estimates(plain_P - bias_P, np.sqrt(np.maximum(variance_P, 0)))

    def _measure(
        self,
        count_CK: npt.NDArray[np.int64],
        head_P: _Indices,
        tail_P: _Indices,
        measure: Measure,
    ) -> _Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            if measure in FOLDED:
                cdf_CK = np.cumsum(count_CK, axis=1) / count_CK.sum(1, keepdims=True)
                position_K = positions(coarse_edges(), measure)
                return _by_chunks(lambda h, t: wasserstein(cdf_CK[h], cdf_CK[t], position_K), head_P, tail_P)
            pooled_CB = pool(count_CK, self._pool_K)
            smooth = 0.5 if measure.startswith("kl") else 0.0
            p_CB = (pooled_CB + smooth) / (pooled_CB + smooth).sum(1, keepdims=True)
            p_CB[pooled_CB.sum(1) == 0] = np.nan
            return _by_chunks(lambda h, t: self._pooled(p_CB[h], p_CB[t], measure), head_P, tail_P)

    def _pooled(self, p: _Array, q: _Array, measure: Measure) -> _Array:
        match measure:
            case "js":
                return js(p, q)
            case "kl_head_tail":
                return kl(p, q)
            case "kl_tail_head":
                return kl(q, p)
            case "kl":
                return kl(p, q) + kl(q, p)
            case _:
                return cosine(p, q, self._width_B)


def pooled_bins(total_K: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bin of each coarse slot: int64 (K,), ascending from 0, at most 64 bins of about equal mass.

    A slot goes where its middle lies among 64 quantiles of the axis's pooled predictions, an empty one
    to the bin before it.
    """
    filled = np.flatnonzero(total_K)
    middle = (np.cumsum(total_K) - total_K / 2)[filled]
    bin_of_filled = np.unique((POOLED_BINS * middle / total_K.sum()).astype(np.int64), return_inverse=True)[1]
    before_K = np.searchsorted(filled, np.arange(len(total_K)), side="right") - 1
    return np.asarray(bin_of_filled[np.maximum(before_K, 0)])


def pool(count_CK: npt.NDArray[np.int64], pool_K: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Counts of the pooled bins: (C, B)."""
    return np.add.reduceat(count_CK, np.flatnonzero(np.diff(pool_K, prepend=-1)), axis=1)


def positions(edges: _Array, measure: Measure) -> _Array:
    """Where the mass of each slot stands: its middle, in p or in logit(p)."""
    middle = np.append((edges[:-1] + edges[1:]) / 2, 1.0)
    middle[0] = 0.0
    return logit(middle) if measure == "wasserstein_logit" else middle


def _pooled_widths(pool_K: npt.NDArray[np.int64], total_K: npt.NDArray[np.int64]) -> _Array:
    """Widths in logit(p) of the pooled bins, from the first to the last slot that holds anything."""
    edges = logit(np.append(coarse_edges(), 1.0))
    filled = np.flatnonzero(total_K)
    starts = np.flatnonzero(np.diff(pool_K, prepend=-1))
    inner = edges[starts[1:]]
    outer = max(edges[filled[-1] + 1], edges[filled[-1]] + 1e-9)
    return np.diff(np.concatenate([[edges[filled[0]]], inner, [outer]]))


def logit(p: _Array) -> _Array:
    """log(p / (1 - p)), where p is kept 2^-25 away from 0 and 1."""
    inside = np.clip(p, TINY, 1 - TINY)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _by_chunks(function: Callable[[_Indices, _Indices], _Array], head_P: _Indices, tail_P: _Indices) -> _Array:
    """Applies a function of (heads, tails) to bounded pieces: memory does not grow with the pairs."""
    pieces = [function(head_P[i : i + _CHUNK], tail_P[i : i + _CHUNK]) for i in range(0, len(head_P), _CHUNK)]
    return np.concatenate(pieces) if pieces else np.empty(0)
