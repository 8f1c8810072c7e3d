"""Every indicator over 1M candles beside TA-Lib and `ta`, in one run: `python benchmarks/indicators.py [name ...]`.

CPU time of the process, the best of several calls after one that compiles. Ours takes the candles as a (T, 5) matrix, checks each of them and gives one output; TA-Lib takes contiguous columns.
Where `ta` loops in Python it gets fewer candles, and its time is scaled up: marked with ~. Goals: within 2 times TA-Lib for recursions, 3 for sums over a window, 10 for rolling extremes;
none above 0.1 s; all outputs asked for one after another (the first of each indicator) under 1.5 s.
"""
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import ta
import talib

from tradelab.features.grammar import INDICATORS
from tradelab.market.synthetic import random_walk
from tradelab.records import COLUMNS

LENGTH, SHORT = 1_000_000, 10_000
SLOW = {"wma", "kama", "adx", "aroon", "psar", "cci", "atr", "ulcer", "mfi"} # Python loops in ta
RECURSION, WINDOW, EXTREME = ("recursion", 2), ("window sum", 3), ("extreme", 10)
KIND = {**dict.fromkeys(("ema", "kama", "macd", "ppo", "trix", "adx", "psar", "rsi", "tsi", "atr", "keltner", "force_index"), RECURSION),
        **dict.fromkeys(("sma", "wma", "cci", "bollinger", "volatility", "realised_volatility", "mfi", "cmf", "ad_change", "obv_change", "vwap", "volume_ratio", "vortex"), WINDOW),
        **dict.fromkeys(("stochastic", "stochastic_rsi", "williams_r", "aroon", "donchian", "ichimoku", "ulcer"), EXTREME)}


def peers(frame):
    "name -> the same in TA-Lib, in ta (None where there is none)"
    o, h, l, c, v = (frame[name].to_numpy(copy=True) for name in COLUMNS)
    H, L, C, V = (frame[name] for name in COLUMNS[1:])
    extremes = lambda *windows: [(talib.MAX(h, window), talib.MIN(l, window)) for window in windows]
    return {
        "sma": (lambda: talib.SMA(c, 20), lambda: ta.trend.sma_indicator(C, 20)), "ema": (lambda: talib.EMA(c, 20), lambda: ta.trend.ema_indicator(C, 20)),
        "wma": (lambda: talib.WMA(c, 9), lambda: ta.trend.wma_indicator(C, 9)), "kama": (lambda: talib.KAMA(c, 10), lambda: ta.momentum.kama(C)),
        "macd": (lambda: talib.MACD(c), lambda: ta.trend.macd(C)), "ppo": (lambda: talib.PPO(c, 12, 26, 1), lambda: ta.momentum.ppo(C)),
        "trix": (lambda: talib.TRIX(c, 15), lambda: ta.trend.trix(C)), "adx": (lambda: talib.ADX(h, l, c, 14), lambda: ta.trend.adx(H, L, C)),
        "aroon": (lambda: talib.AROONOSC(h, l, 25), lambda: ta.trend.AroonIndicator(H, L).aroon_indicator()),
        "vortex": (None, lambda: ta.trend.vortex_indicator_pos(H, L, C)), "psar": (lambda: talib.SAR(h, l), lambda: ta.trend.PSARIndicator(H, L, C).psar()),
        "ichimoku": (lambda: extremes(9, 26, 52), lambda: ta.trend.ichimoku_conversion_line(H, L)),
        "return": (lambda: talib.ROCP(c, 1), lambda: ta.others.daily_return(C)), "log_return": (None, lambda: ta.others.daily_log_return(C)),
        "roc": (lambda: talib.ROC(c, 12), lambda: ta.momentum.roc(C)), "rsi": (lambda: talib.RSI(c, 14), lambda: ta.momentum.rsi(C)), "tsi": (None, lambda: ta.momentum.tsi(C)),
        "stochastic": (lambda: talib.STOCHF(h, l, c, 14, 3), lambda: ta.momentum.stoch(H, L, C)), "stochastic_rsi": (lambda: talib.STOCHRSI(c, 14, 14, 3), lambda: ta.momentum.stochrsi(C)),
        "williams_r": (lambda: talib.WILLR(h, l, c, 14), lambda: ta.momentum.williams_r(H, L, C)), "cci": (lambda: talib.CCI(h, l, c, 20), lambda: ta.trend.cci(H, L, C)),
        "atr": (lambda: talib.ATR(h, l, c, 14), lambda: ta.volatility.average_true_range(H, L, C)),
        "bollinger": (lambda: talib.BBANDS(c, 20, 2, 2), lambda: ta.volatility.bollinger_pband(C)), "keltner": (None, lambda: ta.volatility.keltner_channel_pband(H, L, C)),
        "volatility": (lambda: talib.STDDEV(np.diff(np.log(c)), 20), None), "ulcer": (None, lambda: ta.volatility.ulcer_index(C)),
        "donchian": (lambda: extremes(20), lambda: ta.volatility.donchian_channel_pband(H, L, C, 20)),
        "mfi": (lambda: talib.MFI(h, l, c, v, 14), lambda: ta.volume.money_flow_index(H, L, C, V)), "cmf": (None, lambda: ta.volume.chaikin_money_flow(H, L, C, V)),
        "ad_change": (lambda: talib.AD(h, l, c, v), lambda: ta.volume.acc_dist_index(H, L, C, V)), "obv_change": (lambda: talib.OBV(c, v), lambda: ta.volume.on_balance_volume(C, V)),
        "vwap": (None, lambda: ta.volume.volume_weighted_average_price(H, L, C, V)), "force_index": (None, lambda: ta.volume.force_index(C, V)),
    }


