"Plug-in policies: forecasts against their libraries, controllers against brute force and the paper, storing, trading"
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightgbm
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.tree import DecisionTreeRegressor

from tests.test_formats import CONFIGURATION, ID
from tradelab.evaluation.difference import first_difference
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.learn.plug_in import (
    PENALTIES,
    aim_portfolio,
    blocks_of,
    fit_forecast,
    fit_plug_in,
    left_out,
    left_out_trees,
    no_trade_band,
    nodes_of,
    sample_of,
    transitions,
)
from tradelab.market.synthetic import ar1, correlated
from tradelab.policies import Policy, Scaler
from tradelab.runs.forecast import AimPortfolio, LinearForecast, NoTradeBand, TreeForecast, plug_in, plug_in_numbers
from tradelab.runs.formats import POLICY, DamagedRunError, policy_bytes, read_policy
from tradelab.runs.registry import load, save
from tradelab.runs.run import Run
from tradelab.settings import CostModel, Limits
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import prepare

FEATURES = ("return(1)", "return(5)")
SCALER = Scaler((0., 0.), (.01, .02))
EDGES = np.linspace(-1, 1, 5)
BAND = NoTradeBand(np.column_stack([2e-4 + 1e-3 * EDGES, EDGES]), np.column_stack([-2e-4 + 1e-3 * EDGES, EDGES]))
SEEN = np.random.default_rng(1).normal(size=(400, 4)).astype(np.float32)


def rows_of(tree):
    "A tree of scikit-learn as nodes"
    leaf = tree.children_left < 0
    return np.column_stack([np.where(leaf, -1, tree.feature), tree.threshold, tree.children_left * ~leaf,
                            tree.children_right * ~leaf, tree.value[:, 0, 0]])


def grown(inputs=4, seed=0):
    "Three trees of scikit-learn, and their forecast"
    random = np.random.default_rng(seed)
    fitted = [DecisionTreeRegressor(max_leaf_nodes=8, random_state=0).fit(SEEN[:, :inputs],
              1e-3 * (SEEN[:, 0] * SEEN[:, 1] + random.normal(size=len(SEEN)))) for _ in range(3)]
    return fitted, TreeForecast(LinearForecast(1e-5, np.full(inputs, 1e-4)), .8,
                                tuple(rows_of(each.tree_) for each in fitted))


def policy_of(forecast, controller, symbols=1, window=2):
    return Policy("plugged", plug_in, plug_in_numbers(forecast, controller, symbols), FEATURES, window, SCALER)


LINEAR = LinearForecast(1e-5, np.array([1e-4, -3e-4, -1e-3, 2e-4]))
KINDS = [(LINEAR, BAND), (grown()[1], BAND), (LINEAR, AimPortfolio(.1, 400.)), (grown()[1], AimPortfolio(.1, 400.))]
NAMES = ["linear band", "trees band", "linear aim", "trees aim"]


def test_trees_forecast_what_scikit_learn_forecasts():
    fitted, forecast = grown()
    expected = sum(each.predict(SEEN) for each in fitted)
    np.testing.assert_array_equal(forecast.over(SEEN), forecast.line.over(SEEN) + .8 * expected)


@given(st.integers(1, 60), st.integers(0, 1_000))
@settings(max_examples=30)
def test_a_linear_forecast_is_the_product_of_numpy(inputs, seed):
    random = np.random.default_rng(seed)
    seen, weights = random.normal(size=(5, inputs)).astype(np.float32), random.normal(size=inputs)
    np.testing.assert_allclose(LinearForecast(.5, weights).over(seen), .5 + seen.astype(float) @ weights, atol=1e-12)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.floats(-2, 2), st.floats(-1, 1), st.floats(0, .5))
