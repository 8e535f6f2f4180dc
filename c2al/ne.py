"""Normalized entropy, the one formula that training, evaluation and synthetic worlds share."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

PROBABILITY_CLIP = 1e-7
"""Predicted probabilities are clipped to [PROBABILITY_CLIP, 1 - PROBABILITY_CLIP], in float64, before
the logarithm. A float32 sigmoid reaches 0 and 1, and one such row would make NE infinite. Training takes
its loss from logits, which are never clipped."""


def normalized_entropy(loss_sum: ArrayLike, positives: ArrayLike, negatives: ArrayLike) -> NDArray[np.float64]:
    """NE, Eq. 13 of the C2AL paper: the average log loss over the entropy of the average label.

    NE = (loss_sum / W) / -(q log q + (1 - q) log(1 - q)) with W = positives + negatives, q = positives / W.

    The arguments broadcast; the result has their common shape and is a 0-d array for scalars.

    Args:
        loss_sum: sum of weight * log loss (natural logarithm) over the rows.
        positives: sum of the weights of rows with label 1.
        negatives: sum of the weights of rows with label 0.

    Returns:
        NE in float64. It is NaN where the rows have no positives or no negatives, since the entropy of
        their label is 0, and where `loss_sum` is NaN.

    ::

        normalized_entropy(4 * math.log(2), 2.0, 2.0)  # 1.0: no better than the base rate
    """
    loss, positive, negative = (np.asarray(x, dtype=np.float64) for x in (loss_sum, positives, negatives))
    positive = np.where(positive > 0, positive, np.nan)
    negative = np.where(negative > 0, negative, np.nan)
    weight = positive + negative
    # Each share is divided by itself: 1 - q would lose the digits of a rare class.
    q, not_q = positive / weight, negative / weight
    return np.asarray(loss / weight / -(q * np.log(q) + not_q * np.log(not_q)))
