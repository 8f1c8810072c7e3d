"""A program of Python in a process of its own, as `subprocess` starts it, but forked from a process that has imported
what tradelab imports from others: a start takes a fraction of the CPU. Nothing of tradelab is there before.
A test that changes what Python or numba read when they start takes `subprocess`."""
import atexit
import json
import os
import select
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

WARM = """
import gc, json, os, runpy, socket, sys, time, types
import ccxt.pro, click, numba, pandas, pydantic_settings, pytest, rapidfuzz, sqlalchemy.orm, structlog
import sqlalchemy.dialects.sqlite, zstandard
numba.njit("f8(f8)")(lambda x: x)                # numba reads its tables of types when it first compiles
gc.collect()
gc.freeze()
asked = socket.socket(fileno=int(sys.argv[1]))
while True:
    size = int.from_bytes(asked.recv(4), "big")
    if not size: os._exit(0)                     # who asks is gone
    words, streams, _, _ = socket.recv_fds(asked, size, 3, socket.MSG_WAITALL)
    request = json.loads(words)
    if not streams: answer = os.waitpid(request, os.WNOHANG)
    elif not (answer := os.fork()): break
    for each in streams: os.close(each)
    asked.sendall(json.dumps(answer).encode())
asked.close()
for number, each in enumerate(streams): os.dup2(each, number)
for each in streams: os.close(each)
sys.argv, folder, environment, session = request
if session: os.setsid()
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
time.tzset()
sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", 1, closefd=False)
sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)
sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
warm = sys.modules["__main__"]                   # its names live as long as it does
sys.modules["__main__"] = types.ModuleType("__main__")
if sys.argv[0] == "-c":
    sys.path[0], code = "", sys.argv.pop(1)
    exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
elif sys.argv[0] == "-m":
    sys.path[0] = ""
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
else:
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
ASKING = threading.Lock()


@cache
def warm():
    "The socket to the process that forks"
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-c", WARM, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def ask(request, streams=()):
    "What the process that forks answers: to words, the number of a process; to a number, how that process ended"
    words = json.dumps(request).encode()
    with ASKING:
        warm().sendall(len(words).to_bytes(4, "big"))
        socket.send_fds(warm(), [words], streams)
        return json.loads(warm().recv(1_000))


class Popen(subprocess.Popen):
    "Of Python with -c or -m, or of a program of its folder; what else is started, and how, is as ever"
    ended = None  # a file that can be read when the process has ended

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more):
        words = [str(word) for word in args] if isinstance(args, list | tuple) else [str(args)]
        if words[0] == sys.executable: words.pop(0)
        known = words and (words[0] in ("-c", "-m") or Path(words[0]) == Path(sys.executable).parent / "tradelab")
        if not known or executable or preexec_fn or pass_fds or shell:
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread,
                p2cwrite, c2pread, c2pwrite, errread, errwrite, *more)
        streams = [number if given == -1 else given for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        session = more[-2]
        self.pid = ask([words, str(cwd or os.getcwd()), dict(os.environ if env is None else env), session], streams)
        self.ended = os.pidfd_open(self.pid)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags):
        if self.ended is None: return super()._try_wait(wait_flags)
        if not select.select([self.ended], [], [], 0 if wait_flags else None)[0]: return 0, 0
        answer = ask(self.pid)
        os.close(self.ended)
        return answer

    def _internal_poll(self, *given, **more):
        if self.ended is None: return super()._internal_poll(*given, **more)
        if self._waitpid_lock.acquire(False): # otherwise another thread waits for it
            try:
                process, status = self._try_wait(os.WNOHANG) if self.returncode is None else (0, 0)
                if process: self._handle_exitstatus(status)
            finally: self._waitpid_lock.release()
        return self.returncode


def run(words, timeout=None, check=False, input=None, capture_output=True, **given):
    "As subprocess.run, with what was said"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else {}
    if input is not None: streams["stdin"] = subprocess.PIPE
    with Popen(words, **streams, **given) as process:
        try: said, wrong = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    ended = subprocess.CompletedProcess(words, process.returncode, said, wrong)
    if check: ended.check_returncode()
    return ended
