"""Reading checkpoints: nothing is written, nothing is run, and what is damaged or deleted is named or passed over."""

import json
import os
import pickle
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
import toy
from test_checkpoint import FINITE, SYNCHRONOUS, build, flip, names, weights

from c2al.config import CheckpointConfig
from c2al.distributed.checkpoint import MARKER, TENSORS, CheckpointReader, CheckpointWriter, load_unsharded
from c2al.distributed.checkpoint.manifest import digest_of
from c2al.distributed.process import process_group
from c2al.errors import CheckpointError
from ranks import run_ranks


@pytest.fixture
def world():
    with process_group(toy.config().dist) as world:
        yield world


@pytest.fixture
def run(tmp_path, world):
    """Checkpoints of steps 1, 2 and 3; with the model and optimizer as they were at 3."""
    dmp, optimizer = build(world)
    writer = CheckpointWriter(tmp_path, CheckpointConfig(keep_last=3, asynchronous=False), world)
    for step in (1, 2, 3):
        toy.train_step(dmp, optimizer, step, 0, 1)
        writer.save(step, dmp, optimizer, {"step": step}, loss=FINITE)
    return dmp, optimizer


def step(folder: Path, number: int) -> Path:
    return folder / f"step-{number:08d}"


def test_a_reader_leaves_the_unfinished_checkpoint_of_a_live_writer_alone(tmp_path, world, monkeypatch):
    dmp, optimizer = build(world)
    writer = CheckpointWriter(tmp_path, CheckpointConfig(), world)
    writer.save(1, dmp, optimizer, {"step": 1}, loss=FINITE)
    writer.wait()
    begun, gate = threading.Event(), threading.Event()
    checksums = writer._checksums
    monkeypatch.setattr(writer, "_checksums", lambda folder: (begun.set(), gate.wait(30), checksums(folder))[2])
    toy.train_step(dmp, optimizer, 1, 0, 1)
    writer.save(2, dmp, optimizer, {"step": 2}, loss=FINITE)
    assert begun.wait(30)
    reader = CheckpointReader(tmp_path, world)
    other, _ = build(world, seed=3)
    assert reader.with_newest(lambda path: reader.load(path, other)) == {"step": 1}
    load_unsharded(step(tmp_path, 1))
    gate.set()
    writer.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert reader.with_newest(lambda path: reader.load(path, other)) == {"step": 2}


def changes_made_by_reading(folder: Path) -> list[str]:
    """Every write, removal or rename of a file by a reader of `folder`."""
    with process_group(toy.config().dist) as world:
        dmp, optimizer = build(world)
        seen: list[str] = []

        def hook(name: str, args: tuple) -> None:
            writes = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or name in {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}:
                seen.append(f"{name} {args[0]}")

        sys.addaudithook(hook)
        reader = CheckpointReader(folder, world)
        reader.with_newest(lambda path: reader.load(path, dmp, optimizer))
        reader.with_newest(load_unsharded)
        assert CheckpointReader(folder / "absent", world).latest() is None
        return [entry for entry in seen if str(folder) in entry]


def test_a_reader_changes_no_file(tmp_path, run):
    (tmp_path / ".unfinished-step-00000004").mkdir()
    assert run_ranks(changes_made_by_reading, 1, tmp_path) == [[]]
    assert ".unfinished-step-00000004" in names(tmp_path)


def test_a_checkpoint_deleted_while_it_is_read_is_replaced_by_the_newest(tmp_path, world, run):
    dmp, optimizer = run
    reader = CheckpointReader(tmp_path, world)
    tried = []

    def action(path: Path) -> dict:
        tried.append(path.name)
        if len(tried) < 3:
            shutil.rmtree(path)
        return reader.load(path, dmp, optimizer)

    assert reader.with_newest(action) == {"step": 1}
    assert tried == ["step-00000003", "step-00000002", "step-00000001"]
    (step(tmp_path, 1) / MARKER).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000001: no finished checkpoint"):
        reader.with_newest(action)


def test_a_checkpoint_deleted_between_its_files_is_said_to_be(tmp_path, run, monkeypatch):
    path = step(tmp_path, 3)
    monkeypatch.setattr(
        "c2al.distributed.checkpoint.manifest.digest_of", lambda p: (shutil.rmtree(path), digest_of(p))[1]
    )
    with pytest.raises(CheckpointError, match="step-00000003: was deleted while it was read"):
        load_unsharded(path)


def nest(text: str) -> str:
    return text.replace('"extra": {', '"extra": {"deep": ' + "[" * 100_000 + "]" * 100_000 + ", ", 1)


