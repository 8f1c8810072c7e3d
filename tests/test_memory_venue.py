"A live session on a venue in memory is the backtest: the same decisions, orders, fills and equity, bit for bit"
import asyncio
import re
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.errors import InvalidOrderError
from tradelab.evaluation.difference import first_difference
from tradelab.events import CLOSE, Candles, Fill, Funding
from tradelab.journal import JOURNAL
from tradelab.live import start
from tradelab.live.core import Terms
from tradelab.live.ledger import Ledger, MemoryLedger
from tradelab.live.messages import (
    Amend,
    Ask,
    Cancel,
    Decided,
    End,
    Fetch,
    Open,
    Paid,
    Received,
    Send,
    StepDone,
    Stop,
    Tell,
    Warmed,
    Write,
)
from tradelab.live.order_manager import Blotter, Offer, OrderManager, update_of
from tradelab.live.order_states import State, orders_from_decision
from tradelab.live.recorder import MemoryRecorder, RecordingError, encode, read
from tradelab.live.replay import replay
from tradelab.live.session import Kept, Session, answer_to, core_inputs, make_core, restore, write
from tradelab.live.venue import OrderReport, funding_of
from tradelab.market.synthetic import ar1, funding
from tradelab.orders import GTC, IOC, LIMIT, MARKET, NONE, ORDER, OWN, STOP, TAKE_PROFIT, TRAILING, Kind, working_orders
from tradelab.policies import Policy
from tradelab.runs.run import Run, make_trader
from tradelab.settings import NO_STOPS, CostModel, Execution, Limits
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import SimulationSettings, market_data
from tradelab.strategies.example import Momentum
from tradelab.venues.memory import MemoryVenue, simulation_of

SYMBOLS = ("BTC/USDT:USDT", "ETH/USDT:USDT")
SLOTS, START, STEPS = 3, 4, 30
FRAMES = {symbol: ar1(START + STEPS + 1, volatility=.01, seed=3 + n) for n, symbol in enumerate(SYMBOLS)}
RATES = {symbol: funding(frame, seed=3) for symbol, frame in FRAMES.items()}
LIMITS = Limits(max_position=.6, max_daily_loss=None, max_drawdown=.9, max_participation=None, max_orders=None,
                price_band=None, stops=NO_STOPS)
SEEN = ["kind", "in_force", "quantity", "price", "trigger", "callback", "reduce_only", "expires_in", "exposure",
        "resting", "revision"]
LOG = {} # of the running policy: what it was shown, by the number of the decision


def costs(scarce):
    "`scarce`: a candle has little volume for us, so that orders are filled in parts"
    volume = float(np.median([frame["volume"].median() for frame in FRAMES.values()]))
    return CostModel(participation=.05 / volume) if scarce else CostModel()


def new_order(row, price, random):
    kind = int(random.choice([MARKET, LIMIT, LIMIT, STOP, TAKE_PROFIT, TRAILING]))
    side = 1. if random.random() < .5 else -1.
    row["kind"] = kind
    row["exposure"] = side * round(float(random.uniform(.05, .5)), 3)
    row["in_force"] = int(random.integers(4)) if kind == LIMIT else GTC
    row["reduce_only"] = int(random.random() < .2)
    row["expires_in"] = float(random.integers(4))
    beyond = 1. + float(random.uniform(-.01, .012))
    row["price"] = price * beyond if kind == LIMIT or kind in (STOP, TAKE_PROFIT) and random.random() < .4 else 0.
    aims = 1. if kind == STOP else -1.
    row["trigger"] = price * (1. + aims * side * float(random.uniform(0., .01))) if kind in (STOP, TAKE_PROFIT) else 0.
    row["callback"] = float(random.uniform(.002, .01)) if kind == TRAILING else 0.


