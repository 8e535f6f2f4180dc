"""Checkpoints as files: whole or absent, kept or deleted, refused when damaged or of another model."""

import json
import os
import re
import resource
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import toy

from c2al.config import CheckpointConfig
from c2al.distributed.checkpoint import MARKER, TENSORS, CheckpointReader, CheckpointWriter, load_unsharded
from c2al.distributed.optim import make_optimizer
from c2al.distributed.process import process_group
from c2al.distributed.sharding import shard_model
from c2al.distributed.tables import local_tables
from c2al.errors import CheckpointError
from ranks import run_ranks

SYNCHRONOUS = CheckpointConfig(asynchronous=False)
FINITE = torch.ones(1)


def build(world, seed: int = 0, model: torch.nn.Module | None = None, **overrides: object):
    config = toy.config(seed=seed, **overrides)
    dmp = shard_model(model or toy.Toy(seed), config, world)
    return dmp, make_optimizer(dmp, config.train.optimizer, 100)


def weights(dmp) -> list[torch.Tensor]:
    tables = [b.weight_RD.clone() for t in local_tables(dmp) for b in t.blocks]
    return tables + [p.detach().clone() for p in dmp.module.over.parameters()]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def world():
    with process_group(toy.config().dist) as world:
        yield world


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, world, asynchronous):
    schedule = {"train__optimizer": {"warmup_steps": 3, "decay": "cosine", "clip_norm": 0.5, "weight_decay": 0.01}}
    dmp, optimizer = build(world, **schedule)
    straight = [toy.train_step(dmp, optimizer, s, 0, 1) for s in range(10)]

    first, first_optimizer = build(world, **schedule)
    losses = [toy.train_step(first, first_optimizer, s, 0, 1) for s in range(6)]
    writer = CheckpointWriter(tmp_path, CheckpointConfig(asynchronous=asynchronous), world)
    writer.save(6, first, first_optimizer, {"step": 6, "sums": [0.1, 1e-300]}, loss=FINITE)
    # Training goes on while the copy is written.
    toy.train_step(first, first_optimizer, 6, 0, 1)
    writer.wait()

    second, second_optimizer = build(world, seed=5, **schedule)
    reader = CheckpointReader(tmp_path, world)
    extra = reader.load(reader.latest(), second, second_optimizer)
    assert extra == {"step": 6, "sums": [0.1, 1e-300]}
    losses += [toy.train_step(second, second_optimizer, s, 0, 1) for s in range(6, 10)]
    assert losses == straight
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(dmp), strict=True))


def test_an_asynchronous_save_returns_before_it_is_written(tmp_path, world, monkeypatch):
    dmp, optimizer = build(world)
    gate = threading.Event()
    writer = CheckpointWriter(tmp_path, CheckpointConfig(), world)
    save = writer._save
    monkeypatch.setattr(writer, "_save", lambda *args: (gate.wait(30), save(*args)))
    writer.save(1, dmp, optimizer, {}, loss=FINITE)
    assert names(tmp_path) == []
    saved = {n: p.detach().clone() for n, p in dmp.module.named_parameters() if n.startswith("over")}
    user = local_tables(dmp)[0].blocks[0].weight_RD
    saved_user = user.clone()
    with torch.no_grad():
        for p in [user, *dmp.module.over.parameters()]:
            p.zero_()  # what training goes on to do must not reach the checkpoint
    gate.set()
    writer.wait()
    assert names(tmp_path) == ["step-00000001"]
    tensors = load_unsharded(tmp_path / "step-00000001")
    assert torch.equal(tensors["ebc.embedding_bags.user.weight"], saved_user)
    assert all(torch.equal(tensors[n], p) for n, p in saved.items())


def test_model_alone_can_be_loaded(tmp_path, world):
    dmp, optimizer = build(world)
    toy.train_step(dmp, optimizer, 0, 0, 1)
    writer = CheckpointWriter(tmp_path, SYNCHRONOUS, world)
    reader = CheckpointReader(tmp_path, world)
    assert reader.latest() is None
    writer.save(1, dmp, optimizer, {}, loss=FINITE)
    other, _ = build(world, seed=3)
    reader.load(reader.latest(), other)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(dmp), strict=True))


