"""The toy model and its training written again in plain torch on one process: what every plan must equal.

No torchrec, no fbgemm, no c2al: embedding_bag on whole tables, autograd, row-wise Adagrad from its
formula m += mean(g^2), w -= lr * g / (sqrt(m) + eps), one m for each column range of a table, Adam by torch.
"""

import rich_toy
import torch
from torch.nn import functional as F
from toy import GLOBAL_BATCH, ROWS, batch

Tables = dict[str, torch.Tensor]
Moments = dict[str, dict[tuple[int, int], torch.Tensor]]
"""Table -> column range -> moment of every row."""


class Oracle:
    def __init__(
        self, tables: Tables, over: dict[str, torch.Tensor], columns: dict[str, int], sparse_lr=0.1, dense_lr=0.01
    ):
        """`over`: the dense parameters by name; `columns`: column blocks of each table (1: not split)."""
        self.tables = {name: t.clone().requires_grad_() for name, t in tables.items()}
        self.over = {name: p.clone().requires_grad_() for name, p in over.items()}
        self.moments: Moments = {}
        for name, table in tables.items():
            width = table.shape[1] // columns.get(name, 1)
            self.moments[name] = {(c, c + width): torch.zeros(len(table)) for c in range(0, table.shape[1], width)}
        self.sparse_lr = sparse_lr
        self.adam = torch.optim.AdamW(self.over.values(), lr=dense_lr, weight_decay=0.0)

    def pooled(self, number: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """(dense_BF, the pooled rows of each feature, label_B) of a global batch."""
        dense_BF, sparse, label_B = batch(number, 0, 1)
        pooled = []
        for name in ROWS:
            jagged = sparse[name]
            mode = "mean" if name == "tags" else "sum"
            pooled.append(F.embedding_bag(jagged.values(), self.tables[name], jagged.offsets()[:-1], mode=mode))
        return dense_BF, pooled, label_B

    def step(self, number: int) -> float:
        dense_BF, pooled, label_B = self.pooled(number)
        hidden = torch.cat([dense_BF, *pooled], dim=1) @ self.over["over.0.weight"].T + self.over["over.0.bias"]
        logit_B = (torch.tanh(hidden) @ self.over["over.2.weight"].T + self.over["over.2.bias"]).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logit_B, label_B, reduction="sum") / GLOBAL_BATCH
        self.adam.zero_grad()
        grads = torch.autograd.grad(loss, [*self.tables.values(), *self.over.values()])
        for p, g in zip(self.over.values(), grads[len(self.tables) :], strict=True):
            p.grad = g
        self.adam.step()
        with torch.no_grad():
            for (name, table), g in zip(self.tables.items(), grads, strict=False):
                for (first, last), m in self.moments[name].items():
                    part = g[:, first:last]
                    m += part.square().mean(dim=1)
                    table[:, first:last] -= self.sparse_lr * part / (m.sqrt() + 1e-8)[:, None]
        return float(loss.detach())


class RichOracle(Oracle):
    """The same of the rich toy: a row of a shared table gets the sum of the gradients of all its features."""

    def pooled(self, number: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        dense_BF, (sparse, weighted), label_B = rich_toy.batch(number, 0, 1)
        pooled = []
        for table, features in rich_toy.FEATURES.items():
            for name in features:
                bags = weighted[name] if table in rich_toy.WEIGHTED else sparse[name]
                rows = self.tables[table][bags.values()]
                if table in rich_toy.WEIGHTED:
                    rows = rows * bags.weights()[:, None]
                bag = torch.repeat_interleave(torch.arange(GLOBAL_BATCH), bags.lengths().long())
                sums = torch.zeros(GLOBAL_BATCH, rows.shape[1]).index_add(0, bag, rows)
                pooled.append(sums / bags.lengths().clamp(min=1)[:, None] if table == "tags" else sums)
        return dense_BF, pooled, label_B


ORACLES = {"toy": Oracle, "rich": RichOracle}
