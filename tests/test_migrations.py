"A ledger of an older version: refused with what to type, upgraded with all of its rows, or left as it is"
import random
import re
import sqlite3
import threading

import numpy as np
import pytest
import sqlalchemy as sql
from simulated import simulate, trader_of_orders
from test_ledger import BITCOIN, ETHER, FILL, ORDER, PAID, STOP, rows, worth
from test_simulation_live import wrong_in

from tradelab.database import migrations
from tradelab.database.engine import LedgerError, connected
from tradelab.database.migrations import differences, upgrade
from tradelab.database.records import Balance, Delivery, clock
from tradelab.database.rows import open_database
from tradelab.database.schema import FORMAT, TABLES
from tradelab.live.ledger import Ledger
from tradelab.live.order_states import State

FORMAT_4 = """
CREATE TABLE alerts (session VARCHAR(200) NOT NULL, number BIGINT NOT NULL, time BIGINT, channel TEXT, text TEXT,
    good BOOLEAN, PRIMARY KEY (session, number));
CREATE TABLE balances (session VARCHAR(200) NOT NULL, number BIGINT NOT NULL, time BIGINT, wallet DOUBLE, available
    DOUBLE, PRIMARY KEY (session, number));
CREATE TABLE breaker_events (session VARCHAR(200) NOT NULL, number BIGINT NOT NULL, time BIGINT, name TEXT, state
    TEXT, text TEXT, PRIMARY KEY (session, number));
CREATE TABLE closes (session VARCHAR(200) NOT NULL, open_time BIGINT NOT NULL, equity DOUBLE, drawdown DOUBLE,
    decided BIGINT, sequence BIGINT, event BIGINT, "before" TEXT, link TEXT, replaced TEXT, PRIMARY KEY (session,
    open_time));
CREATE TABLE commands (number BIGINT NOT NULL, name TEXT, reason TEXT, person TEXT, venue TEXT, account TEXT,
    session TEXT, strategy TEXT, symbol TEXT, time BIGINT, epoch BIGINT, answered BIGINT, answer TEXT, PRIMARY KEY
    (number));
CREATE TABLE decisions (session VARCHAR(200) NOT NULL, open_time BIGINT NOT NULL, symbol VARCHAR(200) NOT NULL,
    place INTEGER, close DOUBLE, equity DOUBLE, drawdown DOUBLE, position DOUBLE, target DOUBLE, reason BIGINT,
    value DOUBLE, "limit" DOUBLE, "order" DOUBLE, fill_quantity DOUBLE, fill_price DOUBLE, traded DOUBLE, cash
    DOUBLE, fee DOUBLE, funding DOUBLE, late DOUBLE, PRIMARY KEY (session, open_time, symbol));
CREATE TABLE emergencies (session VARCHAR(200) NOT NULL, number BIGINT NOT NULL, time BIGINT, step TEXT, symbol
    TEXT, text TEXT, PRIMARY KEY (session, number));
CREATE TABLE exchange_health (session VARCHAR(200) NOT NULL, number BIGINT NOT NULL, time BIGINT, what TEXT, good
    BOOLEAN, latency DOUBLE, text TEXT, PRIMARY KEY (session, number));
CREATE TABLE foreign_fills (session VARCHAR(200) NOT NULL, symbol VARCHAR(200) NOT NULL, quantity DOUBLE, price
    DOUBLE, fee DOUBLE, fill_time BIGINT, order_id TEXT, trade_id VARCHAR(200) NOT NULL, protects BOOLEAN, late
    BOOLEAN, realised BIGINT, commission BIGINT, verdict TEXT, PRIMARY KEY (session, symbol, trade_id));
CREATE TABLE formats (format INTEGER NOT NULL, version VARCHAR(40), PRIMARY KEY (format));
CREATE TABLE fundings (session VARCHAR(200) NOT NULL, symbol VARCHAR(200) NOT NULL, amount DOUBLE, funding_time
    BIGINT NOT NULL, sequence BIGINT, PRIMARY KEY (session, symbol, funding_time));
CREATE TABLE incomes (session VARCHAR(200) NOT NULL, kind VARCHAR(200) NOT NULL, number VARCHAR(200) NOT NULL,
    symbol VARCHAR(200) NOT NULL, amount BIGINT, asset TEXT, time BIGINT, trade_id VARCHAR(200) NOT NULL, place
    BIGINT, wallet BIGINT, others BIGINT, PRIMARY KEY (session, kind, number, symbol, trade_id));
CREATE TABLE intents (session VARCHAR(200) NOT NULL, order_id VARCHAR(200) NOT NULL, symbol TEXT, quantity DOUBLE,
    reduce_only BOOLEAN, open_time BIGINT, decision_price DOUBLE, slot BIGINT, kind BIGINT, price DOUBLE, "trigger"
    DOUBLE, callback DOUBLE, in_force BIGINT, expires_in DOUBLE, revision BIGINT, state TEXT, exchange_id TEXT,
    message TEXT, executed DOUBLE, sent_time BIGINT, amending BOOLEAN, PRIMARY KEY (session, order_id));
CREATE TABLE leases (venue VARCHAR(40) NOT NULL, account VARCHAR(200) NOT NULL, symbol VARCHAR(200) NOT NULL,
    session TEXT, owner TEXT, epoch BIGINT, beat BIGINT, PRIMARY KEY (venue, account, symbol));
CREATE TABLE notices (session VARCHAR(200) NOT NULL, number BIGINT NOT NULL, time BIGINT, kind TEXT, text TEXT,
    PRIMARY KEY (session, number));
CREATE TABLE order_events (session VARCHAR(200) NOT NULL, number BIGINT NOT NULL, time BIGINT, order_id TEXT,
    quantity DOUBLE, price DOUBLE, "trigger" DOUBLE, revision BIGINT, state TEXT, exchange_id TEXT, message TEXT,
    executed DOUBLE, PRIMARY KEY (session, number));
CREATE TABLE positions (session VARCHAR(200) NOT NULL, number BIGINT NOT NULL, time BIGINT, symbol TEXT, quantity
    DOUBLE, entry_price DOUBLE, PRIMARY KEY (session, number));
CREATE TABLE sessions (session VARCHAR(200) NOT NULL, started BIGINT, settings TEXT, state TEXT, PRIMARY KEY
    (session));
CREATE TABLE snapshots (session VARCHAR(200) NOT NULL, open_time BIGINT, sequence BIGINT, content TEXT, seal TEXT,
    PRIMARY KEY (session));
CREATE TABLE system_metrics (session VARCHAR(200) NOT NULL, number BIGINT NOT NULL, time BIGINT, name TEXT, value
    DOUBLE, PRIMARY KEY (session, number));
CREATE TABLE trades (session VARCHAR(200) NOT NULL, symbol VARCHAR(200) NOT NULL, quantity DOUBLE, price DOUBLE, fee
    DOUBLE, fill_time BIGINT, order_id TEXT, trade_id VARCHAR(200) NOT NULL, protects BOOLEAN, late BOOLEAN,
    realised BIGINT, commission BIGINT, sequence BIGINT, PRIMARY KEY (session, symbol, trade_id));
CREATE TABLE trading_states (venue VARCHAR(40) NOT NULL, account VARCHAR(200) NOT NULL, strategy VARCHAR(200) NOT
    NULL, trading_state BIGINT, reason TEXT, peak DOUBLE, halted BIGINT, day BIGINT, day_equity DOUBLE, last_equity
    DOUBLE, day_stopped BIGINT, required_state BIGINT, minute BIGINT, orders BIGINT, time BIGINT, session TEXT,
    ladder TEXT, PRIMARY KEY (venue, account, strategy));
"""