@settings(max_examples=60)
def test_a_band_is_a_clip_between_the_lines_of_numpy(edges, forecast, held, width):
    edges = np.sort(edges)
    lower = np.column_stack([np.linspace(-1, 1, len(edges)) + width, edges])
    upper = np.column_stack([np.linspace(-1, 1, len(edges)) - width, edges])
    policy = Policy("band", plug_in, plug_in_numbers(LinearForecast(0., np.ones(1)), NoTradeBand(lower, upper)))
    seen = np.array([[forecast, held, 0, 0, 0]], np.float32)
    low, high = (np.interp(float(seen[0, 0]), *each.T) for each in (lower, upper))
    np.testing.assert_allclose(policy.act(seen), np.clip(float(seen[0, 1]), low, high), atol=1e-9)


@pytest.mark.parametrize("forecast, controller", KINDS, ids=NAMES)
def test_both_engines_decide_alike(forecast, controller):
    candles = ar1(400, seed=3)
    results = [backtest(policy_of(forecast, controller), candles, engine=engine, baselines=(), keep_observations=True,
                        limits=Limits(max_position=.5)) for engine in ("vectorised", "event")]
    assert first_difference(*results) is None
    assert len(results[0].fills) > 5


def test_each_symbol_is_asked_by_itself():
    frames = correlated(400, seed=2)
    together = backtest(policy_of(LINEAR, BAND, 2), frames, baselines=()).journal
    for symbol, frame in frames.items():
        alone = backtest(policy_of(LINEAR, BAND), {symbol: frame}, baselines=()).journal
        of_it = together[together["symbol"] == symbol]
        np.testing.assert_allclose(of_it["target"][:50], alone["target"][:50], atol=.02) # of another equity
        assert of_it["target"].iloc[0] == alone["target"].iloc[0]


@pytest.mark.parametrize("forecast, controller", KINDS, ids=NAMES)
def test_a_run_is_kept_and_trades_the_same(tmp_path, forecast, controller):
    made = Run(ID, policy_of(forecast, controller), Limits(), instruments=(BITCOIN,), timeframe="1h",
               config=CONFIGURATION)
    save(made, folder=tmp_path)
    kept = load(ID, tmp_path)
    assert kept.policy.function is plug_in
    assert np.array_equal(kept.policy.parameters.view(np.int64), made.policy.parameters.view(np.int64))
    candles = ar1(300, seed=5)
    assert first_difference(backtest(made, candles, baselines=()), backtest(kept, candles, baselines=())) is None


def test_a_kept_plug_in_is_loaded_without_what_fitted_it(tmp_path):
    "Also it decides on this machine as where it was fitted"
    from tradelab.runs.self_test import SELF_TEST
    candles = ar1(3_000, seed=6)
    from tradelab.learn.agents import train
    kept = train("boosted", candles, Observation(["return(1)"]), steps=1, folder=tmp_path, progress=False)
    assert (kept.folder / SELF_TEST).exists()
    code = ("import sys; from pathlib import Path; from tradelab.runs.registry import load\n"
            "from tradelab.runs.self_test import self_test\n"
            f"run = load({kept.id!r}, Path({str(tmp_path)!r})); self_test(run)\n"
            "print([name for name in ('torch', 'lightgbm', 'sklearn', 'tradelab.learn') if name in sys.modules])")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr
    assert kept.config["agent"] == "boosted"
    assert len(kept.plot().axes) == 1


@pytest.mark.parametrize("change, sentence", [
    (lambda numbers, facts: (numbers[:-1], facts), "were promised|was promised"),
    (lambda numbers, facts: (np.where(numbers == numbers.max(), np.nan, numbers), facts), "not finite"),
    (lambda numbers, facts: (np.where(np.arange(len(numbers)) == 0, 0., numbers), facts), "are not an intercept and"),
    (lambda numbers, facts: (numbers, facts | {"controller": "aim"}), "its header says aim"),
    (lambda numbers, facts: (numbers, facts | {"function": "mlp"}), "are no network"),
    (lambda numbers, facts: (np.where(np.arange(len(numbers)) == 2, 9., numbers), facts | {"width": "9"}), "9 numbers"),
    (lambda numbers, facts: (np.where(np.arange(len(numbers)) == 3, 2., numbers), facts | {"symbols": "2"}),
     "maps 16 numbers to 2")])
