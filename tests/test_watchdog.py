"The watchdog hears the silence of real processes: killed, stopped, with a clock that stands still; and of the ledger"
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from postgres import database_at
from pydantic import SecretStr
from servers import free_port, hanging, until, webhook

from tradelab.config import settings
from tradelab.database.operations import Operations
from tradelab.database.reading import reading
from tradelab.database.records import Delivery, Service, clock
from tradelab.database.schema import ALERTS, MEASURED, SERVICES
from tradelab.live.lease import this_process
from tradelab.live.ledger import Ledger
from tradelab.ops.health import Examiner
from tradelab.ops.watchdog import Watchdog, signs

pytestmark = pytest.mark.integration

SESSION = """
import signal, sys, time
from tradelab.watching import example_session
machine, still = time.time_ns, []
time.time_ns = lambda: still[0] if still else machine() # SIGUSR1: the clock of its machine stands, and goes on
signal.signal(signal.SIGUSR1, lambda *_: still.clear() if still else still.append(machine()))
with example_session(1_000, .2) as place:
    print(place.database, place.sessions, place.session, flush=True)
    sys.stdin.read()
"""
COMMAND = [sys.executable, "-c", "from tradelab.command import main; main()"]


@contextmanager
def child(script, *words, **options):
    process = subprocess.Popen([sys.executable, "-c", script, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, **options)
    try: yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout): pipe.close()


class Time:
    "A monotonic clock that a test moves; the wall clock goes with it"
    now = 1_000.
    def mono(self): return self.now
    def wall(self): return int(1_700_000_000_000 + 1_000 * self.now)


def watchdog(database, sessions, *urls, **changed):
    "A watchdog, and its time"
    time = Time()
    here = settings().model_copy(update={"database": database, "sessions": Path(sessions),
                                         "alert_url": SecretStr(" ".join(urls))} | changed)
    return Watchdog(here, mono=time.mono, wall=time.wall, limit=5.), time


def steps(dog, time, seconds, before=lambda: None):
    "So many seconds of looks"
    for _ in range(int(seconds / dog.every)):
        before()
        time.now += dog.every
        dog.step()


def later(dog, time, seconds):
    "The same, of which it sees only the last"
    time.now += seconds - dog.every
    steps(dog, time, dog.every)


def address(hook): return hook.url.replace("http", "json")
def messages(hook): return [json.loads(body)["message"] for body in hook.bodies()]


def rows(database, table, **where):
    with reading(database) as look: return look.rows(table, **where)


def seen(database, sessions):
    with reading(database) as look: return signs(look, Path(sessions))[0]


def test_a_session_whose_clock_stands_that_is_stopped_and_is_killed():
    with child(SESSION) as process, webhook() as hook, webhook() as other:
        database, sessions, name = process.stdout.readline().split()
        dog, time = watchdog(database, sessions, address(hook), escalation_url=SecretStr(address(other)))
        def moved(field):
            was = getattr(seen(database, sessions), field)
            until(lambda: getattr(seen(database, sessions), field) != was)

        health = Examiner(dog.here)
        def states(): return {each.name: each.state for each in asyncio.run(health()).found}
        steps(dog, time, 15, lambda: moved("beat"))
        assert {"session": "up", "venue": "up", "watchdog": "down"}.items() <= states().items()
        later(dog, time, 60)                                              # it was stopped itself, and blames nobody
        assert messages(hook) == []

        process.send_signal(signal.SIGUSR1)                               # its clock stands, it trades on
        def stands():
            beat = seen(database, sessions).beat
            moved("work")
            moved("work")
            return seen(database, sessions).beat == beat
        until(stands)
        dog.step()
        moved("work")
        steps(dog, time, 30)
        assert re.fullmatch(f"session {name} has not been heard of since .* UTC: it works, and its heart does not "
                            "beat: the clock of its machine stands still, or the ledger takes no beat of it; what it "
                            f"holds is at the exchange; `tradelab status {name}` says what", messages(hook)[0])
        later(dog, time, 290)
        assert len(messages(hook)) == 1                                   # once
        later(dog, time, 15)
        assert messages(hook)[1].startswith("still, after 3")
        process.send_signal(signal.SIGUSR1)
        moved("beat")
        steps(dog, time, 5)
        assert re.fullmatch(rf"session {name} is back after \d+ s", messages(hook)[2])
        alert, = rows(database, ALERTS)
        assert (alert["state"], alert["resolved_by"], alert["session"]) == ("resolved", "watchdog", name)

        later(dog, time, 400)
        process.send_signal(signal.SIGSTOP)
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        dog.step()
        steps(dog, time, 30)
        assert "its process is stopped, and does nothing until it is told to go on" in messages(hook)[3]
        number = rows(database, ALERTS)[-1]["number"]
        Operations(database).acknowledge(number, "ada", clock())
        later(dog, time, 2_000)
        assert len(messages(hook)) == 4                                   # somebody knows
        assert messages(other) == []

        process.kill()
        process.wait()
        assert {"session": "down", "venue": "off"}.items() <= states().items()
        again, now = watchdog(database, sessions, address(hook))
        steps(again, now, 30)
        assert len(messages(hook)) == 4                                   # nor does another watchdog begin anew
        Operations(database).resolve(number, "ada", clock())
        later(again, now, 300)                                            # it is not over
        assert "its process is gone: it was killed or has crashed, and did not end in order" in messages(hook)[4]
        assert {row["channel"] for row in rows(database, MEASURED[Delivery], alert=number)} == {"json"}
        shutil.rmtree(Path(sessions).parent)


