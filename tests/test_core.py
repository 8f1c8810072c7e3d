"""The live core against an exchange in memory: killed between any two actions, it neither repeats nor loses an order.
`tests/simulated.py` plays whole sessions on localnet's exchange and kills at their doors; here the core is alone, what
goes wrong hangs on an order's name, and a restart is compared with the run that was not killed, row by row"""
import sys
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.account import wallet
from tradelab.database.records import Income
from tradelab.evaluation.difference import first_difference
from tradelab.events import Candles, Fill, Funding, Quote
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.live.bookkeeper import Bookkeeper
from tradelab.live.core import Terms
from tradelab.live.ledger import MemoryLedger
from tradelab.live.messages import (
    Answered,
    Ask,
    End,
    Fetch,
    Fetched,
    LadderMoved,
    Open,
    Opened,
    Received,
    Send,
    StepDone,
    Stop,
    Tell,
    Unanswered,
    Wake,
    Woken,
    Write,
)
from tradelab.live.order_states import State
from tradelab.live.recorder import MemoryRecorder, encode
from tradelab.live.replay import replay
from tradelab.live.session import Kept, core_inputs, make_core, restore, write
from tradelab.live.venue import AccountSnapshot, Answer, Candle, OrderReport, Outcome, VenueError, units
from tradelab.market.candles import matrix
from tradelab.market.synthetic import ar1
from tradelab.risk.breakers import DEFAULTS
from tradelab.risk.execution import OrderGate
from tradelab.settings import Limits
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader

HOUR, HISTORY, STEPS = 3_600_000, 12, 10
SYMBOLS = ("BTC/USDT:USDT", "ETH/USDT:USDT")
TIMES, CANDLES, _ = matrix({symbol: ar1(HISTORY + STEPS + 1, volatility=.01, seed=3 + n)
                            for n, symbol in enumerate(SYMBOLS)})
FAULTS = ("none", "none", "answer lost", "never arrived", "later", "rejected", "fill lost", "fill twice", "fill first",
          "silent")

# half of the orders go wrong here: which requests a killed session has counted is not what is compared
TERMS = Terms("s", "1h", breakers=tuple(replace(each, threshold=1.) if each.kind == "error_rate" else each
                                        for each in DEFAULTS))


def trader():
    policy = Momentum(lookback=2, threshold=.001)
    instruments = tuple(replace(BITCOIN, symbol=symbol) for symbol in SYMBOLS)
    return Trader(policy, Observation.from_policy(policy), OrderGate, Limits(), instruments)


