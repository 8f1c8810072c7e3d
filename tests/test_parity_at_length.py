"""A thousand candles of two symbols over real sockets, with every cost that a candle can show: a policy of targets and
a policy of orders do what their backtest does, bit for bit"""
import asyncio
import os
from dataclasses import replace

import numpy as np
import pytest
from pydantic import SecretStr
from test_sentence import network

from tradelab.config import VenueSettings
from tradelab.evaluation.difference import first_difference
from tradelab.instruments import BITCOIN
from tradelab.live.ledger import Ledger
from tradelab.live.session import Session
from tradelab.localnet.server import Localnet
from tradelab.market.synthetic import ar1, funding
from tradelab.orders import GTC, GTX, IOC, LIMIT, MARKET, NONE, STOP, TAKE_PROFIT, TRAILING
from tradelab.policies import Policy
from tradelab.runs.run import make_trader
from tradelab.settings import NO_STOPS, CostModel, Limits
from tradelab.sim.backtest import backtest
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration
CANDLES, HISTORY = int(os.environ.get("TRADELAB_PARITY_CANDLES", 1_000)), 1_000
SYMBOLS = "BTC/USDT:USDT", "ETH/USDT:USDT"
INSTRUMENTS = tuple(replace(BITCOIN, symbol=symbol) for symbol in SYMBOLS)
COSTS = CostModel(spread_volatility=.5, spread_volume=.3, impact=.5) # with fees, slippage and funding


def begin(row, price, random):
    "An order of any kind; what Binance would refuse at once, and a backtest lets expire, is not among them"
    kind, side = int(random.choice([MARKET, LIMIT, LIMIT, STOP, TAKE_PROFIT, TRAILING])), random.choice([-1., 1.])
    limited = kind == LIMIT or kind in (STOP, TAKE_PROFIT) and random.random() < .4
    row["kind"], row["exposure"] = kind, side * round(float(random.uniform(.03, .1)), 3)
    row["in_force"] = int(random.choice([GTC, GTC, IOC, GTX])) if kind == LIMIT else GTC
    row["price"] = price * (1. + float(random.uniform(-.01, .01))) if limited else 0.
    aims = side if kind == STOP else -side
    row["trigger"] = price * (1. + aims * float(random.uniform(0., .01))) if kind in (STOP, TAKE_PROFIT) else 0.
    row["callback"] = float(random.choice([.002, .005, .01])) if kind == TRAILING else 0.


def any_orders(parameters, memory, observation, prices, answer):
    "Leaves, moves, shrinks, cancels, replaces and begins orders, as the number of the decision says"
    memory[0] += 1.
    random = np.random.default_rng([int(parameters[0]), int(memory[0])])
    for n, price in enumerate(prices):
        for row in answer[n]:
            chance = random.random()
            if row["kind"] == NONE or chance < .1:
                if chance < .2: begin(row, price, random)
            elif chance < .25: row["kind"] = NONE
            elif chance < .35 and row["price"] > 0.: row["price"] *= 1. + float(random.uniform(-.003, .003))
            elif chance < .45 and row["kind"] != TRAILING and abs(row["exposure"]) > .04: row["exposure"] *= .5


POLICIES = {"targets": (network(4, symbols=2), Limits(max_drawdown=.9, max_daily_loss=None)),
            "orders": (Policy("any orders", any_orders, np.array([1.]), order_slots=2, memory=1),
                       Limits(max_position=.6, max_drawdown=.9, max_daily_loss=None, max_participation=None,
                              max_orders=None, price_band=None, stops=NO_STOPS))}


@pytest.fixture(scope="module")
def market():
    frames = {symbol: ar1(HISTORY + CANDLES + 2, volatility=.01, seed=3 + n) for n, symbol in enumerate(SYMBOLS)}
    return frames, {symbol: funding(frame, seed=3 + n) for n, (symbol, frame) in enumerate(frames.items())}


@pytest.mark.parametrize("kind", POLICIES)
def test_a_thousand_candles_of_two_symbols_are_the_backtest(market, kind, tmp_path):
    (frames, rates), (policy, limits) = market, POLICIES[kind]
    begins = frames[SYMBOLS[0]].index[HISTORY]
    with Localnet(frames, rates, INSTRUMENTS, COSTS, start=begins.value // 10**6) as exchange:
        there = VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"),
                              SecretStr("localnet-key"), SecretStr("localnet-secret"))
        ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
        trader = make_trader(policy, limits, INSTRUMENTS, timeframe="1h")
        session = Session(trader, BinanceVenue(there), ledger, tmp_path, id="parity", say=lambda line: None)
        statistics = asyncio.run(session.run(CANDLES))
    journal, expected = ledger.journal("parity"), backtest(policy, frames, begins, costs=COSTS, limits=limits,
        funding=rates, instruments=dict(zip(SYMBOLS, INSTRUMENTS)), baselines=())
    rows = 2 * (CANDLES - 1) # what follows the last decision was not waited for
    assert statistics.candles == CANDLES
    assert statistics.late == statistics.disagreements == 0
    assert (journal["fill_quantity"] != 0).sum() > CANDLES / 5
    assert (journal["funding"] != 0).sum() > CANDLES / 10
    assert first_difference(expected.journal[:rows], journal[:rows]) is None
    np.testing.assert_allclose(journal["equity"][:rows], expected.journal["equity"][:rows], rtol=1e-9)
    costs = expected.fill_rows
    assert (costs["spread"] != 0.).any()
    assert (costs["impact"] != 0.).any()
    if kind == "orders": assert set(costs["kind"].tolist()) == {MARKET, LIMIT, STOP, TAKE_PROFIT, TRAILING}
