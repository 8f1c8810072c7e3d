"Every ledger is asked the same questions: the one in memory, SQLite, and a real PostgreSQL"
from dataclasses import astuple, fields, replace
from math import inf

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.database.records import Balance, Income, SystemMetric, clock
from tradelab.database.schema import FUNDINGS, INTENTS, TABLES, TRADES, columns_of, record_of
from tradelab.events import Fill, Funding
from tradelab.journal import EQUITY, JOURNAL
from tradelab.live.audit import export, faults, summary
from tradelab.live.ledger import Ledger, MemoryLedger
from tradelab.live.messages import Foreign, Paid
from tradelab.live.order_states import Intent, State
from tradelab.orders import Kind, Order, TimeInForce

BITCOIN, ETHER = "BTC/USDT:USDT", "ETH/USDT:USDT"
STOP = Order("tl-2", ETHER, .1 + .2, True, 3_600_000, 1 / 3, 1, Kind.STOP, 19.5, 20.25, .015, TimeInForce.FOK, 24., 3)
ORDER = Order("tl-1", BITCOIN, -.003, False, 0, 16_529.6)
FILL = Fill(BITCOIN, -.1 - .2, 1 / 3, .07, 5, "tl-1", "9", True, True, -3, 7)
PAID = Funding(BITCOIN, -.5, 28_800_000)


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def ledger(request, tmp_path):
    if request.param == "memory": made = MemoryLedger()
    else: made = Ledger(f"sqlite:///{tmp_path}/tradelab.db" if request.param == "sqlite"
                        else request.getfixturevalue("postgres"))
    yield made
    made.close()


def rows(open_time, equity=1e4 / 3):
    "A step of two symbols, no field of it like another"
    made = np.zeros(2, JOURNAL)
    for n, name in enumerate(JOURNAL.names): made[name] = n + 1 / 7 if JOURNAL[name].kind == "f" else n
    made["open_time"], made["equity"], made["close"] = open_time, equity, [1 / 7, np.nan]
    return made


def worth(open_time, equity=1e4 / 3): return np.array([(open_time, equity, 1 / 7)], EQUITY)


def test_the_columns_are_the_fields_of_the_records():
    for record, table in ((Order, INTENTS), (Fill, TRADES), (Funding, FUNDINGS)):
        assert {field.name for field in fields(record)} <= set(table.columns.keys())
        assert [column.name for column in columns_of(record)] == [field.name for field in fields(record)]


def test_every_field_has_a_value_of_its_own_in_what_these_tests_keep():
    "Otherwise a column that is lost would come back as the default"
    for record in (STOP, FILL): assert not [field.name for field in fields(record)
                                            if getattr(record, field.name) == field.default]


def test_what_an_older_version_did_not_keep_is_the_default():
    assert record_of(Order, vars(ORDER) | {"expires_in": None, "slot": None}) == ORDER
    assert record_of(Order, vars(ORDER)).expires_in == inf


def test_sessions(ledger):
    assert ledger.sessions() == []
    ledger.open_session("one", {"symbols": [BITCOIN]})
    ledger.set_state("one", "stopped")
    known = ledger.session("one")
    assert known["settings"] == {"symbols": [BITCOIN]}
    assert known["state"] == "stopped"
    assert known["started"] > 1_577_836_800_000
    with pytest.raises(ValueError, match="'one' is in the ledger already: resume it"): ledger.open_session("one", {})
    with pytest.raises(KeyError, match="knows no session 'two': its newest are one"): ledger.session("two")
    ledger.check_new("two")


