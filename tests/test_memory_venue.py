"A live session on a venue in memory is the backtest: the same decisions, orders, fills and equity, bit for bit"
import asyncio

import numpy as np

from tradelab.evaluation.difference import first_difference
from tradelab.live.ledger import Ledger
from tradelab.live.session import Session
from tradelab.market.synthetic import ar1, funding
from tradelab.runs.run import Run
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import market_data
from tradelab.strategies.example import Momentum
from tradelab.venues.memory import MemoryVenue

FRAME = ar1(120, volatility=.01, seed=3)
RATES = funding(FRAME, seed=3)
START = 20


def test_a_session_of_targets_is_the_backtest(tmp_path):
    policy = Momentum(2, .001)
    data = market_data(FRAME, funding=RATES)
    venue = MemoryVenue(data, start=int(data.times[START]))
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    trader = Run("memory", policy, timeframe="1h").trader(instruments=data.instruments)
    session = Session(trader, venue, ledger, tmp_path, id="memory", say=lambda line: None)
    asyncio.run(session.run(len(FRAME) - START - 1))
    expected = backtest(policy, FRAME, FRAME.index[START], funding=RATES, baselines=())
    journal = ledger.journal("memory")
    assert (journal["order"] != 0).sum() > 20
    assert (journal["funding"] != 0).sum() > 5
    assert first_difference(expected.journal, journal) is None
    ours = venue.held.simulation.state.fills[:len(expected.fill_rows)]
    assert np.array_equal(expected.fill_rows, ours)
