import dataclasses
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

from c2al.config import Arm, parse_config, save_config
from c2al.errors import C2ALError
from c2al.evaluation.result import Difference, Estimate, Judgement, Segment, read_evaluation
from c2al.experiment.run import evaluate_record
from c2al.nn.interactions import StaticY, YSource
from c2al.report import figures
from c2al.report.dynamics import y_differences
from c2al.report.figures import _rebinned
from c2al.report.html import write_report
from c2al.report.record import ArmRecord, Record, TrialRecord, read_record, repeated, same_training
from c2al.report.verdict import cautions, harmed, sentence
from c2al.text import percent as in_percent
from c2al.training.diagnostics import YRecorder

HOSTILE = '<script>parent.ran = alert("tab")</script>'
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


def gramian(step: int) -> dict[str, Any]:
    cosines = [[1.0, 0.25, -0.125], [0.25, 1.0, 0.5], [-0.125, 0.5, 1.0]]
    parts = {"parallel": [2.0, 0.5, -0.25], "orthogonal": [0.0, 1.5, 1.75]}
    return {
        "step": step,
        "kind": "gramian",
        "tasks": ["primary", "head", "tail"],
        "norms": [2.0, 1.625, 1.375],
        "cosines": cosines,
        **parts,
    }


def metrics(auxiliary: bool, seed: int, gain: float) -> str:
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for step in range(50, 1001, 50):
        ne = 0.85 + 0.15 * np.exp(-step / 200) - gain + 0.004 * rng.normal()
        records.append({"step": step, "kind": "train", "window": {"primary": {"all": {"ne": ne}}}})
        if step % 200 == 0:
            tasks = {"primary": {"all": {"ne": ne + 0.01}}}
            if auxiliary:
                tasks |= {
                    "head": {"all": {"ne": ne - 0.1}},
                    "tail": {"all": {"ne": None if step == 200 else ne + 0.05}},
                }
                records.append(gramian(step))
                modules = {
                    "dhen.layers.0": {"part": "after", "change": 0.03125},
                    "over": {"part": "before", "change": None},
                }
                records.append({"step": step, "kind": "weights", "modules": modules})
                records.append({"step": step, "kind": "units", "heads.primary.1": {"units": 64, "dead": 0.125}})
            records.append({"step": step, "kind": "validation", **tasks})
            records.append(y_record(0.3 if auxiliary else 0.1, step, seed))
    return "".join(json.dumps(r) + "\n" for r in records)


def cohorts_json() -> dict[str, Any]:
    def cohort(name: str, column: str, rows: int) -> dict[str, Any]:
        statistics = {"rows": rows, "positives": rows // 10, "positive_rate": 0.1, "mean_prediction": 0.09}
        condition = [{"column": column, "equals": name}]
        return {"name": name, "conditions": condition, **statistics, "calibration": 0.9, "ne": 0.91}

    estimate = {"value": 0.0123, "low": 0.01, "high": 0.014}
    measures = dict.fromkeys(("js", "kl", "cosine", "wasserstein", "wasserstein_logit"), estimate)
    noise = {key: {"value": -0.0007, "low": -0.002, "high": 0.0006} for key in measures}
    tabs = [cohort(n, "tab", r) for n, r in (("feed", 5000), ("search", 3000), (HOSTILE, 400), ("never", 10))]
    degrees = [cohort(n, "degree", r) for n, r in (("full", 6000), ("low", 2000))]
    return {
        "format": "c2al.cohorts",
        "version": 2,
        "units": {"js": "Jensen-Shannon divergence, nats"},
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
                "pairs": [{"head": "full", "tail": "low", "lower_bound": -0.001, **noise}],
            },
        ],
    }


ARMS: dict[str, tuple[str, float]] = {"c2al": ("chosen", 0.15), "placebo": ("shuffled", 0.0)}
"""Name -> (source, how much less logit error than the baseline's)."""


