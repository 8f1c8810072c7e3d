"A real PostgreSQL that is killed, stopped, stalled and cut off along the order path: nothing is lost, nothing is twice"
import asyncio
import threading
import time
from collections import Counter
from functools import partial
from socket import create_connection, create_server

import pytest
import sqlalchemy as sql
from postgres import asked, database_at, doubled, go_on, others, pause, terminate
from simulated import simulate, trader_of_orders
from test_simulation_live import wrong_in

from tradelab.database.engine import LedgerError, connected
from tradelab.database.records import Asked
from tradelab.database.rows import was_kept
from tradelab.live import session as sessions
from tradelab.live.ledger import Ledger
from tradelab.live.messages import Entry, Moved
from tradelab.writer import Writer

pytestmark = pytest.mark.integration


def at(ledger, moment, do):
    "Do something at each first or last statement of a transaction, or at its commit"
    fresh = threading.local()

    def beginning(connection): fresh.yes = True

    def before(connection, cursor, statement, *_):
        first, last = getattr(fresh, "yes", False), "pg_current_xact_id" in statement
        fresh.yes = False
        if moment == "first" and first or moment == "last" and last: do()

    def committing(connection):
        if moment == "commit": do()
    for what, do_it in (("begin", beginning), ("before_cursor_execute", before), ("commit", committing)):
        sql.event.listen(ledger._database.engine, what, do_it)


def actions(records):
    "What a transaction is about, by name"
    names = {Moved: lambda each: f"Moved {each.after.state.value}", Entry: lambda each: type(each.entry).__name__}
    return {names.get(type(each), lambda each: type(each).__name__)(each) for each in records} or {"beat"}


class Killer:
    "Ends the connection at each action when it is met for the first time, and twice more; never at the next attempt"
    TIMES, APART = 3, 6

    def __init__(self, monkeypatch, person):
        self.person, self.records, self.again, self.world = person, (), False, None
        self.met, self.killed, self.since, keep = set(), Counter(), 0, sessions.keep

        def noting(session, records):
            self.again, self.records = records is self.records, records
            keep(session, records)
        monkeypatch.setattr(sessions, "keep", noting)

    def __call__(self):
        if not self.world or self.world.over or not self.world.process or self.world.process.dead: return
        names = actions(self.records)
        self.met |= names
        self.since += 1
        fewest = min(self.killed[name] for name in names)
        if self.again or fewest == self.TIMES or fewest and self.since < self.APART: return
        self.killed.update(names)
        self.since = 0
        terminate(self.person)


ORDER_PATH = {"Intents", "Moved sent", "Moved working", "Moved filled", "Fill", "Step", "Standing"}


@pytest.mark.parametrize("moment, seed", [("first", 0), ("last", 1), ("commit", 2)])
def test_a_connection_that_is_killed_at_each_action_loses_and_doubles_nothing(postgres, monkeypatch, moment, seed):
    "Each action of the order path meets it when its transaction begins, ends and is committed"
    ledger = Ledger(postgres)
    with asked(postgres) as person:
        kill = Killer(monkeypatch, person)

        async def script(world):
            await asyncio.sleep(3 * world.step / 1000)
            kill.world = world
            at(ledger, moment, kill)
            await asyncio.sleep(10 * world.step / 1000)
            kill.world = None
        run = simulate(seed, lambda: trader_of_orders(seed), ledger=ledger, candles=15, market_seed=seed, script=script)
    assert not wrong_in(run)
    assert kill.met == set(kill.killed)
    assert kill.met >= ORDER_PATH
    assert run.notices["ledger"] >= 4                   # it was said, and that it was over
    assert len(ledger.intents(run.names[-1])) > 10
    assert [ledger.check(name) for name in run.names] == [""] * len(run.names)
    assert doubled(ledger, run.names[-1]) == []
    kept = ledger.notices(run.names[-1])
    assert len(kept) == len(kept.drop_duplicates(["time", "kind", "text"]))
    ledger.close()


def test_a_number_that_the_server_has_forgotten_was_not_kept(postgres):
    "As after kill -9 of one of its processes: what had not reached its log is gone, numbers of transactions, too"
    with connected(postgres).begin() as connection:
        assert was_kept(connection, str(10**15)) is False
        assert connection.execute(sql.text("SELECT 1")).scalar() == 1   # and the transaction goes on


class Wire:
    "Between client and server; when `cut` is set, the next COMMIT is passed on, and its answer is not"
    def __init__(self, port):
        self.port, self.cut, self.listening = port, False, create_server(("127.0.0.1", 0))
        self.address = self.listening.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try: near, _ = self.listening.accept()
            except OSError: return
            far, lost = create_connection(("127.0.0.1", self.port)), threading.Event()
            for way in (partial(self.pass_on, near, far, lost, True), partial(self.pass_on, far, near, lost, False)):
                threading.Thread(target=way, daemon=True).start()

    def pass_on(self, source, target, lost, asking):
        try:
            while data := source.recv(65_536):
                if asking and self.cut and b"COMMIT" in data:
                    self.cut = False
                    lost.set()
                if not asking and lost.is_set(): break # the server has answered
                target.sendall(data)
        except OSError: pass
        for each in (source, target): each.close()


