"""Normalized entropy, calibration and AUC as mergeable float64 sums.

Letters: B batch rows, T tasks, C cohorts ("all" first), S sums, N batches of the window.

Everything `compute` needs is one tensor `sums_CTS`, so merging two ranks is one addition and an
all-reduce of that tensor is the merge of all of them.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

BINS = 1024
"""Bins of the AUC histogram, equally wide in logit over [-LIMIT, LIMIT]; the outer ones are open."""
LIMIT = 16.0
ALL = "all"
"""Name of the cohort that holds every row."""

_LOSS, _PREDICTION, _HISTOGRAM = 0, 1, 2
_SUMS = _HISTOGRAM + 2 * BINS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One task on one cohort. None: undefined on these rows. NaN: a prediction was NaN."""

    ne: float | None
    """Normalized entropy; None without positives or without negatives."""
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
        """task -> cohort -> Metric.

        NE is Eq. 13 of the C2AL paper: the average log loss over the entropy of the average label,
        -(1/W) sum w (y log p + (1-y) log(1-p)) / -(q log q + (1-q) log(1-q)), q = sum w y / W.
        """
        sums_CTS = self.sums_CTS.cpu()
        return {
            task: {cohort: _metric(sums_CTS[c, t]) for c, cohort in enumerate(self.cohorts)}
            for t, task in enumerate(self.tasks)
        }


class BinaryMetrics:
    """Metrics of T tasks on C cohorts over all batches (`lifetime`) and the last N (`window`).

    `tasks` and `cohorts` are names; the cohort "all" is added in front. `lifetime` continues the
    totals of an earlier run: give it on one rank only, since merging ranks adds what each holds.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        cohorts: Sequence[str] = (),
        *,
        window: int = 100,
        device: torch.device | str = "cpu",
        lifetime: Sums | None = None,
    ):
        self.tasks = tuple(tasks)
        self.cohorts = (ALL, *cohorts)
        shape = (len(self.cohorts), len(self.tasks), _SUMS)
        # float32 would stop counting at 2**24 rows; the window's sums are small but share the code.
        self._window_NCTS = torch.zeros(window, *shape, dtype=torch.float64, device=device)
        self._lifetime_CTS = torch.zeros(shape, dtype=torch.float64, device=device)
        self._batches = 0
        if lifetime is not None:
            assert (lifetime.tasks, lifetime.cohorts) == (self.tasks, self.cohorts)
            self._lifetime_CTS += lifetime.sums_CTS.to(device)
        self._cell_CT = torch.arange(shape[0] * shape[1], device=device).view(shape[:2]) * _SUMS + _HISTOGRAM

    @torch.no_grad()
    def update(self, logit_BT: Tensor, label_BT: Tensor, weight_B: Tensor, member_BC: Tensor | None = None) -> None:
        """Adds one batch. Labels are 0 or 1; `member_BC` (0 or 1) has a column for each named cohort.

        The log loss is taken from logits, so it is finite for any finite logit. Never synchronises
        with the device. Cost: one float64 pass and C * T histogram increments a row.
        """
        logit_BT, label_BT = logit_BT.double(), label_BT.double()
        weight_BC = weight_B.double()[:, None]
        if member_BC is not None:
            weight_BC = torch.cat((weight_BC, weight_BC * member_BC), dim=1)
        tasks = len(self.tasks)

        sums_CTS = self._window_NCTS[self._batches % len(self._window_NCTS)].zero_()
        loss_BT = softplus(logit_BT) - label_BT * logit_BT
        totals_CT = weight_BC.T @ torch.cat((loss_BT, logit_BT.sigmoid()), dim=1)
        bin_BT = ((logit_BT + LIMIT) * (BINS / (2 * LIMIT))).nan_to_num_(nan=0.0).clamp_(0, BINS - 1).long()
        bin_BT += label_BT.long() * BINS
        index_BCT = bin_BT[:, None, :] + self._cell_CT
        sums_CTS.view(-1).index_add_(0, index_BCT.flatten(), weight_BC[:, :, None].expand(index_BCT.shape).flatten())
        sums_CTS[:, :, _LOSS] = totals_CT[:, :tasks]
        sums_CTS[:, :, _PREDICTION] = totals_CT[:, tasks:]

        self._lifetime_CTS += sums_CTS
        self._batches += 1

    @property
    def lifetime(self) -> Sums:
        """Totals over every batch so far."""
        return Sums(tasks=self.tasks, cohorts=self.cohorts, sums_CTS=self._lifetime_CTS.clone())

    @property
    def window(self) -> Sums:
        """Totals over the last N batches."""
        return Sums(tasks=self.tasks, cohorts=self.cohorts, sums_CTS=self._window_NCTS.sum(dim=0))


def _metric(sums_S: Tensor) -> Metric:
    loss, prediction = sums_S[_LOSS].item(), sums_S[_PREDICTION].item()
    negative_K, positive_K = sums_S[_HISTOGRAM:].view(2, BINS)
    negatives, positives = negative_K.sum().item(), positive_K.sum().item()
    weight = negatives + positives
    ne = auc = auc_error = None
    if positives > 0 and negatives > 0:
        q = torch.tensor([negatives, positives], dtype=torch.float64) / weight
        ne = loss / weight / -(q * q.log()).sum().item()
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
