"""Does Eq. 4 want a fused op of its own?

    python benchmarks/objective.py [--threads 2]

Forward and backward of c2al.nn.objective against a hand-written autograd function that computes the
losses and the gradient of the logits in one pass (what a fused kernel would save in torch calls),
beside one training step of a small DHEN at the same batch: the share is what fusion could win.
Every round times all three; rows are medians.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from c2al.config import ModelConfig
from c2al.nn.dhen import DHEN
from c2al.nn.objective import objective, targets
from c2al.nn.prediction_heads import Heads

FIELDS = 20
LAMBDAS = (0.1, 0.1)


class OnePass(torch.autograd.Function):
    """Eq. 4 whose forward pass already holds the gradient: weight (sigmoid - target) lambda / rows."""

    @staticmethod
    def forward(ctx, logit_BT, label_B, weight_B, member_BC, lambda_T, rows):
        target_BT = torch.empty_like(logit_BT)
        target_BT[:, 0] = label_B
        torch.mul(member_BC, label_B[:, None], out=target_BT[:, 1:])
        scale_BT = weight_B[:, None] * (lambda_T / rows)
        ctx.save_for_backward((torch.sigmoid(logit_BT) - target_BT).mul_(scale_BT))
        bce_BT = nn.functional.softplus(logit_BT) - logit_BT * target_BT
        return bce_BT.mul_(scale_BT).sum()

    @staticmethod
    def backward(ctx, grad):
        (gradient_BT,) = ctx.saved_tensors
        return gradient_BT * grad, None, None, None, None, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = ModelConfig()
    dhen = DHEN(config, FIELDS)
    heads = Heads(FIELDS * config.embedding_dim, config.head_hidden, len(LAMBDAS))
    lambda_T = torch.tensor([1.0, *LAMBDAS])
    print(f"torch {torch.__version__}, {arguments.threads} threads; microseconds, forward + backward")
    print(f"{'batch':>6} {'plain':>8} {'one pass':>9} {'model step':>11} {'could win':>10}")
    for batch in (1024, 4096, 16384):
        label_B, member_BC = torch.randint(2, (batch,)).float(), torch.randint(2, (batch, 2)).float()
        rest = (label_B, torch.ones(batch), member_BC)
        logit_BT = torch.randn(batch, 3, requires_grad=True)
        x_BMD = torch.randn(batch, FIELDS, config.embedding_dim)

        def plain(logit_BT: Tensor, rest: tuple[Tensor, ...] = rest) -> Tensor:
            label_B, weight_B, member_BC = rest
            target_BT = targets(label_B, member_BC)
            return objective(logit_BT, target_BT, weight_B, lambda_C=LAMBDAS, rows=len(logit_BT)).total

        def one_pass(logit_BT: Tensor, rest: tuple[Tensor, ...] = rest) -> Tensor:
            return OnePass.apply(logit_BT, *rest, lambda_T, float(len(logit_BT)))

        def step(_: Tensor, x_BMD: Tensor = x_BMD, plain=plain) -> Tensor:
            return plain(heads([dhen(x_BMD).flatten(1)] * (1 + len(LAMBDAS))))

        torch.testing.assert_close(plain(logit_BT), one_pass(logit_BT))
        seconds: dict[str, list[float]] = {"plain": [], "one_pass": [], "step": []}
        for turn in range(arguments.rounds + 3):
            for name, function in (("plain", plain), ("one_pass", one_pass), ("step", step)):
                start = time.perf_counter()
                function(logit_BT).backward()
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - start)
        p, o, s = (statistics.median(v) * 1e6 for v in seconds.values())
        print(f"{batch:>6} {p:>8.0f} {o:>9.0f} {s:>11.0f} {(p - o) / s:>10.1%}")


if __name__ == "__main__":
    main()
