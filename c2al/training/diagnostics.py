"""Learning dynamics of C2AL: the distribution of Y, weight change, and what the auxiliary gradients do.

Letters: B batch, P rows and K columns of Y, H histogram edges, T tasks.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from c2al.errors import CheckpointError
from c2al.nn.interactions import StaticY, YSource

NEAR_ZERO = 0.01
"""|y| below this counts as near zero in `near_zero`."""
NEAR_ZERO_RELATIVE = 0.1
"""|y| below this fraction of the root mean square of Y counts in `near_zero_relative`. It does not
change when a layer scales all of Y; a normal distribution has a share of 0.08."""

# Magnitudes in eighths of an octave from 2^-12 to 2^4, mirrored: fine around zero, where the paper's
# Fig. 2 looks, and wide enough for any Y; the two outer bins are open and counted, not drawn.
_OCTAVE, _LOW, _HIGH = 8, -12, 4
_MAGNITUDES = torch.exp2(torch.arange(_LOW * _OCTAVE, _HIGH * _OCTAVE + 1, dtype=torch.float64) / _OCTAVE)
Y_EDGES: tuple[float, ...] = tuple(torch.cat((-_MAGNITUDES.flip(0), _MAGNITUDES)).tolist())
"""H ascending edges of the histogram of Y, the same for every run and layer."""


class YRecorder:
    """Collects the Y of every FM attention while a model runs.

    ::

        with YRecorder(model) as recorder:
            for batch in batches:
                model(batch)
        recorder.summary()

    A static Y counts once a forward, a Y of the MLP once a sample. Memory does not grow with the
    number of batches.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._layers: dict[str, _Layer] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "YRecorder":
        for name, module in self._model.named_modules():
            if isinstance(module, YSource):
                # Wrappers put their own prefix before the model's; layers.0... is what runs share.
                layer = _Layer("static" if isinstance(module, StaticY) else "mlp")
                self._layers[name.rpartition("dhen.")[2]] = layer
                self._hooks.append(module.register_forward_hook(layer.hook))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def summary(self) -> dict[str, dict[str, Any]]:
        """Layer -> what its Y looked like; JSON values only, a layer that never ran is left out.

        y: "static" or "mlp". values: numbers y seen. mean, std, kurtosis (of a normal: 3; None when Y is
        constant). near_zero, near_zero_relative: shares, see NEAR_ZERO and NEAR_ZERO_RELATIVE (the
        latter interpolated in the histogram). participation_ratio: (tr C)^2 / tr(C^2) of C = E[Y Y^T]
        (P x P), from 1 (the rows of Y share one direction) to P. entropy: of |y| / sum |y| within a Y,
        divided by log(P K), mean over Ys: 1 when all are equal, 0 when one carries all. histogram:
        H + 1 counts of (-inf, e_0), [e_0, e_1), ... [e_{H-1}, inf).
        """
        return {name: layer.summary() for name, layer in self._layers.items() if layer.matrices}


class _Layer:
    """Running sums of one YSource."""

    def __init__(self, kind: str):
        self.kind = kind
        self.matrices = 0
        self.values = 0
        # Python and torch scalars in turn: 0.0 takes the device of what is added to it.
        self.moment_4: Tensor | float = 0.0
        self.near_zero: Tensor | float = 0.0
        self.entropy: Tensor | float = 0.0
        self.second_PP: Tensor | float = 0.0
        self.histogram: Tensor | float = 0.0

    @torch.no_grad()
    def hook(self, module: nn.Module, inputs: Any, y: Tensor) -> None:
        y_BPK = y.detach().double().view(-1, *y.shape[-2:])
        if not len(y_BPK):
            return
        flat = y_BPK.flatten()
        self.matrices += len(y_BPK)
        self.values += flat.numel()
        self.moment_4 += torch.stack([(flat**k).sum() for k in range(1, 5)])
        self.near_zero += (flat.abs() < NEAR_ZERO).sum()
        share_BN = y_BPK.abs().flatten(1)
        share_BN = share_BN / share_BN.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        self.entropy += torch.special.entr(share_BN).sum() / math.log(max(share_BN.shape[1], 2))
        self.second_PP += torch.einsum("bpk,bqk->pq", y_BPK, y_BPK)
        edges_H = torch.tensor(Y_EDGES, dtype=torch.float64, device=flat.device)
        bins = torch.bucketize(flat, edges_H, right=True)
        self.histogram += torch.bincount(bins, minlength=len(Y_EDGES) + 1)

    def summary(self) -> dict[str, Any]:
        m1, m2, m3, m4 = (torch.as_tensor(self.moment_4) / self.values).tolist()
        variance = max(m2 - m1**2, 0.0)
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        second_PP = torch.as_tensor(self.second_PP)
        square = (second_PP**2).sum().item()
        counts = torch.as_tensor(self.histogram).long().tolist()
        # Below rounding of m2 a difference of moments is noise, not a variance.
        spread = variance > 1e-12 * m2
        return {
            "y": self.kind,
            "values": self.values,
            "mean": m1,
            "std": math.sqrt(variance),
            "kurtosis": fourth / variance**2 if spread else None,
            "near_zero": float(self.near_zero) / self.values,
            "near_zero_relative": _share_within(counts, NEAR_ZERO_RELATIVE * math.sqrt(m2)),
            "participation_ratio": second_PP.trace().item() ** 2 / square if square else None,
            "entropy": float(self.entropy) / self.matrices,
            "histogram": counts,
        }


