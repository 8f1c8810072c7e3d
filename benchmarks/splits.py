"""Combinatorial purged cross-validation beside purgedcv and skfolio in one run: seconds, leaks, what is purged in vain.

    pip install purgedcv==0.1.11 skfolio
    python benchmarks/splits.py

Three years of hours, ten groups of which two are tested, 45 splits, embargo of a day; labels of 24 hours each, then of
random length (a triple barrier's). The oracle compares every training sample with every test sample of a split, all
n^2 pairs, in blocks. It asks two things: does a label overlap (half-open intervals, which may touch: what purgedcv
means), and is a candle shared (closed intervals: what tradelab means, because a label that ends with the first test
candle has read it). `purged in vain` are samples that share no candle, are not embargoed, and are left out all the
same. Who is not installed is not in the table."""
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from tradelab.learn.splits import CombinatorialPurgedCV

HOURS, GROUPS, TESTED, EMBARGO = 3 * 365 * 24, 10, 2, 24
INDEX = pd.date_range("2021-01-01", periods=HOURS, freq="h", tz="UTC", name="open_time")


def ours(length:np.ndarray)->Callable:
    cv = CombinatorialPurgedCV(INDEX.to_series() + pd.to_timedelta(length, "h"), GROUPS, TESTED, embargo=f"{EMBARGO}h")
    return cv.split


def purgedcv(length:np.ndarray)->Callable:
    from purgedcv import CombinatorialPurgedCV as Theirs
    cv = Theirs(GROUPS, TESTED, prediction_times=INDEX, evaluation_times=INDEX + pd.to_timedelta(length, "h"),
                embargo=pd.Timedelta(EMBARGO, "h"))
    return lambda: cv.split(np.zeros((HOURS, 1)))


def skfolio(length:np.ndarray)->Callable:
    "It knows no end times: the longest label is purged everywhere, in samples"
    from skfolio.model_selection import CombinatorialPurgedCV as Theirs
    cv = Theirs(GROUPS, TESTED, purged_size=int(length.max()), embargo_size=EMBARGO)
    return lambda: ((train, np.concatenate(tests)) for train, tests in cv.split(np.zeros((HOURS, 1))))


def pairs(train:np.ndarray, test:np.ndarray, ends:np.ndarray, meets:Callable)->np.ndarray:
    "Whether each training sample meets any test sample: every pair, some training samples at a time"
    found = [meets(part[:, None], ends[part][:, None], test, ends[test]).any(axis=1)
             for part in np.array_split(train, max(len(train) // 500, 1))]
    return np.concatenate(found)


def half_open(start, end, other, other_end): return (start < other_end) & (other < end)
def closed(start, end, other, other_end): return (start <= other_end) & (other <= end)
def embargoed(start, end, other, other_end): return (start > other_end) & (start <= other_end + EMBARGO)


def judged(splits:list, length:np.ndarray)->dict[str, int]:
    "What the oracle says of all splits together"
    ends = np.arange(HOURS) + length
    found = {"labels that overlap": 0, "samples that share a candle": 0, "in the embargo": 0, "purged in vain": 0}
    for train, test in splits:
        found["labels that overlap"] += pairs(train, test, ends, half_open).sum()
        found["samples that share a candle"] += pairs(train, test, ends, closed).sum()
        found["in the embargo"] += pairs(train, test, ends, embargoed).sum()
        rest = np.setdiff1d(np.arange(HOURS), np.concatenate([train, test]))
        found["purged in vain"] += (~pairs(rest, test, ends, closed) & ~pairs(rest, test, ends, embargoed)).sum()
    return {name: int(count) for name, count in found.items()}


def timed(make:Callable, length:np.ndarray)->tuple[float, list]:
    "The least seconds of three runs, with the splitter made anew, and the splits"
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        splits = list(make(length)())
        seconds.append(time.perf_counter() - begin)
    return min(seconds), splits


def main()->None:
    random = np.minimum(np.random.default_rng(0).geometric(1 / 24, HOURS), 240)
    rows = {}
    for said, length in (("24 hours", np.full(HOURS, 24)), ("1 to 240 hours, random", random)):
        for name, make in (("tradelab", ours), ("purgedcv", purgedcv), ("skfolio", skfolio)):
            try: seconds, splits = timed(make, length)
            except ImportError: continue
            rows[said, name] = {"seconds": round(seconds, 3), "splits": len(splits)} | judged(splits, length)
    print(f"{HOURS:,} hours, {GROUPS} groups, {TESTED} tested, embargo {EMBARGO} hours; counts over all splits\n")
    print(pd.DataFrame.from_dict(rows, "index").rename_axis(["labels of", ""]).to_string())


if __name__ == "__main__": main()
