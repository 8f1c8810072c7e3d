"""What measuring a run costs, as a table: `python benchmarks/metrics.py`. CPU time of this process, compilation
excluded. Nothing here is a test.

Beside tradelab stand empyrical's formulas: the package itself where it can be imported, and its formulas in plain
numpy."""
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd

from tradelab.evaluation.metrics import check_equity, curve_metrics, drawdown_metrics, drawdowns, metrics, ratios, tails
from tradelab.evaluation.tearsheet import TearSheet
from tradelab.journal import JOURNAL

try:
    import empyrical
except ImportError:
    empyrical = None

YEAR = 525_600  # minutes


def cpu(call, repeat:int=7)->float:
    "The least CPU milliseconds of several calls"
    call()
    def once():
        begin = time.process_time()
        call()
        return time.process_time() - begin
    return 1_000 * min(once() for _ in range(repeat))


def formulas(returns)->dict:
    "empyrical's thirteen scalar statistics, restated in numpy"
    wealth = np.cumprod(1 + returns)
    peak = np.maximum.accumulate(np.append(1., wealth))[1:]
    mean, deviation, fall = returns.mean(), returns.std(ddof=1), (1 - wealth / peak).max()
    grown, apart, rank = wealth[-1] ** (YEAR / len(returns)) - 1, returns - mean, int((len(returns) - 1) * .05)
    return dict(total_return=wealth[-1] - 1, annual_return=grown, annual_volatility=deviation * YEAR ** .5,
                sharpe=mean / deviation * YEAR ** .5,
                sortino=mean / np.mean(np.minimum(returns, 0) ** 2) ** .5 * YEAR ** .5, calmar=grown / fall,
                omega=returns[returns > 0].sum() / -returns[returns < 0].sum(),
                tail_ratio=abs(np.percentile(returns, 95)) / abs(np.percentile(returns, 5)),
                value_at_risk=-np.percentile(returns, 5),
                expected_shortfall=-np.partition(returns, rank)[:rank + 1].mean(), max_drawdown=fall,
                skew=np.mean(apart ** 3) / np.mean(apart ** 2) ** 1.5,
                kurtosis=np.mean(apart ** 4) / np.mean(apart ** 2) ** 2)


def package(returns)->list:
    """The same thirteen by the package (skew and kurtosis are scipy's); its omega sums in Python, so it is also timed
    alone"""
    annual = dict(annualization=YEAR)
    return [empyrical.cum_returns_final(returns),
            *(function(returns, **annual) for function in (empyrical.annual_return, empyrical.annual_volatility,
                                                           empyrical.sharpe_ratio,
            empyrical.sortino_ratio, empyrical.calmar_ratio)), empyrical.omega_ratio(returns),
            *(function(returns) for function in (empyrical.tail_ratio, empyrical.value_at_risk,
            empyrical.conditional_value_at_risk, empyrical.max_drawdown, empyrical.stats.stats.skew,
            empyrical.stats.stats.kurtosis))]


def held(equity)->pd.DataFrame:
    "A journal that changes sides every ten candles"
    rows = np.zeros(len(equity), JOURNAL)
    position = np.repeat([1., -1., 0., 1.], 10)[np.arange(len(equity)) % 40]
    fills = np.append(np.diff(position), 0.)
    for name, values in dict(close=equity, equity=equity, position=position, fill_quantity=fills, fill_price=equity,
                             fee=abs(fills)).items():
        rows[name] = values
    return pd.DataFrame(rows, equity.index).drop(columns="open_time").assign(symbol="BTC/USDT:USDT")


n = 1_000_000
equity = pd.Series(10_000 * np.exp(np.cumsum(np.random.default_rng(1).normal(1e-6, .001, n + 1))),
                   pd.date_range("2022-01-01", periods=n + 1, freq="1min", tz="UTC"))
returns = equity.to_numpy()[1:] / equity.to_numpy()[:-1] - 1
found, expected = curve_metrics(equity), formulas(returns)
furthest = max(abs(found[name] / value - 1) for name, value in expected.items())
journal = held(equity)
sheet = TearSheet({name: SimpleNamespace(equity=equity, journal=journal) for name in ("one", "two")})

print(f"{'one million returns of 1m candles':58} {'CPU':>10}   remark")
rows = [("tradelab, metrics(equity): all 19 of a curve", lambda: metrics(equity), "goal 50 ms; furthest from "
         f"empyrical's formulas: {furthest:.0e}"),
        ("  of it the checks of the curve", lambda: check_equity(equity), ""),
        ("  of it drawdown, spells and ulcer index", lambda: drawdown_metrics(check_equity(equity)),
         "with another check"),
        ("  of it ratios, shape and tails", lambda: ratios(returns, YEAR), ""),
        ("    of it quantiles and shortfall", lambda: tails(returns), "two partitions"),
        ("    the same by np.percentile", lambda: np.percentile(returns, (5, 95)), "without the shortfall"),
        ("empyrical's 13 formulas in numpy", lambda: formulas(returns), "given returns, no index, no check"),
        ("drawdowns(equity, 5)", lambda: drawdowns(equity, 5), ""),
        ("tradelab, metrics(equity, journal): with round trips", lambda: metrics(equity, journal),
         "75,000 round trips"),
        ("TearSheet of two results, plot()", sheet.plot, ""), ("TearSheet of two results, html()", sheet.html,
                                                               "pictures and all")]
if empyrical:
    rows[7:7] = [(f"empyrical {empyrical.__version__}, the same 13, given an array", lambda: package(returns), ""),
                 ("  of it its omega", lambda: empyrical.omega_ratio(returns), "Python's sum over numpy numbers")]
else: rows[7:7] = [("empyrical itself", None, "not installed here")]
for name, call, remark in rows:
    figure = f"{cpu(call, 3 if name.startswith('Tear') else 7):7.1f} ms" if call else f"{'-':>10}"
    print(f"{name:58} {figure}   {remark}", flush=True)
