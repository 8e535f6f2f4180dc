"""What the report reads of an experiment's folder, and nothing else.

::

    config.toml  command.txt  versions.json
    experiment.json                          see c2al.report.record
    cohorts-<digest>/cohorts.json            see c2al.data.cohorts and c2al.discovery
    evaluation/evaluation.json               see c2al.evaluation.result
    trainings/<trial>/seed_<s>/run/metrics.jsonl    of the baseline and of the main arm
    trainings/<trial>/seed_<s>/scores_test-*/       the first seed's of both, for the densities
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
from c2al.report.record import ArmRecord, Record, read_record

Float = NDArray[np.float64]
Line = tuple[Float, Float]
"""(steps, values)."""
Entry = dict[str, Any]
"""One record of metrics.jsonl."""

_COARSE = 16
"""Fine logit bins of c2al.bins in one bin of a density."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment's folder, read."""

    path: Path
    config: Config
    command: str
    versions: dict[str, str]
    record: Record
    cohorts: dict[str, Any] | None
    """cohorts.json as it stands; None when discovery came to nothing or no arm needed it."""
    evaluation: Evaluation
    records: dict[str, tuple[tuple[Entry, ...], ...]]
    """Baseline and main arm -> seed -> records of metrics.jsonl."""

    @property
    def main(self) -> ArmRecord | None:
        return self.record.main

    @property
    def drawn(self) -> tuple[ArmRecord, ...]:
        """The arms whose models are looked at closely: the baseline and the main arm."""
        return (self.record.baseline, *([self.main] if self.main else []))

    def lines(self, arm: str, kind: str, *keys: str) -> list[Line]:
        """One line a seed of the number under `keys` in the records of a kind; undefined ones are left out."""
        found = []
        for records in self.records[arm]:
            points = [(r["step"], _get(r, keys)) for r in records if r["kind"] == kind]
            defined = np.array([p for p in points if p[1] is not None], dtype=np.float64).reshape(-1, 2)
            if len(defined):
                found.append((defined[:, 0], defined[:, 1]))
        return found

    def last(self, arm: str, kind: str) -> Entry:
        """The last record of a kind in the first seed's run, without its step; empty where there is none."""
        last = [r for r in self.records[arm][0] if r["kind"] == kind][-1:]
        return {k: v for r in last for k, v in r.items() if k not in ("step", "kind")}

    @property
    def pair(self) -> tuple[str, ...]:
        """Labels of the chosen cohorts that discovery found."""
        if self.cohorts is None:
            return ()
        return tuple(s.name for s in self.evaluation.segments if s.axis == "cohort")

    def densities(self) -> tuple[Float, dict[str, dict[str, Float]]]:
        """(bin edges in logit, arm -> chosen cohort -> density) of the first seed's test predictions."""
        labels = self.pair
        runs = [open_scores(str(self.path / arm.scores[0]), self.config.data) for arm in self.drawn]
        segments = Segments(self.path / self.record.discovery / "cohorts.json", (), runs[0])
        groups = len(labels) + 1
        rows_G2 = np.zeros((groups, 2), dtype=np.int64)
        histogram_GJ2K = np.zeros((groups, len(runs), 2, BINS))
        for block in blocks(runs, segments.columns, segments.of):
            # Column 0 is the whole test set; the chosen cohorts follow, segments 1, 2, ...
            chosen_NC = np.ascontiguousarray(block.segment_NA[:, 1:groups])
            bootstrap.count(chosen_NC, block.label_N, block.weight_N, block.bin_NJ, rows_G2, histogram_GJ2K)
        mass_GJK = histogram_GJ2K.sum(axis=2).reshape(groups, len(runs), -1, _COARSE).sum(axis=-1)[1:]
        edges = np.linspace(-LIMIT, LIMIT, mass_GJK.shape[-1] + 1)
        share_GJK = mass_GJK / np.maximum(mass_GJK.sum(axis=-1, keepdims=True), 1e-300)
        drawn = np.flatnonzero((share_GJK > 1e-4).any(axis=(0, 1)))
        low, high = (drawn[0], drawn[-1] + 1) if len(drawn) else (0, len(edges) - 1)
        density_GJK = share_GJK[..., low:high] / np.diff(edges[low : high + 1])
        return edges[low : high + 1], {
            arm.name: {label: density_GJK[i, j] for i, label in enumerate(labels)} for j, arm in enumerate(self.drawn)
        }


def read_experiment(path: Path) -> Experiment:
    """Reads a finished experiment's folder. Raises a C2ALError naming a file that is missing or not readable."""
    record = read_record(path)
    cohorts = path / record.discovery / "cohorts.json"
    drawn = [record.baseline, *([record.main] if record.main else [])]
    return Experiment(
        path=path,
        config=load_config(path / "config.toml"),
        command=_text(path / "command.txt").strip(),
        versions=_json(path / "versions.json", _text(path / "versions.json")),
        record=record,
        cohorts=_json(cohorts, _text(cohorts)) if record.discovery else None,
        evaluation=read_evaluation(path / "evaluation" / "evaluation.json"),
        records={
            arm.name: tuple(_records(path / folder / "run" / "metrics.jsonl") for folder in arm.folders(record.seeds))
            for arm in drawn
        },
    )


def _records(path: Path) -> tuple[Entry, ...]:
    """Raises DataError naming file and line of what is no record of a training."""
    records = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        where = f"{path}, line {number}"
        record = _json(where, line)
        if not isinstance(record, dict) or not {"step", "kind"} <= record.keys():
            raise DataError(f"{where}: not a record of a training run, which has a step and a kind")
        records.append(record)
    return tuple(records)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not readable: {e}") from e


def _json(where: Path | str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"{where}: not JSON: {e}") from e


def _get(record: Entry, keys: tuple[str, ...]) -> Any:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
