import dataclasses
import re
import tomllib

import pytest

from c2al.config import dump_config, load_config, parse_config, replace, save_config
from c2al.errors import ConfigError

TREE = {
    "data": {
        "sparse": [{"column": "a", "num_embeddings": 10}],
        "dense": [{"column": 'odd "name"\\\n', "null": 0, "transforms": ["log1p", "standardise"]}],
    },
    "axes": [
        {"name": "a", "column": "a"},
        {"name": "p", "column": "q", "kind": "percentiles", "percentiles": [0, 50, 100]},
        {"name": "a_p", "kind": "cross", "cross": ["a", "p"]},
    ],
    "dist": {"tables": [{"name": "a", "sharding": ["row_wise"]}]},
}


def copy() -> dict:
    return tomllib.loads(dump_config(parse_config(TREE)))


def test_resolved_config_reloads_equal(tmp_path):
    config = parse_config(TREE, ["--train.optimizer.dense_lr", "0.01", "--train.batch_size=2048"])
    assert config.train.optimizer.dense_lr == 0.01
    assert config.train.batch_size == 2048
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"], "no temporary file is left"


def test_every_problem_is_reported_at_once_with_its_path(tmp_path):
    (tmp_path / "bad.toml").write_text(
        "sed = 1\n[data]\nlabel = 3\n[[data.sparse]]\ncolum = 'a'\nnum_embeddings = 'many'\n[model]\nnorm = 'lair'\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "bad.toml")
    text = str(caught.value)
    for expected in (
        "sed: unknown key; did you mean 'seed'?",
        "data.label: expected str, got int 3",
        "data.sparse[0].colum: unknown key; did you mean 'column'?",
        "data.sparse[0].column: missing",
        "data.sparse[0].num_embeddings: expected int, got string 'many'",
        "model.norm: 'lair' is none of 'layer', 'rms'; did you mean 'layer'?",
    ):
        assert expected in text
    assert all(line.startswith(f"{tmp_path / 'bad.toml'}: ") for line in text.splitlines())
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 100}, "train.batch_size: must be a multiple of data.shards = 8, is 100"),
        ({"train.optimizer.sparse_lr": 0.0}, "train.optimizer.sparse_lr: must be a positive number"),
        ({"train.optimizer.betas": (0.9, 1.5)}, "train.optimizer.betas: must lie in [0, 1)"),
        ({"train.optimizer.betas": (0.9,)}, "train.optimizer.betas: expected 2 values"),
        ({"model.embedding_dim": 6}, "model.embedding_dim: must be a positive multiple of 4, is 6"),
        ({"model.fields": 4}, "model.shortcut: identity needs fields = 0"),
        ({"model.interactions": ("cross", "cross")}, "model.interactions: must name each module at most once"),
        ({"discover.axes": ("aa",)}, "discover.axes: unknown axis 'aa'; did you mean 'a'?"),
        ({"data.label": "a"}, "data.sparse: column 'a' is the label"),
        ({"seed": True}, "seed: expected int, got bool True"),
        ({"train.dropout": 0.1}, "train.dropout: unknown key"),
        ({"model.dropout": float("nan")}, "model.dropout: must be finite"),
        ({"data.label.x": 1}, "'label' is not a section"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ConfigError, match=".*" + re.escape(message)):
        replace(parse_config(TREE), **changes)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ({"name": "x"}, "axes[3].column: needed by kind = 'categorical'"),
        ({"name": "x", "column": "c", "kind": "percentiles"}, "axes[3].percentiles: needed by"),
        ({"name": "x", "column": "c", "kind": "percentiles", "percentiles": [5, 95]}, "must ascend strictly from 0"),
        ({"name": "x", "kind": "cross", "cross": ["a"]}, "takes two or three axes, has 1"),
        ({"name": "x", "kind": "cross", "cross": ["a", "a_p"]}, "unknown axis 'a_p'"),
        ({"name": "a", "column": "c"}, "axes: axis 'a' is declared twice"),
    ],
)
def test_impossible_axes_are_refused(axis, message):
    tree = copy()
    tree["axes"].append(axis)
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert message in str(caught.value)


def test_overrides_that_make_no_sense(tmp_path):
    for words, message in (
        (["train"], "'train' is not an override"),
        (["--train.batch_size"], "--train.batch_size has no value"),
        (["--train.batchsize", "8"], "train.batchsize: unknown key; did you mean 'batch_size'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(copy(), words)
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="not a readable TOML file"):
        load_config(tmp_path / "broken.toml")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config(TREE).seed = 3  # type: ignore[misc]
