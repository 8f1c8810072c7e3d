"""Commands in processes that are forked from one that has imported what they import: the same words, exit code and
output as from a shell, without the seconds that the imports take

Signals, and what an import brings with it, are tested with processes of a shell: see test_command and test_jobs."""
import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

IMPORTED = ["papermill.cli", "papermill.execute", "papermill.iorw", "nbconvert", "tradelab.command", "tradelab.jobs",
            "tradelab.checks", "tradelab.inputs", "tradelab.inventory", "tradelab.runs.registry",
            "tradelab.sim.backtest", "tradelab.live.session", "tradelab.venues.binance", "tradelab.localnet.server"]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(IMPORTED)


def _begin(name, words, folder, environment, outputs):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, 1): os.dup2(os.open(path, os.O_WRONLY), number)
    sys.argv = [name, *words]
    [command] = entry_points(group="console_scripts", name=name)
    try: command.load()()
    finally: atexit._run_exitfuncs()


def forked(
    name,             # of the command
    *words,           # on its command line
    cwd=None,         # the folder that it starts in; the current one otherwise
    env=None,         # its environment; this one's otherwise
):                    # as subprocess.run, with text
    "A command that has ended"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        for path in outputs: path.touch()
        process = PROCESSES.Process(target=_begin, args=(name, list(map(str, words)), str(cwd or Path.cwd()),
                                                         dict(os.environ if env is None else env), outputs))
        process.start()
        process.join()
        return subprocess.CompletedProcess([name, *words], process.exitcode,
                                           *(path.read_text() for path in outputs))
