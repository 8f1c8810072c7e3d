"""The same orders in another engine: fills and equity to the cent, and how fast. It needs numpy and the engine alone:
`python benchmarks/engines.py vectorbt`, in that engine's environment; `tradelab` likewise.

A walk on a tick of 0.1; long 7 units while the 20-candle average is above the 50-candle one (equal is not above; in
whole ticks, so that there are no rounding ties), flat otherwise, or short 7; decided at the close, filled at the next
open."""
import sys
from dataclasses import replace
from time import process_time

import numpy as np

FEE = .0005


def walk(length=2_000, seed=7):
    "Candles in whole ticks of 0.1: open, high, low, close"
    random = np.random.default_rng(seed)
    close = 100_000 + np.cumsum(random.integers(-400, 401, length))
    opened = np.append(100_000, close[:-1]) + random.integers(-50, 51, length)
    return np.stack([opened, np.maximum(opened, close) + random.integers(0, 200, length),
                     np.minimum(opened, close) - random.integers(0, 200, length), close], axis=1)


def holding(ticks, short):
    "Units to hold, decided at each close"
    total = np.append(0, np.cumsum(ticks[:, 3]))
    average = lambda width: np.append(np.full(width - 1, -1), total[width:] - total[:-width])
    above = 50 * average(20) > 20 * average(50)                        # whole numbers: no ties by rounding
    held = np.where(above, 7, -7 if short else 0)
    held[:50] = 0
    return held


def orders(held): return np.diff(held, prepend=0)


def with_tradelab(ticks, held, fee):
    from tradelab.account import POSITION, new_account
    from tradelab.instruments import BITCOIN
    from tradelab.journal import JOURNAL
    from tradelab.risk.execution import place_target
    from tradelab.settings import CostModel, Execution, Limits
    from tradelab.sim.kernel import Simulation, market_arrays, trading_rules
    from tradelab.sim.matching import new_state
    candles = np.concatenate([ticks / 10, np.full((len(ticks), 1), 1e9)], axis=1)[:, None, :]
    asked = orders(held).astype(float)
    costs, limits = CostModel(taker_fee=fee, slippage=0.), Limits()
    tape = market_arrays(np.arange(len(ticks)) * 3_600_000, candles, np.zeros((len(ticks), 1)), costs, limits)
    rules = trading_rules(costs, limits, [replace(BITCOIN, quantity_step=1., min_quantity=1.)], Execution())
    state = new_state(new_account(1e6), np.zeros(1, POSITION), rules.execution, 10_000)
    world, equity = Simulation(tape, state, rules), np.full(len(ticks), 1e6)
    for t in range(len(ticks) - 1):
        place_target(world.state, world.rules, 0, asked[t], 0, candles[t, 0, 3])
        world.step(t, np.zeros(0), np.zeros(1, JOURNAL))
        equity[t + 1] = state.account[0]["equity"]
    state = world.state
    fills = state.fills[:state.count[0]]
    count = len(np.unique(fills["open_time"])) # from long to short is one order there, and here two of one candle
    return count, float((fills["price"] * fills["quantity"]).sum()), equity


def with_vectorbt(ticks, held, fee):
    import pandas as pd
    import vectorbt
    price = ticks / 10
    size = np.append(0, orders(held)[:-1]).astype(float) # what was decided at a close is traded at the next open
    run = vectorbt.Portfolio.from_orders(pd.Series(price[:, 3]), pd.Series(np.where(size == 0, np.nan, size)),
                                         price=pd.Series(price[:, 0]), fees=fee, init_cash=1e6, freq="1h")
    records = run.orders.records
    signed = records["size"] * np.where(records["side"] == 0, 1, -1)
    return len(records), float((signed * records["price"]).sum()), run.value().to_numpy()


def with_backtesting(ticks, held, fee):
    import pandas as pd
    from backtesting import Backtest, Strategy
    frame = pd.DataFrame(ticks / 10, pd.date_range("2023-01-01", periods=len(ticks), freq="1h"),
                         ["Open", "High", "Low", "Close"]).assign(Volume=1e9)
    asked = orders(held)

    class Given(Strategy):
        def init(self): pass
        def next(self):
            size = int(asked[len(self.data) - 1])
            if size: (self.buy if size > 0 else self.sell)(size=abs(size))

    stats = Backtest(frame, Given, cash=1e6, commission=fee, exclusive_orders=False, finalize_trades=False).run()
    placed = asked[:-1][asked[:-1] != 0]
    return (len(placed), float((placed * frame["Open"].to_numpy()[np.flatnonzero(asked[:-1]) + 1]).sum()),
            stats["_equity_curve"]["Equity"].to_numpy())


ENGINES = {"tradelab": with_tradelab, "vectorbt": with_vectorbt, "backtesting": with_backtesting}


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "tradelab"
    print(name, getattr(__import__(name), "__version__", ""))
    ticks = walk()
    for short in (False, True):
        for fee in (0., FEE):
            run = ENGINES[name]
            run(ticks, holding(ticks, short), fee)
            begin = process_time()
            count, cash, equity = run(ticks, holding(ticks, short), fee)
            print(f"{'long/short' if short else 'long/flat':10s} fee {fee:.2%}: {count} fills, sum of quantity x price "
                  f"{cash:.4f}, equity {equity[-1]:.6f}, sum of the curve {equity.sum():.4f}, "
                  f"{len(ticks) / (process_time() - begin) / 1e3:.0f} k bars/s", flush=True)