class Exchange:
    "Orders, fills and an account in memory; what goes wrong with an order hangs on its name and the seed alone"

    def __init__(self, seed):
        self.seed = seed
        self.sent = {}               # what was sent under which name
        self.reports = {}
        self.fills = []
        self.queries = {}

    def fault(self, order):
        "Of the first attempt at an order; a refusal for good is one for every attempt"
        name = f"{self.seed} {order.symbol} {order.open_time}"
        fault = FAULTS[crc32(name.encode()) % len(FAULTS)]
        return fault if fault == "rejected" or order.order_id.endswith("-0") else "none"

    def place(self, order, now):
        "Answer and events of the sockets"
        assert order.order_id not in self.sent, f"{order.order_id} was sent twice"
        self.sent[order.order_id] = order
        fault = self.fault(order)
        if fault == "rejected": return Answer(Outcome.REJECTED, text="refused"), []
        if fault == "later": return Answer(Outcome.LATER, retry=.2, text="too many requests"), []
        if fault == "never arrived": return Answer(Outcome.UNKNOWN, text="no answer"), []
        row, column = int(np.searchsorted(TIMES, order.open_time)), SYMBOLS.index(order.symbol)
        fill = Fill(order.symbol, order.quantity, float(CANDLES[row, column, 3]), .01, now, order.order_id,
                    str(len(self.fills)))
        report = OrderReport(order.order_id, State.FILLED, abs(order.quantity), f"77{len(self.fills)}")
        self.fills.append((replace(fill, order_id=report.exchange_id), fill))
        self.reports[order.order_id] = report
        unproven = fault in ("answer lost", "silent")
        answer = Answer(Outcome.UNKNOWN, text="no answer") if unproven else Answer(Outcome.ACCEPTED, report)
        told = {"fill lost": [], "fill twice": [fill, report, fill], "silent": []}.get(fault, [fill, report])
        return answer, told

    def query(self, order):
        asked = self.queries[order.order_id] = self.queries.get(order.order_id, 0) + 1
        if self.fault(order) == "silent" and asked < 3: return Answer(Outcome.UNKNOWN, text="no answer")
        if report := self.reports.get(order.order_id): return Answer(Outcome.ACCEPTED, report)
        return Answer(Outcome.NOT_FOUND)

    def fetch(self, what, arguments, now):
        match what:
            case "account":
                held = {symbol: sum(fill.quantity for _, fill in self.fills if fill.symbol == symbol)
                        for symbol in SYMBOLS}
                return AccountSnapshot(self.wallet(len(self.fills)),
                                       {symbol: quantity for symbol, quantity in held.items() if abs(quantity) > 1e-9})
            case "fills":
                symbol, first = arguments
                ours = [theirs for theirs, fill in self.fills if fill.symbol == symbol]
                return ours[-1:] if first is None else [fill for fill in ours if int(fill.trade_id) >= first]
            case "name_of":
                return next(fill.order_id for theirs, fill in self.fills if theirs.order_id == arguments[1])
            case "forming": return int(TIMES[TIMES <= now][-1])
            case "incomes":
                rows, wallets = [], [10_000.]
                for count, (_, fill) in enumerate(self.fills, 1):
                    wallets.append(self.wallet(count))
                    rows.append(Income("REALIZED_PNL", fill.trade_id, fill.symbol, units(wallets[-1]) - units(
                        wallets[-2]), "USDT", fill.fill_time, fill.trade_id))
                return [row for row in rows if row.time >= (arguments[0] or 0)]
            case "open_orders": return []
            case "history":
                symbol, _, limit, since = arguments
                closed = (TIMES + HOUR <= now) & (TIMES >= (since or 0))
                rows = np.flatnonzero(closed)[-min(limit, 1_000):]
                return TIMES[rows], np.c_[CANDLES[rows, SYMBOLS.index(symbol)], np.zeros((len(rows), 3))]

    def wallet(self, count):
        "After so many fills"
        paid = sum(fill.quantity * fill.price + fill.fee for _, fill in self.fills[:count])
        return 10_000. - paid + sum(self.cost(symbol, count) for symbol in SYMBOLS)

    def cost(self, symbol, count):
        "What the position cost: the wallet holds realised profit only"
        quantity = value = 0.
        for _, fill in self.fills[:count]:
            if fill.symbol != symbol: continue
            if quantity * fill.quantity >= 0: value += fill.quantity * fill.price
            elif abs(fill.quantity) <= abs(quantity): value *= 1 + fill.quantity / quantity
            else: value = (quantity + fill.quantity) * fill.price
            quantity += fill.quantity
        return value


class KilledError(Exception): pass


