"A thousand candles: memory, files and tasks do not grow, and orders that are over are forgotten"
import asyncio
import gc
import os
from pathlib import Path

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
    data, seen = market_data(ar1(1_030, volatility=.01, seed=3)), {}

    def look(statistics):
        if statistics.candles not in (300, 1_000): return
        gc.collect()
        seen[statistics.candles] = memory(), len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())

    trader = Run("memory", Momentum(2, .001), timeframe="1h").trader(instruments=data.instruments)
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    live = Session(trader, MemoryVenue(data, start=int(data.times[20])), ledger, tmp_path, id="soak",
                   say=lambda line: None, progress=look)
    asyncio.run(live.run(1_000))
    (before, files, tasks), (after, more_files, more_tasks) = seen.values()
    assert after < 1.05 * before
    assert more_files == files
    assert more_tasks == tasks
    assert len(ledger.intents("soak")) > 300
