"Measures, breakers and the trading state against outside truth and properties"
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.errors import BreakerOpenError
from tradelab.evaluation.risk_report import RiskReport
from tradelab.evaluation.value_at_risk import METHODS, TailRisk, historical, tail, tail_history
from tradelab.evaluation.var_backtest import var_backtest
from tradelab.events import TradingState
from tradelab.market.synthetic import ar1, realistic
from tradelab.risk.breakers import CLOSED, DEFAULTS, Breakers
from tradelab.risk.portfolio import covariance_history, ledoit_wolf
from tradelab.risk.trading_state import CAUSES, StateMachine
from tradelab.settings import NO_STOPS
from tradelab.sources.tables import from_file
from tradelab.times import TIMEFRAMES, milliseconds, next_opening, to_ms

DATA = next((place / "shared/data" for place in Path(__file__).resolve().parents
             if (place / "shared/data/BTCUSDT-1d.parquet").exists()), None)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(120, 900), st.sampled_from((.95, .99)))
def test_var_and_shortfall_are_empyricals(seed, count, level):
    """empyrical.stats value_at_risk and conditional_value_at_risk, restated: np.percentile, and the mean of the worst
    int((n - 1) p) + 1"""
    returns = np.random.default_rng(seed).standard_t(4, count) * .01
    cutoff = 1 - level
    last = int((count - 1) * cutoff + 1e-9)
    np.testing.assert_allclose(historical(returns, level), (-np.percentile(returns, 100 * cutoff),
                                                            -np.mean(np.partition(returns, last)[:last + 1])),
                                                            rtol=1e-9)


def test_a_portfolio_by_hand():
    """Two assets with 2 % and 3 % a day and correlation 0.5, 60 and 40 of 100: deviation sqrt(.6^2 .02^2 + .4^2 .03^2 +
    2 .6 .4 .5 .02 .03), VaR 99 % 2.326 times that"""
    random = np.random.default_rng(0).standard_normal((200_000, 2))
    random = (random - random.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(random.T, ddof=0))).T
    moves = random @ np.linalg.cholesky([[.02**2, .5 * .02 * .03], [.5 * .02 * .03, .03**2]]).T
    out = np.empty((5, 2, 2))
    tail(moves @ [.6, .4], .06, out)
    np.testing.assert_allclose(out[METHODS.index("gaussian"), 1, 0], 2.3263479 * np.sqrt(.000144 + .000144 + .000144),
                               rtol=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(.01, 5))
def test_risk_grows_with_the_position_and_has_two_sides(seed, size):
    moves = np.random.default_rng(seed).standard_t(4, 300) * .02
    out = np.empty((5, 2, 2))
    other = np.empty((5, 2, 2))
    tail(moves, .06, out)
    tail(size * moves, .06, other)
    np.testing.assert_allclose(other, size * out, rtol=1e-6, equal_nan=True)
    tail(-moves, .06, other)
    assert not np.array_equal(other[0], out[0])                                # a short position has the other tail
    known = np.isfinite(out)
    assert (out[..., 1] >= out[..., 0] - 1e-12)[known.all(-1)].all()


def test_a_forecast_does_not_see_the_future():
    closes = np.stack([realistic(400, seed=seed, timeframe="1d").close for seed in (1, 2)], axis=1)
    before = tail_history(closes, np.array([.5, -.2]), "1d")
    closes[320:] *= 1.2
    after = tail_history(closes, np.array([.5, -.2]), "1d")
    assert np.array_equal(before[:320], after[:320], equal_nan=True)
    assert not np.array_equal(before[320:], after[320:])
    broken = TailRisk(2, "1d")
    for row in np.where(np.arange(400)[:, None] == 350, np.nan, closes): broken.update(row)
    assert np.isnan(broken.measures([.5, -.2]).values).all() # a hole in the lookback is not a number, never a small one


@pytest.mark.skipif(DATA is None, reason="the real candles are not here")
@pytest.mark.parametrize("name", ["BTC", "ETH"])
def test_filtered_history_holds_on_real_days(name):
    "At 95 % coverage is not rejected at 1 % on real days; the normal distribution is too mild at 99 %"
    close = from_file(DATA / f"{name}USDT-1d.parquet", "1d").close
    values = tail_history(close.to_numpy()[:, None], np.ones(1), "1d")
    returns = close.pct_change()[1:]
    def found(method, level):
        return var_backtest(returns, *(returns * 0 + values[:-1, METHODS.index(method), (.95, .99).index(level), k]
                                for k in (0, 1)), level)
    assert found("filtered", .95).kupiec[1] > .01
    assert found("gaussian", .99).exceptions > found("filtered", .99).exceptions
    assert found("gaussian", .99).kupiec[1] < .05


def test_shrinkage_is_ledoit_and_wolfs():
    from sklearn.covariance import ledoit_wolf as sklearns
    returns = (np.random.default_rng(3).standard_t(4, (150, 12)) @ np.random.default_rng(4).standard_normal((12, 12))
               * .01)
    covariance, share = ledoit_wolf(returns)
    theirs, their_share = sklearns(returns)
    np.testing.assert_allclose(covariance, theirs, rtol=1e-9)
    np.testing.assert_allclose(share, their_share, rtol=1e-9)