class Driver:
    "Carries out the actions of a core in virtual time; dies before the actions of these numbers"

    def __init__(self, exchange, ledger, kills=()):
        self.exchange = exchange
        self.ledger = ledger
        self.kills = set(kills)
        self.now = int(TIMES[HISTORY])
        self.done = 0                # actions
        self.notices = []
        self.steps = 0
        self.sends = []              # which of the actions were those
        self.ladder = ""             # which causes restrict the strategy, as its standing keeps them
        self.number = count()
        self.recorder = MemoryRecorder()

    def start(self):
        "A new process: only ledger and exchange are left of the one before"
        kept = self.ledger.snapshot("s")
        again = trader()
        if kept: restore(again, "s", {}, kept)
        inputs = core_inputs(self.ledger, TERMS, kept and Kept({"reserve": 0.}, kept), ladder=self.ladder)
        self.core = make_core(again, inputs)
        self.recorder.start({}, encode(inputs))
        self.waiting = []
        for time, candles in zip(TIMES, CANDLES):
            if time + HOUR > self.now and time + HOUR <= TIMES[-1]:
                for symbol, values in zip(SYMBOLS, candles): self.tell(int(time) + HOUR + 20, Candle(symbol, int(time),
                    tuple(float(value) for value in (*values, 0., 0., 0.))))
        self.tell(int(TIMES[-1]) + HOUR, Stop())

    def tell(self, time, event): heappush(self.waiting, (time, next(self.number), event))

    def run(self):
        self.start()
        received = Received(self.now)
        while True:
            try:
                self.recorder.received(received)
                actions = self.core.on(received)
                self.recorder.answered(actions)
                for action in actions:
                    self.done += 1
                    if self.done in self.kills: raise KilledError
                    if isinstance(action, End): return action
                    self.do(action)
            except KilledError:
                self.start()
                received = Received(self.now)
                continue
            time, _, event = heappop(self.waiting)
            self.now = max(self.now, time)
            events = [event]
            while self.waiting and self.waiting[0][0] <= self.now: events.append(heappop(self.waiting)[2])
            received = Received(self.now, events)

    def do(self, action):
        match action:
            case Write(record):
                write(self.ledger, "s", record)
                if isinstance(record, LadderMoved): self.ladder = record.ladder
            case Send(order):
                self.sends.append(self.done)
                written = {intent.order.order_id: intent for intent in self.ledger.intents("s")}
                assert written[order.order_id].state is State.SENT
                assert written[order.order_id].order == order
                first = self.exchange.fault(order) == "fill first"
                answer, told = self.exchange.place(order, self.now)
                for event in told: self.tell(self.now + 5, event)
                self.tell(self.now + (9 if first else 3), Answered(action, answer))
            case Ask(order):
                self.tell(self.now + 4, Answered(action, self.exchange.query(order)))
            case Fetch(number, what, arguments):
                content = self.exchange.fetch(what, arguments, self.now)
                self.tell(self.now + 4, Fetched(number, content))
            case Open():
                for stream in ("market", "user"): self.tell(self.now + 2, Opened(stream))
            case Wake(at): self.tell(at, Woken())
            case Tell(notice): self.notices.append(notice.kind)
            case StepDone(): self.steps += 1


def session(seed, kills=()):
    ledger, exchange = MemoryLedger(), Exchange(seed)
    driver = Driver(exchange, ledger, kills)
    end = driver.run()
    assert end == End("stopped"), end
    assert first_difference(*replay(driver.recorder.lines, trader())) is None
    journal = ledger.journal("s")[["symbol", "position", "target", "order", "fill_quantity"]]
    driver.lost = {intent.order.order_id for intent in ledger.intents("s") if intent.state is State.ABSENT}
    ledger.close()
    return driver, journal


WHOLE = {}


def whole(seed):
    if seed not in WHOLE: WHOLE[seed] = session(seed)
    return WHOLE[seed]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_killed_between_any_two_actions_it_ends_where_it_would_have_ended(data):
    seed = data.draw(st.integers(0, 9))
    driver, journal = whole(seed)
    kills = data.draw(st.lists(st.integers(1, driver.done), min_size=1, max_size=4))
    again, rows = session(seed, kills)
    assert len(journal) == len(SYMBOLS) * STEPS
    held = [{symbol: sum(fill.quantity for _, fill in each.exchange.fills if fill.symbol == symbol)
             for symbol in SYMBOLS} for each in (driver, again)]
    last = rows[rows.index == rows.index[-1]].set_index("symbol")["position"] + rows[
        rows.index == rows.index[-1]].set_index("symbol")["fill_quantity"]
    assert held[1] == pytest.approx(last.to_dict())              # the ledger is what the exchange holds
    if again.lost == driver.lost:
        assert rows.equals(journal)
        assert held[0] == pytest.approx(held[1])
    else:                                                        # never arrived: killed before the request left,
        assert not again.lost & set(again.exchange.reports)      # nor refused, and the answer heard by nobody
        assert "absent" in again.notices
    assert "disagreement" not in again.notices
    assert "contradiction" not in again.notices