def test_what_is_old_goes_by_the_days_of_its_table_and_a_session_whole(ledger, monkeypatch):
    "Market time does not count: a session of today may replay candles of 1970"
    day = 86_400_000
    for name in ("one", "two"):
        ledger.open_session(name, {})
        ledger.intend(name, [ORDER])
        ledger.book(name, FILL, 1)
        ledger.step(name, [ETHER, BITCOIN], rows(0), {}, 1, worth(0))
        ledger.notice(name, "halt", "an example")
    ledger.measure("two", Balance(clock(), 1.), SystemMetric(clock() - 31 * day, "memory [MB]", 1.))
    assert ledger.prune(clock()) == {"system_metrics": 1}
    ledger.set_state("one", "stopped")
    assert ledger.prune(clock() + 366 * day) == {"balances": 1}
    gone = ledger.prune(clock() + 3_651 * day)
    assert (gone["sessions"], gone["notices"]) == (1, 2)
    assert ledger.sessions() == ["two"]                                     # it runs
    assert (ledger.booked("one"), ledger.intents("one"), len(ledger.closes("one"))) == ([], [], 0)
    assert ledger.booked("two") == [(1, FILL)]
    assert ledger.check("two") == ""


def test_events_count_for_each_session(ledger):
    for session in ("one", "one", "two"): ledger.notice(session, "halt", f"of {session}")
    assert list(ledger.notices("one")["number"]) == [1, 2]
    assert list(ledger.notices("two")["text"]) == ["of two"]
    assert list(ledger.notices("three").columns) == ["number", "time", "kind", "text"]


def test_an_intent_is_written_once_and_comes_back_as_it_was(ledger):
    for _ in range(2): ledger.intend("one", [STOP, ORDER])
    ledger.intend("two", [replace(ORDER, quantity=9.)])
    assert ledger.intents("one") == [Intent(ORDER), Intent(STOP)]
    kinds = [type(value) for value in astuple(ledger.intents("one")[1].order)]
    assert kinds == [type(value) for value in astuple(STOP)]


def test_an_order_goes_on_by_the_table_and_only_in_its_session(ledger):
    for session in ("one", "two"): ledger.intend(session, [ORDER])
    sent = ledger.advance("one", Intent(ORDER), State.SENT, sent_time=7)
    ended = ledger.advance("one", sent, State.FILLED, executed=.003, exchange_id="77", message="")
    assert ended == Intent(ORDER, State.FILLED, "77", .003, 7)
    assert ledger.intents("one") == [ended]
    assert ledger.intents("two") == [Intent(ORDER)]
    assert ledger.advance("one", ended, State.WORKING).state is State.FILLED     # old news


def test_what_is_not_told_stays(ledger):
    "Whoever has an older view of an order writes down only what it has learned"
    ledger.intend("one", [ORDER])
    ledger.advance("one", Intent(ORDER), State.SENT, sent_time=7)
    ledger.advance("one", Intent(ORDER), State.WORKING, exchange_id="77")
    assert ledger.intents("one") == [Intent(ORDER, State.WORKING, "77", 0., 7)]


def test_other_terms_are_written_before_they_are_asked_for_and_wait_for_their_proof(ledger):
    ledger.intend("one", [STOP])
    moved = replace(STOP, quantity=.2, price=19., trigger=20., expires_in=3., decision_price=.5, revision=4)
    ledger.revise("one", moved)
    written, = ledger.intents("one")
    assert written == Intent(moved, amending=True)
    sent = ledger.advance("one", written, State.SENT)
    ledger.advance("one", sent, State.WORKING, amending=False)
    assert ledger.intents("one") == [Intent(moved, State.WORKING)]


def test_a_fill_and_a_payment_are_booked_once(ledger):
    entries = [(FILL, 1, True), (replace(FILL, price=1.), 2, False), (PAID, 2, True),
               (replace(PAID, amount=9.), 3, False),
               (replace(FILL, symbol=ETHER), 4, True), (replace(FILL, trade_id="10"), 3, True)]
    for entry, number, new in entries: assert ledger.book("one", entry, number) is new
    assert ledger.booked("one") == [(1, FILL), (2, PAID), (3, replace(FILL, trade_id="10")),
                                    (4, replace(FILL, symbol=ETHER))]
    assert ledger.booked("one", after=3) == [(4, replace(FILL, symbol=ETHER))]
    assert ledger.booked("two") == []
    assert ledger.book("two", FILL, 1)


