"""The model of c2al in plain PyTorch: one process, one merged embedding table. Imports torch and c2al.nn alone.

Letters: B batch, F dense features, N sparse features, M fields, D embedding dim, R rows of all tables,
V values of the batch, T tasks.
"""

import torch
from torch import Tensor, nn

from c2al.config import Config, ModelConfig
from c2al.nn.dense import DenseArch
from c2al.nn.dhen import DHEN
from c2al.nn.encoders import encoder_of
from c2al.nn.objective import objective, targets
from c2al.nn.prediction_heads import Heads


class Over(nn.Module):
    """Everything above the tables, the function of c2al.training.model.OverArch."""

    def __init__(self, model: ModelConfig, dense: int, sparse: int, auxiliary: bool, bfloat16: bool) -> None:
        super().__init__()
        dim, self.bfloat16 = model.embedding_dim, bfloat16
        self.dense_arch = DenseArch(dense, list(model.dense_hidden), model.dense_tokens, dim) if dense else None
        self.dhen = DHEN(model, sparse + (model.dense_tokens if dense else 0))
        self.encoder = encoder_of(model, self.dhen.out_fields * dim)
        self.heads = Heads(self.encoder.out_features, model.head_hidden, 2 if auxiliary else 0, model.auxiliary_hidden)
        self.encoder.add_auxiliary(2 if auxiliary else 0)

    def forward(self, dense_BF: Tensor, pooled_BND: Tensor) -> Tensor:
        with torch.autocast(dense_BF.device.type, torch.bfloat16, enabled=self.bfloat16):
            x_BMD = pooled_BND
            if self.dense_arch is not None:
                tokens = self.dense_arch(dense_BF)
                x_BMD = torch.cat([tokens, pooled_BND.to(tokens.dtype)], dim=1)
            logit_BT: Tensor = self.heads(self.encoder(self.dhen(x_BMD).flatten(1)))
        return logit_BT.float()


class MergedTable:
    """All tables one under the other, trained by row-wise Adagrad: m += mean(g^2), w -= lr g / (sqrt(m) + eps).

    The gradients of a batch meet in a buffer of the table's size, so that an update needs no sorting
    and never waits for the device; a row that a batch names twice is written twice with the same values.
    """

    def __init__(self, rows: tuple[int, ...], dim: int, lr: float, eps: float, device: str = "cpu") -> None:
        starts = [0]
        for n in rows:
            starts.append(starts[-1] + n)
        self.start_N = torch.tensor(starts[:-1], device=device)
        self.weight_RD = torch.empty(starts[-1], dim, device=device)
        self.moment_R = torch.empty(starts[-1], device=device)
        self._sum_RD = torch.zeros_like(self.weight_RD)
        self.lr, self.eps = lr, eps
        self.reset()

    def reset(self) -> None:
        """Fresh weights, the same every time."""
        generator = torch.Generator(self.weight_RD.device).manual_seed(0)
        self.weight_RD.uniform_(-0.05, 0.05, generator=generator)
        self.moment_R.zero_()

    @torch.no_grad()
    def lookup(self, row_V: Tensor, bag_V: Tensor | None, batch: int) -> Tensor:
        """Pooled rows (B, N, D), a leaf that gathers the gradient. bag_V: feature * B + sample of every value;
        None: every feature has one value, and row_V lies feature by feature."""
        values_VD = self.weight_RD[row_V]
        features, dim = len(self.start_N), values_VD.shape[1]
        if bag_V is not None:
            values_VD = values_VD.new_zeros(features * batch, dim).index_add_(0, bag_V, values_VD)
        return values_VD.view(features, batch, dim).transpose(0, 1).contiguous().requires_grad_()

    @torch.no_grad()
    def update(self, row_V: Tensor, bag_V: Tensor | None, grad_BND: Tensor) -> None:
        grad_VD = grad_BND.transpose(0, 1).reshape(-1, grad_BND.shape[2])
        if bag_V is not None:
            grad_VD = grad_VD[bag_V]
        self._sum_RD.index_add_(0, row_V, grad_VD)
        grad_VD = self._sum_RD[row_V]
        moment_V = self.moment_R[row_V] + grad_VD.square().mean(1)
        self.moment_R[row_V] = moment_V
        self.weight_RD[row_V] = self.weight_RD[row_V] - self.lr * grad_VD / (moment_V.sqrt() + self.eps)[:, None]
        self._sum_RD.index_fill_(0, row_V, 0.0)  # an assignment would copy the 0 from the host, and wait


