"""`c2al JOB ...`: one subcommand per job. A job's module is imported only when it is asked for."""

import argparse
import importlib
import io
import logging
import re
import signal
import sys
import warnings
from pathlib import Path

from c2al.config.reference import help_text
from c2al.errors import C2ALError, ConfigError
from c2al.text import redacted
from c2al.typed import hint

DESCRIPTION = "Trains click and conversion models with Cohort-Contrastive Auxiliary Learning (C2AL)."

JOBS = {
    "train": "train a model on Parquet impressions",
    "score": "predict with a checkpoint and write Parquet",
    "discover": "find the head and tail cohorts in scored impressions",
    "evaluate": "NE, NE_diff, calibration and AUC with intervals",
    "describe": "layers, parameters, FLOPs and the plan of tables of a configuration",
    "export": "write and prove the serving artifact",
    "predict": "predict raw rows with a serving artifact",
    "serve-check": "compare an artifact's variants with the training model, and time them",
    "experiment": "arms against the baseline over paired seeds, with a report",
    "demo": "two experiments on synthetic impressions whose truth is known",
    "synth": "write synthetic impressions with planted cohorts",
    "ingest": "turn a published data set into Parquet splits",
}

_URI = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):(/|$)")
"""How a URI begins once it is a Path, which keeps one of two slashes."""

_ALL = ("", "data", "model", "train", "dist", "axes", "discover", "evaluate", "experiment", "arms")
SETTINGS = {
    "train": ("", "data", "model", "train", "dist", "axes"),
    "score": ("data", "dist", "axes"),
    "discover": ("data", "dist", "axes", "discover"),
    "evaluate": ("", "data", "axes", "evaluate"),
    "describe": ("data", "model", "train", "dist", "arms"),
    "experiment": _ALL,
    "demo": _ALL,
}
"""Sections of the configuration that a job reads, for its help. A job that is not here takes no overrides."""


def _only_our_own_warnings() -> None:
    """What torch, torchrec and fbgemm deprecate among themselves is nothing a user can act on."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"c2al\.")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    # A filter, since torch resets the levels of its own loggers when it is imported.
    logging.getLogger("torch._export.serde.serialize").addFilter(lambda record: record.levelno >= logging.ERROR)


def _print_any_name() -> None:
    """A name that the terminal's encoding lacks is printed with escapes; it must not end a job."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _path(word: str) -> Path:
    """A path argument. An empty one, as an unset variable leaves it, would mean the current folder without a word."""
    if not word:
        raise argparse.ArgumentTypeError("is empty; write . for the current folder")
    return Path(word)


def _refuse_uris(known: argparse.Namespace) -> None:
    """Raises ConfigError for a URI where a local path is meant, which would name a local folder `s3:`."""
    for name, value in vars(known).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) and (found := _URI.match(str(path))):
                given = f"{found[1]}://{path.relative_to(found[0])}"
                raise ConfigError(
                    f"--{name.replace('_', '-')}: {given} is a URI; only impressions and scores are read from "
                    "object stores, all else is on a local or shared file system"
                )


def main(arguments: list[str] | None = None) -> int:
    """Runs one job; returns 0, or a C2ALError's exit code after printing its message.

    A signal that Python was told of gives 128 + its number, as a shell says of a process that a signal ended.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(words)
    except KeyboardInterrupt as stop:  # whenever it comes, the import of a job included
        print(f"c2al {' '.join(words[:1])}: interrupted", file=sys.stderr)
        number = stop.args[0] if stop.args else signal.SIGINT
        return 128 + int(number)


def _run(words: list[str]) -> int:
    _only_our_own_warnings()
    _print_any_name()
    parser = argparse.ArgumentParser(prog="c2al", description=DESCRIPTION, allow_abbrev=False)
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    job_name = words[0] if words else ""
    for name, description in JOBS.items():
        job = jobs.add_parser(name, help=description, description=description, allow_abbrev=False)
        if name == job_name:
            module = importlib.import_module(f"c2al.jobs.{name.replace('-', '_')}")
            job.register("type", Path, _path)
            module.add_arguments(job)
            if name in SETTINGS:
                job.formatter_class, job.epilog = argparse.RawDescriptionHelpFormatter, help_text(SETTINGS[name])
    if not words:
        parser.print_help(sys.stderr)
        return 2
    if job_name and not job_name.startswith("-") and job_name not in JOBS:
        parser.error(f"no job '{job_name}'{hint(job_name, JOBS) or '; there are ' + ', '.join(JOBS)}")
    known, overrides = parser.parse_known_args(words)
    try:
        _refuse_uris(known)
        module.run(known, overrides)
    except C2ALError as error:
        print(f"c2al {known.job}: {redacted(str(error))}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full or read-only disk, wherever the job met it
        path = f"{error.filename}: " if error.filename else ""
        print(f"c2al {known.job}: {redacted(f'{path}{error.strerror or error}')}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:  # a path that the file system's encoding lacks
        print(
            f"c2al {known.job}: '{redacted(error.object)}' cannot be written in this locale ({error.encoding}); "
            "set PYTHONUTF8=1",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
