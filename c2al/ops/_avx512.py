"""FM attention in bfloat16 on processors with avx512_bf16: runs the kernel of _avx512_kernels.py.

Legend: B batch, M fields, D embedding dim, p x q the matrix A of a sample (x^T or x), K columns of
Y. T is saved for backward, as in eager.py.

numba compiles the kernel at first use and caches it beside its source, so no compiler is needed where
it runs. It runs on torch's own OpenMP threads: a second pool would fight them for the cores.
"""

import ctypes
import functools
import importlib.util

import torch
from torch import Tensor

# void GOMP_parallel(void (*function)(void *), void *record, unsigned threads, unsigned flags): the entry that
# compilers call for `#pragma omp parallel`. torch loads its OpenMP for all to see; a build on other threads has none.
_PARALLEL = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
if _PARALLEL is not None:
    _PARALLEL.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    _PARALLEL.restype = None


@functools.cache
def obstacle() -> str:
    """Why the kernel cannot run here, or should not; empty if it can. LLVM aborts on instructions its target lacks."""
    processor = torch.cpu.get_capabilities()
    if not processor.get("avx512_bf16"):
        return "the processor has no avx512_bf16"
    if processor.get("amx_bf16"):
        return "the processor has amx_bf16, whose products are faster"
    if _PARALLEL is None:
        return "torch has no OpenMP threads"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    from llvmlite.binding import get_host_cpu_features
    from numba import config

    if config.DISABLE_JIT or config.CPU_NAME or config.CPU_FEATURES or not get_host_cpu_features().get("avx512bf16"):
        return "numba does not compile for this processor (NUMBA_DISABLE_JIT, NUMBA_CPU_NAME, NUMBA_CPU_FEATURES)"
    return ""


def covers(x_BMD: Tensor, y: Tensor) -> bool:
    """bfloat16, Y per sample, m >= 8, d and k multiples of 8."""
    _, m, d = x_BMD.shape
    sizes = m >= 8 and d % 8 == 0 and y.shape[-1] % 8 == 0 and x_BMD.numel() > 0
    return x_BMD.dtype == torch.bfloat16 and y.dim() == 3 and sizes


def products(x_BMD: Tensor, y_BPK: Tensor, paper: bool) -> tuple[Tensor, Tensor]:
    """(G, T): T = A^T Y, G = A T."""
    batch, m, d = x_BMD.shape
    p, q = (d, m) if paper else (m, d)
    g_BPK, t_BQK = x_BMD.new_empty(batch, p, y_BPK.shape[-1]), x_BMD.new_empty(batch, q, y_BPK.shape[-1])
    _run(x_BMD, y_BPK.contiguous(), t_BQK, g_BPK, paper)
    return g_BPK, t_BQK


def gradients(grad_BPK: Tensor, x_BMD: Tensor, y_BPK: Tensor, t_BQK: Tensor, paper: bool) -> tuple[Tensor, Tensor]:
    """(dX, dY): S = A^T dG, dY = A S, dA = dG T^T + Y S^T."""
    dx_BMD, dy_BPK = x_BMD.new_empty(x_BMD.shape), y_BPK.new_empty(y_BPK.shape)
    _run(x_BMD, grad_BPK.contiguous(), None, dy_BPK, paper, (y_BPK.contiguous(), t_BQK.contiguous(), dx_BMD))
    return dx_BMD, dy_BPK


def _run(
    x_BMD: Tensor,
    z_BPK: Tensor,
    inner_BQK: Tensor | None,
    out_BPK: Tensor,
    paper: bool,
    backward: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """inner = A^T z and out = A inner, of every sample; in `backward`, (y, T, dx), dx too, and inner is not kept."""
    import numpy as np  # numba's; torch alone does without

    from c2al.ops import _avx512_kernels as kernels  # compiles, which only `obstacle` knows to be safe

    if x_BMD.stride(2) != 1:
        x_BMD = x_BMD.contiguous()
    (batch, m, d), k = x_BMD.shape, z_BPK.shape[-1]
    threads, longest = torch.get_num_threads(), max(m, d)
    # Of one thread: x, z and inner packed (z and inner also transposed, for dX), and S.
    x_bytes = (m + 1) // 2 * kernels.panels(d) * kernels.PANEL_ROW
    z_bytes = max((longest + 1) // 2, kernels.panels(d) * 16) * kernels.panels(k) * kernels.PANEL_ROW
    thread_bytes = x_bytes + 2 * z_bytes + -(-longest * k * 2 // 64) * 64
    scratch = torch.empty(threads * thread_bytes + 63, dtype=torch.uint8)
    aligned = -(-scratch.data_ptr() // 64) * 64
    piece = max(1, batch // (16 * threads))
    y, t, dx = (0, 0, 0) if backward is None else (tensor.data_ptr() for tensor in backward)
    inner = 0 if inner_BQK is None else inner_BQK.data_ptr()
    record = np.array(
        (
            *(0, 0),
            *(batch, m, d, k, paper, piece),
            *(x_BMD.data_ptr(), x_BMD.stride(0) * 2, x_BMD.stride(1) * 2),
            *(z_BPK.data_ptr(), inner, out_BPK.data_ptr(), y, t, dx),
            *(aligned, x_bytes, z_bytes, thread_bytes),
        ),
        dtype=kernels.RECORD,
    )
    assert _PARALLEL is not None
    _PARALLEL(kernels.worker.address, record.ctypes.data, threads, 0)
