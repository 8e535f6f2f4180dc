import numpy as np
import pytest
from scipy import stats

from c2al.evaluation.multiple import benjamini_hochberg, holm


def test_holm_by_hand():
    found = holm(np.array([0.04, 0.001, 0.013, 0.5]), 0.05)
    # Sorted .001 .013 .04 .5, times 4 3 2 1, made monotone.
    assert found.p_M == pytest.approx([0.08, 0.004, 0.039, 0.5])
    assert found.passes_M.tolist() == [False, True, True, False]
    assert found.level_M == pytest.approx([0.05 / 2, 0.05 / 4, 0.05 / 3, 0.05 / 2])


@pytest.mark.parametrize("dependent", [False, True])
def test_false_discovery_control_against_scipy(dependent: bool):
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = np.concatenate([rng.random(12), rng.random(8) ** 6])
        method = "by" if dependent else "bh"
        assert benjamini_hochberg(p, 0.05, dependent).p_M == pytest.approx(
            stats.false_discovery_control(p, method=method)
        )


@pytest.mark.parametrize("correct", [holm, benjamini_hochberg, lambda p, a: benjamini_hochberg(p, a, dependent=True)])
def test_levels_adjusted_p_values_and_decisions_say_the_same(correct):
    rng = np.random.default_rng(1)
    for _ in range(300):
        p = rng.random(rng.integers(1, 25)) ** rng.integers(1, 8)
        found = correct(p, 0.05)
        assert (found.passes_M == (found.p_M <= 0.05)).all()
        assert (found.passes_M == (p <= found.level_M)).all()


@pytest.mark.parametrize("correct", [holm, benjamini_hochberg])
def test_one_and_none(correct):
    assert correct(np.array([0.03]), 0.05).p_M == pytest.approx([0.03])
    assert correct(np.array([0.03]), 0.05).level_M == pytest.approx([0.05])
    assert correct(np.array([]), 0.05).p_M.shape == (0,)


def test_all_pass_and_none_passes():
    for correct in (holm, benjamini_hochberg):
        assert correct(np.full(5, 1e-6), 0.05).passes_M.all()
        assert not correct(np.full(5, 0.9), 0.05).passes_M.any()
