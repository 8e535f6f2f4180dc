"""The serving artifact of a run, and the proof that it is the training model without auxiliary prediction heads.

The folder and its files are described in `c2al.serving.artifact`. A run is read only, also while it trains.
"""

import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from c2al.config import dump_config, redacted_config
from c2al.data.parquet import BatchReader
from c2al.distributed.checkpoint import CheckpointReader, load_unsharded
from c2al.distributed.process import World
from c2al.errors import CheckpointError, ConfigError
from c2al.files import new_folder
from c2al.serving.artifact import (
    METADATA,
    METADATA_FORMAT,
    PROOF,
    PROOF_FORMAT,
    SCHEMA,
    SCHEMA_FORMAT,
    VARIANTS,
    VERSION,
    Metadata,
    Proof,
    Schema,
    Stored,
    parse_defaults,
)
from c2al.serving.held_out import Digest, Sums
from c2al.serving.predict import Program, load_program
from c2al.serving.program import Int8Serving, Serving, save_compiled, save_program, traced
from c2al.serving.reference import TrainingModel, arguments, batches, on_cpu
from c2al.state import write_state
from c2al.training.model import AUXILIARY_PREFIX, C2ALModel
from c2al.training.run_folder import Run, open_run

TASK_PREFIX = "model."
"""Of C2ALModel's parameters in a checkpoint, which holds a TrainTask."""
INT8_NE_BOUND = 1e-3
"""Largest relative change of NE that eight-bit tables may make, unless the export says otherwise."""
AOTI_NE_BOUND = 1e-5
"""The same for the compiled program, which rounds otherwise but computes with the same numbers."""
DISTRIBUTIONS = ("c2al", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "numpy")


def export(
    run_path: Path,
    data: Sequence[str],
    output: Path,
    world: World,
    checkpoint: Path | None = None,
    variants: Sequence[str] = ("float", "int8"),
    int8_ne_bound: float = INT8_NE_BOUND,
    defaults: Sequence[str] = (),
) -> Proof:
    """Writes the artifact and returns its proof.

    `data` are held-out rows with labels. `defaults` are words COLUMN=VALUE (see `parse_defaults`).

    Raises ConfigError for options that cannot be followed, OutputError when `output` exists or cannot
    be written, BackendError for variant "aoti" without a compiler, and CheckpointError when the float
    program differs from the training model in one bit, or another variant's NE by more than its bound.
    """
    if world.size > 1:
        raise ConfigError(f"export runs as one process, not {world.size}")
    if not 0 < int8_ne_bound < 1:
        raise ConfigError(f"--int8-ne-bound: must lie between 0 and 1, is {int8_ne_bound}")
    bounds = {"float": 0.0, "int8": int8_ne_bound, "aoti": AOTI_NE_BOUND}
    wanted = {v: bounds[v] for v in VARIANTS if v in {"float", *variants}}
    run = on_cpu(open_run(run_path))
    schema = schema_of(run, defaults)
    reader = batches(run.config, run, data)
    with new_folder(output) as folder:
        path, state, training = _load(run, checkpoint, world)
        _write_programs(training, state, path, folder, wanted)
        proof = _prove(folder, training, reader, path, wanted)
        write_state(folder / SCHEMA, schema, format=SCHEMA_FORMAT, version=VERSION)
        write_state(folder / PROOF, proof, format=PROOF_FORMAT, version=VERSION)
        metadata = Metadata(
            config=dump_config(redacted_config(run.config)),
            cohorts=run.cohorts,
            versions=_versions(),
            files={file.name: Stored.of(file) for file in sorted(folder.iterdir())},
        )
        write_state(folder / METADATA, metadata, format=METADATA_FORMAT, version=VERSION)
    return proof


def schema_of(run: Run, defaults: Sequence[str] = ()) -> Schema:
    """What predicting needs to know of a run. Raises ConfigError for a default that its feature refuses."""
    data = run.config.data
    schema = Schema(
        label=data.label,
        weight=data.weight,
        row_id=data.row_id,
        batch_size=run.config.train.batch_size,
        dense=data.dense,
        sparse=data.sparse,
        statistics=run.statistics,
        defaults={},
    )
    schema.defaults.update(parse_defaults(list(defaults), schema))
    return schema