class Columns:
    """What a step reads, as plain tensors: dense_BF, label_B, weight_B, member_B2, row_V, bag_V."""

    def __init__(self, **tensors: Tensor | None) -> None:
        self.__dict__.update(tensors)

    @classmethod
    def random(cls, dense: int, table: MergedTable, rows: tuple[int, ...], batch: int, device: str) -> "Columns":
        """One value of every feature, uniform over its table."""
        ids = [torch.randint(n, (batch,), device=device) for n in rows]
        return cls(
            dense_BF=torch.randn(batch, dense, device=device),
            label_B=torch.randint(2, (batch,), device=device).float(),
            weight_B=torch.ones(batch, device=device),
            member_B2=torch.randint(2, (batch, 2), device=device).float(),
            row_V=(torch.stack(ids) + table.start_N[:, None]).flatten(),
            bag_V=None,
        )


class PlainStep:
    """One training step: lookup, forward, Eq. 4, backward, table update, fused Adam."""

    def __init__(
        self, config: Config, table: MergedTable, auxiliary: bool, bfloat16: bool, compiled: str | None
    ) -> None:
        """`compiled`: a mode of torch.compile, or None."""
        data, optimizer, device = config.data, config.train.optimizer, table.weight_RD.device
        self.table = table
        self.over = Over(config.model, len(data.dense), len(data.sparse), auxiliary, bfloat16).to(device)
        kind = torch.optim.AdamW if optimizer.dense == "adamw" else torch.optim.Adam
        self.optimizer = kind(
            self.over.parameters(),
            lr=optimizer.dense_lr,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.scales = (0.1, 0.1) if auxiliary else (0.0, 0.0)
        self.lambda_T = torch.tensor([1.0, *self.scales], device=device)[: 3 if auxiliary else 1]
        self.loss = self._loss
        if compiled:
            self.loss = torch.compile(self._loss, fullgraph=True, dynamic=False, mode=compiled)

    def _loss(self, dense_BF: Tensor, pooled_BND: Tensor, label_B: Tensor, weight_B: Tensor, member_B2: Tensor):
        logit_BT = self.over(dense_BF, pooled_BND)
        member_BT = nn.functional.pad(member_B2, (1, 0), value=1.0)[:, : logit_BT.shape[1]]
        bce_BT = nn.functional.binary_cross_entropy_with_logits(
            logit_BT, label_B[:, None] * member_BT, weight_B[:, None], reduction="none"
        )
        return bce_BT.sum(0) @ self.lambda_T / len(label_B)

    def __call__(self, c: Columns) -> Tensor:
        pooled_BND = self.table.lookup(c.row_V, c.bag_V, len(c.label_B))
        loss = self.loss(c.dense_BF, pooled_BND, c.label_B, c.weight_B, c.member_B2)
        loss.backward()
        self.table.update(c.row_V, c.bag_V, pooled_BND.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def reference_loss(self, c: Columns) -> Tensor:
        """The same loss by c2al.nn.objective, which copies its lambdas to the device at every call."""
        pooled_BND = self.table.lookup(c.row_V, c.bag_V, len(c.label_B))
        logit_BT = self.over(c.dense_BF, pooled_BND)
        head, tail = self.scales
        cohorts = logit_BT.shape[1] - 1  # none in a baseline
        target_BT = targets(c.label_B, c.member_B2[:, :cohorts])
        return objective(logit_BT, target_BT, c.weight_B, lambda_C=(head, tail)[:cohorts], rows=len(c.label_B)).total
