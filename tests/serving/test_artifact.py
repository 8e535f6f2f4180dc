"""What export writes: any batch size, held-out rows of any kind, a full disk, a run that trains, bounds."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch._inductor import config as inductor_config

from c2al.__main__ import main
from c2al.config import FMConfig, ModelConfig, parse_config
from c2al.errors import BackendError, StateError
from c2al.files import only_writer
from c2al.nn.dhen import DHEN
from c2al.serving import export
from c2al.serving.artifact import read_artifact
from c2al.serving.predict import Predictor, Program
from c2al.serving.program import Serving, save_compiled, traced
from c2al.state import write_state
from c2al.training.model import C2ALModel
from impressions import tree

ROOT = Path(__file__).parents[2]


def run_export(served: Path, output: Path, *words: str, data: Path | None = None) -> int:
    return main(
        [
            *("export", "--run", str(served / "run"), "--data", str(data or served / "data" / "test")),
            *("--output", str(output), "--variants", "float", *words),
        ]
    )


@pytest.mark.parametrize("variant", ["float", "int8"])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 700])
def test_a_program_takes_any_number_of_rows(served, raw, variant, rows):
    predictor = Predictor(served / "artifact", variant)
    few = raw.slice(40, rows)
    prediction = predictor.predict(few)
    assert (prediction.dtype, prediction.shape) == (np.float32, (rows,))
    # Alone or among others, a row has the same prediction up to the rounding of products of other sizes.
    np.testing.assert_allclose(prediction, predictor.predict(raw)[40 : 40 + rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["float", "int8"])
def test_an_empty_batch_reaches_the_program_itself(served, variant):
    program = Predictor(served / "artifact", variant).program
    empty = program(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))
    assert empty.shape == (0,)


@pytest.mark.parametrize("layout", ["paper", "wukong"])
@pytest.mark.parametrize("y", ["static", "mlp"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_fm_attention_is_served_for_any_number_of_rows(tmp_path, layout, y, precision):
    model = {"embedding_dim": 8, "layers": 2, "fm": {"k": 4, "hidden": 16, "layout": layout, "y": y}}
    model["interactions"] = ["fm_attention", "linear", "cross", "attention"]
    config = parse_config({**tree(tmp_path), "model": model, "train": {"precision": precision}})
    serving = Serving(config, C2ALModel(config, table_device="cpu", serving=True))
    program = traced(serving, dense_features=1).module()
    for rows in (0, 1, 2, 70):
        bags = torch.zeros(4 * rows, dtype=torch.int64), torch.ones(4 * rows, dtype=torch.int32)
        dense_BF = torch.randn(rows, 1)
        with torch.no_grad():
            assert torch.equal(program(dense_BF, *bags), serving(dense_BF, *bags))


def test_the_programs_hold_no_operator_of_torchrec_or_fbgemm(served):
    for name in ("model.pt2", "model_int8.pt2"):
        program = torch.export.load(served / "artifact" / name)
        spaces = {n.target.namespace for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
        assert spaces <= {"aten", "quantized"}, spaces


def test_held_out_rows_without_any_id_are_exported(served, raw, tmp_path):
    nothing = pa.array([[]] * 64, pa.list_(pa.int64()))
    (tmp_path / "data").mkdir()
    table = raw.slice(0, 64).set_column(raw.schema.get_field_index("tags"), "tags", nothing)
    pq.write_table(table, tmp_path / "data" / "a.parquet")
    assert run_export(served, tmp_path / "artifact", data=tmp_path / "data") == 0
    full = Predictor(tmp_path / "artifact").predict(raw)
    assert np.array_equal(full, Predictor(served / "artifact").predict(raw))


def test_the_proof_counts_rows_without_padding(served, raw, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    pq.write_table(raw.slice(0, 10), tmp_path / "data" / "a.parquet")
    assert run_export(served, tmp_path / "artifact", data=tmp_path / "data") == 0
    assert json.loads((tmp_path / "artifact" / "proof.json").read_text())["rows_compared"] == 10
    assert " 10 held-out predictions bit-equal" in capsys.readouterr().out


def test_held_out_rows_of_one_class_are_proved(served, raw, tmp_path):
    (tmp_path / "data").mkdir()
    ones = raw.set_column(raw.schema.get_field_index("label"), "label", pa.array([1] * raw.num_rows, pa.int8()))
    pq.write_table(ones.slice(0, 300), tmp_path / "data" / "a.parquet")
    assert run_export(served, tmp_path / "artifact", "int8", data=tmp_path / "data") == 0
    proof = read_artifact(tmp_path / "artifact").proof
    assert proof.ne is None
    assert proof.variants["int8"].ne is None
    assert 0 < abs(proof.variants["int8"].ne_change) < 1e-3


def small_files() -> None:
    """A disk with room for the small files only. Python gets an error where the signal is ignored."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_ends_export_with_the_path(served, tmp_path):
    words = ["export", "--run", served / "run", "--data", served / "data" / "test", "--output", tmp_path / "artifact"]
    done = subprocess.run(
        [sys.executable, "-m", "c2al", *map(str, words)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=small_files,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "artifact" in done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_export_reads_a_run_that_trains_without_writing(served, tmp_path):
    run = shutil.copytree(served / "run", tmp_path / "run")
    (run / "checkpoints" / ".unfinished-step-00000099").mkdir()
    with only_writer(run):
        before = {p: p.stat().st_mtime_ns for p in (run, *run.rglob("*"))}
        words = ["--run", str(run), "--data", str(served / "data" / "test"), "--output", str(tmp_path / "artifact")]
        assert main(["export", *words, "--variants", "float"]) == 0
        assert {p: p.stat().st_mtime_ns for p in (run, *run.rglob("*"))} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["int8", "--int8-ne-bound", "1e-12"], "variant 'int8' changes NE on the held-out rows by"),
        (["--int8-ne-bound", "0"], "--int8-ne-bound: must lie between 0 and 1, is 0.0"),
        (["--int8-ne-bound", "nan"], "--int8-ne-bound: must lie between 0 and 1, is nan"),
        (["--default", "nothing=3"], "--default nothing=3: no feature reads column 'nothing'"),
        (["--default", "age"], "--default age: write COLUMN=VALUE"),
        (["--default", "age=old"], "--default age=old:"),
        (["--default", "item_id=64"], "column 'item_id' is 64, outside [0, 64)"),
        (["--default", "age=1", "--default", "age=2"], "--default age=2: is there twice"),
        (["--batch-size", "3"], "export takes the run's config as it is"),
    ],
)
def test_options_of_export_that_cannot_be_followed_are_refused(served, tmp_path, capsys, words, message):
    assert run_export(served, tmp_path / "artifact", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_compiler_is_named(served, tmp_path):
    program = torch.export.load(served / "artifact" / "model.pt2")
    with (
        inductor_config.patch({"cpp.cxx": ("/no/such/compiler",)}),
        pytest.raises(BackendError, match=r"variant 'aoti' needs a C\+\+ compiler"),
    ):
        save_compiled(program, tmp_path / "a.pt2")


class OneSize(torch.nn.Module):
    """A network that works for batches of one size only."""

    own, weighted = ("a",), ()

    def forward(self, dense_BF, values, lengths):
        return dense_BF.view(3, -1).sum(1) + values.sum() + lengths.sum()


def test_a_network_of_one_batch_size_is_no_artifact():
    """torch.export's UserError is our BackendError, in one line."""
    with pytest.raises(BackendError, match="cannot make one program of this network for any number of rows: ") as e:
        traced(OneSize(), 2)
    assert "\n" not in str(e.value)


def test_a_variant_that_predicts_nan_is_refused(served, tmp_path, monkeypatch, capsys):
    """A change of NE that is NaN is above no bound: it got as far as proof.json, which holds no NaN."""
    load = export.load_program

    def load_broken(path: Path, variant: str) -> Program:
        program = load(path, variant)
        return (lambda *a: program(*a) * float("nan")) if variant == "int8" else program

    monkeypatch.setattr(export, "load_program", load_broken)
    assert run_export(served, tmp_path / "artifact", "int8") == 2
    assert "variant 'int8' changes NE on the held-out rows by +nan" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Layer(torch.nn.Module):
    """A layer of 64 fields in bfloat16, without tables."""

    def __init__(self) -> None:
        super().__init__()
        interactions = ("fm_attention", "linear")
        self.dhen = DHEN(ModelConfig(embedding_dim=64, layers=1, interactions=interactions, fm=FMConfig(k=16)), 64)

    def forward(self, x_BMD: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.dhen(x_BMD)


@pytest.mark.slow
def test_a_compiled_bfloat16_layer_of_64_fields_equals_the_plain_one(tmp_path):
    torch.manual_seed(0)
    layer, x_BMD = Layer().eval(), torch.randn(64, 64, 64)
    with torch.no_grad():
        save_compiled(torch.export.export(layer, (x_BMD,)), tmp_path / "a.pt2")
        found = torch._inductor.aoti_load_package(str(tmp_path / "a.pt2"))(x_BMD)
        torch.testing.assert_close(found.float(), layer(x_BMD).float(), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_the_compiled_variant_predicts_within_its_bound(served, raw, tmp_path):
    assert run_export(served, tmp_path / "artifact", "aoti") == 0
    compiled, plain = (Predictor(tmp_path / "artifact", v) for v in ("aoti", "float"))
    for rows in (0, 1, 2, 64, 700):
        np.testing.assert_allclose(
            compiled.predict(raw.slice(0, rows)), plain.predict(raw.slice(0, rows)), rtol=0, atol=1e-6
        )
    proof = read_artifact(tmp_path / "artifact").proof.variants["aoti"]
    assert abs(proof.ne_change) <= proof.ne_bound == 1e-5


@pytest.mark.parametrize("name", ["metadata.json", "schema.json", "proof.json", "model_int8.pt2"])
def test_a_file_that_is_gone_is_named(served, tmp_path, name):
    artifact = shutil.copytree(served / "artifact", tmp_path / "artifact")
    (artifact / name).unlink()
    with pytest.raises(StateError, match=f"{name}: no such file"):
        Predictor(artifact, "int8")


def rewritten(served: Path, output: Path, **proof: object) -> Path:
    """A copy of the artifact whose proof says something else, with the right checksum."""
    from c2al.serving.artifact import METADATA_FORMAT, PROOF_FORMAT, VERSION, Stored

    folder = shutil.copytree(served / "artifact", output)
    artifact = read_artifact(folder)
    write_state(
        folder / "proof.json", dataclasses.replace(artifact.proof, **proof), format=PROOF_FORMAT, version=VERSION
    )
    files = {**artifact.metadata.files, "proof.json": Stored.of(folder / "proof.json")}
    metadata = dataclasses.replace(artifact.metadata, files=files)
    write_state(folder / "metadata.json", metadata, format=METADATA_FORMAT, version=VERSION)
    return folder


def test_serve_check_compares_and_times(served, capsys, tmp_path):
    words = ["serve-check", "--artifact", str(served / "artifact"), "--data", str(served / "data" / "test")]
    words += ["--rounds", "2"]
    assert main([*words, "--baseline", str(served / "artifact"), "--output", str(tmp_path / "t")]) == 0
    out = capsys.readouterr().out
    for line in (
        "float",
        "int8",
        "parameters",
        "FLOPs per row",
        "program, batch 1,024, p99 ms",
        "raw rows, batch 1, p50",
    ):
        assert line in out
    same = [line.split()[-1] for line in out.splitlines() if line.startswith(("parameters", "FLOPs"))]
    assert same == ["1.000", "1.000"]
    assert (tmp_path / "t" / "serve_check.csv").read_text().startswith("variant,rows,bit-equal")
    assert main([*words, "--run", str(served / "run")]) == 0
    assert " yes " in capsys.readouterr().out


def test_serve_check_refuses_rows_that_are_not_the_proofs(served, capsys):
    words = ["serve-check", "--artifact", str(served / "artifact"), "--rounds", "1"]
    assert main([*words, "--data", str(served / "data" / "validation")]) == 2
    assert "are not those of the 2,048 rows of the proof" in capsys.readouterr().err
    assert main([*words, "--data", str(served / "data" / "test"), "--rounds", "0"]) == 2
    assert "--rounds: must be at least 1, is 0" in capsys.readouterr().err


def test_serve_check_names_a_variant_beyond_its_bound(served, tmp_path, capsys):
    proof = read_artifact(served / "artifact").proof
    strict = {**proof.variants, "int8": dataclasses.replace(proof.variants["int8"], ne_bound=1e-12)}
    artifact = rewritten(served, tmp_path / "artifact", variants=strict)
    words = ["--artifact", str(artifact), "--data", str(served / "data" / "test"), "--rounds", "1"]
    assert main(["serve-check", *words]) == 2
    assert "model_int8.pt2: differs from the training model by up to" in capsys.readouterr().err