def test_a_decision_that_is_made_once_more_knows_its_own_orders():
    "Killed behind a request, before the step was kept: its fills are told before the decision that had wanted them"
    driver, journal = whole(1)
    for number in driver.sends[:8]:
        again, rows = session(1, [number + 4])
        if again.lost == driver.lost: assert rows.equals(journal)
        assert "late" not in again.notices


def test_every_kind_of_fault_is_met():
    met = {driver.exchange.fault(order) for driver, _ in map(whole, range(10))
           for order in driver.exchange.sent.values()}
    assert met == set(FAULTS)
    assert sum(len(driver.exchange.fills) for driver, _ in map(whole, range(10))) > 50


def test_an_outage_ends_nothing(monkeypatch):
    "The exchange answers no question for a day and tells nothing, then it is back"
    driver, expected = whole(0)
    fetch = Exchange.fetch
    again = Driver(Exchange(0), MemoryLedger())
    dark = int(TIMES[HISTORY + 3]) + HOUR
    do = again.do

    def in_the_dark(action):
        if isinstance(action, Fetch) and dark <= again.now < dark + 600_000:
            return again.tell(again.now + 4, Unanswered(action.number, VenueError("nobody there")))
        return do(action)
    again.do = in_the_dark
    assert again.run() == End("stopped")
    assert "unanswered" in again.notices
    assert fetch is Exchange.fetch
    assert again.ledger.journal("s")["position"].iloc[-1] == expected["position"].iloc[-1]


