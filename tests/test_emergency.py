"Getting out: everything is closed at once, whoever wants it and whatever breaks; nothing is opened, nothing flipped"
import asyncio
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from time import monotonic
from unittest.mock import patch
from urllib.request import Request, urlopen

import pytest
from simulated import SYMBOLS, simulate
from simulated import trader as a_trader
from test_live import localnet, venue
from test_simulation_live import AT_START, FOR_PERSONS, NOT_HEARD, wrong_in

from tradelab.database.records import EmergencyStep
from tradelab.events import TradingState
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN as LISTED
from tradelab.live import core as cores
from tradelab.live import emergency as emergencies
from tradelab.live.guards import EMERGENCY, is_emergency
from tradelab.live.ledger import Ledger
from tradelab.live.messages import Command, Failed
from tradelab.live.session import Session
from tradelab.localnet.faults import OUTCOMES, REPLIES, SESSIONS, STREAMS, UNAVAILABLE, WIRES
from tradelab.policies import buy_and_hold
from tradelab.risk.execution import OrderGate
from tradelab.settings import NO_STOPS, Limits
from tradelab.trader import Trader
from tradelab.venues import binance_market as markets
from tradelab.venues.binance import BinanceVenue

FIVE = tuple(f"{name}/USDT:USDT" for name in ("BTC", "ETH", "BNB", "SOL", "XRP"))
LIMITS = Limits(max_position=.15, max_drawdown=.9, max_daily_loss=None, stops=NO_STOPS)


class Noting(BinanceVenue):
    "Remembers when it was asked to place what"
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.placed = []

    async def place(self, order):
        self.placed.append((monotonic(), order))
        return await super().place(order)

    @property
    def closing(self): return [(time, order) for time, order in self.placed if is_emergency(order)]


def trader(symbols, limits=LIMITS):
    instruments = tuple(replace(LISTED, symbol=symbol) for symbol in symbols)
    return Trader(buy_and_hold(), Observation(()), OrderGate, limits, instruments)


def session(exchange, folder, symbols=FIVE, limits=LIMITS, broker=Noting, **options):
    return Session(trader(symbols, limits), broker(venue(exchange)), Ledger(f"sqlite:///{folder}/tradelab.db"),
                   folder / "sessions", **({"id": "out", "timeframe": "1h", "say": str} | options))


def halted_at(live, candle=3, word="halt", before=lambda: None):
    "At this candle a person says a word"
    def progress(statistics):
        if statistics.candles != candle: return
        before()
        live.spoken = monotonic()
        live.venue.events.put_nowait(Command(1, word, reason="an example", person="Ada"))
    live.progress = progress
    return live


def held(exchange, symbols=FIVE):
    return [exchange.exchange.accounts["main"].held(n, "BOTH") for n in range(len(symbols))]


def out_in_order(live, exchange, symbols=FIVE):
    "What holds after every emergency"
    assert held(exchange, symbols) == [0.] * len(symbols)
    account = exchange.exchange.accounts["main"]
    assert not account.open
    closing = [order for _, order in live.venue.closing]
    assert all(order.reduce_only for order in closing)
    for symbol in symbols:                                      # never more than was held
        ours = {order.order_id for order in closing if order.symbol == symbol}
        executed = {each.client_id: each.sign * each.executed for each in account.orders.values()
                    if symbols[each.n] == symbol}
        opened = sum(part for name, part in executed.items() if name not in ours)
        assert sum(executed[name] for name in ours & set(executed)) == pytest.approx(-opened)
    assert (live.trader.positions["quantity"] == 0).all()


