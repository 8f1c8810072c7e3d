"Plug-in policies: forecasts against their libraries, controllers against brute force and the paper, storing, trading"
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.tree import DecisionTreeRegressor

from tests.test_formats import CONFIGURATION, ID
from tradelab.evaluation.difference import first_difference
from tradelab.instruments import BITCOIN
from tradelab.market.synthetic import ar1, correlated
from tradelab.policies import Policy, Scaler
from tradelab.runs.forecast import AimPortfolio, LinearForecast, NoTradeBand, TreeForecast, plug_in, plug_in_numbers
from tradelab.runs.formats import POLICY, DamagedRunError, policy_bytes, read_policy
from tradelab.runs.registry import load, save
from tradelab.runs.run import Run
from tradelab.settings import Limits
from tradelab.sim.backtest import backtest

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
    return fitted, TreeForecast(1e-5, .8, tuple(rows_of(each.tree_) for each in fitted), inputs)


def policy_of(forecast, controller, symbols=1, window=2):
    return Policy("plugged", plug_in, plug_in_numbers(forecast, controller, symbols), FEATURES, window, SCALER)


LINEAR = LinearForecast(1e-5, np.array([1e-4, -3e-4, -1e-3, 2e-4]))
KINDS = [(LINEAR, BAND), (grown()[1], BAND), (LINEAR, AimPortfolio(.1, 400.)), (grown()[1], AimPortfolio(.1, 400.))]
NAMES = ["linear band", "trees band", "linear aim", "trees aim"]


def test_trees_forecast_what_scikit_learn_forecasts():
    fitted, forecast = grown()
    expected = sum(each.predict(SEEN) for each in fitted)
    assert np.array_equal(forecast.over(SEEN), 1e-5 + .8 * expected)


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
