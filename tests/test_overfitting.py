"""The statistics of overfitting against published numbers, brute force, a second implementation, and limit cases

`purgedcv` 0.1.11 is asked where it is installed (`pip install purgedcv==0.1.11`); its numbers for fixed data are kept
here, so that the rest needs no package."""
import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from tradelab.evaluation.deflated_sharpe import (
    SharpeMoments,
    deflated_sharpe,
    expected_maximum_sharpe,
    minimum_backtest_length,
    minimum_track_record,
    probabilistic_sharpe,
    sharpe_moments,
)
from tradelab.evaluation.overfitting import overfitting, pbo_spread


def days(count): return pd.date_range("2021-01-01", periods=count, tz="UTC", name="open_time")


def noise(count, candidates, seed=0, mean=0.):
    return pd.DataFrame(np.random.default_rng(seed).normal(mean, .01, (count, candidates)), days(count))


# Sharpe ratios

def test_published_numbers():
    "Bailey & Lopez de Prado 2012 and 2014, to six digits"
    monthly = SharpeMoments.from_annual(1.585, 12, 24, -2.448, 10.164)
    assert_allclose(probabilistic_sharpe(monthly), .913234, atol=5e-7)
    best = SharpeMoments.from_annual(2.5, 250, 1_250, -3, 10)
    assert_allclose(deflated_sharpe(best, 100, .5 / 250), .900397, atol=5e-7)
    assert_allclose(expected_maximum_sharpe(100, .5 / 250), .113172, atol=5e-7)


def test_purgedcv_says_the_same():
    "Numbers of purgedcv 0.1.11 for five hundred returns; its moments are unbiased ones, so it is given ours"
    returns = np.random.default_rng(1).standard_t(4, 500) * .01 + .001
    moments = SharpeMoments(returns.mean() / returns.std(), 500, stats.skew(returns, bias=False),
                            stats.kurtosis(returns, bias=False, fisher=False))
    assert_allclose(probabilistic_sharpe(moments, .02), .6942456454936943, rtol=1e-12)
    assert_allclose(deflated_sharpe(moments, 50, .001), .25664459222719416, rtol=1e-12)
    assert math.ceil(minimum_track_record(moments)) == 1_482
    assert_allclose(minimum_backtest_length(50, 1.3), 3.0660093332041685, rtol=1e-12)


def test_moments_are_those_of_scipy():
    returns = np.random.default_rng(1).standard_t(4, 500)
    found = sharpe_moments(returns)
    assert_allclose(found.skew, stats.skew(returns))
    assert_allclose(found.kurtosis, stats.kurtosis(returns, fisher=False))
    assert_allclose(found.sharpe, returns.mean() / returns.std(ddof=1))


@given(st.floats(-.3, .3), st.integers(30, 5_000), st.floats(-2, 2), st.floats(0, 20), st.integers(1, 10_000))
@settings(deadline=None)
def test_more_trials_never_help(sharpe, count, skew, over, trials):
    moments = SharpeMoments(sharpe, count, skew, 1 + skew ** 2 + over)
    assert deflated_sharpe(moments, trials + 1) <= deflated_sharpe(moments, trials) + 1e-12
    assert 0 <= deflated_sharpe(moments, trials) <= 1
    assert deflated_sharpe(moments, 1) == probabilistic_sharpe(moments)


@given(st.floats(.02, .5), st.floats(-2, 2), st.floats(0, 20), st.sampled_from((.9, .95, .99)))
@settings(deadline=None)
def test_the_track_record_is_just_long_enough(sharpe, skew, over, level):
    kurtosis = 1 + skew ** 2 + over
    needed = max(11, math.ceil(minimum_track_record(SharpeMoments(sharpe, 100, skew, kurtosis), 0., level)))
    assert probabilistic_sharpe(SharpeMoments(sharpe, needed, skew, kurtosis)) >= level - 1e-9
    if needed > 11: assert probabilistic_sharpe(SharpeMoments(sharpe, needed - 1, skew, kurtosis)) < level


def test_the_probability_is_right_under_fat_tails():
    "Without skill, 5 % of the histories have a probability above 0.95: returns of Student's t, scaled"
    random = np.random.default_rng(0)
    above = np.mean([probabilistic_sharpe(random.standard_t(5, 1_000)) > .95 for _ in range(4_000)])
    assert .04 < above < .06


# overfitting

