"""The head and tail cohorts in scored impressions.

Writes into --output:

cohorts.json         axes, cohorts, divergences with intervals, the chosen pair or why there is none
accumulators.npz     the integer counts behind it; `--merge` adds those of several days or shards
densities.csv        densities of the predictions of every axis's first pair
table.txt            what is printed at the end
scan.json            what was asked, and of which files (by content)

Equal rows give equal bytes of cohorts.json, whatever the ranks, threads, order of files or codec,
and whether or not the scan was killed and started again.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from c2al.config import Axis, DataConfig, DiscoverConfig
from c2al.data.cohorts import Cohorts, read_cohorts
from c2al.data.identity import FileIdentity, differences, identify
from c2al.data.scores_folder import COMPLETE, check_marker, open_scored
from c2al.data.source import File
from c2al.discovery.accumulators import Accumulators
from c2al.discovery.axes import Columns, Cuts
from c2al.discovery.densities import DENSITIES, write_densities
from c2al.discovery.describe import describe, table
from c2al.discovery.passes import scan
from c2al.discovery.record import SCAN, ScanRecord, read_record, scan_differences, write_record
from c2al.discovery.saved import load_accumulators, save_accumulators
from c2al.distributed.process import World
from c2al.errors import CheckpointError, CohortError, ConfigError, DataError, OutputError
from c2al.files import LOCK, only_writer, refuse_foreign, write_atomically
from c2al.typed import hint

ACCUMULATORS = "accumulators.npz"
_COHORTS = "cohorts.json"
_UNFINISHED = "unfinished"
_TABLE = "table.txt"
_OWN = {_COHORTS, ACCUMULATORS, DENSITIES, "densities.svg", _TABLE, "config.toml", SCAN, _UNFINISHED, LOCK}
"""Names that a folder of discovery may hold."""


def discover(
    scores: Sequence[str],
    axes: Sequence[Axis],
    config: DiscoverConfig,
    output: Path,
    world: World,
    data: DataConfig,
    cuts_of: Path | None = None,
) -> Cohorts:
    """Scans `scores` on all ranks, writes `output` on rank 0 and returns the cohorts on every rank.

    `cuts_of`: an earlier output whose percentile cuts are kept, so that the two can be merged. Where
    `output` is the result of the same command on the same files already, nothing is read again.

    Raises, on every rank, ConfigError without axes, DataError and CohortError as `scan` does, also when
    the cuts of `cuts_of` do not fit; DataError for a folder of scores that lost a part; CheckpointError
    where another scan was interrupted in `output`; OutputError where it is the result of another
    command, or another process writes it. When no pair stands out that is a result, not an error: the
    returned cohorts have no head and tail.
    """
    if not axes:
        raise ConfigError("axes: discovery needs at least one axis")
    _check_chosen_axes(axes, config)
    if data.weight and world.rank == 0:
        print(f"discover: every row counts once; data.weight = '{data.weight}' is not used", file=sys.stderr)
    with _writing(output, world):
        files = world.together(lambda: open_scored(scores))
        world.once(lambda: _check_markers(files))
        record = ScanRecord(
            axes=tuple(axes),
            columns=Columns(prediction=config.prediction, label=config.label, user=data.user_id),
            settings=config,
            earlier_cuts=dict(world.together(lambda: _percentile_cuts(cuts_of, axes) if cuts_of else {})),
            files=_identities(files, world),
        )
        if not world.once(lambda: _is_finished(output, record)):
            _scan(files, record, output, world)
        return read_cohorts(output / _COHORTS)


def merge(folders: Sequence[Path], config: DiscoverConfig, output: Path) -> Cohorts:
    """Adds the counts of several outputs of `discover` and writes the result as `discover` does.

    Of `config` only the settings that decide between cohorts matter; what was counted is what the
    folders say.

    Raises CohortError naming the folder whose axes, columns, cuts or jackknife are not those of the
    first, since counts between other cuts or of other predictions cannot be added, and the folder that
    counted a file which an earlier one counted. CheckpointError for a folder without readable counts,
    OutputError as `discover` does.
    """
    with _writing(output, None):
        total = _finished_accumulators(folders[0])
        for folder in folders[1:]:
            total = total.merged(_finished_accumulators(folder), str(folders[0]), str(folder))
        _check_chosen_axes(total.axes, config)
        record = ScanRecord(
            axes=total.axes, columns=total.columns, settings=config, earlier_cuts=total.cuts, files=total.files
        )
        if not _is_finished(output, record):
            _write(total, record, output)
        return read_cohorts(output / _COHORTS)


def _check_chosen_axes(axes: Sequence[Axis], config: DiscoverConfig) -> None:
    names = [a.name for a in axes]
    for name in config.axes:
        if name not in names:
            raise ConfigError(f"discover.axes: unknown axis '{name}'{hint(name, names)}")


def _scan(files: Sequence[File], record: ScanRecord, output: Path, world: World) -> None:
    unfinished = output / _UNFINISHED
    try:
        total = scan(files, record, unfinished, world)
    except (DataError, CohortError):
        # Whoever mends the input must not go on from what was counted of the old one.
        if world.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    world.once(lambda: _write(total, record, output))
    if world.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _writing(output: Path, world: World | None) -> Iterator[None]:
    """Makes rank 0 the only writer of `output`; a folder that is left empty by an error is removed."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            refuse_foreign(output, _OWN, "discover")
            stack.enter_context(only_writer(output))

        if world is None:
            take()
        else:
            world.once(take)
        try:
            yield
        except BaseException:
            if world is None or world.rank == 0:
                _remove_if_empty(output)
            raise


