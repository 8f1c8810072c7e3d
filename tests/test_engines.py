"""The simulation against what others say: two engines to the cent, zipline's cap on the volume, real funding, a real
order book"""
import gzip
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tradelab.account import POSITION, new_account
from tradelab.instruments import BITCOIN, Instrument
from tradelab.journal import JOURNAL
from tradelab.market.synthetic import ar1
from tradelab.orders import Kind
from tradelab.policies import buy_and_hold, flat
from tradelab.risk.execution import place_target
from tradelab.settings import NO_STOPS, CostModel, Execution, Limits, Reason
from tradelab.sim.backtest import SIZED, backtest
from tradelab.sim.costs import calibrate
from tradelab.sim.kernel import Simulation, market_arrays, trading_rules
from tradelab.sim.matching import new_state
from tradelab.sources.funding import funding_history
from tradelab.sources.history import history

SPEC = importlib.util.spec_from_file_location("engines", Path(__file__).parents[1] / "benchmarks/engines.py")
engines = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(engines)

# `python benchmarks/engines.py vectorbt` with vectorbt 1.2.0 and `... backtesting` with backtesting.py 0.6.6: both
# printed these numbers (fills, sum of quantity x price, last equity, sum of the equity curve)
RECORDED = {(False, 0.): (55, 82_000.8, 996_928.4, 1_995_341_105.2), (False, .0005): (55, 82_000.8, 994_859.9049,
    1_993_180_350.7415),
            (True, 0.): (55, 93_292.5, 985_636.7, 1_981_707_245.8), (True, .0005): (55, 93_292.5, 981_535.06435,
    1_977_454_642.9010)}


@pytest.mark.parametrize("short, fee", RECORDED)
def test_vectorbt_and_backtesting_agree_to_the_cent(short, fee):
    ticks = engines.walk()
    count, cash, equity = engines.with_tradelab(ticks, engines.holding(ticks, short), fee)
    fills, traded, last, curve = RECORDED[short, fee]
    assert count == fills
    assert cash == pytest.approx(traded, abs=1e-6)
    assert equity[-1] == pytest.approx(last, abs=1e-6)
    assert equity.sum() == pytest.approx(curve, abs=.01)


def test_the_cap_on_the_volume_is_ziplines():
    """zipline, tests/finance/test_slippage.py: an order of 100 in a bar of 200 at a limit of a quarter fills 50; the
    rest is carried over. (Its price then moves by the square of the share, ours by the square root of the volume:
    another law.)"""
    candles = np.array([[3., 3.15, 2.85, 3., volume] for volume in (200., 200., 80., 0., 400.)])[:, None, :]
    costs = CostModel(taker_fee=0., slippage=0., participation=.25)
    tape = market_arrays(np.arange(5) * 60_000, candles, np.zeros((5, 1)), costs, Limits())
    rules = trading_rules(costs, Limits(), [replace(BITCOIN, price_tick=.01, quantity_step=1., min_quantity=1.)],
                     Execution())
    world = Simulation(tape, new_state(new_account(1e4), np.zeros(1, POSITION), rules.execution, 50), rules)
    filled = []
    for t in range(4):
        before = world.state.positions["quantity"][0]
        place_target(world.state, world.rules, 0, 100. - before, 0, 3.)
        world.step(t, np.zeros(0), np.zeros(1, JOURNAL))
        filled.append(float(world.state.positions["quantity"][0] - before))
    assert filled == [50., 20., 0., 30.]


