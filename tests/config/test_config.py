import dataclasses
import re
import tomllib
from typing import Any

import pytest
from torch import nn

from c2al.config import dump_config, load_config, parse_config, redacted_config, replace, save_config
from c2al.config.names import TAKEN
from c2al.config.reference import words as in_words
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
        "data.label: expected string, got integer 3",
        "data.sparse[0].colum: unknown key; did you mean 'column'?",
        "data.sparse[0].column: missing",
        "data.sparse[0].num_embeddings: expected integer, got string 'many'",
        "model.norm: 'lair' is none of 'layer', 'rms', 'none'; did you mean 'layer'?",
    ):
        assert expected in text
    assert all(line.startswith(f"{tmp_path / 'bad.toml'}: ") for line in text.splitlines())
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"name": "a" * 300}, "arms[0].name: names folders, so it may have 128 characters"),
        ({"name": "a", "select": {"train.auxiliary_lambda": [0.1, 0.3, 0.1]}}, "every value must be there once"),
        ({"name": "a", "select": {"model": {"head_hidden": [[8], [8]]}}}, "'model.head_hidden': every value must be"),
    ],
)
def test_an_arm_that_no_folder_could_hold_is_refused_before_the_baseline_trains(arm, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config({**TREE, "arms": [arm]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 100}, "train.batch_size: must be a multiple of data.shards = 8, is 100"),
        ({"discover.max_cohorts": 8193}, "discover.max_cohorts: must be at most 8192, is 8193"),
        ({"train.optimizer.sparse_lr": 0.0}, "train.optimizer.sparse_lr: must be a positive number"),
        ({"train.optimizer.betas": (0.9, 1.5)}, "train.optimizer.betas: must lie in [0, 1)"),
        ({"train.optimizer.betas": (0.9,)}, "train.optimizer.betas: expected 2 values"),
        ({"model.embedding_dim": 6}, "model.embedding_dim: must be a positive multiple of 4, is 6"),
        ({"model.fields": 4}, "model.shortcut: identity needs fields = 0"),
        ({"model.interactions": ("cross", "cross")}, "model.interactions: must name each module at most once"),
        ({"discover.axes": ("aa",)}, "discover.axes: unknown axis 'aa'; did you mean 'a'?"),
        ({"data.label": "a"}, "data.sparse: column 'a' is the label"),
        ({"seed": True}, "seed: expected integer, got boolean True"),
        ({"train.dropout": 0.1}, "train.dropout: unknown key"),
        ({"model.dropout": float("nan")}, "model.dropout: must be finite"),
        ({"data.label.x": 1}, "'label' is not a section"),
        ({"data.label": ""}, "data.label: must name a column"),
        ({"data.sparse": (), "data.train": ("x",)}, "data.sparse: at least one sparse feature is needed"),
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
        ({"name": "x", "kind": "cross", "cross": ["a", "a_p"]}, "axis 'a_p' is a cross itself; name its axes instead"),
        ({"name": "a", "column": "c"}, "axes: axis 'a' is declared twice"),
        ({"name": "", "column": "c"}, "axes[3].name: must not be empty"),
    ],
)
def test_impossible_axes_are_refused(axis, message):
    tree = copy()
    tree["axes"].append(axis)
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("dist", "message"),
    [
        ({"kernels": []}, "dist.kernels: must name at least one kernel"),
        ({"cache_load_factor": 1.0}, "dist.cache_load_factor: must be in (0, 1), is 1.0"),
        ({"sharding": ["data_parallel"], "kernels": ["fused_uvm_caching"]}, "dist.kernels: data_parallel tables"),
        (
            {"sharding": ["data_parallel", "data_parallel"], "kernels": ["fused_uvm_caching"]},
            "dist.kernels: data_parallel tables",
        ),
        (
            {"sharding": ["data_parallel"], "tables": [{"name": "t", "kernels": ["fused_uvm_caching"]}]},
            "dist.tables[0].kernels: table 't' is data_parallel, as dist.sharding says",
        ),
        ({"hbm_gib": 1e300}, "dist.hbm_gib: must be 0 or in [1e-09, 1e+09], is 1e+300"),
        ({"ddr_gib": 1e300}, "dist.ddr_gib: must be 0 or in"),
        ({"within_host_gib_s": 1e-300}, "dist.within_host_gib_s: must be 0 or in"),
        (
            {"tables": [{"name": "t", "min_partition": 2}]},
            "min_partition: must be 0 or at least 4, is 2",
        ),
        ({"tables": [{"name": "t", "cache_load_factor": -0.1}]}, "dist.tables[0].cache_load_factor: must be in [0, 1)"),
        ({"tables": [{"name": "t", "cache_load_factor": 0.5}]}, "table 't' has no cache: dist.kernels does not name"),
        (
            {"tables": [{"name": "t", "kernels": ["fused"], "cache_load_factor": 0.5}]},
            "dist.tables[0].cache_load_factor: table 't' has no cache: its kernels do not name fused_uvm_caching",
        ),
        (
            {"tables": [{"name": "t", "sharding": ["data_parallel"], "kernels": ["fused_uvm_caching"]}]},
            "dist.tables[0].kernels: table 't' is data_parallel",
        ),
    ],
)
def test_a_placement_that_cannot_be_is_refused(dist, message):
    tree = copy() | {"dist": dist}
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["a", "a"], "axes[4].cross: names axis 'a' twice"),
        (["a", "none"], "axes[4].cross: unknown axis 'none'"),
        (["p", "a", "again"], "axes[4].cross: axes 'a' and 'again' are both on column 'a'"),
        (["a", "a_p"], "axes[4].cross: axis 'a_p' is a cross itself; name its axes instead"),
    ],
)
def test_a_cross_of_an_axis_with_itself_is_refused_by_its_own_name(parts, message):
    tree = copy()
    tree["axes"] += [{"name": "again", "column": "a"}, {"name": "x", "kind": "cross", "cross": parts}]
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert str(caught.value).startswith(f"config: {message}")
    assert len(caught.value.problems) == 1