def test_a_killed_serve_is_told_to_others_too_and_a_channel_that_hangs_keeps_none_of_them(project):
    database = f"sqlite:///{project}/tradelab.db"
    Ledger(database).close()
    clean = os.environ | {"TRADELAB_METRICS_PORT": str(free_port())}
    with webhook() as hook, webhook() as other, hanging() as port, child(COMMAND[-1], "serve", env=clean) as process:
        dog, time = watchdog(database, project, f"json://127.0.0.1:{port}/", address(hook),
                             escalation_url=SecretStr(address(other)))
        for each in dog.attempts.values(): each.limit = .2
        until(lambda: rows(database, SERVICES, name="serve"))
        steps(dog, time, 10)
        assert messages(hook) == []
        process.kill()
        process.wait()
        dog.step()
        steps(dog, time, 5)
        assert messages(hook)[0].startswith("serve has not been heard of since ")
        assert messages(hook)[0].endswith("its process is gone: it was killed or has crashed, and did not end in "
                                          "order; sessions tell their own alerts meanwhile; start it again")
        later(dog, time, 590)
        assert messages(other) == []
        later(dog, time, 610)
        assert messages(other)[0].startswith("still, after ")
        sent = rows(database, MEASURED[Delivery])
        assert {(row["channel"], row["good"]) for row in sent} == {("json", False), ("json 2", True),
                                                                   ("escalation json", True)}
        Operations(database).beat(Service("serve", this_process(), clock(), clock()))
        steps(dog, time, 5)
        assert messages(hook)[-1].startswith("serve is back after ")


def test_a_ledger_that_is_away_for_long_is_told_and_its_return_too(own_server, tmp_path):
    with database_at(own_server.url, "watchdog") as database, webhook() as hook:
        Ledger(database).close()
        dog, time = watchdog(database, tmp_path, address(hook))
        steps(dog, time, 10)
        own_server.stop()
        try:
            steps(dog, time, 55)
            assert messages(hook) == []
            steps(dog, time, 5)
            assert messages(hook)[0].startswith("the ledger cannot be read for 60 s (the ledger ")
        finally: own_server.start()
        steps(dog, time, 5)
        assert messages(hook)[1] == "ledger is back after 5 s"


def test_the_process_beats_calls_outside_and_ends_in_order(project):
    Ledger("sqlite:///tradelab.db").close()
    with webhook() as hook, webhook() as outside:
        clean = os.environ | {"TRADELAB_ALERT_URL": address(hook), "TRADELAB_WATCHDOG_URL": f"{outside.url}/ping"}
        command = [*COMMAND, "watchdog", "--every", "0.1"]
        with subprocess.Popen(command, env=clean, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "watching every 0.1 s, telling json\n"
            until(lambda: rows("sqlite:///tradelab.db", SERVICES, name="watchdog"))
            until(lambda: outside.heard)
            second = subprocess.run(command, env=clean, capture_output=True, text=True)
            assert second.returncode == 1
            assert second.stderr.startswith("Error: watchdog is running already, in process ")
            process.terminate()
            assert process.wait(20) == 0
        assert [each[0] for each in outside.heard] == ["/ping"]           # once a minute
        assert [row["beat"] for row in rows("sqlite:///tradelab.db", SERVICES, name="watchdog")] == [0]
        assert messages(hook) == []