def test_funding_is_that_of_the_real_rates(shared):
    "A month of Bitcoin held with ten times nothing changing: each payment from pandas alone"
    candles = history("BTC/USDT:USDT", "1h", "2022-06-01", "2022-07-01",
                      source=str(shared / "data/BTCUSDT-perp-1h.parquet"))
    rates = funding_history("BTC/USDT:USDT", "2022-06-01", "2022-07-01",
                            source=str(shared / "data/BTCUSDT-perp-funding-8h.parquet"))
    # bought once and never touched again
    limits = Limits(max_position=1., min_trade=.9, max_daily_loss=None, max_drawdown=1., stops=NO_STOPS)
    result = backtest(buy_and_hold(), candles, funding=rates, limits=limits, costs=CostModel(taker_fee=0., slippage=0.),
                      deposit=1e6, baselines=())
    assert len(result.fills) == 1
    quantity = result.fills["quantity"].iloc[0]
    bought = result.fills.index[0]
    due = rates[(rates.index.floor("min") > bought) & (rates.index.floor("min") <= candles.index[-1])]
    expected = [-quantity * candles["close"].loc[time.floor("min") - pd.Timedelta(hours=1)] * rate for time,
                rate in due.items()]
    paid = result.journal["funding"][result.journal["funding"] != 0].to_numpy()
    assert len(paid) == np.count_nonzero(expected) > 80
    assert np.allclose(paid, [each for each in expected if each], atol=1e-8)


@pytest.fixture(scope="module")
def walks(shared):
    """Market orders of several sizes through a real book: size, cost against the middle, half spread, volatility and
    volume"""
    path = shared / "data/BTCUSDT-spot-l2-20240808.gz"
    bids = {}
    asks = {}
    found = []
    trades = []
    updates = 0
    for line in gzip.open(path, "rt"):
        message = json.loads(line[line.index("{"):])
        data = message.get("data", message)
        stream = message.get("stream", "")
        if "trade" in stream: trades.append((float(data["p"]), float(data["q"]), data["T"]))
        if "bids" in data:
            bids, asks = ({float(price): float(size) for price, size in data[side]} for side in ("bids", "asks"))
        elif "depth" in stream and bids:
            for book, side in ((bids, "b"), (asks, "a")):
                for price, size in data[side]:
                    if float(size): book[float(price)] = float(size)
                    else: book.pop(float(price), None)
            updates += 1
            if updates % 40 == 0 and max(bids) < min(asks):
                middle = .5 * (max(bids) + min(asks))
                for side, levels in ((1, sorted(asks.items())), (-1, sorted(bids.items(), reverse=True))):
                    for size in (.5, 1., 2., 4., 8., 16.):
                        left, paid = size, 0.
                        for price, amount in levels:
                            taken = min(left, amount)
                            left, paid = left - taken, paid + taken * price
                            if left <= 1e-12: break
                        if left <= 1e-12: found.append((side * size, middle, paid / size, min(asks) - middle))
    price, size, time = map(np.array, zip(*trades))
    seconds = (time[-1] - time[0]) / 1e3
    minute = pd.Series(price, pd.to_datetime(time, unit="ms")).resample("1min").last().ffill()
    volatility = float(np.log(minute).diff().std() * np.sqrt(60))                                        # of an hour
    return np.array(found), volatility, float(size.sum() / seconds * 3_600)


def test_the_default_spread_is_not_below_a_real_book(walks):
    found, *_ = walks
    half = np.median(found[:, 3] / found[:, 1])
    print(f"half spread {1e4 * half:.4f} bps, the default is {1e4 * CostModel().slippage:.0f}")
    assert 0 < half < CostModel().slippage


def test_cost_grows_with_size_as_a_real_book_says(walks):
    found, volatility, volume = walks
    sizes = np.abs(found[:, 0])
    cost = np.sign(found[:, 0]) * (found[:, 2] / found[:, 1] - 1.)
    mean = np.array([cost[sizes == size].mean() for size in np.unique(sizes)])
    exponent = np.polyfit(np.log(np.unique(sizes)), np.log(mean), 1)[0]
    fit = calibrate(found[:, 0], found[:, 1], found[:, 2], np.arange(len(found)) * 1e6, np.full(len(found), volatility),
                    np.full(len(found), volume))
    print(f"cost of {', '.join(f'{size:g}: {1e4 * each:.3f} bps' for size, each in zip(np.unique(sizes), mean))}; "
          f"exponent {exponent:.2f}; hourly volatility {volatility:.4f}, volume {volume:.0f}; coefficient "
          f"{fit.impact:.2f} +- {fit.impact_error:.2f}")
    assert (np.diff(mean) > 0).all()
    assert .3 < exponent < 1.3
    assert .05 < fit.impact < 5


