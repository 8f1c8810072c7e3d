"Who runs a session: nothing that a stranger can do to its folder makes somebody else a session"
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tradelab.live.asking import LOCK, running_sessions
from tradelab.lock import InUseError, Lock, holder

HOLDER = ("import signal, sys; from tradelab.lock import Lock; lock = Lock(*sys.argv[1:]); print('held', flush=True); "
          "signal.pause()")
STRANGER = ("import fcntl, signal, sys; file = open(sys.argv[1], 'a+'); {call}; print('held', flush=True); "
            "signal.pause()")


class Process:
    "A Python that has said a word, and is killed at the end"

    def __init__(self, code, *words):
        self.process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE,
                                        text=True)
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self): return self.process

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def session(tmp_path):
    (tmp_path / "momentum").mkdir()
    return tmp_path / "momentum"


def test_the_process_that_holds_the_lock_is_the_session_and_nobody_else(session):
    with Process(HOLDER, session / LOCK, "momentum") as process, Process(HOLDER, session.parent / "other",
            "other") as other:
        assert running_sessions(session.parent) == {"momentum": process.pid}
        process.terminate()
        assert process.wait() == -signal.SIGTERM
        assert running_sessions(session.parent) == {}
        assert other.poll() is None


@pytest.mark.parametrize("call", ["", "fcntl.flock(file, fcntl.LOCK_EX)", "fcntl.lockf(file, fcntl.LOCK_EX)",
                                  "fcntl.lockf(file, fcntl.LOCK_EX, 1)"])
def test_a_stranger_who_has_or_locks_the_file_is_not_the_session(session, call):
    with Process(STRANGER.format(call=call or "pass"), session / LOCK) as stranger:
        (session / LOCK).write_text(str(stranger.pid))
        (session / "session.json").write_text(json.dumps({"pid": stranger.pid, "state": "running"}))
        assert running_sessions(session.parent) == {}
        assert stranger.poll() is None


@pytest.mark.parametrize("way", ["symlink", "hard link", "folder", "copy", "pipe", "directory"])
def test_what_leads_to_another_sessions_lock_proves_nothing(session, way):
    with Process(HOLDER, session / LOCK, "momentum") as process:
        other = session.parent / "carry"
        if way == "folder": other.symlink_to(session)
        else: other.mkdir()
        if way == "symlink": (other / LOCK).symlink_to(session / LOCK)
        if way == "hard link": os.link(session / LOCK, other / LOCK)
        if way == "copy": shutil.copy(session / LOCK, other / LOCK)
        if way == "pipe": os.mkfifo(other / LOCK)
        if way == "directory": (other / LOCK).mkdir()
        assert running_sessions(session.parent) == {"momentum": process.pid}
        assert process.poll() is None


def test_a_killed_session_is_no_session_and_can_be_run_again(session):
    with Process(HOLDER, session / LOCK, "momentum") as process:
        with pytest.raises(InUseError, match=f"in process {process.pid}"): Lock(session / LOCK, "momentum")
        process.kill()
        process.wait()
    with Lock(session / LOCK, "momentum"): assert holder(session / LOCK, "momentum") == os.getpid()


def test_a_child_of_the_session_does_not_hold_its_lock(session):
    lock = Lock(session / LOCK, "momentum")
    child = os.fork()
    if not child:
        held = holder(session / LOCK, "momentum")
        os._exit(0 if held == os.getppid() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert holder(session / LOCK, "momentum") == os.getpid()
    lock.close()
    lock.close()
    assert holder(session / LOCK, "momentum") is None


def test_a_file_system_without_locks_is_named(session, monkeypatch):
    def refuse(*_): raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="cannot be locked .No locks available.: choose a folder on a file system "
                       "that has locks"):
        Lock(Path(session / LOCK), "momentum")
