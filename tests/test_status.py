"What a person sees of a session from another process: busy, killed, halted, guarded, and of a ledger that is empty"
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_live import localnet, run, session, start

from tradelab.aftermath import record_of
from tradelab.database.reading import MissingLedgerError, reading
from tradelab.database.records import Asked, clock
from tradelab.database.rows import Database
from tradelab.database.schema import CLOSES, FORMAT, FORMATS
from tradelab.events import Fill
from tradelab.live.ledger import Ledger
from tradelab.live.messages import LedgerState
from tradelab.live.status import screen, statuses
from tradelab.watching import Place, session_figure, track_of

pytestmark = pytest.mark.integration
NAME = "momentum_test"


def url(folder): return f"sqlite:///{folder}/tradelab.db"
def look(folder, name=""): return statuses(url(folder), folder / "sessions", clock(), name)


def look_until(folder, good, seconds=240):
    "Look again and again until something can be seen; what was seen then"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try: found = look(folder)
        except MissingLedgerError: found = []
        if found and good(found[0]): return found[0]
        time.sleep(.25) # the exchange runs in this process, too
    raise AssertionError(screen(found))


def tradelab(folder, *words, **options):
    "The command, in a folder of its own"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRADELAB_", "COVERAGE_"))}
    (folder / "tradelab.toml").touch()
    return subprocess.Popen([Path(sys.executable).parent / "tradelab", *words], cwd=folder, env=clean,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def said(folder, *words):
    process = tradelab(folder, *words)
    out, error = process.communicate(timeout=200)
    assert "Traceback" not in error
    return process.returncode, out + error


def test_a_session_that_is_busy_in_another_process_is_seen_and_does_not_notice(tmp_path):
    with localnet() as exchange:
        process = start(exchange, tmp_path)
        seen = look_until(tmp_path, lambda each: each.alive and (each.candle or 0) and each.orders is not None)
        assert seen.state == "running"
        assert seen.process == process.pid
        assert f"process {process.pid} " in seen.owner
        assert seen.phase.name in ("reconciling", "trading")
        assert seen.trading_state == "NORMAL"
        assert clock() - seen.heard < 20_000
        held = look_until(tmp_path, lambda each: each.positions or not each.alive)
        assert process.communicate()[0].count("disagreements 0")
        assert process.returncode == 0
        assert held.positions[0].quantity
    ended, = look(tmp_path)
    assert ended.state == "stopped"
    steps = Ledger(url(tmp_path)).journal(NAME)
    assert len(steps) == 80
    assert ended.equity == steps["equity"].iloc[-1]
    quantity = steps["position"].iloc[-1] + steps["fill_quantity"].iloc[-1]
    assert [each.quantity for each in ended.positions] == [quantity] * bool(quantity)


def test_a_killed_session_is_seen_as_dead_with_what_it_left(tmp_path):
    with localnet() as exchange: assert start(exchange, tmp_path, "after", 5).wait() == -signal.SIGKILL
    died, = look(tmp_path)
    ledger = Ledger(url(tmp_path))
    assert died.state == "died"
    assert died.heard
    assert [order.order_id for order in died.orders] == [each.order.order_id for each in ledger.intents(NAME)
                                                         if not each.state.ended]
    assert {order.state for order in died.orders} <= {"sent", "intent"}
    held = sum(entry.quantity for _, entry in ledger.booked(NAME) if isinstance(entry, Fill))
    assert [each.quantity for each in died.positions] == [held] * bool(held)
    code, text = said(tmp_path, "status")
    assert code == 0
    assert text.startswith(f"{NAME}  DIED  heard of ")
    assert f"`tradelab live -p resume {NAME} -p venue localnet -p policy " in text
    found, = json.loads(said(tmp_path, "status", NAME, "--json")[1])
    assert found["state"] == "died"
    assert len(found["orders"]) == len(died.orders)


def test_a_halt_is_seen_with_its_cause_and_the_word_that_asked_for_it(tmp_path):
    with localnet() as exchange:
        live = session(exchange, tmp_path)
        asked, word = [], Asked("halt", "a test", "ada", session=NAME)
        def progress(statistics):
            if statistics.candles == 10: asked.append(live.ledger.commands.ask(word))
            if statistics.candles == 11: asked.append(look(tmp_path)[0])
        live.progress = progress
        live.waits |= {"heartbeat": 20}
        run(live, 60)
    before, (after,) = asked[1], look(tmp_path)
    assert before.alive
    assert [each.answer for each in before.commands if each.number != asked[0]] == []
    assert after.state == "stopped"
    assert after.trading_state == "HALT"
    assert [(each.name, each.requires) for each in after.causes] == [("person", "HALT")]
    assert [each.number for each in after.commands] == [asked[0]]
    assert after.commands[0].answer.startswith("halted: everything is closed now")
    assert after.positions == ()
    assert [each.kind for each in after.notices].count("halt") == 1
    assert after.emergency[-1]["step"] == "over"
    assert re.search(r"ladder +HALT\n +person requires HALT since", str(after))


def test_a_guarded_session_says_why(tmp_path):
    with localnet() as exchange:
        live = session(exchange, tmp_path)
        seen = []
        def say(line):
            if line.startswith("guarded"): seen.append(line)
        def progress(statistics):
            if statistics.candles == 10: live.hand(lambda: live.venue.events.put_nowait(LedgerState(False, "full",
                                                                                                    "recorder")))
            if seen and len(seen) == 1 and look(tmp_path)[0].phase.name == "guarded":
                seen.append(look(tmp_path)[0])
                live.hand(lambda: live.venue.events.put_nowait(LedgerState(True, "", "recorder")))
        live.say, live.progress = say, progress
        run(live, 60)
    assert seen[1].phase.reasons == ("recorder",)
    assert "phase      guarded: recorder (the recording has holes)" in str(seen[1])


def test_a_ledger_that_is_empty_missing_or_newer_is_one_sentence(tmp_path):
    assert said(tmp_path, "status")[1].startswith("Error: there is no ledger at sqlite:///")
    assert not list(tmp_path.glob("*.db*"))
    Ledger(url(tmp_path)).close()
    assert said(tmp_path, "status") == (0, "no session has run yet: `tradelab live` starts one\n")
    assert said(tmp_path, "status", "../../etc")[1] == "Error: there is no session ../../etc: none has run yet\n"
    Database(url(tmp_path)).write(FORMATS.insert().values(format=FORMAT + 1, version="9.9"))
    code, text = said(tmp_path, "status")
    assert code == 1
    assert re.match(f"Error: the ledger .* is of format {FORMAT + 1}, written by tradelab 9.9: this version", text)
    assert len(text.splitlines()) == 1
    assert said(tmp_path, "watch")[0] == 1


def test_both_databases_are_read_while_they_are_written(database_url, tmp_path):
    ledger = Ledger(database_url)
    ledger.open_session("a", dict(venue="localnet", symbols=["BTC/USDT:USDT"], timeframe="1h", policy="flat"))
    with ledger.transaction(durable=True):
        ledger.notice("a", "halt", "not committed yet")
        seen, = statuses(database_url, tmp_path, clock())
    assert seen.notices == ()
    assert len(statuses(database_url, tmp_path, clock())[0].notices) == 1
    with reading(database_url) as now:
        first = now.rows(FORMATS)
        ledger.set_state("a", "stopped")
        assert first[0]["format"] == FORMAT
    ledger.close()


def test_watch_sees_a_session_come_and_die_and_ends_by_ctrl_c(tmp_path):
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # the tests may have been started where it is ignored
    with tradelab(tmp_path, "watch", "--every", ".1", preexec_fn=heard) as watching:
        assert "the first session makes one; waiting" in watching.stdout.readline()
        with localnet() as exchange: assert start(exchange, tmp_path, "after", 12).wait() == -signal.SIGKILL
        lines = iter(watching.stdout.readline, "")
        assert any(re.match(f"{NAME}  (RUNNING|STARTING)", line) for line in lines)
        assert any(line.startswith(f"{NAME}  DIED") for line in lines)
        watching.send_signal(signal.SIGINT)
        out, error = watching.communicate(timeout=30)
    assert watching.returncode == 0
    assert error == ""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "The folder of a session that was killed after its twelfth order"
    folder = tmp_path_factory.mktemp("killed")
    with localnet() as exchange: assert start(exchange, folder, "after", 12).wait() == -signal.SIGKILL
    return folder


def place(folder): return Place(url(folder), folder / "sessions", NAME)


def test_the_record_of_a_killed_session_says_what_it_left_and_what_to_do(killed):
    record = record_of(place(killed))
    decided = Ledger(url(killed)).journal(NAME).index.nunique()
    assert record.ended.startswith("it died without a word while trading, its last sign of life was at ")
    assert record.ledger == ""
    assert "its process ended before it was closed" in record.recording
    assert record.replayed.startswith("cannot be replayed: ") # its origin is no import name: a test has made it
    assert "orders sent and not answered: " in " ".join(record.next) or not record.status.orders
    assert record.next[-1].startswith(f"to go on: `tradelab live -p resume {NAME} -p venue localnet")
    with reading(url(killed)) as look: track = track_of(look, NAME)
    assert track.prices.index.nunique() == decided
    assert len(session_figure(track, record.status).axes) == 4


def test_a_record_without_recording_or_status_and_of_a_changed_ledger_says_so(killed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(killed, folder)
    recording = folder / "sessions" / NAME / "recording.zst"
    content = recording.read_bytes()
    recording.write_bytes(content[:len(content) // 2] + b"damage" + content[len(content) // 2:])
    (folder / "sessions" / NAME / "session.json").write_text("{torn")
    record = record_of(place(folder))
    assert "decisions are proven, " in record.recording
    assert "session.json" in record.status.unread
    shutil.rmtree(folder / "sessions" / NAME)
    assert record_of(place(folder)).recording.startswith("there is no recording.zst in ")
    Database(url(folder)).write(CLOSES.update().values(equity=1.))
    changed = record_of(place(folder))
    assert "is not as it was written" in changed.ledger
    assert any("bring back the ledger" in each for each in changed.next)


def test_the_report_of_a_killed_session_is_made_by_its_job(killed):
    code, text = said(killed, "run", "session_report", "--output", "report.ipynb")
    assert code == 0, text
    told = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    assert told["session"] == NAME
    assert told["state"] == "died"
    assert told["ended"].startswith("it died without a word")
    code, text = said(killed, "run", "session_report", "-p", "session", "nobody")
    assert code == 1
    assert text == f"Error: there is no session nobody: did you mean {NAME}?\n"
