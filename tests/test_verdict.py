"""The verdict on luck and on planted skill, on what needs no statistics, and on input that cannot be judged

The small form of `benchmarks/verdict.py`: synthetic returns, seeded."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.signal import lfilter
from scipy.stats import norm

from tradelab.evaluation.deflated_sharpe import chance_of_best, probabilistic_sharpe
from tradelab.evaluation.stability import annual_sharpes, degradation
from tradelab.evaluation.verdict import beyond, verdict
from tradelab.sections import Displayable

DAYS = pd.date_range("2021-01-01", periods=1_095, tz="UTC", name="open_time")
QUICK = dict(draws=200, blocks=6)


def noise(seed, candidates, count=1_095, sharpe=0.):
    "Returns of candidates that all have the same annual Sharpe ratio"
    values = np.random.default_rng(seed).normal(sharpe * .01 / 365 ** .5, .01, (count, candidates))
    return pd.DataFrame(values, pd.date_range("2021-01-01", periods=count, tz="UTC", name="open_time"))


def held(seed, sharpe=0., count=1_095):
    return noise(100_000 + seed, 1, count, sharpe)[0] * 2.5


def row(found, what): return next(each for each in found.evidence if each.what.startswith(what))


# luck

def test_the_best_of_a_thousand_random_rules_is_no_evidence():
    said = 0
    for seed in range(25):
        returns = noise(seed, 1_000)
        said += verdict(returns, annual_sharpes(returns).idxmax(), trials=1_000, seed=seed, **QUICK).skill
    assert said <= 1


def test_nor_is_the_best_in_training_judged_after_it():
    said = 0
    for seed in range(25):
        returns = noise(seed, 1_000, 2_190)
        best = annual_sharpes(returns[:1_095]).idxmax()
        said += verdict(returns[1_095:], best, trials=1_000, seed=seed, **QUICK).skill
    assert said == 0


def test_nor_is_a_rising_market():
    "A market with a Sharpe ratio of 2, of which each candidate holds a share: fine ratios, and no skill in them"
    said, fine = 0, 0
    for seed in range(25):
        market = held(seed, 2.)
        returns = noise(seed, 20).mul(.7).add(.3 * market, axis=0).assign(hold=market)
        best = annual_sharpes(returns.drop(columns="hold")).idxmax()
        found = verdict(returns, best, trials=20, baselines=["hold"], seed=seed, **QUICK)
        said += found.skill
        fine += row(found, "SPA").passed
    assert said <= 1
    assert fine > 12 # without the baseline it would have been called skill


def test_the_chance_is_a_p_value():
    "Of the best of ten without skill, 5 % of the histories have a chance of at most 5 %"
    chances = [chance_of_best(noise(seed, 10).to_numpy()[:, annual_sharpes(noise(seed, 10)).argmax()], 10)
               for seed in range(400)]
    assert .03 < np.mean(np.array(chances) <= .05) < .08
    assert .45 < np.mean(np.array(chances) <= .5) < .55


def test_returns_that_follow_one_another_are_no_skill():
    "The best of fifty, the others thrown away, with fat tails and an autocorrelation of 0.3: a third passed before"
    random, said = np.random.default_rng(30), 0
    for seed in range(60):
        drawn = lfilter([1], [1, -.3], random.standard_t(3, (1_095, 50)), axis=0) * .01
        best = drawn[:, (drawn.mean(axis=0) / drawn.std(axis=0)).argmax()]
        returns = held(seed).to_frame("hold").assign(best=best)
        said += verdict(returns, "best", trials=50, baselines=["hold"], **QUICK).skill
    assert said <= 5


# skill

@pytest.mark.parametrize("candidates, least", [(1, .8), (10, .5)])
def test_planted_skill_is_found(candidates, least):
    "An annual Sharpe ratio of 2 over three years: near the power of the best test that could be"
    said = []
    for seed in range(30):
        returns = noise(seed, candidates).assign(hold=held(seed))
        returns[0] += 2 * .01 / 365 ** .5
        said.append(verdict(returns, 0, trials=candidates, baselines=["hold"], seed=seed, **QUICK).skill)
    bound = norm.sf(norm.isf(1 - .95 ** (1 / candidates)) - 2 * 3 ** .5)
    assert least <= np.mean(said) <= bound + .1


def test_more_trials_ask_for_more():
    "What is found alone is not found among what was thrown away, too"
    returns = noise(1, 1, sharpe=2.5)
    alone, among = (verdict(returns, 0, trials=trials, **QUICK) for trials in (1, 100_000))
    assert alone.skill
    assert not among.skill
    assert "the best of 100,000 trials without skill does as well in" in among.sentence


def test_skill_says_what_speaks_for_it():
    returns = noise(1, 1, sharpe=4.).assign(hold=held(1), flat=0.)
    found = verdict(returns, 0, trials=3, baselines=["flat", "hold"], **QUICK)
    assert found.sentence.startswith("evidence of skill: the best of 3 trials without skill does as well in less")
    assert found.sentence.endswith("and hold does not explain it")
    assert "\n" not in found.sentence
    assert {"data snooping", "interval", "over time"} <= set(found.parts)
    assert all(isinstance(each, Displayable) for each in (found, *found.parts.values()))
    assert (found.table()["passed"] == "yes").sum() >= 6


# what is asked beside luck

@given(st.integers(0, 99), st.floats(-2, 2))
@settings(deadline=None, max_examples=20)
def test_a_share_of_the_baseline_is_taken_out(seed, share):
    own, market = noise(seed, 1)[0], held(seed)
    assert_allclose(beyond(own + share * market, market), beyond(own, market), atol=1e-12)


def test_who_holds_the_market_has_no_skill():
    market = held(0, 3.)
    returns = pd.DataFrame({"mine": .4 * market, "hold": market})
    found = verdict(returns, "mine", trials=1, baselines=["hold"], **QUICK)
    assert not found.skill
    assert not row(found, "Chance beyond hold").passed
    assert row(found, "Chance of the best").passed


def test_a_baseline_that_did_better_is_said():
    returns = noise(0, 1, sharpe=3.).assign(hold=held(0, 9.))
    assert verdict(returns, 0, trials=1, baselines=["hold"], **QUICK).sentence.startswith(
        "no evidence of skill: hold did better (its Sharpe ratio is ")


def test_seeds_count():
    returns = noise(1, 1, sharpe=4.)
    good, bad, few = noise(2, 5, sharpe=3.), noise(2, 5, sharpe=-3.), noise(2, 4, sharpe=3.)
    assert verdict(returns, 0, trials=5, seeds=good, **QUICK).skill
    assert "its median seed makes nothing" in verdict(returns, 0, trials=5, seeds=bad, **QUICK).sentence
    assert "4 seeds are too few" in verdict(returns, 0, trials=5, seeds=few, **QUICK).sentence


def test_what_informs_decides_nothing():
    returns = noise(1, 6)
    returns[0] += 5 * .01 / 365 ** .5
    lost = degradation(pd.Series([9., 9.5]), pd.Series([.1, .2]))
    found = verdict(returns, 0, trials=6, in_sample=lost, **QUICK)
    assert found.skill
    assert not row(found, "Sharpe ratio left").passed
    assert found.parts["degradation"] is lost
    by_candidate = verdict(returns, 0, trials=6, in_sample=annual_sharpes(returns) + 1, **QUICK)
    assert by_candidate.parts["degradation"].count == 6


def test_overfitting_is_shown_with_its_spread():
    found = verdict(noise(0, 10), 0, trials=10, **QUICK)
    assert "±" in row(found, "Probability of overfitting").words
    assert not row(found, "Probability of overfitting").needed


# what needs no statistics

def lost(returns, most):
    "The same with a day on which that much was lost"
    returns.iloc[500] = most
    return returns


@pytest.mark.parametrize("change, said", [
    (lambda returns: returns * 0, "it never traded"),
    (lambda returns: lost(returns, -1.), "all was lost on 2022-05-16"),
    (lambda returns: lost(returns, -3.), "all was lost on 2022-05-16"),
    (lambda returns: returns[:99], "99 returns are too few to judge: it takes at least 100"),
    (lambda returns: returns[:1], "1 returns are too few to judge: it takes at least 100"),
    (lambda returns: returns - .01, "it lost money"),
    (lambda returns: returns * 0 - 1e-4, "each of its returns is -0.0001, and without risk")])
def test_it_is_said(change, said):
    returns = change(noise(0, 3))
    found = verdict(returns, 0, trials=3, baselines=[1], **QUICK)
    assert not found.skill
    assert said in found.sentence
    assert found.sentence.startswith("no evidence of skill: ")
    found.plot()
    assert said in found._repr_html_()


def test_others_may_be_flat_or_ruined():
    returns = noise(0, 12).assign(flat=0.)
    returns.iloc[300, 3] = -1.5
    returns[4] = 0.
    found = verdict(returns, 0, trials=12, baselines=["flat", 3], **QUICK)
    assert found.sentence
    found.plot()


def test_alone_without_baselines_is_judged_against_nothing_held():
    found = verdict(noise(0, 1)[[0]], 0, trials=1, **QUICK)
    assert "overfitting" not in found.parts
    assert_allclose(row(found, "Chance of the best").value, 1 - probabilistic_sharpe(noise(0, 1)[0]), rtol=.05)


def test_without_a_baseline_the_market_may_be_what_was_found():
    found = verdict(noise(0, 1, sharpe=4.)[[0]], 0, trials=1, **QUICK)
    assert found.skill
    assert found.sentence.endswith("it stands beside no baseline that moves: holding the market may explain it")


def test_the_baseline_itself_did_as_well():
    returns = noise(0, 1).assign(hold=held(0, 1.))
    returns[0] = 3 * returns["hold"]
    assert verdict(returns, 0, trials=1, baselines=["hold"], **QUICK).sentence.startswith(
        "no evidence of skill: hold did as well")


def test_the_same_seed_says_the_same():
    one, other = (verdict(noise(0, 5), 0, trials=5, **QUICK) for _ in range(2))
    assert one.evidence == other.evidence


# what cannot be judged

@pytest.mark.parametrize("change, words", [
    (dict(subject="x"), "'x' is no column of returns: it has 0, 1"),
    (dict(baselines=["hold"]), "'hold' is no column of returns"),
    (dict(baselines=[0]), "'0' is judged, it cannot be a baseline"),
    (dict(trials=2), "trials was 2, but returns has 3 candidates beside its baselines: count all that was tried"),
    (dict(trials=0), "trials must be a whole number of at least 1, was 0"),
    (dict(trials=3.5), "trials must be a whole number of at least 1, was 3.5"),
    (dict(level=95), "level must be between 0 and 0.5, was 95"),
    (dict(returns=noise(0, 3).T), "it lies the wrong way round, pass returns.T"),
    (dict(returns=noise(0, 3).mask(noise(0, 3) > .03)), "is nan at 20"),
    (dict(returns=noise(0, 3).to_numpy()), "must be a DataFrame"),
    (dict(returns=noise(0, 3).tz_localize(None)), "needs a UTC DatetimeIndex"),
    (dict(draws=10), "draws must be at least 100, was 10"),
    (dict(blocks=7), "blocks must be even"),
    (dict(in_sample=pd.Series({"z": 1.})), "in_sample has 'z', which is no column of returns")])
def test_it_is_refused(change, words):
    given = dict(returns=noise(0, 3), subject=0, trials=3) | QUICK | change
    with pytest.raises(ValueError, match=words): verdict(**given)