def _remove_if_empty(output: Path) -> None:
    with contextlib.suppress(OSError):
        if {p.name for p in output.iterdir()} <= {LOCK}:
            (output / LOCK).unlink(missing_ok=True)
            output.rmdir()


def _is_finished(output: Path, record: ScanRecord) -> bool:
    """Whether the result of this very command is there; says so.

    Raises OutputError for that of another, and for one that has lost a file; CheckpointError for damaged counts,
    which only a merge would read: whoever hears that all is there need not keep the scores.
    """
    if not (output / _COHORTS).exists():
        return False
    if not (output / SCAN).exists():
        raise OutputError(f"{output}: holds a result without {SCAN}, of another c2al; name another --output")
    found = scan_differences(read_record(output), record)
    if found:
        raise OutputError(f"{output}: holds the result of another command: {'; '.join(found)}; name another --output")
    whole = "delete the folder, and the same command makes it anew"
    for name in (DENSITIES, _TABLE):
        if not (output / name).exists():
            raise OutputError(f"{output / name}: no such file, though the result is finished; {whole}")
    try:
        read_cohorts(output / _COHORTS)
        counted = _finished_accumulators(output)
    except (CohortError, CheckpointError) as e:
        raise type(e)(f"{e}; {whole}") from e
    same = (counted.axes, counted.columns) == (record.axes, record.columns)
    if not same or differences(counted.files, record.files):
        raise CheckpointError(f"{output / ACCUMULATORS}: not of the scan that {SCAN} tells of; {whole}")
    print(f"discover: {output} is finished already, from the same files", file=sys.stderr)
    return True


def _check_markers(files: Sequence[File]) -> None:
    """Raises DataError naming what is missing from a folder of scores that has a marker."""
    for folder, filesystem in {str(PurePosixPath(f.path).parent): f.filesystem for f in files}.items():
        if filesystem.get_file_info(f"{folder}/{COMPLETE}").is_file:
            check_marker(folder, filesystem)


def _identities(files: Sequence[File], world: World) -> tuple[FileIdentity, ...]:
    """The identity of every file, on every rank; the ranks share the reading."""
    own = world.together(lambda: identify(files[world.rank :: world.size]))
    every = [world.broadcast(own, source=r) for r in range(world.size)]
    return tuple(every[i % world.size][i // world.size] for i in range(len(files)))


def _write(total: Accumulators, record: ScanRecord, output: Path) -> None:
    """cohorts.json last: where it stands, the rest is whole."""
    document = describe(total, record.settings)
    save_accumulators(output / ACCUMULATORS, total, None)
    write_densities(total, document, output)
    write_atomically(output / _TABLE, table(document) + "\n")
    write_record(output, record)
    write_atomically(output / _COHORTS, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _finished_accumulators(folder: Path) -> Accumulators:
    total, finished = load_accumulators(folder / ACCUMULATORS)
    if finished is not None:
        raise CheckpointError(f"{folder / ACCUMULATORS}: of an interrupted scan")
    return total


def _percentile_cuts(folder: Path, axes: Sequence[Axis]) -> Cuts:
    """The cuts of the percentile axes of an earlier output. Raises CohortError for other axes."""
    earlier = _finished_accumulators(folder)
    percentiles = [a for a in axes if a.kind == "percentiles"]
    for axis in percentiles:
        if axis not in earlier.axes:
            raise CohortError(f"{folder}: has no axis {axis}")
    return {a.name: earlier.cuts[a.name] for a in percentiles}