def wild(parameters, memory, observation, prices, answer):
    "Leaves, moves, resizes, cancels, replaces and begins orders, as a seed and the number of the decision say"
    memory[0] += 1.
    random = np.random.default_rng([int(parameters[0]), int(memory[0])])
    shown = [tuple(row[name] for name in SEEN) for row in answer.ravel() if row["kind"] != NONE]
    if memory[0] > 1.: LOG.setdefault(int(memory[0]), set()).add((tuple(prices), *shown))
    for n in range(len(prices)):
        for k in range(answer.shape[1]):
            row = answer[n, k]
            chance = random.random()
            if row["kind"] == NONE:
                if chance < .5: new_order(row, prices[n], random)
            elif chance < .15: row["kind"] = NONE
            elif chance < .25: new_order(row, prices[n], random)
            elif chance < .4 and row["price"] > 0.: row["price"] *= 1. + float(random.uniform(-.003, .003))
            elif chance < .5: row["exposure"] *= .5


def policy_of(seed): return Policy("wild", wild, np.array([float(seed)]), order_slots=SLOTS, memory=1)


def shown():
    "What the policy was shown since it was asked last, one thing for each decision"
    log = {number: seen for number, seen in sorted(LOG.items())}
    LOG.clear()
    assert all(len(seen) == 1 for seen in log.values())
    return [next(iter(seen)) for seen in log.values()]


@cache
def expected(seed, scarce):
    LOG.clear()
    runs = []
    for engine in ("vectorised", "event"):
        result = backtest(policy_of(seed), FRAMES, FRAMES[SYMBOLS[0]].index[START], costs=costs(scarce), limits=LIMITS,
                          funding=RATES, engine=engine, baselines=())
        runs.append((result.journal, result.fill_rows, shown()))
    assert first_difference(runs[0][0], runs[1][0]) is None
    assert np.array_equal(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]
    return runs[0]


class KilledError(Exception): pass


class Driver:
    """Carries out the actions of a core in the venue's time; dies before the actions of these numbers, but behind what
    is sent: an order that was written down as sent, and was not, is never sent again (`tests/test_core.py`)"""

    def __init__(self, seed, scarce, kills=(), lethal=(), policy=None, execution=Execution()):
        data = market_data(FRAMES, funding=RATES)
        self.policy = policy or policy_of(seed)
        self.execution = execution
        self.kills = set(kills)
        self.lethal = dict(lethal)   # by kind of action: whether it dies after it, or before
        self.survived = set()
        self.venue = MemoryVenue(data, SimulationSettings(costs(scarce), LIMITS), self.policy.order_slots,
                                 start=int(data.times[START]))
        self.ledger = MemoryLedger()
        self.recorder = MemoryRecorder()
        self.instruments = data.instruments
        self.opened = {}             # what a session keeps of its start
        self.done = 0
        self.silence = 0
        self.kinds = []
        self.notices = []

    def trader(self):
        return make_trader(self.policy, LIMITS, self.instruments, timeframe="1h", execution=self.execution)

    def start(self):
        "A new process: only ledger and exchange are left of the one before"
        kept = self.ledger.snapshot("s")
        trader = self.trader()
        if kept: restore(trader, "s", {}, kept)
        venue = self.venue
        inputs = core_inputs(self.ledger, Terms("s", "1h"), kept and Kept(self.opened, kept),
                             Offer(venue.kinds, venue.amends, venue.expires))
        self.core = make_core(trader, inputs)
        self.recorder.start({}, encode(inputs))
        asyncio.run(self.venue.close())

    def heard(self):
        "What the core is told next"
        events = self.venue.events
        while events.empty():
            if self.venue.go_on(): continue
            events.put_nowait(Stop())
            self.silence += 60_000 # the last orders meet no candle: patience ends
        return Received(self.venue.now + self.silence, [events.get_nowait() for _ in range(events.qsize())])

    def run(self):
        self.start()
        received = Received(self.venue.now)
        while True:
            try:
                self.recorder.received(received)
                actions = self.core.on(received)
                self.recorder.answered(actions)
                for action in actions:
                    self.done += 1
                    if self.done in self.kills:
                        if isinstance(action, Send): self.do(action)
                        raise KilledError
                    if isinstance(action, End): return action
                    self.dies(action, after=False)
                    self.do(action)
                    self.dies(action, after=True)
                received = self.heard()
            except KilledError:
                self.start()
                received = Received(self.venue.now)

    def dies(self, action, after):
        "Once at each lethal action"
        if self.lethal.get(type(action)) is not after: return
        order = action.order
        name = type(action), order.symbol, order.slot, order.open_time, order.revision
        if name in self.survived: return
        self.survived.add(name)
        raise KilledError

    def do(self, action):
        self.kinds.append(type(action))
        match action:
            case Write(record): write(self.ledger, "s", record)
            case Send() | Amend() | Cancel() | Ask() | Fetch():
                if isinstance(action, Send):
                    written = {intent.order.order_id: intent for intent in self.ledger.intents("s")}
                    assert written[action.order.order_id].state is State.SENT
                    assert action.order.order_id not in self.venue.held.held
                self.venue.events.put_nowait(answered(answer_to(self.venue, action)))
            case Open(reserve, opening):
                self.opened = {"reserve": reserve, "opening": asdict(opening)}
                answered(self.venue.stream(SYMBOLS, "1h"))
            case Tell(notice): self.notices.append(notice)
            case StepDone() | Decided() | Warmed(): pass