MADE_LATER = ("formats", "alerts", "thresholds", "audit", "services", "people", "revoked", "generations", "requests",
              "job_runs")
RENAMED_LATER = {"deliveries": "alerts"}


def in_format_4(url):
    "Write the rows of a ledger as version 0.1.0 wrote them: binary fractions, and no NaN, which was NULL"
    engine, kept = connected(url), {}
    old = re.sub(r"\bDOUBLE\b", "DOUBLE PRECISION", FORMAT_4) if engine.dialect.name == "postgresql" else FORMAT_4
    with engine.begin() as connection:
        for name, table in TABLES.tables.items():
            kept[name] = [dict(row) for row in connection.execute(table.select()).mappings()]
            connection.exec_driver_sql(f"DROP TABLE {name}")
        for statement in filter(str.strip, old.split(";")): connection.exec_driver_sql(statement)
        known = sql.MetaData()
        known.reflect(connection)
        for name, found in kept.items():
            if not found or name in MADE_LATER: continue
            connection.execute(known.tables[RENAMED_LATER.get(name, name)].insert(), [
                {key: None if value != value else value for key, value in row.items()} for row in found])
        connection.exec_driver_sql("INSERT INTO formats VALUES (4, '0.1.0')")
    engine.dispose()


def some_ledger(url):
    "One of everything, with orders that are open"
    ledger = Ledger(url)
    ledger.open_session("one", {"symbols": [BITCOIN]})
    ledger.intend("one", [ORDER, STOP])
    ledger.advance("one", ledger.intents("one")[0], State.SENT, sent_time=7)
    for number, entry in enumerate((FILL, PAID)): ledger.book("one", entry, number)
    for time in (0, 3_600_000): ledger.step("one", [ETHER, BITCOIN], without_holes(time), {"a": [.1]}, 1, worth(time))
    ledger.measure("one", Balance(clock(), 1 / 3))
    ledger.measure("one", Delivery(clock(), "telegram", "a halt", False))
    ledger.notice("one", "halt", "an example")
    return ledger


