"""Held-out rows, and how far the predictions of a variant are from the training model's.

Needs torch, pyarrow and numpy only.
"""

import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt

from c2al.ne import PROBABILITY_CLIP, normalized_entropy
from c2al.serving.artifact import VariantProof


@dataclasses.dataclass
class Sums:
    """Sums over held-out rows of one model's predictions beside the training model's."""

    bit_equal: bool = True
    max_difference: float = 0.0
    loss: float = 0.0
    reference_loss: float = 0.0
    positives: float = 0.0
    negatives: float = 0.0

    def update(
        self,
        prediction_N: npt.NDArray[np.float32],
        reference_N: npt.NDArray[np.float32],
        label_N: npt.NDArray[np.float32],
        weight_N: npt.NDArray[np.float32],
    ) -> None:
        self.bit_equal &= bool(np.array_equal(prediction_N.view(np.uint32), reference_N.view(np.uint32)))
        difference_N = np.abs(prediction_N.astype(np.float64) - reference_N)
        self.max_difference = float(np.maximum(self.max_difference, difference_N.max(initial=0.0)))  # keeps NaN
        w_N, y_N = weight_N.astype(np.float64), label_N.astype(np.float64)
        self.loss += log_loss(prediction_N, y_N, w_N)
        self.reference_loss += log_loss(reference_N, y_N, w_N)
        self.positives += float((w_N * y_N).sum())
        self.negatives += float((w_N * (1 - y_N)).sum())

    def ne(self, loss: float) -> float | None:
        """NE of a sum of log losses; None for rows of one class."""
        ne = float(normalized_entropy(loss, self.positives, self.negatives))
        return ne if np.isfinite(ne) else None

    def compute(self, ne_bound: float) -> VariantProof:
        return VariantProof(
            bit_equal=self.bit_equal,
            max_difference=self.max_difference,
            ne=self.ne(self.loss),
            # The entropy of the labels cancels. A log loss of clipped probabilities is never 0.
            ne_change=(self.loss - self.reference_loss) / self.reference_loss,
            ne_bound=ne_bound,
        )


def log_loss(
    prediction_N: npt.NDArray[np.float32], label_N: npt.NDArray[np.float64], weight_N: npt.NDArray[np.float64]
) -> float:
    """Sum of weight * log loss, of clipped probabilities in float64."""
    p_N = np.clip(prediction_N.astype(np.float64), PROBABILITY_CLIP, 1 - PROBABILITY_CLIP)
    return float(-(weight_N * (label_N * np.log(p_N) + (1 - label_N) * np.log1p(-p_N))).sum())


class Digest:
    """SHA-256 of predictions in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, prediction_N: npt.NDArray[np.float32]) -> None:
        self._hash.update(prediction_N.astype("<f4").tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
