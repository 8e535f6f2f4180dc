"""`c2al discover`: the head and tail cohorts in scored impressions."""

import argparse
from pathlib import Path

from c2al.config import load_config, save_config
from c2al.discovery.discover import discover, merge
from c2al.distributed.process import process_group
from c2al.errors import ConfigError
from c2al.report.densities import draw_densities


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="TOML configuration (with --merge: default the first folder's)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scores", nargs="+", help="score folders, or any Parquet files, folders, globs or URIs")
    source.add_argument("--merge", nargs="+", type=Path, metavar="DIR", help="add up earlier outputs without a scan")
    parser.add_argument("--cuts", type=Path, metavar="DIR", help="take the percentile cuts of an earlier output")
    parser.add_argument("--output", required=True, type=Path, help="folder of the result; a killed scan goes on there")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.merge and args.cuts:
        raise ConfigError("--cuts: goes with --scores; what is merged keeps the cuts it has")
    path = args.config or (args.merge[0] / "config.toml" if args.merge else None)
    if path is None:
        raise ConfigError("--config: needed with --scores")
    config = load_config(path, overrides)
    if args.merge:
        merge(args.merge, config.discover, args.output)
        draw_densities(args.output)
        save_config(config, args.output / "config.toml")
        print((args.output / "table.txt").read_text(encoding="utf-8"), end="")
        return
    with process_group(config.dist) as world:
        discover(args.scores, config.axes, config.discover, args.output, world, config.data, args.cuts)
        if world.rank == 0:
            draw_densities(args.output)
            save_config(config, args.output / "config.toml")
            print((args.output / "table.txt").read_text(encoding="utf-8"), end="")
