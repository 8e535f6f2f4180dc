"""`c2al export`: the serving artifact, without auxiliary heads, and the proof that it is the model."""

import argparse
from pathlib import Path

from c2al.distributed.process import process_group
from c2al.errors import ConfigError
from c2al.serving.export import export
from c2al.training.run_folder import open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, type=Path, help="folder of the training run")
    parser.add_argument("--data", required=True, nargs="+", help="held-out impressions for the proof")
    parser.add_argument("--output", required=True, type=Path, help="folder of the artifact; must not exist")
    parser.add_argument("--checkpoint", type=Path, help="one of the run's checkpoints (default: the newest)")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ConfigError(f"command line: export takes the run's config as it is, not {' '.join(overrides)}")
    with process_group(open_run(args.run).config.dist) as world:
        proof = export(args.run, args.data, args.output, world, args.checkpoint)
    print(
        f"{args.output / 'model.pt2'}: {proof['rows_compared']:,} held-out predictions bit-equal to the training "
        f"model's primary head; {len(proof['parameters'])} parameters, none of them auxiliary"
    )
