"""model.preset: what it sets, what wins over it, and that the resolved configuration reads back equal."""

import dataclasses

import pytest

from c2al.config import ModelConfig, dump_config, load_config, parse_config, replace, save_config
from c2al.config.presets import PRESETS
from c2al.errors import ConfigError

DATA = {"sparse": [{"column": "a", "num_embeddings": 2}, {"column": "b", "num_embeddings": 2}]}


def made(*overrides, **model):
    return parse_config({"data": dict(DATA), "model": model}, overrides).model


def value(model, path):
    for part in path.split("."):
        model = getattr(model, part)
    return list(model) if isinstance(model, tuple) else model


def test_the_default_stack_is_that_of_the_fields_and_every_preset_sets_the_same_fields():
    assert {path: value(ModelConfig(), path) for path in PRESETS[""]} == PRESETS[""]
    assert all(fields.keys() == PRESETS[""].keys() for fields in PRESETS.values())
    literal = dataclasses.fields(ModelConfig)[0]
    assert (literal.name, literal.default) == ("preset", "")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_its_fields_and_explicit_ones_win(preset, tmp_path):
    model = made(preset=preset)
    assert {path: value(model, path) for path in PRESETS[preset]} == PRESETS[preset]
    explicit = made(preset=preset, layers=5, fm={"y": "static", "k": 3})
    assert (explicit.layers, explicit.fm.y, explicit.fm.k) == (5, "static", 3)
    rest = PRESETS[preset].keys() - {"layers", "fm.y"}
    assert {p: value(explicit, p) for p in rest} == {p: PRESETS[preset][p] for p in rest}
    config = parse_config({"data": dict(DATA), "model": {"preset": preset, "layers": 3}})
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config == replace(config)
    assert "layers = 3" in dump_config(config)


@pytest.mark.parametrize("new", PRESETS)
@pytest.mark.parametrize("old", PRESETS)
def test_a_preset_in_an_override_takes_the_place_of_another(old, new):
    """An arm of an experiment overrides a resolved configuration, in which every field is explicit."""
    expected = made(preset=new)
    config = parse_config({"data": dict(DATA), "model": {"preset": old}})
    assert replace(config, **{"model.preset": new}).model == expected
    assert made(f"--model.preset={new}", preset=old, layers=7) == expected
    for words in (["--model.layers=9", f"--model.preset={new}"], [f"--model.preset={new}", "--model.layers=9"]):
        assert made(*words, preset=old) == dataclasses.replace(expected, layers=9)


def test_a_preset_that_does_not_exist_is_refused_with_the_known_ones():
    for words, model in (([], {"preset": "wukon"}), (["--model.preset=wukon"], {}), ([], {"preset": ["wukong"]})):
        with pytest.raises(ConfigError, match=r"model\.preset: .*wukon.* is none of .*'dcnv2'"):
            made(*words, **model)


def test_an_explicit_section_of_the_wrong_kind_is_reported_once():
    with pytest.raises(ConfigError, match=r"model\.fm: expected a section, got integer 3") as caught:
        made(preset="wukong", fm=3)
    assert str(caught.value).count("model.fm") == 1
