"""Figures of this machine, as a table: `make benchmark`, or `python benchmarks/measure.py [name ...]`.

Nothing here is a test. Times are medians over fresh processes or repeated calls; ratios are against a peer measured in
the same run.
"""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURES = {}


def measure(function):
    MEASURES[function.__name__] = function
    return function


def seconds(code:str, environment:dict|None=None, folder:Path=ROOT)->float:
    "Wall time of a fresh Python process that runs `code`"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env={**os.environ, **(environment or {})},
                   stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


IMPORT = "from tradelab.sim.backtest import backtest"
FIRST = ("from tradelab.market.synthetic import ar1; from tradelab.strategies.example import SmaCross; from "
         "tradelab.sim.backtest import backtest; backtest(SmaCross(), ar1(2_000))")


@measure
def importing():
    "A fresh process that imports the backtest, with warm caches; less an empty Python process"
    seconds(IMPORT)
    loaded = subprocess.run([sys.executable, "-c", IMPORT + "; import sys; print(*(name for name in ('torch', 'ccxt', "
                             "'sklearn', 'matplotlib') if name in sys.modules))"],
                            check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    median = statistics.median(seconds(IMPORT) for _ in range(5))
    yield ("import of the backtest", f"{median:.2f} s", "goal 1.5 s; heavy libraries loaded: "
           f"{', '.join(loaded) or 'none'}")


@measure
def compiling():
    "Everything that is compiled, from an empty cache"
    import cold_compile
    yield "cold compile of everything", f"{cold_compile.total():.0f} s", "goal 90 s"


@measure
def editing():
    "Change a cell, export, fresh process, first result, in a copy of the project"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "sessions", "data",
            "reports", "logs"))
        environment = {"PYTHONPATH": str(copy), "XDG_CACHE_HOME": str(Path(folder) / "cache")}
        seconds(FIRST, environment, copy)
        notebook = copy / "nbs/95_strategies/01_example.ipynb"
        times = []
        for number in (1, 2, 3):
            notebook.write_text(re.sub(r"slow:int=\d+", f"slow:int={50 + number}", notebook.read_text()))
            begin = time.perf_counter()
            subprocess.run([str(Path(sys.executable).parent / "nbdev_export")], check=True, cwd=copy,
                           env={**os.environ, **environment})
            seconds(FIRST, environment, copy)
            times.append(time.perf_counter() - begin)
    yield "edit loop: change, export, fresh process, result", f"{statistics.median(times):.1f} s", "goal 15 s"


def rate(call, repeat:int=5)->float:
    "Median seconds of one call, after one that warms up"
    call()
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@measure
def simulating():
    "Both engines and environment"
    import numpy as np

    from tradelab.features.observation import Observation
    from tradelab.learn.env import MarketEnv, MarketVecEnv
    from tradelab.market.candles import matrix
    from tradelab.market.synthetic import ar1
    from tradelab.sim.backtest import backtest
    from tradelab.sim.prepared import prepare
    from tradelab.strategies.example import SmaCross

    candles, policy = ar1(100_000, seed=0), SmaCross()
    array = len(candles) / rate(lambda: backtest(policy, candles))
    event = 5_000 / rate(lambda: backtest(policy, candles[:5_000], engine="event"), 3)
    yield ("backtest, vectorised engine (four policies: subject and three baselines)", f"{array:,.0f} bars/s",
           "SMA cross 20/50, 100,000 candles, features included")
    yield "backtest, event engine (`Trader`)", f"{event:,.0f} bars/s", f"{array / event:,.0f} times slower"
    observation = Observation(["return(1)", "rsi(14)", "atr(14).relative", "bollinger(20,2)", "volatility(20)"],
                              window=30).fit(matrix(candles)[1])
    market = prepare(candles, observation)
    many, one = MarketVecEnv(market, n_envs=64, episode=1_000), MarketEnv(market, episode=1_000)
    many.reset(), one.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (64, 1))
    fast = 64 * 200 / rate(lambda: [many.step(actions) for _ in range(200)])
    slow = 500 / rate(lambda: (one.reset(seed=0), [one.step(actions[0]) for _ in range(500)]))
    yield "environment, 64 at once", f"{fast:,.0f} steps/s", "window 30 x 5 features"
    yield "environment, one (gymnasium)", f"{slow:,.0f} steps/s", f"{fast / slow:,.0f} times slower"


@measure
def trading():
    """Close of a candle to the order on the wire, and to its answer: a session of 400 candles on localnet, over real
    sockets"""
    with tempfile.TemporaryDirectory() as folder:
        environment = ({f"TRADELAB_{name.upper()}": f"{folder}/{name}" for name in ("runs", "sessions", "reports",
            "logs", "data")} | {"TRADELAB_DATABASE": f"sqlite:///{folder}/tradelab.db",
                       "TRADELAB_VENUE": "localnet", "TRADELAB_LOCALNET_PORT": "0"})
        printed = subprocess.run([Path(sys.executable).parent / "tradelab", "run", "live", "-p", "policy",
                                  "tradelab.strategies.example:Momentum(5, 0.005)", "-p", "candles", "400"],
                                 check=True, capture_output=True, text=True, cwd=ROOT,
                                 env={**os.environ, **environment}).stdout
    figures = next(json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    for what in ("order", "answer"):
        yield (f"live: close to {what}", f"median {figures[f'close to {what} median [ms]']} ms, 99 % "
               f"{figures[f'close to {what} p99 [ms]']} ms", f"{figures['orders']} orders in "
               f"{figures['candles']} candles")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    unknown = set(sys.argv[1:]) - set(MEASURES)
    if unknown: sys.exit(f"unknown measure {', '.join(unknown)}: choose from {', '.join(MEASURES)}")
    for name in sys.argv[1:] or MEASURES:
        for what, figure, remark in MEASURES[name](): print(f"{what:66} {figure:>34}   {remark}", flush=True)
