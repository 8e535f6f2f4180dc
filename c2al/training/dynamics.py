"""What a training run records of its own dynamics beside the losses."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from c2al.nn.combine import Combine
from c2al.training.diagnostics import gramian_record, weight_change


class Dynamics:
    """The Gramian of the tasks' gradients at h on the steps that are logged, and the weight change at the end.

    Make it before a checkpoint is loaded: the weights that the seed gives are what change is measured from, also
    in a run that goes on.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str]):
        # Sharding may copy modules, so the node is looked up in what came out of it.
        self._combine = next((m for m in model.modules() if isinstance(m, Combine)), None)
        self._model, self._tasks = model, tasks
        self._initial = self._dense()

    def before(self, step: int, logged: bool) -> None:
        """Prepares the coming step, which is logged or not. On others than these the Gramian costs nothing."""
        if self._combine is not None:
            self._combine.step, self._combine.recording = step, logged
            self._combine.gramian_TT = None

    def gramian(self) -> dict[str, Any] | None:
        """Record of the last step's gradients; None without auxiliary tasks."""
        if self._combine is None or self._combine.gramian_TT is None:
            return None
        return {**gramian_record(self._tasks, self._combine.gramian_TT), "weights": self._combine.weight_T}

    def weights(self) -> dict[str, Any]:
        """Relative weight change per module of the dense part since initialisation (C2AL, Fig. 4).

        part: "before" the attention MLPs (the dense arch), "attention" (what makes Y), "after" (the rest of the
        layers and the prediction heads). change: |w - w_0| / |w_0|; None where w_0 is 0.
        """
        change = weight_change(self._initial, self._dense())
        return {"modules": {name: {"part": _part(name), "change": value} for name, value in change.items()}}

    def _dense(self) -> dict[str, Tensor]:
        """Copies on the host of the parameters above the tables, by their name below `over`."""
        named = [(n.rpartition("over."), p) for n, p in self._model.named_parameters()]
        return {name: p.detach().to("cpu", copy=True) for (_, over, name), p in named if over}


def _part(module: str) -> str:
    if ".fm_attention" in module and (module.endswith(".y") or ".y." in module):
        return "attention"
    return "before" if module.startswith("dense_arch.") else "after"
