"""What a policy sees: array and stream, many symbols, longer candles, watched symbols; what a scaler may know; a
specification that is refused when it differs"""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from sklearn.preprocessing import RobustScaler, StandardScaler
from test_features import filled
from test_sentence import network

from tradelab.account import POSITION, age, apply_fill, mark, new_account
from tradelab.compiled import compiled
from tradelab.evaluation.difference import first_difference
from tradelab.events import KNOWN, TradingState
from tradelab.features.observation import PORTFOLIO, Observation, robust, standard
from tradelab.learn.agents import train
from tradelab.learn.env import MarketEnv
from tradelab.market.candles import matrix
from tradelab.market.synthetic import correlated, funding
from tradelab.policies import Policy
from tradelab.risk.trading_state import require_state
from tradelab.runs.formats import CONFIG, DamagedRunError, seal
from tradelab.runs.registry import load
from tradelab.settings import NO_STOPS, Limits
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import market_data, prepare

SYMBOLS = BTC, ETH, SOL = "BTC/USDT:USDT", "ETH/USDT:USDT", "SOL/USDT:USDT"
CHOICE = ("return(1)", "rsi(3)", "sma(5).relative@2h", "return(1)@4h[-1]", "taker_share(2)", "funding_rate", "basis",
          "time_of_week.sin", f"return(1)[{ETH}]", f"rsi(2)@2h[{SOL}][-2]", "pvo_hist(3,5,2)")


@pytest.fixture(scope="module")
def market(): return {symbol: filled(frame) for symbol, frame in correlated(700, SYMBOLS, seed=8).items()}


@settings(max_examples=40)
@given(st.lists(st.sampled_from(CHOICE), min_size=1, max_size=6, unique=True), st.integers(1, 5),
       st.sampled_from([(BTC,), (ETH, BTC), (SOL, BTC, ETH)]), st.booleans())
def test_array_and_stream_are_the_same_for_any_symbols(market, features, window, traded, fitted):
    observation = Observation(features, window).for_symbols(traded, "1h")
    candles = matrix({symbol: market[symbol] for symbol in observation.rows}, KNOWN)[1]
    if fitted: observation = observation.fit(candles[:400])
    array = observation.matrix(candles)
    stream = observation.stream()
    exact = "pvo_hist(3,5,2)" not in features                      # ta agrees with itself to 1e-9, not to the bit
    for t, candle in enumerate(candles[:60 if exact else 240]):
        stream.push(candle)
        if t >= window - 1:
            (assert_array_equal if exact else np.testing.assert_allclose)(stream.window, array[t - window + 1:t + 1],
                err_msg=f"candle {t}")
    assert np.shares_memory(stream.window, stream._strip)            # a view, not a copy
    assert np.isfinite(array[observation.warm_up:]).all()
    assert array.dtype == np.float32


def test_another_future_changes_neither_the_past_nor_the_scaler(market):
    observation = Observation([text for text in CHOICE if "pvo" not in text], 3).for_symbols((BTC,), "1h")
    frames = {symbol: market[symbol] for symbol in observation.rows}
    other = {symbol: pd.concat([frame[:500], frame[500:] * 1.7]) for symbol, frame in frames.items()}
    for how in ("standard", "robust"):
        fits = [replace(observation, scaler=None).fit({symbol: frame[:500] for symbol, frame in each.items()}, how)
                for each in (frames, other)]
        assert fits[0] == fits[1]
        assert fits[0].sha256 == fits[1].sha256
        assert fits[0].scaler.kind == how
        assert_array_equal(fits[0].matrix(matrix(frames, KNOWN)[1])[:500],
                           fits[1].matrix(matrix(other, KNOWN)[1])[:500])
    everything = replace(observation, scaler=None).fit(other) # planted: fitted on what was not known
    assert everything.scaler != fits[0].scaler


