"""docs/methods.md and CONTRIBUTING.md show arms and a method that work."""

import re
import tomllib
import typing
from pathlib import Path

import torch

from c2al.config import ModelConfig, TrainConfig, parse_config, replace
from c2al.experiment.bench import Share
from c2al.experiment.check import check
from c2al.nn.methods import Method
from impressions import tree

ROOT = Path(__file__).parent.parent.parent


def block(page: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert found is not None
    return found[1]


def test_the_arms_on_the_page_are_valid_and_name_every_method():
    arms = tomllib.loads(block("docs/methods.md", "toml"))["arms"]
    config = parse_config({**tree(Path("nowhere")), "arms": arms})
    assert len({arm.name for arm in config.arms}) == len(arms)
    for arm in config.arms:
        for setting, values in arm.select.items():
            for value in values:
                replace(config, **arm.overrides, **{setting: value})
    used = {arm.overrides.get("train.combine", "sum") for arm in config.arms}
    known = set(typing.get_type_hints(TrainConfig)["combine"].__args__)
    assert used == known - {"selective-groups"}
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in used)
    encoders = {arm.overrides.get("model.encoder", "shared-bottom") for arm in config.arms}
    assert encoders == set(typing.get_type_hints(ModelConfig)["encoder"].__args__)
    assert any(arm.overrides.get("model.wide") for arm in config.arms)
    check(config, Share())  # as an experiment is checked, before its first training


def test_the_configurations_of_the_published_experiments_are_still_experiments():
    for path in sorted((ROOT / "docs/results").glob("*.toml")):
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        if "data" in tree:
            check(parse_config(tree), Share())


def test_the_method_of_contributing_works():
    shown = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", shown, re.S)
    assert found is not None
    names: dict = {}
    exec(re.sub("^   ", "", found[1], flags=re.M), names)
    method = names["METHOD"](2)
    assert isinstance(method, Method)
    weight_T = method.weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64), [0, 1])
    assert weight_T.tolist() == [1.0, 0.5]