def test_stops_in_a_candle_are_pessimistic_where_backtesting_py_is_too():
    """Both touched: the stop (backtesting.py decides so as well); a gap beyond the stop: the open (so does it); a gap
    beyond a resting limit order: its own price (backtesting.py gives the better open)"""
    from tests.test_kernel import levered
    from tradelab.settings import Stops
    both, gap = ([(100, 100, 100, 100, 1e6), (100, 100.5, 99.5, 100, 1e6), (*candle, 1e6)]
                 for candle in ((100, 105, 97, 104), (95, 96, 94, 95)))
    for candles, price in ((both, 98.), (gap, 95.)):
        state, _ = levered(candles, 1., 1, stops=Stops(stop_loss=.02, take_profit=.04),
                           execution=Execution(protect=True))
        assert [(Kind(each["kind"]).name, float(each["price"])) for each in state.fills[1:state.count[0]]] == [("STOP",
            price)]


@pytest.mark.parametrize("limits", [Limits(), Limits(max_position=1., max_drawdown=.05, max_daily_loss=.01),
                                    Limits(max_position=.3, capital=100., target_volatility=.1)],
                                    ids=["default", "halted at once", "held small"])
def test_buy_and_hold_is_the_market_whatever_the_limits(shared, limits):
    "Bitcoin and ether in equal parts, bought once: the market of pandas, less one fee and the slippage"
    frames = {symbol: history(symbol, "1h", "2021-01-01", "2021-09-01",
                              source=str(shared / f"data/{symbol[:3]}USDT-perp-1h.parquet"))
                              for symbol in ("BTC/USDT:USDT", "ETH/USDT:USDT")}
    result = backtest(flat(), frames, limits=limits, deposit=1e6,
                      instruments=tuple(Instrument(symbol, .01, .001) for symbol in frames))
    bought, (held, sized) = result.journal.index[2], (result.baselines[name] for name in ("buy and hold", SIZED))
    market = np.mean([frame["close"].iloc[-1] / frame["open"][bought] for frame in frames.values()])
    assert held.equity.iloc[-1] / 1e6 == pytest.approx(market * (1 - .0005 - .0001), rel=1e-3)
    assert len(held.fills) == 2
    assert (sized.journal["reason"] == Reason.HALTED).any() == (limits.max_drawdown == .05)
    assert not (held.journal["reason"] == Reason.HALTED).any()


@pytest.mark.parametrize("rate", [5e-4, 0., -5e-4])
def test_buy_and_hold_keeps_its_quantity_through_funding(rate):
    "Equity by hand: what was bought, at each close, less all that funding took until then; nothing is sold to pay it"
    candles = ar1(1_500, rho=0., volatility=.01, seed=4)
    due = pd.Series(rate, candles.index[8::8])
    result = backtest(flat(), candles, funding=due, limits=Limits(), deposit=1e7, instruments=Instrument("X", .1, .001),
                      costs=CostModel(taker_fee=0., slippage=0.))
    held = result.baselines["buy and hold"]
    assert len(held.fills) == 1
    quantity, price = held.fills[["quantity", "price"]].iloc[0]
    closes = candles["close"][held.equity.index]
    paid = (due.reindex(closes.index[:-1] + pd.Timedelta("1h")).fillna(0.) * closes.to_numpy()[:-1]).cumsum().to_numpy()
    assert abs(paid[-1]) > .05 * price or not rate
    expected = 1e7 + quantity * (closes.to_numpy()[1:] - price - paid)
    np.testing.assert_allclose(held.equity.to_numpy()[1:], expected, rtol=1e-4)