def test_a_damaged_file_is_refused(tmp_path, change, sentence):
    policy = policy_of(grown()[1], BAND)
    facts = {"function": "plug_in", "name": "plugged", "forecast": "trees", "controller": "band", "width": "8",
             "symbols": "1"}
    path = tmp_path / POLICY
    path.write_bytes(policy_bytes(policy))
    seen = replace(policy, name="seen")
    assert np.array_equal(read_policy(path, seen, 8, 1).parameters, policy.parameters)
    numbers, header = change(policy.parameters, facts)
    path.write_bytes(safetensors.numpy.save({"parameters": np.ascontiguousarray(numbers)}, header))
    with pytest.raises(DamagedRunError, match=sentence): read_policy(path, seen, 8, 1)


@given(st.integers(0, 10_000), st.floats(-1e9, 1e9))
@settings(max_examples=200, deadline=None)
def test_no_changed_number_is_run_unchecked(place, value):
    "Whatever one number is changed to: it is refused, or every walk through the trees ends inside them"
    numbers = policy_of(grown()[1], BAND).parameters.copy()
    numbers[place % len(numbers)] = value
    try: policy = Policy("changed", plug_in, numbers, FEATURES, 2)
    except ValueError: return
    assert np.isfinite(policy.act(np.ones((1, 8), np.float32))).all()


@pytest.mark.parametrize("seed", range(3))
def test_trees_forecast_what_lightgbm_forecasts(seed):
    "To the bit, on rows that it was not grown on, thresholds themselves among them"
    random = np.random.default_rng(seed)
    seen = random.normal(size=(2_000, 5)).astype(np.float32)
    value = np.sin(seen[:, 0]) * seen[:, 1] + .1 * random.normal(size=2_000)
    booster = lightgbm.train(dict(num_leaves=31, num_threads=1, verbosity=-1, seed=seed),
                             lightgbm.Dataset(seen, value), 100)
    trees = tuple(nodes_of(each["tree_structure"]) for each in booster.dump_model()["tree_info"])
    asked = random.normal(size=(5_000, 5)).astype(np.float32)
    asked[:len(trees), 0] = [tree[0, 1] for tree in trees]
    ours = TreeForecast(LinearForecast(0., np.zeros(5)), 1., trees).over(asked)
    np.testing.assert_array_equal(ours, booster.predict(asked))


