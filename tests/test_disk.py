"A disk that is full, a database that is locked, a ledger that is another: it is said, and nothing is lost by it"
import asyncio
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from sqlalchemy import event

from tradelab.database.engine import LedgerError
from tradelab.database.records import Lease, LeaseLostError, clock
from tradelab.evaluation.difference import first_difference
from tradelab.live.lease import acquire, this_process
from tradelab.live.ledger import Ledger, MemoryLedger
from tradelab.live.order_states import State
from tradelab.live.reconcile import StartRefusedError
from tradelab.live.recorder import Recording, read
from tradelab.live.replay import replay
from tradelab.live.session import Session
from tradelab.market.synthetic import ar1
from tradelab.orders import Order
from tradelab.runs.run import Run
from tradelab.sim.prepared import market_data
from tradelab.strategies.example import Momentum
from tradelab.venues.memory import MemoryVenue
from tradelab.writer import Writer

FRAME, FIRST, BITCOIN = ar1(80, volatility=.01, seed=3), 20, "BTC/USDT:USDT"
POLICY = Momentum(2, .001)
ORDER = Order("tl-1", BITCOIN, -.003, False, 0, 16_529.6)


def the_session(ledger, folder, venue, **options):
    trader = Run("memory", POLICY, timeframe="1h").trader(instruments=venue.data.instruments)
    given = dict(id="disk", say=lambda line: None, waits={"retries": 0}) | options
    return Session(trader, venue, ledger, folder, **given)


class Lockstep(MemoryVenue):
    "The next candle closes when the session has said that it waits for it"
    waited = -1

    def go_on(self):
        if self._met and self.waited < self.data.times[self.row]: return False
        return super().go_on()

    async def waits(self, open_time, trade=None):
        self.waited = open_time
        if self.events.empty(): self.go_on()


def the_venue():
    data = market_data(FRAME)
    return Lockstep(data, start=int(data.times[FIRST]))


def pages(ledger, most):
    "From now on no connection to a ledger lets its file grow beyond so many pages; SQLite keeps those that there are"
    for engine in (ledger._database.engine, ledger._database._durable):
        event.listen(engine, "checkout", lambda connection, *_: connection.execute(f"PRAGMA max_page_count = {most}"))


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(f"sqlite:///{tmp_path}/tradelab.db", patience=20)
    yield made
    made.close()


def test_a_full_disk_leaves_all_of_a_batch_or_nothing(ledger):
    ledger.intend("one", [ORDER])
    pages(ledger, 1)
    big = {"account": ["x" * 100_000]}
    with pytest.raises(LedgerError, match="the ledger takes nothing: database or disk is full"), ledger.transaction():
        ledger.advance("one", ledger.intents("one")[0], State.SENT)
        ledger.keep("one", 0, big, 0)
    assert [intent.state for intent in ledger.intents("one")] == [State.INTENT]
    assert len(ledger.order_events("one")) == 1
    pages(ledger, 1_000_000)
    with ledger.transaction():
        ledger.advance("one", ledger.intents("one")[0], State.SENT)
        ledger.keep("one", 0, big, 0)
    assert [intent.state for intent in ledger.intents("one")] == [State.SENT]