def answered(coroutine):
    "A coroutine that waits for nothing, done at once"
    try: coroutine.send(None)
    except StopIteration as ended: return ended.value
    raise AssertionError("it waits")


def compare(driver, seed, scarce):
    journal, fills, seen = expected(seed, scarce)
    rows = driver.ledger.journal("s")
    assert first_difference(journal, rows[:len(journal)]) is None
    ours = driver.venue.held.simulation.state
    assert np.array_equal(fills, ours.fills[:ours.count[0]])
    assert seen == shown()[:len(seen)]
    assert {notice.kind for notice in driver.notices} <= {"unanswered", "resting", "kept"}, driver.notices
    works = sum(order["kind"] != NONE for order in driver.venue.held.simulation.state.orders.ravel())
    told = {notice.text for notice in driver.notices if notice.kind == "resting"} # killed meanwhile, it tells again
    assert len(told) == works
    recorded, recomputed = replay(driver.recorder.lines, driver.trader())
    assert set(rows.index) <= set(recorded.index)
    assert first_difference(recorded, recomputed) is None
    LOG.clear()


@cache
def actions_of(seed, scarce):
    expected(seed, scarce)
    LOG.clear()
    driver = Driver(seed, scarce)
    end = driver.run()
    assert end == End("stopped"), end
    compare(driver, seed, scarce)
    return driver.done, driver.kinds


@settings(max_examples=12)
@given(st.integers(0, 1_000), st.booleans())
def test_any_orders_are_the_same_in_array_form_event_form_and_live(seed, scarce):
    actions_of(seed, scarce)


@settings(max_examples=25)
@given(st.data())
def test_killed_between_any_two_actions_it_is_the_same_still(data):
    seed, scarce = data.draw(st.integers(0, 5)), data.draw(st.booleans())
    done, _ = actions_of(seed, scarce)
    kills = data.draw(st.lists(st.integers(1, done), min_size=1, max_size=4))
    LOG.clear()
    driver = Driver(seed, scarce, kills)
    if data.draw(st.booleans()): driver.venue.amends = frozenset() # every amendment is an order taken back, and another
    end = driver.run()
    assert end == End("stopped"), end
    compare(driver, seed, scarce)


def test_a_payment_that_is_written_down_and_not_booked_is_booked_after_a_kill():
    """The exchange's row is known then, and is looked at again: killed behind each such row, and at each action until
    the next step"""
    def payments(driver): return [entry for _, entry in driver.ledger.booked("s") if isinstance(entry, Funding)]

    class Deaf(Driver): # no socket tells of a payment
        def heard(self):
            received = super().heard()
            return replace(received, events=[each for each in received.events if not isinstance(each, Funding)])

        def do(self, action):
            super().do(action)
            if isinstance(action, Write) and isinstance(action.record, Paid):
                if any(funding_of(row) for row in action.record.rows): rows.append(self.done)
    rows = []
    whole = Deaf(0, False)
    whole.run()
    assert len(payments(whole)) > 1
    for row in rows.copy():
        for later in range(1, 4):
            driver = Deaf(0, False, kills={row + later})
            driver.run()
            assert payments(driver) == payments(whole)
    LOG.clear()


