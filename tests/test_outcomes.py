"""Orders over a real localnet that does wrong: whatever an answer says, no decision reaches the exchange twice, no
symbol is blocked for ever, and the books are what the exchange holds"""
import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from pydantic import SecretStr

from tradelab.config import VenueSettings
from tradelab.evaluation.difference import first_difference
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN as LISTED
from tradelab.live.ledger import Ledger
from tradelab.live.order_states import State
from tradelab.live.session import Session
from tradelab.live.venue import Outcome
from tradelab.localnet.server import Localnet
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1
from tradelab.orders import Order
from tradelab.risk.execution import OrderGate
from tradelab.settings import CostModel, Limits
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration

BITCOIN, ETHER, CANDLES = "BTC/USDT:USDT", "ETH/USDT:USDT", 40
WAITS = {"absent_after": 500, "first_delay": 50}  # ms


def localnet(symbols=(BITCOIN,), candles=140):
    market = {symbol: ar1(candles, seed=3 + n) for n, symbol in enumerate(symbols)}
    return Localnet(market, None, [replace(LISTED, symbol=symbol) for symbol in symbols], CostModel(),
                    start=int(times(market[BITCOIN])[40]))


def venue(exchange, timeout=10.):
    return BinanceVenue(VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"),
                                      SecretStr("localnet-key"), SecretStr("localnet-secret")), timeout=timeout)


def session(exchange, folder, symbols=(BITCOIN,), timeout=10., patience=2., **waits):
    policy = Momentum(lookback=5, threshold=.005)
    trader = Trader(policy, Observation.from_policy(policy), OrderGate, Limits(),
                    tuple(replace(LISTED, symbol=symbol) for symbol in symbols))
    return Session(trader, venue(exchange, timeout), Ledger(f"sqlite:///{folder}/tradelab.db"), folder / "sessions",
                   id="session", patience=patience, waits=WAITS | waits)


def run(live, candles=CANDLES):
    asyncio.run(live.run(candles))
    return live.ledger.journal("session")


