"""Stops that stand at a real localnet, over sockets: where the simulation has them, replaced without a naked moment,
found again by a session that was killed"""
import asyncio
from dataclasses import replace

import pytest
from pydantic import SecretStr

from tradelab.config import VenueSettings
from tradelab.evaluation.difference import first_difference
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN as LISTED
from tradelab.live.ledger import Ledger
from tradelab.live.order_states import protects
from tradelab.live.session import Session
from tradelab.localnet.server import Localnet
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1, funding
from tradelab.risk.execution import OrderGate
from tradelab.settings import CostModel, Execution, Limits, Stops
from tradelab.sim.backtest import backtest
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration

BITCOIN, ETHER, HISTORY = "BTC/USDT:USDT", "ETH/USDT:USDT", 40
STOPPED = Limits(stops=Stops(stop_loss=.006, take_profit=.01, trailing_stop=.008), max_drawdown=.9, max_daily_loss=None)
POLICY = Momentum(lookback=5, threshold=.002)


def market(symbols=(BITCOIN,), candles=260):
    return {symbol: ar1(candles, volatility=.006, seed=3 + n) for n, symbol in enumerate(symbols)}


def localnet(symbols=(BITCOIN,), candles=260, **options):
    frames = market(symbols, candles)
    paid = {symbol: funding(frame, seed=n) for n, (symbol, frame) in enumerate(frames.items())}
    return Localnet(frames, paid, [replace(LISTED, symbol=symbol) for symbol in symbols], CostModel(),
                    start=int(times(frames[BITCOIN])[HISTORY]), **options)


def session(exchange, folder, symbols=(BITCOIN,), limits=STOPPED, policy=POLICY, **options):
    trader = Trader(policy, Observation.from_policy(policy), OrderGate, limits,
                    tuple(replace(LISTED, symbol=symbol) for symbol in symbols), execution=Execution(protect=True))
    settings = VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"),
                             SecretStr("localnet-key"), SecretStr("localnet-secret"))
    return Session(trader, BinanceVenue(settings), Ledger(f"sqlite:///{folder}/tradelab.db"), folder / "sessions",
                   **({"id": "protected", "say": lambda line: None} | options))


def run(live, candles=None): return asyncio.run(live.run(candles))


def test_stops_trade_at_localnet_as_in_the_simulation(tmp_path):
    with localnet() as exchange:
        live = session(exchange, tmp_path)
        run(live, 200)
    frames = market()
    expected = backtest(POLICY, frames[BITCOIN], frames[BITCOIN].index[HISTORY], limits=STOPPED,
                        funding=funding(frames[BITCOIN], seed=0), execution=Execution(protect=True), baselines=(),
                        instruments=[LISTED])
    journal = live.ledger.journal("protected")
    kinds = {intent.order.kind.name for intent in live.ledger.intents("protected") if protects(intent.order)}
    assert kinds >= {"STOP", "TAKE_PROFIT"}
    assert (expected.fills["protects"]).sum() > 10
    assert first_difference(expected.journal[:200], journal) is None
