"""What is saved is good: finite in its own step and labelled by its own NE. An error beside a write leaves in order."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from test_checkpoint import FINITE, SYNCHRONOUS, build, names

from c2al.config import CheckpointConfig
from c2al.distributed.checkpoint import MARKER, CheckpointReader, CheckpointWriter
from c2al.distributed.process import process_group
from c2al.distributed.tables import local_tables
from c2al.errors import TrainingError
from ranks import run_ranks


@pytest.fixture
def world():
    with process_group(toy.config().dist) as world:
        yield world


def save_a_loss_that_is_not_finite(folder: Path, asynchronous: bool) -> tuple[str, list[str]]:
    with process_group(toy.config().dist) as world:
        dmp, optimizer = build(world)
        writer = CheckpointWriter(folder, CheckpointConfig(keep_last=1, asynchronous=asynchronous), world)
        writer.save(1, dmp, optimizer, {}, loss=FINITE)
        loss_T = torch.tensor([0.5, float("nan") if world.rank == 1 else 0.5])
        try:
            writer.save(2, dmp, optimizer, {}, loss=loss_T)
            writer.wait()
        except TrainingError as e:
            return str(e), names(folder)
        return "saved", names(folder)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_step_whose_loss_is_not_finite_on_one_rank_is_not_saved_on_any(tmp_path, asynchronous):
    first, second = run_ranks(save_a_loss_that_is_not_finite, 2, tmp_path, asynchronous)
    assert second == (
        f"{tmp_path}: step 2 is not saved: its loss is not finite; the last good checkpoint is "
        f"{tmp_path}/step-00000001",
        ["step-00000001"],
    )
    assert first == (f"rank 1: {second[0]}", second[1])


def save_values_that_are_not_finite(folder: Path, where: str, asynchronous: bool) -> tuple[str, list[str]]:
    """The last rank has an infinite value in its part of the state."""
    with process_group(toy.config().dist) as world:
        dmp, optimizer = build(world, dist__sharding=["row_wise"])
        writer = CheckpointWriter(folder, CheckpointConfig(keep_last=1, asynchronous=asynchronous), world)
        writer.save(1, dmp, optimizer, {}, loss=FINITE)
        writer.wait()
        block = local_tables(dmp)[0].blocks[0]
        tensors = {
            "table": block.weight_RD,
            "moment": block.moment_R,
            "dense": dict(dmp.module.named_parameters())["over.0.weight"].detach(),
            "adam": optimizer.dense_state()["over.0.weight.exp_avg_sq"],
        }
        if world.rank == 1 or where in ("dense", "adam"):
            tensors[where].view(-1)[-1] = float("inf")
        try:
            writer.save(2, dmp, optimizer, {}, loss=FINITE)
            writer.wait()
        except TrainingError as e:
            return str(e), names(folder)
        return "saved", names(folder)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("where", "key"),
    [
        ("table", "model/ebc.embedding_bags.user.weight"),
        ("moment", "moment/ebc.embedding_bags.user.weight/0-16"),
        ("dense", "model/over.0.weight"),
        ("adam", "adam/over.0.weight.exp_avg_sq"),
    ],
)
def test_a_state_that_is_not_finite_is_not_saved_and_the_parameter_named(tmp_path, where, key, asynchronous):
    for message, left in run_ranks(save_values_that_are_not_finite, 2, tmp_path, where, asynchronous):
        assert f"step 2 is not saved: values of {key} are not finite; the last good checkpoint is" in message
        assert left == ["step-00000001"]


def test_a_step_saved_again_without_an_ne_keeps_its_own(tmp_path, world):
    dmp, optimizer = build(world)
    writer = CheckpointWriter(tmp_path, SYNCHRONOUS, world)
    writer.save(1, dmp, optimizer, {}, loss=FINITE, ne=0.5)
    writer.save(1, dmp, optimizer, {}, loss=FINITE)
    writer.save(2, dmp, optimizer, {}, loss=FINITE)
    ne = {path.name: manifest.ne for path, manifest in CheckpointReader(tmp_path, world).finished()}
    assert ne == {"step-00000001": 0.5, "step-00000002": None}
    assert json.loads((tmp_path / "step-00000002" / MARKER).read_text())["ne"] is None


LEAVE = """
import sys, time
sys.path[:0] = [{here!r}, {tests!r}]
from pathlib import Path
import toy
from test_checkpoint import FINITE, build
from c2al.__main__ import main
from c2al.config import CheckpointConfig
from c2al.distributed.checkpoint import CheckpointWriter
from c2al.distributed.checkpoint.storage import RawWriter
from c2al.distributed.process import process_group
from c2al.errors import C2ALError, DataError

write = RawWriter.write_data
RawWriter.write_data = lambda *args: (time.sleep(1), write(*args))[1]
try:
    with process_group(toy.config().dist) as world:
        dmp, optimizer = build(world)
        writer = CheckpointWriter(Path({folder!r}), CheckpointConfig(), world)
        writer.save(1, dmp, optimizer, {{}}, loss=FINITE)
        raise DataError("part-0.parquet: column 'age' has a null")
except C2ALError as e:
    print(e, file=sys.stderr)
    sys.exit(e.exit_code)
"""


def test_an_error_while_a_checkpoint_is_written_ends_the_process_with_its_own_exit_code(tmp_path):
    here = Path(__file__).parent
    script = LEAVE.format(here=str(here), tests=str(here.parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "part-0.parquet: column 'age' has a null"
    assert names(tmp_path) == ["step-00000001"]  # whole, since there was time
