"""Every network that the configuration can ask for: it trains, and export keeps what the primary task needs."""

import json

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from c2al.__main__ import main
from c2al.config import load_config, replace, save_config
from c2al.distributed.checkpoint import load_unsharded
from c2al.serving.export import export
from c2al.training.model import AUXILIARY_PREFIX, C2ALModel
from impressions import write_cohorts

NETWORKS = {
    "wukong": {"preset": "wukong"},
    "dcnv2": {"preset": "dcnv2"},
    "dlrm": {"preset": "dlrm"},
    "attention-only": {"preset": "attention-only"},
    "afm": {"interactions": ["afm", "dot"], "tokens": [1, 2]},
    "mmoe": {"encoder": "mmoe", "experts.shared": 2, "experts.units": [8]},
    "ple": {"encoder": "ple", "experts.shared": 2, "experts.units": [8]},
    "ple of two levels": {"encoder": "ple", "experts.shared": 2, "experts.units": [8], "experts.levels": 2},
    "wide": {"wide": True, "encoder": "mmoe", "experts.units": [8]},
}


def settings(name: str) -> dict:
    return {f"model.{field}": value for field, value in NETWORKS[name].items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains_through_the_command_and_is_served_bit_for_bit(name, config, world, tmp_path):
    save_config(config, tmp_path / "config.toml")
    words = [f"--{path}={json.dumps(value)}" for path, value in settings(name).items()]
    words += ["--train.auxiliary_lambda=0.3", "--train.epochs=2", "--cohorts"]
    words += [str(write_cohorts(tmp_path / "cohorts.json"))]
    run = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "config.toml"), "--output", str(run), *words]) == 0
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [r["loss"] for r in lines if r["kind"] == "train"]
    assert losses[-1]["primary"] < losses[0]["primary"]
    assert losses[-1].keys() == {"primary", "head", "tail"}
    resolved = load_config(run / "config.toml")
    assert resolved == replace(config, **settings(name), **{"train.auxiliary_lambda": 0.3, "train.epochs": 2})
    proof = export(run, config.data.test, tmp_path / "artifact", world)
    newest = load_unsharded(max((run / "checkpoints").glob("step*")))
    trained = {n.removeprefix("model."): value for n, value in newest.items()}
    assert set(proof.parameters) == {n for n in trained if not n.startswith(AUXILIARY_PREFIX)} < trained.keys()
    torch.manual_seed(resolved.seed)
    before = C2ALModel(resolved, 2).over.state_dict()
    assert not [n for n, value in before.items() if torch.equal(value, trained[f"over.{n}"])], "has not moved"


@torch.no_grad()
def spoilt(model: C2ALModel, name: str, *batch) -> bool:
    """Whether the primary logit is not a number when this parameter is none."""
    parameter = model.get_parameter(name)
    value = parameter.clone()
    parameter.fill_(torch.nan)
    primary_B = model(*batch)[:, 0]
    parameter.copy_(value)
    assert primary_B.isnan().all() or not primary_B.isnan().any()
    return bool(primary_B.isnan().all())


@pytest.mark.parametrize("name", NETWORKS)
def test_served_parameters_are_those_that_the_primary_logit_depends_on(name, config):
    config = replace(config, **settings(name))
    training = C2ALModel(config, 2, "cpu")
    keys = training.over.keys
    ids, lengths = torch.arange(2 * len(keys)) % 5, torch.ones(2 * len(keys), dtype=torch.int32)
    sparse = KeyedJaggedTensor(keys=keys, values=ids, lengths=lengths)
    dense_BF = torch.randn(2, 1)
    names = [n for n, _ in training.named_parameters()]
    needed = {name for name in names if spoilt(training, name, dense_BF, sparse)}
    assert needed == {n for n in names if not n.startswith(AUXILIARY_PREFIX)}
    serving = C2ALModel(config, 2, "cpu", serving=True)
    assert needed == {n for n, _ in serving.named_parameters()}
    serving.load_state_dict({n: v for n, v in training.state_dict().items() if n in needed})
    assert torch.equal(serving(dense_BF, sparse)[:, 0], training(dense_BF, sparse)[:, 0])


def test_the_wide_part_adds_a_linear_function_to_the_primary_logit_alone(config):
    torch.manual_seed(1)
    model = C2ALModel(replace(config, **{"model.wide": True}), 2, "cpu").double()
    over, dense_BF = model.over, torch.randn(3, 1, dtype=torch.float64)
    pooled_BND = torch.randn(3, 4, 8, dtype=torch.float64)
    both = over.logits(dense_BF, pooled_BND)
    wide, over.wide = over.wide, None
    deep = over.logits(dense_BF, pooled_BND)
    rows = [
        sum(w * x for w, x in zip(wide.weight[0], [*d, *p.flatten()], strict=True))
        for d, p in zip(dense_BF, pooled_BND, strict=True)
    ]
    # Logits are float32.
    torch.testing.assert_close(both[:, 0], deep[:, 0] + torch.stack(rows).float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(both[:, 1:], deep[:, 1:])


def test_pairs_of_a_single_field_are_refused_before_anything_is_written(config, tmp_path, capsys):
    tree = replace(config, **{"data.dense": [], "data.sparse": [{"column": "user_id", "num_embeddings": 8}]})
    save_config(tree, tmp_path / "config.toml")
    words = ["--config", str(tmp_path / "config.toml"), "--output", str(tmp_path / "run"), "--model.preset=dlrm"]
    assert main(["train", *words]) == 2
    assert "model.interactions: dot multiplies pairs of fields, and a layer takes in 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