def test_the_last_and_the_best_are_kept(tmp_path, world):
    dmp, optimizer = build(world)
    writer = CheckpointWriter(tmp_path, CheckpointConfig(keep_last=2, keep_best=1, asynchronous=False), world)
    kept = []
    for step, ne in [(1, 0.9), (2, 0.7), (3, None), (4, 0.8), (5, 0.7), (6, 0.95)]:
        writer.save(step, dmp, optimizer, {}, loss=FINITE, ne=ne)
        kept.append([int(n.removeprefix("step-")) for n in names(tmp_path)])
    # An NE as good as the best replaces it: the later one has seen more.
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6]]
    assert CheckpointReader(tmp_path, world).latest() == tmp_path / "step-00000006"


def test_saving_a_step_again_renews_its_ne_and_extra(tmp_path, world):
    dmp, optimizer = build(world)
    writer = CheckpointWriter(tmp_path, SYNCHRONOUS, world)
    writer.save(1, dmp, optimizer, {"a": 1}, loss=FINITE)
    before = (tmp_path / "step-00000001" / "rank-00000.bin").stat().st_mtime_ns
    writer.save(1, dmp, optimizer, {"a": 2}, loss=FINITE, ne=0.5)
    reader = CheckpointReader(tmp_path, world)
    assert reader.load(reader.latest(), dmp, optimizer) == {"a": 2}
    marker = json.loads((tmp_path / "step-00000001" / MARKER).read_text())
    assert marker["ne"] == 0.5
    assert (tmp_path / "step-00000001" / "rank-00000.bin").stat().st_mtime_ns == before


def test_extra_must_be_json(tmp_path, world):
    dmp, optimizer = build(world)
    writer = CheckpointWriter(tmp_path, SYNCHRONOUS, world)
    with pytest.raises(CheckpointError, match="extra is not JSON"):
        writer.save(1, dmp, optimizer, {"tensor": torch.ones(1)}, loss=FINITE)
    assert names(tmp_path) == []


def die_at(folder: Path, event: int) -> int:
    """Saves step 3 beside 1 and 2, keeping the last only, and is SIGKILLed before the event-th change of a
    file or folder. Returns how many there were if it lives."""
    with process_group(toy.config().dist) as world:
        dmp, optimizer = build(world)
        writer = CheckpointWriter(folder, CheckpointConfig(keep_last=2, keep_best=0, asynchronous=False), world)
        for step in (1, 2):
            toy.train_step(dmp, optimizer, step, 0, 1)
            writer.save(step, dmp, optimizer, {"step": step}, loss=FINITE)
        toy.train_step(dmp, optimizer, 3, 0, 1)
        writer = CheckpointWriter(folder, CheckpointConfig(keep_last=1, keep_best=0, asynchronous=False), world)
        seen = 0

        def hook(name: str, args: tuple) -> None:
            nonlocal seen
            writes = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or name in {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}:
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        writer.save(3, dmp, optimizer, {"step": 3}, loss=FINITE)
        return seen


def reopen(folders: list[Path]) -> list[int]:
    """The step the next start continues from, in each folder."""
    steps = []
    with process_group(toy.config().dist) as world:
        for folder in folders:
            dmp, optimizer = build(world, seed=9)
            reader = CheckpointReader(folder, world)
            steps.append(reader.load(reader.latest(), dmp, optimizer)["step"])
            CheckpointWriter(folder, SYNCHRONOUS, world)
    return steps


def test_killed_before_any_file_operation_the_previous_checkpoint_loads(tmp_path):
    total = run_ranks(die_at, 1, tmp_path / "whole", 0)[0]
    assert total > 10
    folders = [tmp_path / str(event) for event in range(1, total + 1)]
    for event, folder in enumerate(folders, start=1):
        with pytest.raises(AssertionError, match="exit code -9"):
            run_ranks(die_at, 1, folder, event)
        for checkpoint in folder.glob("step-*"):
            load_unsharded(checkpoint)  # a name means a whole checkpoint
    steps = run_ranks(reopen, 1, folders)[0]
    assert set(steps) == {2, 3}
    assert steps == sorted(steps)
    assert not [n for folder in folders for n in names(folder) if not n.startswith("step-")]