def without_holes(time):
    made = rows(time)
    made["close"] = np.nan_to_num(made["close"])
    return made


def contents(ledger):
    "All that it says"
    return (ledger.sessions(), ledger.intents("one"), ledger.booked("one"), ledger.rows("one")[1][1].tobytes(),
            ledger.snapshot("one"), ledger.order_events("one"), ledger.measured("one", Balance),
            ledger.measured("one", Delivery), ledger.link("one"),
            ledger.closes("one").tobytes(), ledger.check("one"), list(ledger.notices("one")["text"]))


def test_an_older_ledger_is_refused_with_what_to_type_and_upgraded_to_the_last_bit(database_url):
    ledger = some_ledger(database_url)
    before = contents(ledger)
    ledger.close()
    in_format_4(database_url)
    with pytest.raises(ValueError, match="is of format 4, written by tradelab 0.1.0: this version reads format 8, "
                       "`tradelab ledger upgrade` brings it there, and keeps a copy"):
        Ledger(database_url)
    said = upgrade(database_url)
    assert f"is of format {FORMAT} now" in said
    again = Ledger(database_url)
    assert contents(again) == before
    assert before[-2] == ""
    again.close()
    engine = connected(database_url)
    with engine.connect() as connection: assert differences(connection) == []
    engine.dispose()
    assert upgrade(database_url).endswith("already: nothing was done")


def test_the_copy_is_the_ledger_as_it_was(tmp_path):
    url = f"sqlite:///{tmp_path}/tradelab.db"
    some_ledger(url).close()
    in_format_4(url)
    assert str(tmp_path / "tradelab.db.format-4") in upgrade(url)
    with pytest.raises(ValueError, match="is of format 4"): Ledger(f"sqlite:///{tmp_path}/tradelab.db.format-4")
    with sqlite3.connect(tmp_path / "tradelab.db.format-4") as copy:
        assert copy.execute("SELECT typeof(price), count(*) FROM trades").fetchall() == [("real", 1)]


OF_FORMAT_4 = re.findall(r"CREATE TABLE (\w+)", FORMAT_4)


def untouched(url, error, why=None):
    "An upgrade that fails so leaves everything"
    with connected(url).connect() as connection:
        before = [connection.exec_driver_sql(f"SELECT * FROM {name} ORDER BY 1, 2").all() for name in OF_FORMAT_4]
    with pytest.raises(error, match=why): upgrade(url, patience=20)
    with connected(url).connect() as connection:
        after = [connection.exec_driver_sql(f"SELECT * FROM {name} ORDER BY 1, 2").all() for name in OF_FORMAT_4]
    assert after == before