def _share_within(counts: Sequence[int], bound: float) -> float:
    """Share of values in (-bound, bound), taking a bin's values as spread evenly over it."""
    inside = 0.0
    for low, high, count in zip(Y_EDGES, Y_EDGES[1:], counts[1:], strict=False):
        inside += count * max(0.0, min(high, bound) - max(low, -bound)) / (high - low)
    return inside / sum(counts)


def weight_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Module -> ||after - before|| / ||before|| over its own parameters; None where `before` is 0.

    Both map parameter names to tensors of the same model (``state_dict()`` or ``load_unsharded``).
    Raises CheckpointError naming a parameter that only one has, or whose shapes differ.
    """
    if odd := sorted(before.keys() ^ after.keys()):
        raise CheckpointError(f"weight change: parameter '{odd[0]}' is in only one of the two models")
    totals: dict[str, list[float]] = {}
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape:
            raise CheckpointError(f"weight change: parameter '{name}' is {tuple(old.shape)} and {tuple(new.shape)}")
        total = totals.setdefault(name.rpartition(".")[0], [0.0, 0.0])
        total[0] += (new.double() - old.double()).square().sum().item()
        total[1] += old.double().square().sum().item()
    return {module: math.sqrt(d / n) if n else None for module, (d, n) in totals.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientSplit:
    """An auxiliary gradient g_a beside the primary gradient g_p on one group of parameters."""

    primary: float
    """||g_p||"""
    auxiliary: float
    """||g_a||"""
    parallel: float
    """Signed length of g_a along g_p; negative: the two tasks pull against each other."""
    orthogonal: float
    """Length of what is left of g_a: learning signal that the primary loss does not give."""

    @property
    def cosine(self) -> float | None:
        """Of the angle between g_a and g_p; None when one of them is 0."""
        return self.parallel / self.auxiliary if self.auxiliary and self.primary else None


def gradient_split(task_T: Sequence[Tensor], shared: Mapping[str, Tensor]) -> dict[str, tuple[GradientSplit, ...]]:
    """Splits each auxiliary gradient into parts parallel and orthogonal to the primary gradient.

    task_T: scalar losses with their graph, primary first, e.g. head and tail after it; multiply by
    lambda beforehand for the gradients as Eq. 4 adds them. shared: name -> dense parameter of the
    encoder or pooled embeddings, each part of that graph.

    Returns name -> one GradientSplit a task after the first, and "" -> the same over all of `shared`.
    The graph is kept and nothing is accumulated into `.grad`. Only `shared` is differentiated: pass
    the pooled embeddings, never the tables, whose fused optimizer would step inside backward.
    Source: C2AL, Sec. 4 (Eq. 11's "= 1" holds only for normalised identical gradients).
    """
    gradients_TS = [
        torch.autograd.grad(task, list(shared.values()), retain_graph=True, allow_unused=True) for task in task_T
    ]
    products: dict[str, Tensor] = {}
    for s, name in enumerate(shared):
        # A parameter that a task does not use has a gradient of 0 there.
        flat = [(torch.zeros_like(shared[name]) if g[s] is None else g[s]).double().flatten() for g in gradients_TS]
        gradient_TN = torch.stack(flat)
        products[name] = torch.stack((gradient_TN @ gradient_TN[0], gradient_TN.square().sum(dim=1))).cpu()
    products[""] = torch.stack(list(products.values())).sum(dim=0)
    return {name: tuple(_splits(product_2T)) for name, product_2T in products.items()}


def _splits(product_2T: Tensor) -> Iterable[GradientSplit]:
    dot_T, square_T = product_2T.tolist()
    primary = math.sqrt(square_T[0])
    for dot, square in zip(dot_T[1:], square_T[1:], strict=True):
        parallel = dot / primary if primary else 0.0
        yield GradientSplit(
            primary=primary,
            auxiliary=math.sqrt(square),
            parallel=parallel,
            orthogonal=math.sqrt(max(square - parallel**2, 0.0)),
        )
