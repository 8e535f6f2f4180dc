"""The serving artifact, without auxiliary heads, and the proof that it is the model.

Writes a folder:
    model.pt2        torch.export program (dense_BF, values, lengths) -> prediction_B, any batch size
    config.toml      what the features mean and how they are encoded
    statistics.json  training statistics and vocabularies of that encoding
    proof.json       rows compared with the training model, and the artifact's parameters
"""

import io
import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from c2al.config import Config, save_config
from c2al.data.batch import Batch
from c2al.data.parquet import BatchReader
from c2al.distributed.checkpoint import CheckpointReader, load_unsharded
from c2al.distributed.process import World
from c2al.errors import CheckpointError, ConfigError
from c2al.files import output_errors, write_atomically
from c2al.training.model import AUXILIARY_PREFIX, C2ALModel, primary_prediction
from c2al.training.run_folder import open_run

TASK_PREFIX = "model."
"""Of C2ALModel's parameters in a checkpoint, which holds a TrainTask."""


class Serving(nn.Module):
    """(dense_BF, values, lengths) -> prediction_B.

    `values` are the ids of all sparse features, feature by feature in config order, and `lengths`
    (features * B) how many of them each row has, as in a KeyedJaggedTensor.
    """

    def __init__(self, model: C2ALModel):
        super().__init__()
        self.model = model
        self.keys = model.over.keys

    def forward(self, dense_BF: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        logit_BT = self.model(dense_BF, KeyedJaggedTensor(keys=self.keys, values=values, lengths=lengths))
        return primary_prediction(logit_BT)


def export(
    run_path: Path, data: Sequence[str], output: Path, world: World, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Writes the artifact and returns its proof.

    Raises ConfigError when `output` exists or the world has more than one rank, CheckpointError
    when the artifact is not the training model's primary head bit for bit.
    """
    if world.size > 1:
        raise ConfigError(f"export runs as one process, not {world.size}")
    if output.exists():
        raise ConfigError(f"{output}: exists; give another --output")
    run = open_run(run_path)
    newest = CheckpointReader(run.checkpoints, world).with_newest
    path, loaded = (checkpoint, load_unsharded(checkpoint)) if checkpoint else newest(lambda p: (p, load_unsharded(p)))
    # The objective's own state stands beside the model's.
    state = {n.removeprefix(TASK_PREFIX): v for n, v in loaded.items() if n.startswith(TASK_PREFIX)}
    training = _load(run.config, len(run.auxiliary), state, path)
    served = {name: value for name, value in state.items() if not name.startswith(AUXILIARY_PREFIX)}
    serving = Serving(_load(run.config, len(run.auxiliary), served, path, serving=True)).eval()

    reader = BatchReader(
        data,
        run.config.data,
        run.statistics,
        batch_size=run.config.train.batch_size,
        rank=0,
        world_size=1,
        seed=run.config.seed,
        shuffle=False,
        shards=1,
    )
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with output_errors(output):
        partial.mkdir(parents=True)
    try:
        batches = iter(reader)
        first = next(batches)
        rows = Dim("rows", min=1)
        program = torch.export.export(
            serving,
            _arguments(first),
            dynamic_shapes=({0: rows}, {0: Dim("ids")}, {0: len(serving.keys) * rows}),
        )
        artifact = io.BytesIO()  # writing to a disk that is full, torch would abort the process
        torch.export.save(program, artifact)
        write_atomically(partial / "model.pt2", artifact.getvalue())
        proof = _prove(partial / "model.pt2", training, itertools.chain([first], batches), path)
        write_atomically(partial / "proof.json", json.dumps(proof, indent=2) + "\n")
        write_atomically(partial / "statistics.json", run.statistics.to_json())
        save_config(run.config, partial / "config.toml")
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return proof


def _load(config: Config, cohorts: int, state: dict[str, Tensor], path: Path, *, serving: bool = False) -> C2ALModel:
    model = C2ALModel(config, cohorts, table_device="cpu", serving=serving).eval()
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise CheckpointError(f"{path}: not a checkpoint of this model: {e}") from e
    return model


def _arguments(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.dense_BF, batch.sparse.values(), batch.sparse.lengths()


def _prove(artifact: Path, training: C2ALModel, batches: Iterable[Batch], checkpoint: Path) -> dict[str, Any]:
    """Reloads the artifact and compares it, on every held-out row, with the training model."""
    program = torch.export.load(artifact)
    module, rows = program.module(), 0
    with torch.no_grad():
        for batch in batches:
            expected_B = primary_prediction(training(batch.dense_BF, batch.sparse))
            served_B = module(*_arguments(batch))
            if not torch.equal(expected_B, served_B):
                worst = (expected_B - served_B).abs().max().item()
                raise CheckpointError(
                    f"{checkpoint}: the artifact differs from the training model's primary head by up to {worst:g} "
                    f"in rows {rows}..{rows + len(served_B)} of the held-out data"
                )
            rows += len(served_B)
    parameters = sorted(name.removeprefix("model.") for name in program.state_dict)
    baseline = sorted(name for name, _ in training.named_parameters() if not name.startswith(AUXILIARY_PREFIX))
    if parameters != baseline:
        raise CheckpointError(f"{checkpoint}: the artifact's parameters {parameters} are not the baseline's {baseline}")
    return {"checkpoint": checkpoint.name, "rows_compared": rows, "parameters": parameters}
