"""`c2al synth`: impressions of a synthetic world, and what no model can beat on them."""

import argparse
from pathlib import Path
from typing import Any

from c2al.data.synthetic import COHORTS, LATENT_WORLDS, LatentConfig, LatentTruth, SynthConfig, Truth, synthesise
from c2al.errors import ConfigError
from c2al.text import table

CONFLICT = SynthConfig(rows=300_000)
LATENT = LatentConfig(world="privileged")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    both = f"({LATENT_WORLDS[0]}, ...: {{}}; conflict: {{}})"
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--world",
        choices=("conflict", *LATENT_WORLDS),
        default="conflict",
        help="conflict: two surfaces contradict the majority; privileged: a hidden segment that inputs reveal; "
        "visible: the same, the segment may be an input; homogeneous: the segment means nothing (%(default)s)",
    )
    parser.add_argument(
        "--rows", type=int, help="impressions over all splits " + both.format(LATENT.rows, CONFLICT.rows)
    )
    parser.add_argument("--seed", type=int, default=CONFLICT.seed)
    parser.add_argument("--users", type=int, help=both.format(LATENT.users, CONFLICT.users))
    parser.add_argument("--items", type=int, help=both.format(LATENT.items, CONFLICT.items))
    parser.add_argument("--rate", type=float, help=f"share of positives ({LATENT.rate}); not of conflict")
    parser.add_argument("--zipf", type=float, help=f"conflict: exponent of their frequencies ({CONFLICT.zipf})")
    parser.add_argument(
        "--rates",
        type=float,
        nargs=len(COHORTS),
        metavar=tuple(c.upper() for c in COHORTS),
        help=f"conflict: share of positives in each cohort, e.g. 0.0008 0.0014 0.0003 {CONFLICT.rates}",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ConfigError(f"command line: unknown argument {overrides[0]}")
    truth = synthesise(_config(args), args.output)
    print(_shown(truth))
    print(f"wrote {args.output}")


def _config(args: argparse.Namespace) -> SynthConfig | LatentConfig:
    """The world's config; an option that the world does not have is an error, never without effect."""
    conflict = args.world == "conflict"
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name in ("rows", "users", "items", "rate", "zipf", "rates")
        if (value := getattr(args, name)) is not None
    }
    known = {"rows", "users", "items"} | ({"zipf", "rates"} if conflict else {"rate"})
    if foreign := sorted(given.keys() - known):
        raise ConfigError([f"--{name}: does not go with --world {args.world}" for name in foreign])
    if conflict:
        return SynthConfig(**{"rows": CONFLICT.rows, **given}, seed=args.seed)
    return LatentConfig(world=args.world, **given, seed=args.seed)


def _shown(truth: dict[str, dict[str, Truth]]) -> str:
    groups = [(split, name, t) for split, parts in truth.items() for name, t in parts.items()]
    latent = any(isinstance(t, LatentTruth) for _, _, t in groups)
    rows = [["split", "rows of", "rows", "positives", "Bayes NE", *(["without segment"] if latent else [])]]
    for split, name, t in groups:
        row = [split, name, f"{t.rows:,}", f"{t.positives:,}", _ne(t.bayes_ne)]
        rows.append([*row, _ne(t.bayes_ne_without_latent)] if isinstance(t, LatentTruth) else row)
    return table(rows, left=2)


def _ne(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
