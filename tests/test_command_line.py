"""What `c2al` says and returns, as a user meets it."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from c2al.__main__ import JOBS, SETTINGS, main
from c2al.config.reference import reference


def test_every_job_explains_itself():
    done = subprocess.run([sys.executable, "-m", "c2al", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(job in done.stdout for job in JOBS)


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from c2al.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(job, capsys):
    with pytest.raises(SystemExit) as caught:
        main([job, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"c2al {job}" in text
    assert ("settings of the configuration" in text) == (job in SETTINGS)


def test_help_shows_the_settings_that_the_reference_shows(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    shown = [s for section in reference(SETTINGS["train"]) for s in section.settings]
    assert len(shown) > 60
    assert not [s.path for s in shown if f"{s.path} {s.title} {s.text}" not in text]
    assert "evaluate.replicates" not in text


def test_a_missing_config_is_said_in_one_line(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "none.toml"), "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"c2al train: {tmp_path / 'none.toml'}: no such file\n"


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nlabel = 3", "Z\\udcc3\\udcbcrich.toml: data.label: expected str"),
        ("[data]\nsparse = [{column = 'ä.ö'}]", "'\\xe4.\\xf6' has a dot"),
        (
            "[data]\ntrain = ['東京']\nsparse = [{column = 'a', num_embeddings = 2}]\n[dist]\ndevice = 'cpu'",
            "\\u6771\\u4eac",
        ),
    ],
    ids=["path of the config", "name", "path in the config"],
)
def test_a_name_that_the_terminal_lacks_is_printed_with_escapes(tmp_path, text, message):
    (tmp_path / "Zürich.toml").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "c2al", "train", "--config", "Zürich.toml", "--output", "o"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, **ASCII},
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def options(job: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"c2al.jobs.{job.replace('-', '_')}").add_arguments(parser)
    return parser


def needed_beside(parser: argparse.ArgumentParser, option: argparse.Action) -> list[str]:
    """Words without which the job would not begin, whatever they name."""
    groups = [g for g in parser._mutually_exclusive_groups if g.required]
    needed = [a for a in parser._actions if a.required and a is not option]
    needed += [g._group_actions[0] for g in groups if option not in g._group_actions]
    return [word for action in needed for word in example(action)]


def example(action: argparse.Action) -> list[str]:
    value = next(iter(action.choices)) if action.choices else "none"
    return [*action.option_strings[:1], *[value] * (action.nargs if isinstance(action.nargs, int) else 1)]


LOCAL = [(job, a.option_strings[0]) for job in JOBS for a in options(job)._actions if a.type is Path]


@pytest.mark.parametrize(("job", "option"), LOCAL, ids=[" ".join(pair) for pair in LOCAL])
def test_a_uri_where_a_local_path_is_meant_is_refused(job, option, tmp_path, monkeypatch, capsys):
    """Taken for a path it would be a folder named `s3:`, here, without a word."""
    monkeypatch.chdir(tmp_path)
    parser = options(job)
    (action,) = [a for a in parser._actions if option in a.option_strings]
    words = [job, *needed_beside(parser, action), option, "s3://key:secret@bucket/runs/a"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{option}: s3://***@bucket/runs/a is a URI; only impressions and scores" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("job", "option"), LOCAL, ids=[" ".join(pair) for pair in LOCAL])
def test_an_empty_path_is_refused(job, option, tmp_path, monkeypatch, capsys):
    """`--output "$UNSET"` would otherwise fill the current folder."""
    monkeypatch.chdir(tmp_path)
    parser = options(job)
    (action,) = [a for a in parser._actions if option in a.option_strings]
    with pytest.raises(SystemExit) as end:
        main([job, *needed_beside(parser, action), option, ""])
    assert end.value.code == 2
    assert f"{option}: is empty; write . for the current folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_a_job_is_imported_is_no_traceback(monkeypatch, capsys):
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", stop)
    assert main(["score"]) == 130
    assert capsys.readouterr().err == "c2al score: interrupted\n"


def test_a_misspelt_job_is_answered_with_the_one_that_was_meant(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["experment"])
    assert caught.value.code == 2
    assert "no job 'experment'; did you mean 'experiment'?" in capsys.readouterr().err


def test_no_job_lists_the_jobs(capsys):
    assert main([]) == 2
    text = capsys.readouterr().err
    assert all(description in " ".join(text.split()) for description in JOBS.values())