@pytest.mark.integration
def test_five_symbols_are_flat_after_a_persons_halt(tmp_path):
    with localnet(FIVE, deposit=20_000.) as exchange:
        live = halted_at(session(exchange, tmp_path))
        asyncio.run(live.run(8))
        assert len(live.venue.closing) == 5
        took = live.venue.closing[-1][0] - live.spoken
        print(f"the last close of five was sent {1000 * took:.0f} ms after the word")
        out_in_order(live, exchange)
        assert live.statistics.rejected == 0
        assert live.statistics.orders == 10                   # five in, five out, and nothing after that
        notices = live.ledger.notices("out")
        assert list(notices["kind"]) == ["halt", "command", "emergency", "emergency"]
        assert notices["text"].iloc[-1].endswith("XRP/USDT:USDT: flat")
        again = session(exchange, tmp_path, id="", resume="out")
        asyncio.run(again.run(3))
        other = session(exchange, tmp_path, id="another")
        asyncio.run(other.run(3))
        assert again.statistics.orders == other.statistics.orders == 0


@pytest.mark.integration
def test_the_trouble_of_one_symbol_holds_up_no_other(tmp_path):
    "15.8 s were seen"
    symbols = FIVE[:2]
    with localnet(symbols) as exchange:
        def refuse():
            exchange.faults.arm({"at": "request", "do": "reply", "method": "POST", "path": "v1/order", "symbol":
                                 "BTCUSDT", "status": 503, "code": -1008, "msg": "busy", "times": 3})
        live = halted_at(session(exchange, tmp_path, symbols), before=refuse)
        asyncio.run(live.run(8))
        first = [time for time, order in live.venue.closing if order.symbol == symbols[0]]
        second = [time for time, order in live.venue.closing if order.symbol == symbols[1]]
        assert len(first) == 4
        assert len(second) == 1
        print(f"the second close was sent {1000 * (second[0] - live.spoken):.0f} ms after the word, the first was "
              f"taken after {1000 * (first[-1] - live.spoken):,.0f} ms")
        assert second[0] < first[1]                               # before the first is tried again
        out_in_order(live, exchange, symbols)


@pytest.mark.integration
def test_the_drawdown_limit_closes_all_at_once_on_the_mark_or_at_the_close(tmp_path):
    symbols = FIVE[:2]
    limits = replace(LIMITS, max_position=.45, max_drawdown=.003)
    with localnet(symbols) as exchange:
        live = session(exchange, tmp_path, symbols, limits)
        asyncio.run(live.run(40))
        assert live.trader.account["trading_state"][0] == TradingState.HALT
        assert len(live.venue.closing) >= 2
        out_in_order(live, exchange, symbols)
        assert (live.ledger.journal("out").iloc[-2:]["position"] == 0).all()


QUICK = {"heartbeat": 50, "quiet": 100, "pause": 20}
WITH_ITS_EXCHANGE = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_emergency import FIVE, QUICK, Noting, is_emergency, localnet, session
from tradelab.database.records import Asked

class Killed(Noting):
    async def place(self, order):
        if is_emergency(order) and {when!r} == "before": os.kill(os.getpid(), signal.SIGKILL)
        answer = await super().place(order)
        if is_emergency(order): os.kill(os.getpid(), signal.SIGKILL)
        return answer

folder = Path({folder!r})
with localnet(FIVE[:2], memory=folder / "localnet.jsonl") as exchange:
    live = session(exchange, folder, FIVE[:2], broker=Killed, waits=QUICK)
    live.progress = lambda done: done.candles == 3 and live.ledger.commands.ask(Asked("halt", "an example", "Ada"))
    asyncio.run(live.run(90))