def write_scores(folder: Path, error: float, rng: np.random.Generator, z: Any, columns: dict[str, Any]) -> None:
    p = 1 / (1 + np.exp(-(z + error * rng.normal(size=len(z)))))
    folder.mkdir(parents=True)
    pq.write_table(pa.table({**columns, "prediction": p.astype(np.float32)}), folder / "part-00000.parquet")
    (folder / "_complete.json").write_text("{}")


def make_experiment(
    folder: Path,
    arms: dict[str, tuple[str, float]] = ARMS,
    seeds: tuple[int, ...] = (0, 1),
    findings: dict[str, str] | None = None,
    discovery: str = "cohorts-0123456789",
) -> None:
    """An experiment's folder whose arms are better than the baseline by what `arms` says."""
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
    if discovery:
        (folder / discovery).mkdir()
        (folder / discovery / "cohorts.json").write_text(json.dumps(cohorts_json()))

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
    records = []
    for name, (source, gain) in {"baseline": ("none", 0.0), **arms}.items():
        for seed in seeds:
            training = folder / "trainings" / f"{name}-{digest(name)}2" / f"seed_{seed}"
            write_scores(training / "scores_test-a", 0.8 - gain, rng, z, columns)
            (training / "run").mkdir()
            (training / "run" / "metrics.jsonl").write_text(metrics(name != "baseline", seed, gain / 15))
        grid = [] if name == "baseline" else [0.1, 0.3, 1.0]
        trials = tuple(
            TrialRecord(
                name=f"{name}-{digest(name)}{i + 1}",
                settings={"train": {"auxiliary_lambda": value}},
                validation_ne=tuple(0.9 + 0.01 * (value - 0.3) ** 2 + 0.001 * s for s in seeds),
            )
            for i, value in enumerate(grid)
        )
        alone = TrialRecord(name=f"{name}-{digest(name)}2", settings={}, validation_ne=tuple(0.91 for _ in seeds))
        records.append(
            ArmRecord(
                name=name,
                source=source,
                cohorts=() if name == "baseline" else ("head: tab = feed", f"tail: tab = {HOSTILE}"),
                trials=trials or (alone,),
                selected=1 if trials else 0,
                scores=tuple(f"trainings/{name}-{digest(name)}2/seed_{s}/scores_test-a" for s in seeds),
                finding="",
            )
        )
    for name, finding in (findings or {}).items():
        empty = {"cohorts": (), "trials": (), "selected": None, "scores": ()}
        records.append(ArmRecord(name=name, source="chosen", finding=finding, **empty))
    baseline, *others = records
    record = Record(seeds=seeds, discovery=discovery, finding="", baseline=baseline, arms=tuple(others))
    record.write(folder)
    evaluate_record(record, config, folder)


def digest(arm: str) -> str:
    """Of what an arm trained with; that of no other arm."""
    return arm.encode().hex()


def test_arms_that_share_their_cohorts_on_purpose_are_no_repetition():
    """Methods are compared on one pair; only another question with the same answer is worth a word."""
    pair, other = (1, 2), (1, 3)
    asked = [
        (Arm(name="c2al"), pair),
        (Arm(name="pcgrad", overrides={"train.combine": "pcgrad-feat"}), pair),
        (Arm(name="on_tab", axis="tab"), pair),
        (Arm(name="random", cohorts="random"), other),
        (Arm(name="again", cohorts="random", draw=1), other),
        (Arm(name="least", cohorts="least"), other),
        (Arm(name="nothing", cohorts="random", draw=2), ()),
        (Arm(name="plain", cohorts="none"), ()),
    ]
    assert repeated(asked) == {"on_tab": "c2al", "again": "random", "least": "random"}


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
        if tag == "wbr":  # in the middle of a word
            return
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


def percent(text: str) -> float:
    return float(text.replace("−", "-").rstrip("%")) / 100


def by_title(page: Page, *titles: str) -> list[list[str]]:
    """The rows of the table whose head begins with `titles`."""
    (found,) = [t[1:] for t in page.tables if tuple(t[0][: len(titles)]) == titles]
    return found


