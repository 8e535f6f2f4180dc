import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from c2al.config import Config, parse_config, save_config
from c2al.errors import DataError
from c2al.evaluation.evaluate import evaluate, paired
from c2al.nn.interactions import StaticY, YSource
from c2al.report.figures import _rebinned
from c2al.report.html import write_report
from c2al.training.diagnostics import YRecorder

HOSTILE = '<script>alert("tab")</script>'
"""A category as data may hold it."""


class GivenY(YSource):
    """Stands for an attention MLP: puts out the Y it is given."""

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return y


class Model(nn.Module):
    def __init__(self, *sources: YSource):
        super().__init__()
        self.dhen = nn.ModuleDict({"layers": nn.ModuleList(sources)})

    def forward(self, y: torch.Tensor) -> None:
        for source in self.dhen["layers"]:
            source(y)


def y_record(std: float, step: int, seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    model = Model(GivenY(), GivenY())
    with YRecorder(model) as recorder:
        y = std * torch.randn(300, 8, 4, generator=g)
        model(y * (torch.rand(y.shape, generator=g) < (0.5 if std < 0.2 else 0.9)))
    return {"step": step, "kind": "y", **recorder.summary()}


def metrics(arm: str, seed: int) -> str:
    gain = 0.01 if arm == "c2al" else 0.0
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for step in range(50, 1001, 50):
        ne = 0.85 + 0.15 * np.exp(-step / 200) - gain + 0.004 * rng.normal()
        records.append({"step": step, "kind": "train", "window": {"primary": {"all": {"ne": ne}}}})
        if step % 200 == 0:
            tasks = {"primary": {"all": {"ne": ne + 0.01}}}
            if arm == "c2al":
                tasks |= {
                    "head": {"all": {"ne": ne - 0.1}},
                    "tail": {"all": {"ne": None if step == 200 else ne + 0.05}},
                }
            records.append({"step": step, "kind": "validation", **tasks})
            records.append(y_record(0.1 if arm == "baseline" else 0.3, step, seed))
    return "".join(json.dumps(r) + "\n" for r in records)


def cohorts_json() -> dict[str, Any]:
    def cohort(name: str, column: str, rows: int) -> dict[str, Any]:
        statistics = {"rows": rows, "positives": rows // 10, "positive_rate": 0.1, "mean_prediction": 0.09}
        condition = [{"column": column, "equals": name}]
        return {"name": name, "conditions": condition, **statistics, "calibration": 0.9, "ne": 0.91}

    estimate = {"value": 0.0123, "low": 0.01, "high": 0.014}
    measures = dict.fromkeys(("js", "kl", "cosine", "wasserstein", "wasserstein_logit"), estimate)
    tabs = [cohort(n, "tab", r) for n, r in (("feed", 5000), ("search", 3000), (HOSTILE, 400), ("never", 10))]
    degrees = [cohort(n, "degree", r) for n, r in (("full", 6000), ("low", 2000))]
    return {
        "format": "c2al.cohorts",
        "version": 2,
        "rule": {"measure": "js", "confidence": 0.95, "correction": "bonferroni", "tested_pairs": 7},
        "chosen": {
            "head": {"axis": "tab", **{k: tabs[0][k] for k in ("name", "conditions")}},
            "tail": {"axis": "tab", **{k: tabs[2][k] for k in ("name", "conditions")}},
            "reason": "largest corrected lower bound of js",
        },
        "axes": [
            {
                "name": "tab",
                "columns": ["tab"],
                "cohorts": tabs,
                "pairs": [
                    {"head": "feed", "tail": HOSTILE, "lower_bound": 0.009, **measures},
                    {"head": "feed", "tail": "search", "lower_bound": None, **measures},
                ],
            },
            {
                "name": "degree",
                "columns": ["degree"],
                "cohorts": degrees,
                "pairs": [{"head": "full", "tail": "low", "lower_bound": -0.001, **measures}],
            },
        ],
    }


def make_experiment(folder: Path, gain: float = 0.15, seeds: tuple[int, ...] = (0, 1)) -> Config:
    """An experiment's folder whose C2AL models are better than the baselines by `gain` of logit error."""
    config = parse_config(
        {
            "data": {"sparse": [{"column": "video", "num_embeddings": 9}], "test": ["a&b.parquet"]},
            "axes": [{"name": "tab", "column": "tab"}, {"name": "degree", "column": "degree"}],
            "evaluate": {"replicates": 200},
            "experiment": {"seeds": list(seeds)},
        }
    )
    save_config(config, folder / "config.toml")
    (folder / "command.txt").write_text("c2al experiment --config 'a<b>.toml' --output out\n")
    (folder / "versions.json").write_text(
        json.dumps({"python": "3.11.9", "torch": "2.13.0", "machine": "x86_64 Linux"})
    )
    (folder / "cohorts").mkdir()
    (folder / "cohorts" / "cohorts.json").write_text(json.dumps(cohorts_json()))

    rng, rows, users = np.random.default_rng(0), 12000, 800
    user = rng.integers(0, users, rows)
    tab = rng.choice(np.array(["feed", "search", HOSTILE], dtype=object), rows, p=[0.6, 0.3, 0.1])
    z = rng.normal(size=users)[user] - 1 - (tab == HOSTILE)
    columns = {
        "row_id": np.arange(rows),
        "user_id": user,
        "label": (rng.random(rows) < 1 / (1 + np.exp(-z))).astype(np.float32),
        "weight": np.ones(rows, np.float32),
        "tab": tab,
        "degree": np.where(user % 3 == 0, "low", "full").astype(object),
    }
    for seed in seeds:
        for arm in ("baseline", "c2al"):
            error = 0.8 - (gain if arm == "c2al" else 0.0)
            p = 1 / (1 + np.exp(-(z + error * rng.normal(size=rows))))
            scores = folder / f"seed_{seed}" / arm / "scores_test"
            scores.mkdir(parents=True)
            pq.write_table(pa.table({**columns, "prediction": p.astype(np.float32)}), scores / "part-00000.parquet")
            (scores / "_complete.json").write_text("{}")
            (folder / f"seed_{seed}" / arm / "run").mkdir()
            (folder / f"seed_{seed}" / arm / "run" / "metrics.jsonl").write_text(metrics(arm, seed))
    pairs = [tuple(folder / f"seed_{s}" / arm / "scores_test" for arm in ("baseline", "c2al")) for s in seeds]
    cohorts = folder / "cohorts" / "cohorts.json"
    evaluate(paired(pairs), cohorts, config.axes, config.evaluate, 0, folder / "evaluation", config.data)
    return config


class Page(html.parser.HTMLParser):
    """Tables as lists of rows, the page's words, and what it would load or run."""

    VOID = ("meta", "br", "path", "use", "rect")

    def __init__(self, path: Path):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.words, self.loads, self.figures = "", [], []
        self._open: list[str] = []
        self.feed(path.read_text())
        assert not [tag for tag in self._open if tag not in self.VOID]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self._open.append(tag)
        match tag:
            case "table":
                self.tables.append([])
            case "tr":
                self.tables[-1].append([])
            case "td" | "th":
                self.tables[-1][-1].append("")
            case "svg":
                self.figures.append(found["aria-label"])
            case "script" | "link" | "img" | "iframe":
                self.loads.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not str(v).startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.words += data
        if {"td", "th"} & set(self._open[-1:]):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    make_experiment(folder)
    return folder


def test_report_holds_the_numbers_of_the_evaluation(experiment: Path):
    page = Page(write_report(experiment))
    tree = json.loads((experiment / "evaluation" / "evaluation.json").read_text())
    result = page.tables[0]
    assert [row[0] for row in result[1:]] == ["overall", "head (tab = feed)", f"tail (tab = {HOSTILE})"]
    for row, segment in zip(result[1:], tree["segments"], strict=False):
        estimate = segment["differences"][0]["estimates"]["ne"]
        assert row[1] == f"{segment['rows']:,}"
        assert float(row[5].replace("−", "-").rstrip("%")) == pytest.approx(100 * estimate["value"], abs=6e-4)
        low, high = (float(v.replace("−", "-").rstrip("%")) for v in row[6].split(" to "))
        assert (low, high) == pytest.approx([100 * b for b in estimate["interval"]], abs=6e-4)
    assert "better: the interval lies below 0" in page.words
    assert "C2AL lowers test NE" in page.words
    assert "It is negative in 2 of 2 seeds." in page.words


def test_report_is_complete_and_self_contained(experiment: Path):
    page = Page(write_report(experiment))
    assert page.loads == []
    assert page.figures == [
        "NE_diff by segment of tab",
        "NE_diff by segment of degree",
        "Densities of predictions on head and tail",
        "training NE, validation NE, validation NE, auxiliary tasks",
        "Distribution of Y for baseline and C2AL",
        "layer 0: share of |y| < 0.1 rms, layer 1: share of |y| < 0.1 rms",
    ]
    for said in (
        "c2al experiment --config 'a<b>.toml'",
        "torch 2.13.0",
        'test = ["a&b.parquet"]',
        "fm.y = 'mlp'",
        "Layout 'paper'",
        "undefined: no rows",
        "largest corrected lower bound of js",
        "means over 2 seeds",
    ):
        assert said.lower() in page.words.lower()
    assert HOSTILE in page.words  # as text
    assert "<script" not in (experiment / "report.html").read_text()


def test_same_files_same_bytes(experiment: Path):
    first = write_report(experiment).read_bytes()
    assert write_report(experiment).read_bytes() == first


def test_figures_take_the_colour_of_the_page(experiment: Path):
    text = write_report(experiment).read_text()
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert "currentColor" in svg
        assert "<text" in svg  # words, not outlines
        assert not re.search(r"(fill|stroke): ?(#000000|#ffffff|black|white)", svg)
    identifiers = re.findall(r' id="([^"]+)"', text)
    # What is left of ids is named after its content: equal names, equal things.
    assert all(re.fullmatch(r"[a-z]\w{10,}", i) for i in identifiers)


def test_no_effect_is_said_as_such(tmp_path: Path):
    make_experiment(tmp_path, gain=0.0, seeds=(0,))
    page = Page(write_report(tmp_path))
    assert "No overall effect is shown" in page.words
    assert "no difference shown: the interval contains 0" in page.words
    assert "better: the interval" not in page.words
    assert "One seed was run" in page.words


def test_harm_is_said_as_such(tmp_path: Path):
    make_experiment(tmp_path, gain=-0.4, seeds=(0,))
    page = Page(write_report(tmp_path))
    assert "C2AL is worse here" in page.words
    assert "worse: the interval lies above 0" in page.words


@pytest.mark.parametrize("name", ["command.txt", "cohorts/cohorts.json", "seed_1/c2al/run/metrics.jsonl"])
def test_a_missing_file_is_named(experiment: Path, tmp_path: Path, name: str):
    copy = tmp_path / "copy"
    shutil.copytree(experiment, copy)
    (copy / name).unlink()
    (copy / "report.html").unlink(missing_ok=True)
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(copy)
    assert not (copy / "report.html").exists()


def test_density_of_y_integrates_to_the_share_inside():
    torch.manual_seed(0)
    source = StaticY(400, 300)
    source.y_PK.data.normal_(std=0.5)
    model = Model(source)
    with YRecorder(model) as recorder:
        model(torch.zeros(1))
    (summary,) = recorder.summary().values()
    edges = np.linspace(-1, 1, 41)
    density = _rebinned(summary["histogram"], edges)
    expected = np.histogram(source.y_PK.detach().numpy(), edges)[0] / 120000 / 0.05
    # 120,000 draws, at least 600 a bin: 4 standard errors, and what spreading within a fine bin adds
    assert density == pytest.approx(expected, rel=0.05, abs=0.02)
