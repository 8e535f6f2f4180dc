"""The arithmetic of docs/scale.md, by hand."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

import cluster

ROOT = Path(__file__).parents[2]


def test_a_step_waits_for_the_busiest_rank_over_its_slower_link():
    # 90 MB at 450 GB/s are 0.2 ms; 5 MB at 50 GB/s 0.1 ms. Forward and backward: twice the longer.
    sent_N2 = np.array([[90e6, 5e6], [0.0, 0.0]])
    found = cluster.cost(sent_N2, 0, 2, 0.0096)
    assert found.exchange == pytest.approx(0.0004)
    assert found.busiest == pytest.approx(2.0)
    assert found.samples_per_second(2, 4096) == pytest.approx(2 * 4096 / 0.01)


def test_an_all_reduce_passes_twice_and_shares_the_network_links_of_a_host():
    none = np.ones((16, 2))
    # 2 * 4 bytes * 1e9 parameters * 15/16 within the host; an eighth of 8 GB through each of 8 network links.
    assert cluster.cost(none, 10**9, 16, 0.01).allreduce == pytest.approx(max(7.5e9 / 450e9, 1e9 / 50e9))
    assert cluster.cost(none, 10**9, 8, 0.01).allreduce == pytest.approx(7e9 / 450e9)


def test_the_page_shows_what_the_constants_give():
    """All that readers and the store must bring; of the exchange what needs no planner. --page makes it again."""
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    block = page.partition(cluster.BEGIN)[2].partition(cluster.END)[0]
    assert f"| whole training step, ms | {cluster.STEP_MS} |" in block, (
        "run python benchmarks/cluster.py --page docs/scale.md"
    )
    assert cluster._feeding(cluster.dhen_production().config, cluster.STEP_MS) in block
    rows = re.findall(
        r"^\| (\d+) \| ([a-z ]+) \| (fp\d+) \| [\d.]+ \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", block, re.MULTILINE
    )
    assert {int(gpus) for gpus, *_ in rows} == set(cluster.GPUS)
    for *_, exchange, step in rows:
        assert float(step) == pytest.approx(cluster.STEP_MS + float(exchange), abs=0.011)
