"Sessions over real sockets that meet the outages of localnet's list: none ends one, and after each it trades again"
import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr
from servers import until

from tradelab.config import VenueSettings
from tradelab.database.records import ExchangeHealth
from tradelab.evaluation.difference import first_difference
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN as LISTED
from tradelab.live.ledger import Ledger
from tradelab.live.replay import replay
from tradelab.live.session import Session
from tradelab.localnet.server import Localnet
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1, funding
from tradelab.policies import Policy
from tradelab.risk.execution import OrderGate
from tradelab.settings import CostModel, Limits
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration

BITCOIN, CANDLES, ARMED = "BTC/USDT:USDT", 40, 8
MARKET, STEP = ar1(140, seed=3), 3_600_000
WAITS = dict(ask_after=100, redial_after=300, quiet=100, pause=20, longest_pause=100, absent_after=200, first_delay=20,
             clock_every=50)


def trader():
    policy = Momentum(lookback=5, threshold=.005)
    return Trader(policy, Observation.from_policy(policy), OrderGate, Limits(), (replace(LISTED, symbol=BITCOIN),))


class Told:
    "What a session left"
    def __init__(self, folder, faults=(), parts=(CANDLES,), market=MARKET, gaps=False, **waits):
        self.folder, self.faults, self.gaps = folder, faults, gaps
        with Localnet({BITCOIN: market}, {BITCOIN: funding(MARKET, seed=0)}, [replace(LISTED, symbol=BITCOIN)],
                      CostModel(), start=int(times(MARKET)[40]), gaps=True) as self.exchange:
            for number, candles in enumerate(parts):
                name = {"resume" if number else "id": "outage"}
                self.statistics = asyncio.run(self.session(waits, **name).run(candles))
            account = self.exchange.exchange.accounts["main"]
            self.orders = Counter(order.client_id for order in account.orders.values())
            self.held = account.held(0, "BOTH")

    def session(self, waits, **name):
        venue = VenueSettings("localnet", "a test", self.exchange.url, self.exchange.url.replace("http", "ws"),
                              SecretStr("localnet-key"), SecretStr("localnet-secret"))
        self.ledger = Ledger(f"sqlite:///{self.folder}/tradelab.db")
        live = Session(trader(), BinanceVenue(venue, timeout=1.), self.ledger, self.folder / "sessions",
                       waits=WAITS | waits, patience=2., gaps=self.gaps, say=lambda line: None, **name)
        live.progress = self.progress
        self.live = live
        return live

    def progress(self, statistics):
        if statistics.candles == ARMED:
            for name, changes in self.faults: self.exchange.faults.arm(name, **changes)

    @property
    def kinds(self): return Counter(self.ledger.notices("outage")["kind"])

    @property
    def journal(self): return self.ledger.journal("outage")


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return Told(tmp_path_factory.mktemp("whole"))


SAID = {"withheld", "blocked", "revised", "late", "unknown", "given up", "rejected", "flagged",
        "ladder"} # why it differs


def check(told, whole):
    "What holds after every fault"
    assert told.exchange.faults.log, "the fault was not met"
    assert told.statistics.candles == CANDLES
    assert set(told.orders.values()) == {1}
    assert told.held == pytest.approx(told.live.trader.positions["quantity"][0], abs=1e-9)
    assert told.live.ledger.session("outage")["state"] == "stopped"
    assert told.statistics.orders > ARMED // 4
    phases = told.kinds
    assert phases["guarded"] == phases["trading"]                      # whatever began has ended
    assert first_difference(*replay(told.folder / "sessions" / "outage" / "recording.zst", trader())) is None
    same = first_difference(whole.journal, told.journal) is None
    assert same or set(phases) & SAID


SHORT = {"lasts_ms": 700}
OUTAGES = {
    "everything_away": {}, "reconnect_without_rest": {}, "gap_without_rest": {}, "silent_stream": SHORT,
    "lost_close": {}, "late_candle": {}, "stale_candle": {}, "partial_candle": {}, "duplicate_candle": {},
    "revised_close": {}, "close_1000": {}, "close_1001": {}, "close_1006": {}, "reset": {}, "day_is_over": {},
    "listen_key_expired": {}, "listen_key_death": {}, "clock_off": {}, "clock_jump": {"lasts_ms": 150},
    "symbol_suspended": {}, "html_with_200": {}, "account_is_empty_list": {}, "cut_json": {}, "lost_fill": {},
    "twice_delivered": {}, "order_rest_away": {}, "too_many_requests": SHORT,
}


@pytest.mark.parametrize("name", sorted(OUTAGES))
def test_an_outage_ends_no_session(name, tmp_path, whole):
    told = Told(tmp_path, [(name, OUTAGES[name])])
    print(name, told.kinds, told.statistics.orders, told.statistics.late)
    check(told, whole)


@pytest.mark.parametrize("parts", [(CANDLES,), (23, CANDLES - 23), (20, CANDLES - 20)],
                         ids=["whole", "behind", "before"])
