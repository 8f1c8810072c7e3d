"What is told of a real session, looked at from outside while it trades: nothing that was not, and every closed trade"
import asyncio
from collections import defaultdict
from functools import partial
from itertools import pairwise

import pytest

from tradelab.config import Settings
from tradelab.database.reading import reading
from tradelab.database.records import clock
from tradelab.database.schema import TRADES, record_of
from tradelab.events import Fill
from tradelab.instruments import BITCOIN
from tradelab.live.status import positions_of
from tradelab.ops.feed import Feed, Look
from tradelab.ops.happenings import happenings, settled, trade_of, trades_in
from tradelab.ops.incidents import Incidents, message_of
from tradelab.ops.wording import plain
from tradelab.watching import example_session

KNOWN = {"symbols": [BITCOIN.symbol], "deposit": 1.} # of the session's settings


async def looked(place, until):
    "Happenings between looks, from before the session's first one to its end, and what was told of them"
    feed, machine = Feed(Settings(database=place.database, sessions=place.sessions)), Incidents()
    before, found, said = Look(0), [], []

    def trades(session, symbol):
        with reading(place.database) as look: return trade_of(look, session, status.settings, symbol, clock())
    while True:
        after = settled(before, await feed.look())
        status = after.statuses[0]
        new = await asyncio.to_thread(partial(happenings, before, after, trades, .0001))
        found, before = found + new, after
        for each in new: machine.take(each, clock())
        said += machine.tick(clock())
        if status.state == until: return found, said
        await asyncio.sleep(.01)


@pytest.fixture(scope="module")
def traded():
    "What was told of a session, its fills, what it holds at the end, and its last trade"
    with example_session(60, .01) as place:
        found, said = asyncio.run(looked(place, "stopped"))
        with reading(place.database) as look:
            rows = sorted(look.rows(TRADES, session=place.session), key=lambda row: row["sequence"])
            held = sum(each.quantity for each in positions_of(look, place.session, KNOWN))
            last = trade_of(look, place.session, KNOWN, BITCOIN.symbol, clock())
    return found, said, [record_of(Fill, row) for row in rows], held, last


def test_a_session_begins_trades_and_ends(traded):
    kinds = [each.kind for each in traded[0]]
    assert kinds.index("session started") < kinds.index("position closed") < kinds.index("session stopped")
    assert not {"session died", "session silent", "failed", "venue disconnected"} & set(kinds)


def test_positions_alternate(traded):
    moves = [each for each in traded[0] if each.kind in ("position opened", "position closed")]
    assert len(moves) > 2
    for one, two in pairwise(moves):
        assert one.kind != two.kind
        if one.kind == "position opened": assert one.arguments["side"] == two.arguments["side"]


def test_profits_are_those_of_the_fills(traded):
    found, _, fills, held, last = traded
    trades = [*trades_in(fills, held)]
    assert trades[-1] == last
    known = {round(each.profit, 9) for each in trades}
    closed = [each.arguments for each in found if each.kind == "position closed"]
    assert {round(each["profit"], 9) for each in closed} <= known
    assert all(each["price"] and each["entry"] for each in closed)


def test_trades_are_what_the_exchange_books(traded):
    "Localnet keeps books of its own: the profit of each fill, in whole 1e-8"
    _, _, fills, held, _ = traded
    ends = [n for n, _ in enumerate(fills) if any(True for _ in trades_in(fills[:n + 1], held + sum(
        -each.quantity for each in fills[n + 1:])))]
    booked = sum(each.realised for each in fills[:ends[-1] + 1]) / 1e8 - sum(each.fee for each in fills[:ends[-1] + 1])
    assert sum(each.profit for each in trades_in(fills, held)) == pytest.approx(booked, abs=1e-5)


def test_large_losses_are_those_of_losing_trades(traded):
    large = [each.arguments for each in traded[0] if each.kind == "large loss"]
    lost = [each.arguments for each in traded[0] if each.kind == "position closed" and each.arguments["profit"] < 0]
    assert 0 < len(large) <= len(lost)
    assert all(each["loss"] > 0 and each["ratio"] >= .0001 for each in large)


def test_everything_has_words_in_both_languages(traded):
    for each in traded[0]:
        values = {"session": each.session, **each.arguments}
        for language in ("en", "es"): assert "?" not in plain(each.kind, values, language), each
    assert all(message_of(act, clock(), "es") for act in traded[1])


def test_only_what_is_urgent_is_told(traded):
    assert {act.kind for act in traded[1]} <= {"large loss"}
    by_key = defaultdict(list)
    for act in traded[1]: by_key[act.alert.session, act.alert.subject].append(act)
    assert all(len(acts) == 1 for acts in by_key.values()), "fifteen minutes have not passed"
