"""Getting out over real sockets and SQLite, of positions whose stops stand at the exchange beside orders that rest: one
fault of each family, and processes that are killed in the midst of it"""
import asyncio
import json
import sqlite3
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_live import localnet, venue
from test_outages import WAITS
from test_simulation_protection import of_stops

from tradelab.compiled import compiled
from tradelab.events import TradingState
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN as LISTED
from tradelab.live.ledger import Asked, Ledger
from tradelab.live.messages import Command, EmergencyStep
from tradelab.live.session import Session
from tradelab.localnet.faults import SCENARIOS
from tradelab.orders import LIMIT, MARKET
from tradelab.policies import Policy
from tradelab.risk.execution import OrderGate
from tradelab.settings import Execution, Limits, Stops
from tradelab.trader import Trader
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration
SYMBOLS = "BTC/USDT:USDT", "ETH/USDT:USDT"
LIMITS = Limits(max_position=.4, max_drawdown=.9, max_daily_loss=None, price_band=None, max_orders=None,
                stops=Stops(stop_loss=.2, take_profit=.4, trailing_stop=.25))
WITHIN = WAITS | dict(stop_deadline=300, stop_patience=300, heartbeat=20)


@compiled
def _busy(parameters, memory, observation, prices, answer):
    "Holds a position that grows and shrinks at each close, and an order that rests below"
    memory[0] += 1.
    for n in range(len(prices)):
        market, resting = answer[n, 0], answer[n, 1]
        market["kind"], resting["kind"] = MARKET, LIMIT
        market["exposure"] = .2 if memory[0] == 1. else .05 * (-1.) ** memory[0]
        resting["exposure"], resting["price"] = .05, .96 * prices[n]


def trader():
    policy = Policy("busy", _busy, np.zeros(0), order_slots=2, memory=1)
    return Trader(policy, Observation.from_policy(policy), OrderGate, LIMITS,
                  tuple(replace(LISTED, symbol=symbol) for symbol in SYMBOLS), execution=Execution(protect=True))


def session(url, folder, broker=BinanceVenue, ledger=Ledger, **options):
    settings = {"id": "out", "patience": 2., "waits": WITHIN, "say": lambda line: None} | options
    return Session(trader(), broker(venue(SimpleNamespace(url=url)), timeout=1.),
                   ledger(f"sqlite:///{folder}/tradelab.db"), folder / "sessions", **settings)


# --- what the exchange holds

def held(exchange): return [exchange.exchange.accounts["main"].held(n, "BOTH") for n in range(len(SYMBOLS))]
def stops(exchange): return exchange.exchange.conditional.of(exchange.exchange.accounts["main"]).open.values()


def unguarded(exchange, live):
    "Positions without their stop of which the ladder says nothing"
    said = {symbol for cause, symbol, *_ in json.loads(live.ladder)["active"] if cause == "no_stop"} if live.ladder else ()
    there = Counter()
    for each in stops(exchange):
        if each.kind == "STOP_MARKET": there[each.n] += each.quantity / 2   # the stop and the trailing stop
    return [f"{symbol}: {quantity} held, {there[n]} protected" for n, (symbol, quantity) in
            enumerate(zip(SYMBOLS, held(exchange))) if abs(quantity) > there[n] + 1e-9 and symbol not in said]


def wrong_in(exchange, live, before):
    "What must never be after an emergency, in sentences; `before`: the names of orders when a person said the word"
    account = exchange.exchange.accounts["main"]
    found = [f"{held(exchange)} is held"] if any(held(exchange)) else []
    found += [f"{each.client_id} rests still" for each in account.open.values()]
    found += [f"{each.client_id} protects nothing" for each in stops(exchange)]
    new = {each.client_id: each for each in account.orders.values() if each.client_id not in before}
    found += [f"{name} may open" for name, each in new.items() if not each.reduce_only]
    left = Counter()
    for trade in account.trades:
        was, name = left[trade.n], account.orders[trade.order].client_id
        left[trade.n] = round(was + trade.quantity, 8)
        closes = was * left[trade.n] >= 0 and abs(left[trade.n]) < abs(was)
        if name in new and not closes: found.append(f"{name}: {was} became {left[trade.n]}")
    twice = [name for name, times in Counter(each.client_id for each in account.orders.values()).items() if times > 1]
    if twice: found.append(f"{twice} were placed twice")
    standing, = live.ledger.trading_states.all()
    if standing["trading_state"] != TradingState.HALT: found.append(f"the ledger says {standing}")
    booked = sum(entry.quantity for _, entry in live.ledger.booked("out") if hasattr(entry, "trade_id"))
    if abs(booked) > 1e-9: found.append(f"the ledger holds {booked}")
    return found