def cpu(call, repeat=5):
    "Seconds of CPU time of one call, the best of some"
    call()
    times = []
    for _ in range(repeat):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


def measure(names):
    frame = random_walk(LENGTH, volatility=.002, seed=0, timeframe="1m")
    candles, long, short = frame[list(COLUMNS)].to_numpy().copy(order="C"), peers(frame), peers(frame[:SHORT])
    for name in names:
        feature, (library, other) = INDICATORS[name](), long.get(name, (None, None))
        slow = name in SLOW
        yield dict(indicator=feature.text, kind=KIND.get(name, ("", 0))[0], ours=1e3 * cpu(partial(feature.array, candles)), talib=1e3 * cpu(library) if library else np.nan,
                   ta=1e3 * (cpu(short[name][1], 1) * LENGTH / SHORT if slow else cpu(other, 1)) if other else np.nan, scaled="~" if slow else "", goal=KIND.get(name, ("", 0))[1])


def show(value, form="8.1f"): return f"{value:{form}}" if np.isfinite(value) else "       -"


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(INDICATORS)
    if unknown: sys.exit(f"unknown indicator {', '.join(sorted(unknown))}: choose from {', '.join(sorted(INDICATORS))}")
    print(f"{LENGTH:,} candles, CPU milliseconds\n{'indicator':26}{'kind':12}{'ours':>8}{'TA-Lib':>8}{'ta':>11}{'ours/TA-Lib':>13}{'goal':>6}{'ta/ours':>9}")
    rows = []
    for row in measure(sys.argv[1:] or INDICATORS):
        rows.append(row)
        ratio = row["ours"] / row["talib"]
        print(f"{row['indicator']:26}{row['kind']:12}{show(row['ours'])}{show(row['talib'])}{row['scaled']:>2}{show(row['ta'], '9.1f')}{show(ratio, '13.1f')}"
              f"{row['goal'] or '':>6}{show(row['ta'] / row['ours'], '9.0f')}{'  above its goal' if row['goal'] and ratio > row['goal'] else ''}", flush=True)
    table = pd.DataFrame(rows)
    print(f"together {table.ours.sum() / 1e3:.2f} s (goal 1.5), slowest {table.ours.max() / 1e3:.3f} s (goal 0.1: {table.loc[table.ours.idxmax(), 'indicator']}); ta {table.ta.sum() / 1e3:.0f} s")
