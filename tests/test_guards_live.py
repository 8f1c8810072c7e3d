"What restricts a session between two candles: marks, spreads, slow and missing answers, and a restart in between"
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_core import HOUR
from test_live import BITCOIN, ETHER, LISTED, localnet, run, session, trader, venue

from tradelab.config import settings
from tradelab.database.records import BreakerEvent
from tradelab.errors import ConfigurationError
from tradelab.events import Candles, Fill, Quote, TradingState
from tradelab.features.observation import Observation
from tradelab.live.bookkeeper import Feed
from tradelab.live.core import Terms
from tradelab.live.ladder import ladder_settings
from tradelab.live.ledger import Ledger
from tradelab.live.messages import Answered, LadderMoved, Mark, Received, Send, Tell, Write
from tradelab.live.recorder import read
from tradelab.live.replay import first_other_action, retell
from tradelab.live.session import CoreInputs, Session, make_core
from tradelab.live.venue import Answer, Outcome
from tradelab.orders import Order
from tradelab.policies import buy_and_hold
from tradelab.risk.execution import OrderGate
from tradelab.settings import Limits
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader
from tradelab.venues.binance import BinanceVenue

ONE = 60_000 # ms


class Live:
    "A core that has seen one candle at 100 and holds a position, and what it did at each moment"

    def __init__(self, quantity=0., ladder="", terms=None, **limits):
        held = Trader(buy_and_hold(), Observation(()), OrderGate, Limits(**limits), (replace(LISTED, symbol=BITCOIN),))
        held.on(Candles(0, np.array([(100., 100., 100., 100., 5.)])))
        if quantity: held.on(Fill(BITCOIN, quantity, 100., 0., 1, "tl-1", "1"))
        inputs = CoreInputs(Terms("guards", "1h", **(terms or {})), ladder=ladder)
        self.core = make_core(held, inputs)
        self.core._process = self.idle()
        self.core.feed = Feed([BITCOIN], HOUR, 0)
        self.core.guards.asked(0)
        self.now, self.done = HOUR, []

    def idle(self):
        while True: yield None

    def hear(self, *events, after=1_000):
        "Tell it something a second later; returns what it did"
        self.now += after
        did = self.core.on(Received(self.now, events))
        self.done += did
        return did

    def marked(self, *prices, after=1_000):
        for price in prices: self.hear(Mark(BITCOIN, price, self.now + after), after=after)
        return self.moves

    @property
    def moves(self):
        return [(each.record.cause, each.record.what) for each in self.done if isinstance(each, Write)]

    def answered(self, took, outcome=Outcome.ACCEPTED, number=0):
        "An order of this session, answered after so long (ms)"
        order = Order(f"tl-{number}", BITCOIN, .1, True, HOUR, 100.)
        self.core.gauges.asked["Send", order.order_id] = self.now
        return self.hear(Answered(Send(order), Answer(outcome)), after=took)


def test_a_flash_crash_between_two_candles_halts_at_once():
    live = Live(100.)
    live.marked(100., 99.9, 84.)
    assert ("max_drawdown", "tripped") in live.moves
    assert live.core.trader.account["trading_state"][0] == TradingState.HALT
    assert live.core.emergency.startswith("drawdown 16.00% at the mark price")
    assert any(each.notice.kind == "halt" for each in live.done if isinstance(each, Tell))
    live.marked(100., 100., after=ONE)
    assert live.core.ladder.halts # that it came back changes nothing


def test_a_fall_in_a_short_time_is_a_pause_and_ends():
    live = Live(100.)
    assert live.marked(100., 98.9) == [("drawdown", "tripped")]
    assert live.core.ladder.required is TradingState.NO_ENTRY
    live.marked(98.9, after=16 * ONE)
    assert live.moves[1:] == [("drawdown", "gone"), ("drawdown", "restarted")]
    assert live.core.ladder.required is TradingState.NORMAL
    assert live.core.emergency == ""


def test_a_liquidation_price_that_comes_near_restricts_and_then_closes():
    live = Live(1_000., max_drawdown=.999)
    live.marked(100., 90.5)
    assert ("margin_ratio", "tripped") in live.moves
    assert live.core.emergency == ""
    live.marked(90.4)
    assert live.core.emergency == "equity is 1.11 times the maintenance margin, the exchange liquidates at 1"


def test_money_beside_the_strategy_keeps_the_liquidation_away():
    live = Live(1_000., max_drawdown=.999)
    live.core.reserve = 50_000.
    live.marked(100., 90.4)
    assert ("margin_ratio", "tripped") not in live.moves
    assert live.core.emergency == ""