def test_a_locked_database_is_outlived_by_the_writer(ledger, tmp_path, capsys):
    told = []
    def keep(orders):
        with ledger.transaction(durable=True): ledger.intend("one", orders)
    writer = Writer(keep, told.append, told.append, lambda order: order.order_id, retry=.005)
    other = sqlite3.connect(tmp_path / "tradelab.db", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    orders = [replace(ORDER, order_id=f"tl-{n}", open_time=n) for n in range(3)]
    assert writer.put(orders[:1]).result(5) is False
    assert writer.put(orders[1:2]).result(0) is False
    assert ledger.intents("one") == []                       # whoever reads is not held up
    other.rollback()
    while writer.down: time.sleep(.001)
    assert writer.put(orders[2:]).result(5) is True
    assert writer.close() == 0
    assert [intent.order for intent in ledger.intents("one")] == orders
    assert [str(each) for each in told] == ["the ledger takes nothing: database is locked", "nothing is lost"]
    assert capsys.readouterr().err.split()[0] == "tl-0"
    other.close()


CHILD = """
import asyncio, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_disk import Ledger, the_session, the_venue
folder = Path(sys.argv[2])

def progress(statistics):
    "From the eighth candle on no file may grow, until the twentieth"
    if statistics.candles == 8: resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    if statistics.candles == 20: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

session = the_session(Ledger(f"sqlite:///{folder}/tradelab.db", patience=20), folder, the_venue(), progress=progress)
assert asyncio.run(session.run(30)).candles == 30
"""


def test_a_session_outlives_a_disk_on_which_no_file_grows(tmp_path):
    "Ledger, recording, tables and session.json at once, by the limit of the kernel"
    here = Path(__file__).parent
    ran = subprocess.run([sys.executable, "-c", CHILD, here, tmp_path], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3_000:]
    assert '"type": "Step"' in ran.stderr
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    assert ledger.check("disk") == ""
    assert len(ledger.closes("disk")) == 30
    assert ledger.session("disk")["state"] == "stopped"
    told = Recording(tmp_path / "disk" / "recording.zst")
    lines = list(told)
    assert (told.damage, told.ended, told.lost) == ("", True, 0)
    trader = Run("memory", POLICY, timeframe="1h").trader(instruments=the_venue().data.instruments)
    assert first_difference(*replay(lines, trader)) is None
    table = pd.read_csv(tmp_path / "disk" / "journal.csv")
    assert table["equity"].to_list() == ledger.journal("disk")["equity"].to_list()
    ledger.close()


@pytest.fixture
def stopped(tmp_path):
    "A session that was stopped twice, the ledger of its first stop, and a way to resume it"
    venue = the_venue()
    def run(**name):
        ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
        try: return asyncio.run(the_session(ledger, tmp_path, venue, **name).run(12))
        finally: ledger.close()
    run()
    shutil.copy(tmp_path / "tradelab.db", tmp_path / "older.db")
    run(id="", resume="disk")
    return lambda: run(id="", resume="disk")


def contents(folder): return {path.name: path.read_bytes() for path in (folder / "disk").iterdir()
                              if path.name != "lock"}


def changed(folder, command):
    with sqlite3.connect(folder / "tradelab.db") as connection: assert connection.execute(command).rowcount > 0
    connection.close()


def test_a_session_goes_on_where_everything_is_as_it_was(stopped): assert stopped().candles == 12


@pytest.mark.parametrize("name", ["session.json", "recording.zst"])
def test_an_older_ledger_is_named_by_each_of_the_files_and_nothing_is_changed(stopped, tmp_path, name):
    other = {"session.json": "recording.zst", "recording.zst": "session.json"}[name]
    (tmp_path / "disk" / other).unlink()
    shutil.copy(tmp_path / "older.db", tmp_path / "tradelab.db")
    before = contents(tmp_path)
    with pytest.raises(StartRefusedError, match="the ledger is an older copy, or not the one of session disk: "
                       f"{name} knows its step of .*, the ledger ends at .*: bring back the ledger that it traded "
                       "with, or start a new session; nothing was changed"):
        stopped()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command, wrong", [
    ("UPDATE trades SET price = price * 2 WHERE sequence = 3", "its close of .* is not as it was written"),
    ("DELETE FROM trades WHERE sequence = 3", "its close of .* is not as it was written"),
    ("UPDATE closes SET equity = 0 WHERE open_time = (SELECT min(open_time) FROM closes)", "its close of"),
    ("DELETE FROM closes WHERE open_time = (SELECT max(open_time) FROM closes)", "its last step|its close of"),
    ("UPDATE decisions SET position = 7 WHERE open_time = (SELECT max(open_time) FROM decisions)", "its last step"),
    ("UPDATE snapshots SET content = replace(content, '0', '1')", "its last step is not as it was written"),
    ("UPDATE intents SET state = 'unknown' WHERE order_id = (SELECT min(order_id) FROM intents)", "its order tl-"),
    ("DELETE FROM intents WHERE order_id = (SELECT min(order_id) FROM intents)", "its order tl-"),
    ("UPDATE order_events SET executed = 9 WHERE number = 2", "its close of .* is not as it was written")])
