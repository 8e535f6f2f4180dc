"""`c2al discover`: the head and tail cohorts in scored impressions."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from c2al.config import Axis, DataConfig, DiscoverConfig, DistConfig, load_config, save_config
from c2al.config.load import parse_sections
from c2al.discovery.discover import discover, merge
from c2al.discovery.flags import axes_of_words
from c2al.discovery.record import read_record
from c2al.distributed.process import process_group
from c2al.errors import ConfigError
from c2al.report.densities import draw_densities

COLUMNS = {"prediction": "prediction", "label": "label", "user": "user_id"}
"""Flags that name a column, and the column without the flag: as `c2al score` writes them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="TOML configuration; without it, --axis says what is scanned")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scores", nargs="+", help="score folders, or any Parquet files, folders, globs or URIs")
    source.add_argument("--merge", nargs="+", type=Path, metavar="DIR", help="add up earlier outputs without a scan")
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        help="an axis, where there is no --config: surface, age:edges=25,35, age:percentiles=0,50,100, "
        "surface*age (by names of axes), NAME=age:edges=25; may be given many times",
    )
    for flag, default in COLUMNS.items():
        parser.add_argument(
            f"--{flag}", metavar="COLUMN", help=f"column of the {flag}, with --axis (default: {default})"
        )
    parser.add_argument("--cuts", type=Path, metavar="DIR", help="take the percentile cuts of an earlier output")
    parser.add_argument("--output", required=True, type=Path, help="folder of the result; a killed scan goes on there")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections:
    """What discovery reads of a configuration."""

    dist: DistConfig = dataclasses.field(default_factory=DistConfig)
    discover: DiscoverConfig = dataclasses.field(default_factory=DiscoverConfig)
    axes: tuple[Axis, ...] = ()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    _check(args)
    config = load_config(args.config, overrides) if args.config else None
    if config is not None:
        asked = Sections(dist=config.dist, discover=config.discover, axes=config.axes, data=config.data)
    else:
        asked = _of_merged(args.merge[0], overrides) if args.merge else _of_flags(args, overrides)
    if args.merge:
        merge(args.merge, asked.discover, args.output)
    else:
        with process_group(asked.dist) as world:
            discover(args.scores, asked.axes, asked.discover, args.output, world, asked.data, args.cuts)
            if world.rank:
                return
    draw_densities(args.output)
    if config is not None:
        save_config(config, args.output / "config.toml")
    print((args.output / "table.txt").read_text(encoding="utf-8"), end="")


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go together."""
    with_axis = ["axis", *COLUMNS]
    for other in ("config", "merge"):
        given = [flag for flag in with_axis if getattr(args, flag)]
        if given and getattr(args, other):
            raise ConfigError(f"--{given[0]}: does not go with --{other}, which says what is scanned")
    if args.merge and args.cuts:
        raise ConfigError("--cuts: goes with --scores; what is merged keeps the cuts it has")
    if args.scores and not args.config and not args.axis:
        raise ConfigError("--axis: needed with --scores where there is no --config, e.g. --axis surface")


def _of_flags(args: argparse.Namespace, overrides: list[str]) -> Sections:
    """--axis, --prediction, --label and --user; overrides may set `discover` and `dist`."""
    columns = {flag: getattr(args, flag) or default for flag, default in COLUMNS.items()}
    asked = _Overridden.parse({"discover": {k: columns[k] for k in ("prediction", "label")}}, overrides)
    axes, user = axes_of_words(args.axis), DataConfig(user_id=columns["user"])
    return Sections(dist=asked.dist, discover=asked.discover, axes=axes, data=user)


def _of_merged(folder: Path, overrides: list[str]) -> Sections:
    """The settings of an earlier output; overrides may set `discover`."""
    settings = dataclasses.asdict(read_record(folder).settings)
    words = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return Sections(discover=_Overridden.parse({"discover": words}, overrides).discover)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Overridden:
    """The sections that overrides reach where there is no configuration."""

    dist: DistConfig = dataclasses.field(default_factory=DistConfig)
    discover: DiscoverConfig = dataclasses.field(default_factory=DiscoverConfig)

    @classmethod
    def parse(cls, tree: dict[str, Any], overrides: list[str]) -> "_Overridden":
        return parse_sections(cls, tree, overrides, "command line")
