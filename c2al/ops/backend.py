"""Where the Triton kernels can run at all; what shapes and dtypes they cover is each op's own question."""

import importlib.util
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "eager"]

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def device_obstacle(x: Tensor, name: str) -> str:
    """Why no Triton kernel runs where the operand `x` is, which messages call `name`; empty if one does."""
    if x.device.type != "cuda":
        return f"{name} is on {x.device.type}, the kernels need a CUDA device"
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    capability = torch.cuda.get_device_properties(x.device).major
    return f"compute capability {capability}.x is below 8.0" if capability < 8 else ""