def test_robust_is_the_median_and_the_quartiles(market):
    values = market[BTC]["close"].pct_change()[2:].to_numpy()   # the warm-up is two candles
    scaler = Observation(["return(1)"]).fit(market[BTC], "robust").scaler
    first, middle, third = np.percentile(values, [25, 50, 75])
    assert scaler.centre[0] == pytest.approx(middle, rel=1e-9)
    assert scaler.scale[0] == pytest.approx(third - first, rel=1e-9)
    with pytest.raises(ValueError, match="a scaler is 'standard' or 'robust', was 'minmax'"):
        Observation(["return(1)"]).fit(market[BTC], "minmax")


LIMITS = Limits(max_position=.5)


def test_the_portfolio_as_the_agent_sees_it():
    account = new_account(1_000.)
    positions = np.zeros(1, POSITION)
    observation = Observation(())
    stream = observation.stream(1)
    stream.push(np.ones((1, 5)))
    def seen(): return dict(zip(PORTFOLIO, stream.observe(account, positions, LIMITS)[0].tolist()))
    def close(price):
        mark(account, positions, np.array([price]))
        age(positions)
    close(100.)
    assert seen() == dict.fromkeys(PORTFOLIO, 0.)
    apply_fill(account, positions, 0, 4., 100., 0.)
    for price in (100., 110., 105.): close(price)
    now = seen()
    assert now["exposure"] == pytest.approx(420 / (.5 * 1_020))
    assert now["unrealised"] == pytest.approx(5 / np.sqrt(0 ** 2 + 10 ** 2 + 5 ** 2))
    assert now["time_in_trade"] == pytest.approx(np.log(4) / np.log(101))
    assert now["risk_state"] == 0
    apply_fill(account, positions, 0, 1., 105., 0.)                       # adding keeps the age, turning starts anew
    close(105.)
    assert seen()["time_in_trade"] == pytest.approx(np.log(5) / np.log(101))
    apply_fill(account, positions, 0, -9., 105., 0.)
    close(105.)
    assert seen()["time_in_trade"] == pytest.approx(np.log(2) / np.log(101))
    assert seen()["exposure"] < 0
    assert seen()["unrealised"] == 0                                      # a new position with a life of its own
    close(100.)
    assert seen()["unrealised"] == 1                                      # short, and the price has fallen
    require_state(account, TradingState.HALT)
    assert seen()["risk_state"] == 1


PRICES = st.lists(st.floats(.5, 2.), min_size=1, max_size=30)


def lived(deposit, trades, unit=1., size=1., past=(0., 0.)):
    "What an account sees after each close: trades are (quantity, ratio of the price to the one before)"
    account, positions = new_account(deposit * size * unit), np.zeros(1, POSITION)
    account["realised"], account["fees"] = np.array(past) * size * unit
    stream = Observation(()).stream(1)
    stream.push(np.ones((1, 5)))
    price, seen = 100., []
    for quantity, ratio in trades:
        if quantity: apply_fill(account, positions, 0, quantity * size, price * unit, 0.)
        price *= ratio
        mark(account, positions, np.array([price * unit]))
        age(positions)
        seen.append(stream.observe(account, positions, LIMITS)[0])
    return np.array(seen)


# powers of two, so that the money and the prices of the two accounts differ in no bit but their exponent
@given(st.lists(st.tuples(st.sampled_from([0., 0., .5, -.5, 2., -3.]), st.floats(.8, 1.25)), min_size=1, max_size=30),
       st.sampled_from([2. ** -6, 2., 2. ** 6]), st.sampled_from([2. ** -3, 2., 2. ** 5]))
def test_neither_the_unit_of_money_nor_the_size_of_the_account_is_seen(trades, unit, size):
    seen = lived(10_000., trades)
    assert_array_equal(lived(10_000., trades, unit=unit), seen)
    assert_array_equal(lived(10_000., trades, size=size), seen)
    assert (np.abs(seen) <= 10).all()


@given(st.lists(st.tuples(st.sampled_from([0., 0., .5, -.5]), st.floats(.8, 1.25)), min_size=1, max_size=30),
       st.floats(-.9, 50.))
