"""Every indicator over 1M candles beside TA-Lib and `ta`, in one run; then the next candle, and the memory of a
history: `python benchmarks/indicators.py [name ...]`.

CPU time of the process, the best of several calls after one that compiles; the calls of ours and of TA-Lib take turns,
because the machine is not idle. All three take what they read as contiguous columns and
give one output. Where `ta` loops in Python it gets fewer candles, and its time is scaled up: marked with ~. Ours
refuses candles that are not usable, once a history: that is a row of its own.
Goals: within 2 times TA-Lib for recursions, 3 for sums over a window, 10 for rolling extremes; none above 0.1 s, all
together (the first output of each, one after another) under 1.5 s; one call that updates
all of them for the next candle under 10 microseconds, an observation of 15 features under 5; first call in a fresh
process under 2 s with a warm cache; under 1 GB for 1M candles x 60 features.
"""
import resource
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import ta
import talib

from tradelab.account import POSITION, new_account
from tradelab.events import COLUMNS, KNOWN
from tradelab.features.grammar import INDICATORS
from tradelab.features.loops import columns_of
from tradelab.features.observation import Observation
from tradelab.features.stream import FeatureStream
from tradelab.market.candles import matrix
from tradelab.market.synthetic import random_walk
from tradelab.settings import Limits

LENGTH, SHORT = 1_000_000, 10_000
SLOW = {"wma", "kama", "adx", "aroon", "psar", "cci", "atr", "ulcer", "mfi"} # Python loops in ta
RECURSION, WINDOW, EXTREME = ("recursion", 2), ("window sum", 3), ("extreme", 10)
KIND = {**dict.fromkeys(("ema", "kama", "macd", "ppo", "trix", "adx", "psar", "rsi", "tsi", "atr", "keltner",
                         "force_index"), RECURSION),
        **dict.fromkeys(("sma", "wma", "cci", "bollinger", "volatility", "realised_volatility", "mfi", "cmf",
                         "ad_change", "obv_change", "vwap", "volume_ratio", "vortex", "quote_volume", "taker_share"),
                         WINDOW),
        **dict.fromkeys(("stochastic", "stochastic_rsi", "williams_r", "aroon", "donchian", "ichimoku", "ulcer"),
                        EXTREME)}