# --- one fault of each family

def brief(*names, **changes):
    "The rules of these scenarios, for conditional orders, too; what would last longer ends after 700 ms"
    def shorter(rule):
        lasts = {"lasts_ms": min(rule["lasts_ms"], 700)} if rule.get("lasts_ms") else {}
        return rule | lasts | ({"then": [shorter(each) for each in rule["then"]]} if "then" in rule else {})
    found = [rule for name in names for rule in (*SCENARIOS[name].faults, *of_stops(name))]
    return [shorter(rule) | changes for rule in {json.dumps(rule): rule for rule in found}.values()]


MAINTENANCE = {"at": "request", "do": "reply", "times": 0, "commit": False, "lasts_ms": 700, "status": 503,
               "text": "<html><body>System maintenance</body></html>"}
REFUSED = {"at": "request", "do": "reply", "method": "POST", "commit": False, "status": 400, "code": -4131, "msg":
           "The counterparty's best price does not meet the PERCENT_PRICE filter limit.", "times": 2}
FAMILIES = {
    "refused": [*brief("overloaded"), *({**REFUSED, "path": path} for path in ("v1/order", "v1/algoOrder"))],
    "no answer": brief("timeout_after_fill", "timeout_before_accept", "unavailable_with_commit"),
    "events twice, reversed and lost": brief("twice_delivered", "fill_before_order", "lost_fill"),
    "streams away": brief("close_1006", "silent_stream"),
    "requests away": brief("everything_away"),
    "429": brief("too_many_requests"),
    "418": brief("ban"),
    "clock": brief("clock_jump"),
    "maintenance": [MAINTENANCE, *brief("day_is_over")],
    "server again": [{"at": "server", "do": "restart", "loss": False}],
    "suspended": brief("symbol_suspended"),
    "ledger locked": [],
}


def lock(folder):
    "Another process writes to the ledger for a while"
    other = sqlite3.connect(folder / "tradelab.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(.7, other.close).start()


def break_it(family, exchange, folder):
    if family == "ledger locked": lock(folder)
    else: exchange.faults.arm(FAMILIES[family])


WORD = Command(1, "halt", reason="an example", person="Ada")


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_breaks_stops_stand_and_an_emergency_gets_out(family, tmp_path):
    with localnet(SYMBOLS, deposit=20_000.) as exchange:
        live, naked, before, hits = session(exchange.url, tmp_path), [], set(), []

        def progress(statistics):
            if statistics.candles == 4: break_it(family, exchange, tmp_path)
            if statistics.candles == 10:
                assert all(held(exchange))
                naked.extend(unguarded(exchange, live))
                exchange.faults.disarm()
                hits.append(len(exchange.faults.log))
                before.update(each.client_id for each in exchange.exchange.accounts["main"].orders.values())
                break_it(family, exchange, tmp_path)
                live.venue.events.put_nowait(WORD)
        live.progress = progress
        asyncio.run(live.run(14))
        assert naked == []
        assert family == "ledger locked" or 0 < hits[0] < len(exchange.faults.log)
        assert wrong_in(exchange, live, before) == []
        orders = len(exchange.exchange.accounts["main"].orders)
        asyncio.run(session(exchange.url, tmp_path, id="", resume="out").run(2))
        assert wrong_in(exchange, live, before) == []
        assert len(exchange.exchange.accounts["main"].orders) == orders