def test_report_holds_the_numbers_of_the_evaluation(experiment: Path):
    page = Page(write_report(experiment))
    overall = read_evaluation(experiment / "evaluation" / "evaluation.json").overall
    rows = {row[0]: row for row in by_title(page, "arm", "verdict", "NE_diff")}
    assert list(rows) == ["baseline", "c2al", "placebo"]
    for arm in ("c2al", "placebo"):
        difference = overall.difference(arm, "baseline")
        estimate, judgement = difference.estimates["ne"], difference.judgement
        assert rows[arm][1] == judgement.verdict
        assert percent(rows[arm][2]) == pytest.approx(estimate.value, abs=6e-6)
        assert [percent(v) for v in rows[arm][3].split(" to ")] == pytest.approx(judgement.corrected_interval, abs=6e-6)
        assert rows[arm][8] == "auxiliary_lambda = 0.3"
    assert by_title(page, "arm", "against")[0][:2] == ["c2al", "placebo"]


def test_the_sections_stand_in_the_order_of_the_argument(experiment: Path):
    text = write_report(experiment).read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text) == [
        "Arms",
        "Lambda",
        "NE_diff by segment",
        "Choice of the cohorts",
        "Predictions on the chosen cohorts",
        "Calibration",
        "Dynamics",
        "Power",
        "Reproduction",
    ]


def test_report_is_complete_and_self_contained(experiment: Path):
    page = Page(write_report(experiment))
    assert page.loads == ["link", "data:,"], "no icon is asked for, and nothing else is loaded"
    assert page.figures == [
        "NE_diff by arm",
        "Validation NE over the settings of each grid",
        "NE_diff by segment of tab",
        "NE_diff by segment of degree",
        "Densities of predictions on the chosen cohorts",
        "Reliability of baseline and arm",
        "training NE, validation NE, validation NE, auxiliary tasks",
        "norm of the gradient, cosine to the primary gradient",
        "Distribution of Y for baseline and arm",
        "layer 0: |y| < 0.1 rms, layer 1: |y| < 0.1 rms",
    ]
    for said in (
        "c2al experiment --config 'a<b>.toml'",
        "torch 2.13.0",
        'test = ["a&b.parquet"]',
        "fm.y = 'mlp'",
        "Layout 'paper'",
        "largest corrected lower bound of js",
        "Jensen-Shannon divergence, nats",
    ):
        assert said.lower() in page.words.lower()
    assert HOSTILE in page.words  # as text
    assert "<script" not in (experiment / "report.html").read_text()


def test_same_files_same_bytes(experiment: Path):
    first = write_report(experiment).read_bytes()
    assert write_report(experiment).read_bytes() == first


def test_paths_stand_in_the_reproduction_only(experiment: Path):
    body, _, reproduction = write_report(experiment).read_text().partition("<h2>Reproduction</h2>")
    assert str(experiment) not in body
    assert "a&amp;b.parquet" in reproduction


def test_a_divergence_that_is_not_above_0_is_about_0(experiment: Path):
    rows = by_title(Page(write_report(experiment)), "axis", "head", "tail", "lower bound")
    (noise,) = [r for r in rows if r[0] == "degree"]
    assert noise[3:5] == ["not above 0", "about 0 (about 0 to 0.0006)"]
    assert next(r for r in rows if r[0] == "tab")[4] == "0.0123 (0.01 to 0.014)"


def test_the_curve_shows_every_setting_and_what_was_kept(experiment: Path):
    rows = by_title(Page(write_report(experiment)), "arm", "settings", "validation NE", "seed sd")
    assert [r[1] for r in rows if r[0] == "c2al"] == [f"train.auxiliary_lambda = {v}" for v in (0.1, 0.3, 1.0)]
    assert [r[1] for r in rows if r[4] == "kept"] == ["train.auxiliary_lambda = 0.3"] * 2
    # The mean and the standard deviation of 0.9 and 0.901.
    assert next(r for r in rows if r[4] == "kept")[2:4] == ["0.90050", "0.00071"]