def test_a_hole_that_the_exchange_proves_ends_no_session(tmp_path, parts):
    """It goes on behind it as with `gaps`, is guarded until the window is whole, and says until when; a session that is
    resumed there does so, too"""
    market = MARKET.drop(MARKET.index[60:63])                               # behind the session's twentieth candle
    (tmp_path / "carried").mkdir()
    carried = Told(tmp_path / "carried", market=market, gaps=True)
    told = Told(tmp_path, market=market, parts=parts)
    assert told.live.ledger.session("outage")["state"] == "stopped"
    assert first_difference(carried.journal, told.journal) is None
    assert carried.kinds == {"hole": 1, "kept": 1}
    hole = told.ledger.notices("outage").query("kind == 'hole'")["text"].iloc[0]
    assert "3 candles from 2024-01-03 12:00 UTC on are missing at the exchange: it goes on at 2024-01-03 15:00" in hole
    assert "with gaps = true in tradelab.toml it would not be guarded" in hole
    assert told.kinds["guarded"] == 1
    if parts != (23, CANDLES - 23): assert told.kinds["trading"] == 1
    assert (told.journal["order"][63 - 40:] != 0).any()                     # it trades again
    assert told.held == pytest.approx(told.live.trader.positions["quantity"][0], abs=1e-9)


def test_what_lasts_is_told_once_and_that_it_is_over(tmp_path):
    "The account is asked for at every candle and again while it is not told: that is one thing that lasts"
    told = Told(tmp_path, [("account_is_empty_list", {"times": 12})])
    asked = sum(not each.good for each in told.ledger.measured("outage", ExchangeHealth) if each.what == "question")
    assert asked > 5
    assert told.kinds["unanswered"] == told.kinds["over"] == 1
    assert told.ledger.notices("outage").query("kind == 'over'")["text"].item() == "localnet says account again"


STOPPED = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_outages import BinanceVenue, Ledger, SecretStr, Session, VenueSettings, in_turns

class Stopped(BinanceVenue):
    sent = 0
    async def place(self, order):
        Stopped.sent += 1
        if Stopped.sent == 5: os.kill(os.getpid(), signal.SIGSTOP)
        return await super().place(order)

venue = VenueSettings("localnet", "a test", {url!r}, {url!r}.replace("http", "ws"), SecretStr("localnet-key"),
                      SecretStr("localnet-secret"))
folder = Path({folder!r})
live = Session(in_turns(), Stopped(venue), Ledger(f"sqlite:///{{folder}}/tradelab.db"), folder / "sessions", id="stall",
               patience=2.)
asyncio.run(live.run())
"""
BEHIND, PERIOD = 40, 150 # candles, and ms of each


def _in_turns(parameters, memory, observation, prices, targets):
    memory[0] += 1.
    targets[:] = .3 if memory[0] % 4. < 2. else -.3


def in_turns():
    "Long for two candles, short for two"
    policy = Policy("in_turns", _in_turns, memory=1)
    return Trader(policy, Observation.from_policy(policy), OrderGate, Limits(), (replace(LISTED, symbol=BITCOIN),))


def stopped_at(ledger): return ledger.intents("stall")[-1].order.open_time


def test_a_session_that_stood_still_catches_up_without_waiting_at_each_candle(tmp_path):
    """Its process is stopped while an order is on its way, and the market goes on without it: the order is filled 40
    candles ahead of the step that sends it, and its fill is booked there. None of these steps waits for it"""
    market, ledger = ar1(3_000, seed=3), Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    with Localnet({BITCOIN: market}, {}, [replace(LISTED, symbol=BITCOIN)], CostModel(),
                  start=int(times(market)[40]), interval_ms=PERIOD) as exchange:
        program = STOPPED.format(tests=str(Path(__file__).parent), url=exchange.url, folder=str(tmp_path))
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            until(lambda: exchange.exchange.market.now >= stopped_at(ledger) + BEHIND * STEP)
            behind = exchange.exchange.market.now
            process.send_signal(signal.SIGCONT)
            until(lambda: ledger.snapshot("stall")["open_time"] >= behind, 30.)
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[0]
        finally: process.kill()
        assert process.returncode == 0, said
        orders = list(exchange.exchange.accounts["main"].orders.values())
    kinds, booked = Counter(ledger.notices("stall")["kind"]), [entry for _, entry in ledger.booked("stall")]
    print(kinds)
    ahead = [fill for fill in booked if fill.fill_time - int(fill.order_id.split("-")[2], 36) >= BEHIND * STEP]
    assert ahead
    assert kinds["unsettled"] == 0
    filled = Counter()
    for fill in booked: filled[fill.order_id] += abs(fill.quantity)
    assert set(Counter(order.client_id for order in orders).values()) == {1}
    assert {order.client_id: order.executed for order in orders if order.time <= behind}.items() <= filled.items()
    assert first_difference(*replay(tmp_path / "sessions" / "stall" / "recording.zst", in_turns())) is None
