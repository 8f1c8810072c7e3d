"For tests and notebooks alike: the bridge from nbdev to nbval, and a summary that names what was skipped and why"
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

SKIPPED_CELL = re.compile(r"^\s*#\s*\|\s*(eval:\s*false|slow|notest)\b", re.M | re.I)
PASSES = Path(__file__).parent / ".cache" / "test-passes.jsonl"  # one line for each run of pytest, for .ci/summary.py


# a property does not fail because the machine is slow
hypothesis.settings.register_profile("tradelab", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tradelab")


# what numba, pandas and sqlalchemy make is never garbage: to look through it again and again took a fifth of the CPU
gc.set_threshold(50_000, 20, 50)


# Each notebook has a kernel of its own. It is forked from a process that has imported what most of them import, though
# nothing of tradelab: to start a kernel from nothing and to import took most of the CPU time of most notebooks.
WARM = """
import gc, json, os, signal, sys
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline" # as ipykernel sets it before matplotlib comes
import ccxt.pro, hypothesis, matplotlib.pyplot, numba, pandas, pydantic_settings, rapidfuzz, sqlalchemy.orm, structlog
import sqlalchemy.dialects.postgresql, sqlalchemy.dialects.sqlite, zstandard
from ipykernel.kernelapp import launch_new_instance
numba.njit("f8(f8)")(lambda x: x)                # numba reads its tables of types when it first compiles
signal.signal(signal.SIGCHLD, signal.SIG_IGN)    # nobody waits for a kernel that has ended
gc.set_threshold(50_000, 20, 50)                 # as for the tests
gc.collect()
gc.freeze()                                      # what is here already is not looked through, and so not copied
for line in sys.stdin:
    asked = json.loads(line)
    if not os.fork(): break
else: sys.exit()
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
os.setsid()
print(os.getpid(), flush=True)
os.chdir(asked["cwd"])
os.environ.clear()
os.environ.update(asked["env"])
for stream in range(3): os.dup2(os.open(os.devnull, os.O_RDWR), stream)
launch_new_instance(argv=[*asked["arguments"], f"--IPKernelApp.parent_handle={os.getppid()}"])
"""


class ForkedKernel:
    "What jupyter_client asks of a kernel's process"
    stdin = stdout = stderr = warm = None

    def __init__(self, command, cwd, env, **_):
        if ForkedKernel.warm is None:
            ForkedKernel.warm = subprocess.Popen([sys.executable, "-c", WARM], stdin=subprocess.PIPE,
                                                 stdout=subprocess.PIPE, text=True)
        asked = {"arguments": command[command.index("-f"):], "cwd": cwd, "env": dict(env)}
        print(json.dumps(asked), file=ForkedKernel.warm.stdin, flush=True)
        self.pid = int(ForkedKernel.warm.stdout.readline())

    def poll(self):
        try: os.kill(self.pid, 0)
        except ProcessLookupError: return 0

    def wait(self): return self.poll()

    def send_signal(self, number): os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)

    def terminate(self): self.send_signal(signal.SIGTERM)


def pytest_configure(config):
    if not config.getoption("nbval_lax", False): return
    from jupyter_client.provisioning import local_provisioner
    local_provisioner.launch_kernel = ForkedKernel


def pytest_collection_modifyitems(items):
    for item in items:
        if type(item).__name__ != "IPyNbCell": continue
        if directive := SKIPPED_CELL.search(item.cell.source):
            item.add_marker(pytest.mark.skip(reason=f"#| {directive[1]}"))
        # nbdev_clean removes the counts, nbval asks for them
        if item.cell.outputs and item.cell.execution_count is None: item.cell.execution_count = 1


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


def pytest_sessionstart(session):
    session.config.started = time.time()


def pytest_terminal_summary(terminalreporter, config):
    stats = terminalreporter.stats
    skipped = [(report.nodeid, report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple)
                else "") for report in stats.get("skipped", [])]
    kinds = Counter((name.split("[")[0], reason) for name, reason in skipped)
    if kinds: terminalreporter.section("skipped tests and cells")
    for (name, reason), count in kinds.items():
        terminalreporter.write_line(f"{name}{f' ({count} times)' if count > 1 else ''}: {reason or 'no reason given'}")
    counts = {kind: len(stats.get(kind, [])) for kind in ("passed", "failed", "error", "xfailed", "xpassed",
                                                          "warnings")}
    if not PASSES.exists() or hasattr(config, "workerinput"): return # only `make test` asks for it, and once
    with PASSES.open("a") as file:
        print(json.dumps({**counts, "skipped": skipped, "seconds": time.time() - config.started}), file=file)
