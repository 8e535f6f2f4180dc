"""Is an artifact still the training model, and what does it cost beside a baseline's?

Needs torch, pyarrow and numpy only.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.flop_counter import FlopCounterMode

from c2al.data.rows import model_inputs
from c2al.data.source import File, open_dataset
from c2al.data.values import labels, weights
from c2al.errors import CheckpointError, ConfigError, DataError
from c2al.serving.artifact import VARIANTS, Schema, VariantProof
from c2al.serving.held_out import Digest, Sums
from c2al.serving.predict import Predictor
from c2al.text import csv_text, table

BATCHES = (1, 64, 1024)
WARM_UP = 10
"""Calls before the clock runs: torch allocates and chooses kernels in the first ones."""

Floats = npt.NDArray[np.float32]
Title = tuple[str, ...]


def check(
    artifact: Path,
    data: Sequence[str],
    expected_N: Floats | None = None,
    baseline: Path | None = None,
    rounds: int = 200,
) -> tuple[list[Title], list[Title]]:
    """Compares every variant on held-out rows, then times the artifact, and the baseline's beside it.

    `expected_N` are the training model's predictions of `data`. Without them, the float variant must
    give the predictions whose checksum is in the proof, and stands for the training model.
    `rounds` calls of each artifact are timed per batch size, in turn, so that whatever else the machine
    does meets both.

    Returns two tables with a title row each: variants, and costs.
    Raises CheckpointError naming the variant that is out of its bound, DataError for rows that are not
    those of the proof, ConfigError for options that do not fit.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds: must be at least 1, is {rounds}")
    files = open_dataset(data)
    variants = _variants(artifact, files, expected_N, ", ".join(data))
    models = {"artifact": Predictor(artifact)}
    if baseline is not None:
        models["baseline"] = Predictor(baseline)
    costs = _costs(models, files, rounds)
    return variants, costs


def text_of(tables: Sequence[list[Title]]) -> str:
    """Both tables for a terminal."""
    return "\n\n".join(table(rows) for rows in tables)


def csv_of(tables: Sequence[list[Title]]) -> str:
    """Both tables as CSV, with an empty line between them."""
    return "\n".join(csv_text(rows) for rows in tables)


def _variants(artifact: Path, files: Sequence[File], expected_N: Floats | None, data: str) -> list[Title]:
    first = Predictor(artifact)
    label_N, weight_N = _targets(first.schema, files)
    served_N = predictions(first, files)
    if expected_N is None:
        proof, digest = first.artifact.proof, Digest()
        digest.update(served_N)
        if len(served_N) != proof.rows_compared or digest.hexdigest() != proof.predictions_sha256:
            raise DataError(
                f"{data}: the float variant's predictions of these {len(served_N):,} rows are not those of the "
                f"{proof.rows_compared:,} rows of the proof: other rows, or a processor that rounds otherwise; "
                "compare with the training model itself by --run"
            )
        expected_N = served_N
    rows: list[Title] = [("variant", "rows", "bit-equal", "max difference", "NE", "NE change", "bound")]
    wrong = []
    for variant in first.artifact.variants:
        predictor = first if variant == "float" else Predictor(artifact, variant)
        sums = Sums()
        sums.update(served_N if variant == "float" else predictions(predictor, files), expected_N, label_N, weight_N)
        found = sums.compute(first.artifact.proof.variants[variant].ne_bound)
        if not found.within_bound or (variant == "float" and not found.bit_equal):
            wrong.append(
                f"{artifact / VARIANTS[variant]}: differs from the training model by up to {found.max_difference:g} "
                f"and its NE by {found.ne_change:+.2e}, more than the bound {found.ne_bound:g}"
            )
        rows.append(_line(variant, len(served_N), found))
    if wrong:
        raise CheckpointError("\n".join(wrong))
    return rows


def _line(variant: str, rows: int, found: VariantProof) -> Title:
    ne = "one class only" if found.ne is None else f"{found.ne:.6f}"
    equal = "yes" if found.bit_equal else "no"
    change, bound = f"{found.ne_change:+.2e}", f"{found.ne_bound:g}"
    return variant, f"{rows:,}", equal, f"{found.max_difference:.2e}", ne, change, bound