def peers(frame):
    "name -> the same in TA-Lib, in ta (None where there is none)"
    o, h, l, c, v = (frame[name].to_numpy(copy=True) for name in COLUMNS)
    H, L, C, V = (frame[name] for name in COLUMNS[1:])
    extremes = lambda *windows: [(talib.MAX(h, window), talib.MIN(l, window)) for window in windows]
    return {
        "sma": (lambda: talib.SMA(c, 20), lambda: ta.trend.sma_indicator(C, 20)),
        "ema": (lambda: talib.EMA(c, 20), lambda: ta.trend.ema_indicator(C, 20)),
        "wma": (lambda: talib.WMA(c, 9), lambda: ta.trend.wma_indicator(C, 9)),
        "kama": (lambda: talib.KAMA(c, 10), lambda: ta.momentum.kama(C)),
        "macd": (lambda: talib.MACD(c), lambda: ta.trend.macd(C)), "ppo": (lambda: talib.PPO(c, 12, 26, 1),
        lambda: ta.momentum.ppo(C)),
        "trix": (lambda: talib.TRIX(c, 15), lambda: ta.trend.trix(C)), "adx": (lambda: talib.ADX(h, l, c, 14),
        lambda: ta.trend.adx(H, L, C)),
        "aroon": (lambda: talib.AROONOSC(h, l, 25), lambda: ta.trend.AroonIndicator(H, L).aroon_indicator()),
        "vortex": (None, lambda: ta.trend.vortex_indicator_pos(H, L, C)),
        "psar": (lambda: talib.SAR(h, l), lambda: ta.trend.PSARIndicator(H, L, C).psar()),
        "ichimoku": (lambda: extremes(9, 26, 52), lambda: ta.trend.ichimoku_conversion_line(H, L)),
        "return": (lambda: talib.ROCP(c, 1), lambda: ta.others.daily_return(C)),
        "log_return": (None, lambda: ta.others.daily_log_return(C)),
        "roc": (lambda: talib.ROC(c, 12), lambda: ta.momentum.roc(C)),
        "rsi": (lambda: talib.RSI(c, 14), lambda: ta.momentum.rsi(C)), "tsi": (None, lambda: ta.momentum.tsi(C)),
        "stochastic": (lambda: talib.STOCHF(h, l, c, 14, 3), lambda: ta.momentum.stoch(H, L, C)),
        "stochastic_rsi": (lambda: talib.STOCHRSI(c, 14, 14, 3), lambda: ta.momentum.stochrsi(C)),
        "williams_r": (lambda: talib.WILLR(h, l, c, 14), lambda: ta.momentum.williams_r(H, L, C)),
        "cci": (lambda: talib.CCI(h, l, c, 20), lambda: ta.trend.cci(H, L, C)),
        "atr": (lambda: talib.ATR(h, l, c, 14), lambda: ta.volatility.average_true_range(H, L, C)),
        "bollinger": (lambda: talib.BBANDS(c, 20, 2, 2), lambda: ta.volatility.bollinger_pband(C)),
        "keltner": (None, lambda: ta.volatility.keltner_channel_pband(H, L, C)),
        "volatility": (lambda: talib.STDDEV(np.diff(np.log(c)), 20), None),
        "ulcer": (None, lambda: ta.volatility.ulcer_index(C)),
        "donchian": (lambda: extremes(20), lambda: ta.volatility.donchian_channel_pband(H, L, C, 20)),
        "mfi": (lambda: talib.MFI(h, l, c, v, 14), lambda: ta.volume.money_flow_index(H, L, C, V)),
        "cmf": (None, lambda: ta.volume.chaikin_money_flow(H, L, C, V)),
        "ad_change": (lambda: talib.AD(h, l, c, v), lambda: ta.volume.acc_dist_index(H, L, C, V)),
        "obv_change": (lambda: talib.OBV(c, v), lambda: ta.volume.on_balance_volume(C, V)),
        "vwap": (None, lambda: ta.volume.volume_weighted_average_price(H, L, C, V)),
        "force_index": (None, lambda: ta.volume.force_index(C, V)),
    }


def cpu(*calls, repeat=9):
    "Seconds of CPU time of each call, the best of some; they take turns"
    best = [np.inf] * len(calls)
    for turn in range(repeat + 1):
        for i, call in enumerate(calls):
            begin = time.process_time()
            call()
            if turn: best[i] = min(best[i], time.process_time() - begin)
    return best


def known(length):
    "Candles with all that a feature can read; synthetic"
    frame = random_walk(length, volatility=.002, seed=0, timeframe="1m")
    return frame.assign(quote_volume=frame.close * frame.volume, trades=7., taker_buy_volume=frame.volume / 2,
                        funding_rate=1e-4, index_price=frame.close)


def measure(names):
    frame = known(LENGTH)
    candles, long, short = matrix(frame, KNOWN)[1][:, 0], peers(frame), peers(frame[:SHORT])
    columns = columns_of(candles)
    yield dict(indicator="(are they usable?)", kind="", ours=1e3 * cpu(lambda: columns_of(candles))[0], talib=np.nan,
               ta=np.nan, scaled="", goal=0)
    for name in names:
        feature, (library, other) = INDICATORS[name](), long.get(name, (None, None))
        slow, times = name in SLOW, cpu(partial(feature.over, columns), *([library] if library else []))
        yield dict(indicator=feature.text, kind=KIND.get(name, ("", 0))[0], ours=1e3 * times[0], talib=1e3 * times[1]
                   if library else np.nan,
                   ta=1e3 * (cpu(short[name][1], repeat=1)[0] * LENGTH / SHORT if slow else cpu(other, repeat=1)[0])
                   if other else np.nan, scaled="~" if slow else "", goal=KIND.get(name, ("", 0))[1])