DAMAGES = {
    "another program's": (lambda p: p.write_text('{"format": 1, "step": 2}'), "format 1, version None"),
    "a newer version's": (
        lambda p: p.write_text(p.read_text().replace('"version": 2', '"version": 3')),
        "format 'checkpoint', version 3",
    ),
    "half": (lambda p: os.truncate(p, p.stat().st_size // 2), "not strict JSON"),
    "empty": (lambda p: p.write_text(""), "not strict JSON"),
    "a list": (lambda p: p.write_text("[]"), "it holds no JSON object"),
    "bad UTF-8": (lambda p: p.write_bytes(b'{"format": "\xff"}'), "not UTF-8: byte 12"),
    "nested": (lambda p: p.write_text(nest(p.read_text())), "nested too deeply"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps({"step": 2})), "not UTF-8|not strict JSON"),
    "step": (lambda p: change(p, step="2"), "damaged: step: expected integer, got string '2'"),
    "negative step": (lambda p: change(p, step=-2), "damaged: step: must not be negative"),
    "huge step": (lambda p: change(p, step=10**30), "damaged: step: an integer beyond 64 bits"),
    "another step": (lambda p: change(p, step=1), r"its complete\.json is of step 1"),
    "shape": (lambda p: change(p, model={"over.0.weight": ["a"]}), r"damaged: model\.over\.0\.weight\[0\]"),
    "files": (lambda p: change(p, files=[]), "damaged: files: expected a section, got list"),
    "path": (lambda p: change(p, files={"../x": {"bytes": 1, "sha256": ""}}), r"'\.\./x' is not the plain name"),
    "optimizer": (lambda p: change(p, optimizer={}), "damaged: optimizer: has no 'steps'"),
    "unknown": (lambda p: change(p, flavour=1), "damaged: flavour: unknown key"),
}


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_manifest_blocks_nothing_and_is_named(tmp_path, world, run, damage, caplog):
    damaging, message = DAMAGES[damage]
    damaging(step(tmp_path, 2) / MARKER)
    reader = CheckpointReader(tmp_path, world)
    assert reader.latest() == step(tmp_path, 3)
    assert reader.with_newest(lambda path: reader.load(path, *run)) == {"step": 3}
    (warning,) = [
        r.getMessage() for r in caplog.records if r.name.startswith("c2al")
    ]  # once, however often the reader looks
    assert warning.startswith(f"passed over a damaged checkpoint: {step(tmp_path, 2)}")
    # The next save neither trips over it nor deletes it.
    writer = CheckpointWriter(tmp_path, CheckpointConfig(keep_last=1, keep_best=0, asynchronous=False), world)
    writer.save(4, *run, {"step": 4}, loss=FINITE)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    shutil.rmtree(step(tmp_path, 4))
    with pytest.raises(CheckpointError, match=message) as e:
        CheckpointReader(tmp_path, world).latest()
    assert str(step(tmp_path, 2)) in str(e.value)
    if damage != "another step":  # a checkpoint that is named by hand may have been copied to another name
        with pytest.raises(CheckpointError, match=message):
            load_unsharded(step(tmp_path, 2))


def test_a_damaged_newest_manifest_leaves_the_one_before_and_is_written_again(tmp_path, world, run, caplog):
    (step(tmp_path, 3) / MARKER).write_text("{")
    reader = CheckpointReader(tmp_path, world)
    assert reader.latest() == step(tmp_path, 2)
    writer = CheckpointWriter(tmp_path, CheckpointConfig(keep_last=3, asynchronous=False), world)
    writer.save(3, *run, {"step": 3}, loss=FINITE)
    assert reader.with_newest(lambda path: reader.load(path, *run)) == {"step": 3}


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def forge(path: Path, name: str, content: bytes) -> None:
    """Puts `content` into a file of a checkpoint, with the checksum that goes with it."""
    (path / name).write_bytes(content)
    files = json.loads((path / MARKER).read_text())["files"]
    change(path / MARKER, files=files | {name: {"bytes": len(content), "sha256": digest_of(path / name)}})


def test_nothing_in_a_checkpoint_is_run(tmp_path, world, run):
    """Planted pickles, with checksums that fit, in every file of a checkpoint and in those DCP would read."""
    path, gone_off = step(tmp_path, 3), tmp_path / "gone off"
    pickle.loads(pickle.dumps(Bomb(gone_off)))
    gone_off.rmdir()  # the bomb works
    bomb = pickle.dumps(Bomb(gone_off))
    reader = CheckpointReader(tmp_path, world)
    for name in (".metadata", "__0.metadata", "__0_0.distcp"):
        (path / name).write_bytes(bomb)
    assert reader.load(path, *run) == {"step": 3}
    load_unsharded(path)

    original = (path / "rank-00000.bin").read_bytes()
    for content, message in (
        (bomb, r"tensors\.json: '.*': byte \d+ is beyond the end of rank-00000\.bin"),
        (bomb + original, None),  # numbers, if wrong ones
    ):
        forge(path, "rank-00000.bin", content)
        if message is None:
            load_unsharded(path)
            reader.load(path, *run)
            continue
        with pytest.raises(CheckpointError, match=message):
            load_unsharded(path)
        with pytest.raises(CheckpointError, match=message):
            reader.load(path, *run)
    forge(path, TENSORS, bomb)
    for attempt in (lambda: load_unsharded(path), lambda: reader.load(path, *run)):
        with pytest.raises(CheckpointError, match=r"tensors\.json: not (UTF-8|strict JSON)"):
            attempt()
    assert not gone_off.exists()


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        (
            "chunks",
            [{"file": "../rank-00000.bin", "start": 0, "offset": [0, 0], "size": [37, 16]}],
            "is not one of the",
        ),
        ("chunks", [{"file": "rank-00000.bin", "start": -1, "offset": [0, 0], "size": [37, 16]}], "at -1 is not in"),
        ("chunks", [{"file": "rank-00000.bin", "start": 0, "offset": [1, 0], "size": [37, 16]}], "is not in"),
        ("chunks", [{"file": "rank-00000.bin", "start": 0, "offset": [0], "size": [37]}], "is not in"),
        ("chunks", [{"file": "rank-00000.bin", "start": 0, "offset": [0, 0], "size": [36, 16]}], "576 of 592 wanted"),
        ("chunks", [], "0 of 592 wanted values are in the checkpoint"),
        ("size", [40, 16], "is not there as|stored as"),
        ("dtype", "object", "'object' is none of float64"),
    ],
)
def test_a_wrong_place_in_tensors_json_is_refused(tmp_path, world, run, key, entry, message):
    path = step(tmp_path, 3)
    tree = json.loads((path / TENSORS).read_text())
    tree["tensors"]["model/ebc.embedding_bags.user.weight"][key] = entry
    forge(path, TENSORS, json.dumps(tree).encode())
    reader = CheckpointReader(tmp_path, world)
    for attempt in (lambda: load_unsharded(path), lambda: reader.load(path, *run)):
        with pytest.raises(CheckpointError, match=message):
            attempt()


