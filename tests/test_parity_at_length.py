"""A thousand candles of two symbols over real sockets, with every cost that a candle can show: a policy of targets and
a policy of orders do what their backtest does, bit for bit. And small markets, each with other orders and costs"""
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
from tradelab.orders import FOK, GTC, GTX, IOC, LIMIT, MARKET, NONE, STOP, TAKE_PROFIT, TRAILING
from tradelab.policies import Policy
from tradelab.risk.breakers import DEFAULTS
from tradelab.runs.run import make_trader
from tradelab.settings import NO_STOPS, CostModel, Execution, Limits, Stops
from tradelab.sim.backtest import backtest
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration
CANDLES, HISTORY = int(os.environ.get("PARITY_CANDLES", 1_000)), 1_000
SEEDS = int(os.environ.get("PARITY_SEEDS", 6))
SYMBOLS = "BTC/USDT:USDT", "ETH/USDT:USDT"
INSTRUMENTS = tuple(replace(BITCOIN, symbol=symbol) for symbol in SYMBOLS)
COSTS = CostModel(spread_volatility=.5, spread_volume=.3, impact=.5) # with fees, slippage and funding
QUIET = tuple(replace(each, threshold=1e9) for each in DEFAULTS)     # a backtest has no breakers
OPEN = dict(max_drawdown=.9, max_daily_loss=None, max_participation=None, max_orders=None, price_band=None)


def begin(row, price, random):
    "An order of any kind, also one that Binance refuses at once"
    kind = int(random.choice([MARKET, LIMIT, LIMIT, LIMIT, STOP, TAKE_PROFIT, TRAILING]))
    side = random.choice([-1., 1.])
    limited, near = kind == LIMIT or random.random() < .5, random.choice([0., .002, .01, .03])
    row["kind"], row["exposure"] = kind, side * (1. if random.random() < .05 else round(random.uniform(.02, .15), 3))
    row["in_force"] = int(random.choice([GTC, GTC, IOC, FOK, GTX]))
    row["price"] = price * (1. + random.uniform(-near, near)) if limited else 0.
    aims = (side if kind == STOP else -side) * random.choice([1., 1., -1.])
    row["trigger"] = price * (1. + aims * random.uniform(0., near)) if kind in (STOP, TAKE_PROFIT) else 0.
    row["callback"] = random.uniform(.001, .01) if kind == TRAILING else 0.
    row["reduce_only"], row["expires_in"] = random.random() < .35, random.choice([0., 0., 1., 3.])
    if row["reduce_only"] and random.random() < .5: row["exposure"] = side


def change(row, price, random):
    "Leave, replace, cancel, move or resize an order"
    chance = random.random()
    if chance < .1: begin(row, price, random)
    elif chance < .2: row["kind"] = NONE
    elif chance < .3 and row["price"] > 0.: row["price"] *= random.uniform(.996, 1.004)
    elif chance < .36 and row["trigger"] > 0.: row["trigger"] *= random.uniform(.996, 1.004)
    elif chance < .45: row["exposure"] *= .6
    elif chance < .5 and abs(row["exposure"]) < .1: row["exposure"] *= 2.
    elif chance < .53: row["callback"] *= 1.5


def any_orders(parameters, memory, observation, prices, answer):
    "Orders, as a seed and the number of the decision say"
    memory[0] += 1.
    random = np.random.default_rng([int(parameters[0]), int(memory[0])])
    for n, price in enumerate(prices):
        for row in answer[n]:
            if row["kind"] != NONE: change(row, price, random)
            elif random.random() < .25: begin(row, price, random)


def wander(parameters, memory, observation, prices, targets):
    "Targets that stay for some candles, turn round, grow and go"
    memory[0] += 1.
    random = np.random.default_rng([int(parameters[0]), int(memory[0])])
    for n in range(len(prices)):
        if memory[0] == 1. or random.random() < .3: memory[n + 1] = random.choice([-.9, -.4, 0., .3, .5, 1.]) / 2
        targets[n] = memory[n + 1]


def orders_of(seed): return Policy("any orders", any_orders, np.array([float(seed)]), order_slots=3, memory=1)


