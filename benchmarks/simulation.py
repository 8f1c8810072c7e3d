"""The simulation in CPU seconds: the kernel, policies, sweeps, environments; `python benchmarks/simulation.py`. With
`vectorbt` importable, beside it on the same candles."""
import resource
import sys
from dataclasses import replace
from itertools import product
from time import process_time

import numba
import numpy as np
import pandas as pd

from tradelab.account import POSITION, mark, new_account
from tradelab.compiled import compiled
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.learn.env import MarketEnv, MarketVecEnv
from tradelab.market.candles import frame
from tradelab.policies import Policy
from tradelab.risk.execution import DONE
from tradelab.settings import CostModel, Execution, Limits
from tradelab.sim.backtest import SIMULATIONS, backtest
from tradelab.sim.kernel import Simulation, market_arrays, steps, trading_rules
from tradelab.sim.matching import new_state
from tradelab.sim.prepared import prepare
from tradelab.sim.sweep import PLAIN, sweep

HOUR = 3_600_000
OPEN_END = Limits(max_daily_loss=None, max_drawdown=1.) # nothing ends the run early; every other default limit binds


@compiled(numba.int64(numba.float64[:, ::1], SIMULATIONS, numba.float64[::1], numba.int64), error_model="numpy",
          _nrt=False)
def curve(targets, world, equity, first):
    "Equity and fills of given targets, every step of the kernel"
    last = world[0]["length"] - 1
    return steps(first, world, targets[first:last], equity[first:last])


def walk(length, symbols=1, seed=0, volatility=.002):
    random = np.random.default_rng(seed)
    close = np.round(20_000 * np.exp(np.cumsum(random.normal(0, volatility, (length, symbols)), axis=0)), 1)
    opened = np.vstack([close[:1], close[:-1]])
    return np.stack([opened, np.maximum(close, opened) * 1.001, np.minimum(close, opened) * .999, close,
                     np.full_like(close, 1e5)], axis=2)


def average(close, width): return pd.DataFrame(close).rolling(width).mean().to_numpy()


def least(work, times=5):
    "The quickest of several, CPU seconds; short work is repeated for a second"
    taken = []
    while len(taken) < times or sum(taken) < 1.:
        prepared = work()
        begin = process_time()
        prepared()
        taken.append(process_time() - begin)
    return min(taken)


def kernel(length, symbols, costs):
    candles = walk(length, symbols)
    targets = np.ascontiguousarray(np.nan_to_num(np.sign(average(candles[:, :, 3], 20) - average(candles[:, :, 3],
        50))))
    rates = np.where(np.arange(length) % 8 == 7, 1e-4, 0.)[:, None] * np.ones((1, symbols))
    tape = market_arrays(np.arange(length) * HOUR, candles, rates, costs, OPEN_END)
    rules = trading_rules(costs, OPEN_END, [replace(BITCOIN, symbol=str(n)) for n in range(symbols)], Execution())
    filled = []
    def prepare():
        state = new_state(new_account(1e5), np.zeros(symbols, POSITION), rules.execution, 200_000)
        world = Simulation(tape, state, rules)
        equity = np.ones(length)
        world.state.fills["price"] = 1.
        mark(world.state.account, world.state.positions, candles[300, :, 3].copy())
        filled[:] = [world]
        return lambda: curve(targets, world.row, equity, 300)
    seconds = least(prepare)
    assert filled[0].row["code"][0] == DONE and filled[0].state.count[0] < 200_000
    return length * symbols / seconds / 1e6, int(filled[0].state.count[0])


@compiled
def crossed(parameters, memory, observation, prices, targets):
    for n in range(len(targets)): targets[n] = 1. if observation[n, 0] > observation[n, 1] else -1.


def in_python(parameters, memory, observation, prices, targets):
    targets[0] = 1. if observation[0, 0] > observation[0, 1] else -1.