def test_a_tensor_that_is_not_there_is_named(tmp_path, world, run):
    path = step(tmp_path, 3)
    tree = json.loads((path / TENSORS).read_text())
    del tree["tensors"]["adam/over.0.weight.exp_avg"]
    forge(path, TENSORS, json.dumps(tree).encode())
    with pytest.raises(CheckpointError, match=r"'adam/over\.0\.weight\.exp_avg' is not in the checkpoint"):
        CheckpointReader(tmp_path, world).load(path, *run)


def test_rows_are_read_in_parts(tmp_path, world, run, monkeypatch):
    dmp, _ = run
    monkeypatch.setattr("c2al.distributed.checkpoint.storage.READ_BYTES", 100)
    other, optimizer = build(world, seed=4)
    CheckpointReader(tmp_path, world).load(step(tmp_path, 3), other, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(dmp), strict=True))


def test_a_run_that_goes_on_must_have_as_many_column_blocks(tmp_path, world):
    """Row-wise Adagrad keeps one moment per row and column block."""
    split = {"dist__sharding": ["column_wise"], "dist__tables": [{"name": "user", "min_partition": 8}]}
    dmp, optimizer = build(world, **split)
    CheckpointWriter(tmp_path, SYNCHRONOUS, world).save(1, dmp, optimizer, {"step": 1}, loss=FINITE)
    reader, path = CheckpointReader(tmp_path, world), step(tmp_path, 1)
    whole, whole_optimizer = build(world, dist__sharding=["row_wise"])
    before = weights(whole)
    with pytest.raises(CheckpointError) as e:
        reader.load(path, whole, whole_optimizer, same_arithmetic=True)
    assert f"{path}: table 'user' was trained in 2 column blocks, and dist.* now splits it into 1" in str(e.value)
    assert "dist.plan" in str(e.value)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(whole), strict=True))
    assert reader.load(path, whole, whole_optimizer) == {"step": 1}  # a reader may
    assert reader.load(path, *build(world, seed=2, **split), same_arithmetic=True) == {"step": 1}


def test_a_damaged_file_of_the_newest_is_an_error_not_an_older_state(tmp_path, world, run):
    flip(step(tmp_path, 3) / "rank-00000.bin")
    reader = CheckpointReader(tmp_path, world)
    with pytest.raises(CheckpointError, match=r"step-00000003/rank-00000\.bin: damaged"):
        reader.with_newest(lambda path: reader.load(path, *run))
