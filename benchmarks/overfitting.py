"""Probability of backtest overfitting: how long it takes, and the same beside purgedcv, in one run

    pip install purgedcv==0.1.11     (the peer; without it that column says so)
    python benchmarks/overfitting.py

Seconds of one core's wall clock, the best of three (the peer: once). Returns are synthetic noise."""
import os
import time

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", NUMBA_NUM_THREADS="1") # before numpy is loaded

import numpy as np
import pandas as pd

from tradelab.evaluation.overfitting import block_sums, choices, overfitting

try:
    import purgedcv
except ImportError:
    purgedcv = None


def noise(count, candidates):
    days = pd.date_range("2005-01-01", periods=count, tz="UTC", name="open_time")
    return pd.DataFrame(np.random.default_rng(0).normal(0, .01, (count, candidates)), days)


def seconds(repeat, call, *given):
    "The best of several runs, and what the last returned"
    took = []
    for _ in range(repeat):
        begin = time.perf_counter()
        found = call(*given)
        took.append(time.perf_counter() - begin)
    return min(took), found


def alone(returns, blocks):
    "PBO without its spread, as the peer computes it"
    values = returns.to_numpy()
    return choices(block_sums(values - values.mean(axis=0), blocks), values.mean(axis=0))


overfitting(noise(100, 3), 4) # compiles
print(f"{'S':>3} {'N':>5} {'T':>6}  {'PBO ± spread':>14} {'with spread':>12} {'PBO alone':>10} {'purgedcv':>10}  same")
for blocks, candidates, count, peer in ((8, 10, 1_000, True), (10, 50, 1_000, True), (16, 50, 1_000, True),
                                        (16, 500, 5_000, False), (16, 2_000, 5_000, False)):
    returns = noise(count, candidates)
    full, found = seconds(1 if candidates > 1_000 else 3, overfitting, returns, blocks)
    short, _ = seconds(3, alone, returns, blocks)
    said, same = "-", ""
    if peer and purgedcv is None: said = "not here"
    elif peer:
        long, other = seconds(1, purgedcv.probability_of_backtest_overfitting, returns.to_numpy().T, blocks)
        apart = abs(np.sort(found.logits) - np.sort(other.logits)).max()
        said, same = f"{long:.1f} s", f"logits within {apart:.0e}, PBO {other.pbo:.4f} and {found.pbo:.4f}"
    print(f"{blocks:3} {candidates:5} {count:6}  {found.pbo:7.2f} ± {found.spread:.2f} {full:10.2f} s {short:8.2f} s "
          f"{said:>10}  {same}", flush=True)