def test_what_is_not_ours_is_kept_once_with_what_was_said_of_it_last(ledger):
    other = replace(FILL, symbol=ETHER, fill_time=4, order_id="web_1")
    for foreign in (Foreign(FILL), Foreign(other), Foreign(FILL), Foreign(FILL, "ignored")): ledger.judge("s", foreign)
    assert ledger.foreign("s") == [Foreign(other), Foreign(FILL, "ignored")]
    assert ledger.foreign("t") == []


def test_the_rows_of_the_venue_are_kept_once_to_the_last_decimal(ledger):
    first = Income("TRANSFER", "7", "", -10**17 - 1, "USDT", 5)
    second = Income("COMMISSION", "7", BITCOIN, -1, "USDT", 4, "9")
    ledger.pay("s", Paid((first, second), 3, 1, 1))
    ledger.pay("s", Paid((second,), 9, 9, 2))
    ledger.pay("s", Paid((replace(first, number="8"),), 2, 0, 3))
    assert ledger.paid("s") == [Paid((second, first), 3, 1, 1), Paid((replace(first, number="8"),), 2, 0, 3)]


def test_the_last_step_is_replaced_and_every_bit_comes_back(ledger):
    for open_time, equity in ((3_600_000, 1.), (0, 2.), (3_600_000, 3.)):
        ledger.step("one", [ETHER, BITCOIN], rows(open_time, equity), {"equity": equity}, int(equity),
                    worth(open_time, equity))
    first, second = ledger.rows("one")
    assert first[0] == second[0] == [ETHER, BITCOIN]
    assert first[1].tobytes() == rows(0, 2.).tobytes()
    assert second[1].tobytes() == rows(3_600_000, 3.).tobytes()
    assert ledger.snapshot("one") == {"session": "one", "open_time": 3_600_000, "sequence": 3,
                                      "content": {"equity": 3.}}
    assert ledger.snapshot("two") is None


def test_a_state_without_a_step(ledger):
    ledger.keep("one", 7, {"account": [1 / 3]}, sequence=0)
    assert ledger.snapshot("one")["content"] == {"account": [1 / 3]}
    assert ledger.rows("one") == []
    assert ledger.journal("one").empty


def test_the_journal_is_the_same_table_everywhere(ledger):
    for open_time in (3_600_000, 0): ledger.step("one", [ETHER, BITCOIN], rows(open_time), {}, 1, worth(open_time))
    memory = MemoryLedger()
    for open_time in (0, 3_600_000): memory.step("one", [ETHER, BITCOIN], rows(open_time), {}, 1, worth(open_time))
    pd.testing.assert_frame_equal(ledger.journal("one"), memory.journal("one"), check_exact=True)
    assert list(ledger.journal("one")["symbol"]) == [ETHER, BITCOIN] * 2
    pd.testing.assert_frame_equal(ledger.journal("two"), memory.journal("two"), check_index_type=False)
    pd.testing.assert_frame_equal(ledger.equity("one"), memory.equity("one"), check_exact=True)
    pd.testing.assert_frame_equal(ledger.equity("two"), memory.equity("two"), check_index_type=False)


def test_each_close_has_one_row_whatever_was_decided(ledger):
    "A close without a decision of its own, and one that is written twice"
    for closed, equity in ((0, 1.), (3_600_000, 2.), (3_600_000, 3.)):
        ledger.step("one", [ETHER, BITCOIN], rows(0), {}, 1, worth(closed, equity))
    assert ledger.closes("one").tolist() == [(0, 1., 1 / 7), (3_600_000, 3., 1 / 7)]
    assert list(ledger.equity("one")["equity"]) == [1., 3.]
    assert len(ledger.journal("one")) == 2
    assert len(ledger.closes("two")) == 0


