"""Getting out over real sockets and SQLite, of positions whose stops stand at the exchange beside orders that rest: one
fault of each family, and processes that are killed in the midst of it"""
import asyncio
import csv
import json
import multiprocessing
import os
import resource
import signal
import sqlite3
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from test_live import localnet, venue
from test_outages import WAITS
from test_simulation_protection import of_stops

from tradelab.compiled import compiled
from tradelab.database.records import Asked, EmergencyStep
from tradelab.drill import rehearse
from tradelab.events import TradingState
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN as LISTED
from tradelab.live.guards import EMERGENCY, is_emergency
from tradelab.live.ledger import Ledger
from tradelab.live.messages import Command
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
WITHIN = WAITS | dict(stop_deadline=300, stop_patience=300, heartbeat=20, pause=100, quiet=300)


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

def names(exchange): return {each.client_id for each in exchange.exchange.accounts["main"].orders.values()}
def held(exchange): return [exchange.exchange.accounts["main"].held(n, "BOTH") for n in range(len(SYMBOLS))]
def stops(exchange): return exchange.exchange.conditional.of(exchange.exchange.accounts["main"]).open.values()


def unguarded(exchange, live):
    "Positions without their stop of which the ladder says nothing"
    active = json.loads(live.ladder)["active"] if live.ladder else []
    said = [symbol for cause, symbol, *_ in active if cause == "no_stop"]
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
}


def lock(folder):
    "Another process writes to the ledger for a while"
    other = sqlite3.connect(folder / "tradelab.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    return threading.Timer(.7, other.close)


def fill_disk(folder):
    "The ledger's file cannot grow for a while"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "tradelab.db-wal").stat().st_size, limits[1]))
    return threading.Timer(.4, resource.setrlimit, (resource.RLIMIT_FSIZE, limits))


DISK = {"ledger locked": lock, "disk full": fill_disk}


def break_it(family, exchange, folder):
    "Returns what waits for the end of it"
    if family not in DISK: return exchange.faults.arm(FAMILIES[family])
    mended = DISK[family](folder)
    mended.start()
    return mended.join


WORD = Command(1, "halt", reason="an example", person="Ada")


@pytest.mark.parametrize("family", [*FAMILIES, *DISK])
def test_whatever_breaks_stops_stand_and_an_emergency_gets_out(family, tmp_path):
    with localnet(SYMBOLS, deposit=20_000.) as exchange:
        live, naked, before, hits, over = session(exchange.url, tmp_path), [], set(), [], []

        def progress(statistics):
            if statistics.candles in (4, 9 if family == "suspended" else 10):
                over.append(break_it(family, exchange, tmp_path))
            if statistics.candles in (7, 15) and over[-1]: over[-1]()
            if statistics.candles == 8:
                naked.extend(unguarded(exchange, live))
                exchange.faults.disarm()
                hits.append(len(exchange.faults.log))
            if statistics.candles == 10:
                assert all(held(exchange))
                before.update(names(exchange))
                live.venue.events.put_nowait(WORD)
        live.progress = progress
        asyncio.run(live.run(16))
        assert naked == []
        assert family in DISK or 0 < hits[0] < len(exchange.faults.log)
        assert wrong_in(exchange, live, before) == []
        before = names(exchange)
        again = session(exchange.url, tmp_path, id="", resume="out")
        asyncio.run(again.run(2))
        assert wrong_in(exchange, again, before) == []
        assert names(exchange) == before


