"""The folder of one training run: what train writes and score and export read.

config.toml        resolved config; written last when a run starts
inputs.json        content identity of the training files and of statistics.json
statistics.json    training statistics and vocabularies
base_rates.json    how often each task is positive in the training split
cohorts.json       the chosen cohorts, in a C2AL run
start.json         the earlier run's checkpoint that it began with, where there is one
checkpoints/       see c2al.distributed.checkpoint
metrics.jsonl      one record per line: {"step": ..., "kind": ..., ...}; kinds in docs/artifacts.md
tensorboard/       the same numbers
plan.json          the sharding plan
.lock              held by the process that trains

Readers never write here, and need not be able to.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from c2al.config import Config, load_config, redacted_config, save_config
from c2al.data.cohorts import CohortSpec, read_cohorts
from c2al.data.identity import FileIdentity, identify
from c2al.data.source import open_dataset
from c2al.data.statistics import Statistics, fit_statistics
from c2al.distributed.checkpoint.manifest import MARKER, finished
from c2al.distributed.process import World
from c2al.errors import CheckpointError, ConfigError, StateError
from c2al.files import only_writer, output_errors, write_atomically
from c2al.nn.methods import check_method
from c2al.text import redacted
from c2al.training.base_rates import BaseRates, count_base_rates
from c2al.training.cohort_settings import check_cohort_settings, check_labels
from c2al.training.inputs import Inputs, check_inputs
from c2al.training.start_from import Earlier, Start, Started, continued, refuse_another_model

# What may differ between the run that wrote a checkpoint and the one that goes on from it:
# nothing that changes the sequence of weights.
_FREE = (
    *(f"dist.{k}" for k in ("device", "sharding", "tables", "plan", "local_world_size", "hbm_gib", "ddr_gib")),
    *(f"dist.{k}" for k in ("within_host_gib_s", "between_hosts_gib_s", "timeout_seconds")),
    *(f"train.{k}" for k in ("checkpoint.", "log_every", "eval_every", "y_every", "profile_steps")),
    *(f"data.{k}" for k in ("workers", "prefetch", "validation", "test")),
    *("discover.", "evaluate.", "experiment.", "axes", "arms"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder and what it was trained with."""

    path: Path
    config: Config
    statistics: Statistics
    base_rates: BaseRates
    cohorts: tuple[CohortSpec, ...]
    """The chosen ones, in a run that needs cohorts; empty in a baseline's."""
    start: Started | None = None
    """The earlier run's checkpoint that it began with."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the cohorts."""
        return tuple(cohort.label for cohort in self.cohorts)

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of the cohorts that are auxiliary tasks: all, or none in a run without auxiliary losses."""
        return self.names if self.config.train.auxiliary else ()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result_is_best(self) -> bool:
        """Whether the run's model is its best checkpoint, as with early stopping, and not its newest."""
        return self.config.train.early_stopping.patience > 0


def open_run(path: Path) -> Run:
    """Reads the folder of a run and leaves it as it is, also while the run goes on.

    Raises ConfigError when it is none, StateError when one of its files is damaged.
    """
    for name in ("config.toml", "statistics.json", "base_rates.json"):
        if not (path / name).exists():
            raise ConfigError(f"{path}: not the folder of a training run (it has no {name})")
    config = load_config(path / "config.toml")
    return Run(
        path=path,
        config=config,
        statistics=_read_statistics(path / "statistics.json"),
        base_rates=BaseRates.read(path / "base_rates.json"),
        cohorts=read_cohorts(path / "cohorts.json").chosen() if config.train.needs_cohorts else (),
    )


@contextlib.contextmanager
def sole_writer(path: Path, world: World) -> Iterator[None]:
    """Makes this job the only one that writes into the folder `path`; rank 0 holds the lock. Collective.

    Raises OutputError naming the other writer, or why the folder cannot be made.
    """
    with contextlib.ExitStack() as held:
        world.once(lambda: held.enter_context(only_writer(path)))
        yield