def _load(run: Run, checkpoint: Path | None, world: World) -> tuple[Path, dict[str, torch.Tensor], TrainingModel]:
    """The checkpoint, its tensors by name in C2ALModel, and the training model; a run that trains may delete it."""

    def load(path: Path) -> tuple[Path, dict[str, torch.Tensor], TrainingModel]:
        training = TrainingModel(run, path, world)
        # The objective's own state stands beside the model's.
        loaded = load_unsharded(path).items()
        return path, {n.removeprefix(TASK_PREFIX): t for n, t in loaded if n.startswith(TASK_PREFIX)}, training

    if checkpoint is not None:
        return load(checkpoint)
    loaded = CheckpointReader(run.checkpoints, world).with_newest(load, best=run.result_is_best)
    if run.result_is_best:
        print(f"exporting {loaded[0]}, the best checkpoint, since the run stops early", file=sys.stderr)
    return loaded


def _model(run: Run, state: dict[str, torch.Tensor], path: Path) -> C2ALModel:
    """The model without auxiliary prediction heads, whose tables share memory with `state`."""
    model = C2ALModel(run.config, len(run.auxiliary), serving=True).eval()
    served = {name: value for name, value in state.items() if not name.startswith(AUXILIARY_PREFIX)}
    try:
        model.load_state_dict(served, assign=True)
    except RuntimeError as e:
        raise CheckpointError(f"{path}: not a checkpoint of this model: {e}") from e
    return model


def _write_programs(
    training: TrainingModel, state: dict[str, torch.Tensor], checkpoint: Path, folder: Path, wanted: dict[str, float]
) -> None:
    run = training.run
    dense = len(run.config.data.dense)
    program = traced(Serving(run.config, _model(run, state, checkpoint)), dense)
    _check_parameters(program, state, checkpoint)
    save_program(program, folder / VARIANTS["float"])
    if "aoti" in wanted:
        save_compiled(program, folder / VARIANTS["aoti"])
    if "int8" in wanted:
        int8 = traced(Int8Serving(run.config, _model(run, state, checkpoint)), dense)
        save_program(int8, folder / VARIANTS["int8"])


def parameters_of(program: ExportedProgram) -> dict[str, int]:
    """Name and size of every parameter, as a checkpoint names them."""
    return {name.removeprefix("model."): value.numel() for name, value in sorted(program.state_dict.items())}


def _check_parameters(program: ExportedProgram, state: dict[str, torch.Tensor], checkpoint: Path) -> None:
    parameters = sorted(parameters_of(program))
    baseline = sorted(name for name in state if not name.startswith(AUXILIARY_PREFIX))
    if parameters != baseline:
        raise CheckpointError(f"{checkpoint}: the artifact's parameters {parameters} are not the baseline's {baseline}")


def _prove(
    folder: Path, training: TrainingModel, reader: BatchReader, checkpoint: Path, wanted: dict[str, float]
) -> Proof:
    """Loads every variant from its file and compares it, on every held-out row, with the training model."""
    exported = torch.export.load(folder / VARIANTS["float"])
    parameters = parameters_of(exported)
    programs: dict[str, Program] = {v: load_program(folder / VARIANTS[v], v) for v in wanted}
    sums = {variant: Sums() for variant in wanted}
    digest, rows = Digest(), 0
    with torch.no_grad():
        for batch in reader:
            real = batch.rows
            expected_N = training.predict(batch)[:real]
            label_N, weight_N = batch.label_B[:real].numpy(), batch.weight_B[:real].numpy()
            for variant, program in programs.items():
                sums[variant].update(program(*arguments(batch))[:real].numpy(), expected_N, label_N, weight_N)
            if not sums["float"].bit_equal:
                raise CheckpointError(
                    f"{checkpoint}: the artifact differs from the training model's primary prediction head by up to "
                    f"{sums['float'].max_difference:g} in rows {rows}..{rows + real} of the held-out data"
                )
            digest.update(expected_N)
            rows += real
    variants = {variant: sums[variant].compute(wanted[variant]) for variant in wanted}
    for variant, proof in variants.items():
        if not proof.within_bound:
            raise CheckpointError(
                f"{checkpoint}: variant '{variant}' changes NE on the held-out rows by {proof.ne_change:+.2e} of it, "
                f"more than its bound {proof.ne_bound:g}"
            )
    return Proof(
        checkpoint=checkpoint.name,
        rows_compared=rows,
        predictions_sha256=digest.hexdigest(),
        ne=sums["float"].ne(sums["float"].reference_loss),
        parameters=tuple(parameters),
        parameter_count=sum(parameters.values()),
        variants=variants,
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
