"""Loss-level methods by hand: weighted cohort rows, GroupDRO, uncertainty weighting; and how they are refused."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from c2al.config import parse_config, replace, save_config
from c2al.distributed.process import process_group
from c2al.errors import ConfigError, TrainingError
from c2al.experiment.bench import Share
from c2al.experiment.check import check
from c2al.experiment.plan import arm_trials, arms_base, baseline_trials
from c2al.serving.export import export
from c2al.training.model import C2ALModel
from c2al.training.objective import Objective
from c2al.training.score import score
from c2al.training.trainer import train
from impressions import splits, tree, write_cohorts

LOGITS = [[0.3, -1.2, 2.0], [-0.7, 0.4, 0.1], [1.5, -0.2, -0.6], [0.2, 0.9, -1.0]]
LABELS = [1.0, 1.0, 0.0, 1.0]
WEIGHTS = [1.0, 2.0, 0.5, 0.0]  # the last row is padding
MEMBERS = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
ROWS = 3


def bce(logit: float, label: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p if label else 1 - p)


def objective(**train) -> Objective:
    config = parse_config({**tree(Path("nowhere")), "train": {"batch_size": 256, **train}})
    return Objective(config, ("head", "tail"), 1)


def loss_of(made: Objective, tasks: int):
    logit_BT = torch.tensor(LOGITS, requires_grad=True)
    label_B, weight_B, member_BC = map(torch.tensor, (LABELS, WEIGHTS, MEMBERS))
    total, task_T = made(logit_BT[:, :tasks], label_B, weight_B, member_BC, ROWS)
    return total, task_T, logit_BT


def primary_by_hand(factors) -> float:
    rows = zip(factors, WEIGHTS, LOGITS, LABELS, strict=True)
    return sum(f * w * bce(logits[0], y) for f, w, logits, y in rows) / ROWS


def test_weighted_cohort_rows_by_hand():
    total, task_T, _ = loss_of(objective(cohort_weight=3.0), tasks=1)
    assert total.item() == pytest.approx(primary_by_hand([3, 3, 1, 3]), rel=1e-6)
    assert task_T.tolist() == pytest.approx([primary_by_hand([1, 1, 1, 1])], rel=1e-6), (
        "the logged loss is the plain one"
    )
    # Beside auxiliary losses it is the primary term alone that is weighted.
    total, task_T, _ = loss_of(objective(cohort_weight=3.0, auxiliary_lambda=0.5), tasks=3)
    expected = primary_by_hand([3, 3, 1, 3]) + 0.5 * (task_T[1] + task_T[2]).item()
    assert total.item() == pytest.approx(expected, rel=1e-6)


def test_group_dro_by_hand():
    eta = 0.7
    made = objective(group_dro=eta)
    # One row per group: the group's mean loss is that of its row, whatever the row's weight.
    losses = [bce(LOGITS[i][0], LABELS[i]) for i in range(3)]
    q = [1 / 3] * 3
    for _ in range(4):
        total, task_T, logit_BT = loss_of(made, tasks=1)
        raised = [a * math.exp(eta * b) for a, b in zip(q, losses, strict=True)]
        q = [a / sum(raised) for a in raised]
        assert total.item() == pytest.approx(sum(a * b for a, b in zip(q, losses, strict=True)), rel=1e-6)
        assert made.shown() == {
            "group_weight": {k: pytest.approx(v) for k, v in zip(("head", "tail", "rest"), q, strict=True)}
        }
    total.backward()
    for i in range(3):
        p = 1 / (1 + math.exp(-LOGITS[i][0]))
        assert logit_BT.grad[i, 0].item() == pytest.approx(q[i] * (p - LABELS[i]), rel=1e-5)
    assert logit_BT.grad[3].tolist() == [0, 0, 0]
    assert task_T.tolist() == pytest.approx([primary_by_hand([1, 1, 1, 1])], rel=1e-6)


def test_group_dro_with_a_group_that_the_batch_lacks():
    made = objective(group_dro=1.0)
    label_B, weight_B = torch.tensor([1.0, 0.0]), torch.ones(2)
    total, _ = made(torch.tensor([[0.5], [0.1]]), label_B, weight_B, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 2)
    head = (bce(0.5, 1) + bce(0.1, 0)) / 2
    expected = math.exp(head) / (math.exp(head) + 2)
    assert made.weight_G.tolist() == pytest.approx([expected, (1 - expected) / 2, (1 - expected) / 2])
    assert total.item() == pytest.approx(expected * head, rel=1e-6)


def test_uncertainty_weighting_by_hand():
    made = objective(uncertainty_weighting=True, auxiliary_lambda=0.5, lambdas={"tail": 0.25})
    total, task_T, _ = loss_of(made, tasks=3)
    s = [0.0, -math.log(0.5), -math.log(0.25)]
    assert made.log_variance_T.tolist() == pytest.approx(s)
    tasks = task_T.tolist()
    expected = sum(math.exp(-a) * b + a / 2 for a, b in zip(s, tasks, strict=True))
    assert total.item() == pytest.approx(expected, rel=1e-6)
    total.backward()
    by_hand = [-math.exp(-a) * b + 0.5 for a, b in zip(s, tasks, strict=True)]
    assert made.log_variance_T.grad.tolist() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize(
    ("train_section", "message"),
    [
        ({"combine": "pcgrad"}, r"train\.combine: 'pcgrad' is none of .*; did you mean 'pcgrad-feat'"),
        ({"combine": "selective-groups"}, r"train\.combine: selective .* several backward passes"),
        ({"cohort_weight": -1.0}, r"train\.cohort_weight: must lie in \[0, 1e\+06\], is -1"),
        ({"group_dro": 0.1, "cohort_weight": 2.0}, r"train\.group_dro: .* cohort_weight must be 1, is 2"),
        (
            {"uncertainty_weighting": True, "lambda_schedule": "warmup"},
            r"train\.lambda_schedule: must be 'constant' .*, is 'warmup'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(train_section, message):
    with pytest.raises(ConfigError, match=message):
        objective(**train_section)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return splits(tmp_path_factory.mktemp("impressions"), rows=2048)


@pytest.mark.parametrize(
    "change",
    [
        {"train.cohort_weight": 3.0},
        {"train.group_dro": 0.1},
        {
            "train.combine": "gradvac-feat",
            "train.uncertainty_weighting": True,
            "train.cohort_weight": 2.0,
            "model.fm.y_l1": 0.01,
            "train.auxiliary_lambda": 0.3,
        },
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_method_trains_scores_and_exports_a_baselines_parameters(config, tmp_path, change):
    own = replace(config, **change)
    with process_group(config.dist) as world:
        train(own, tmp_path / "run", world, write_cohorts(tmp_path / "cohorts.json"))
        records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
        assert list(records[0]["window"]["primary"]) == ["all", "head", "tail"]
        assert list(records[0]["loss"]) == ["primary", *(["head", "tail"] if own.train.auxiliary else [])]
        assert {r["kind"] for r in records} >= {"train", "y", "units", "validation", "weights"}
        assert any(r["kind"] == "gramian" for r in records) == own.train.auxiliary
        assert score(tmp_path / "run", own.data.test, tmp_path / "scores", world) == 1024
        proof = export(tmp_path / "run", own.data.test, tmp_path / "artifact", world)
        serving = C2ALModel(config, table_device="cpu")
        assert list(proof.parameters) == sorted(name for name, _ in serving.named_parameters())


def test_weight_change_is_measured_from_the_seeds_own_weights(config, tmp_path):
    """Also in a run that was interrupted; grouped by where a module stands to the attention MLP."""
    own = replace(config, **{"train.max_steps": 4, "train.log_every": 2, "train.checkpoint.every_steps": 2})
    got = []
    with process_group(config.dist) as world:
        train(own, tmp_path / "whole", world)
        train(replace(own, **{"train.max_steps": 2}), tmp_path / "parts", world)
        train(own, tmp_path / "parts", world)
        for name in ("whole", "parts"):
            records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
            got.append([r for r in records if r["kind"] == "weights"][-1])
    assert got[0] == got[1]
    modules = got[0]["modules"]
    assert all(0 < m["change"] < 1 for m in modules.values())
    parts = {name: m["part"] for name, m in modules.items()}
    assert {n for n, p in parts.items() if p == "attention"} == {
        f"dhen.layers.{i}.interactions.fm_attention.y.mlp.{j}" for i in (0, 1) for j in (0, 2)
    }
    assert {n for n, p in parts.items() if p == "before"} == {"dense_arch.mlp.0", "dense_arch.mlp.2"}
    assert parts["dhen.layers.0.interactions.fm_attention.mlp.0"] == parts["heads.primary.0"] == "after"


def test_cohorts_that_a_method_needs_or_that_nothing_needs_are_named(config, tmp_path):
    with process_group(config.dist) as world:
        with pytest.raises(ConfigError, match=r"^train\.group_dro = 0\.1: needs the cohorts"):
            train(replace(config, **{"train.group_dro": 0.1}), tmp_path / "run", world)
        with pytest.raises(ConfigError, match=r"cohorts without effect"):
            train(config, tmp_path / "run", world, write_cohorts(tmp_path / "cohorts.json"))
        learned = {"train.uncertainty_weighting": True, "train.lambdas": {"head": 0.3}}
        with pytest.raises(ConfigError, match=r"train\.uncertainty_weighting: .* 0 of tail"):
            train(replace(config, **learned), tmp_path / "run", world, tmp_path / "cohorts.json")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train.cohort_weight": 2.0}, "train.cohort_weight = 2.0: needs the cohorts"),
        ({"train.lambdas": {"head": 0.1, "tail": 0.0}}, "train.lambdas.head = 0.1: needs the cohorts"),
        (
            {"train.auxiliary_lambda": 0.3, "train.group_dro": 0.1},
            "train.auxiliary_lambda = 0.3, train.group_dro = 0.1: need the cohorts",
        ),
    ],
)
def test_a_message_about_missing_cohorts_names_what_is_set_and_nothing_else(config, tmp_path, settings, named):
    with process_group(config.dist) as world, pytest.raises(ConfigError) as caught:
        train(replace(config, **settings), tmp_path / "run", world)
    assert str(caught.value) == f"{named}; give --cohorts cohorts.json"
    assert not (tmp_path / "run").exists()


IDLE = [
    ("combine", "'gradvac-feat'", "'sum'"),
    ("auxiliary_target", "'membership'", "'label'"),
    ("lambda_schedule", "'warmup'", "'constant'"),
    ("uncertainty_weighting", "true", "false"),
]


def value_of(text: str) -> object:
    return text == "true" if text in ("true", "false") else text.strip("'")


@pytest.mark.parametrize(("field", "value", "default"), IDLE)
@pytest.mark.parametrize("cohorts", [False, True])
def test_a_setting_of_auxiliary_losses_is_refused_where_there_are_none(
    config, tmp_path, field, value, default, cohorts
):
    """With cohorts that another setting needs, and without any."""
    own = replace(config, **{f"train.{field}": value_of(value), **({"train.cohort_weight": 2.0} if cohorts else {})})
    given = write_cohorts(tmp_path / "cohorts.json") if cohorts else None
    with process_group(config.dist) as world, pytest.raises(ConfigError) as caught:
        train(own, tmp_path / "run", world, given)
    assert str(caught.value) == (
        f"train.{field}: is {value}, but there is no auxiliary loss for it to act on, since train.auxiliary_lambda and "
        f"train.lambdas are 0; set one of them, or train.{field} = {default}"
    )
    assert not (tmp_path / "run").exists()


def test_a_lambda_that_is_0_of_every_chosen_cohort_is_refused(config, tmp_path):
    own = {"train.auxiliary_lambda": 0.3, "train.lambdas": {"head": 0.0, "tail": 0.0}, "train.combine": "gradvac-feat"}
    with (
        process_group(config.dist) as world,
        pytest.raises(ConfigError, match=r"train\.lambdas: .* is 0 \(head, tail\)"),
    ):
        train(replace(config, **own), tmp_path / "run", world, write_cohorts(tmp_path / "cohorts.json"))


LARGE = {
    "train.cohort_weight": 1e6,
    "train.auxiliary_lambda": 1e6,
    "train.lambdas.tail": 1e6,
    "train.group_dro": 1e6,
    "model.fm.y_l1": 1e6,
    "model.fm.y_l2": 1e6,
    "experiment.auxiliary_lambda": 1e6,
}


@pytest.mark.parametrize("name", LARGE)
def test_a_factor_of_the_loss_that_no_float32_bears_is_refused_and_the_largest_one_trains(config, tmp_path, name):
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: must lie in .0, 1e\+06\], is 1e\+30"):
        replace(config, **{name: 1e30})
    own = replace(config, **{name: LARGE[name], "train.max_steps": 3})
    needed = write_cohorts(tmp_path / "cohorts.json") if own.train.needs_cohorts else None
    with process_group(config.dist) as world:
        train(own, tmp_path / "run", world, needed)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*3"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.optimizer.dense_lr": 1e30}, "train.optimizer.dense_lr = 1e+30"),
        ({"train.optimizer.weight_decay": 1e30}, "train.optimizer.weight_decay = 1e+30"),
        (
            {"train.optimizer.sparse_lr": 1e30, "train.cohort_weight": 2.0, "train.log_every": 1},
            "train.cohort_weight = 2.0, train.optimizer.sparse_lr = 1e+30",
        ),
    ],
)
def test_what_is_not_finite_names_the_settings_it_may_come_from(config, tmp_path, changes, named):
    own = replace(config, **changes)
    needed = write_cohorts(tmp_path / "cohorts.json") if own.train.needs_cohorts else None
    with process_group(config.dist) as world, pytest.raises(TrainingError, match="not finite") as caught:
        train(own, tmp_path / "run", world, needed)
    assert named in str(caught.value)


@pytest.mark.parametrize("field", ["y_l1", "y_l2"])
def test_a_penalty_on_y_is_refused_where_no_interaction_has_a_y(config, field):
    without = {"model.interactions": ("linear", "cross")}
    assert replace(config, **without)
    with pytest.raises(ConfigError, match=rf"model\.fm\.{field}: is 0\.1 without effect: .*'fm_attention'"):
        replace(config, **without, **{f"model.fm.{field}": 0.1})


@pytest.mark.parametrize(("field", "value", "default"), IDLE)
def test_an_experiment_refuses_settings_of_auxiliary_losses_that_nothing_uses(config, field, value, default):
    """Before hours of baselines, and wherever they stand: in the experiment's own section, its select or an arm."""
    key, set_ = f"train.{field}", value_of(value)
    none = {"name": "plain", "cohorts": "none", "overrides": {"train.ema": 0.9}}
    weighted = {"name": "w", "overrides": {"train.auxiliary_lambda": 0.0, "train.cohort_weight": 2.0}}
    for arms, settings, said in (
        ([none], {key: set_}, rf"{key}: is {value}, but no arm has an auxiliary loss"),
        ([none, weighted], {key: set_}, rf"{key}: is {value}, but no arm has an auxiliary loss"),
        ([{**none, "overrides": {key: set_}}], {}, rf"arm 'plain': {key}: there is no auxiliary loss .* = 'none'"),
        ([{**none, "select": {key: [set_, value_of(default)]}}], {}, rf"arm 'plain': {key}: there is no auxiliary"),
        (
            [{**weighted, "overrides": {**weighted["overrides"], key: set_}}],
            {},
            rf"arm 'w': {key}: there is no auxiliary loss .* lambda is 0",
        ),
        ([{"name": "c2al"}], {"experiment.select": {key: [set_]}}, rf"experiment\.select: '{key}' is without effect"),
    ):
        with pytest.raises(ConfigError, match=f"^{said}"):
            check(replace(config, arms=arms, **settings), Share())
    check(replace(config, arms=[none, {"name": "c2al"}], **{key: set_}), Share())