def brute_band(persistence, spread, risk, cost, levels):
    "Lower and upper edge at each forecast by value iteration over every pair of position and target"
    grid, chances = transitions(persistence, spread)
    positions = np.linspace(-1, 1, levels)
    now = grid[:, None] * positions - .5 * risk * positions ** 2
    paid = cost * np.abs(positions[:, None] - positions)                  # (from, to)
    value = np.zeros((len(grid), levels))
    for _ in range(5_000):
        options = (now + chances @ value)[:, None, :] - paid
        after = options.max(axis=2)
        after -= after[len(grid) // 2, levels // 2]
        if np.abs(after - value).max() < 1e-9 * cost: break
        value = after
    target = positions[options.argmax(axis=2)]
    return grid, target[:, 0], target[:, -1]


@pytest.mark.parametrize("persistence, risk, cost", [(.9, .5, 1.), (.6, .5, .5), (.95, 2., 3.), (-.3, 1., .5)])
def test_the_band_is_that_of_brute_force(persistence, risk, cost):
    "A dynamic program over every pair of position and target, which knows nothing of a band"
    levels = 41
    grid, lower, upper = brute_band(persistence, 1., risk, cost, levels)
    band = no_trade_band(persistence, 1., risk, cost)
    inside = np.abs(grid) < 3.
    for expected, edge in ((lower, band.lower), (upper, band.upper)):
        found = np.interp(grid, *edge.T)
        assert np.abs(found - expected)[inside].max() <= 2 / (levels - 1) + 1e-6 # a step of the brute force
        assert np.abs(expected[inside]).max() > .5


@given(st.floats(-.9, .99), st.floats(.01, 10), st.floats(.001, 100))
@settings(max_examples=60)
def test_the_aim_solves_the_riccati_equation(persistence, risk, cost):
    """V = -A x^2 / 2 + B x f + ...: x = (cost x0 + (1 + phi B) f) / (risk + cost + A), iterated until it stays"""
    a = b = 0.
    for _ in range(100_000):
        below = risk + cost + a
        new = cost - cost ** 2 / below, cost * (1 + persistence * b) / below
        if abs(new[0] - a) + abs(new[1] - b) < 1e-14 * cost: break
        a, b = new
    rule = aim_portfolio(persistence, risk, cost)
    assert 1 - rule.rate == pytest.approx(cost / (risk + cost + a), rel=1e-6, abs=1e-9)
    assert rule.rate * rule.aim == pytest.approx((1 + persistence * b) / (risk + cost + a), rel=1e-5)


def test_a_forecast_of_a_block_knows_nothing_of_it():
    "Whatever happens in a block, and whatever its outcomes are known from: what is forecast there stays, to the bit"
    candles = ar1(3_000, seed=6)
    market = prepare(candles, Observation(["return(1)", "return(5)"], window=2).fit(candles))
    sample = sample_of(market)
    folds = blocks_of(sample)
    before = left_out(sample, folds, PENALTIES), left_out_trees(sample, folds, .01, 0)
    for fold in folds:
        earned = np.where(fold.forecast, np.random.default_rng(0).permutation(sample.earned), sample.earned)
        seen = np.where(~fold.fit[:, None] & ~fold.forecast[:, None], np.float32(9), sample.seen)
        changed = replace(sample, earned=earned, seen=seen)
        after = left_out(changed, folds, PENALTIES), left_out_trees(changed, folds, .01, 0)
        for old, new in zip(before, after): assert np.array_equal(old[fold.forecast], new[fold.forecast])
    assert not np.array_equal(before[0], after[0])


def test_what_comes_after_the_training_span_changes_nothing():
    candles = ar1(4_000, seed=7)
    other = candles.copy()
    other.iloc[3_000:] = ar1(4_000, seed=8).iloc[3_000:]
    first, second = (fit_plug_in(prepare(each[:3_000], Observation(["return(1)"]).fit(each[:3_000])), "boosted")
                     for each in (candles, other))
    assert np.array_equal(first.parameters, second.parameters)
    assert first.scaler == second.scaler


def test_the_same_seed_fits_the_same_trees():
    candles = ar1(3_000, seed=6)
    market = prepare(candles, Observation(["return(1)"]).fit(candles))
    assert np.array_equal(*(fit_plug_in(market, "boosted", seed=3).parameters for _ in range(2)))


@pytest.fixture(scope="module")
def answers():
    "benchmarks/known_answers.py"
    path = Path(__file__).parents[1] / "benchmarks/known_answers.py"
    spec = importlib.util.spec_from_file_location("known_answers", path)
    sys.modules["known_answers"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.integration
@pytest.mark.parametrize("name", ["AR(1) 0.3", "mean reverting, proportional cost"])
@pytest.mark.parametrize("model", ["linear", "boosted"])
def test_the_optimum_is_reached_where_it_is_known(answers, name, model):
    assert answers.share_reached(answers.MARKETS[name], model, 0)[0] >= .97


@pytest.mark.integration
def test_other_parameters_reach_it_too(answers):
    "Of the same markets; nothing is tuned to the ones above"
    assert answers.share_reached(answers.reverting(.05, .005), "linear", 1)[0] >= .97
    assert answers.share_reached(answers.autoregression(-.2), "linear", 1)[0] >= .97


@pytest.mark.integration
@pytest.mark.parametrize("model", ["linear", "boosted"])
def test_noise_is_left_alone(answers, model):
    held = [answers.share_reached(answers.noise(costs), model, seed, 10_000)[1] for seed in (0, 1)
            for costs in (CostModel.ideal(), CostModel())]
    assert max(held) <= .01


@pytest.mark.integration
def test_the_aim_reaches_the_optimum_of_garleanu_and_pedersen(answers):
    assert answers.quadratic_share(answers.predicted(), "linear", 0) >= .97


def test_a_nonlinear_market_needs_trees():
    "A return that follows the size of the last one, not its sign: nothing for a line"
    candles = ar1(12_000, rho=0., volatility=.005, seed=3)
    seen = candles["close"].pct_change().fillna(0.).to_numpy()
    moved = np.append(0., .3 * (np.abs(seen[:-1]) - np.abs(seen).mean()))
    factor = np.exp(np.cumsum(moved))
    for column in ("open", "high", "low", "close"): candles[column] *= factor
    candles["open"] = np.append(candles["open"].iloc[0], candles["close"].iloc[:-1])
    candles["high"] = candles[["high", "open", "close"]].max(axis=1)
    candles["low"] = candles[["low", "open", "close"]].min(axis=1)
    market = prepare(candles, Observation(["return(1)"]).fit(candles), instruments=BITCOIN)
    line, grown = (fit_forecast(market, model) for model in ("linear", "boosted"))
    assert grown.trees > 0
    assert grown.slope / grown.slope_error > 2 * max(line.slope / line.slope_error, 2.)


def test_one_model_is_fitted_for_all_symbols():
    "Two symbols that each follow their own last return: more rows, one line, and each is traded by itself"
    frames = {name: ar1(4_000, seed=seed) for name, seed in (("BTC/USDT:USDT", 1), ("ETH/USDT:USDT", 2))}
    observation = Observation(["return(1)"]).for_symbols(tuple(frames), "1h").fit(frames)
    market = prepare(frames, observation)
    sample = sample_of(market)
    assert np.bincount(sample.symbol).tolist() == [len(sample) // 2] * 2
    policy = fit_plug_in(market)
    result = backtest(policy, frames, baselines=())
    assert set(result.fills["symbol"]) == set(frames)
    weights = [fit_forecast(prepare(frame, Observation(["return(1)"]).fit(frame))).forecast.weights[0]
               for frame in frames.values()]
    assert min(weights) < fit_forecast(market).forecast.weights[0] < max(weights)


def test_funding_is_taken_off_what_a_decision_earns():
    "A long pays what falls due at the close of the candle in which it is held"
    candles = ar1(2_000, seed=1)
    rates = pd.Series(.001, candles.index[8::8])
    observation = Observation(["return(1)"]).fit(candles)
    with_rates, without = (sample_of(prepare(candles, observation, funding=funding)) for funding in (rates, None))
    taken = without.earned - with_rates.earned
    due = np.isin(candles.index[with_rates.candle + 2], rates.index) # the close of the candle after the decision
    np.testing.assert_allclose(taken, np.where(due, .001, 0.), atol=1e-15)


def test_a_hole_is_not_learnt_from():
    candles = ar1(3_000, seed=1).drop(ar1(3_000, seed=1).index[1_000:1_010])
    sample = sample_of(prepare(candles, Observation(["return(1)"], window=3).fit(candles, gaps=True), gaps=True))
    assert not {998, 999, 1_000, 1_001} & set(sample.candle.tolist()) # the outcome, then the window, lies in it
    assert {997, 1_003} <= set(sample.candle.tolist())
    assert np.isfinite(sample.seen).all()
    assert np.abs(sample.earned).max() < .06


def test_holding_a_whole_position_pays_for_its_impact():
    "Twice the money moves the price by the root of two more"
    from tradelab.learn.plug_in import trading_cost
    candles = ar1(3_000, seed=1)
    costs = [trading_cost(prepare(candles, Observation(["return(1)"]), costs=CostModel(impact=1.), deposit=deposit))
             for deposit in (1e6, 2e6)]
    assert (costs[1] - .0006) / (costs[0] - .0006) == pytest.approx(np.sqrt(2))