def frame_of(length): return frame(np.arange(length) * HOUR + 1_500_000_000_000 // HOUR * HOUR, walk(length)[:, 0])


@compiled
def cross(parameters, columns):
    fast, slow, targets = int(parameters[0]), int(parameters[1]), np.empty(len(columns))
    for t in range(len(columns)): targets[t] = 1. if columns[t, fast] > columns[t, slow] else 0.
    return targets


def sweeps(length=100_000, pairs=1_000):
    candles = frame_of(length)
    windows = range(5, 5 + 46)
    columns = pd.DataFrame({w: candles["close"].rolling(w).mean() for w in windows})
    table = pd.DataFrame([pair for pair in product(range(46), repeat=2) if pair[0] < pair[1]][:pairs],
                         columns=["fast", "slow"])
    for name, costs, limits, goal in (("all costs", CostModel.realistic(), OPEN_END, 20),
                                      ("ideal", CostModel.ideal(), PLAIN, 100)):
        run = lambda n, rows, costs=costs, limits=limits: sweep(cross, candles[:n], table[:rows], columns[:n],
                                                                start=candles.index[300], costs=costs, limits=limits,
                                                                progress=False)
        run(2_000, 2)
        seconds = least(lambda run=run: lambda: run(length, pairs), 3)
        yield (f"sweep, {pairs:,} pairs x {length:,} candles, {name}", f"{pairs * length / seconds / 1e6:.1f} M "
               f"combinations/s (goal {goal})")


def environments():
    candles = frame_of(60_000)
    names = ["return(1)", "return(5)", "return(20)", "rsi(14)", "rsi(7)", "volatility(20)", "atr(14).relative",
             "macd(12,26,9).histogram", "bollinger(20,2)", "cci(20)", "adx(14)", "mfi(14)", "roc(10)",
             "volume_ratio(20)", "stochastic(14,3)"]
    from tradelab.features.grammar import INDICATORS
    names = [name for name in names if name.split("(")[0] in INDICATORS][:15]
    names += [f"return({n})" for n in range(30, 30 + 15 - len(names))]
    market = prepare(candles, Observation(names, window=30))
    many, one, random = MarketVecEnv(market, 64, 1_000), MarketEnv(market, 1_000), np.random.default_rng(0)
    actions = random.uniform(-1, 1, (400, 64, 1))
    many.reset(), one.reset(seed=0)
    def vector():
        for action in actions: many.step(action)
    def bare():
        for action in actions:
            if many.batch.step(action): many.batch.reset(np.flatnonzero(many.batch.ended), random)
    def single():
        for action in actions[:, 0]:
            *_, truncated, _ = one.step(action)
            if truncated: one.reset()
    for name, work, made, goal in (("64 environments (30 x 15), observations copied out", vector, 400 * 64, "2 M"),
                                   ("the same, without the copy", bare, 400 * 64, "3 M"),
                                   ("one environment", single, 400, "400 k")):
        work()
        yield name, f"{made / least(lambda work=work: work) / 1e6:.3f} M steps/s (goal {goal})"


def rows():
    for length, symbols, costs, name, goal in ((1_000_000, 1, CostModel(), "default costs", 20),
                                               (1_000_000, 1, CostModel.realistic(), "all costs", 20),
                                               (50_000, 20, CostModel.realistic(), "all costs", 50)):
        speed, fills = kernel(length, symbols, costs)
        yield (f"SMA cross, {length:,} candles x {symbols}, {name}, equity and fills", f"{speed:.1f} M symbol-bars/s "
               f"(goal {goal}), {fills:,} fills")
    candles = frame_of(300_000)
    features = ("return(20)", "return(50)")
    for name, function, goal in (("compiled policy, with observations and journal", crossed, ""),
                                 ("policy in plain Python, likewise", in_python, " (goal 0.2)")):
        policy = Policy(name, function, (), features)
        backtest(policy, candles[:2_000], limits=OPEN_END, baselines=())
        seconds = least(lambda policy=policy: lambda: backtest(policy, candles, limits=OPEN_END, baselines=()), 3)
        yield name, f"{300_000 / seconds / 1e6:.2f} M bars/s{goal}"
    short = candles[:10_000]
    seconds = least(lambda: lambda: backtest(policy, short, limits=OPEN_END, baselines=(), engine="event"), 2)
    yield "event form, through a Trader", f"{10_000 / seconds / 1e3:.0f} k bars/s"
    yield from sweeps()
    yield from environments()
    yield ("memory, all of the above", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB at "
           "most (goal 1)")
    try:
        import vectorbt
    except ImportError: return
    candles = frame_of(1_000_000)["close"]
    fast, slow = candles.rolling(20).mean(), candles.rolling(50).mean()
    run = lambda: vectorbt.Portfolio.from_signals(candles, fast > slow, fast <= slow, fees=.0005, freq="1h").value()
    run()
    yield f"vectorbt {vectorbt.__version__}, the same rule, fees only", f"{1 / least(lambda: run, 3):.1f} M bars/s"


if __name__ == "__main__":
    for name, figure in rows(): print(f"{name:75s} {figure}", flush=True)
    sys.exit(0)