def start_run(
    path: Path,
    config: Config,
    cohorts: Path | None,
    world: World,
    like: Path | None = None,
    start: Start | None = None,
) -> Run:
    """Makes the folder of a new run, or opens the one of an interrupted run of the same config and inputs.

    With `start`, a new run goes on from an earlier one: it takes what it can of that run's statistics, and
    `Run.start` says where its weights are.

    All ranks share the scan of the training split; rank 0 alone writes. like: a run whose statistics are
    taken over when it was fitted to the same files with the same data settings. Raises on every rank:
    ConfigError when the folder holds a run that this one cannot go on from, DataError when a file of any
    split is not what the config says or the training files changed, CohortError for cohorts that can
    teach nothing.
    """
    train = world.once(lambda: _check(path, config, cohorts))
    started = world.once(lambda: _started(path, config, start))
    # config.toml is written last: without it, an earlier start died before its folder was whole.
    if world.once(lambda: (path / "config.toml").exists()):
        statistics = world.once(lambda: _resume(path, config, cohorts, train))
        rates = world.once(lambda: BaseRates.read(path / "base_rates.json"))
    else:
        chosen = () if cohorts is None else world.once(lambda: read_cohorts(cohorts).chosen())
        rates = count_base_rates(config, chosen, world, str(cohorts))
        known = world.once(lambda: _taken_over(like, config, train))
        statistics = known or fit_statistics(config.data.train, config.data, world.share, world.size, world.watched)
        if started is not None:
            statistics = continued(open_earlier(started), config, statistics)
        world.once(lambda: _begin(path, statistics, rates, train, cohorts, started))
    world.once(lambda: save_config(config, path / "config.toml"))
    return Run(
        path=path,
        config=config,
        statistics=statistics,
        base_rates=rates,
        cohorts=world.once(lambda: read_cohorts(path / "cohorts.json").chosen()) if config.train.needs_cohorts else (),
        start=started,
    )


def open_earlier(started: Started) -> Earlier:
    """The run that a run began with. Raises as `open_run`."""
    run = open_run(Path(started.run))
    return Earlier(config=run.config, statistics=run.statistics, cohorts=run.names)


def _started(path: Path, config: Config, start: Start | None) -> Started | None:
    """What the run in `path` begins, or has begun, with.

    Raises ConfigError when a run that is there began otherwise than `start` asks for, or when the network
    is another one than the earlier run's; CheckpointError when that has no checkpoint, or it has changed.
    """
    file = path / "start.json"
    if not (path / "config.toml").exists():
        return None if start is None else _choose_start(path, config, start)
    before = Started.read(file) if file.exists() else None
    asked = None if start is None else (str(start.run.resolve()), start.optimizer)
    if asked != (None if before is None else (before.run, before.optimizer)):
        began = "without --start-from"
        if before is not None:
            began = f"with --start-from {before.run}{' --start-optimizer' if before.optimizer else ''}"
        raise ConfigError(f"{path}: holds a run that began {began}; give the same or another --output")
    # Where nothing is saved yet, the earlier weights are needed once more.
    needed = before is not None and not any((path / "checkpoints").glob("step-*"))
    if before is not None and needed and _manifest_digest(before.path) != before.manifest_sha256:
        raise CheckpointError(f"{before.path}: is not the checkpoint that {path} began with; give another --output")
    return before


def _choose_start(path: Path, config: Config, start: Start) -> Started:
    run = open_run(start.run)
    if start.run.resolve() == path.resolve():
        raise ConfigError(f"{path}: cannot start from itself; the same command without --start-from goes on")
    refuse_another_model(run.config, config)
    good, damaged = finished(run.checkpoints)
    if not good:
        raise CheckpointError("\n".join([f"{run.checkpoints}: holds no checkpoint to start from", *damaged]))
    chosen = good[-1][0]
    if run.result_is_best and (ranked := sorted((m.ne, -m.step, p) for p, m in good if m.ne is not None)):
        chosen = ranked[0][2]
    return Started(
        run=str(start.run.resolve()),
        checkpoint=chosen.name,
        manifest_sha256=_manifest_digest(chosen),
        optimizer=start.optimizer,
    )


def _manifest_digest(checkpoint: Path) -> str:
    try:
        return _sha256((checkpoint / MARKER).read_bytes())
    except OSError as e:
        raise CheckpointError(f"{checkpoint / MARKER}: cannot be read: {e.strerror}") from e


def _check(path: Path, config: Config, cohorts: Path | None) -> tuple[FileIdentity, ...]:
    """Refuses what cannot be trained on before anything is written; returns the training files' identity."""
    if not config.data.train:
        raise ConfigError("data.train: names no files to train on")
    check_method(config.train.combine)
    check_cohort_settings(config.train, cohorts)
    if (path / "config.toml").exists():
        _refuse_another_config(path, config)
    elif any((path / "checkpoints").glob("step-*")):
        raise ConfigError(f"{path}: holds checkpoints, but no config.toml says of what; give another --output")
    chosen = () if cohorts is None else read_cohorts(cohorts).chosen()
    if cohorts is not None:
        check_labels(config.train, cohorts, [c.label for c in chosen])
    check_inputs(config, chosen)
    return identify(open_dataset(config.data.train))


