"""`c2al describe` against counts by hand."""

import csv
import io

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from c2al.__main__ import main
from c2al.config import parse_config, replace, save_config
from c2al.training.describe import describe
from c2al.training.model import C2ALModel, OverArch
from c2al.training.trainer import train
from impressions import write_cohorts

# 3 tables of 4 dims, 2 dense features -> 1 token: 4 fields of 4 dims, h has 16 features.
TINY = {
    "data": {
        "sparse": [{"column": c, "num_embeddings": n, "encoding": "identity"} for c, n in zip("abc", (5, 7, 9))],  # noqa: B905
        "dense": [{"column": "d"}, {"column": "e"}],
    },
    "model": {
        "embedding_dim": 4,
        "dense_hidden": [3],
        "layers": 1,
        "interactions": ["linear", "dot"],
        "encoder": "mmoe",
        "wide": True,
        "experts": {"shared": 2, "units": [5]},
        "head_hidden": [6],
    },
}


def linear(inputs: int, outputs: int, bias: bool = True) -> tuple[int, int]:
    """Parameters and forward FLOPs of a row."""
    return inputs * outputs + outputs * bias, 2 * inputs * outputs


def test_weighted_tables_and_projections_are_counted():
    tree = {**TINY, "data": {**TINY["data"], "sparse": [dict(f) for f in TINY["data"]["sparse"]]}}
    a, b, _ = tree["data"]["sparse"]
    a |= {"weights": "a_weights", "max_length": 3}
    b["dim"] = 8
    model = describe(parse_config(tree), 2)
    assert [(t.name, t.output, t.parameters) for t in model.tables] == [
        ("ebc.b", "(B, 8)", 8 * 7),
        ("ebc.c", "(B, 4)", 4 * 9),
        ("weighted_ebc.a", "(B, 4)", 4 * 5),
    ]
    (projection,) = [layer for layer in model.layers if layer.name == "over.projections.b"]
    forward = 2 * 8 * 4
    assert (projection.output, projection.training, projection.serving) == ("(B, 1, 4)", 3 * forward, forward)
    assert projection.served


def test_every_count_is_that_of_the_hand():
    model = describe(parse_config(TINY), 2)
    rows = {layer.name: (layer.output, layer.parameters, layer.training, layer.serving) for layer in model.layers}

    def expected(output, *parts, grad_to_input=True, served=True, extra=0, extra_backward=0):
        """Backward costs twice the forward pass: gradients of the weight and of the input."""
        parameters, forward = (sum(p[i] for p in parts) for i in (0, 1))
        backward = 2 * forward - (0 if grad_to_input else parts[0][1])
        return (output, parameters, forward + extra + backward + extra_backward, forward + extra if served else 0)

    mixture = 2 * 2 * 5  # softmax weights of 2 experts times their 5 features
    assert rows == {
        # No gradient reaches the dense features.
        "over.dense_arch": expected("(B, 1, 4)", linear(2, 3), linear(3, 4), grad_to_input=False),
        # Maps of the 4 fields act on each of the 4 dimensions.
        "over.dhen.layers.0.interactions.linear": expected("(B, 4, 4)", (4 * 4 + 4, 4 * 2 * 4 * 4)),
        # 16 products of 4 dims, each way; 6 pairs to 16 numbers.
        "over.dhen.layers.0.interactions.dot": expected(
            "(B, 4, 4)", linear(6, 16), extra=2 * 16 * 4, extra_backward=2 * 2 * 16 * 4
        ),
        "over.dhen.layers.0.concat": expected("(B, 4, 4)", (8 * 4 + 4, 4 * 2 * 8 * 4)),
        "over.dhen.layers.0.norm": ("(B, 4, 4)", 8, 0, 0),
        "over.encoder.experts.0": expected("(B, 5)", linear(16, 5)),
        "over.encoder.experts.1": expected("(B, 5)", linear(16, 5)),
        "over.encoder.primary": expected(
            "(B, 5)", linear(16, 2, bias=False), extra=mixture, extra_backward=2 * mixture
        ),
        "over.encoder.auxiliary.0": expected(
            "(B, 5)", linear(16, 2, bias=False), extra=mixture, extra_backward=2 * mixture, served=False
        ),
        "over.encoder.auxiliary.1": expected(
            "(B, 5)", linear(16, 2, bias=False), extra=mixture, extra_backward=2 * mixture, served=False
        ),
        "over.wide": expected("(B, 1)", linear(14, 1, bias=False)),
        "over.heads.primary": expected("(B, 1)", linear(5, 6), linear(6, 1)),
        "over.heads.auxiliary.0": expected("(B, 1)", linear(5, 1), served=False),
        "over.heads.auxiliary.1": expected("(B, 1)", linear(5, 1), served=False),
    }
    assert [(t.name, t.output, t.parameters, t.bytes) for t in model.tables] == [
        (f"ebc.{c}", "(B, 4)", 4 * n, 16 * n) for c, n in zip("abc", (5, 7, 9), strict=True)
    ]
    totals = {t.name: (t.parameters, t.bytes) for t in model.totals}
    dropped = 2 * (32 + 6)
    assert totals["embedding tables"] == (84, 336)
    assert totals["dropped by export"] == (dropped, 4 * dropped)
    whole = sum(row[1] for row in rows.values()) + 84
    assert totals["in training"] == (whole, 4 * whole)
    assert totals["served"] == (whole - dropped, 4 * (whole - dropped))