POLICIES = {"targets": (network(4, symbols=2), Limits(max_drawdown=.9, max_daily_loss=None), COSTS),
            "orders": (orders_of(1), Limits(max_position=.6, stops=NO_STOPS, **OPEN),
                       replace(COSTS, participation=.05))}


def market_of(candles, volatility=.01, seed=3):
    frames = {symbol: ar1(HISTORY + candles + 2, volatility=volatility, seed=seed + n) for n, symbol in
              enumerate(SYMBOLS)}
    return frames, {symbol: funding(frame, seed=seed + n) for n, (symbol, frame) in enumerate(frames.items())}


def both(folder, market, candles, policy, limits, costs, execution=Execution()):
    "A session over sockets, what it did, and what its backtest does"
    frames, rates = market
    begins = frames[SYMBOLS[0]].index[HISTORY]
    with Localnet(frames, rates, INSTRUMENTS, costs, start=begins.value // 10**6) as exchange:
        there = VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"),
                              SecretStr("localnet-key"), SecretStr("localnet-secret"))
        ledger = Ledger(f"sqlite:///{folder}/tradelab.db")
        trader = make_trader(policy, limits, INSTRUMENTS, timeframe="1h", execution=execution)
        session = Session(trader, BinanceVenue(there), ledger, folder, id="parity", waits={"breakers": QUIET},
                          say=lambda line: None)
        statistics = asyncio.run(session.run(candles))
    expected = backtest(policy, frames, begins, costs=costs, limits=limits, funding=rates, execution=execution,
                        instruments=dict(zip(SYMBOLS, INSTRUMENTS)), baselines=())
    assert statistics.candles == candles
    assert statistics.late == statistics.disagreements == 0
    return expected, ledger.journal("parity")


def apart(expected, journal):
    "Where they differ first; what follows the last decision was not waited for"
    rows = len(journal) - len(SYMBOLS)
    return first_difference(expected.journal[:rows], journal[:rows])


@pytest.mark.parametrize("kind", POLICIES)
def test_a_thousand_candles_of_two_symbols_are_the_backtest(kind, tmp_path):
    expected, journal = both(tmp_path, market_of(CANDLES), CANDLES, *POLICIES[kind])
    rows = 2 * (CANDLES - 1)
    assert (journal["fill_quantity"] != 0).sum() > CANDLES / 5
    assert (journal["funding"] != 0).sum() > CANDLES / 10
    assert apart(expected, journal) is None
    np.testing.assert_allclose(journal["equity"][:rows], expected.journal["equity"][:rows], rtol=1e-9)
    costs = expected.fill_rows
    assert (costs["spread"] != 0.).any()
    assert (costs["impact"] != 0.).any()
    if kind == "orders": assert set(costs["kind"].tolist()) == {MARKET, LIMIT, STOP, TAKE_PROFIT, TRAILING}


def setting_of(seed):
    "Volatility and costs of a small market"
    random = np.random.default_rng([77, seed])
    scarce = random.choice([None, None, .001, .01, .05])
    costs = COSTS if random.random() < .7 else CostModel()
    return random.choice([.004, .01, .02]), replace(costs, participation=scarce)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_orders_of_every_kind_trade_as_in_the_kernel(seed, tmp_path):
    "Kinds, times in force, reduce-only, expiry; placed, moved, resized, replaced, cancelled; filled whole and in parts"
    volatility, costs = setting_of(seed)
    expected, journal = both(tmp_path, market_of(60, volatility, 100 + 2 * seed), 60, orders_of(seed),
                             Limits(max_position=.6, stops=NO_STOPS, **OPEN), costs)
    assert len(expected.fill_rows) > 10
    assert apart(expected, journal) is None


@pytest.mark.parametrize("style", ["market", "post_only", "slices"])
def test_every_style_trades_as_in_the_kernel_stops_and_scarce_volume_too(style, tmp_path):
    stops = Stops(stop_loss=.012, take_profit=.02, trailing_stop=.016)
    policy = Policy("wander", wander, np.array([5.]), memory=3)
    expected, journal = both(tmp_path, market_of(80, .01, 40), 80, policy, Limits(max_position=.8, stops=stops, **OPEN),
                             replace(COSTS, participation=.01), Execution(style, patience=2, slices=3, protect=True))
    assert expected.fill_rows["protects"].any()
    assert apart(expected, journal) is None
