"""TorchX components: every job of c2al on one host or a cluster, with the same arguments as `c2al JOB`.

    torchx run -s local_cwd launch/components.py:train -j 1x2 -- --config C.toml --output runs/a
    torchx run -s slurm -cfg partition=P,time=24:00:00 launch/components.py:train -j 4x8 --device cuda -- ...
    torchx run -s kubernetes -cfg queue=Q --workspace "" launch/components.py:train -j 4x8 --image IMAGE -- ...

Everything after `--` is the job's. A worker that dies takes its group down, which torchrun starts
again up to `max_restarts` times; training then goes on from its last checkpoint.

TorchX reads types and docstrings of this file as written: plain types, no postponed annotations.
"""

from typing import Optional

import torchx.specs as specs
from torchx.components import dist

CPUS, MEMORY_MIB = 2, 16 * 1024
"""Of one worker."""


def train(
    *args: str,
    j: str = "1x1",
    device: str = "cpu",
    image: Optional[str] = None,  # noqa: UP045  TorchX knows no `str | None`
    max_restarts: int = 3,
    max_retries: int = 0,
    log_dir: Optional[str] = None,  # noqa: UP045
) -> specs.AppDef:
    """Trains a model; ranks share tables and batches, and a restart goes on from the last checkpoint.

    Args:
        args: arguments of `c2al train`
        j: hosts x workers per host, e.g. 2x8
        device: cpu or cuda; cuda asks for one GPU per worker
        image: container image, where the scheduler runs containers
        max_restarts: restarts of the workers on a host that lives
        max_retries: restarts of the whole job by the scheduler
        log_dir: folder for the output of every rank
    """
    return _ranks("train", args, j, device, image, max_restarts, max_retries, log_dir)


def score(
    *args: str,
    j: str = "1x1",
    device: str = "cpu",
    image: Optional[str] = None,  # noqa: UP045
    max_restarts: int = 3,
    max_retries: int = 0,
    log_dir: Optional[str] = None,  # noqa: UP045
) -> specs.AppDef:
    """Predicts with a trained model; every rank writes a part.

    Args:
        args: arguments of `c2al score`
        j: hosts x workers per host, e.g. 2x8
        device: cpu or cuda; cuda asks for one GPU per worker
        image: container image, where the scheduler runs containers
        max_restarts: restarts of the workers on a host that lives
        max_retries: restarts of the whole job by the scheduler
        log_dir: folder for the output of every rank
    """
    return _ranks("score", args, j, device, image, max_restarts, max_retries, log_dir)


def discover(
    *args: str,
    j: str = "1x1",
    image: Optional[str] = None,  # noqa: UP045
    max_restarts: int = 3,
    max_retries: int = 0,
    log_dir: Optional[str] = None,  # noqa: UP045
) -> specs.AppDef:
    """Finds the head and tail cohorts; ranks share the score files, and a restart goes on with the scan.

    Args:
        args: arguments of `c2al discover`
        j: hosts x workers per host, e.g. 2x8
        image: container image, where the scheduler runs containers
        max_restarts: restarts of the workers on a host that lives
        max_retries: restarts of the whole job by the scheduler
        log_dir: folder for the output of every rank
    """
    return _ranks("discover", args, j, "cpu", image, max_restarts, max_retries, log_dir)


def evaluate(
    *args: str,
    j: str = "1x1",
    image: Optional[str] = None,  # noqa: UP045
    max_retries: int = 0,
    log_dir: Optional[str] = None,  # noqa: UP045
) -> specs.AppDef:
    """NE, NE_diff, calibration and AUC of scored runs, in one process.

    Args:
        args: arguments of `c2al evaluate`
        j: 1x1; this job does not share its work
        image: container image, where the scheduler runs containers
        max_retries: restarts of the whole job by the scheduler
        log_dir: folder for the output
    """
    return _one_rank("evaluate", args, j, image, max_retries, log_dir)