VARIANTS = [
    {},
    {"preset": "wukong"},
    {"preset": "dcnv2"},
    {"preset": "attention-only"},
    {"encoder": "ple", "experts.levels": 3, "wide": True},
    {"interactions": ["afm", "fm_attention"], "fm.y": "static", "fm.layout": "wukong"},
]


@pytest.mark.parametrize("change", VARIANTS)
def test_the_layers_add_up_to_the_model(change, config):
    """Real tensors, one count over the whole model: no layer is forgotten and none counted twice."""
    config = replace(config, **{f"model.{k}": v for k, v in change.items()})
    description = describe(config, 2)
    over, serving = OverArch(config, 2), OverArch(config, 2, serving=True)
    dense_BF, pooled_BND = torch.randn(1, 1), torch.randn(1, 4, 8, requires_grad=True)
    with FlopCounterMode(display=False) as trained:
        over.logits(dense_BF, pooled_BND).sum().backward()
    with FlopCounterMode(display=False) as served, torch.no_grad():
        serving.logits(dense_BF, pooled_BND)
    tables, above, every, kept, _ = description.totals
    assert (tables.training, above.training, above.serving) == (0, trained.get_total_flops(), served.get_total_flops())
    assert above.parameters == sum(p.numel() for p in over.parameters())
    assert every.parameters == sum(p.numel() for p in C2ALModel(config, 2).parameters())
    assert kept.parameters == sum(p.numel() for p in C2ALModel(config, 2, serving=True).parameters())


def test_serving_costs_what_the_baseline_costs(config):
    for encoder in ("shared-bottom", "mmoe", "ple"):
        own = replace(config, **{"model.encoder": encoder})
        (without, with_) = (describe(own, n) for n in (0, 3))
        served = [(t.parameters, t.serving) for t in (without.totals[3], with_.totals[3])]
        assert served[0] == served[1] == (without.totals[2].parameters, without.totals[2].serving)
        assert with_.totals[2].training > without.totals[2].training


