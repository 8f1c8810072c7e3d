"""What a stop costs: nanoseconds a candle in the compiled loop, CPU time. `python benchmarks/stops.py`"""
from time import process_time

import numpy as np

from tradelab.account import POSITION
from tradelab.compiled import compiled
from tradelab.events import CLOSE, HIGH, LOW, OPEN
from tradelab.market.synthetic import realistic
from tradelab.risk.stops import enter, exit_price, next_atr, simulate, touched, track
from tradelab.settings import Limits, Stops


@compiled
def enter_again(position, price, atr):
    position["quantity"], position["entry_price"], position["age"] = 1., price, 0.
    enter(position, atr, 1.)


@compiled
def at_closes(candles, positions, settings, ranges):
    "Always in the market: `touched`, `track` and, where it is asked for, the average true range at each close"
    position, atr, before, left = positions[0], 1., candles[0, CLOSE], 0
    enter_again(position, before, atr)
    for t in range(len(candles)):
        code, _ = touched(position, candles[t, HIGH], candles[t, LOW], settings)
        track(position, candles[t, HIGH], candles[t, LOW])
        position["age"] += 1.
        if ranges:
            atr, before = (next_atr(atr, candles[t, HIGH], candles[t, LOW], before, settings["atr_period"]),
                           candles[t, CLOSE])
        if code:
            left += 1
            enter_again(position, candles[t, CLOSE], atr)
    return left


@compiled
def at_the_exchange(candles, positions, settings):
    "The same with the price of each exit"
    position, total = positions[0], 0.
    enter_again(position, candles[0, OPEN], 1.)
    for t in range(len(candles)):
        code, price = exit_price(position, candles[t, OPEN], candles[t, HIGH], candles[t, LOW], settings)
        track(position, candles[t, HIGH], candles[t, LOW])
        position["age"] += 1.
        if code:
            total += price
            enter_again(position, candles[t, CLOSE], 1.)
    return total


@compiled
def reading(candles):
    "The loop alone"
    total = 0.
    for t in range(len(candles)): total += candles[t, HIGH] - candles[t, LOW]
    return total


def nanoseconds(work, candles, *arguments):
    "The quickest of seven, after one that compiles"
    taken = []
    for _ in range(8):
        begin = process_time()
        work(candles, *arguments)
        taken.append(process_time() - begin)
    return min(taken[1:]) / len(candles) * 1e9


if __name__ == "__main__":
    candles = np.tile(realistic(100_000, seed=1)[["open", "high", "low", "close", "volume"]].to_numpy(), (10, 1))
    positions = np.zeros(1, POSITION)
    print(f"{'the loop alone':60} {nanoseconds(reading, candles):5.1f} ns a candle")
    for name, stops in (("fixed stop and target (goal 15)", Stops()),
                        ("the same and a trailing stop", Stops(trailing_stop=.02)),
                        ("all in ATRs", Stops(0., 0., 0., 2., 4., 2.)),
                        ("all in ATRs, 24 candles at most", Stops(0., 0., 0., 2., 4., 2., max_age=24))):
        row, ranges = Limits(stops=stops).row(), bool(stops.stop_atr)
        print(f"{'touched and track, ' + name:60} {nanoseconds(at_closes, candles, positions, row, ranges):5.1f} ns a "
              f"candle, {at_closes(candles, positions, row, ranges):,} exits", flush=True)
        if ranges and not stops.max_age:
            with_range, without = (nanoseconds(at_closes, candles, positions, row, each) for each in (True, False))
            print(f"{'  of that the average true range':60} {with_range - without:5.1f} ns")
    print(f"{'exit_price and track, fixed stop and target':60} "
          f"{nanoseconds(at_the_exchange, candles, positions, Limits().row()):5.1f} ns a candle")
    print(f"{'simulate, fixed stop and target, always in':60} "
          f"{nanoseconds(simulate, candles, np.ones(len(candles)), Limits().row()):5.1f} ns a candle, checks of the "
          "input included")