@pytest.mark.parametrize("action, after", [(Send, True), (Amend, False), (Amend, True), (Cancel, False),
                                           (Cancel, True)])
def test_killed_at_everything_that_is_asked_for_it_is_the_same_still(action, after):
    "Before: what was written down was not sent. After: it was, and the answer is lost"
    expected(3, True)
    LOG.clear()
    driver = Driver(3, True, lethal={action: after})
    end = driver.run()
    assert end == End("stopped"), end
    compare(driver, 3, True)
    assert len(driver.survived) >= 5


def retold(lines, change):
    "The lines with other events: `change` returns what is told instead of one"
    return [line | {"events": [each for event in line["events"] for each in change(event)]}
            if line["kind"] == "received" else line for line in lines]


def test_an_answer_that_the_exchange_did_not_give_is_a_difference():
    driver = Driver(3, True)
    driver.run()
    lines = driver.recorder.lines
    fills = [event for line in lines for event in line.get("events", ()) if event["type"] == "Fill"]

    def dearer(fill): return lambda event: [event | {"price": event["price"] * 1.001} if event == fill else event]

    def refused(name):
        def change(event):
            if event["type"] == "Answered" and event["action"]["order"]["order_id"] == name:
                return [event | {"answer": event["answer"] | {"outcome": "rejected", "report": None}}]
            return [] if event.get("order_id") == name else [event]
        return change

    assert len(fills) > 30
    for fill in fills[:-2:5]: # what is told last has no consequence
        for change in (dearer(fill), refused(fill["order_id"])):
            assert first_difference(*replay(retold(lines, change), driver.trader())) is not None
    LOG.clear()


def test_a_request_that_was_not_recorded_is_a_difference():
    driver = Driver(3, True)
    driver.run()
    lines = driver.recorder.lines
    requests = [number for number, line in enumerate(lines) if line["kind"] == "request"]
    for number in requests[::20]:
        found = first_difference(*replay(lines[:number] + lines[number + 1:], driver.trader()))
        assert found.column == "requests"
    with pytest.raises(RecordingError, match="the session had ended before it: stopped"):
        replay([*lines, next(line for line in lines if line["kind"] == "received")], driver.trader())
    LOG.clear()


def test_the_wild_policy_does_everything():
    kinds = [kind for seed in range(6) for scarce in (False, True) for kind in actions_of(seed, scarce)[1]]
    assert min(kinds.count(kind) for kind in (Send, Amend, Cancel)) > 50
    fills = np.concatenate([expected(seed, True)[1] for seed in range(6)])
    assert {LIMIT, MARKET, STOP, TAKE_PROFIT, TRAILING} <= set(fills["kind"].tolist())


def turning(parameters, memory, observation, prices, targets):
    "Holds, flips, closes and opens, as a seed and the number of the decision say"
    memory[0] += 1.
    random = np.random.default_rng([int(parameters[0]), int(memory[0])])
    for n in range(len(prices)):
        if random.random() < .6: memory[1 + n] = random.choice([-1., -.4, 0., .4, 1.])
        targets[n] = memory[1 + n]


STYLES = {"market": Execution(), "post_only": Execution("post_only", patience=2),
          "slices": Execution("slices", slices=3)}


