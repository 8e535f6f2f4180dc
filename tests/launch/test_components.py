"""What TorchX would start: on this host, under slurm, on kubernetes."""

from pathlib import Path

import pytest
import yaml
from torchx.runner import get_runner

from c2al.config import load_config
from c2al.distributed.process import FRESH_STORE

ROOT = Path(__file__).parents[2]
SHARED = ["train", "score", "discover", "experiment"]
ALONE = ["evaluate", "export", "predict", "serve_check"]


def dryrun(job: str, scheduler: str, options: dict, flags: list[str], words: tuple[str, ...] = ("--output", "a b")):
    with get_runner() as runner:
        arguments = [*flags, "--", *words]
        info = runner.dryrun_component(f"{ROOT}/launch/components.py:{job}", arguments, scheduler, options)
        return info.request


def command(job: str, flags: list[str]) -> tuple[str, dict[str, str]]:
    request = dryrun(job, "local_cwd", {}, flags)
    (replica,) = request.role_params[job.replace("_", "-")]
    return replica.args[-1], replica.env


@pytest.mark.parametrize("job", SHARED)
def test_a_job_runs_on_as_many_workers_as_asked(job):
    text, env = command(job, ["-j", "1x2", "--max_restarts", "7", "--log_dir", "/logs"])
    assert "--nnodes 1 --nproc_per_node 2" in text
    assert text.endswith(f"-m c2al -- {job} --output 'a b'")
    assert env[FRESH_STORE] == "1"
    assert (env["PET_MAX_RESTARTS"], env["PET_LOG_DIR"], env["OMP_NUM_THREADS"]) == ("7", "/logs", "1")


@pytest.mark.parametrize("job", ALONE)
def test_a_job_that_does_not_share_its_work_refuses_workers(job):
    text, env = command(job, [])
    assert text.endswith(f"--nproc_per_node 1 --tee 3 --role '' -m c2al -- {job.replace('_', '-')} --output 'a b'")
    assert env["PET_MAX_RESTARTS"] == "0"
    with pytest.raises(ValueError, match=f"{job.replace('_', '-')} runs as one process: -j 1x1, not 1x2"):
        command(job, ["-j", "1x2"])


def test_device_must_be_known():
    with pytest.raises(ValueError, match="device is cpu or cuda, not 'tpu'"):
        command("train", ["--device", "tpu"])


def test_slurm():
    script = dryrun(
        "train",
        "slurm",
        {"partition": "ads", "time": "12:00:00"},
        ["-j", "2x4", "--device", "cuda", "--max_retries", "5"],
    ).materialize()
    headers = [line for line in script.splitlines() if line.startswith("#SBATCH --job-name")]
    assert len(headers) == 2
    for header in headers:
        for part in ("--partition=ads", "--time=12:00:00", "--cpus-per-task=8", "--gpus-per-task=4", "--mem=65536"):
            assert part in header
    assert "--nnodes 2 --nproc_per_node 4" in script
    assert "PET_MAX_RESTARTS=3" in script
    assert "TORCHX_MAX_RETRIES=5" in script


@pytest.mark.parametrize(("device", "gpus"), [("cpu", None), ("cuda", "4")])
def test_kubernetes(device, gpus):
    request = dryrun("train", "kubernetes", {"queue": "ads"}, ["-j", "3x4", "--device", device])
    job = yaml.safe_load(str(request))
    assert job["spec"]["queue"] == "ads"
    assert len(job["spec"]["tasks"]) == 3
    for task in job["spec"]["tasks"]:
        (container,) = task["template"]["spec"]["containers"]
        assert container["image"] == f"c2al-{device}:latest"
        assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
        assert container["resources"]["limits"]["memory"] == "65536M"
        assert "--nnodes 3 --nproc_per_node 4" in container["command"][-1]
        assert {"name": "PET_MAX_RESTARTS", "value": "3"} in container["env"]


def test_kubernetes_image_can_be_chosen():
    job = yaml.safe_load(str(dryrun("score", "kubernetes", {"queue": "ads"}, ["--image", "registry/c2al@sha256:1"])))
    (task,) = job["spec"]["tasks"]
    assert task["template"]["spec"]["containers"][0]["image"] == "registry/c2al@sha256:1"


@pytest.mark.parametrize("path", sorted((ROOT / "c2al" / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    load_config(path)


def test_the_production_shape_has_26_tables():
    config = load_config(ROOT / "c2al" / "configs" / "production.toml")
    assert len({f.key for f in config.data.sparse}) == 26
    assert {t.name for t in config.dist.tables} <= {f.key for f in config.data.sparse}