def test_what_an_experiment_sets_for_its_arms_does_not_touch_what_has_no_auxiliary_loss(config):
    """The baseline and an arm without cohorts train as if it was not set, in the same folders."""
    set_ = {f"train.{field}": value_of(value) for field, value, _ in IDLE if field != "lambda_schedule"}
    plain = {"name": "plain", "cohorts": "none", "overrides": {"train.ema": 0.9}}
    own = replace(config, arms=[{"name": "c2al"}, plain], **set_)
    c2al, plain = own.arms
    (baseline,), (as_ever,) = baseline_trials(own), baseline_trials(config)
    assert baseline.name == as_ever.name
    assert baseline.config.train == config.train
    base = arms_base(own, baseline)
    (trial,) = arm_trials(c2al, base, ())
    assert {name: getattr(trial.config.train, name.removeprefix("train.")) for name in set_} == set_
    averaged = dataclasses.replace(config.train, ema=0.9)
    assert [t.config.train for t in arm_trials(plain, base, ())] == [averaged]


def test_what_the_baseline_would_select_in_vain_is_refused(config):
    with pytest.raises(
        ConfigError, match=r"^experiment\.select: train\.cohort_weight = 2\.0: the baseline has no cohorts"
    ):
        check(replace(config, **{"experiment.select": {"train.cohort_weight": [1.0, 2.0]}}), Share())


