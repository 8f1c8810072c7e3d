"What those write who serve sessions, in both databases: together, twice, beside a session, and where nothing is taken"
import threading

import pytest
from postgres import asked, terminate

from tradelab.database.engine import LedgerError
from tradelab.database.operations import Operations, _keep_beside, serving
from tradelab.database.reading import MissingLedgerError, reading
from tradelab.database.records import EXPIRES, Alert, Audited, Delivery, Service, SystemMetric, Threshold
from tradelab.database.schema import ALERTS, AUDIT, MEASURED, SERVICES, THRESHOLDS, record_of
from tradelab.live.ledger import Ledger


@pytest.fixture
def ledger(database_url):
    made = Ledger(database_url, patience=10_000)
    yield made
    made.close()


@pytest.fixture
def operations(database_url, ledger):
    made = Operations(database_url, 10_000)
    yield made
    made.close()


def rows(url, table, **where):
    with reading(url) as look: return look.rows(table, **where)


def at_once(*calls):
    "What each gave, all begun together"
    given = []
    threads = [threading.Thread(target=lambda call=call: given.append(call())) for call in calls]
    for each in threads: each.start()
    for each in threads: each.join()
    return given


def test_everything_comes_back_as_it_was_written(database_url, operations):
    alert = Alert(0, 7, "large_loss", "critical", "demo", "BTC/USDT:USDT", '{"loss": -12.5}', "it lost 12.5 %")
    assert operations.raise_alert(alert) == 1
    assert record_of(Alert, rows(database_url, ALERTS)[0]) == Alert(**{**vars(alert), "number": 1, "last_time": 7})
    limit = Threshold("equity{session=\"demo\"}", "RISK", "<", 1 / 3, .1, "an example", "Ada", 7)
    operations.set_threshold(limit)
    assert record_of(Threshold, rows(database_url, THRESHOLDS)[0]) == limit
    audited = Audited(7, "Ada\0", "telegram", "halt", "demo", "done", "halted \ud800")
    assert operations.audit(audited) == 1
    assert record_of(Audited, rows(database_url, AUDIT)[0]) == Audited(
        7, "Ada�", "telegram", "halt", "demo", "done", "halted ?")
    sent = Delivery(7, "telegram", "it lost", False, 1)
    operations.delivered("demo", [sent])
    assert record_of(Delivery, rows(database_url, MEASURED[Delivery])[0]) == sent


def test_many_who_write_at_once_lose_and_double_nothing(database_url, ledger):
    "Two services, a bot and a session"
    people = [Operations(database_url, 10_000) for _ in range(3)]
    numbers = at_once(*[lambda each=each, n=n: each.raise_alert(Alert(0, n, "stop", "error"))
                        for n in range(4) for each in people])
    assert sorted(set(numbers)) == [1, 2, 3, 4]
    assert len(rows(database_url, ALERTS)) == 4
    said = at_once(*[lambda each=each: each.acknowledge(1, "Ada", 7) for each in people])
    assert sorted(each.partition(":")[0] for each in said) == ["alert 1 is acknowledged by Ada", "refused", "refused"]
    at_once(*[lambda each=each: each.measure("demo", [SystemMetric(7, "memory", 1.)] * 5) for each in people],
            lambda: ledger.measure("demo", *[SystemMetric(8, "memory", 2.)] * 15))
    kept = [(row["number"], row["time"]) for row in rows(database_url, MEASURED[SystemMetric])]
    assert kept == [(n, 7) for n in range(-15, 0)] + [(n, 8) for n in range(1, 16)]
    for each in people: each.close()


def test_what_was_looked_at_is_kept_with_the_alerts_of_it_or_not_at_all(database_url, operations):
    old, new = Service("alerts", "the old one", 7, 7), Service("alerts", "the new one", 8, 8 + EXPIRES)
    assert operations.take(old, [Alert(0, 7, "stop", "error")], {"demo": 3, "other": 1}) == [1]
    with pytest.raises(TypeError): operations.take(old, [Alert(0, 8, "stop", "error"), None], {"demo": 4})
    assert operations.cursors("alerts") == {"demo": 3, "other": 1}
    assert len(rows(database_url, ALERTS)) == 1
    assert operations.take(new, [], {"demo": 5, "other": 1}) == []
    assert operations.cursors("alerts") == {"demo": 5, "other": 1}
    assert [row["owner"] for row in rows(database_url, SERVICES)] == ["the new one"]


def test_a_service_that_has_ended_or_is_silent_serves_nobody(database_url, operations):
    serve = Service("serve", "me", 7, 60_000)
    operations.beat(Service("watchdog", "it", 7, 60_000))
    assert not serving(database_url, 60_000)
    operations.beat(serve)
    assert serving(database_url, 60_000 + EXPIRES - 1)
    assert not serving(database_url, 60_000 + EXPIRES)
    assert not serving(database_url, 60_000 - EXPIRES) # a clock was set back
    operations.end(serve)
    assert not serving(database_url, 60_000)


@pytest.mark.integration
def test_a_session_waits_for_nobody_who_hangs_while_he_writes(postgres):
    ledger, hanging = Ledger(postgres, patience=500), Operations(postgres, 10_000)
    with hanging._alone() as database:
        _keep_beside(database, "demo", [SystemMetric(7, "memory", 1.), Delivery(7, "telegram", "a halt")])
        ledger.measure("demo", SystemMetric(8, "memory", 2.), Delivery(8, "json", "a halt"))
        with pytest.raises(LedgerError, match="the ledger takes nothing: "):
            Operations(postgres, 100).beat(Service("serve", "me", 7, 7))
    assert [row["number"] for row in rows(postgres, MEASURED[Delivery])] == [-1, 1]
    hanging.close()
    ledger.close()


@pytest.mark.integration
def test_a_server_that_ends_connections_is_one_error_and_found_again(postgres):
    operations, serve = Operations(postgres), Service("serve", "me", 7, 7)
    with pytest.raises(MissingLedgerError): operations.beat(serve)
    Ledger(postgres).close()
    operations.beat(serve)
    with asked(postgres) as person: terminate(person)
    operations.beat(serve) # it is asked whether it is there before it is used
    with asked(postgres) as person, pytest.raises(LedgerError), operations._alone() as database:
        terminate(person)
        database.read(SERVICES.select())
    operations.beat(serve)
    operations.close()
