"""What a host waits for its device for, seen on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Records the operations for which a host waits for its device: those whose result is a size or a number."""

    def __init__(self, on_host: list[torch.Tensor]):
        super().__init__()
        self._on_host = {t.data_ptr() for t in on_host}
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in {"index", "index_put_"} and any(t is not None and t.dtype is torch.bool for t in args[1])
        number = name in {"_local_scalar_dense", "is_nonzero", "equal"} and args[0].data_ptr() not in self._on_host
        if masked or number or name in {"nonzero", "masked_select", "unique2", "_unique2"}:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