@pytest.fixture
def old(database_url):
    some_ledger(database_url).close()
    in_format_4(database_url)
    return database_url


def test_a_step_that_fails_leaves_the_old_ledger(old, monkeypatch):
    def torn(operations):
        complete(operations)
        raise ZeroDivisionError
    complete = migrations.MIGRATIONS[5]
    monkeypatch.setitem(migrations.MIGRATIONS, 5, torn)
    untouched(old, ZeroDivisionError)


def test_a_row_that_does_not_arrive_leaves_the_old_ledger(old, monkeypatch):
    def losing(operations):
        complete(operations)
        operations.execute("DELETE FROM notices")
    complete = migrations.MIGRATIONS[5]
    monkeypatch.setitem(migrations.MIGRATIONS, 5, losing)
    with pytest.raises(LedgerError, match="cannot be brought to format 8: notices would not be as it must; nothing "
                       "was changed"):
        upgrade(old)
    monkeypatch.undo()
    assert "is of format 8 now" in upgrade(old)


def test_a_ledger_on_which_a_session_works_is_not_upgraded(old):
    with connected(old).begin() as connection:
        connection.exec_driver_sql(f"INSERT INTO leases VALUES ('testnet', 'a', 'b', 'one', 'me', 1, {clock()})")
    untouched(old, ValueError, "session one is at work on the ledger .*, it was heard of .* s ago: stop it, or wait 20")


def test_a_locked_file_is_left(tmp_path):
    url = f"sqlite:///{tmp_path}/tradelab.db"
    some_ledger(url).close()
    in_format_4(url)
    other = sqlite3.connect(tmp_path / "tradelab.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="the ledger takes nothing: database is locked"): upgrade(url, patience=20)
    other.rollback()
    other.close()
    assert "is of format 8 now" in upgrade(url)


def test_two_who_upgrade_at_once_do_it_once(old):
    said = []
    both = [threading.Thread(target=lambda: said.append(upgrade(old))) for _ in range(2)]
    for each in both: each.start()
    for each in both: each.join()
    assert sum("is of format 8 now" in each for each in said) == 1
    assert sum("by somebody else" in each or "nothing was done" in each for each in said) == 1
    with connected(old).connect() as connection:
        assert connection.exec_driver_sql("SELECT format FROM formats ORDER BY format").scalars().all() == [4, FORMAT]
        assert differences(connection) == []


def test_many_who_open_a_new_ledger_at_once_make_it_once(database_url):
    made, trouble = [], []
    def make():
        try: made.append(open_database(database_url, 10_000))
        except Exception as error: trouble.append(error)
    all_of_them = [threading.Thread(target=make) for _ in range(6)]
    for each in all_of_them: each.start()
    for each in all_of_them: each.join()
    assert trouble == []
    with made[0].connect() as connection: assert differences(connection) == []
    for each in made: each.dispose()


@pytest.mark.parametrize("seed", range(3))
def test_a_session_with_open_orders_goes_on_over_a_migration(database_url, tmp_path, seed):
    "Killed under the old version, the ledger upgraded, resumed under the new one: as if nothing had been"
    url, chance, open_orders = database_url, random.Random(seed), []
    ledger = Ledger(url)

    def downtime():
        open_orders.extend(intent for name in ledger.sessions() for intent in ledger.intents(name) if intent.works)
        in_format_4(url)
        with connected(url).begin() as connection: connection.exec_driver_sql("UPDATE leases SET beat = 0")
        with pytest.raises(ValueError, match="is of format 4"): Ledger(url)
        upgrade(url)
        return 1.
    run = simulate(seed, lambda: trader_of_orders(seed), downtime, ledger=ledger, candles=20, market_seed=seed,
                   kills=[chance.randint(100, 400) for _ in range(3)])
    assert not wrong_in(run)
    assert len(run.processes) > 1
    if url.startswith("sqlite"): assert len(list(tmp_path.glob("*.format-4*"))) == len(run.processes) - 1
    assert open_orders
    assert [ledger.check(name) for name in run.names] == [""] * len(run.names)
    ledger.close()
