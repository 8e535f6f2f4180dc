"""One gradient for the encoder from the gradients of several tasks.

Legend: B rows of this rank, F encoder features, T tasks, the primary one first.

The node stands between the encoder's output h and the T prediction heads. In backward it receives the
gradient of every task's term of the loss at h, lambda included, and sends sum over t of w_t g_t to the encoder and the
tables. Each prediction head keeps its own gradient. There is one backward and therefore one update of the
fused tables.

Methods that were published for the gradients of the shared parameters act here on the gradients at h, which
is what "-feat" in their names says (Sener and Koltun 2018, arXiv 1810.04650, Sec. 3.3, call it MGDA-UB).
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from c2al.nn.methods import make_method


class Combine(nn.Module):
    """T views of h, one per prediction head, whose gradients are combined in backward.

    With "sum" the node is absent, but where `recording` asks for the Gramian; then it adds the gradients in
    autograd's own order, so the weights are the same bit for bit. Ranks hold disjoint rows of h: their
    Gramians add up, and all ranks use the weights of rank 0. State of a method is in its buffers.

    `name` is a value of train.combine.
    """

    def __init__(self, name: str, tasks: int, seed: int) -> None:
        super().__init__()
        self.tasks, self.seed = tasks, seed
        self.method = make_method(name, tasks)
        self.step = 0
        """The coming step; random draws of a method are a function of (seed, step)."""
        self.recording = False
        """Whether the coming backward leaves its Gramian in `gramian_TT`."""
        self.gramian_TT: Tensor | None = None
        """Inner products of the tasks' gradients at h, of the loss over the global batch; float64."""
        self.weight_T = [1.0] * tasks
        """Weights of the last backward."""

    def forward(self, h_BF: Tensor) -> tuple[Tensor, ...]:
        wanted = self.recording or self.method is not None
        if not (wanted and self.training and h_BF.requires_grad):
            return (h_BF,) * self.tasks
        views: tuple[Tensor, ...] = _Node.apply(h_BF, self)  # type: ignore[no-untyped-call]
        return views

    @torch.no_grad()
    def combined(self, gradients: Sequence[Tensor]) -> Tensor:
        """sum over t of w_t g_t of the T gradients, each of the shape of h. Collective."""
        gramian_TT = gramian(gradients)
        if self.recording:
            self.gramian_TT = gramian_TT
        # Autograd runs the graph of what was made last first, so it adds up from the last task.
        if self.method is None:
            total = gradients[-1]
            for gradient in reversed(gradients[:-1]):
                total = total + gradient
            return total
        weights = self.weight_T = self.weights(gramian_TT)
        total = weights[-1] * gradients[-1]
        for weight, gradient in zip(reversed(weights[:-1]), reversed(gradients[:-1]), strict=True):
            total = total + weight * gradient
        return total

    def weights(self, gramian_TT: Tensor) -> list[float]:
        """The method's w_t, the same on all ranks. Collective.

        A task without a gradient (lambda 0) takes no part. A Gramian that is not finite gives weights of 1,
        so that the loss shows what is wrong.
        """
        assert self.method is not None
        weight_T = torch.ones(self.tasks, dtype=torch.float64)
        gramian = gramian_TT.cpu()
        tasks = [t for t in range(self.tasks) if gramian[t, t] > 0]
        if tasks and bool(gramian.isfinite().all()):
            active = gramian[tasks][:, tasks]
            # The gradient of a mean over a large batch is tiny. No weight depends on that scale, but the constants
            # that solvers add against division by 0 would.
            active = active / active.diagonal().mean()
            with _drawing(f"c2al combine {self.seed}/{self.step}"):
                weight_T[tasks] = self.method.weights(active, tasks).to(weight_T)
        weight_T = weight_T.to(gramian_TT.device)
        if _ranks() > 1:
            dist.broadcast(weight_T, src=0)
        return weight_T.tolist()


def gramian(gradients: Sequence[Tensor]) -> Tensor:
    """(T, T) float64 inner products of gradients whose rows are spread over the ranks. Collective.

    The ranks' losses are `ranks` times their share of the global one, since gradients are averaged.
    """
    flat_TN = torch.stack([g.flatten().double() for g in gradients])
    gramian_TT = flat_TN @ flat_TN.T
    if (ranks := _ranks()) > 1:
        dist.all_reduce(gramian_TT)
        gramian_TT /= ranks**2
    return gramian_TT


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def _drawing(what: str) -> Iterator[None]:
    """Makes the draws of the block a function of `what`, and leaves the generator as it was."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little") >> 1)
    try:
        yield
    finally:
        generator.set_state(state)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_BF: Tensor, combine: Combine) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        ctx.combine = combine
        return tuple(h_BF.view_as(h_BF) for _ in range(combine.tasks))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return ctx.combine.combined(gradients), None
