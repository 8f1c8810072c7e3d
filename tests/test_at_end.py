"Positions when a session ends in order: kept with their stops, or closed; in virtual time and over sockets"
import asyncio
import os
import re
import signal
from collections import Counter
from functools import cache, partial

import pytest
from simulated import simulate
from simulated import trader as a_trader
from test_emergency_live import (  # noqa: F401  the latter is a fixture
    DEATH,
    WITHIN,
    Mortal,
    MortalLedger,
    held,
    localnet,
    names,
    processes,
    session,
    stops,
)
from test_emergency_live import (
    SYMBOLS as PAIR,
)
from test_simulation_live import ask

from tradelab.database.records import EmergencyStep
from tradelab.events import TradingState
from tradelab.live.guards import AT_END
from tradelab.settings import NO_STOPS, Limits

FREE = Limits(stops=NO_STOPS, max_drawdown=.9, max_daily_loss=None)
FLATTEN = {"waits": {"at_end": "flatten"}}


# --- in virtual time

async def stop_at(world, candle):
    "A person asks the session to stop"
    await asyncio.sleep(candle * world.step / 1000 - world.loop.time())
    ask(world, "stop")


def ended(candle=None, script=None, seed=1, **settings):
    "A run that ends with its positions closed: when a person says so, or the candles are done"
    if candle: script = partial(stop_at, candle=candle)
    return simulate(seed, make_trader=partial(a_trader, FREE), candles=12, market_seed=1, script=script,
                    options=FLATTEN, **settings)


def steps_of(run): return [each for name in run.names for each in run.ledger.measured(name, EmergencyStep)]


def wrong_at_end(run):
    "What must never be after such an end, in sentences"
    found, account = list(run.broken), run.world.account()
    if run.error: found.append(run.error)
    if run.processes[-1].end: found.append(f"it ended with {run.processes[-1].end!r}")
    if any(run.world.positions().values()): found.append(f"it is not flat: {run.world.positions()}")
    if any(run.trader.positions["quantity"]): found.append("its trader believes that it holds something")
    found += [f"{each.client_id} works still" for each in account.open.values()]
    twice = [name for name, n in Counter(each.client_id for each in account.orders.values()).items() if n > 1]
    found += [f"{name} was placed twice" for name in twice]
    booked = Counter()
    for name in run.names:
        for _, entry in run.ledger.booked(name):
            if hasattr(entry, "trade_id"): booked[entry.symbol] += entry.quantity
    found += [f"the ledger holds {quantity} of {symbol}" for symbol, quantity in booked.items() if abs(quantity) > 1e-9]
    if run.trader.account["trading_state"][0] != TradingState.NORMAL: found.append("the strategy is halted")
    orders = {each.client_id: each for each in account.orders.values()}
    found += [f"{name} opens" for name, each in orders.items() if int(name.split("-")[3]) >= AT_END
              and not each.reduce_only]
    return found


@cache
def undisturbed(): return ended(candle=8.5)


def test_a_person_stops_a_session_and_it_closes_what_it_holds_and_halts_nobody():
    run = undisturbed()
    assert wrong_at_end(run) == []
    assert run.notices["closing"] == 1
    assert run.notices["emergency"] == run.notices["halt"] == run.notices["kept"] == run.notices["left"] == 0
    assert [each.step for each in steps_of(run)] == ["closing", "closing", "flat", "flat"]
    assert {int(name.split("-")[3]) for name in run.world.executed()} == {0, 1, AT_END}


def test_it_does_so_when_its_candles_are_done():
    run = ended()
    assert wrong_at_end(run) == []
    assert run.notices["closing"] == 1


def test_what_is_kept_is_told_with_its_stop_or_without():
    run = simulate(1, make_trader=partial(a_trader, FREE), candles=8, market_seed=1)
    told = run.ledger.notices("simulated-0")
    there = {symbol: quantity for symbol, quantity in run.world.positions().items() if quantity}
    assert there
    kept = told["text"][told["kind"] == "kept"].tolist()
    assert kept == [f'{symbol} {quantity:+g} stays at simulated, without a stop there (at_end is "keep"): resume the '
                    "session, or close it there" for symbol, quantity in there.items()]


def doors():
    "The numbers of the doors that were gone through while it closed"
    run = undisturbed()
    return run.world.doors(steps_of(run)[0].time, steps_of(run)[-1].time)


@pytest.mark.parametrize("part", range(2))
def test_killed_anywhere_while_it_closes_it_goes_on_when_it_is_resumed_and_closes_at_its_own_end(part):
    "It was stopped once; the process that takes over trades until the world ends, and then closes, too"
    assert len(doors()) > 8
    for door in doors()[part::2]:
        run = ended(candle=8.5, kills=(door,), downtime=lambda: .5)
        assert len(run.processes) == 2
        assert (door, wrong_at_end(run)) == (door, [])


