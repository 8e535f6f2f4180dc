"""What the report reads of an experiment's folder, and nothing else.

::

    config.toml  command.txt  versions.json
    cohorts/cohorts.json               see c2al.data.cohorts and c2al.discovery
    evaluation/evaluation.json         see c2al.evaluation.result
    seed_<s>/baseline/run/metrics.jsonl    a record a line: {"step": ..., "kind": "train" | "validation" | "y", ...}
    seed_<s>/baseline/scores_test/         see c2al.jobs.score; the first seed's are read
    seed_<s>/c2al/...                      the same
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from c2al.bins import BINS, LIMIT
from c2al.config import Config, load_config
from c2al.errors import DataError
from c2al.evaluation import bootstrap
from c2al.evaluation.result import Evaluation, read_evaluation
from c2al.evaluation.scores import blocks, open_scores
from c2al.evaluation.segments import Segments

Float = NDArray[np.float64]
Line = tuple[Float, Float]
"""(steps, values)."""

ARMS = {"baseline": "baseline", "C2AL": "c2al"}
"""Name in the report -> folder."""
_COARSE = 16
"""Fine logit bins of c2al.bins in one bin of a density."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment's folder, read."""

    path: Path
    config: Config
    command: str
    versions: dict[str, str]
    cohorts: dict[str, Any]
    """cohorts.json as it stands."""
    evaluation: Evaluation
    records: dict[str, tuple[tuple[dict[str, Any], ...], ...]]
    """Name of the arm -> seed -> records of metrics.jsonl."""

    def lines(self, arm: str, kind: str, *keys: str) -> list[Line]:
        """One line a seed of the number under `keys` in the records of a kind; undefined ones are left out."""
        found = []
        for records in self.records[arm]:
            points = [(r["step"], _get(r, keys)) for r in records if r["kind"] == kind]
            defined = np.array([p for p in points if p[1] is not None], dtype=np.float64).reshape(-1, 2)
            if len(defined):
                found.append((defined[:, 0], defined[:, 1]))
        return found

    def y(self, arm: str) -> dict[str, dict[str, Any]]:
        """Layer -> last summary of Y in the first seed's run; empty without FM attention."""
        last = [r for r in self.records[arm][0] if r["kind"] == "y"][-1:]
        return {k: v for r in last for k, v in r.items() if k not in ("step", "kind")}

    def densities(self) -> tuple[Float, dict[str, dict[str, Float]]]:
        """(bin edges in logit, arm -> "head" and "tail" -> density) of the first seed's test predictions."""
        config, seed = self.config, self.config.experiment.seeds[0]
        folders = [self.path / f"seed_{seed}" / folder / "scores_test" for folder in ARMS.values()]
        runs = [open_scores(str(folder), config.data) for folder in folders]
        segments = Segments(self.path / "cohorts" / "cohorts.json", (), runs[0])
        rows_G2 = np.zeros((3, 2), dtype=np.int64)
        histogram_GJ2K = np.zeros((3, len(runs), 2, BINS))
        for block in blocks(runs, segments.columns, segments.of):
            # Columns 1 and 2 are head and tail, segments 1 and 2.
            pair_N2 = np.ascontiguousarray(block.segment_NA[:, 1:3])
            bootstrap.count(pair_N2, block.label_N, block.weight_N, block.bin_NJ, rows_G2, histogram_GJ2K)
        mass_GJK = histogram_GJ2K.sum(axis=2).reshape(3, len(runs), -1, _COARSE).sum(axis=-1)[1:]
        edges = np.linspace(-LIMIT, LIMIT, mass_GJK.shape[-1] + 1)
        share_GJK = mass_GJK / np.maximum(mass_GJK.sum(axis=-1, keepdims=True), 1e-300)
        drawn = np.flatnonzero((share_GJK > 1e-4).any(axis=(0, 1)))
        low, high = (drawn[0], drawn[-1] + 1) if len(drawn) else (0, len(edges) - 1)
        density_GJK = share_GJK[..., low:high] / np.diff(edges[low : high + 1])
        return edges[low : high + 1], {
            arm: {"head": density_GJK[0, j], "tail": density_GJK[1, j]} for j, arm in enumerate(ARMS)
        }


def read_experiment(path: Path) -> Experiment:
    """Reads a finished experiment's folder. Raises DataError naming a file that is missing or not readable."""
    config = load_config(path / "config.toml")
    return Experiment(
        path=path,
        config=config,
        command=_text(path / "command.txt").strip(),
        versions=_json(path / "versions.json", _text(path / "versions.json")),
        cohorts=_json(path / "cohorts" / "cohorts.json", _text(path / "cohorts" / "cohorts.json")),
        evaluation=read_evaluation(path / "evaluation" / "evaluation.json"),
        records={
            arm: tuple(_records(path / f"seed_{s}" / folder / "run" / "metrics.jsonl") for s in config.experiment.seeds)
            for arm, folder in ARMS.items()
        },
    )


def _records(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple(_json(path, line) for line in _text(path).splitlines())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not readable: {e}") from e


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"{path}: not JSON: {e}") from e


def _get(record: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