def test_covariance_forgets_where_it_began():
    closes = np.exp(np.cumsum(np.random.default_rng(1).standard_normal((3_000, 3)) * .01, axis=0))
    assert np.array_equal(covariance_history(closes, .05)[-1], covariance_history(closes[1_900:], .05)[-1])
    gone = closes.copy()
    gone[100, 1] = np.nan
    assert np.isnan(covariance_history(gone, .05)[101, 1]).all()
    assert np.isfinite(covariance_history(gone, .05)[101, 0, 2])
    assert np.isfinite(covariance_history(gone, .05)[105]).all()


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from([each.kind for each in DEFAULTS]),
                          st.sampled_from([0., 1e9, 1e9, float("nan"), 1e-6]), st.integers(0, 40_000),
                          st.sampled_from(["", "BTC"])), max_size=40), st.integers(0, 39))
def test_breakers_saved_at_any_moment_go_on_the_same(steps, cut):
    one, time = Breakers(), 0
    for number, (kind, value, later, symbol) in enumerate(steps):
        time += later
        if number == cut: one = Breakers.load(json.loads(json.dumps(one.save())))
        before = one.state(kind, "x", symbol)
        events = one.observe(kind, value, time, "x", symbol)
        assert [event.before for event in events] == [before, *(event.after for event in events)][:len(events)]
        if not np.isfinite(value): assert one.state(kind, "x", symbol) != CLOSED
        closed = one.state(kind, "x", symbol) == CLOSED
        assert closed or one.requires("x", symbol) >= {each.kind: each.requires for each in DEFAULTS}[kind]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(("trip", "clear", "step", "reset")), st.sampled_from(list(CAUSES)),
                          st.integers(0, 400_000), st.sampled_from(("", "BTC"))), max_size=40), st.integers(0, 39))
def test_the_trading_state(steps, cut):
    """The state is what the most severe cause requires; it goes down only when that cause is gone and cooled down, or a
    person says so; saved at any moment it goes on the same"""
    machine = StateMachine()
    time = 0
    standing = {}
    for number, (what, cause, later, symbol) in enumerate(steps):
        time += later
        if number == cut: machine = StateMachine.load(json.loads(json.dumps(machine.save())))
        if what == "trip":
            machine.trip(cause, time, "seen", symbol, who="Ada" if cause == "person" else "")
            standing[cause, symbol] = None
        elif what == "clear":
            machine.clear(cause, time, symbol)
            if standing.get((cause, symbol), 0) is None: standing[cause, symbol] = time
        elif what == "step": machine.step(time)
        else:
            try: machine.reset(cause, "Ada", "looked at it", time, symbol)
            except BreakerOpenError: assert CAUSES[cause].restarts and standing[cause, symbol] is None
            except ValueError: assert (cause, symbol) not in machine.active
            else: standing.pop((cause, symbol), None)
        if what in ("clear", "step"):
            standing = {key: gone for key, gone in standing.items() if gone is None or not CAUSES[key[0]].restarts
                        or time < gone + CAUSES[key[0]].cool_down}
        assert set(machine.active) == set(standing)
        for scope in ("", "BTC"):
            assert machine.state(scope) == max((CAUSES[name].requires for name, where in standing
                                                if where in ("", scope)),
                                              default=TradingState.NORMAL)


def test_simultaneous_causes_in_any_order():
    names = ["spread", "volatility", "unknown_order", "liquidation"]
    states = set()
    for order in (names, names[::-1]):
        machine = StateMachine()
        for name in order: machine.trip(name, 1_000, "together")
        for name in order: machine.clear(name, 2_000)
        states.add((machine.state(), tuple(sorted(machine.active))))
    assert states == {(TradingState.HALT, (("liquidation", ""),))}
    assert not any(NO_STOPS.row()[:6])


@pytest.mark.parametrize("timeframe", TIMEFRAMES)
def test_the_risk_of_a_run_is_shown_on_every_timeframe(timeframe):
    "Also of a run that is too short for a value at risk, and of one step: a section says why it is not there"
    step = milliseconds(timeframe)
    candles = ar1(160, volatility=.01, seed=3, timeframe=timeframe, start=next_opening(to_ms("2020-01-01"), step))
    index, close = candles.index, candles["close"].to_numpy()
    journal = pd.DataFrame(dict(close=close, equity=10_000 * close / close[0], position=10_000 / close[0],
                                fill_quantity=0., reason=0, value=0., limit=0., symbol="BTC/USDT:USDT"), index)
    view = RiskReport("held", journal, journal["equity"])
    page = view._repr_html_()
    assert view.lookback == max(30, 100 * step / 86_400_000)
    assert "not shown" not in page
    assert f"over the last {view.lookback:g} days" in page
    known = view.value_at_risk()["var"].notna()
    assert known.any() == (30 * 86_400_000 <= 150 * step)
    assert ("which this run does not have" in page) != known.any()
    assert "not shown" in RiskReport("one", journal[:1], journal["equity"][:1])._repr_html_()