def test_a_mark_price_that_leaves_the_book_restricts_its_symbol_and_halts_nothing():
    live = Live(100.)
    live.hear(Quote(BITCOIN, 99.99, 100.01, 1., 1., live.now))
    live.marked(100., 84.)
    assert [move for move in live.moves if move[0] != "volatility"] == [("mark_price", "tripped")]
    assert live.core.ladder.state(BITCOIN) is TradingState.REDUCE_ONLY
    assert live.core.ladder.required is TradingState.NORMAL
    live.marked(100.)
    live.marked(100., after=5 * ONE)
    assert [move for move in live.moves if move[0] == "mark_price"][1:] == [("mark_price", "gone"),
                                                                            ("mark_price", "restarted")]


def test_what_no_market_can_have_is_not_looked_at():
    live = Live(100.)
    live.marked(100., 0., -5., float("nan"), float("inf"))
    live.hear(Mark(BITCOIN, 50., 1)) # older than the newest
    assert live.moves == []


@pytest.mark.parametrize("kind", ["latency", "spread", "volatility", "error_rate"])
def test_a_breaker_opens_after_violations_in_a_row_and_closes_after_its_cool_down(kind):
    live = Live()
    bad = {"latency": lambda n: live.answered(800, number=n),
           "spread": lambda n: live.hear(Quote(BITCOIN, 99., 101., 1., 1., live.now)),
           "volatility": lambda n: live.marked(100. + 8 * (n % 2)),
           "error_rate": lambda n: live.answered(10, Outcome.UNKNOWN, number=n)}[kind]
    narrow = Quote(BITCOIN, 99.99, 100.01, 1., 1., live.now)
    good = {"latency": lambda: live.answered(20), "spread": lambda: live.hear(narrow),
            "volatility": lambda: live.marked(100.), "error_rate": lambda: live.answered(20)}[kind]
    least = {"latency": 3, "spread": 3, "volatility": 4, "error_rate": 12}[kind]
    for n in range(least):
        assert live.moves == []
        bad(n)
    symbol = "" if kind == "error_rate" else BITCOIN
    assert live.moves == [(kind, "tripped")]
    assert (kind, symbol) in live.core.ladder.active
    good()
    assert live.moves == [(kind, "tripped")] # it is hot still
    live.hear(after=ONE)
    good()
    assert live.moves == [(kind, "tripped"), (kind, "gone"), (kind, "restarted")]
    assert live.core.ladder.state(BITCOIN) is TradingState.NORMAL


def test_entries_of_a_restricted_symbol_are_withheld_and_what_reduces_passes():
    live = Live(1.)
    for _ in range(3): live.hear(Quote(BITCOIN, 99., 101., 1., 1., live.now))
    order = Order("tl-2", BITCOIN, .5, False, HOUR, 100.)
    gate = live.core.manager.gate
    assert gate(order).name == "NOW"                               # NO_ENTRY: what is held may grow
    assert gate(replace(order, quantity=-.5)).name == "WAITS"
    assert gate(replace(order, quantity=-.5, reduce_only=True)).name == "NOW"


def test_a_restart_in_between_goes_on_with_breaker_and_cool_down():
    before = Live()
    for n in range(3): before.answered(800, number=n)
    kept = [each.record.ladder for each in before.done if isinstance(each, Write)][-1]
    after = Live(ladder=kept)
    after.now = before.now
    after.answered(20)
    assert ("latency", BITCOIN) in after.core.ladder.active
    after.hear(after=ONE)
    after.answered(20)
    assert ("latency", BITCOIN) not in after.core.ladder.active


def test_a_halt_outlives_a_restart_and_a_person_with_a_reason_ends_it():
    before = Live(100.)
    before.marked(100., 84.)
    kept = [each.record.ladder for each in before.done if isinstance(each, Write)][-1]
    after = Live(ladder=kept)
    assert after.core.ladder.halts
    assert after.core.trader.account["trading_state"][0] == TradingState.HALT
    assert after.core.guards.phase == "halted"


def test_one_venue_and_one_symbol_may_have_thresholds_of_their_own():
    terms = {"venue": "testnet"} | ladder_settings({"spread": {"testnet": {"threshold": 300.}}})
    live = Live(terms=terms)
    for _ in range(3): live.hear(Quote(BITCOIN, 99., 101., 1., 1., live.now))
    assert live.moves == []