def test_what_an_account_has_been_through_is_not_seen(trades, grown):
    "The tenth candle of a run and the hundred-thousandth: another wallet, another peak, the same position of it"
    young = lived(10_000., trades)
    old = lived(2_500., trades, past=(10_000. * (1 + grown), 10_000. * grown + 2_500.)) # 10,000 in all, another way
    np.testing.assert_allclose(old, young, rtol=1e-5, atol=1e-5)


number = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.tuples(number, number, number, number), st.floats(0, 1e30), st.floats(0, 1e9), st.sampled_from(TradingState),
       st.sampled_from([Limits(), Limits(capital=1.), Limits(max_position=.5)]))
def test_the_portfolio_is_bounded_for_any_account(holdings, variation, candles, state, limits):
    account, positions = new_account(1.), np.zeros(1, POSITION)
    account["equity"], positions["quantity"], positions["mark_price"], positions["entry_price"] = holdings
    positions["age"], positions["variation"] = candles, variation
    require_state(account, state)
    stream = Observation(()).stream(1)
    stream.push(np.ones((1, 5)))
    seen = stream.observe(account, positions, limits)[0]
    assert (np.abs(seen[:2]) <= 10).all()
    assert (seen[2:] >= 0).all()
    assert (seen[2:] <= 1).all()


@compiled
def half_weeks(parameters, memory, observation, prices, targets): targets[:] = 1. if observation[0, 0] > 0. else 0.


UNHURT = Limits(min_trade=.04, max_drawdown=1., max_daily_loss=None, stops=NO_STOPS)


@pytest.mark.parametrize("engine", ["vectorised", "event"])
def test_the_portfolio_is_the_same_however_long_a_run_already_is(market, engine):
    "A run that begins at a candle sees what a run sees there that has lasted for hundreds, once both hold the same"
    policy = Policy("half weeks", half_weeks, features=("time_of_week.sin",))
    whole, late = (backtest(policy, market[BTC], start=start, engine=engine, keep_observations=True, baselines=(),
                            limits=UNHURT) for start in (None, market[BTC].index[400]))
    assert whole.rows["equity"][-1] != late.rows["equity"][-1]
    seen = late.observations[:, 0, 1:]
    before = whole.observations[-len(seen):, 0, 1:]
    begins = np.flatnonzero((seen[:, 0] == 0) & (before[:, 0] == 0))[5]  # neither holds anything of before
    assert (seen[begins:, 0] > 0).sum() > 50
    assert_array_equal(before[begins:, 1:], seen[begins:, 1:])
    np.testing.assert_allclose(before[begins:, 0], seen[begins:, 0], rtol=.01) # quantities are on the exchange's step


FEATURES = ("return(1)", "sma(5).relative@4h", f"return(1)[{ETH}]", "funding_rate", "basis", "taker_share(2)",
            "time_of_day.cos")


@pytest.mark.parametrize("traded", [(BTC,), (SOL, BTC)])
def test_environment_and_both_backtests_see_and_do_the_same(market, traded):
    frames = {symbol: market[symbol].drop(columns="funding_rate") for symbol in traded}
    extra = {ETH: market[ETH]}
    rates = {symbol: pd.concat([pd.Series([1e-4], market[symbol].index[:1]), funding(market[symbol])])
             for symbol in traded}
    scaler = Observation(FEATURES, 2).for_symbols(traded,
                                                  "1h").fit({symbol: market[symbol][:400]
                                                             for symbol in (*traded, ETH)}).scaler
    policy = network(3, len(traded), 2, FEATURES, scaler)
    array, event = (backtest(policy, frames, funding=rates, extra=extra, engine=engine, keep_observations=True,
                             baselines=()) for engine in ("vectorised", "event"))
    assert first_difference(array, event) is None
    assert first_difference(array.observations, event.observations) is None
    assert (array.rows["order"] != 0).sum() > 20
    env = MarketEnv(prepare(frames, Observation.from_policy(policy), funding=rates, extra=extra))
    seen, _ = env.reset(seed=0)
    for t in range(len(array.rows)):
        assert_array_equal(seen.reshape(len(traded), -1), array.observations[t])
        seen, *_, info = env.step(policy.act(seen.reshape(len(traded), -1)))
        assert np.array_equal(np.array(info["journal"]), array.rows[t])