def names(exchange): return Counter(order.client_id for order in exchange.exchange.accounts["main"].orders.values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with localnet() as exchange:
        journal = run(session(exchange, tmp_path_factory.mktemp("whole")))
        return journal, names(exchange)


def proven(exchange, live, journal):
    "What holds after any fault: the notices by kind"
    accepted = Counter(name[:-1] for name in names(exchange))
    assert set(accepted.values()) == {1}                          # of each decision one order, under whatever name
    last = journal.iloc[-1]
    assert exchange.exchange.accounts["main"].held(0) == pytest.approx(last["position"] + last["fill_quantity"])
    assert live.statistics.disagreements == 0
    assert not [intent for intent in live.ledger.intents("session") if intent.state in (State.SENT, State.UNKNOWN)]
    return Counter(live.ledger.notices("session")["kind"])


def through(scenario, folder, timeout=10., waits=(), **changes):
    "A session through a fault at its fourth order: exchange, journal and the notices"
    with localnet() as exchange:
        exchange.faults.arm(scenario, after=3, **changes)
        live = session(exchange, folder, timeout=timeout, **dict(waits))
        journal = run(live)
        assert exchange.faults.log, "the fault was not met"
        return exchange, journal, proven(exchange, live, journal), live


def some_candles_after(live, kind):
    "Ends a session when it has traded on for a while behind a notice"
    first = {}
    def look(statistics):
        told = kind in set(live.ledger.notices("session")["kind"])
        if told and statistics.candles >= first.setdefault("at", statistics.candles) + 20: live.stop()
    return look


@pytest.mark.parametrize("scenario, changes", [
    ("commit_then_timeout", {}), ("unknown_code_5xx", {}), ("bus_1006", {}), ("unavailable_with_commit", {}),
    ("timeout_after_fill", {}), ("read_lag", {}), ("late_reply", {"delay_ms": 1_500})])
def test_an_order_that_arrived_is_found(whole, tmp_path, scenario, changes):
    timeout = 1. if scenario == "late_reply" else 10.
    exchange, journal, notices, _ = through(scenario, tmp_path, timeout, waits={"patience": 5.}, **changes)
    assert first_difference(whole[0], journal) is None
    assert names(exchange) == whole[1]
    assert notices["unknown"] or scenario == "read_lag"


@pytest.mark.parametrize("scenario", ["timeout_before_accept", "unavailable_without_commit", "tcp_drop"])
def test_an_order_that_never_arrived_is_absent_and_never_sent_again(whole, tmp_path, scenario):
    with localnet(candles=900) as exchange:
        exchange.faults.arm(scenario, after=3)
        live = session(exchange, tmp_path)
        live.progress = some_candles_after(live, "absent")
        journal = run(live, None)
        notices = proven(exchange, live, journal)
    lost, = [intent.order.order_id for intent in live.ledger.intents("session") if intent.state is State.ABSENT]
    assert lost not in names(exchange)
    assert notices["unknown"] == notices["absent"] == 1
    assert (journal["order"].iloc[-15:] != 0).any()               # it trades again
    assert sum(names(exchange).values()) > 5


def test_an_order_that_is_matched_seconds_late_is_sent_once(whole, tmp_path):
    "It was sent twice: the exchange did not know it when recvWindow was over"
    exchange, journal, notices, _ = through("matched_late", tmp_path, later_ms=700, waits={"patience": 5.})
    assert names(exchange) == whole[1]
    assert notices["absent"] == 0
    assert first_difference(whole[0], journal) is None


def test_an_order_that_is_matched_after_it_was_called_absent_is_still_ours(tmp_path):
    "Late evidence overrules: it is booked, the symbol is frozen until the exchange has been asked, and trades on"
    with localnet(candles=900) as exchange:
        exchange.faults.arm("matched_late", after=2, later_ms=9_000) # an entry: a late close is refused
        live = session(exchange, tmp_path, absent_after=50)
        live.progress = some_candles_after(live, "contradiction")
        journal = run(live, None)
        notices = proven(exchange, live, journal)
    assert notices["absent"] == 1
    assert notices["contradiction"] == 1
    refused = [intent for intent in live.ledger.intents("session") if intent.state is State.REJECTED]
    assert all(intent.order.reduce_only for intent in refused) # the late order has changed what it was to close
    assert {intent.state for intent in live.ledger.intents("session")} <= {State.FILLED, State.INTENT, State.REJECTED}
    assert (journal["order"].iloc[-15:] != 0).any()


def test_a_server_that_is_overloaded_is_asked_again_later(whole, tmp_path):
    exchange, journal, notices, live = through("overloaded", tmp_path)
    assert notices["rejected"] == 2                               # -1008 twice, proven refusals that pass
    assert notices["unknown"] == 0
    assert [name[-1] for name in names(exchange)].count("2") == 1 # under the name of its third attempt
    assert first_difference(whole[0], journal) is None


@pytest.mark.parametrize("scenario", ["too_many_requests", "ban"])
def test_nothing_is_asked_before_the_exchange_wants_it(tmp_path, scenario):
    async def asked(exchange):
        broker = venue(exchange)
        await broker.connect([BITCOIN])
        seconds = 2
        exchange.faults.arm(scenario, lasts_ms=1_000 * seconds)
        entry = Order("tl-entry", BITCOIN, .1, False, 0, 20_000.)
        first = await broker.place(entry)
        met = len(exchange.faults.log)
        held = [await broker.place(replace(entry, order_id=f"tl-{n}")) for n in range(5)]
        closing = await broker.place(Order("tl-close", BITCOIN, -.1, True, 0, 20_000.))
        after = len(exchange.faults.log)
        question = await broker.query(entry)
        await broker.close()
        return first, held, closing, after - met, question
    with localnet() as exchange: first, held, closing, went_out, question = asyncio.run(asked(exchange))
    assert first.outcome is Outcome.LATER
    assert first.retry >= 1
    assert all(each.outcome is Outcome.LATER for each in held)
    assert all(0 < each.retry <= first.retry for each in held)
    assert question.outcome is Outcome.UNKNOWN                    # it was held back, too: nothing is known
    assert went_out == (scenario == "too_many_requests")          # what reduces; of a ban nothing
    assert closing.outcome is Outcome.LATER
    assert not names(exchange)


def test_a_refusal_for_the_clock_sets_the_clock(tmp_path):
    "Of any request: a question does it"
    async def asked(exchange):
        broker = venue(exchange)
        await broker.connect([BITCOIN])
        exchange.faults.arm([{"at": "clock", "do": "skew", "ms": 15_000}])
        order = Order("tl-1", BITCOIN, .1, False, 0, 20_000.)
        answers = [await broker.query(order), await broker.query(order), await broker.place(order)]
        await broker.close()
        return answers
    with localnet() as exchange: refused, known, placed = asyncio.run(asked(exchange))
    assert refused.outcome is Outcome.UNKNOWN
    assert "-1021" in refused.text
    assert known.outcome is Outcome.NOT_FOUND
    assert placed.report.state is State.FILLED


def test_a_slow_answer_about_one_symbol_holds_up_no_other(tmp_path):
    "Bitcoin's answers take a second; between candle and order of Ether nobody waits for them"
    class Slow(BinanceVenue):
        began = {}
        async def place(self, order):
            Slow.began.setdefault((order.open_time, order.symbol), asyncio.get_running_loop().time())
            if order.symbol == BITCOIN: await asyncio.sleep(.5)
            return await super().place(order)

    with localnet((BITCOIN, ETHER)) as exchange:
        live = session(exchange, tmp_path, (BITCOIN, ETHER), patience=5.)
        live.venue.__class__ = Slow
        journal = run(live, 20)
        held = [exchange.exchange.accounts["main"].held(n) for n in (0, 1)]
    together = [(Slow.began[time, ETHER] - began) for (time, symbol), began in Slow.began.items()
                if symbol == BITCOIN and (time, ETHER) in Slow.began]
    assert together, "no candle traded both"
    assert max(map(abs, together)) < .25
    last = journal[journal.index == journal.index[-1]]
    assert held == pytest.approx((last["position"] + last["fill_quantity"]).tolist())