def test_gradients_and_weights_are_shown_where_they_were_recorded(experiment: Path, tmp_path: Path):
    page = Page(write_report(experiment))
    rows = by_title(page, "task", "norm", "parallel", "orthogonal")
    assert rows[1] == ["head", "1.62", "0.5", "1.5", "+0.250", "+1.000", "+0.500"]
    assert by_title(page, "module") == [["dhen.layers.0", "after", "–", "0.0312"], ["over", "before", "–", "–"]]
    assert by_title(page, "layer", "baseline", "c2al") == [["heads.primary.1", "–", "12.5%"]]
    copy = tmp_path / "copy"
    shutil.copytree(experiment, copy)
    for path in copy.rglob("metrics.jsonl"):
        kept = [
            x
            for x in path.read_text().splitlines()
            if json.loads(x)["kind"] not in ("gramian", "weights", "y", "units")
        ]
        path.write_text("".join(f"{x}\n" for x in kept))
    words = Page(write_report(copy)).words
    assert words.count("Not recorded.") == 2
    assert "Change of the weights" not in words
    assert "Dead units" not in words


def test_the_difference_of_y_is_that_of_paired_seeds_with_a_t_interval():
    def run(near_zero: float) -> list[dict[str, Any]]:
        measures = {"near_zero": near_zero}
        return [{"step": s, "kind": "y", "layers.0.y": {"near_zero": 0.9} if s == 1 else measures} for s in (1, 2)]

    baseline, arm = [run(v) for v in (0.10, 0.20, 0.30)], [run(v) for v in (0.09, 0.17, 0.29)]
    (found,) = y_differences(baseline, arm, 0.95)
    assert (found.layer, found.measure) == ("layer 0", "near_zero")
    assert (found.against, found.arm, found.difference) == pytest.approx((0.2, 0.55 / 3, -0.05 / 3))
    # Differences -0.01, -0.03, -0.01: standard deviation 0.02 / sqrt 3; t of 2 degrees of freedom at 97.5%: 4.302653.
    half = 4.302653 * 0.02 / 3
    assert found.interval == pytest.approx((-0.05 / 3 - half, -0.05 / 3 + half))
    assert y_differences(baseline[:1], arm[:1], 0.95)[0].interval is None
    assert y_differences(baseline, [run(0.1), run(0.1), []], 0.95) == [], "one seed has no record"


def test_figures_take_the_colour_of_the_page(experiment: Path):
    text = write_report(experiment).read_text()
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert "currentColor" in svg
        assert "<text" in svg  # words, not outlines
        assert not re.search(r"(fill|stroke): ?(#000000|#ffffff|black|white)", svg)
    identifiers = set(re.findall(r' id="([^"]+)"', text)) - {"power"}
    # What is left of ids is named after its content: equal names, equal things.
    assert all(re.fullmatch(r"[a-z]\w{10,}", i) for i in identifiers)


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (0.2, "c2al lowers test NE against baseline"),
        (0.0, "No difference shown between c2al and baseline"),
        (-0.4, "c2al raises test NE against baseline"),
    ],
)
def test_the_words_follow_the_corrected_interval(tmp_path: Path, gain: float, said: str):
    make_experiment(tmp_path, {"c2al": ("chosen", gain)}, seeds=(0, 1, 2))
    page = Page(write_report(tmp_path))
    assert said in page.words
    others = {"lowers test NE", "No difference shown", "raises test NE"} - set(re.findall("|".join(WORDS), said))
    assert not [w for w in others if w in page.words]


WORDS = ("lowers test NE", "No difference shown", "raises test NE")


