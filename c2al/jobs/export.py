"""`c2al export`: the serving artifact, without auxiliary prediction heads, and the proof that it is the model."""

import argparse
import dataclasses
from pathlib import Path

from c2al.distributed.process import process_group
from c2al.errors import ConfigError
from c2al.serving.artifact import VARIANTS
from c2al.serving.export import INT8_NE_BOUND, export
from c2al.training.run_folder import open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, type=Path, help="folder of the training run")
    parser.add_argument("--data", required=True, nargs="+", help="held-out impressions for the proof")
    parser.add_argument("--output", required=True, type=Path, help="folder of the artifact; must not exist")
    parser.add_argument("--checkpoint", type=Path, help="one of the run's checkpoints (default: the newest)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=["float", "int8"],
        help="programs to write: float (always), int8 tables, aoti (compiled for this processor; needs a C++ "
        "compiler and minutes); default: float int8",
    )
    parser.add_argument(
        "--int8-ne-bound",
        type=float,
        default=INT8_NE_BOUND,
        help="largest relative change of NE on the held-out rows by int8 tables (default: %(default)s)",
    )
    parser.add_argument(
        "--default",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="value of every row where raw rows lack the column; without it a missing column is an error",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ConfigError(f"command line: export takes the run's config as it is, not {' '.join(overrides)}")
    dist = dataclasses.replace(open_run(args.run).config.dist, device="cpu")
    with process_group(dist) as world:
        proof = export(
            args.run,
            args.data,
            args.output,
            world,
            args.checkpoint,
            variants=args.variants,
            int8_ne_bound=args.int8_ne_bound,
            defaults=args.default,
        )
    print(
        f"{args.output / 'model.pt2'}: {proof.rows_compared:,} held-out predictions bit-equal to the training "
        f"model's primary prediction head; {proof.parameter_count:,} parameters, none of them auxiliary"
    )
    for variant, of in proof.variants.items():
        if variant != "float":
            print(
                f"{args.output / VARIANTS[variant]}: NE {of.ne_change:+.1e} of it (bound {of.ne_bound:g}), "
                f"predictions within {of.max_difference:.1e}"
            )