@settings(max_examples=20)
@given(st.data())
def test_any_targets_in_any_style_are_the_same_in_array_form_event_form_and_live(data):
    "And a flip is two orders in all of them, whenever the process is killed"
    policy = Policy("turning", turning, np.array([float(data.draw(st.integers(0, 1_000)))]), memory=1 + len(SYMBOLS))
    style = data.draw(st.sampled_from(list(STYLES)))
    scarce = style == "post_only" and data.draw(st.booleans())
    array, event = (backtest(policy, FRAMES, FRAMES[SYMBOLS[0]].index[START], costs=costs(scarce), limits=LIMITS,
                             funding=RATES, engine=engine, baselines=(), execution=STYLES[style])
                    for engine in ("vectorised", "event"))
    assert first_difference(array.journal, event.journal) is None
    driver = Driver(0, scarce, data.draw(st.lists(st.integers(1, 400), max_size=3)), policy=policy,
                    execution=STYLES[style])
    assert driver.run() == End("stopped")
    assert first_difference(array.journal, driver.ledger.journal("s")[:len(array.journal)]) is None
    ours = driver.venue.held.simulation.state
    assert np.array_equal(array.fill_rows, ours.fills[:ours.count[0]])


def limit(row, price):
    row["kind"], row["exposure"], row["price"] = LIMIT, .25, price


def stopped(row, price):
    row["kind"], row["price"], row["trigger"] = STOP, 0., price * 1.2


def change(name, factor):
    def act(row, price): row[name] *= factor
    return act


def lasting(row): row["expires_in"] = 3.
def market(row, price): row["kind"], row["exposure"] = MARKET, .25
def at_once(row, price): row["kind"], row["exposure"], row["price"], row["in_force"] = LIMIT, .25, price * .8, IOC
def nothing(row, price): pass
def none(row, price): row["kind"] = NONE


TABLE = [("left as it is", limit, nothing, "kept"), ("kind NONE", limit, none, "cancelled"),
         ("another price", limit, change("price", .99), "amended"),
         ("another quantity", limit, change("exposure", .5), "amended"),
         ("the same again", limit, lambda row, price: limit(row, row["price"]), "kept"),
         ("another kind", limit, stopped, "replaced"), ("another side", limit, change("exposure", -1.), "replaced"),
         ("a market order, left", market, nothing, "ended"), ("IOC, left", at_once, nothing, "ended")]


