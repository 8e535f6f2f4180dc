"""docs/configuration.md and the help are what the dataclasses say."""

import dataclasses
from pathlib import Path

from c2al.config import Config, dump_config, parse_config
from c2al.config.reference import markdown, reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_not_stale():
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run python -m c2al.config.reference > docs/configuration.md"


def test_every_setting_says_its_unit_and_effect():
    settings = [s for section in reference() for s in section.settings]
    assert not [s.path for s in settings if len(s.text) < 10]
    assert not [section.title for section in reference() if not section.text]


def test_every_setting_and_its_default_is_there():
    """The oracle is the resolved configuration of a file that sets next to nothing."""
    config = parse_config({"data": {"sparse": [{"column": "a", "num_embeddings": 2}], "dense": [{"column": "b"}]}})
    shown = {s.path: s.default for section in reference() for s in section.settings}
    section = ""
    lines = dump_config(config).splitlines()
    for line in lines:
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif line and section not in ("data.sparse.",):
            name, _, value = line.partition(" = ")
            assert (section + name) in ("axes", "arms", "dist.tables") or shown[section + name] in (value, None), line
    assert len(lines) > 80
    assert {f.name for f in dataclasses.fields(Config)} == {path.partition(".")[0] for path in shown}