def test_a_commit_whose_answer_is_lost_is_not_made_twice(own_server):
    with database_at(own_server.url, "lost") as url:
        wire = Wire(own_server.port)
        ledger = Ledger(url.replace(str(own_server.port), str(wire.address)), patience=500)
        attempts = []

        def keep(records):
            with ledger.transaction(durable=True) as fresh:
                attempts.append(fresh)
                for record in records if fresh else (): ledger.notice("one", "halt", record)
        told = []
        writer = Writer(keep, told.append, told.append, retry=.01)
        writer.put(["first"]).result(5)
        wire.cut = True
        assert writer.put(["second"]).result(5) is False
        while writer.down: time.sleep(.001)
        assert writer.put(["third"]).result(5) is True
        assert writer.close() == 0
        assert list(ledger.notices("one")["text"]) == ["first", "second", "third"]
        assert attempts == [True, True, False, True]
        assert "the ledger takes nothing: " in str(told[0])
        assert told[1] == "nothing is lost"
        ledger.close()
        wire.listening.close()


@pytest.mark.parametrize("moment", ["first", "last", "commit"])
def test_a_server_that_is_silent_is_said_soon_and_what_it_does_later_counts_once(own_server, moment):
    "The process behind the connection is stopped, as by a disk that does not answer; it goes on after some attempts"
    with database_at(own_server.url, f"silent_{moment}") as url, asked(url) as person:
        ledger, stopped, told = Ledger(url, patience=100), [], []

        def stall():
            if stopped: return
            stopped.extend(others(person))
            for process in stopped: pause(process)

        def keep(records):
            if told: attempts.append(records)
            with ledger.transaction(durable=True) as fresh:
                for record in records if fresh else (): ledger.notice("one", "halt", record)
        attempts = []
        writer = Writer(keep, told.append, told.append, retry=.05)
        writer.put(["first"]).result(5)
        at(ledger, moment, stall)
        begun = time.monotonic()
        assert writer.put(["second"]).result(20) is False
        assert time.monotonic() - begun < 5.
        assert "has said nothing for 0.1 s" in str(told[0])
        while len(attempts) < 2 and writer.down: time.sleep(.001)
        for process in stopped: go_on(process)
        while writer.down: time.sleep(.001)
        assert writer.put(["third"]).result(5) is True
        assert writer.close() == 0
        assert list(ledger.notices("one")["text"]) == ["first", "second", "third"]
        ledger.close()


def test_a_server_that_is_away_is_one_sentence_at_a_start(own_server):
    own_server.stop()
    try:
        with pytest.raises(LedgerError, match="the ledger postgresql.* cannot be opened .*refused.*check that its "
                           "folder or server exists"):
            Ledger(own_server.url)
    finally: own_server.start()


def test_a_password_is_in_no_sentence(own_server):
    with pytest.raises(LedgerError) as told:
        Ledger(own_server.url.replace("postgres@", "trader:hidden1@").replace(f":{own_server.port}", ":1"))
    assert "hidden1" not in str(told.value)


def test_many_who_write_at_once_have_a_number_each(postgres):
    "Commands belong to no session: people ask from several processes at once"
    Ledger(postgres).close()
    numbers = []

    def ask():
        ledger = Ledger(postgres, patience=10_000)
        numbers.extend(ledger.commands.ask(Asked("halt", "an example", "Ada")) for _ in range(10))
        ledger.close()
    people = [threading.Thread(target=ask) for _ in range(4)]
    for each in people: each.start()
    for each in people: each.join()
    assert sorted(numbers) == list(range(1, 41))


def test_who_ask_at_once_under_one_id_ask_once(database_url):
    Ledger(database_url).close()
    numbers = []

    def ask():
        ledger = Ledger(database_url, patience=10_000)
        numbers.append(ledger.commands.ask(Asked("order", "an example", "Ada", arguments='{"side": "buy"}', id="a-1")))
        ledger.close()
    people = [threading.Thread(target=ask) for _ in range(6)]
    for each in people: each.start()
    for each in people: each.join()
    assert numbers == [1] * 6
    ledger = Ledger(database_url)
    with pytest.raises(ValueError, match="order was asked for under the id a-1, which is that of command 1, another "):
        ledger.commands.ask(Asked("order", "an example", "Ada", arguments='{"side": "sell"}', id="a-1"))
    assert [(row["id"], row["arguments"]) for row in ledger.commands.all()] == [("a-1", '{"side": "buy"}')]
    ledger.close()
