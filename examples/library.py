"""c2al from Python: a model in plain torch, then a training run and its scores.

    python examples/library.py FOLDER

1. A C2AL model on tensors made by hand, one step of Eq. 4, the primary prediction.
2. What `c2al synth`, `c2al train` and `c2al score` do, by the functions that they call.
"""

import sys
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from c2al.config import load_config, parse_config, replace
from c2al.data.synthetic import SynthConfig, synthesise
from c2al.distributed.process import process_group
from c2al.model import C2ALModel, primary_prediction
from c2al.nn.objective import objective, targets
from c2al.training.score import score
from c2al.training.trainer import train


def one_step() -> torch.Tensor:
    """Three impressions, one step; returns the primary predictions after it, (3,)."""
    config = parse_config(
        {
            "data": {
                "dense": [{"column": "age"}],
                "sparse": [{"column": "item", "num_embeddings": 10}, {"column": "surface", "num_embeddings": 4}],
            },
            "model": {"embedding_dim": 8},
        }
    )
    model = C2ALModel(config, cohorts=2, table_device="cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    dense_BF = torch.tensor([[0.1], [-0.4], [1.2]])
    # Row 0 has item 3 and surface 0, and so on: all items first, then all surfaces, one value each.
    sparse = KeyedJaggedTensor(
        keys=["item", "surface"],
        values=torch.tensor([3, 7, 3, 0, 1, 1]),
        lengths=torch.ones(6, dtype=torch.int32),
    )
    label_B = torch.tensor([1.0, 0.0, 1.0])
    member_BC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # in the head cohort, in the tail cohort

    logit_BT = model(dense_BF, sparse)
    target_BT = targets(label_B, member_BC)
    loss = objective(logit_BT, target_BT, torch.ones(3), lambda_C=(0.3, 0.3), rows=3)
    loss.total.backward()
    optimizer.step()
    return primary_prediction(model(dense_BF, sparse).detach())


def train_and_score(folder: Path) -> Path:
    """A baseline on synthetic impressions; returns the folder of its scores."""
    data = folder / "data"
    synthesise(SynthConfig(rows=20_000), data)
    config = load_config(str(files("c2al.configs") / "conflict.toml"))
    splits = {f"data.{split}": [str(data / split)] for split in ("train", "validation", "test")}
    config = replace(config, **splits, **{"train.max_steps": 1})
    with process_group(config.dist) as world:
        train(config, folder / "run", world)
        score(folder / "run", config.data.test, folder / "scores", world)
    return folder / "scores"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/library.py FOLDER")
    print("after one step:", one_step().tolist())
    scores = train_and_score(Path(sys.argv[1]))
    print(f"{pq.read_table(scores).num_rows:,} rows scored into {scores}")