SEEN = ("return(1)", "return(24)", "log_return(3)", "rsi(14)", "macd(12,26,9).histogram", "atr(14).relative",
        "bollinger(20,2)", "volatility(24)", "ema(20).relative", "sma(50).relative", "adx(14)",
        "donchian(20)", "mfi(14)", "volume_ratio(20)", "time_of_day.sin")
LIMITS = Limits()
FRESH = ("import time; begin = time.time(); import numpy as np; from tradelab.features.grammar import parse; "
         "parse('rsi(14)').array(np.ones((100, 5))); print(time.time() - begin)")


def see(stream, account, positions, candle):
    stream.push(candle)
    return stream.observe(account, positions, LIMITS)


def next_candle():
    "What one more candle costs"
    candles = np.ascontiguousarray(matrix(known(12_000), KNOWN)[1])
    stream = FeatureStream([indicator() for indicator in INDICATORS.values()], "1m")
    account = new_account(1e4)
    positions = np.zeros(1, POSITION)
    for candle in candles[:2_000]: stream.update(candle)
    def each(call): return 1e6 * cpu(lambda: [call(candle) for candle in candles[2_000:]])[0] / 10_000
    print(f"one call updates {len(stream.features)} indicators for the next candle: {each(stream.update):.1f} "
          "microseconds (goal 10)")
    for window in (1, 30):
        seen = Observation(SEEN, window).fit(candles[:5_000]).stream()
        for candle in candles[:2_000]: seen.push(candle)
        print(f"observation of {len(SEEN)} features, window {window}, with the state of the portfolio: "
              f"{each(partial(see, seen, account, positions)):.1f} microseconds (goal 5)")
    times = [float(subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True).stdout)
             for _ in range(3)]
    print(f"first call in a fresh process, warm cache: {min(times):.2f} s (goal 2)")


def memory():
    "How much a long history takes, from the frame to the scaled matrix"
    features = [indicator().output(output).text for indicator in INDICATORS.values()
                for output in indicator.outputs][:60]
    candles = matrix(known(LENGTH), KNOWN)[1]
    observation = Observation(features).fit(candles)
    print(f"{LENGTH:,} candles x {observation.matrix(candles).shape[2]} features, fitted and scaled: "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB at most, making the candles "
          "included (goal 1)")


def show(value, form="8.1f"): return f"{value:{form}}" if np.isfinite(value) else "       -"


def table(names):
    print(f"{LENGTH:,} candles, CPU "
          f"milliseconds\n{'indicator':26}{'kind':12}{'ours':>8}{'TA-Lib':>8}{'ta':>11}{'ours/TA-Lib':>13}{'goal':>6}"
          f"{'ta/ours':>9}")
    rows = []
    for row in measure(names):
        rows.append(row)
        ratio = row["ours"] / row["talib"]
        print(f"{row['indicator']:26}{row['kind']:12}{show(row['ours'])}{show(row['talib'])}{row['scaled']:>2}"
              f"{show(row['ta'], '9.1f')}{show(ratio, '13.1f')}"
              f"{row['goal'] or '':>6}{show(row['ta'] / row['ours'], '9.0f')}"
              f"{'  above its goal' if row['goal'] and ratio > row['goal'] else ''}", flush=True)
    rows = pd.DataFrame(rows)
    print(f"together {rows.ours.sum() / 1e3:.2f} s (goal 1.5), slowest {rows.ours.max() / 1e3:.3f} s (goal 0.1: "
          f"{rows.loc[rows.ours.idxmax(), 'indicator']}); ta {rows.ta.sum() / 1e3:.0f} s")


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(INDICATORS) - {"next", "memory"}
    if unknown:
        sys.exit(f"unknown indicator {', '.join(sorted(unknown))}: choose from {', '.join(sorted(INDICATORS))}, "
                 "next, memory")
    wanted = sys.argv[1:] or [*INDICATORS, "next", "memory"]
    if "memory" in wanted: memory()           # first: nothing else has grown the process yet
    if "next" in wanted: next_candle()
    if names := [name for name in wanted if name in INDICATORS]: table(names)