def _begin(
    path: Path,
    statistics: Statistics,
    rates: BaseRates,
    train: tuple[FileIdentity, ...],
    cohorts: Path | None,
    started: Started | None,
) -> None:
    text = statistics.to_json()
    write_atomically(path / "statistics.json", text)
    rates.write(path / "base_rates.json")
    Inputs(train=train, statistics_sha256=_sha256(text.encode())).write(path / "inputs.json")
    if started is not None:
        started.write(path / "start.json")
    if cohorts is not None and cohorts.resolve() != (path / "cohorts.json").resolve():
        write_atomically(path / "cohorts.json", cohorts.read_bytes())


def _taken_over(like: Path | None, config: Config, train: tuple[FileIdentity, ...]) -> Statistics | None:
    """The statistics of the run `like`; None when it is none yet, or was fitted to anything else."""
    # Statistics that went on from an earlier run are not fitted to the files alone.
    if like is None or not (like / "config.toml").exists() or (like / "start.json").exists():
        return None
    inputs, statistics = Inputs.read(like / "inputs.json"), like / "statistics.json"
    if load_config(like / "config.toml").data != redacted_config(config).data or inputs.changes(train):
        return None
    read = _read_statistics(statistics)
    return read if _sha256(statistics.read_bytes()) == inputs.statistics_sha256 else None


def _resume(path: Path, config: Config, cohorts: Path | None, train: tuple[FileIdentity, ...]) -> Statistics:
    """The statistics of the run in `path`. Raises ConfigError when it began with other inputs."""
    inputs = Inputs.read(path / "inputs.json")
    changed = [f"{path}: holds a run on other training data: {c}" for c in inputs.changes(train)]
    if cohorts is not None:
        before, now = (read_cohorts(p).chosen() for p in (path / "cohorts.json", cohorts))
        if before != now:
            changed.append(f"{path}: holds a run with other cohorts than {cohorts}")
    if changed:
        raise ConfigError([f"{c}; give another --output" for c in changed])
    statistics = path / "statistics.json"
    read = _read_statistics(statistics)
    if _sha256(statistics.read_bytes()) != inputs.statistics_sha256:
        raise StateError(f"{statistics}: changed since the run began (its SHA-256 is not the one in inputs.json)")
    return read


def _refuse_another_config(path: Path, config: Config) -> None:
    saved = load_config(path / "config.toml")
    # Without schedules no step depends on where training ends, so a run can be made longer.
    train = config.train
    endless = train.optimizer.decay == "constant" and train.lambda_schedule == "constant"
    free = (*_FREE, "train.max_steps") if endless else _FREE
    changed = [
        f"{path}: holds a run with {key} = {old!r}, not {new!r}; give another --output"
        for key, old, new in config_differences(saved, config)
        if not key.startswith(free)
    ]
    if changed:
        raise ConfigError(changed)


def config_differences(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of what differs, in order of the keys, without secrets."""
    old, new = ({key: _without_secrets(value) for key, value in _flat(dataclasses.asdict(c))} for c in (before, now))
    return [(k, old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]


def _without_secrets(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_without_secrets(v) for v in value)
    return redacted(value) if isinstance(value, str) else value


def _read_statistics(path: Path) -> Statistics:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise StateError(f"{path}: cannot be read: {e.strerror}") from e
    return Statistics.from_json(content, str(path))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _flat(tree: Any, path: str = "") -> Any:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


class MetricsLog:
    """metrics.jsonl and TensorBoard, written by rank 0.

    A resumed run drops the records after its checkpoint, and writes none anew that the step of its checkpoint has, so
    that each stands there once.
    Every method raises OutputError when it cannot write, the constructor StateError when metrics.jsonl
    holds something else.
    """

    def __init__(self, path: Path, step: int):
        self._file, self._folder = path / "metrics.jsonl", path / "tensorboard"
        kept, self.recorded = _records(self._file, step)
        """`recorded`: kinds of the records that the step which the run goes on from has already."""
        write_atomically(self._file, "".join(kept))
        self._step = step
        with output_errors(self._folder):
            if step == 0:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._board = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Appends a record; numbers also go to TensorBoard as kind/name."""
        if step == self._step and kind in self.recorded:
            return
        with output_errors(self._file), self._file.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        with output_errors(self._folder):
            for name, value in _flat(values):
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        with output_errors(self._folder):
            self._board.close()


def _records(file: Path, step: int) -> tuple[list[str], frozenset[str]]:
    """The lines of an earlier start up to `step`, and the kinds of those of `step` itself.

    Raises StateError naming a line that is no record.
    """
    kept: list[str] = []
    kinds: set[str] = set()
    if not file.exists():
        return kept, frozenset()
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # a killed run can leave half a last line
        try:
            record = json.loads(line)
            if record["step"] <= step:
                kept.append(line.decode("utf-8"))
            if record["step"] == step:
                kinds.add(record.get("kind", ""))
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise StateError(f"{file}, line {number}: not a record of a training run: {e!r}") from e
    return kept, frozenset(kinds)
