"""What `c2al` says and returns, as a user meets it."""

import os
import subprocess
import sys

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
