"`tradelab serve` as a process beside sessions: nothing starts half, nothing of it is felt by those who trade"
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from socket import socket

from tradelab.config import settings
from tradelab.database.operations import serving
from tradelab.database.records import clock
from tradelab.database.rows import Database

COMMAND = [sys.executable, "-c", "from tradelab.command import main; main()", "serve"]


def eventually(see, seconds=30.):
    "What it sees, as soon as that is something"
    until = time.monotonic() + seconds
    while not (seen := see()):
        assert time.monotonic() < until, f"{see} saw nothing within {seconds} s"
        time.sleep(.05)
    return seen


def free_port():
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    "A process that serves the project in the current folder"

    def __init__(self, **variables):
        given = {f"TRADELAB_{name.upper()}": str(value) for name, value in variables.items()}
        self.out = open("serve.out", "w+")
        self.process = subprocess.Popen(COMMAND, stdout=self.out, stderr=subprocess.STDOUT,
                                        stdin=subprocess.DEVNULL, env=os.environ | given | {"PYTHONUNBUFFERED": "1"})

    @property
    def said(self): return Path("serve.out").read_text()

    def begun(self):
        eventually(lambda: "is at work" in self.said or self.process.poll() is not None)
        assert self.process.poll() is None, self.said
        return self

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(30)


@contextmanager
def served(**variables):
    made = Served(metrics_port=free_port(), **variables)
    try: yield made.begun()
    finally:
        if made.process.poll() is None: made.process.kill()
        made.process.wait()
        made.out.close()


def refused(**variables):
    "What is said by one that does not start"
    ran = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
                         env=os.environ | {f"TRADELAB_{name.upper()}": str(value) for name, value in variables.items()})
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "is at work" not in ran.stdout
    return ran.stderr


def test_it_waits_for_a_ledger_beats_and_ends_in_order(project):
    url = settings().database
    with served() as process:
        assert not Path("tradelab.db").exists()
        Database(url).close()
        eventually(lambda: serving(url, clock()))
        assert "tradelab serve is running already, in process" in refused()
        assert process.end() == 0
        assert process.said.endswith("tradelab serve has ended\n")
        assert not serving(url, clock())


def test_nothing_starts_where_a_setting_is_wrong(project):
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused(metrics_port=taken.getsockname()[1])
        assert said.startswith("Error: metrics_port: nobody can listen at 127.0.0.1:")
        assert said.count("\n") == 1
