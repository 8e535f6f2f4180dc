"""Normalized entropy, calibration and AUC as mergeable float64 sums.

Letters: B batch rows, T tasks, C cohorts ("all" first), S sums.

Everything `compute` needs is one tensor `sums_CTS`, so merging two ranks is one addition and an
all-reduce of that tensor is the merge of all of them.
"""

import base64
import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from c2al.bins import BINS, LIMIT
from c2al.ne import normalized_entropy

ALL = "all"
"""Name of the cohort that holds every row."""

_LOSS, _PREDICTION, _HISTOGRAM = 0, 1, 2
_SUMS = _HISTOGRAM + 2 * BINS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One task on one cohort. None: undefined on these rows. NaN: a prediction was NaN."""

    ne: float | None
    """Normalized entropy, see c2al.ne; None without positives or without negatives."""
    calibration: float | None
    """Sum of predictions / sum of labels; None without positives."""
    auc: float | None
    """Area under the ROC curve, ties counted half; None without positives or without negatives."""
    auc_error: float | None
    """Largest possible distance of `auc` to the exact one: half the share of (positive, negative)
    pairs that fall into one bin."""
    weight: float
    """Sum of the sample weights."""
    positives: float
    """Sum of weight * label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """Totals over some rows; `a + b` are the totals over both sets of rows."""

    tasks: tuple[str, ...]
    cohorts: tuple[str, ...]
    sums_CTS: Tensor
    """float64: loss, prediction, then the logit histogram of negatives and of positives. To merge
    ranks: ``dataclasses.replace(s, sums_CTS=all_sum(s.sums_CTS))``."""

    def __add__(self, other: "Sums") -> "Sums":
        assert (self.tasks, self.cohorts) == (other.tasks, other.cohorts)
        return dataclasses.replace(self, sums_CTS=self.sums_CTS + other.sums_CTS)

    def compute(self) -> dict[str, dict[str, Metric]]:
        """task -> cohort -> Metric."""
        sums_CTS = self.sums_CTS.cpu()
        return {
            task: {cohort: _metric(sums_CTS[c, t]) for c, cohort in enumerate(self.cohorts)}
            for t, task in enumerate(self.tasks)
        }

    def saved(self) -> "SavedSums":
        """What a checkpoint keeps; `restored` gives it back bit for bit."""
        content = zlib.compress(self.sums_CTS.cpu().numpy().astype("<f8").tobytes())
        return SavedSums(tasks=self.tasks, cohorts=self.cohorts, sums=base64.b64encode(content).decode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedSums:
    """Sums as values of JSON."""

    tasks: tuple[str, ...]
    cohorts: tuple[str, ...]
    sums: str
    """The float64 values, little-endian, through zlib (most bins are 0) and Base64."""

    def restored(self) -> Sums:
        """Raises ValueError when `sums` are not the values of these tasks and cohorts."""
        shape = (len(self.cohorts), len(self.tasks), _SUMS)
        needed = 8 * shape[0] * shape[1] * shape[2]
        try:
            # One byte more than needed shows that there is more, without unpacking all of it.
            content = zlib.decompressobj().decompress(base64.b64decode(self.sums, validate=True), needed + 1)
        except (ValueError, zlib.error) as e:
            raise ValueError(f"sums: {e}") from e
        if len(content) != needed:
            raise ValueError(f"sums: not {shape} numbers")
        sums_CTS = torch.from_numpy(np.frombuffer(content, "<f8").astype(np.float64).reshape(shape))
        return Sums(tasks=self.tasks, cohorts=self.cohorts, sums_CTS=sums_CTS)


class BinaryMetrics:
    """Metrics of T tasks on C cohorts: over all batches (`lifetime`) and since the last `reset_window`.

    `tasks` and `cohorts` are names; the cohort "all" is added in front. `lifetime` continues the
    totals of an earlier run: give it on one rank only, since merging ranks adds what each holds.
    Memory: three float64 tensors of (C, T, S), however many batches the window spans.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        cohorts: Sequence[str] = (),
        *,
        device: torch.device | str = "cpu",
        lifetime: Sums | None = None,
    ):
        self.tasks = tuple(tasks)
        self.cohorts = (ALL, *cohorts)
        shape = (len(self.cohorts), len(self.tasks), _SUMS)
        # float32 would stop counting at 2**24 rows.
        self._batch_CTS, self._window_CTS, self._lifetime_CTS = (
            torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)
        )
        if lifetime is not None:
            if (lifetime.tasks, lifetime.cohorts) != (self.tasks, self.cohorts):
                saved = f"{', '.join(lifetime.tasks)} on {', '.join(lifetime.cohorts)}"
                raise ValueError(f"these are metrics of {saved}, not of {self.tasks} on {self.cohorts}")
            self._lifetime_CTS += lifetime.sums_CTS.to(device)
        self._cell_CT = torch.arange(shape[0] * shape[1], device=device).view(shape[:2]) * _SUMS + _HISTOGRAM

    @torch.no_grad()
    def update(self, logit_BT: Tensor, label_BT: Tensor, weight_B: Tensor, member_BC: Tensor | None = None) -> None:
        """Adds one batch. Labels are 0 or 1; `member_BC` (0 or 1) has a column for each named cohort.

        The log loss is taken from logits, so it is finite for any finite logit. Never synchronises
        with the device. Cost: one float64 pass and C * T histogram increments per row.
        """
        logit_BT, label_BT = logit_BT.double(), label_BT.double()
        weight_BC = weight_B.double()[:, None]
        if member_BC is not None:
            weight_BC = torch.cat((weight_BC, weight_BC * member_BC), dim=1)
        tasks = len(self.tasks)

        loss_BT = softplus(logit_BT) - label_BT * logit_BT
        totals_CX = _weighted_sums(weight_BC, torch.cat((loss_BT, logit_BT.sigmoid()), dim=1))
        sums_CTS = self._batch_CTS.zero_()
        sums_CTS[:, :, _LOSS] = totals_CX[:, :tasks]
        sums_CTS[:, :, _PREDICTION] = totals_CX[:, tasks:]
        bin_BT = ((logit_BT + LIMIT) * (BINS / (2 * LIMIT))).nan_to_num_(nan=0.0).clamp_(0, BINS - 1).long()
        bin_BT += label_BT.long() * BINS
        index_BCT = bin_BT[:, None, :] + self._cell_CT
        sums_CTS.view(-1).index_add_(0, index_BCT.flatten(), weight_BC[:, :, None].expand(index_BCT.shape).flatten())
        # Batch by batch, so that totals continued from a checkpoint equal those never interrupted.
        self._window_CTS += sums_CTS
        self._lifetime_CTS += sums_CTS

    def reset_window(self) -> None:
        """Starts a new window; `lifetime` keeps what the old one held."""
        self._window_CTS.zero_()

    @property
    def lifetime(self) -> Sums:
        """Totals over every batch so far."""
        return Sums(tasks=self.tasks, cohorts=self.cohorts, sums_CTS=self._lifetime_CTS.clone())

    @property
    def window(self) -> Sums:
        """Totals since the last `reset_window`."""
        return Sums(tasks=self.tasks, cohorts=self.cohorts, sums_CTS=self._window_CTS.clone())


def _weighted_sums(weight_BC: Tensor, value_BX: Tensor) -> Tensor:
    """(C, X) sums of weight * value. A value that is not finite makes the sums of its own cohorts NaN and
    leaves the others alone, whose weight for it is 0: 0 * NaN is NaN."""
    bad_BX = ~value_BX.isfinite()
    sums_CX = weight_BC.T @ value_BX.masked_fill(bad_BX, 0.0)
    return sums_CX.masked_fill_(weight_BC.T @ bad_BX.double() > 0, float("nan"))


def _metric(sums_S: Tensor) -> Metric:
    loss, prediction = sums_S[_LOSS].item(), sums_S[_PREDICTION].item()
    negative_K, positive_K = sums_S[_HISTOGRAM:].view(2, BINS)
    negatives, positives = negative_K.sum().item(), positive_K.sum().item()
    weight = negatives + positives
    ne = auc = auc_error = None
    if positives > 0 and negatives > 0:
        ne = float(normalized_entropy(loss, positives, negatives))
        below_K = negative_K.cumsum(0) - negative_K
        pairs = positives * negatives
        tied = (positive_K @ negative_K).item() / pairs
        auc = (positive_K @ below_K).item() / pairs + tied / 2
        auc_error = tied / 2
        if prediction != prediction:  # the NaN rows lie in the lowest bin, where they mean nothing
            auc = auc_error = float("nan")
    return Metric(
        ne=ne,
        calibration=prediction / positives if positives > 0 else None,
        auc=auc,
        auc_error=auc_error,
        weight=weight,
        positives=positives,
    )


def as_records(result: dict[str, dict[str, Metric]]) -> dict[str, Any]:
    """What BinaryMetrics computed, as metrics.jsonl has it: task -> cohort -> figures."""
    return {task: {cohort: dataclasses.asdict(m) for cohort, m in row.items()} for task, row in result.items()}


def shown_ne(ne: float | None) -> str:
    """For people."""
    return "undefined" if ne is None else f"{ne:.4f}"
