"""Seconds that compiling everything takes, in a fresh process. `make test` begins with it, so that its tests need not
compile the same twice at once. `total` takes off what the program takes that finds everything compiled."""
import os
import subprocess
import sys
import tempfile
import time

PROGRAM = """
import numpy as np
from tradelab.features.grammar import INDICATORS
from tradelab.features.observation import PORTFOLIO, Observation
from tradelab.learn.env import MarketVecEnv
from tradelab.market.candles import matrix
from tradelab.market.synthetic import ar1, funding
from tradelab.policies import Policy, buy_and_hold, flat, mlp, pack
from tradelab.sim.backtest import backtest
from tradelab.strategies.example import FadeGap, Momentum, SmaCross
from tradelab.sim.prepared import prepare

candles = ar1(3_500, seed=0)
candles = candles.assign(quote_volume=candles.volume * candles.close, trades=9.,
                         taker_buy_volume=candles.volume / 2, index_price=candles.close)
names = tuple(INDICATORS)
layers = [(np.ones((1, len(names) + len(PORTFOLIO))), np.ones(1))]
for policy in (Policy("all", mlp, pack(layers, "relu", "tanh"), names), Momentum(), SmaCross(), FadeGap()):
    for engine in ("vectorised", "event"): backtest(policy, candles, funding=funding(candles), engine=engine)
backtest(Momentum(), {name: candles for name in ("BTC/USDT:USDT", "ETH/USDT:USDT")}, baselines=())
environment = MarketVecEnv(prepare(candles, Observation(["return(1)"])), n_envs=2)
environment.reset()
environment.step(np.zeros((2, 1)))
"""


def run(**variables)->float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env={**os.environ, **variables},
                   stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def total()->float:
    "Seconds from an empty cache"
    with tempfile.TemporaryDirectory() as cache: return run(XDG_CACHE_HOME=cache) - run(XDG_CACHE_HOME=cache)


if __name__ == "__main__":
    print(f"compiling everything that the cache did not hold, and trading it: {run():.0f} s")