class Stalled(Driver):
    "Its process stands still for hours, and its exchange does not; then what has come meanwhile is read bit by bit"
    SINCE, UNTIL = int(TIMES[HISTORY + 1]) + HOUR, int(TIMES[HISTORY + 6]) + HOUR + HOUR // 2

    def __init__(self, *given):
        super().__init__(*given)
        self.stepped = {}

    def tell(self, time, event):
        stalled = self.SINCE <= time < self.UNTIL
        super().tell(self.UNTIL + (time - self.SINCE) // HOUR if stalled else time, event)

    def do(self, action):
        super().do(action)
        if isinstance(action, StepDone): self.stepped[action.open_time] = self.now


def behind_a_stall(monkeypatch):
    "What is left of a session that has stood still, its fills, and its positions before each"
    monkeypatch.setattr(sys.modules[__name__], "FAULTS", ("none",))
    monkeypatch.setattr(sys.modules[__name__], "TERMS", replace(TERMS, decision_deadline=STEPS * HOUR))
    driver = Stalled(Exchange(0), MemoryLedger())
    assert driver.run() == End("stopped")
    assert driver.steps == STEPS
    return driver, [fill for _, fill in driver.exchange.fills]


def test_behind_a_stall_no_step_waits_for_a_fill_of_a_later_candle(monkeypatch):
    """What is sent at the first of the candles that are read is filled hours ahead of it, and booked there. Each step
    between would have waited for it, with all its patience"""
    driver, fills = behind_a_stall(monkeypatch)
    wanted = {fill.order_id: int(fill.order_id.split("-")[2], 36) for fill in fills}
    assert any(wanted[fill.order_id] + 2 * HOUR <= driver.UNTIL <= fill.fill_time for fill in fills)
    assert "unsettled" not in driver.notices
    missed = [time for open_time, time in driver.stepped.items() if driver.SINCE <= open_time + HOUR < driver.UNTIL]
    assert len(missed) == 6
    assert max(missed) < driver.UNTIL + TERMS.quiet
    assert sorted(entry.order_id for _, entry in driver.ledger.booked("s")) == sorted(wanted)


def test_behind_a_stall_nothing_is_wanted_twice(monkeypatch):
    "A decision that does not know of a fill yet would close what is closed already, and open what is open"
    driver, fills = behind_a_stall(monkeypatch)
    held = dict.fromkeys(SYMBOLS, 0.)
    for fill in fills:
        order, before = driver.exchange.sent[fill.order_id], held[fill.symbol]
        assert not order.reduce_only or abs(before + fill.quantity) < abs(before)
        held[fill.symbol] = before + fill.quantity
        assert abs(held[fill.symbol]) < .03                      # the limits allow no more
    rows = driver.ledger.journal("s")
    last = rows[rows.index == rows.index[-1]].set_index("symbol")
    assert held == pytest.approx((last["position"] + last["fill_quantity"]).to_dict())


AMOUNTS = st.integers(-9, 9).filter(bool)
TOLD = st.lists(st.tuples(st.integers(0, 4), AMOUNTS, st.sampled_from(SYMBOLS)), min_size=1, max_size=8)


def booked_in(batches):
    "Account, positions and journal of a step of which so much is told, and booked, at a time"
    one = trader()
    one.open_time = 0
    books = Bookkeeper(one, HOUR)
    for batch in batches:
        for entry in batch: books.add(entry)
        while books.book_next(): pass
    return one


@settings(max_examples=60, deadline=None)
@given(TOLD, st.randoms(), st.integers(0, 8))
def test_the_order_of_arrival_within_a_step_changes_nothing(told, random, cut):
    """What arrives together is booked by the venue's time, to the last bit; what arrives in parts ends with the same
    positions and money, and only `late` would say when it came"""
    entries = [Fill(symbol, amount / 8, 100. + number, .01, HOUR + time, "", str(number))
               for number, (time, amount, symbol) in enumerate(told)]
    entries += [Funding(symbol, amount / 7, HOUR + time) for time, amount, symbol in
                {(time, symbol): (time, amount, symbol) for time, amount, symbol in told}.values()]
    mixed = random.sample(entries, len(entries))
    one, same, parts = booked_in([entries]), booked_in([mixed]), booked_in([mixed[:cut], mixed[cut:]])
    for name in ("account", "positions", "rows"): assert getattr(one, name).tobytes() == getattr(same, name).tobytes()
    assert not one.rows["late"].any()
    assert not parts.rows["late"].any()
    assert (parts.positions["quantity"] == one.positions["quantity"]).all()
    for name in ("fill_quantity", "traded", "cash", "fee", "funding"):
        assert parts.rows[name] == pytest.approx(one.rows[name], abs=1e-7)
    worth = [wallet(each.account) + (each.positions["quantity"] * (105. - each.positions["entry_price"])).sum()
             for each in (one, parts)]
    assert worth[0] == pytest.approx(worth[1])


def test_a_policy_that_decides_between_the_closes_has_a_row_of_equity_for_each_close():
    one = trader()
    one.policy = replace(one.policy, clock="book")
    one.warm(TIMES[:HISTORY], CANDLES[:HISTORY])
    worth = []
    for time, candles in zip(TIMES[HISTORY:], CANDLES[HISTORY:]):
        assert one.on(Candles(int(time), candles)) is None
        worth.append(one.closed[0].item())
        for n in range(3):
            quote = Quote(SYMBOLS[0], candles[0, 3] + n, candles[0, 3] + n + 1, 1., 1., int(time) + HOUR + n)
            decided = one.on(quote)
            assert decided.open_time == quote.quote_time
            assert one.closed[0].item() == worth[-1]
        one.on(Fill(SYMBOLS[0], .01, 100., 1., int(time) + HOUR + 9))
    assert [row[0] for row in worth] == TIMES[HISTORY:].tolist()
    assert len({row[1] for row in worth}) == len(worth)
    again = trader()
    again.restore(one.snapshot())
    assert again.closed.tobytes() == one.closed.tobytes()
