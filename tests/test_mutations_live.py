"""Each safeguard of live trading is taken out, one at a time, and the simulation notices: a test that no fault in the
program can fail proves nothing"""
import asyncio
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
from simulated import Process, simulate, trader
from test_simulation_live import SHAPES, met, reference, wrong_in

from tradelab.live import agreement, bookkeeper, session
from tradelab.live import lease as leases
from tradelab.live.ledger import MemoryLedger
from tradelab.live.reconcile import StartRefusedError
from tradelab.live.venue import Outcome
from tradelab.venues import refusals

TIMEOUT = {"at": "request", "method": "POST", "path": "v1/order", "status": 408, "code": -1007, "msg": "Timeout.",
           "times": 3}
# after the first round of questions, and before the second
MATCHED_VERY_LATE = TIMEOUT | {"do": "later", "later_ms": 45_000}
# it is carried out, and no stream tells of it
UNHEARD = TIMEOUT | {"do": "reply", "commit": True, "then": [{"at": "user", "do": "lose", "times": 0,
                                                                        "lasts_ms": 60_000}]}


def killed_at(door):
    "A session that is killed at this door, and started again a moment later"
    run = simulate(1, timeframe="1m", candles=sum(SHAPES["1m"]), market_seed=1, kills=(door,), downtime=lambda: .5)
    return wrong_in(run)


async def at_once(kept, *arguments): return True


def intent_first():
    "A request does not wait until the ledger holds what it sends"
    def found():
        with patch.object(session, "is_kept", at_once):
            return next((wrong for door in range(60, 160) if (wrong := killed_at(door))), [])
    return found


def unknown():
    "What is not proven to be refused counts as refused, and is sent again"
    def refused(*arguments): return outcome if (outcome := proven(*arguments)) is not Outcome.UNKNOWN else Outcome.LATER
    proven = refusals.outcome
    def found():
        with patch.object(refusals, "outcome", refused):
            return wrong_in(met(UNHEARD)[0])
    return found


def second_question():
    "An order that one round of questions does not find counts as absent"
    def end_round(manager, name, found, now):
        manager.searches[name].first = -10**15
        return rounds(manager, name, found, now)
    rounds = agreement.end_round
    def found():
        with patch.object(agreement, "end_round", end_round):
            return absent_and_there(met(MATCHED_VERY_LATE, timeframe="15m")[0])
    return found


def absent_and_there(run):
    "Orders that were called absent, and were carried out"
    there = {name for name, executed in run.world.executed().items() if executed}
    told = [text for name in run.names for text in run.ledger.notices(name).query("kind == 'absent'")["text"]]
    return [text for text in told if text.split(":")[0] in there]


def trade_ids():
    "A trade that is told twice is booked twice"
    def found():
        count = iter(range(10**9))
        with patch.object(bookkeeper, "_key", lambda entry: next(count)):
            return wrong_in(met("twice_delivered")[0])
    return found


async def take_over(world):
    "Another session takes the lease while this one seems to be gone"
    await asyncio.sleep(4.5 * world.step / 1000)
    mine = world.process.session.lease
    leases.acquire(world.process.ledger, replace(mine, session="other", owner="elsewhere"), world.loop.now() + 10**9)


def sent_after_the_lease():
    run = simulate(1, timeframe="1m", candles=10, market_seed=1, script=take_over)
    since = run.world.loop.begin + 5 * run.world.step
    return [order.client_id for order in run.world.account().orders.values() if order.time >= since]


def epoch():
    "A session whose lease is gone writes and sends all the same"
    def found():
        with patch.object(MemoryLedger, "transaction", lambda self, lease=None, durable=False: nullcontext()):
            return sent_after_the_lease()
    return found


async def start_another(world, ends):
    "A second session on the same account and symbols, before the first one holds anything"
    await asyncio.sleep(.3 * world.step / 1000)
    second = Process(world, world.process.ledger, "another", False, trader, {})
    running = asyncio.ensure_future(second.run())
    await asyncio.sleep(4 * world.step / 1000)
    ends.append(second.end)
    second.kill()
    await asyncio.wait([running])


def second_session():
    "What a second session ends with; None if it trades"
    ends = []
    simulate(1, timeframe="1m", candles=10, market_seed=1, script=partial(start_another, ends=ends))
    return ends[0]


def lease():
    "A session takes no lease"
    def found():
        with patch.object(session, "acquire", lambda ledger, wanted, now, expires: replace(wanted, epoch=1)), \
                patch.object(MemoryLedger, "transaction", lambda self, lease=None, durable=False: nullcontext()):
            return [] if isinstance(second_session(), StartRefusedError) else ["two sessions trade"]
    return found


def test_a_second_session_is_refused_and_one_without_its_lease_sends_nothing():
    refused = second_session()
    assert isinstance(refused, StartRefusedError)
    assert "is traded by session simulated-0" in str(refused)
    assert sent_after_the_lease() == []


@pytest.mark.parametrize("safeguard", (intent_first, unknown, second_question, trade_ids, epoch, lease))
def test_without_a_safeguard_the_simulation_finds_what_goes_wrong(safeguard):
    found = safeguard()()
    print(*found, sep="\n")
    assert found


def test_with_all_of_them_it_finds_nothing():
    assert next((wrong for door in range(60, 160, 5) if (wrong := killed_at(door))), []) == []
    for name in (UNHEARD, "twice_delivered", MATCHED_VERY_LATE):
        run, happened = met(name, timeframe="15m")
        assert happened
        assert wrong_in(run) == absent_and_there(run) == []
        assert run.world.positions() == pytest.approx(reference("15m", 1), rel=.15)
