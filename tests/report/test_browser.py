"""The report in a browser: nothing is logged, nothing overflows, no name from data runs."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import HOSTILE, make_experiment

from c2al.report.html import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
MEASURE = """<script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(f => {
    const root = f.contentDocument.documentElement;
    return `${f.width}: ${root.scrollWidth - root.clientWidth} too wide`;
  });
  document.title = `ran: ${window.ran}; ${seen.join("; ")}`;
});
</script>"""
"""Measures the framed pages, which are of the same origin as this one, so a script in them could set `ran`."""
SEEN = """<script>
addEventListener("load", () => {
  const beyond = (root, what, words) => [...root.querySelectorAll(what)].filter(
    x => (!words || words.test(x.textContent)) && x.getBoundingClientRect().right > root.clientWidth).length;
  document.title = [...document.querySelectorAll("iframe")].map(f => {
    const root = f.contentDocument.documentElement;
    const boxes = [...root.querySelectorAll("div")].filter(b => b.scrollWidth > b.clientWidth);
    const bare = boxes.filter(b => f.contentWindow.getComputedStyle(b).backgroundImage == "none").length;
    const pairs = [...root.querySelectorAll("th")].find(h => h.textContent == "W1 in logit");
    const pair = pairs && pairs.getBoundingClientRect().right > root.clientWidth;
    return `${f.width}: ${beyond(root, "svg")} figures and ` +
      `${beyond(root, "td", /^(no difference shown|lower|higher|not trained.*)$/)} verdicts beyond the edge, ` +
      `${bare} boxes of ${boxes.length > 0} scroll unseen, pairs ${pair ? "beyond" : "within"}`;
  }).join("; ");
});
</script>"""
"""Measures what a reader of the framed pages does not see without scrolling."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian package `chromium`)")


def in_browser(tmp_path: Path, page: str, *widths: int, measure: str = MEASURE) -> tuple[str, str]:
    """(title that `measure` wrote, what the browser logged of the page)."""
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(page)}"></iframe>' for w in widths)
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8><title>unmeasured</title>{measure}{frames}")
    words = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout.partition("<iframe")[0])
    return title, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with 20 arms, whose categories are scripts, and with long names."""
    folder = tmp_path_factory.mktemp("experiment")
    arms = {"c2al": ("chosen", 0.2), **{f"an_arm_with_a_rather_long_name_{i}": ("random", 0.0) for i in range(19)}}
    make_experiment(folder, arms, seeds=(0, 1), findings={"unsupported": f"no pair: {'long' * 40} {HOSTILE}"})
    return write_report(folder).read_text()


def test_the_page_fits_narrow_and_wide_screens_and_logs_nothing(page: str, tmp_path: Path):
    title, logged = in_browser(tmp_path, page, 390, 1200)
    assert title == "ran: undefined; 390: 0 too wide; 1200: 0 too wide"
    assert logged == ""


def test_a_phone_shows_figures_and_verdicts_and_that_tables_go_on(page: str, tmp_path: Path):
    title, _ = in_browser(tmp_path, page, 390, 1200, measure=SEEN)
    phone, screen = title.split("; ")
    assert phone == "390: 0 figures and 0 verdicts beyond the edge, 0 boxes of true scroll unseen, pairs beyond"
    assert screen.startswith("1200: 0 figures and 0 verdicts beyond the edge, 0 boxes of ")
    assert screen.endswith("pairs within")


def test_the_browser_test_sees_what_it_looks_for(tmp_path: Path):
    """A page that does everything wrong: otherwise the test above could not fail."""
    bad = (
        "<!doctype html><body style='margin:0'><div style='width:2000px'>wide</div>"
        "<script>parent.ran = true; console.error('wrong')</script>"
    )
    title, logged = in_browser(tmp_path, bad, 390)
    assert title == "ran: true; 390: 1610 too wide"
    assert "wrong" in logged


@pytest.mark.parametrize(
    "name", [HOSTILE, "<img src=x onerror='parent.ran = true'>", '"><svg onload="parent.ran=true">']
)
def test_a_name_from_data_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr("test_report.HOSTILE", name)
    make_experiment(tmp_path, {"c2al": ("chosen", 0.1)}, seeds=(0,), findings={"other": name})
    title, logged = in_browser(tmp_path, write_report(tmp_path).read_text(), 800)
    assert title.startswith("ran: undefined;")
    assert logged == ""