def test_the_words_do_not_follow_the_plain_interval(experiment: Path):
    difference = read_evaluation(experiment / "evaluation" / "evaluation.json").overall.difference(
        "placebo", "baseline"
    )
    assert difference.judgement.verdict == "no difference shown"
    lower = dataclasses.replace(difference.estimates["ne"], interval=(-0.02, -0.01))
    plain = dataclasses.replace(difference, estimates={**difference.estimates, "ne": lower})
    assert sentence(plain, 0.95) == sentence(difference, 0.95)
    assert sentence(plain, 0.95).startswith("No difference shown between placebo and baseline")


def test_the_verdict_names_the_segments_that_the_arm_harms(experiment: Path):
    """A gain on the whole test set may be paid for outside the cohorts; only what passes the correction is named."""
    evaluation, record = read_evaluation(experiment / "evaluation" / "evaluation.json"), read_record(experiment)
    judged = {"feed": ("higher", 0.02), "search": ("no difference shown", 0.03), "full": ("higher", 0.01)}

    def changed(s: Segment) -> Segment:
        verdict, value = judged.get(s.name, ("lower", -0.01))
        d = s.difference("c2al", "baseline")
        if d.judgement is None:
            return s
        estimates = {**d.estimates, "ne": dataclasses.replace(d.estimates["ne"], value=value)}
        interval = (value - 0.005, value + 0.005)
        judgement = dataclasses.replace(d.judgement, verdict=verdict, corrected_interval=interval)
        return dataclasses.replace(s, differences=(dataclasses.replace(d, estimates=estimates, judgement=judgement),))

    made = dataclasses.replace(evaluation, segments=tuple(map(changed, evaluation.segments)))
    feed, full = (next(s.rows for s in made.segments if s.name == n) for n in ("feed", "full"))
    one = f"tab = feed ({feed:,} rows) +2.000%, corrected 95% interval +1.500% to +2.500%"
    two = f"degree = full ({full:,} rows) +1.000%, corrected 95% interval +0.500% to +1.500%"
    listed = "; ".join(text for _, text in sorted([(feed, one), (full, two)], reverse=True))
    arm = next(a for a in record.arms if a.name == "c2al")
    assert harmed(made, arm, record.baseline) == [
        f"c2al raises NE against baseline in 2 of {len(made.segments) - 3} segments: {listed}."
    ]
    assert harmed(evaluation, arm, record.baseline) == []


def test_the_page_names_the_segments_that_the_arm_harms(tmp_path: Path):
    make_experiment(tmp_path, {"c2al": ("chosen", -0.6)}, seeds=(0, 1, 2))
    assert re.search(
        r"c2al raises NE against baseline in \d of \d segments: (tab|degree) = ", Page(write_report(tmp_path)).words
    )


def test_a_long_name_breaks_at_its_joints(experiment: Path):
    text = write_report(experiment).read_text()
    assert "auxiliary_<wbr>lambda = 0.3" in text


def test_arms_of_one_training_and_grids_that_the_baseline_had_none_of_are_said(experiment: Path):
    record = read_record(experiment)
    words = Page(write_report(experiment)).words
    assert "c2al, placebo chose from up to 3 settings, the baseline from 1: it was not tuned with as" in words
    assert "so one answer and not two" not in words
    (arm, other), trial = record.arms, record.arms[0].trials[1]
    again = dataclasses.replace(
        other, trials=(dataclasses.replace(trial, name="again-" + digest("c2al") + "2"),), selected=0
    )
    assert same_training((record.baseline, arm, again)) == {other.name: "c2al"}
    (said,) = [s for s in cautions(dataclasses.replace(record, arms=(arm, again))) if "one answer" in s]
    assert said == "placebo kept the settings and cohorts of c2al: they are one training, so one answer and not two."
    idle = dataclasses.replace(arm, name="idle", trials=record.baseline.trials, selected=0)
    (said,) = [s for s in cautions(dataclasses.replace(record, arms=(idle,))) if "one answer" in s]
    assert said.startswith("idle kept the settings and cohorts of baseline")


