"""The statistics of overfitting against published numbers, brute force, a second implementation, and limit cases

`purgedcv` 0.1.11 is asked where it is installed (`pip install purgedcv==0.1.11`); its numbers for fixed data are kept
here, so that the rest needs no package."""
import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from arch.bootstrap import SPA
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from tradelab.evaluation.data_snooping import best_by_chance, data_snooping, drawn_means
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
from tradelab.evaluation.stability import degradation, over_time


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


@pytest.mark.parametrize("trials", [10 ** 16, 10 ** 30])
def test_any_number_of_trials_counts(trials):
    assert 8 < expected_maximum_sharpe(trials) < 12


def test_two_values_have_a_probability():
    "Where skew and Sharpe ratio leave the error nothing, rounding may leave it less"
    for sharpe in (.1, .3, .7, 1., 1.3):
        assert probabilistic_sharpe(SharpeMoments(sharpe, 100, 2 / sharpe, 1 + 4 / sharpe ** 2)) > .999


@pytest.mark.parametrize("blocks", ["16", 16., 3, 22])
def test_blocks_are_whole_and_even(blocks):
    with pytest.raises(ValueError, match="blocks must be even, from 4 to 20"): overfitting(noise(500, 3), blocks)


def test_spans_within_a_day_keep_their_names():
    times = pd.date_range("2021", periods=60, freq="min", tz="UTC")
    assert len(over_time(noise(60, 1)[0].set_axis(times)).sharpes) == 6


def test_the_wrong_way_round_is_refused():
    returns = noise(400, 5)
    with pytest.raises(ValueError, match="it lies the wrong way round, pass returns.T"): overfitting(returns.T, 4)
    with pytest.raises(ValueError, match="must be a DataFrame"): overfitting(returns.to_numpy().T, 4)
    with pytest.raises(ValueError, match="it lies the wrong way round"): overfitting(pd.DataFrame(np.ones((5, 400))), 4)


# data snooping and stability

def test_p_values_are_those_of_arch():
    "Without studentisation, on the same histories; candidates of many sizes, some so bad that they must not count"
    returns = np.random.default_rng(0).normal(np.linspace(-.002, .0005, 12), .01, (500, 12))
    theirs = SPA(np.zeros(500), -returns, block_size=4, reps=400, seed=3)
    theirs.compute()
    mean, drawn = returns.mean(axis=0), drawn_means(returns, 4, 400, 3)
    chance = best_by_chance(mean, drawn, np.sqrt(theirs._loss_diff_var / 500), 1., 500)
    assert [(each > mean.max()).mean() for each in chance] == theirs.pvalues.tolist()
    assert theirs.pvalues["lower"] < theirs.pvalues["upper"]


def test_the_best_of_many_without_skill_is_seldom_called_good():
    "5 % of the time, at 5 %: eighty data sets of forty candidates"
    p_values = [data_snooping(noise(500, 40, seed), draws=200).consistent for seed in range(80)]
    assert np.mean(np.array(p_values) <= .05) <= .1
    assert .35 < np.mean(p_values) < .65


def test_the_worst_of_all_does_not_hide_the_best():
    "What White's check cannot: the wildest candidate decides alone there"
    returns = noise(1_000, 10)
    returns["skill"] = noise(1_000, 1, 7, .0015)[0]
    returns["wild"] = noise(1_000, 1, 8)[0] * 30 - .01
    found = data_snooping(returns, draws=500)
    assert found.best == "skill"
    assert found.consistent < .05 < found.reality_check


def test_a_benchmark_that_is_better_is_not_beaten():
    returns = noise(1_000, 5)
    assert data_snooping(returns.assign(hold=noise(1_000, 1, 9, .003)[0]), "hold", draws=200).consistent > .9


def test_p_values_are_drawn_once():
    assert data_snooping(noise(300, 5), draws=200).lower == data_snooping(noise(300, 5), draws=200).lower


@given(st.integers(2, 12), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_spans_hold_all_returns_once(parts, seed):
    returns = noise(300, 1, seed)[0]
    found = over_time(returns, parts)
    pieces = np.split(returns.to_numpy(), np.linspace(0, 300, parts + 1).astype(int)[1:-1])
    assert_allclose(found.sharpes, [each.mean() / each.std(ddof=1) * 365 ** .5 for each in pieces])
    assert found.above == np.mean(found.sharpes > 0)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=20))
@settings(deadline=None)
def test_the_slope_of_degradation_is_that_of_least_squares(pairs):
    inside, outside = (pd.Series(each) for each in np.array(pairs).T)
    found = degradation(inside, outside)
    if inside.std() > 1e-3: assert_allclose(found.slope, stats.linregress(inside, outside).slope, atol=1e-8)
    assert found.count == len(pairs)