def test_a_signal_ends_a_drill_and_is_no_drill():
    async def interrupted():
        before, drill = signal.getsignal(signal.SIGTERM), asyncio.ensure_future(rehearse(SYMBOLS[:1]))
        while signal.getsignal(signal.SIGTERM) == before: await asyncio.sleep(.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await drill
    with pytest.raises(RuntimeError, match="a signal has ended the drill before everything was closed"):
        asyncio.run(interrupted())


# --- killed in the midst of it

PASSED, DEATH = Counter(), []   # doors of this process; the one that it dies at, and for the how manieth time


def door(name):
    PASSED[name] += 1
    if DEATH == [name, PASSED[name]]: os.kill(os.getpid(), signal.SIGKILL)


class Mortal(BinanceVenue):
    async def place(self, order):
        if is_emergency(order): door("close sent")
        answer = await super().place(order)
        if is_emergency(order): door("close answered")
        return answer


class MortalLedger(Ledger):
    "Dies in front of the end of a transaction of the session's, or behind it"
    steps = ()

    def measure(self, session, *records):
        super().measure(session, *records)
        self.steps += tuple(each.step for each in records if isinstance(each, EmergencyStep))

    @contextmanager
    def transaction(self, lease=None, durable=False):
        with super().transaction(lease, durable) as new:
            yield new
            for step in self.steps if lease else (): door(f"{step} unwritten")
        written, self.steps = (self.steps, ()) if lease else ((), self.steps)
        for step in written: door(f"{step} written")


def halting(live, candle=4):
    "At this candle a person writes the word into the ledger"
    def progress(statistics):
        if statistics.candles == candle: live.ledger.commands.ask(Asked("halt", "an example", "Ada", session=live.id))
    live.progress = progress
    return live


def dying(url, folder, name, nth, resume):
    "A session in a process of its own, until it dies at a door"
    DEATH[:] = [name, nth]
    given = {"id": "", "resume": "out"} if resume else {}
    live = session(url, folder, Mortal, MortalLedger, **given)
    asyncio.run((live if resume else halting(live)).run(12))


DOORS = [("halted unwritten", 1), ("halted written", 1), ("close sent", 2), ("close answered", 1),
         ("flat unwritten", 1), ("flat written", 2), ("over unwritten", 1), ("over written", 1)]


@pytest.fixture(scope="module")
def processes():
    "Processes from a server that has imported everything already"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)): yield context


def die(exchange, folder, processes, name, nth=1, resume=False):
    "A session in a process of its own, which dies at this door if it comes to it; whether it died"
    process = processes.Process(target=dying, args=(exchange.url, folder, name, nth, resume))
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def kill(exchange, folder, processes, name, nth=1):
    "A session dies at a door of its emergency; returns the names of its orders that are not of the emergency"
    assert die(exchange, folder, processes, name, nth)
    return {each for each in names(exchange) if int(each.split("-")[3]) < EMERGENCY}


def told_wrong(live):
    "What the ledger and emergencies.csv tell amiss of an emergency that is over, in sentences"
    steps = live.ledger.measured("out", EmergencyStep)
    counts, last = Counter(each.step for each in steps), {each.symbol: each.step for each in steps}
    found = [] if len(set(steps)) == len(steps) else ["a step is written twice"]
    if counts["halted"] > 1: found.append("it began more than once")
    if set(last.values()) != {"flat", "over"}: found.append(f"it ended with {last}")
    with open(live.folder / "emergencies.csv", newline="") as file: lines = list(csv.DictReader(file))
    shown = Counter((int(each["time"]), each["kind"], each["text"]) for each in lines)
    if any(shown[each.time, each.step, f"{each.symbol} {each.text}".strip()] != 1 for each in steps):
        found.append("emergencies.csv has not each step once")
    return found


@pytest.mark.parametrize("name, nth", DOORS)
def test_killed_in_an_emergency_it_gets_out_when_it_is_resumed(name, nth, processes, tmp_path):
    with localnet(SYMBOLS, deposit=20_000.) as exchange:
        before = kill(exchange, tmp_path, processes, name, nth)
        again = session(exchange.url, tmp_path, id="", resume="out")
        asyncio.run(again.run(3))
        assert wrong_in(exchange, again, before) == []
        assert told_wrong(again) == []


def test_its_halt_outlives_the_process_and_the_session_until_a_reset_with_a_reason(processes, tmp_path):
    def other(live):
        def progress(statistics):
            reasons = {3: " ", 5: "looked at it"}
            orders.append(len(names(exchange)))
            if statistics.candles not in reasons: return
            live.ledger.commands.ask(Asked("reset", reasons[statistics.candles], "Ada", session="other"))
        live.progress = progress
        return live
    with localnet(SYMBOLS, deposit=20_000.) as exchange:
        kill(exchange, tmp_path, processes, "closing written")
        assert die(exchange, tmp_path, processes, "flat written", resume=True)
        asyncio.run(session(exchange.url, tmp_path, id="", resume="out").run(2))
        assert not any(held(exchange))
        orders, live = [], session(exchange.url, tmp_path, id="other")
        asyncio.run(other(live).run(10))
        answers = [row["answer"] for row in live.ledger.commands.all()]
        assert answers[1:] == ["refused: a reset needs a reason",
                               "reset: positions may be opened again, drawdown counts from here"]
        assert orders[0] == orders[4] < orders[-1]