def test_what_could_be_seen_is_said_where_no_difference_is_shown(tmp_path: Path):
    make_experiment(tmp_path, {"c2al": ("chosen", 0.0), "placebo": ("shuffled", 0.0)})
    power = read_evaluation(tmp_path / "evaluation" / "evaluation.json").overall.difference("c2al", "baseline").power
    page = Page(write_report(tmp_path))
    assert f"This design sees an NE_diff from {power.smallest:.3%} on" in page.words
    text = (tmp_path / "report.html").read_text()
    assert re.search(r'<li>This design sees an NE_diff from [^<]* See <a href="#power">Power</a>.</li>', text)
    assert text.count('id="power"') == 1


def test_a_link_of_the_page_has_its_target_where_nothing_has_an_interval(tmp_path: Path):
    make_experiment(tmp_path, {}, findings={"c2al": "nothing differs"}, discovery="")
    assert '<h2 id="power">' in write_report(tmp_path).read_text()


def test_a_task_has_one_colour_on_the_page():
    """In losses, gradients and densities, whatever is drawn beside it."""
    line = (np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    edges, density = np.array([0.0, 1.0]), np.array([1.0])

    def of(name: str, svg: str) -> str:
        """Colour of the line before `name` in the legend, the last lines of the figure."""
        (before, *_), colours = svg.rsplit(f">{name}</text>", 1), re.compile("stroke: (#[0-9a-f]{6})")
        return colours.findall(before)[-1]

    seen: dict[str, set[str]] = {}
    for names in (["primary", "head", "tail"], ["head", "tail"], ["tail"], ["primary", "tail", "other"]):
        both = {"one": {key: [line] for key in names}, "cosine": {n: [line] for n in names if n != "primary"}}
        alone = figures.curves({"tasks": {key: [line] for key in names}})
        beside = figures.curves({"losses": {key: [line] for key in ("baseline", "c2al")}, "tasks": both["one"]})
        for name in names:
            found = {of(name, alone), of(name, beside), of(name, figures.curves(both))}
            if name != "primary":
                cohorts = {n: density for n in names if n != "primary"}
                found.add(of(name, figures.densities(edges, {"baseline": cohorts})))
            seen.setdefault(name, set()).update(found)
    assert {name: len(found) for name, found in seen.items()} == dict.fromkeys(("primary", "head", "tail", "other"), 1)
    assert len(set.union(*seen.values())) == 4, "and no two the same"


def test_one_segment_of_wide_interval_hides_no_other():
    """It is cut off and says how far it reaches; the axis shows every bar and every interval that passes."""

    def bar(name: str, value: float, half: float, verdict: str) -> tuple[str, int, Difference]:
        of = dict.fromkeys(("users_std", "resampled_std", "seed_std", "df", "users_interval"))
        ne = Estimate(value=value, interval=(value - half, value + half), per_seed=(value,), **of)
        passes = verdict != "no difference shown"
        judged = Judgement(
            p=0.5, corrected_p=0.5, corrected_interval=(value - half, value + half), passes=passes, verdict=verdict,
            words="",
        )  # fmt: skip
        return name, 10, Difference(
            arm="a", against="b", estimates={"ne": ne}, judgement=judged, items_interval=None, power=None
        )  # fmt: skip

    small, rare = bar("small", -0.002, 0.0005, "lower"), bar("rare", 0.001, 0.6, "no difference shown")
    low, high = figures._range([small, rare])
    assert -2 < low < -0.25
    assert 0.1 < high < 2
    svg = figures.segment_bars("axis", [small, rare], None)
    assert "+60.1%" in svg
    assert "59.9%" in svg
    far, precise = (bar(*b, "no difference shown") for b in (("far", 0.3, 0.6), ("precise", -0.002, 0.004)))
    for bars in ([small, far], [precise, far], [precise, rare, far]):  # the value itself may be far off
        low, high = figures._range(bars)
        assert high - low < 12, "in %"
        assert low < -0.6
    assert "+90.0%" in figures.segment_bars("axis", [precise, far], None)
    svg = figures.segment_bars("axis", [small, bar("like", -0.001, 0.003, "no difference shown")], None)
    assert "%</text>" not in svg, "nothing is cut off where all fit"
    low, high = figures._range([small], overall=-0.05)
    assert low < -5, "the line of the whole test set is in it"


def test_a_confidence_is_never_rounded_up_to_certainty():
    assert [in_percent(c) for c in (0.95, 0.9, 0.995, 0.999, 1 - 0.95)] == ["95%", "90%", "99.5%", "99.9%", "5%"]


def test_one_seed_is_said_as_such(tmp_path: Path):
    make_experiment(tmp_path, {"c2al": ("chosen", 0.2)}, seeds=(0,))
    assert "one seed says nothing about other seeds" in Page(write_report(tmp_path)).words


def test_arms_that_came_to_nothing_say_why(tmp_path: Path):
    finding = f"no pair differs beyond noise on {HOSTILE}"
    make_experiment(tmp_path, {"other": ("random", 0.0)}, findings={"c2al": finding, "placebo": finding})
    page = Page(write_report(tmp_path))
    assert f"Not trained: c2al, placebo. No{finding.removeprefix('no')}" in page.words
    rows = {row[0]: row for row in by_title(page, "arm", "verdict")}
    assert rows["c2al"][1].startswith("not trained")


def test_without_any_arm_that_came_to_something_there_is_a_report(tmp_path: Path):
    make_experiment(tmp_path, {}, findings={"c2al": "nothing differs"}, discovery="")
    page = Page(write_report(tmp_path))
    assert "Not trained: c2al. Nothing differs" in page.words
    assert "No comparison has an interval" in page.words


def test_only_what_passes_the_correction_is_coloured(experiment: Path):
    text = write_report(experiment).read_text()
    evaluation = read_evaluation(experiment / "evaluation" / "evaluation.json")
    for axis in ("tab", "degree"):
        (svg,) = re.findall(rf'<svg role="img" aria-label="NE_diff by segment of {axis}".*?</svg>', text, re.DOTALL)
        found = [s.difference("c2al", "baseline").judgement for s in evaluation.segments if s.axis == axis]
        passing = {j.verdict for j in found if j and j.passes}
        assert ("#2c9c6a" in svg) == ("lower" in passing)
        assert ("#cf5872" in svg) == ("higher" in passing)


def test_a_segment_that_does_not_pass_is_grey(tmp_path: Path):
    make_experiment(tmp_path, {"c2al": ("chosen", 0.0)})
    text = write_report(tmp_path).read_text()
    for svg in re.findall(r'<svg role="img" aria-label="NE_diff by .*?</svg>', text, re.DOTALL):
        assert "#2c9c6a" not in svg
        assert "#cf5872" not in svg


@pytest.mark.parametrize(
    "name",
    [
        "command.txt",
        "cohorts-0123456789/cohorts.json",
        f"trainings/c2al-{digest('c2al')}2/seed_1/run/metrics.jsonl",
        "experiment.json",
    ],
)
def test_a_missing_file_is_named(experiment: Path, tmp_path: Path, name: str):
    copy = tmp_path / "copy"
    shutil.copytree(experiment, copy)
    (copy / name).unlink()
    (copy / "report.html").unlink(missing_ok=True)
    with pytest.raises(C2ALError, match=re.escape(name)):
        write_report(copy)
    assert not (copy / "report.html").exists()


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"a": 1}', '{"step": 1}'])
def test_a_line_of_a_log_that_is_no_record_is_named(experiment: Path, tmp_path: Path, line: str):
    copy = tmp_path / "copy"
    shutil.copytree(experiment, copy)
    log = copy / "trainings" / f"c2al-{digest('c2al')}2" / "seed_1" / "run" / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(C2ALError, match=re.escape("metrics.jsonl, line 2: not")):
        write_report(copy)


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
