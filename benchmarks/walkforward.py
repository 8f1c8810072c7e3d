"""How long a walk-forward takes: `python benchmarks/walkforward.py [agent]`. Nothing here is a test.

Six folds, five seeds of 40,000 steps (the default agent: PPO), three years of hourly Bitcoin: on real candles and
funding rates where ../shared/data has them, else on synthetic ones. The demand is 60 minutes on two cores.
"""
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from tradelab.events import COLUMNS
from tradelab.features.observation import Observation
from tradelab.learn.tasks import cores
from tradelab.learn.walkforward import walk_forward
from tradelab.market.candles import frame
from tradelab.market.synthetic import ar1
from tradelab.settings import CostModel, Limits

FEATURES = ["return(1)", "return(24)", "rsi(14)", "macd(12,26,9).histogram", "volatility(24)"]
YEARS = 3 * 365 * 24 # candles
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def market()->tuple[pd.DataFrame, pd.Series|None]:
    "The last three years of hourly candles, and the funding rates"
    if not (file := DATA / "BTCUSDT-perp-1h.parquet").exists():
        return ar1(YEARS, rho=.02, volatility=.006, seed=0, start="2021-01-01"), None
    table = pd.read_parquet(file)
    candles = frame(table["timestamp"], table[list(COLUMNS)])[-YEARS:]
    candles.attrs["source"] = file.name
    rates = pd.read_parquet(DATA / "BTCUSDT-perp-funding-8h.parquet")
    moments = pd.to_datetime(rates["timestamp"], unit="ms", utc=True)
    return candles, pd.Series(rates.drop(columns="timestamp").iloc[:, 0].to_numpy(float), pd.DatetimeIndex(moments))


if __name__ == "__main__":
    agent = sys.argv[1] if len(sys.argv) > 1 else "PPO"
    candles, rates = market()
    print(f"{len(candles):,} candles, {candles.index[0]:%Y-%m-%d} to {candles.index[-1]:%Y-%m-%d}: "
          f"{candles.attrs['source']}")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        result = walk_forward([agent], candles, Observation(FEATURES), steps=40_000, folds=6, seeds=5, funding=rates,
                              costs=CostModel(), limits=Limits(), gaps=True, folder=Path(folder))
        seconds = time.perf_counter() - begin
        print(f"6 folds x 5 seeds of {agent}, 40,000 steps each: {seconds / 60:.1f} minutes on {cores()} cores (60 are "
              f"allowed)\n{result}\n{result.seeds().to_string(float_format='{:.2f}'.format)}")