"""


def flat_and_halted(live, exchange, symbols):
    "What holds after an emergency that was interrupted, by the trades of the exchange itself"
    account = exchange.exchange.accounts["main"]
    left = Counter()
    for trade in account.trades:
        before, left[trade.n] = left[trade.n], round(left[trade.n] + trade.quantity, 8)
        if not is_of_emergency(account.orders[trade.order].client_id): continue
        assert before * left[trade.n] >= 0
        assert abs(left[trade.n]) < abs(before)
    assert set(left.values()) == {0.}
    assert held(exchange, symbols) == [0.] * len(symbols)
    assert not account.open
    assert live.trader.account["trading_state"][0] == TradingState.HALT
    newest = max(live.ledger.trading_states.all(), key=lambda row: row["time"])
    assert newest["trading_state"] == TradingState.HALT
    assert "over" in [each.step for each in live.ledger.measured("out", EmergencyStep)]


@pytest.mark.integration
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_session_that_died_in_an_emergency_with_its_exchange_gets_out_of_the_restored_one(tmp_path, when):
    "Killed as the first close goes out, or when it is answered; what the ledger did not get is asked for there still"
    script = WITH_ITS_EXCHANGE.format(tests=str(Path(__file__).parent), folder=str(tmp_path), when=when)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
    with localnet(FIVE[:2], memory=tmp_path / "localnet.jsonl") as exchange:
        assert all(held(exchange, FIVE[:2])) == (when == "before") # both closes go out together
        live = session(exchange, tmp_path, FIVE[:2], id="", resume="out", patience=2., waits=QUICK)
        live.progress = lambda done: live.trader.account["trading_state"][0] == TradingState.HALT and live.stop()
        asyncio.run(live.run(90))
        flat_and_halted(live, exchange, FIVE[:2])
        assert not [order for _, order in live.venue.placed if not is_emergency(order)]


@pytest.mark.integration
def test_an_exchange_that_is_restored_during_an_emergency_is_left_flat(tmp_path):
    with localnet(FIVE[:2], memory=tmp_path / "localnet.jsonl") as exchange:
        def forget(): exchange.faults.arm("server_forgets", loss=False)
        live, before = halted_at(session(exchange, tmp_path, FIVE[:2], patience=2.), before=forget), exchange.exchange
        asyncio.run(live.run(8))
        assert exchange.exchange is not before
        flat_and_halted(live, exchange, FIVE[:2])


def status_of(status): return {"at": "step", "do": "suspend", "symbol": "BTCUSDT", "status": status}


class Reopening(Noting):
    "When the second symbol is closed, the exchange trades the first one again at its next step"
    def reopen(self):
        self.exchange.faults.arm([status_of("TRADING")])
        step = Request(f"{self.exchange.control_url}/step", b"{}", {"X-Localnet-Token": self.exchange.token})
        urlopen(step, timeout=10).read()

    async def place(self, order):
        answer = await super().place(order)
        if is_emergency(order) and order.symbol == FIVE[1]: await asyncio.to_thread(self.reopen)
        return answer


@pytest.mark.integration
def test_a_symbol_that_is_not_traded_is_closed_when_it_is_and_holds_up_no_other(tmp_path):
    "The exchange suspends it before the halt: nothing is sent there, and the other one is closed at once"
    with localnet(FIVE[:2]) as exchange:
        live = session(exchange, tmp_path, FIVE[:2], broker=Reopening, waits=QUICK)
        live.venue.exchange = exchange
        live.progress = lambda done: done.candles == 3 and exchange.faults.arm([status_of("BREAK")])

        def halt(line):
            if line.startswith("suspended: BTC/USDT:USDT is not traded"):
                live.venue.events.put_nowait(Command(1, "halt", reason="an example", person="Ada"))
        live.say = halt
        asyncio.run(live.run(8))
        assert [order.symbol for _, order in live.venue.closing] == [FIVE[1], FIVE[0]]
        out_in_order(live, exchange, FIVE[:2])
        assert live.statistics.rejected == 0
        flat_and_halted(live, exchange, FIVE[:2])


# --- in virtual time, a seed each

HALTING = Limits(stops=NO_STOPS, max_drawdown=.0008, max_daily_loss=None)  # at the thirteenth close
CANDLES = 18


def emergency_of(seed=1, candles=CANDLES, **settings):
    "A run whose drawdown limit is reached, with whatever goes wrong"
    return simulate(seed, make_trader=partial(a_trader, HALTING), candles=candles, market_seed=1, **settings)


def steps_of(run): return [each for name in run.names for each in run.ledger.measured(name, EmergencyStep)]


def halted_at_door(run):
    "The numbers of the doors that were gone through from the halt until everything was flat"
    begin, *_, end = (each.time for each in steps_of(run))
    return run.world.doors(begin, end)


def is_of_emergency(name): return int(name.split("-")[3]) >= EMERGENCY


def wrong_in_emergency(run):
    "What must never be after an emergency, in sentences"
    found = wrong_in(run)
    if any(run.world.positions().values()): found.append(f"it is not flat: {run.world.positions()}")
    if not any(each.step == "halted" for each in steps_of(run)): return [*found, "there was no emergency"]
    begin, orders = min(each.time for each in steps_of(run)), run.world.account().orders
    found += [f"{each.client_id} opens after the halt" for each in orders.values()
              if each.time > begin and not each.reduce_only]
    held = Counter()
    for trade in run.world.account().trades:
        before, name = held[trade.n], orders[trade.order].client_id
        held[trade.n] = round(before + trade.quantity, 8)
        closes = before * held[trade.n] >= 0 and abs(held[trade.n]) < abs(before)
        if is_of_emergency(name) and not closes: found.append(f"{name}: {before} became {held[trade.n]}")
    standing = run.ledger.trading_states.all()[0]
    if standing["trading_state"] != TradingState.HALT: found.append(f"the ledger says {standing}")
    if run.trader.account["trading_state"][0] != TradingState.HALT: found.append("the trader is not halted")
    return found


@cache
def undisturbed(): return emergency_of()


def test_the_drawdown_limit_is_an_emergency_of_half_a_second():
    run = undisturbed()
    assert wrong_in_emergency(run) == []
    steps = steps_of(run)
    assert [each.step for each in steps] == ["halted", "closing", "closing", "flat", "flat", "over"]
    assert steps[2].time == steps[0].time                       # both are sent with the halt
    assert steps[-1].time - steps[0].time < 500
    assert run.notices["rejected"] == 0


@pytest.mark.parametrize("part", range(4))
def test_killed_anywhere_in_an_emergency_it_goes_on(part):
    doors = halted_at_door(undisturbed())
    assert len(doors) > 12
    for door in doors[part::4]:
        run = emergency_of(kills=(door,), downtime=lambda: .5)
        assert len(run.processes) == 2
        assert (door, wrong_in_emergency(run)) == (door, [])


def test_killed_again_and_again_it_still_gets_out():
    first = halted_at_door(undisturbed())[0]
    run = emergency_of(kills=range(first, first + 120, 13), downtime=lambda: .5)
    assert len(run.processes) > 4
    assert wrong_in_emergency(run) == []


async def arm_at_the_halt(world, name, lasts=3.):
    await asyncio.sleep(12.9 * world.step / 1000 - world.loop.time())
    world.faults.arm(name)
    await asyncio.sleep(lasts * world.step / 1000)
    world.faults.disarm()


HARD = sorted({*OUTCOMES, *UNAVAILABLE, *STREAMS, *REPLIES, *WIRES, *SESSIONS} - AT_START - FOR_PERSONS - NOT_HEARD)


@pytest.mark.parametrize("name", HARD)
def test_whatever_breaks_in_an_emergency_it_gets_out(name):
    run = emergency_of(candles=CANDLES + 4, script=lambda world: arm_at_the_halt(world, name)) # until it is absent
    assert wrong_in_emergency(run) == []


async def say(world, *events, at=8.5):
    "Something is put into the inbox of the session"
    await asyncio.sleep(at * world.step / 1000 - world.loop.time())
    for event in events: world.process.session.venue.events.put_nowait(event)


MISTAKE = Failed(RuntimeError("a mistake in the program"))


def closed_before_the_end(run):
    "What an error leaves of a session: nothing, a halt, and the error itself"
    assert run.world.positions() == dict.fromkeys(SYMBOLS, 0.)
    assert not run.world.account().open
    assert [each.step for each in steps_of(run)][-1] == "over"
    assert run.ledger.trading_states.all()[0]["trading_state"] == TradingState.HALT
    assert sum(entry.quantity for _, entry in run.ledger.booked(run.names[-1]) if hasattr(entry, "trade_id")) == (
        pytest.approx(0.))


def test_an_error_ends_a_session_only_when_everything_is_closed():
    run = simulate(1, candles=10, market_seed=1, script=lambda world: say(world, MISTAKE, MISTAKE))
    assert run.processes[0].end is MISTAKE.error
    assert steps_of(run)[0].text == "RuntimeError: a mistake in the program"
    assert run.notices["failed"] == 1
    closed_before_the_end(run)
    run = simulate(1, candles=10, market_seed=1, script=lambda world: say(world, MISTAKE, at=.3))
    assert run.processes[0].end is MISTAKE.error
    assert steps_of(run) == []                                  # nothing was held: nothing had to be closed


def test_a_core_that_fails_at_every_event_still_gets_out():
    def failing(core):
        if core.error: raise ValueError("it fails at everything")
        return tends(core)
    tends = cores.tend
    with patch.object(cores, "tend", failing):
        run = simulate(1, candles=10, market_seed=1, script=lambda world: say(world, MISTAKE))
    assert run.processes[0].end is MISTAKE.error
    closed_before_the_end(run)


def test_killed_while_an_error_closes_everything_it_goes_on_and_stays_halted():
    whole = simulate(1, candles=10, market_seed=1, script=lambda world: say(world, MISTAKE))
    for door in halted_at_door(whole)[1::3]: # at the first, nothing has been written of the error, and nobody knows it
        run = simulate(1, candles=12, market_seed=1, script=lambda world: say(world, MISTAKE), kills=(door,),
                       downtime=lambda: .5)
        closed_before_the_end(run)


def test_an_outage_is_an_emergency_where_no_stop_stands():
    def away(limit):
        async def script(world):
            await asyncio.sleep(8.5 * world.step / 1000)
            world.faults.arm("dns_outage", lasts_ms=100_000)
        return simulate(1, candles=15, market_seed=1, options={"waits": {"outage_limit": limit}}, script=script)
    run = away(60_000)
    assert "has answered nothing since" in steps_of(run)[0].text
    assert "BTC/USDT:USDT, ETH/USDT:USDT has no stop there" in steps_of(run)[0].text
    closed_before_the_end(run)
    for limit in (0, 120_000):
        run = away(limit)
        assert steps_of(run) == []
        assert any(run.world.positions().values())


def test_the_error_of_one_symbol_is_not_the_end_of_it():
    "Its rounds fail three times, before anything is sent"
    def failing(core, symbol, account):
        if symbol == SYMBOLS[0] and len(failed) < 3:
            failed.append(core.now)
            raise ArithmeticError("an example")
        return left(core, symbol, account)
    failed, left = [], emergencies.left_of
    with patch.object(emergencies, "left_of", failing): run = emergency_of()
    assert len(failed) == 3
    assert wrong_in_emergency(run) == []
    assert [each.text for each in steps_of(run) if each.step == "failed"] == 3 * ["ArithmeticError: an example"]
    first, second = (next(each.time for each in steps_of(run) if (each.step, each.symbol) == ("flat", symbol))
                     for symbol in SYMBOLS)
    assert second < first


def test_a_thin_book_is_closed_in_slices():
    def thin(symbol, told):
        book = shown(symbol, told)
        return replace(book, bids=tuple((price, .001) for price, _ in book.bids[:5]),
                       asks=tuple((price, .001) for price, _ in book.asks[:5]))
    shown = markets.depth_of
    with patch.object(markets, "depth_of", thin), patch.object(emergencies, "SHARE", 0.): run = emergency_of()
    assert wrong_in_emergency(run) == []
    closing = [each for each in steps_of(run) if (each.step, each.symbol) == ("closing", SYMBOLS[0])]
    print(*closing, sep="\n")
    assert 4 <= len(closing) <= 10
    assert closing[0].text == "-0.005 of -0.024"


def test_a_reset_needs_a_reason():
    def reset(reason):
        async def script(world):
            await say(world, Command(7, "reset", reason=reason, person="Ada"), at=14.5)
        return emergency_of(script=script)
    assert wrong_in_emergency(reset(" ")) == []
    assert "refused: a reset needs a reason" in reset("").ledger.notices("simulated-0")["text"].iloc[-1]
    told = reset("looked at it").ledger.notices("simulated-0")
    assert "7: reset: positions may be opened again, drawdown counts from here" in set(told["text"])
