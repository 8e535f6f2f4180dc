"""FuxiCTR as a contender of benchmarks/train.py: the same function as the plain stack's, and skips that say why."""

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

import fuxi
from made_rows import write
from shapes import SHAPES
from stack import Over

ROOT = Path(__file__).parents[2]
SHAPE = SHAPES["tiny-wukong"]()
NAMES = (
    ("dense_arch.mlp", "dense.mlp"),
    ("dhen.layers", "layers"),
    ("interactions.linear.linear", "compress"),
    ("interactions.fm_attention.y.y_PK", "y_MK"),
    ("interactions.fm_attention.mlp", "mlp.mlp"),
    ("shortcut.linear", "shortcut"),
    ("heads.primary", "top.mlp"),
)
"""Parts of the plain stack's names -> those of fuxi.Over."""


@pytest.fixture
def _fuxictr():
    pytest.importorskip("fuxictr", reason="fuxictr is not installed: pip install 'c2al[benchmark]'")


def run(folder: Path, *words: str, path: Path = ROOT) -> str:
    """What benchmarks/train.py prints; `path` is looked in first for packages."""
    sizes = ["--rounds", "1", "--steps", "3", "--warm-up", "2", "--output", str(folder)]
    paths = [str(path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "benchmarks/train.py", *sizes, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("_fuxictr")
@pytest.mark.parametrize("name", ["tiny-wukong", "wukong-26x16"])
def test_its_layers_are_the_function_of_the_plain_stack(name):
    config = SHAPES[name]().config
    sizes = len(config.data.dense), len(config.data.sparse)
    torch.manual_seed(0)
    plain = Over(config.model, *sizes, auxiliary=False, bfloat16=False)
    theirs = fuxi.Over(config.model, *sizes)
    weights = {}
    for key, value in plain.state_dict().items():
        for ours, renamed in NAMES:
            key = key.replace(ours, renamed)
        weights[key] = value
    theirs.load_state_dict(weights)
    dense_BF = torch.randn(7, sizes[0])
    pooled_BND = torch.randn(7, sizes[1], config.model.embedding_dim)
    # The op of the plain stack may group the sums of X X^T Y otherwise: last bits of float32 sums.
    torch.testing.assert_close(theirs(dense_BF, pooled_BND), plain(dense_BF, pooled_BND), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_fuxictr")
def test_its_batches_are_the_impressions_and_its_step_trains_tables_and_layers(tmp_path):
    data = SHAPE.config.data
    write(data, 5 * SHAPE.batch, tmp_path / "data")
    fuxi.prepare(SHAPE, tmp_path)
    model, batches = fuxi.model_and_batches(SHAPE, tmp_path)
    read = list(batches)
    assert [len(batch[data.label]) for batch in read] == [SHAPE.batch] * 5
    impressions = pq.read_table(tmp_path / "data")
    for feature in data.sparse:  # ids are named anew, so what stays is how often each occurs
        ids = torch.cat([batch[feature.column] for batch in read]).long()
        assert ids.max() < feature.rows
        raw = impressions[feature.column].to_pylist()
        assert sorted(Counter(ids.tolist()).values()) == sorted(Counter(raw).values())
    labels = torch.cat([batch[data.label] for batch in read])
    assert labels.sum() == sum(impressions[data.label].to_pylist())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = model.train_step(read[0])
    assert torch.isfinite(loss)
    still = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert still == []


@pytest.mark.usefixtures("_fuxictr")
def test_it_has_a_row_beside_the_plain_stack(tmp_path):
    run(tmp_path, "--shapes", "tiny-wukong", "--precision", "float32", "--contenders", "plain", "fuxictr")
    rows = list(csv.DictReader((tmp_path / "train.csv").open()))
    assert [row["contender"] for row in rows] == ["plain", "fuxictr"]
    for name in ("samples_per_second", "samples_per_cpu_second", "peak_mib", "start_seconds", "over_plain"):
        assert float(rows[1][name]) > 0, name
    assert "fuxictr" in rows[1]["versions"]


@pytest.mark.usefixtures("_fuxictr")
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_shape_or_precision_without_its_model_is_named(name):
    reason = fuxi.reason_to_skip(SHAPES[name](), bfloat16=False)
    assert (reason == "") == ("wukong" in name)
    assert reason == "" or "whose layers are fm_attention" in reason
    assert fuxi.reason_to_skip(SHAPES[name](), bfloat16=True)


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fuxictr", None)
    assert "pip install 'c2al[benchmark]'" in fuxi.reason_to_skip(SHAPE, bfloat16=False)


def test_a_package_that_cannot_be_imported_is_skipped_with_its_words_and_replaces_no_table(tmp_path):
    (tmp_path / "site" / "fuxictr").mkdir(parents=True)
    (tmp_path / "site" / "fuxictr" / "__init__.py").write_text("import h5py_that_is_missing\n", encoding="utf-8")
    (tmp_path / "train.csv").write_text("earlier\n", encoding="utf-8")
    words = ["--shapes", "tiny-wukong", "--precision", "float32", "--contenders", "fuxictr"]
    printed = run(tmp_path, *words, path=tmp_path / "site")
    assert "tiny-wukong float32 fuxictr: skipped: fuxictr cannot be imported: No module named 'h5py" in printed
    assert (tmp_path / "train.csv").read_text(encoding="utf-8") == "earlier\n"