def test_the_command_says_it_for_a_config_its_arms_and_a_run(config, world, tmp_path, capsys):
    arms = [
        {"name": "mmoe", "cohorts": "chosen", "overrides": {"model.encoder": "mmoe"}},
        {"name": "half", "cohorts": "one"},
        {"name": "mine", "cohorts": "file", "file": str(write_cohorts(tmp_path / "cohorts.json"))},
        {"name": "dro", "overrides": {"train.auxiliary_lambda": 0.0, "train.group_dro": 0.1}},
        {"name": "grid", "cohorts": "one", "select": {"train.auxiliary_lambda": [0.1, 0.3]}},
    ]
    path = tmp_path / "config.toml"
    save_config(replace(config, arms=arms), path)
    assert main(["describe", "--config", str(path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("2 auxiliary cohorts\n")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    baseline = describe(config, 0).totals[2]
    assert rows["baseline"] == [
        "0",
        *(f"{n:,}" for n in (baseline.parameters,) * 2),
        *(f"{n:,}" for n in (baseline.training, baseline.serving)),
    ]
    assert {name: rows[name][0] for name in ("mmoe", "half", "mine")} == {"mmoe": "2", "half": "1", "mine": "2"}
    # Cohorts that only weigh the primary loss have no prediction heads.
    assert rows["dro"] == rows["baseline"]
    assert rows["grid"] == rows["half"]
    assert rows["half"][2] == rows["mine"][2] == rows["baseline"][2] != rows["mmoe"][2]

    assert main(["describe", "--config", str(path), "--cohorts", "3", "--csv", "--model.layers=1"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["layer"] for line in lines if line["served"] == "no"] == [
        f"over.heads.auxiliary.{i}" for i in range(3)
    ]
    described = describe(replace(config, **{"model.layers": 1}), 3)
    assert sum(int(line["FLOPs training"]) for line in lines) == described.totals[2].training

    train(
        replace(config, **{"train.auxiliary_lambda": 0.3, "train.max_steps": 1}),
        tmp_path / "run",
        world,
        tmp_path / "cohorts.json",
    )
    assert main(["describe", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "layers.txt")]) == 0
    assert (tmp_path / "layers.txt").read_text(
        encoding="utf-8"
    ) == f"2 auxiliary cohorts\n{describe(config, 2).table()}\n"

    # What export says of the same run is the same count.
    capsys.readouterr()
    words = ["--run", str(tmp_path / "run"), "--data", *config.data.test, "--output", str(tmp_path / "artifact")]
    assert main(["export", *words]) == 0
    served = describe(config, 2).totals[3].parameters
    assert f" {served:,} parameters, none of them auxiliary" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cohorts", "-1"], "--cohorts: must not be negative, is -1"),
        (["--model.encoder", "moe"], "model.encoder: 'moe' is none of 'shared-bottom', 'mmoe', 'ple'"),
        (["--model.encoder", "mmoe", "--model.experts.levels", "2"], "model.experts.levels: more than 1 goes with"),
        (["--model.experts.units", "[]"], "model.experts.units: must not be empty"),
    ],
)
def test_what_cannot_be_described_is_refused(words, message, config, tmp_path, capsys):
    save_config(config, tmp_path / "config.toml")
    assert main(["describe", "--config", str(tmp_path / "config.toml"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_is_described_as_it_is(tmp_path, capsys):
    assert main(["describe", "--run", str(tmp_path), "--cohorts", "2"]) == 2
    assert "--run is described as it is" in capsys.readouterr().err
    assert main(["describe", "--run", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def planned_rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}


@pytest.mark.parametrize("hosts", [1, 8, 32])
def test_tables_are_planned_for_gpus_that_are_not_there(hosts, config, tmp_path, capsys):
    """8, 64 and 256 GPUs: each table's bytes are held once, whatever the number of ranks."""
    save_config(config, tmp_path / "config.toml")
    config = replace(config, **{"data.shards": 8 * hosts, "train.batch_size": 16 * hosts})
    words = ["--ranks", f"{hosts}x8", "--dist.device", "cuda", "--dist.hbm_gib", "80", "--data.shards", str(8 * hosts)]
    words += ["--train.batch_size", str(16 * hosts)]
    assert main(["describe", "--config", str(tmp_path / "config.toml"), *words]) == 0
    text = capsys.readouterr().out
    rows = planned_rows(text)
    for table, features in config.data.tables.items():
        size = features[0].rows * (config.model.embedding_dim + 1) * 4  # a moment per row
        assert rows[table][-1] == f"{size:,}", table
    shown = f"rank {8 * hosts - 1}:" if hosts == 1 else f"{8 * hosts} ranks:"
    assert shown in text
    assert f"per forward pass of {max(config.train.batch_size // (8 * hosts), 1)} rows per rank" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "8"], "--ranks: expected HOSTSxRANKS, e.g. 8x8, is '8'"),
        (["--ranks", "0x8"], "--ranks: expected HOSTSxRANKS"),
        (["--ranks", "1x8", "--csv"], "--csv: is of the layers"),
        (
            ["--ranks", "1x3"],
            "data.shards: 8 cannot be dealt to 3 ranks",
        ),
        (["--ranks", "1x3", "--dist.local_world_size", "2"], "3 ranks are not a multiple of 2 ranks per host"),
        (["--ranks", "1x2", "--dist.ddr_gib", "0.000001"], "no sharding plan fits 2 ranks with dist.ddr_gib = 1e-06"),
        pytest.param(
            ["--ranks", "1x8", "--dist.device", "cuda"],
            "dist.hbm_gib: must be set to plan for GPUs where none is to be asked",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU here is asked"),
        ),
        (["--ranks", "1x8", "--dist.device", "cuda", "--dist.hbm_gib", "0.000001"], "no sharding plan fits 8 ranks"),
        (
            ["--ranks", "1x8", "--dist.device", "cuda", "--dist.hbm_gib", "0.000001"],
            "dist.kernels = ['fused', 'fused_uvm_caching'] lets tables lie in host memory",
        ),
    ],
)
def test_ranks_that_cannot_be_planned_for_are_refused(words, message, config, tmp_path, capsys):
    save_config(config, tmp_path / "config.toml")
    assert main(["describe", "--config", str(tmp_path / "config.toml"), *words]) == 2
    assert message in capsys.readouterr().err
