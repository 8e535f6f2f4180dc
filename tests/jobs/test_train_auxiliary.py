"""Training with auxiliary prediction heads: how it starts, what its lambdas do, and any number of cohorts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from c2al.config import replace
from c2al.distributed.checkpoint import load_unsharded
from c2al.errors import ConfigError
from c2al.serving.export import export
from c2al.training.run_folder import start_run
from c2al.training.score import score
from c2al.training.trainer import Trainer, train
from impressions import write_cohorts


def write_named(path: Path, *labels: str) -> Path:
    """cohorts.json with one chosen cohort per label, each a surface of its own, then an interval of age."""
    conditions = [[{"column": "surface", "equals": s}] for s in ("feed", "story", "search")]
    axes = ["surface"] * 3 + ["age"]
    conditions.append([{"column": "age", "lower": None, "upper": 30.0}])
    chosen = [{"name": n, "axis": a, "conditions": c} for n, a, c in zip(labels, axes, conditions, strict=False)]
    document = json.loads(write_cohorts(path).read_text())
    path.write_text(json.dumps({**document, "chosen": {"cohorts": chosen, "reason": "by hand"}}))
    return path


@pytest.fixture
def pair(tmp_path) -> Path:
    return write_cohorts(tmp_path / "cohorts.json")


def records(run: Path, kind: str = "train") -> list[dict]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_unsharded(max((run / "checkpoints").glob("step*")))


def log_odds(rate: float) -> float:
    return float(np.log(rate / (1 - rate)))


ENCODERS = [("label", "shared-bottom"), ("membership", "shared-bottom"), ("label", "mmoe"), ("label", "ple")]


@pytest.mark.parametrize(("target", "encoder"), ENCODERS)
def test_step_0_is_the_same_with_and_without_auxiliary_heads(config, world, tmp_path, pair, target, encoder):
    """What differs between two arms is what their losses teach, not where they start."""
    config = replace(
        config, **{"train.max_steps": 1, "train.log_every": 1, "model.encoder": encoder, "model.wide": True}
    )
    c2al = replace(config, **{"train.auxiliary_lambda": 0.7, "train.auxiliary_target": target})
    trainers = [
        Trainer(start_run(tmp_path / "baseline", config, None, world), world),
        Trainer(start_run(tmp_path / "c2al", c2al, pair, world), world),
    ]
    logits, losses = [], []
    for trainer in trainers:
        batch = next(trainer._batches())
        loss, (task_T, logit_BT, _) = trainer.model(batch)
        logits.append(logit_BT)
        losses.append(task_T)
        assert loss.item() > 0
    assert logits[0].shape[1] == 1
    assert logits[1].shape[1] == 3
    assert torch.equal(logits[0][:, 0], logits[1][:, 0])
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", ["label", "membership"])
def test_every_bias_starts_at_the_log_odds_of_its_own_task(config, world, tmp_path, pair, target):
    c2al = replace(config, **{"train.auxiliary_lambda": 0.3, "train.auxiliary_target": target})
    trainer = Trainer(start_run(tmp_path / "run", c2al, pair, world), world)
    biases = {n.partition("heads.")[2]: p.item() for n, p in trainer.model.named_parameters() if p.numel() == 1}
    rates = trainer.run.base_rates.rates(target)
    names = ("primary.2.bias", "auxiliary.0.0.bias", "auxiliary.1.0.bias")
    assert biases == pytest.approx({n: log_odds(r) for n, r in zip(names, rates, strict=True)}, rel=1e-5)
    assert len(set(rates)) == 3
    unprimed = replace(c2al, **{"train.prime_biases": False})
    trainer = Trainer(start_run(tmp_path / "unprimed", unprimed, pair, world), world)
    found = {n.partition("heads.")[2]: p.item() for n, p in trainer.model.named_parameters() if p.numel() == 1}
    assert all(found[n] != pytest.approx(biases[n], abs=1e-3) for n in names)


@pytest.mark.parametrize(("schedule", "share"), [("constant", 0.2), ("warmup", 0.5), ("decay", 0.5), ("early", 0.5)])
def test_resumed_equals_uninterrupted_under_every_schedule(config, world, tmp_path, pair, schedule, share):
    """Biases are primed once, not at every start, and lambda goes on where it was."""
    c2al = replace(
        config,
        **{
            "train.auxiliary_lambda": 0.4,
            "train.lambda_schedule": schedule,
            "train.lambda_share": share,
            "train.log_every": 1,
            "train.checkpoint.every_steps": 5,
        },
    )
    train(c2al, tmp_path / "whole", world, pair)
    trainer = Trainer(start_run(tmp_path / "parts", c2al, pair, world), world)
    batches = trainer._batches()
    for _ in range(5):
        trainer.advance(batches)
    trainer._save()
    trainer.checkpoints.wait()
    train(c2al, tmp_path / "parts", world, pair)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[n], parts[n]) for n in whole)
    shown = [r["lambda"] for r in records(tmp_path / "whole")]
    assert [r["lambda"] for r in records(tmp_path / "parts")] == shown[5:]
    assert all(r["head"] == r["tail"] for r in shown)
    steps, values = len(shown), [r["head"] for r in shown]
    ramp = np.arange(steps) / (share * steps)
    expected = {
        "constant": np.ones(steps),
        "warmup": np.minimum(1, ramp),
        "decay": np.minimum(1, ramp[::-1]),
        "early": (ramp < 1).astype(float),
    }[schedule]
    assert values == pytest.approx(0.4 * expected)


@pytest.mark.parametrize("labels", [("only",), ("head", "tail"), ("a", "keys", "c-3", "young")])
def test_any_number_of_cohorts_trains_scores_and_exports(config, world, tmp_path, labels):
    cohorts = write_named(tmp_path / "cohorts.json", *labels)
    c2al = replace(config, **{"train.auxiliary_lambda": 0.3, "train.lambdas": {labels[-1]: 0.1}})
    train(c2al, tmp_path / "run", world, cohorts)
    last = records(tmp_path / "run")[-1]
    assert last["lambda"] == {**dict.fromkeys(labels, 0.3), labels[-1]: 0.1}
    assert list(last["loss"]) == ["primary", *labels]
    lifetime = last["lifetime"]
    for label in labels:
        # The task's positives are the positives that the primary task has in the cohort.
        assert lifetime[label]["all"]["positives"] == lifetime["primary"][label]["positives"] > 0
    assert score(tmp_path / "run", config.data.test, tmp_path / "scores", world) == 2048
    proof = export(tmp_path / "run", config.data.test, tmp_path / "artifact", world)
    assert not any("auxiliary" in name for name in proof.parameters)
    extra = {n for n in weights(tmp_path / "run") if ".heads.auxiliary." in n}
    assert len(extra) == 2 * len(labels)


def test_membership_as_the_target_counts_the_cohort(config, world, tmp_path, pair):
    c2al = replace(config, **{"train.auxiliary_lambda": 0.3, "train.auxiliary_target": "membership"})
    train(c2al, tmp_path / "run", world, pair)
    lifetime = records(tmp_path / "run")[-1]["lifetime"]
    for name in ("head", "tail"):
        assert lifetime[name]["all"]["positives"] == lifetime["primary"][name]["weight"] > 0


def test_a_lambda_of_a_cohort_that_was_not_chosen_is_refused(config, world, tmp_path, pair):
    wrong = replace(config, **{"train.auxiliary_lambda": 0.3, "train.lambdas": {"tial": 0.1}})
    with pytest.raises(
        ConfigError, match=r"train\.lambdas\.tial: .*cohorts\.json chose head, tail; did you mean 'tail'"
    ):
        train(wrong, tmp_path / "run", world, pair)
    assert not (tmp_path / "run").exists()


def test_a_schedule_of_lambda_ties_a_run_to_its_length(config, world, tmp_path, pair):
    fields = {"train.auxiliary_lambda": 0.3, "train.max_steps": 4}
    for schedule, refused in (("constant", False), ("warmup", True)):
        c2al = replace(config, **fields, **{"train.lambda_schedule": schedule})
        train(c2al, tmp_path / schedule, world, pair)
        longer = replace(c2al, **{"train.max_steps": 6})
        if refused:
            with pytest.raises(ConfigError, match=r"holds a run with train\.max_steps = 4, not 6"):
                train(longer, tmp_path / schedule, world, pair)
        else:
            train(longer, tmp_path / schedule, world, pair)
            assert records(tmp_path / schedule)[-1]["step"] == 6
