"""Seconds that compiling everything takes from an empty cache: the same program in a fresh process, once with an empty cache and once with a warm one."""
import os
import subprocess
import sys
import tempfile
import time

PROGRAM = """
import numpy as np
from tradelab.features.grammar import INDICATORS
from tradelab.features.observation import PORTFOLIO, Observation
from tradelab.learn.env import Market, MarketVecEnv
from tradelab.market.candles import matrix
from tradelab.market.synthetic import ar1, funding
from tradelab.policies import Policy, buy_and_hold, flat, mlp, pack
from tradelab.sim.backtest import backtest
from tradelab.strategies.example import FadeGap, Momentum, SmaCross

candles = ar1(3_500, seed=0)
candles = candles.assign(quote_volume=candles.volume * candles.close, trades=9., taker_buy_volume=candles.volume / 2, index_price=candles.close)
names = tuple(INDICATORS)
layers = [(np.ones((1, len(names) + len(PORTFOLIO))), np.ones(1))]
for policy in (Policy("all", mlp, pack(layers, "relu", "tanh"), names), Momentum(), SmaCross(), FadeGap()):
    for form in ("array", "event"): backtest(policy, candles, funding=funding(candles), form=form)
environment = MarketVecEnv(Market.of(candles, Observation(["return(1)"])), n=2)
environment.reset()
environment.step(np.zeros((2, 1)))
"""


def run(cache:str)->float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env={**os.environ, "XDG_CACHE_HOME": cache}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def total()->float:
    "Seconds of compilation"
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = run(cache), run(cache)
    return cold - warm


if __name__ == "__main__": print(f"cold compile of everything: {total():.0f} s (goal 90 s)")