def sparse(**feature) -> dict:
    return {"data": {"sparse": [{"num_embeddings": 10, **feature}]}}


def test_names_that_torch_refuses_for_a_table_are_refused_with_the_way_out():
    # torch.compile leaves a mark with three underscores on nn.Module, which a fresh process does not have.
    torch_has = [n for n in dir(nn.ModuleDict()) if not n.startswith("___")]
    assert {n for n in torch_has if not n.startswith("__")} == TAKEN, "c2al/config/names.py is of another torch"
    for name in [*torch_has, "user.id"]:
        with pytest.raises(KeyError):
            nn.ModuleDict({name: nn.Identity()})
        for field, feature in (("column", {"column": name}), ("name", {"column": "c", "name": name})):
            with pytest.raises(ConfigError) as caught:
                parse_config(sparse(**feature))
            assert f"data.sparse[0].{field}: '{name}' " in str(caught.value)
        (way_out,) = re.findall(r"name = '(.*)'$", str(caught.value))
        assert parse_config(sparse(column=name, name=way_out)).data.sparse[0].key == way_out
    with pytest.raises(ConfigError, match=r"data\.sparse\[0\]\.column: must not be empty"):
        parse_config(sparse(column=""))


@pytest.mark.parametrize("name", ["typ", "Zürich 東京", "_", "a-b", "weight", "embedding_bags", "a/b"])
def test_names_that_torch_takes_are_taken(name):
    nn.ModuleDict({name: nn.Identity()})
    assert parse_config(sparse(column=name)).data.sparse[0].key == name


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path):
    config = parse_config(TREE)
    (tmp_path / "bom.toml").write_bytes(dump_config(config).replace("\n", "\r\n").encode("utf-8-sig"))
    assert load_config(tmp_path / "bom.toml") == config


@pytest.mark.parametrize("content", [b"a = [", b"a = '\xff'", b"a = " + b"9" * 5000, b"a = " + b"[" * 5000, b"\x00"])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "broken.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml: not a readable TOML file"):
        load_config(tmp_path / "broken.toml")


def test_a_folder_or_an_unreadable_path_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="not a readable TOML file: Is a directory"):
        load_config(tmp_path)


def test_any_value_survives_saving_and_overriding(tmp_path):
    words = {
        "data.label": 'it\'s "quoted" \\ \t\n\x7f 東京 \U0001f600 = [1]',
        "data.train": ["a'b", "s3://bucket/[x]/**", ""],
        "train.optimizer.sparse_eps": 1e-300,
        "seed": 2**63 - 1,
        "train.optimizer.betas": [0.1, 1e-9],
        "axes": [{"name": "é", "column": "x", "kind": "edges", "edges": [-1e300, 0.5]}],
        "dist.plan": "",
    }
    config = replace(parse_config(TREE), **words)
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config
    overrides = [f"--data.label={words['data.label']}", "--seed", "7", "--axes", "[]", "--data.test", "['x']"]
    again = load_config(tmp_path / "config.toml", overrides)
    assert (again.data.label, again.seed, again.axes, again.data.test) == (words["data.label"], 7, (), ("x",))
    save_config(again, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == again


def test_a_saved_config_holds_no_secrets_and_equals_the_redacted_one(tmp_path):
    secrets = ["AKIA", "s3cr3t", "sl/ash", "at@sign", "t0ken"]
    uris = [
        "s3://AKIA:s3cr3t@b/x?region=eu",
        "s3://AKIA:sl/ash@b/x",
        "s3://AKIA:at@sign@b/x",
        "gs://b/x?sas_token=t0ken",
    ]
    config = replace(parse_config(TREE), **{"data.train": uris, "data.test": ["hdfs://host:8020/u/a@b", "s3://b/a@b"]})
    save_config(config, tmp_path / "config.toml")
    text = (tmp_path / "config.toml").read_text(encoding="utf-8")
    assert not [s for s in secrets if s in text]
    saved = load_config(tmp_path / "config.toml")
    assert saved == redacted_config(config) == redacted_config(saved) != config
    assert saved.data.train == ("s3://***@b/x?region=eu", "s3://***@b/x", "s3://***@b/x", "gs://b/x?sas_token=***")
    assert saved.data.test == config.data.test


def test_overrides_that_make_no_sense(tmp_path):
    for words, message in (
        (["train"], "'train' is not an override"),
        (["--train.batch_size"], "--train.batch_size has no value"),
        (["--train.batchsize", "8"], "train.batchsize: unknown key; did you mean 'batch_size'?"),
        (["--seed", "1", "--seed=2"], "command line: --seed is given twice"),
        (
            ["--axes.0.name", "b"],
            "axes.0.name: 'axes' is a list, which an override replaces as a whole: --axes='[...]'",
        ),
        (["--data.sparse.a", "b"], "data.sparse.a: 'data.sparse' is a list"),
        (["--seed", "1\nx = 2"], "seed: expected integer, got string"),
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


def test_a_fault_is_blamed_on_where_it_was_written(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("sed = 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--train.batchsize", "5"])
    assert {p for p in caught.value.problems if "unknown key" in p} == {
        f"command line (over {path}): train.batchsize: unknown key; did you mean 'batch_size'?",
        f"{path}: sed: unknown key; did you mean 'seed'?",
    }


def test_a_dictionary_of_anything_is_a_section_in_words():
    assert in_words(dict[str, Any]) == "section"
