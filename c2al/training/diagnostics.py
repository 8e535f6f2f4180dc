"""Learning dynamics of C2AL: the distribution of Y, weight change, dead units, and what the tasks' gradients do.

Letters: B batch, P rows and K columns of Y, H histogram edges, T tasks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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

    A static Y counts once per forward pass, a Y of the MLP once per sample. Memory does not grow with the
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


def gramian_record(tasks: Sequence[str], gramian_TT: Tensor) -> dict[str, Any]:
    """What the tasks' gradients at h do to each other, lambda included, from their inner products.

    tasks: names, primary first. norms: |g_t|. cosines: T x T; None where a norm is 0. parallel: signed length of g_t
    along the primary gradient, negative where the two pull against each other (0 without a primary gradient).
    orthogonal: length of what is left of g_t, the signal that the primary loss does not give. Source: C2AL,
    Eq. 8-12 (Eq. 11's "= 1" holds only for normalised identical gradients).
    """
    g = gramian_TT.tolist()
    norms = [math.sqrt(max(g[t][t], 0.0)) for t in range(len(tasks))]
    parallel = [row[0] / norms[0] if norms[0] else 0.0 for row in g]
    # Beyond 1 by rounding only.
    cosines = [
        [max(-1.0, min(1.0, dot / (a * b))) if a and b else None for dot, b in zip(row, norms, strict=True)]
        for row, a in zip(g, norms, strict=True)
    ]
    orthogonal = [math.sqrt(max(a**2 - p**2, 0.0)) for a, p in zip(norms, parallel, strict=True)]
    return {
        "tasks": list(tasks),
        "norms": norms,
        "cosines": cosines,
        "parallel": parallel,
        "orthogonal": orthogonal,
    }


class UnitRecorder:
    """Counts the ReLU units that were never active while a model ran; used as `YRecorder` is."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._active: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "UnitRecorder":
        for name, module in self._model.named_modules():
            if isinstance(module, nn.ReLU):
                self._hooks.append(module.register_forward_hook(self._hook(name.rpartition("over.")[2])))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, out: Tensor) -> None:
            active = (out.detach().reshape(-1, out.shape[-1]) > 0).any(dim=0)
            self._active[name] = active | self._active[name] if name in self._active else active

        return hook

    def summary(self) -> dict[str, dict[str, float]]:
        """Layer of ReLU units -> units, and the share of them that is dead."""
        return {
            name: {"units": len(active), "dead": 1.0 - active.double().mean().item()}
            for name, active in self._active.items()
        }
