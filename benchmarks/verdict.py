"""How often the verdict says "evidence of skill" of luck, and how often of skill that was planted

    python benchmarks/verdict.py [REPETITIONS]     (200 by default, some minutes)

Synthetic: three years of days of a market without memory, and rules that know nothing of it (averages, momentum,
reversal, breakouts, random positions), as they come and without costs, which would only make them worse. Baselines are
flat, buy and hold, always short and an SMA cross. Skill has an annual Sharpe ratio of 2, independent of the market.

The bound is the power of the best test that could be: of independent trials with known risk, which calls the best of
them good by luck in 5 % of histories. Beside it, how often single rows of the evidence pass: the chance of the best
(needed), the deflated Sharpe ratio at 0.95 (informs), SPA, above and beyond the baselines (needed)."""
import sys
import time

import numpy as np
import pandas as pd
from scipy.stats import norm

from tradelab.evaluation.stability import annual_sharpes
from tradelab.evaluation.verdict import verdict

DAYS, WARM, BASELINES = 1_095, 260, ["flat", "buy and hold", "always short", "SMA cross"]
INDEX = pd.date_range("2021-01-01", periods=DAYS, tz="UTC", name="open_time")


def average(prices, length):
    sums = np.cumsum(np.insert(prices, 0, 0.))
    found = np.full(len(prices), np.nan)
    found[length - 1:] = (sums[length:] - sums[:-length]) / length
    return found


def positions(prices, random, count):
    "What random rules hold during the next day, (days, count), from the prices so far"
    found = np.empty((len(prices), count))
    for rule in range(count):
        kind, (short, long) = random.integers(4), np.sort(random.integers(2, 250, 2)) + [0, 1]
        if kind == 0: signal = average(prices, short) - average(prices, long)
        elif kind == 1: signal = prices - np.roll(prices, long)
        elif kind == 2: signal = prices - average(prices, long)
        else: signal = random.choice((-1, 1), len(prices)).repeat(random.integers(1, 20))[:len(prices)]
        side = np.sign(signal) * random.choice((-1, 1))
        found[:, rule] = np.maximum(side, 0) if random.random() < .3 else side
    return found


def history(seed, count, drift=0., days=DAYS):
    "Returns of random rules and of the baselines over three years"
    random = np.random.default_rng(seed)
    market = random.standard_t(5, days + WARM) * .025 + drift * .025 * (5 / 3) ** .5 / 365 ** .5
    prices = np.cumsum(np.log1p(np.maximum(market, -.5)))
    held = np.column_stack([positions(prices, random, count), np.zeros(len(prices)), np.ones(len(prices)),
                            -np.ones(len(prices)), average(prices, 20) > average(prices, 50)])
    returns = held[WARM - 1:-1] * market[WARM:, None]
    return pd.DataFrame(returns, pd.date_range("2021-01-01", periods=days, tz="UTC", name="open_time"),
                        [*range(count), *BASELINES])


def best_of(returns):
    return annual_sharpes(returns.drop(columns=BASELINES)).idxmax()


def best_of_all(seed, drift=0.):
    returns = history(seed, 1_000, drift)
    return returns, best_of(returns), 1_000


def by_the_hour(seed):
    "A thousand rules that are long or short by a coin each hour, in days; they have nothing in common"
    random = np.random.default_rng(seed)
    market = random.standard_t(4, (DAYS, 24)) * .005
    sides = random.integers(0, 2, (DAYS, 24, 1_000), np.int8)
    returns = pd.DataFrame(2 * np.einsum("dh,dhr->dr", market, sides) - market.sum(axis=1)[:, None], INDEX)
    held = market.sum(axis=1)
    trend = average(np.cumsum(held), 20) > average(np.cumsum(held), 50)
    returns[BASELINES] = np.column_stack([0 * held, held, -held, np.append(0., trend[:-1]) * held])
    return returns, best_of(returns), 1_000


def best_of_training(seed):
    "Chosen over three years, judged over the next three; all thousand count"
    returns = history(seed, 1_000, days=2 * DAYS)
    return returns[DAYS:], best_of(returns[:DAYS]), 1_000


def chosen_once(seed):
    "The same, judged as if it were the only one ever tried: out of sample it is one draw"
    returns, best, _ = best_of_training(seed)
    return returns[[best, *BASELINES]], best, 1


def planted(seed, count):
    "Skill and count - 1 random rules"
    returns = history(seed, max(count - 1, 1)).iloc[:, max(2 - count, 0):]
    skill = np.random.default_rng(10_000 + seed).standard_t(5, DAYS) * .01
    returns.insert(0, "skill", skill + 2 * .01 * (5 / 3) ** .5 / 365 ** .5)
    return returns, "skill", count


def bound(sharpe, years, trials, level=.05):
    "The power of the best test of independent trials that is wrong in `level` of histories"
    return norm.sf(norm.isf(1 - (1 - level) ** (1 / trials)) - sharpe * years ** .5)


CASES = [("best of 1,000 random rules, same data", best_of_all, 0.), ("best of 1,000, market with a Sharpe ratio of 1",
          lambda seed: best_of_all(seed, 1.), 0.), ("best of 1,000 that toss a coin each hour",
          by_the_hour, 0.), ("best of 1,000 in training, judged after it", best_of_training, 0.),
         ("the same, counted as one trial", chosen_once, 0.), ("planted, alone", lambda seed: planted(seed, 1), 2.),
         ("planted among 10", lambda seed: planted(seed, 10), 2.), ("planted among 100",
          lambda seed: planted(seed, 100), 2.), ("planted among 1,000", lambda seed: planted(seed, 1_000), 2.)]


def measure(make, repetitions):
    "The share of histories in which evidence was found, and in which each needed row alone passes"
    said, rows = [], []
    for seed in range(repetitions):
        returns, subject, trials = make(seed)
        found = verdict(returns, subject, trials=trials, baselines=BASELINES, draws=400, blocks=6, seed=seed)
        said.append(found.skill)
        rows.append({each.what: each.passed for each in found.evidence})
    return np.mean(said), pd.DataFrame(rows).mean()


if __name__ == "__main__":
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"{repetitions} repetitions, three years of days\n{'':46}" + "".join(f"{each:>10}" for each in (
        "evidence", "bound", "chance", "deflated", "SPA", "above", "beyond", "time")))
    for name, make, sharpe in CASES:
        begin = time.perf_counter()
        share, alone = measure(make, repetitions)
        best = bound(sharpe, 3, int("".join(filter(str.isdigit, name)) or 1)) if sharpe else .05
        needed = [min(alone[each] for each in alone.index if each.startswith(part)) for part in (
            "Chance of", "Deflated", "SPA", "Sharpe ratio above", "Chance beyond")]
        print(f"{name:46}" + "".join(f"{each:10.1%}" for each in (share, best, *needed))
              + f"{time.perf_counter() - begin:8.0f} s", flush=True)
