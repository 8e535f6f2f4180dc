"""CAGrad: Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021, arXiv 2110.14048."""

import math
from collections.abc import Sequence

from torch import Tensor

from c2al.nn.methods import Method

RADIUS = 0.4
"""c of the paper, in [0, 1): how far the update may be from the mean gradient, in lengths of that gradient."""
ROUNDS = 10_000
TOLERANCE = 1e-12


class CAGrad(Method):
    """T times the update within c |g_0| of the mean gradient g_0 at h that serves the worst task best (Algorithm 1).

    d = g_0 + c |g_0| g_w / |g_w|, where g_w = sum of w_t g_t and w, on the simplex, minimises
    F(w) = g_w . g_0 + c |g_0| |g_w|. Where g_w is 0, no direction serves all tasks and the weights are 0.

    F is minimised here, pair by pair in closed form: TorchJD's class needs cvxpy and a solver.
    """

    def weights(self, gramian_TT: Tensor, tasks: Sequence[int]) -> Tensor:
        tasks_range = range(len(tasks))
        g = gramian_TT.tolist()
        toward = [sum(row) / len(g) for row in g]
        radius = RADIUS * math.sqrt(max(sum(toward) / len(g), 0.0))
        w = _minimise(g, toward, radius)
        length = math.sqrt(max(sum(w[i] * g[i][j] * w[j] for i in tasks_range for j in tasks_range), 0.0))
        if length < 1e-8:
            return gramian_TT.new_zeros(len(g))
        return gramian_TT.new_tensor([1 + len(g) * radius / length * w_t for w_t in w])


def _minimise(g: list[list[float]], toward: list[float], radius: float) -> list[float]:
    """The w on the simplex of least toward . w + radius sqrt(w^T g w).

    Each round moves weight between the two tasks whose slopes differ most. Along that line F is
    b t + r sqrt(a t^2 + 2 m t + q), whose minimum is known.
    """
    size = len(g)
    w = [1.0 / size] * size
    for _ in range(ROUNDS):
        product = [sum(g[i][j] * w[j] for j in range(size)) for i in range(size)]
        length = math.sqrt(max(sum(w[i] * product[i] for i in range(size)), 0.0))
        if length < 1e-10:
            break
        slope = [toward[i] + radius * product[i] / length for i in range(size)]
        up = min(range(size), key=slope.__getitem__)
        down = max((i for i in range(size) if w[i] > 0), key=slope.__getitem__)
        if slope[down] - slope[up] <= TOLERANCE:
            break
        b = toward[up] - toward[down]
        a = g[up][up] - 2 * g[up][down] + g[down][down]
        m = product[up] - product[down]
        gap = radius**2 * a - b**2
        if gap <= 0 or a <= 0:
            step = w[down]  # F falls all along the line
        else:
            # u = a t + m solves b + r u / sqrt(a (a t^2 + 2 m t + q)) = 0 with a q - m^2 >= 0.
            rest = max(a * length**2 - m**2, 0.0)
            step = min((-b * math.sqrt(rest / gap) - m) / a, w[down])
        if step <= 0:
            break
        w[up] += step
        w[down] = 0.0 if step == w[down] else w[down] - step
    return w


METHOD = CAGrad
