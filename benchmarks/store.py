"""What the candle store costs: `python benchmarks/store.py`. Nothing here is a test.

A year of one-minute candles is written, read, asked for what is missing and described; then the index of many series.
Times are medians, CPU and wall.
"""
import statistics
import tempfile
import time
from pathlib import Path

from tradelab.market.candles import resample, times
from tradelab.market.store import Store, months
from tradelab.market.synthetic import ar1
from tradelab.times import milliseconds

MINUTES = 366 * 1440 # of 2024


def measured(call, repeat:int=7):
    "Median wall and CPU milliseconds of a call"
    walls, cpus = [], []
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(1000 * (time.perf_counter() - wall))
        cpus.append(1000 * (time.process_time() - cpu))
    return statistics.median(walls), statistics.median(cpus)


def table(folder:Path):
    year = ar1(MINUTES, .3, .0008, 1, "1m", "2024-01-01")
    rich = year.assign(quote_volume=year.volume * year.close, trades=100., taker_buy_volume=year.volume / 2)
    span, store = ("okx", "BTC/USDT", "1m", times(year)[0], times(year)[-1] + 60_000), Store(folder / "one")
    yield "write a year of 1m", "", *measured(lambda: store.write(*span[:3], year), 3)
    yield "read a year of 1m", "goal 200 ms", *measured(lambda: store.read(*span))
    yield "read one day of it", "", *measured(lambda: store.read(*span[:3], "2024-07-01", "2024-07-02"))
    yield "what is missing of it", "", *measured(lambda: store.missing(*span))
    yield "write the last hour again", "", *measured(lambda: store.write(*span[:3], year[-60:]))
    store.write("okx", "ETH/USDT", "1m", rich, now=span[4] + milliseconds("1h"))
    yield "read a year of 1m with all optional columns", "", *measured(lambda: store.read("okx", "ETH/USDT", "1m"))
    size = sum(path.stat().st_size for path in months(store.series(*span[:3])))
    print(f"{len(year):,} candles in {size / 1e6:.1f} MB ({size / len(year):.1f} bytes a candle; synthetic prices)")
    many, month = Store(folder / "many"), ar1(36 * 31 * 24, .3, .002, 1, "1h", "2021-01-01")
    for i in range(20): many.write("okx", f"COIN{i}/USDT", "1h", month)
    yield f"index of {int(many.held().months.sum())} months", "", *measured(many.held)
    yield "resample a year of 1m to 1h", "", *measured(lambda: resample(year, "1h"), 3)


with tempfile.TemporaryDirectory() as folder:
    for name, goal, wall, cpu in table(Path(folder)):
        print(f"{name:45} {wall:8.1f} ms wall {cpu:8.1f} ms CPU   {goal}", flush=True)