def predictions(predictor: Predictor, files: Sequence[File]) -> Floats:
    """Of all rows of the files, in the steps of `c2al score`."""
    for file in files:
        predictor.check(file.name, file.schema)
    size = predictor.schema.batch_size
    return np.concatenate([predictor.run(rows, size) for rows, _ in predictor.steps(files, size)])


def _targets(schema: Schema, files: Sequence[File]) -> tuple[Floats, Floats]:
    """Label and weight of every row. Raises DataError naming a file without labels."""
    label_N, weight_N = [], []
    for file in files:
        for column in filter(None, (schema.label, schema.weight)):
            if file.schema.names.count(column) != 1:
                raise DataError(f"{file.name}: column '{column}' must be there once, to compare NE on these rows")
        for group, rows in enumerate(file.row_group_rows):
            columns = file.read(group, [c for c in (schema.label, schema.weight) if c])
            label_N.append(labels(columns[schema.label], schema.label, file.where(group)))
            weight_N.append(
                weights(columns[schema.weight], schema.weight, file.where(group))
                if schema.weight
                else np.ones(rows, np.float32)
            )
    return np.concatenate(label_N), np.concatenate(weight_N)


def _costs(models: dict[str, Predictor], files: Sequence[File], rounds: int) -> list[Title]:
    names = list(models)
    rows: list[Title] = [("cost", *names, *(["ratio"] if "baseline" in models else []))]
    rows.append(_compared("parameters", [p.artifact.proof.parameter_count for p in models.values()], "{:,.0f}"))
    flops = {name: _flops(p, files) for name, p in models.items()}
    rows.append(_compared("FLOPs per row", [flops[name] for name in names], "{:,.0f}"))
    for batch in BATCHES:
        tables = {name: _sample(p, files, batch) for name, p in models.items()}
        encoded = {name: model_inputs([p.encode(tables[name])], p.schema.data, batch) for name, p in models.items()}
        inputs = {name: tuple(torch.from_numpy(a) for a in arrays) for name, arrays in encoded.items()}
        with torch.no_grad():
            program = {n: functools.partial(p.program, *inputs[n]) for n, p in models.items()}
            whole = {n: functools.partial(p.predict, tables[n]) for n, p in models.items()}
            timed: tuple[tuple[str, Mapping[str, Callable[[], object]]], ...]
            timed = (("program", program), ("raw rows", whole))
            for what, calls in timed:
                seconds = _interleaved(calls, rounds)
                for percentile in (50, 99):
                    ms = [float(np.percentile(seconds[n], percentile)) * 1e3 for n in names]
                    rows.append(_compared(f"{what}, batch {batch:,}, p{percentile} ms", ms, "{:.3f}"))
    return rows


def _compared(what: str, values: Sequence[float], shown: str) -> Title:
    ratio = [f"{values[0] / values[1]:.3f}"] if len(values) == 2 else []
    return (what, *(shown.format(v) for v in values), *ratio)


def _sample(predictor: Predictor, files: Sequence[File], rows: int) -> pa.Table:
    """The first `rows` raw rows, again and again where there are fewer."""
    parts, held = [], 0
    for file in files:
        columns = [c for c in predictor.columns if c in file.schema.names]
        for group, count in enumerate(file.row_group_rows):
            if count and held < rows:
                parts.append(file.read(group, columns))
                held += count
    sample = pa.concat_tables(parts)
    return pa.concat_tables([sample] * -(-rows // held)).slice(0, rows).combine_chunks()


def _flops(predictor: Predictor, files: Sequence[File]) -> float:
    """Of the matrix products, per row."""
    batch = BATCHES[-1]
    arrays = model_inputs([predictor.encode(_sample(predictor, files, batch))], predictor.schema.data, batch)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        predictor.program(*(torch.from_numpy(a) for a in arrays))
    return counter.get_total_flops() / batch


def _interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn, and in the other order every other time."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARM_UP + rounds):
        for name, call in list(calls.items())[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            call()
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds
