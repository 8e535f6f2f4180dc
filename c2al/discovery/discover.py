"""The head and tail cohorts in scored impressions.

Writes into --output:

cohorts.json         axes, cohorts, divergences with intervals, the chosen pair or why there is none
accumulators.npz     the integer counts behind it; `--merge` adds those of several days or shards
densities.csv, .svg  densities of the predictions of every axis's first pair
table.txt            what is printed at the end
config.toml          the resolved configuration

Equal rows give equal bytes of cohorts.json, whatever the ranks, threads, order of files or codec,
and whether or not the scan was killed and started again.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from c2al.config import Axis, DataConfig, DiscoverConfig
from c2al.data.cohorts import Cohorts, read_cohorts
from c2al.data.source import open_dataset
from c2al.discovery.accumulate import Accumulators, Columns, Cuts
from c2al.discovery.densities import write_densities
from c2al.discovery.describe import describe, table
from c2al.discovery.passes import scan
from c2al.distributed.process import World
from c2al.errors import CohortError, ConfigError, DataError
from c2al.files import write_atomically

ACCUMULATORS = "accumulators.npz"


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

    `cuts_of`: an earlier output whose percentile cuts are kept, so that the two can be merged.

    Raises, on every rank, ConfigError without axes, DataError and CohortError as `scan` does, also when
    the cuts of `cuts_of` do not fit. When no pair stands out that is a result, not an error: the
    returned cohorts have no head and tail.
    """
    if not axes:
        raise ConfigError("axes: discovery needs at least one axis")
    if data.weight and world.rank == 0:
        print(f"discover: every row counts once; data.weight = '{data.weight}' is not used", file=sys.stderr)
    columns = Columns(prediction=config.prediction, label=config.label, user=data.user_id)
    files = world.together(lambda: open_dataset(scores))
    earlier = world.together(lambda: _percentile_cuts(cuts_of, axes) if cuts_of else {})
    unfinished = output / "unfinished"
    try:
        total = scan(files, axes, config, columns, unfinished, world, earlier)
    except (DataError, CohortError):
        # Whoever mends the input must not go on from what was counted of the old one.
        if world.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            with contextlib.suppress(OSError):
                output.rmdir()
        raise
    world.once(lambda: _write(total, config, output))
    if world.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    return read_cohorts(output / "cohorts.json")


def merge(folders: Sequence[Path], config: DiscoverConfig, output: Path) -> Cohorts:
    """Adds the counts of several outputs of `discover` and writes the result as `discover` does.

    Raises CohortError naming the folder whose axes, cuts or jackknife are not those of the first:
    counts between other cuts cannot be added. CheckpointError for a folder without readable counts.
    """
    total, _ = Accumulators.load(folders[0] / ACCUMULATORS)
    for folder in folders[1:]:
        other, _ = Accumulators.load(folder / ACCUMULATORS)
        for name, hint in (("axes", ""), ("cuts", "; scan it again with --cuts"), ("jackknife", "")):
            mine, theirs = getattr(total, name), getattr(other, name)
            if mine != theirs:
                raise CohortError(f"{folder}: {name} {theirs} are not those of {folders[0]}: {mine}{hint}")
        total = total.plus(other.counts)
    _write(total, config, output)
    return read_cohorts(output / "cohorts.json")


def _write(total: Accumulators, config: DiscoverConfig, output: Path) -> None:
    """cohorts.json last: where it stands, the rest is whole."""
    output.mkdir(parents=True, exist_ok=True)
    document = describe(total, config)
    total.save(output / ACCUMULATORS)
    write_densities(total, document, output)
    write_atomically(output / "table.txt", table(document) + "\n")
    write_atomically(output / "cohorts.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _percentile_cuts(folder: Path, axes: Sequence[Axis]) -> Cuts:
    """The cuts of the percentile axes of an earlier output. Raises CohortError for other axes."""
    earlier, _ = Accumulators.load(folder / ACCUMULATORS)
    percentiles = [a for a in axes if a.kind == "percentiles"]
    for axis in percentiles:
        if axis not in earlier.axes:
            raise CohortError(f"{folder}: has no axis {axis}")
    return {a.name: earlier.cuts[a.name] for a in percentiles}