def test_funding_of_an_extra_symbol_is_seen_and_not_paid(market):
    frames, extra = {BTC: market[BTC]}, {ETH: market[ETH].drop(columns="funding_rate")}
    rates = {symbol: funding(market[symbol]) for symbol in (BTC, ETH)}
    made = market_data(frames, extra=extra, funding=rates)
    assert_array_equal(made.rates, market_data(frames, extra=extra, funding=rates[BTC]).rates)
    assert made.frames[ETH]["funding_rate"].any()
    with pytest.raises(ValueError, match="there are funding rates of SOL.*, but no candles: give rates of BTC"):
        market_data(frames, funding={SOL: rates[BTC]})


def test_what_a_feature_looks_at_must_be_there(market):
    policy = network(0, 1, 2, FEATURES)
    with pytest.raises(ValueError, match=f"a feature reads {ETH}, whose candles are missing: pass extra="):
        backtest(policy, market[BTC])
    with pytest.raises(ValueError, match="taker_share.2. needs taker_buy_volume, which candle 0 does not have"):
        backtest(policy, market[BTC].drop(columns="taker_buy_volume"), extra={ETH: market[ETH]})
    with pytest.raises(ValueError, match=f"{ETH} is traded and among the extra symbols"):
        backtest(policy, {BTC: market[BTC], ETH: market[ETH]}, extra={ETH: market[ETH]})
    with pytest.raises(ValueError, match="4h is not a multiple of 1d"):
        backtest(policy, market[BTC].resample("1D").first(), extra={ETH: market[ETH].resample("1D").first()})


def test_a_run_keeps_its_specification_and_is_refused_with_another(market, tmp_path):
    observation = Observation(FEATURES, 2)
    frame = market[BTC].rename_axis("open_time")
    frame.attrs["symbol"] = BTC
    run = train("PPO", frame, observation, steps=200, folder=tmp_path, extra={ETH: market[ETH]}, scaler="robust",
                progress=False)
    again = load("latest", tmp_path)
    assert again.observation == run.observation
    assert again.observation.scaler.kind == "robust"
    assert again.observation.rows == (BTC, ETH)
    assert again.config["observation_sha256"] == run.observation.sha256
    results = [backtest(each, market[BTC], extra={ETH: market[ETH]}) for each in (run, again)]
    assert first_difference(*results) is None
    text = (run.folder / CONFIG).read_text()
    for before, after in (("timeframe: 1h", "timeframe: 30m"), ("window: 2", "window: 2 "),
                          ("sma(5).relative@4h", "sma(5).relative@2h")):
        (run.folder / CONFIG).write_text(text.replace(before, after))
        (run.folder / "MANIFEST.json").write_bytes(seal({path.name: path.read_bytes() for path in run.folder.iterdir()
                                                         if path.name != "MANIFEST.json"}))
        if after.strip() == before: load(run.id, tmp_path)
        else:
            with pytest.raises(DamagedRunError, match="trained on another observation|fitted for other features"):
                load(run.id, tmp_path)


def assert_as_scikit_learn(values):
    theirs = StandardScaler().fit(values[:, None])
    quartiles = RobustScaler().fit(values[:, None])
    assert standard(values) == (theirs.mean_[0], theirs.scale_[0])
    assert robust(values) == (quartiles.center_[0], quartiles.scale_[0])


@settings(max_examples=200)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300), st.floats(-1e12, 1e12),
       st.sampled_from([0., 1e-300, 1e-18, 1e-9, 1., 1e6]))
def test_a_scaler_has_the_bits_of_scikit_learn(values, shift, width):
    assert_as_scikit_learn(shift + width * np.array(values))


def test_a_scaler_of_real_candles_has_the_bits_of_scikit_learn(shared):
    candles = pd.read_parquet(shared / "data/BTCUSDT-perp-1h.parquet")
    for column in candles: assert_as_scikit_learn(candles[column].dropna().to_numpy(float))
    assert_as_scikit_learn(candles.close.pct_change()[1:].to_numpy())