async def cut_off(world):
    "The exchange is away when a person says stop, and stays away"
    await asyncio.sleep(8.4 * world.step / 1000 - world.loop.time())
    world.faults.arm("dns_outage", lasts_ms=10_000_000)
    await stop_at(world, 8.5)


def test_an_exchange_that_is_away_keeps_no_session_from_its_end_and_what_is_left_is_told():
    run = ended(script=cut_off)
    assert not run.error and not run.broken
    there = {symbol: quantity for symbol, quantity in run.world.positions().items() if quantity}
    told = run.ledger.notices("simulated-0")
    left = told["text"][told["kind"] == "left"].tolist()
    assert left == [f"{symbol} {quantity:+g} stays at simulated, without a stop there (it could not be closed in time)"
                    ": resume the session, or close it there" for symbol, quantity in there.items()]
    asked, = (row for row in run.ledger.commands.all() if row["name"] == "stop")
    assert told["time"].max() - asked["time"] < 60_000


# --- over sockets, with stops that stand at the exchange

ENDING = WITHIN | {"at_end": "flatten", "end_patience": 4_000}


def left_over(exchange, live):
    "What is still there after an end that closes, in sentences"
    account, found = exchange.exchange.accounts["main"], []
    if any(held(exchange)): found.append(f"{held(exchange)} is held")
    found += [f"{each.client_id} rests still" for each in account.open.values()]
    found += [f"{each.client_id} protects nothing" for each in stops(exchange)]
    if live.ledger.trading_states.all()[0]["trading_state"] != TradingState.NORMAL: found.append("it is halted")
    booked = sum(entry.quantity for _, entry in live.ledger.booked(live.id) if hasattr(entry, "trade_id"))
    if abs(booked) > 1e-9: found.append(f"the ledger holds {booked}")
    return found


@pytest.mark.integration
def test_closed_at_the_end_the_next_session_trades(tmp_path):
    with localnet(PAIR, deposit=20_000.) as exchange:
        first = session(exchange.url, tmp_path, waits=ENDING)
        asyncio.run(first.run(5))
        assert left_over(exchange, first) == []
        before = names(exchange)
        second = session(exchange.url, tmp_path, id="second", waits=ENDING)
        second.progress = lambda done: done.candles == 3 and os.kill(os.getpid(), signal.SIGTERM)
        asyncio.run(second.run(8))
        assert second.statistics.candles < 8
        assert len(names(exchange) - before) > 2
        assert left_over(exchange, second) == []


@pytest.mark.integration
def test_kept_positions_have_their_stops_and_a_person_is_told(tmp_path):
    said = []
    with localnet(PAIR, deposit=20_000.) as exchange:
        live = session(exchange.url, tmp_path, say=said.append)
        asyncio.run(live.run(5))
        assert all(held(exchange))
        assert {each.kind for each in stops(exchange)} >= {"STOP_MARKET"}
    kept = [line for line in said if line.startswith("kept: ")]
    print(*kept, sep="\n")
    assert len(kept) == 2
    assert all("stays at localnet, with its stop there" in line for line in kept)


@pytest.mark.integration
def test_a_symbol_that_is_not_traded_stays_with_its_stops(tmp_path):
    said = []
    with localnet(PAIR, deposit=20_000.) as exchange:
        live = session(exchange.url, tmp_path, waits=ENDING, say=said.append)
        live.progress = lambda done: done.candles == 4 and exchange.faults.arm(
            [{"at": "step", "do": "suspend", "symbol": "BTCUSDT", "status": "BREAK"}])
        asyncio.run(live.run(6))
        assert held(exchange)[0] and not held(exchange)[1]
        assert {each.n for each in stops(exchange)} == {0}
    assert [re.sub("BTC/USDT:USDT .* stays", "it stays", line) for line in said if line.startswith("left: ")] == [
        "left: it stays at localnet, with its stop there (it could not be closed in time): resume the session, or "
        "close it there"]


def dying(url, folder, name, nth):
    "A session in a process of its own, which closes at its end, and dies at a door"
    DEATH[:] = [name, nth]
    asyncio.run(session(url, folder, Mortal, MortalLedger, waits=ENDING).run(5))


@pytest.mark.integration
@pytest.mark.parametrize("name, nth", [("close sent", 1), ("close answered", 2), ("closing unwritten", 1),
                                       ("flat written", 1)])
def test_killed_while_it_closes_it_goes_on_when_it_is_resumed(name, nth, processes, tmp_path): # noqa: F811
    with localnet(PAIR, deposit=20_000.) as exchange:
        process = processes.Process(target=dying, args=(exchange.url, tmp_path, name, nth))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        again = session(exchange.url, tmp_path, id="", resume="out", waits=ENDING)
        asyncio.run(again.run(3))
        assert again.statistics.candles == 3
        assert left_over(exchange, again) == []
        counted = Counter(each.client_id for each in exchange.exchange.accounts["main"].orders.values())
        assert [each for each, times in counted.items() if times > 1] == []