def test_a_method_whose_library_is_missing_ends_with_2_and_writes_nothing(config, tmp_path):
    save_config(replace(config, **{"train.combine": "mgda-ub", "train.auxiliary_lambda": 0.3}), tmp_path / "c.toml")
    code = "import sys; sys.modules['torchjd'] = None; from c2al.__main__ import main; sys.exit(main(sys.argv[1:]))"
    words = ["train", "--config", tmp_path / "c.toml", "--output", tmp_path / "run"]
    words += ["--cohorts", write_cohorts(tmp_path / "cohorts.json")]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "train.combine: 'mgda-ub' needs TorchJD, which is not installed: pip install 'c2al[methods]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_experiment_says_at_its_start_what_its_arms_cannot_train(config, monkeypatch):
    """Not after hours, when the arm's turn comes."""
    monkeypatch.setitem(sys.modules, "torchjd", None)
    arms = [{"name": "pcgrad", "cohorts": "chosen", "overrides": {"train.combine": "pcgrad-feat"}}]
    with pytest.raises(ConfigError, match=r"arm 'pcgrad': train\.combine: 'pcgrad-feat' needs TorchJD"):
        check(replace(config, arms=arms), Share())
    with pytest.raises(ConfigError, match=r"^train\.cohort_weight = 2\.0: the baseline has no cohorts"):
        check(replace(config, **{"train.cohort_weight": 2.0}), Share())


def test_a_method_at_h_needs_features_that_all_tasks_share(config):
    with pytest.raises(ConfigError, match=r"train\.combine: 'mgda-ub' needs features .* is 'mmoe'"):
        replace(config, **{"train.combine": "mgda-ub", "model.encoder": "mmoe"})
