"""The order gate and the measures of risk: validations per second and milliseconds per candle, CPU time. `python
benchmarks/risk.py`"""
from dataclasses import replace
from time import process_time

import numpy as np

from tradelab.account import POSITION, new_account
from tradelab.compiled import compiled
from tradelab.evaluation.value_at_risk import TailRisk
from tradelab.instruments import BITCOIN
from tradelab.risk.breakers import Breakers
from tradelab.risk.limits import Gate, gate, propose
from tradelab.risk.portfolio import PortfolioRisk
from tradelab.settings import Limits, Stops, instrument_rows

HOUR = 3_600_000
EVERYTHING = Limits(max_net=.5, max_group=.5, max_var=.02, max_sector=.5,
                    sectors={str(n): str(n % 4) for n in range(20)}, target_volatility=.8, drawdown_from=.05,
                    max_order=.1, min_confidence=.1,
                    stops=Stops(trailing_stop=.03, stop_loss=0., stop_atr=2.))


@compiled
def many(answers, proposals, candles, account, positions, market, covariance, limits, instruments):
    "The array form: one gate after another, as the kernel calls it"
    sent = 0
    for t in range(len(answers)):
        candle = candles[t % len(candles)]
        propose(proposals, answers[t], candle, candle[:, 3])
        gate(proposals, t * 3_600_000, candles[t % len(candles)], account, positions, market, covariance, limits,
             instruments)
        sent += proposals[0]["quantity"] != 0.
    return sent


def seconds(work, *arguments):
    "The quickest of three"
    taken = []
    for _ in range(3):
        begin = process_time()
        work(*arguments)
        taken.append(process_time() - begin)
    return min(taken)


def one_by_one(rules, candle, answer, account, positions):
    for t in range(5_000): rules.decide(t * HOUR, candle, answer, account, positions)


def all_of_them(tails, book, closes, weights, positions):
    for t in range(200):
        tails.update(closes[t])
        book.update((7_000 + t) * HOUR, closes[t], 10_000.)
        tails.measures(weights)
        book.measures(10_000., positions)


def gates():
    random = np.random.default_rng(0)
    for name, limits in (("default limits", Limits()), ("every limit", EVERYTHING)):
        for symbols in (1, 20):
            rules, count = Gate(limits, [replace(BITCOIN, symbol=str(n)) for n in range(symbols)]), 1_000_000 // symbols
            prices = 100 * np.exp(np.cumsum(random.normal(0, .01, (1_000, symbols)), axis=0))
            candles = np.stack([prices, prices * 1.005, prices * .995, prices, np.full_like(prices, 1e6)], axis=2)
            for t in range(200): rules.watch(t * HOUR, candles[t])
            account = new_account(10_000.)
            positions = np.zeros(symbols, POSITION)
            answers = random.uniform(-1, 1, (count, symbols))
            rows = (rules.requests, candles, account, positions, rules.market, rules.covariance, limits.row(),
                    instrument_rows([replace(BITCOIN, symbol=str(n)) for n in range(symbols)], limits))
            many(answers[:2], *rows)
            array = seconds(many, answers, *rows)
            single = seconds(one_by_one, rules, candles[0], answers[0], account, positions)
            yield (f"gate, {name}, {symbols} symbol{'s' * (symbols > 1)}", f"{count * symbols / array / 1e6:5.1f} M "
                   "validations/s in the array form (goal 5)", f"{5_000 / single / 1e3:6.0f} k/s from Python (goal "
                   f"100), {single / 5:.4f} ms each")


def measures():
    random = np.random.default_rng(1)
    closes, weights = 100 * np.exp(np.cumsum(random.normal(0, .01, (7_000, 20)), axis=0)), random.uniform(-.2, .2, 20)
    instruments = instrument_rows([replace(BITCOIN, symbol=str(n)) for n in range(20)], Limits())
    positions = np.zeros(20, POSITION)
    positions["quantity"], positions["mark_price"] = weights * 10_000 / closes[-1], closes[-1]
    for timeframe, days in (("1d", 252), ("1h", 252)):
        tails, book = TailRisk(20, timeframe, days), PortfolioRisk(tuple(map(str, range(20))), instruments)
        for t, row in enumerate(closes):
            tails.update(row)
            book.update(t * HOUR, row, 10_000.)
        all_of_them(tails, book, closes, weights, positions)
        yield (f"all measures of 20 symbols, lookback {days} days of {timeframe} ({len(tails.ring):,} candles)",
               f"{seconds(all_of_them, tails, book, closes, weights, positions) / 200 * 1e3:.3f} ms a candle (goal 1)",
               "five methods of VaR and ES, exposures, covariance, liquidation, drawdown")


def breaker():
    watched = Breakers()
    clock = iter(range(10**9))
    def one():
        for _ in range(10_000): watched.observe("spread", 5., next(clock), "x", "BTC")
    yield "a breaker's measurement", f"{seconds(one) / 10_000 * 1e6:.2f} us", ""


if __name__ == "__main__":
    for rows in (gates(), measures(), breaker()):
        for name, *figures in rows: print(f"{name:75} {'   '.join(figures)}")
