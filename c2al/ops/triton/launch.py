"""FM attention on CUDA through Triton: launches the kernels of kernels.py.

Legend: B batch, M fields, D embedding dim, p x q the matrix A of a sample (x^T or x), K columns of
Y, N programs. Only x and Y are saved for backward, and with LayerNorm the output and 1 / deviation.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from c2al.errors import BackendError
from c2al.ops.triton import kernels
from c2al.ops.triton.configurations import Configuration, Direction, Precision, configurations, precision_of


class _Problem(NamedTuple):
    """What a kernel is compiled for, besides its configuration."""

    p: int
    q: int
    k: int
    paper: bool
    shared: bool
    norm: bool
    dtype: torch.dtype
    precision: Precision

    @classmethod
    def of(cls, x_BMD: Tensor, y: Tensor, paper: bool, norm: bool) -> "_Problem":
        _, m, d = x_BMD.shape
        p, q = (d, m) if paper else (m, d)
        return cls(p, q, y.shape[-1], paper, y.dim() == 2, norm, x_BMD.dtype, precision_of(x_BMD.dtype))


def forward(x_BMD: Tensor, y: Tensor, paper: bool, norm_eps: float | None) -> tuple[Tensor, Tensor]:
    """(G or its row-normalised form, 1 / standard deviation of the rows or size 0)."""
    problem = _Problem.of(x_BMD, y, paper, norm_eps is not None)
    batch, x_BMD = x_BMD.shape[0], _addressable(x_BMD)
    out_BPK = x_BMD.new_empty(batch, problem.p, problem.k)
    rstd_BP = x_BMD.new_empty((batch, problem.p) if problem.norm else 0, dtype=torch.float32)
    arguments = (x_BMD, y.contiguous(), out_BPK, rstd_BP, x_BMD.stride(0), x_BMD.stride(1), norm_eps or 0.0)
    _launch("forward", problem, batch, arguments)
    return out_BPK, rstd_BP


def backward(
    grad_BPK: Tensor, x_BMD: Tensor, y: Tensor, out_BPK: Tensor | None, rstd_BP: Tensor, paper: bool
) -> tuple[Tensor, Tensor]:
    """(dX, dY); `out_BPK` is given exactly when the forward pass normalised."""
    problem = _Problem.of(x_BMD, y, paper, out_BPK is not None)
    batch, x_BMD, grad_BPK = x_BMD.shape[0], _addressable(x_BMD), grad_BPK.contiguous()
    dx_BMD = torch.empty_like(x_BMD, memory_format=torch.contiguous_format)
    programs = min(batch, _resident_programs(x_BMD.device, problem)) if problem.shared else batch
    dy_NPK = y.new_empty(programs, problem.p, problem.k, dtype=torch.float32 if problem.shared else y.dtype)
    saved = (grad_BPK, x_BMD, y.contiguous(), grad_BPK if out_BPK is None else out_BPK, rstd_BP)
    arguments = (*saved, dx_BMD, dy_NPK, batch, x_BMD.stride(0), x_BMD.stride(1))
    _launch("backward", problem, programs, arguments)
    return dx_BMD, dy_NPK.sum(0).to(y.dtype) if problem.shared else dy_NPK


def _addressable(x_BMD: Tensor) -> Tensor:
    """x itself where rows are dense and offsets within a sample fit 32 bits, else a copy."""
    _, m, d = x_BMD.shape
    return x_BMD if x_BMD.stride(2) == 1 and m * x_BMD.stride(1) + d < 2**31 else x_BMD.contiguous()


def _resident_programs(device: torch.device, problem: _Problem) -> int:
    """Programs that share the sum of dY: enough to hide the memory's latency, few enough that adding their partials
    costs little."""
    found = configurations("backward", problem.p, problem.q, problem.k, problem.precision)
    warps = min((c.warps for c in found), default=4)
    return min(32 // warps, 16) * torch.cuda.get_device_properties(device).multi_processor_count


_tuned: dict[tuple[Direction, str, _Problem], Configuration] = {}


def _launch(direction: Direction, problem: _Problem, programs: int, arguments: tuple[Any, ...]) -> None:
    """Runs the kernel on x's device with its fastest configuration, timed once per problem and card."""
    if programs == 0:
        return
    p, q, k, precision = problem.p, problem.q, problem.k, problem.precision
    candidates = configurations(direction, p, q, k, precision)
    if not candidates:
        raise BackendError(f"fm_attention: no Triton {direction} kernel for p={p}, q={q}, K={k}, {precision}")

    def run(c: Configuration) -> None:
        kernel = getattr(kernels, f"{direction}_{c.schedule}")
        kernel[(programs,)](
            *arguments, P=p, Q=q, K=k, PAPER=problem.paper, SHARED=problem.shared, NORM=problem.norm,
            PRECISION="ieee" if precision == "ieee" else "tf32",
            BLOCK_P=c.block_p, BLOCK_Q=c.block_q, BLOCK_K=c.block_k, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip

    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        if len(candidates) == 1:
            return run(candidates[0])
        key = (direction, torch.cuda.get_device_name(arguments[0].device), problem)
        if key not in _tuned:
            _tuned[key] = min(candidates, key=lambda c: triton.testing.do_bench(lambda: run(c), warmup=5, rep=20))
        run(_tuned[key])