def export(
    *args: str,
    j: str = "1x1",
    image: Optional[str] = None,  # noqa: UP045
    max_retries: int = 0,
    log_dir: Optional[str] = None,  # noqa: UP045
) -> specs.AppDef:
    """Writes and proves the serving artifact, in one process.

    Args:
        args: arguments of `c2al export`
        j: 1x1; this job does not share its work
        image: container image, where the scheduler runs containers
        max_retries: restarts of the whole job by the scheduler
        log_dir: folder for the output
    """
    return _one_rank("export", args, j, image, max_retries, log_dir)


def predict(
    *args: str,
    j: str = "1x1",
    image: Optional[str] = None,  # noqa: UP045
    max_retries: int = 0,
    log_dir: Optional[str] = None,  # noqa: UP045
) -> specs.AppDef:
    """Predicts raw rows with a serving artifact, in one process.

    Args:
        args: arguments of `c2al predict`
        j: 1x1; this job does not share its work
        image: container image, where the scheduler runs containers
        max_retries: restarts of the whole job by the scheduler
        log_dir: folder for the output
    """
    return _one_rank("predict", args, j, image, max_retries, log_dir)


def serve_check(
    *args: str,
    j: str = "1x1",
    image: Optional[str] = None,  # noqa: UP045
    max_retries: int = 0,
    log_dir: Optional[str] = None,  # noqa: UP045
) -> specs.AppDef:
    """Compares the variants of a serving artifact with the training model, and times them, in one process.

    Args:
        args: arguments of `c2al serve-check`
        j: 1x1; this job does not share its work
        image: container image, where the scheduler runs containers
        max_retries: restarts of the whole job by the scheduler
        log_dir: folder for the output
    """
    return _one_rank("serve-check", args, j, image, max_retries, log_dir)


def experiment(
    *args: str,
    j: str = "1x1",
    device: str = "cpu",
    image: Optional[str] = None,  # noqa: UP045
    max_restarts: int = 3,
    max_retries: int = 0,
    log_dir: Optional[str] = None,  # noqa: UP045
) -> specs.AppDef:
    """Baseline against C2AL over paired seeds; a restart goes on with the first unfinished stage.

    Args:
        args: arguments of `c2al experiment`
        j: hosts x workers per host, e.g. 2x8
        device: cpu or cuda; cuda asks for one GPU per worker
        image: container image, where the scheduler runs containers
        max_restarts: restarts of the workers on a host that lives
        max_retries: restarts of the whole job by the scheduler
        log_dir: folder for the output of every rank
    """
    return _ranks("experiment", args, j, device, image, max_restarts, max_retries, log_dir)


def _ranks(
    job: str,
    args: tuple[str, ...],
    j: str,
    device: str,
    image: str | None,
    max_restarts: int,
    max_retries: int,
    log_dir: str | None,
) -> specs.AppDef:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is cpu or cuda, not '{device}'")
    workers = dist.parse_nnodes(j)[2]
    environment = {
        # dist.ddp has no argument for it; torchrun reads its options from PET_ variables.
        "PET_MAX_RESTARTS": str(max_restarts),
        # Else restarted ranks may read the addresses of the dead ones and hang (c2al/distributed/process.py).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Workers that each start a thread a core slow each other down several times.
        "OMP_NUM_THREADS": str(CPUS) if device == "cuda" else "1",
    }
    if log_dir is not None:
        environment["PET_LOG_DIR"] = log_dir
    app = dist.ddp(
        "--",  # `-m c2al -- score --run R`: else torchrun takes --run for an abbreviation of an option of its own
        job,
        *args,
        m="c2al",
        name=f"/c2al-{job}",
        image=image or f"c2al-{device}:latest",
        cpu=CPUS * workers,
        gpu=workers if device == "cuda" else 0,
        memMB=MEMORY_MIB * workers,
        j=j,
        env=environment,
        max_retries=max_retries,
    )
    app.roles[0].name = job
    return app


def _one_rank(
    job: str, args: tuple[str, ...], j: str, image: str | None, max_retries: int, log_dir: str | None
) -> specs.AppDef:
    if j not in ("1x1", "1"):
        raise ValueError(f"{job} runs as one process: -j 1x1, not {j}")
    return _ranks(job, args, j, "cpu", image, 0, max_retries, log_dir)
