"""What has become slower: `make degraded`, or `python benchmarks/check.py [--write] [name ...]`.

Seconds say more about a machine than about a program, so each measure is a ratio: what we do beside a piece of work of
the same kind that nobody here can change, both in one run and each at its fastest. What takes more than 1.5 times its
ratio in baselines.json is named, and the exit code is 1. `--write` keeps what was measured as the new baselines.
"""
import json
import resource
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

BASELINES = Path(__file__).with_name("baselines.json")
ALLOWED = 1.5
MEASURES = {}


def measure(function):
    MEASURES[function.__name__.replace("_", " ")] = function
    return function


def spent()->float:
    "Seconds of processor that this process and its children had: what others do at the same time is not among them"
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def beside(ours, theirs, times:int=7)->float:
    "How much longer ours takes, each at its fastest; in turns, because a machine is slower at one time than at another"
    took: dict = {ours: [], theirs: []}
    for turn in range(times + 1):
        for call, all_of_it in took.items():
            begin = spent()
            call()
            if turn: all_of_it.append(spent() - begin) # the first one warms up
    return min(took[ours]) / min(took[theirs])


def words(count:int=60_000)->str:
    "A piece of work for the interpreter: objects, attributes, texts"
    return ",".join(f"{number % 97:03}" for number in range(count))


def market(count:int=2_000):
    from tradelab.market.synthetic import ar1
    return ar1(count, seed=0)


@measure
def backtest():
    "The array engine beside moving averages of the same candles by NumPy"
    from tradelab.sim.backtest import backtest
    from tradelab.strategies.example import SmaCross
    candles = market(20_000)
    closes = candles["close"].to_numpy()
    return beside(lambda: backtest(SmaCross(), candles),
                  lambda: [np.convolve(closes, np.ones(50) / 50) for _ in range(20)])


@measure
def event_engine():
    "A `Trader`, candle by candle, beside the interpreter"
    from tradelab.sim.backtest import backtest
    from tradelab.strategies.example import SmaCross
    candles = market(600)
    return beside(lambda: backtest(SmaCross(), candles, engine="event"), words)


@measure
def ledger():
    "Notices written to a ledger, beside rows written by sqlite3 itself"
    from tradelab.live.ledger import Ledger
    with tempfile.TemporaryDirectory() as folder:
        kept = Ledger(f"sqlite:///{folder}/tradelab.db")
        kept.open_session("benchmark", {"venue": "localnet"})
        bare = sqlite3.connect(f"{folder}/bare.db", isolation_level=None)
        bare.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; CREATE TABLE told (number INTEGER "
                           "PRIMARY KEY, text TEXT)")
        found = beside(lambda: [kept.notice("benchmark", "hole", "a benchmark") for _ in range(400)],
                       lambda: [bare.execute("INSERT INTO told (text) VALUES ('a benchmark')") for _ in range(400)])
        kept.close()
        bare.close()
    return found


@measure
def command_line():
    "`tradelab --version` in a fresh process, beside a process that imports json and asyncio"
    def run(code): subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return beside(lambda: run("import sys; sys.argv = ['tradelab', '--version']; from tradelab.command import main; "
                              "main()"), lambda: run("import json, asyncio"), 4)


def slower(found:dict[str, float], kept:dict[str, float], allowed:float=ALLOWED)->list[str]:
    "What takes more than its baseline, a line each; what has none is said, too"
    return [f"{name}: {ratio:.2f}, baseline {kept[name]:.2f}: {ratio / kept[name]:.1f} times as slow" if name in kept
            else f"{name}: {ratio:.2f}, there is no baseline: python benchmarks/check.py --write"
            for name, ratio in found.items() if name not in kept or ratio > allowed * kept[name]]


def main(arguments:list[str])->int:
    names = [name for name in arguments if name != "--write"] or list(MEASURES)
    if unknown := set(names) - set(MEASURES): sys.exit(f"unknown measure {', '.join(unknown)}: choose from "
                                                       f"{', '.join(MEASURES)}")
    found = {name: round(MEASURES[name](), 3) for name in names}
    kept = json.loads(BASELINES.read_text()) if BASELINES.exists() else {}
    if "--write" in arguments: BASELINES.write_text(json.dumps(kept | found, indent=1) + "\n")
    for name, ratio in found.items():
        print(f"{name:14} {ratio:8.2f} times its peer, baseline {kept.get(name, 0.):8.2f}")
    wrong = [] if "--write" in arguments else slower(found, kept)
    for line in wrong: print(f"SLOWER  {line}")
    return bool(wrong)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