def test_a_breaker_without_a_threshold_is_refused_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "tradelab.toml").write_text("[breakers.latency]\nthreshold = 0\n[breakers.clock]\ncool_down = 5\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as refused: ladder_settings(settings().breakers)
    assert str(refused.value) == ("[breakers]: breaker latency needs a threshold above 0, was 0.0: without one it "
                                  "would never open: change it in tradelab.toml")
    (tmp_path / "tradelab.toml").write_text("[breakers.latency]\nthreshhold = 5\n")
    with pytest.raises(ConfigurationError, match="breakers.latency.threshhold in tradelab.toml is not a setting"):
        settings()


# --- over sockets, on localnet

WAITS = dict(quiet=100, pause=20, first_delay=20)


def causes(live):
    return [event.name.split()[0] for event in live.ledger.measured(live.id, BreakerEvent)
            if event.name != "phase" and event.state == "tripped"]


@pytest.mark.integration
def test_an_ordinary_session_trips_nothing_and_its_marks_are_heard(tmp_path):
    with localnet() as exchange:
        live = session(exchange, tmp_path, say=lambda line: None)
        run(live, 40)
    assert causes(live) == []
    folder = tmp_path / "sessions" / "momentum_test" / "recording.zst"
    heard = [event["type"] for line in read(folder) if line["kind"] == "received" for event in line["events"]]
    assert heard.count("Mark") >= 40
    assert heard.count("Quote") >= 40
    assert first_other_action(folder, trader()) == ""


EAGER = Momentum(lookback=1, threshold=1e-6) # it turns with every candle that does
QUIET = Terms("x", "1h").breakers


def breakers(kind, threshold, **values):
    "The usual ones; this one after two violations, for four candles, of this venue"
    own = next(replace(each, threshold=threshold, consecutive=2, cool_down=4 * HOUR, venue="localnet", **values)
               for each in QUIET if each.kind == kind)
    calm = [replace(each, threshold=.9) for each in QUIET if each.kind == "drawdown"]
    return *[each for each in QUIET if each.kind != "drawdown"], *calm, own


def opened(live):
    "By symbol: entries that were sent while a cause was there, and otherwise; from the session's own recording"
    causes, held, sent = set(), Counter(), {True: Counter(), False: Counter()}
    for _, _, actions in retell(live.folder / "recording.zst", live.trader):
        for each in actions:
            if isinstance(each, Write) and isinstance(each.record, LadderMoved):
                move = each.record
                (causes.discard if move.what == "restarted" else causes.add)((move.cause, move.symbol))
            if isinstance(each, Send):
                order = each.order
                if not order.reduce_only and held[order.symbol] * order.quantity <= 0:
                    sent[bool(causes)][order.symbol] += 1
                held[order.symbol] += order.quantity
    return sent[True], sent[False]


BAD = { # what goes wrong, and where it restricts: thresholds of this venue, those of all others do nothing here
    "latency": ({"at": "request", "do": "delay", "method": "POST", "path": "v1/order", "symbol": "BTCUSDT",
                 "commit": True, "delay_ms": 400, "times": 2}, breakers("latency", 300.), BITCOIN),
    "spread": ({"at": "market", "do": "revise", "stream": "btcusdt@bookTicker", "field": "a", "by": .01, "times": 2},
               breakers("spread", 30.), BITCOIN),
    "volatility": ({"at": "market", "do": "revise", "stream": "btcusdt@markPrice@1s", "field": "p", "by": .12},
                   breakers("volatility", .1, window=2 * HOUR), BITCOIN),
    "error_rate": ({"at": "request", "do": "reply", "method": "GET", "path": "v3/account", "commit": False,
                    "status": 503, "text": "<html>503</html>", "times": 6},
                   breakers("error_rate", .15, window=8 * HOUR), ""),
}


@pytest.mark.integration
@pytest.mark.parametrize("kind", BAD)
def test_a_breaker_of_a_session_opens_withholds_entries_and_closes(tmp_path, kind):
    fault, measured, symbol = BAD[kind]
    with localnet((BITCOIN, ETHER)) as exchange:
        exchange.faults.arm([fault | {"after": 6}])
        traded = Trader(EAGER, Observation.from_policy(EAGER), OrderGate, Limits(max_drawdown=.9),
                        tuple(replace(LISTED, symbol=each) for each in (BITCOIN, ETHER)))
        live = Session(traded, BinanceVenue(venue(exchange)), Ledger(f"sqlite:///{tmp_path}/tradelab.db"),
                       tmp_path, id="eager", say=lambda line: None, waits=WAITS | {"breakers": measured})
        run(live, 30)
    moves = [(event.name, event.state) for event in live.ledger.measured(live.id, BreakerEvent)
             if event.name != "phase"]
    assert moves == [(f"{kind} {symbol}".strip(), what) for what in ("tripped", "gone", "restarted")]
    restricted, free = opened(live)
    assert restricted[BITCOIN] == 0
    assert (restricted[ETHER] > 0) == (symbol != "")
    assert min(free[BITCOIN], free[ETHER]) > 3