def test_what_was_given_may_change_afterwards(ledger):
    "Arrays and dicts of a caller are its own"
    given, snapshot = rows(0), {"account": [1.]}
    ledger.step("one", [ETHER, BITCOIN], given, snapshot, 1, worth(0))
    given["close"], snapshot["account"][0] = 5., 9.
    assert ledger.rows("one")[0][1].tobytes() == rows(0).tobytes()
    assert ledger.snapshot("one")["content"] == {"account": [1.]}


NUMBERS = st.floats(allow_nan=False)
SYMBOLS, NAMES, FEW = st.sampled_from([BITCOIN, ETHER]), st.text("abc-0", min_size=1, max_size=4), st.integers(0, 3)
ANY_ORDER = st.builds(Order, NAMES, SYMBOLS, NUMBERS, st.booleans(), FEW, NUMBERS, FEW, st.sampled_from(Kind), NUMBERS,
                      NUMBERS, NUMBERS, st.sampled_from(TimeInForce), NUMBERS)
ANY_FILL = st.builds(Fill, SYMBOLS, NUMBERS, NUMBERS, NUMBERS, FEW, NAMES, st.text("12", max_size=1), st.booleans(),
                     st.booleans())
ANY_ENTRY = ANY_FILL | st.builds(Funding, st.just(BITCOIN), NUMBERS, FEW)
THINGS = {"intend": ANY_ORDER, "book": ANY_ENTRY, "advance": st.sampled_from(State), "event": st.text("ab")}
DONE = st.lists(st.one_of([st.tuples(st.just(what), thing) for what, thing in THINGS.items()]), max_size=12)


def told(ledger, done):
    "What a ledger answers to a list of things done, and holds afterwards"
    answers = []
    for number, (what, thing) in enumerate(done):
        if what == "intend": answers.append(ledger.intend("one", [thing]))
        if what == "book": answers.append(ledger.book("one", thing, number))
        if what == "event": answers.append(ledger.notice("one", "kind", thing))
        if what == "advance" and (known := ledger.intents("one")):
            try: answers.append(ledger.advance("one", known[0], thing, executed=float(number), message=str(number)))
            except ValueError as error: answers.append(str(error))
    return answers, ledger.intents("one"), ledger.booked("one"), list(ledger.notices("one")["text"])


@settings(max_examples=30, deadline=None)
@given(DONE)
def test_memory_and_database_tell_the_same(done):
    database = Ledger("sqlite://")
    try: assert told(MemoryLedger(), done) == told(database, done)
    finally: database.close()


def test_a_ledger_is_looked_at_and_written_into_files_whatever_keeps_it(database_url, tmp_path):
    ledger = Ledger(database_url)
    ledger.open_session("one", {})
    ledger.intend("one", [ORDER, STOP])
    ledger.book("one", FILL, 1)
    ledger.step("one", [ETHER, BITCOIN], rows(0), {}, 1, worth(0))
    assert faults(database_url) == []
    assert summary(database_url) == "1 sessions, 2 orders, 1 fills"
    made = export(database_url, tmp_path / "all")
    assert len(made) == len(TABLES.tables) + 3
    trades = pd.read_csv(tmp_path / "all/tables/trades.csv", dtype=str)
    assert float(trades["quantity"][0]) == FILL.quantity
    journal = pd.read_csv(tmp_path / "all/sessions/one/journal.csv")
    assert list(journal["symbol"]) == [ETHER, BITCOIN]
    with ledger._database.transaction() as connection: connection.exec_driver_sql("UPDATE trades SET price = '9'")
    assert faults(database_url) == ["session one: its close of 1970-01-01 00:00 UTC is not as it was written"]
    with ledger._database.transaction() as connection:
        connection.exec_driver_sql("UPDATE order_events SET number = 3 WHERE number = 2")
    assert faults(database_url) == ["1 rows of order_events are missing in session one"]
    ledger.close()
