"""What a candle costs in the live core, in memory: milliseconds of the processor from the candle to the last action of
its step, without what the driver does with them; and what its recording costs, with the bytes that it leaves.
`python benchmarks/core.py`"""
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time_ns

import numpy as np

from tradelab.events import Fill
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.live.bookkeeper import Bookkeeper, Feed
from tradelab.live.core import Core, Terms
from tradelab.live.messages import Answered, Fetch, Fetched, Mark, Received, Send, StepDone
from tradelab.live.order_manager import Blotter, OrderManager
from tradelab.live.order_states import State
from tradelab.live.recorder import Recorder
from tradelab.live.steps import live
from tradelab.live.venue import AccountSnapshot, Answer, Candle, OrderReport, Outcome
from tradelab.market.candles import matrix
from tradelab.market.synthetic import ar1
from tradelab.risk.execution import OrderGate
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader

HOUR, HISTORY, CANDLES = 3_600_000, 100, 3_000


def core_of(times, candles):
    policy = Momentum(lookback=5, threshold=.005)
    trader = Trader(policy, Observation.from_policy(policy), OrderGate, instruments=(BITCOIN,))
    trader.warm(times[:HISTORY], candles[:HISTORY])
    core = Core(Terms("benchmark", "1h"), trader, Bookkeeper(trader, HOUR), OrderManager("benchmark", Blotter()), live)
    core.feed = Feed(trader.seen, HOUR, trader.open_time)
    core.guards.asked(core.guards.troubles)
    return core


class Exchange:
    "Fills everything at once, and says what the trader expects"

    def __init__(self, core): self.core, self.orders = core, 0

    def answers(self, actions, now):
        for action in actions:
            if isinstance(action, Send):
                order, self.orders = action.order, self.orders + 1
                report = OrderReport(order.order_id, State.FILLED, abs(order.quantity), str(self.orders))
                yield Fill(order.symbol, order.quantity, order.decision_price, .01, now, order.order_id,
                           str(self.orders))
                yield Answered(action, Answer(Outcome.ACCEPTED, report))
            elif isinstance(action, Fetch):
                account, positions = self.core.trader.account[0], self.core.trader.positions["quantity"]
                wallet = account["deposit"] + account["realised"] - account["fees"] + account["funding"]
                held = {BITCOIN.symbol: float(positions[0])} if positions[0] else {}
                yield Fetched(action.number, AccountSnapshot(float(wallet), held))


def step(core, exchange, recorder, open_time, values):
    "Nanoseconds in the core and in the recorder for one candle, and whether it brought an order"
    spent, recording, now, before = 0, 0, int(open_time) + HOUR + 20, exchange.orders
    events = [Candle(BITCOIN.symbol, int(open_time), tuple(float(value) for value in values))]
    while events:
        received = Received(now, events)
        begin = process_time_ns()
        recorder.received(received)
        told = process_time_ns()
        actions = core.on(received)
        answered = process_time_ns()
        recorder.answered(actions)
        spent += answered - told
        recording += told - begin + process_time_ns() - answered
        now += 1
        events = list(exchange.answers(actions, now))
    assert any(isinstance(action, StepDone) for action in actions)
    return spent, recording, exchange.orders > before


def looks(core, count=3_000):
    "Microseconds of the processor for each look at a mark price, with a position held"
    core.trader.on(Fill(BITCOIN.symbol, .01, 20_000., .01, core.now, "tl-held", "held"))
    spent = []
    for n in range(count):
        received = Received(core.now + 1_000, [Mark(BITCOIN.symbol, 20_000. + n % 7, core.now + 1_000)])
        begin = process_time_ns()
        core.on(received)
        spent.append((process_time_ns() - begin) / 1e3)
    return spent


if __name__ == "__main__":
    times, candles, _ = matrix({BITCOIN.symbol: ar1(HISTORY + CANDLES, volatility=.01, seed=3)})
    core = core_of(times, candles)
    exchange = Exchange(core)
    core.on(Received(int(times[HISTORY])))
    with TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder) / "recording.zst")
        spent = [step(core, exchange, recorder, times[t], candles[t, 0])
                 for t in range(HISTORY, HISTORY + CANDLES)][100:]
        recorder.close()
        size = (Path(folder) / "recording.zst").stat().st_size
    for name, ordered in (("without an order", False), ("with an order", True)):
        for what, column in (("core", 0), ("recording", 1)):
            chosen = [row[column] for row in spent if row[2] is ordered]
            print(f"{what:<9} of a candle {name:<17} median {median(chosen) / 1e6:.3f} ms, p99 "
                  f"{np.percentile(chosen, 99) / 1e6:.3f} ms, {len(chosen):,} candles")
    print(f"{size / CANDLES:,.0f} bytes a candle, without the frames of the sockets")
    passes = []
    for _ in range(8): # the same looks again: the least of each is the work, the rest is what else the machine does
        core = core_of(times, candles)
        core.on(Received(int(times[HISTORY]) + HOUR))
        passes.append(looks(core))
    for what, marks in (("as measured", np.ravel(passes)), ("least of 8 passes", np.min(passes, axis=0))):
        print(f"a look at a mark price, {what:<17} median {median(marks):.0f} us, 99th percentile "
              f"{np.percentile(marks, 99):.0f} us, most {max(marks):.0f} us")
