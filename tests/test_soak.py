"A thousand candles: memory, files and tasks do not grow, and orders that are over are forgotten"
import asyncio
import gc
import os
from pathlib import Path

import numpy as np

from tradelab.live import order_manager
from tradelab.live.ledger import Ledger
from tradelab.live.session import Session
from tradelab.market.synthetic import ar1
from tradelab.runs.run import Run
from tradelab.sim.prepared import market_data
from tradelab.strategies.example import Momentum
from tradelab.venues.memory import MemoryVenue


def memory(): return int(Path("/proc/self/statm").read_text().split()[1])


def test_a_thousand_candles_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(order_manager.droppable, "__defaults__", (100,))
    data, early, late = market_data(ar1(1_030, volatility=.01, seed=3)), [], []

    def look(statistics):
        if statistics.candles % 300 < 280 or statistics.candles > 1_000: return
        if statistics.candles % 300 == 299: gc.collect()
        seen = early if statistics.candles < 300 else late
        seen.append((memory(), len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())))

    trader = Run("memory", Momentum(2, .001), timeframe="1h").trader(instruments=data.instruments)
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    live = Session(trader, MemoryVenue(data, start=int(data.times[20])), ledger, tmp_path, id="soak",
                   say=lambda line: None, progress=look)
    asyncio.run(live.run(1_000))
    before, after = (np.array(each[-20:]).min(axis=0) for each in (early, late)) # a file may be written just then
    assert after[0] < 1.05 * before[0]
    assert after[1] <= before[1]
    assert after[2] <= before[2]
    assert len(ledger.intents("soak")) > 300