def test_an_edited_ledger_is_named_and_nothing_is_changed(stopped, tmp_path, command, wrong):
    changed(tmp_path, command)
    before = contents(tmp_path)
    with pytest.raises(StartRefusedError, match=f"changed after session disk wrote it: ({wrong})|the ledger ends at"):
        stopped()
    assert contents(tmp_path) == before


def test_a_truncated_ledger_is_named_and_nothing_is_changed(stopped, tmp_path):
    file = tmp_path / "tradelab.db"
    whole = file.read_bytes()
    before = contents(tmp_path)
    for length in (len(whole) // 2, 5_000, 100):
        file.write_bytes(whole[:length])
        with pytest.raises((OSError, StartRefusedError), match="the ledger"): stopped()
        assert file.read_bytes()[:length] == whole[:length]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "folder", "gone"])
def test_a_damaged_recording_stops_no_resumption(stopped, tmp_path, damage):
    file = tmp_path / "disk" / "recording.zst"
    whole = bytearray(file.read_bytes())
    if damage == "flipped": whole[len(whole) // 2] ^= 1
    file.unlink()
    if damage in ("cut", "flipped"): file.write_bytes(whole[:-9] if damage == "cut" else whole)
    if damage == "empty": file.touch()
    if damage == "folder": file.mkdir()
    assert stopped().candles == 12
    assert len(list(read(file))) > 12
    assert json.loads((tmp_path / "disk" / "session.json").read_text())["state"] == "stopped"


def test_a_session_whose_lease_is_gone_writes_and_sends_nothing_more(ledger, tmp_path):
    "Another one takes over after the tenth candle, as it may when this one has slept"
    venue, placed, sent = the_venue(), [], []
    place = venue.place

    async def noting(order):
        placed.append(order.order_id)
        return await place(order)

    def progress(statistics):
        if statistics.candles != 10: return
        sent.extend(intent for intent in ledger.intents("disk") if intent.sent_time)
        acquire(ledger, replace(live.lease, session="other", owner="elsewhere process 1"), clock() + 60_000)
    venue.place = noting
    live = the_session(ledger, tmp_path, venue, progress=progress)
    with pytest.raises(LeaseLostError, match="session other in elsewhere process 1 has taken over BTC/USDT:USDT"):
        asyncio.run(live.run(40))
    assert len(ledger.closes("disk")) <= 10
    assert placed
    assert set(placed) <= {intent.order.order_id for intent in sent}


def test_of_many_that_want_a_lease_at_once_one_gets_it(database_url):
    url = database_url
    Ledger(url).close()

    def want(number):
        ledger, wanted = Ledger(url), Lease("testnet", "a", (BITCOIN,), f"s{number}", f"elsewhere process {number}")
        try: return acquire(ledger, wanted, 1_000)
        except (StartRefusedError, LedgerError) as error: return error
        finally: ledger.close()
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(want, range(8)))
    assert sum(isinstance(each, Lease) for each in got) == 1


def test_all_ledgers_keep_leases_states_and_commands_alike(ledger, postgres):
    for each in (ledger, MemoryLedger(), Ledger(postgres)):
        first = acquire(each, Lease("testnet", "a", (BITCOIN,), "one", this_process()), 1_000)
        second = acquire(each, Lease("testnet", "a", (BITCOIN,), "two", this_process()), 60_000)
        assert (first.epoch, second.epoch) == (1, 2)
        with pytest.raises(LeaseLostError), each.transaction(first, durable=True): each.intend("one", [ORDER])
        assert each.intents("one") == []
        with each.transaction(second, durable=True): each.intend("two", [ORDER])
        assert len(each.intents("two")) == 1