def write_two(folder: Path) -> None:
    with process_group(toy.config().dist) as world:
        dmp, optimizer = build(world, dist__sharding=["row_wise"])
        CheckpointWriter(folder, SYNCHRONOUS, world).save(1, dmp, optimizer, {}, loss=FINITE)


def read_two(path: Path, dim: int, extra: bool) -> tuple[str, bool]:
    """Message of the refusal, and whether the model was left as it was."""
    with process_group(toy.config().dist) as world:
        dmp, optimizer = build(world, 4, toy.Toy(4, dim=dim, extra=extra), dist__sharding=["row_wise"])
        before = weights(dmp)
        reader = CheckpointReader(path.parent, world)
        try:
            reader.load(path, dmp, optimizer)
        except CheckpointError as e:
            return str(e), all(torch.equal(a, b) for a, b in zip(before, weights(dmp), strict=True))
        return "loaded", False


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "rank-00001.bin").unlink(), r"rank-00001\.bin: no such file"),
        (lambda p: (p / TENSORS).unlink(), r"tensors\.json: no such file"),
        (lambda p: flip(p / "rank-00000.bin"), r"rank-00000\.bin: damaged: its SHA-256 is not the one"),
        (lambda p: os.truncate(p / "rank-00001.bin", 100), r"rank-00001\.bin: damaged: 100 bytes instead of \d+"),
        (lambda p: (p / MARKER).unlink(), r"step-00000001: no finished checkpoint, complete\.json is missing"),
        (
            lambda p: (p / MARKER).write_text("{}"),
            r"complete\.json: format None, version None; this c2al reads 'checkpoint', version 2",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_on_every_rank(tmp_path, damage, message):
    run_ranks(write_two, 2, tmp_path)
    path = tmp_path / "step-00000001"
    damage(path)
    for text, untouched in run_ranks(read_two, 2, path, toy.DIM, False):
        assert re.search(message, text), text
        assert untouched
    with pytest.raises(CheckpointError, match=message):
        load_unsharded(path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_of_another_model_is_refused_with_both_shapes(tmp_path):
    run_ranks(write_two, 2, tmp_path)
    path = tmp_path / "step-00000001"
    for text, untouched in run_ranks(read_two, 2, path, 8, True):
        assert untouched
        for name, saved, wanted in (
            ("ebc.embedding_bags.user.weight", "[37, 16]", "[37, 8]"),
            ("over.0.weight", "[8, 51]", "[8, 27]"),
            ("tail.bias", "none", "[1]"),
        ):
            assert f"{path}: parameter '{name}' has shape {saved} in the checkpoint, {wanted} in the model" in text


def fill_the_disk(folder: Path) -> tuple[str, list[str], list[str]]:
    """Rank 1 cannot write more than a few KiB to a file: what a full disk looks like from there."""
    with process_group(toy.config().dist) as world:
        dmp, optimizer = build(world)
        writer = CheckpointWriter(folder, CheckpointConfig(), world)
        writer.save(1, dmp, optimizer, {}, loss=FINITE)
        writer.wait()
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        writer.save(2, dmp, optimizer, {}, loss=FINITE)
        try:
            writer.wait()
            message = "written"
        except CheckpointError as e:
            message = str(e)
        after_failure = names(folder)
        world.barrier()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        writer.save(3, dmp, optimizer, {}, loss=FINITE)
        writer.wait()
        return message, after_failure, names(folder)


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_nothing(tmp_path):
    for message, after_failure, later in run_ranks(fill_the_disk, 2, tmp_path):
        assert re.search(r"step-00000002: cannot be written: rank 1: .*(File too large|file write failed)", message), (
            message
        )
        assert after_failure == ["step-00000001"]
        assert later == ["step-00000001", "step-00000003"]


def open_unusable(folder: Path) -> str:
    with process_group(toy.config().dist) as world:
        try:
            CheckpointWriter(folder, SYNCHRONOUS, world)
        except CheckpointError as e:
            return str(e)
        return "opened"


def test_a_directory_that_cannot_be_written_is_named_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("in the way")
    first, second = run_ranks(open_unusable, 2, tmp_path / "file" / "checkpoints")
    assert first == f"{tmp_path}/file/checkpoints: cannot be used for checkpoints: Not a directory"
    assert second == f"rank 0: {first}"
