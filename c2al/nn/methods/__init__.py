"""Weights for the tasks' gradients, from their Gramian alone: one module per method.

The module of the method "pcgrad-feat" is pcgrad_feat; its METHOD is the class. The names are the values of
train.combine (c2al/config/train.py). Methods of TorchJD (PyPI torchjd, the extra `methods`) need it in training only.

Papers that average the gradients give weights whose sum is 1. All methods here give weights whose sum would be T,
so that weights of 1 are the plain sum of Eq. 4 in every one of them.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from c2al.errors import ConfigError


class Method(nn.Module):
    """w_T from G_TT = (g_s . g_t). What it remembers between steps is in float64 buffers, which are saved."""

    torchjd = False
    """Whether `weights` needs TorchJD."""

    def __init__(self, tasks: int) -> None:
        super().__init__()

    def weights(self, gramian_TT: Tensor, tasks: Sequence[int]) -> Tensor:
        """(T,) weights. float64 on the CPU; the mean squared norm is 1 and none is 0.

        `tasks` are the numbers of the T tasks that have a gradient; task 0 is the primary one.
        """
        raise NotImplementedError


def make_method(name: str, tasks: int) -> Method | None:
    """The method of that name for that number of tasks; None for "sum"."""
    if name == "sum":
        return None
    module = importlib.import_module(f"c2al.nn.methods.{name.replace('-', '_')}")
    made: Method = module.METHOD(tasks)
    return made


def check_method(name: str) -> None:
    """Raises ConfigError when what the method of that name needs is not installed."""
    if (method := make_method(name, 1)) is not None and method.torchjd and importlib.util.find_spec("torchjd") is None:
        raise ConfigError(
            f"train.combine: '{name}' needs TorchJD, which is not installed: pip install 'c2al[methods]' "
            "(requirements/methods.txt)"
        )


def torchjd() -> Any:
    """TorchJD's weightings. Imported when a step needs them: whoever scores or serves such a run does not."""
    return importlib.import_module("torchjd.aggregation")
