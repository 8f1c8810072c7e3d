"A session outlives a ledger that takes nothing, whatever keeps it: a file, full or locked, a server that is gone"
import asyncio
import os
import signal
import sqlite3
import time
from contextlib import contextmanager, suppress

import pandas as pd
import pytest
from postgres import asked, database_at, doubled, go_on, others, pause, terminate
from test_disk import BITCOIN, pages, the_session, the_venue

from tradelab.live.ledger import Ledger
from tradelab.live.messages import LedgerState

pytestmark = pytest.mark.integration


@contextmanager
def file(folder, begin, end):
    "A ledger in a file, and what begins and ends its trouble"
    ledger = Ledger(f"sqlite:///{folder}/tradelab.db", patience=20)
    other = sqlite3.connect(folder / "tradelab.db", check_same_thread=False, isolation_level=None)
    yield ledger, lambda: begin(ledger, other), lambda: end(ledger, other)
    other.close()
    ledger.close()


@contextmanager
def server(own, trouble, begin, end):
    "The same of a ledger at a server; what is begun at its processes is ended there"
    with database_at(own.url, f"session_{trouble}") as url:
        ledger, processes = Ledger(url, patience=200), []

        def beginning():
            with asked(url) as person: processes.extend(others(person))
            begin(own, url, processes)
        yield ledger, beginning, lambda: end(own, url, processes)
        ledger.close()


def tell(url, *words):
    with asked(url) as person:
        for each in words: person.execute(each)


def stall(own, url, processes):
    for process in processes: pause(process)
    tell(own.url, f"ALTER DATABASE {url.rpartition('/')[2]} ALLOW_CONNECTIONS false")


def resume(own, url, processes):
    for process in processes: go_on(process)
    tell(own.url, f"ALTER DATABASE {url.rpartition('/')[2]} ALLOW_CONNECTIONS true")


def read_only(own, url, processes):
    with asked(url) as person:
        person.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET default_transaction_read_only = on")
        terminate(person)


def writable(own, url, processes):
    name = url.rpartition("/")[2]
    tell(own.url, f"ALTER DATABASE {name} RESET default_transaction_read_only",
         f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'")


def kill(own, url, processes):
    "kill -9: the server ends all its connections and recovers, so that it is away for a moment"
    for process in processes:
        with suppress(ProcessLookupError): os.kill(process, signal.SIGKILL) # the first takes others with it


FILES = {"full": (lambda ledger, other: pages(ledger, 1), lambda ledger, other: pages(ledger, 1_000_000)),
         "locked": (lambda ledger, other: other.execute("BEGIN EXCLUSIVE"), lambda ledger, other: other.rollback())}
SERVERS = {"stopped": (lambda own, *_: own.stop(), lambda own, *_: own.start()), "stalled": (stall, resume),
           "read only": (read_only, writable), "killed": (kill, lambda *_: None)}


@pytest.fixture(params=[*FILES, *SERVERS])
def troubled(request, tmp_path):
    "The name of a trouble, a ledger, and what begins and ends it there"
    name = request.param
    if name in FILES: place = file(tmp_path, *FILES[name])
    else: place = server(request.getfixturevalue("own_server"), name, *SERVERS[name])
    with place as made: yield name, *made


def test_a_session_outlives_a_ledger_that_takes_nothing(troubled, tmp_path, capsys):
    "What opens is not sent meanwhile, what reduces is; in the end the ledger holds all of it"
    trouble, ledger, begin, end = troubled
    venue, heard, placed = the_venue(), [], []
    place, put = venue.place, venue.events.put_nowait

    async def noting(order):
        placed.append((live.writer.down, order.reduce_only))
        return await place(order)

    def hearing(news):
        if isinstance(news, LedgerState): heard.append(news)
        put(news)

    def progress(statistics):
        if statistics.candles == 10: begin()
        if statistics.candles == 25:
            end()
            while live.writer.down: time.sleep(.001)
    venue.place, venue.events.put_nowait = noting, hearing
    live = the_session(ledger, tmp_path, venue, progress=progress)
    assert asyncio.run(live.run(50)).candles == 50
    assert (heard[0].ok, heard[-1].ok) == (False, True)     # a small batch may find room meanwhile
    assert "the ledger takes nothing" in heard[0].text
    if trouble in FILES: assert trouble in heard[0].text
    assert (True, False) not in placed                      # nothing was opened that the ledger does not know
    assert len(placed) > 20
    assert ledger.check("disk") == ""
    assert len(ledger.closes("disk")) == len(pd.read_csv(tmp_path / "disk" / "journal.csv")) == 50
    assert not any(intent.works for intent in ledger.intents("disk"))
    assert [kind for kind in ledger.notices("disk")["kind"] if kind != "kept"][-1] == "trading"
    assert doubled(ledger, "disk") == []
    held = sum(fill.quantity for _, fill in ledger.booked("disk"))
    assert held == pytest.approx(float(live.trader.positions["quantity"][0]))
    assert held == pytest.approx(venue.held.snapshot().positions.get(BITCOIN, 0.))
    if trouble != "killed": assert '"type": ' in capsys.readouterr().err     # what could not be written was said