def by_hand(returns, blocks):
    "CSCV as the paper writes it, way by way"
    pieces = np.array_split(returns, blocks)
    logits, chosen = [], []
    for inside in combinations(range(blocks), blocks // 2):
        first = np.concatenate([pieces[each] for each in inside])
        second = np.concatenate([pieces[each] for each in range(blocks) if each not in inside])
        within, without = (each.mean(axis=0) / each.std(axis=0, ddof=1) for each in (first, second))
        best = int(within.argmax())
        rank = stats.rankdata(without)[best] / (returns.shape[1] + 1)
        logits.append(math.log(rank / (1 - rank)))
        chosen.append((within[best], without[best]))
    return np.array(logits), np.array(chosen)


@pytest.mark.parametrize("count, candidates, blocks", [(400, 7, 6), (403, 12, 8), (157, 2, 4)])
def test_cscv_by_hand(count, candidates, blocks):
    returns = noise(count, candidates, 5)
    logits, chosen = by_hand(returns.to_numpy(), blocks)
    found = overfitting(returns, blocks, draws=2)
    assert_allclose(found.logits, logits, atol=1e-12)
    assert_allclose(found.ways["in_sample"], chosen[:, 0] * 365 ** .5)
    assert_allclose(found.ways["out_of_sample"], chosen[:, 1] * 365 ** .5)
    assert found.pbo == (logits <= 0).mean()
    assert_allclose(found.slope, np.polyfit(*chosen.T, 1)[0])
    assert found.loss == (chosen[:, 1] < 0).mean()


def test_cscv_of_purgedcv():
    peer = pytest.importorskip("purgedcv", reason="pip install purgedcv==0.1.11")
    returns = noise(600, 20, 3)
    expected = peer.probability_of_backtest_overfitting(returns.to_numpy().T, 8)
    found = overfitting(returns, 8, draws=2)
    assert_allclose(np.sort(found.logits), np.sort(expected.logits))
    assert_allclose(found.slope, expected.slope)
    assert found.pbo == expected.pbo


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("candidates", [9, 50, 200])
def test_demeaned_noise_is_exactly_one(seed, candidates):
    returns = noise(1_600, candidates, seed)
    assert overfitting(returns - returns.mean(), 16, draws=2).pbo == 1


def test_a_true_best_is_never_overfitting():
    returns = noise(1_000, 10)
    returns[3] += .02
    found = overfitting(returns, 8)
    assert found.pbo == 0
    assert set(found.ways["candidate"]) == {3}
    assert found.dominance == 1
    assert found.spread == 0


@given(st.integers(0, 99), st.floats(.01, 100), st.permutations(range(6)))
@settings(deadline=None, max_examples=20)
def test_risk_and_order_of_candidates_do_not_matter(seed, scale, order):
    returns = noise(200, 6, seed)
    moved = returns.iloc[:, list(order)] * scale
    assert_allclose(overfitting(moved, 6, draws=2).logits, overfitting(returns, 6, draws=2).logits)


@pytest.mark.parametrize("candidates, together", [(10, 0.), (50, 0.), (50, .7)])
def test_the_spread_is_that_between_data_sets(candidates, together):
    "Forty data sets of noise, independent columns and such as share most of their moves"
    def drawn(seed):
        random = np.random.default_rng(seed)
        common = random.normal(0, .01, (1_095, 1))
        return math.sqrt(1 - together) * random.normal(0, .01, (1_095, candidates)) + math.sqrt(together) * common
    several = [drawn(seed) for seed in range(40)]
    met = [overfitting(pd.DataFrame(each, days(1_095)), 10, draws=2).pbo for each in several]
    claimed = np.mean([pbo_spread(each, 10, 20) for each in several[:20]])
    assert .35 < np.mean(met) < .65
    assert .7 < claimed / np.std(met) < 1.45


def test_the_spread_shrinks_where_differences_are_real():
    "It must not say of a clear case what it says of noise"
    returns = noise(1_095, 50) + np.linspace(-3, 3, 50) * .01 / 365 ** .5
    assert overfitting(returns, 10).spread < .08 < .12 < overfitting(noise(1_095, 50), 10).spread


def test_a_still_column_is_refused_and_a_quiet_half_is_not():
    returns = noise(400, 5)
    with pytest.raises(ValueError, match="'2' is constant"): overfitting(returns.assign(**{"x": 1}).rename(
        columns={"x": "2"}).drop(columns=2), 4)
    returns.iloc[:200, 0] = 0.
    assert np.isfinite(overfitting(returns, 4).logits).all()


def test_the_wrong_way_round_is_refused():
    returns = noise(400, 5)
    with pytest.raises(ValueError, match="it lies the wrong way round, pass returns.T"): overfitting(returns.T, 4)
    with pytest.raises(ValueError, match="must be a DataFrame"): overfitting(returns.to_numpy().T, 4)
    with pytest.raises(ValueError, match="it lies the wrong way round"): overfitting(pd.DataFrame(np.ones((5, 400))), 4)