@pytest.mark.parametrize("first, then, outcome", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_table_of_what_a_row_means_holds_in_kernel_trader_and_order_manager(first, then, outcome):
    script = iter([(first, .8), (then, .8)])
    def scripted(parameters, memory, observation, prices, answer):
        act, share = next(script)
        act(answer[0, 0], prices[0] * share)
    symbol = SYMBOLS[0]
    data = market_data(FRAMES[symbol])
    venue = MemoryVenue(data, SimulationSettings(CostModel(), LIMITS), 1, start=int(data.times[START]))
    trader = make_trader(Policy("scripted", scripted, order_slots=1), LIMITS, data.instruments, timeframe="1h")
    manager = OrderManager("table", Blotter(), beside=True)
    kernel = simulation_of(data, SimulationSettings(CostModel(), LIMITS), 1, START)
    row, answer = kernel.state.orders[0, OWN], np.zeros((1, 1), ORDER)
    asked = []

    def decide(t, act):
        "One decision in the trader, carried out by the manager, and the same in the kernel"
        decision = trader.on(Candles(int(data.times[t]), data.known[t, :, :8]))
        wanted = orders_from_decision(decision.orders, trader.symbols, decision.open_time, "table")
        actions = manager.want(wanted, t)
        while actions:
            action = actions.pop(0)
            if not isinstance(action, Send | Amend | Cancel): continue
            asked.append(type(action))
            actions += manager.on_answer(answered(answer_to(venue, action)), t)
        working_orders(kernel.state.orders, answer)
        act(answer[0, 0], data.candles[t, 0, CLOSE] * .8)
        kernel.step(t, answer.copy(), np.zeros(1, JOURNAL), market=False)
        theirs = decision.orders[0, OWN]
        live = venue.held.simulation.state.orders[0, OWN]
        for name in ("kind", "resting") if row["kind"] == NONE else ("kind", "quantity", "price", "trigger", "resting"):
            assert theirs[name] == row[name] == live[name], name
        return int(row["revision"])

    before = decide(START, first)
    kernel.step(START, np.zeros(0), np.zeros(1, JOURNAL))
    for event in next(venue.held.meet(START, data.times)):
        if isinstance(event, Fill): trader.on(event)
        if isinstance(event, OrderReport): manager.blotter.on_update(event)
    for name, report in manager.blotter.news.items():
        trader.on(update_of(manager.blotter.known[name], trader.orders[0, OWN], report, START))
    assert asked == [Send]
    after = decide(START + 1, then)
    expected = {"kept": ([], 0), "cancelled": ([Cancel], 0), "amended": ([Amend], 1), "replaced": ([Cancel, Send], 1),
                "ended": ([], 0)}
    assert (asked[1:], after - before) == expected[outcome]
    assert row["resting"] == (outcome not in ("amended", "replaced"))


def test_a_session_of_targets_is_the_backtest(tmp_path):
    policy, frame = Momentum(2, .001), ar1(120, volatility=.01, seed=3)
    rates = funding(frame, seed=3)
    data = market_data(frame, funding=rates)
    venue = MemoryVenue(data, start=int(data.times[20]))
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    trader = Run("memory", policy, timeframe="1h").trader(instruments=data.instruments)
    session = Session(trader, venue, ledger, tmp_path, id="memory", say=lambda line: None)
    asyncio.run(session.run(len(frame) - 21))
    expected = backtest(policy, frame, frame.index[20], funding=rates, baselines=())
    journal = ledger.journal("memory")
    assert (journal["order"] != 0).sum() > 20
    assert (journal["funding"] != 0).sum() > 5
    assert first_difference(expected.journal, journal) is None
    ours = venue.held.simulation.state.fills[:len(expected.fill_rows)]
    assert np.array_equal(expected.fill_rows, ours)


def test_a_session_of_orders_is_resumed_and_replayed(tmp_path):
    "On disk, through the session: what was recorded gives the same decisions again"
    data = market_data(FRAMES, funding=RATES)
    venue = MemoryVenue(data, SimulationSettings(costs(True), LIMITS), SLOTS, start=int(data.times[START]))
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    def traded(candles, **name):
        trader = make_trader(policy_of(1), LIMITS, data.instruments, timeframe="1h")
        asyncio.run(Session(trader, venue, ledger, tmp_path, say=lambda line: None, **name).run(candles))
    traded(12, id="orders")
    traded(STEPS - 12, resume="orders")
    journal, _, _ = expected(1, True)
    rows = len(journal) - len(SYMBOLS) # what follows the last decision was not waited for
    assert first_difference(journal[:rows], ledger.journal("orders")[:rows]) is None
    again = make_trader(policy_of(1), LIMITS, data.instruments, timeframe="1h")
    assert first_difference(*replay(list(read(tmp_path / "orders/recording.zst")), again)) is None


class ForgetfulVenue(MemoryVenue):
    "Tells of every third fill, on its stream and when it is asked, only after the next candle"

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.withheld = []
        self.belated = {} # by id, all that were withheld

    def go_on(self):
        before = self.events.qsize()
        there = super().go_on()
        events = [self.events.get_nowait() for _ in range(before, self.events.qsize())] if not before else []
        now = [each for each in events if isinstance(each, Fill) and int(each.trade_id) % 3 == 0]
        told = self.withheld if self._met else []
        if self._met: self.withheld = now
        self.belated |= {each.trade_id: each for each in now}
        for each in [*told, *(each for each in events if each not in now)]: self.events.put_nowait(each)
        return there

    async def fills(self, symbol, first=None):
        hidden = {each.trade_id for each in self.withheld}
        return [each for each in await super().fills(symbol, first) if each.trade_id not in hidden]

    async def close(self):
        "Whoever comes back finds it by asking"
        self.withheld = []
        await super().close()


def opens_once_in_a_while(parameters, memory, observation, prices, answer):
    "A little more of each symbol, sometimes: nothing is closed that may not be there yet"
    memory[0] += 1.
    answer[:] = min(np.ceil(memory[0] / 3) * .1, 1.)


def patiently(process):
    "The same, with time to wait, for a session that waits for no order"
    def patient(core):
        terms, core.terms = core.terms, replace(core.terms, patience=15_000)
        yield from process(core)
        core.terms = terms
    return patient


@pytest.mark.parametrize("stops", [(), (7, 14)])
def test_a_fill_that_is_told_a_candle_late_is_applied_then_and_says_so(tmp_path, monkeypatch, stops):
    monkeypatch.setattr(start, "hear_both", patiently(start.hear_both))
    data = market_data(FRAMES, funding=RATES)
    policy = Policy("builder", opens_once_in_a_while, memory=1)
    venue = ForgetfulVenue(data, SimulationSettings(costs(False), LIMITS), start=int(data.times[START]))
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    candles = np.diff([0, *stops, STEPS])
    for number, count in enumerate(candles):
        trader = make_trader(policy, LIMITS, data.instruments, timeframe="1h")
        session = Session(trader, venue, ledger, tmp_path, say=lambda line: None, patience=0.,
                          **{"resume" if number else "id": "late"})
        asyncio.run(session.run(int(count)))
    rows, fills = ledger.journal("late"), {(each.symbol, each.trade_id): each for _, each in ledger.booked("late")
                                           if isinstance(each, Fill)}
    belated = [each for each in venue.belated.values() if (each.symbol, each.trade_id) in fills]
    assert len(belated) > 3
    assert {each.trade_id for each in fills.values() if each.late} == {each.trade_id for each in belated}
    for each in belated:
        told = rows[(rows["symbol"] == each.symbol) & (rows["late"] != 0)]
        happened = (each.fill_time - data.times[0]) // venue.step
        assert int(data.times[happened]) in told.index.as_unit("ms").asi8, "the row of the candle after its own step"
    assert rows["late"].sum() == pytest.approx(sum(abs(each.quantity) for each in belated))
    assert rows["fill_quantity"].sum() == pytest.approx(sum(each.quantity for each in fills.values()))
    again = make_trader(policy, LIMITS, data.instruments, timeframe="1h")
    assert first_difference(*replay(list(read(tmp_path / "late/recording.zst")), again)) is None
    file = pd.read_csv(tmp_path / "late/journal.csv")
    assert (file["late"].to_numpy() == rows["late"].to_numpy()).all()


def test_no_fill_of_a_backtest_is_late():
    assert (expected(1, True)[0]["fill_quantity"] != 0).any()
    assert (expected(1, True)[0]["late"] == 0).all()


def test_a_venue_that_does_not_offer_what_an_order_needs_is_sent_nothing():
    def wanting(parameters, memory, observation, prices, answer):
        market(answer[0, 1], prices[0])
        answer[0, 0]["exposure"] = .25
        stopped(answer[0, 0], prices[0])
    driver = Driver(0, False, policy=Policy("wanting", wanting, order_slots=SLOTS))
    driver.venue.kinds = frozenset({Kind.MARKET, Kind.LIMIT})
    end = driver.run()
    assert end.state == "failed"
    assert isinstance(end.error, InvalidOrderError)
    message = "slot 2, order .*: kind is STOP, and this venue takes LIMIT, MARKET only"
    assert re.search(message, str(end.error)), end.error
    assert not {Send, Amend, Cancel} & set(driver.kinds)
    assert not driver.venue.held.held


@pytest.mark.parametrize("kind, missing", [(LIMIT, "a limit order needs a price"), (STOP, "needs a trigger"),
                                           (TRAILING, "the callback of a trailing stop is .001 to .2 of the price")])
def test_an_order_that_lacks_what_its_kind_needs_is_never_sent(kind, missing):
    def wanting(parameters, memory, observation, prices, answer):
        answer[0, 0]["kind"], answer[0, 0]["exposure"] = kind, .25
    driver = Driver(0, False, policy=Policy("wanting", wanting, order_slots=SLOTS))
    end = driver.run()
    assert re.search(f"BTC/USDT:USDT, slot 0: .*{missing}; was kind {kind}", str(end.error)), end.error
    assert not driver.venue.held.held
