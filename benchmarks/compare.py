"""Byte for byte: what this package computes, and what it computed in another revision.

A few hundred seeded runs (backtests of every style, cost and limit, the kernel step by step, policies of orders,
environments, sweeps, stress, indicators, live sessions on localnet and more) are done by two packages over the same
candles, and every column that comes out is compared bit for bit: journals, fills, accounts, positions, equity, figures.
Candles are made here with numpy; real ones come from `../shared/data` where that folder is.

Scenarios are plain data (`scenarios`). `compare_driver.py` does them; it is taken from each revision, so that whoever
renames something mends the driver in the same commit. Only the tables below say what may differ.
"""
import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DRIVER = "benchmarks/compare_driver.py"

# regular expression of a column there -> column here, None where it is gone:
# r"(.*)journal\.limit": r"\1journal.allowed"
RENAMED = {r"(.*accounts?)\.state": r"\1.required_state", r"(.*fills)\.met": r"\1.market_price",
           r"(.*(?:fills|orders))\.decision": r"\1.decision_price", r"(.*orders)\.rests": r"\1.resting",
           r"(.*orders)\.left": r"\1.expires_in", r"(.*)books\.pressure": r"\1execution_state.impact_state",
           r"(.*)books\.taken": r"\1execution_state.filled_volume", r"(.*)books\.piece": r"\1execution_state.slice",
           r"(.*)books\.(.*)": r"\1execution_state.\2"}
# columns that are only here
NEW = ("*account.trading_state", "*accounts.trading_state", "*orders.exposure", "*orders.placed", "*orders.revision",
       "*positions.variation", "re*ed.requests", "*journal.late", "booked.late")
# words in columns of text, there -> here: "take_profit": "take_profit_stop"
WORDS = {"as_asked": "accepted"}
# "kind/column" -> why its figures may move; * stands for anything
MAY_MOVE = {f"*/{column}": "the portfolio part of an observation" for column in
            ("seen.observations", "decisions.observation", "environment.seen", "environment.last",
             *(f"re*ed.{name}" for name in ("exposure", "unrealised", "time_in_trade", "observed equity",
                                            "observed drawdown")))} | {
    f"kernel/orders.{name}": "a target has two slots; what has ended leaves its numbers in the row" for name in
    ("decision_price", "placed", "revision", "resting", "expires_in", "quantity", "in_force", "price")}

HOUR, START = 3_600_000, 1_672_531_200_000  # 2023-01-01
COLUMNS = ("open", "high", "low", "close", "volume", "quote_volume", "trades", "taker_buy_volume", "index_price")
BITCOIN_BRACKETS = ((300_000., 150, .004), (3e6, 75, .0065), (12e6, 50, .01), (70e6, 25, .02), (1.8e9, 1, .5))
OTHER_BRACKETS = ((10_000., 75, .0065), (50_000., 50, .01), (800_000., 25, .02), (8e6, 10, .05), (80e6, 1, .5))


# --- candles --------------------------------------------------------------------------------------------------------
def symbol(n): return ("BTC/USDT:USDT", "ETH/USDT:USDT", *(f"C{k:02}/USDT:USDT" for k in range(2, 40)))[n]
def level(n): return (20_000., 1_500., 12., .34, 150.)[n % 5]
def tick(n): return (.1, .01, .001, .0001, .01)[n % 5]


def made(path, seed, length, symbols=1, step=HOUR, volatility=.008, jumps=.01, holes=0):
    "Write a market of random candles: a common factor, gaps between candles, jumps, candles without a trade, holes"
    random, shape = np.random.default_rng(seed), (length, symbols)
    returns = volatility * (.6 * random.standard_t(4, (length, 1)) + .6 * random.standard_t(4, shape))
    returns += np.where(random.random(shape) < jumps, random.normal(0, 8 * volatility, shape), 0.)
    levels, ticks = np.array([level(n) for n in range(symbols)]), np.array([tick(n) for n in range(symbols)])
    def on(prices): return np.round(np.round(prices / ticks) * ticks, 6)
    closes = on(levels * np.exp(np.clip(np.cumsum(returns, axis=0), -2., 2.)))
    opens = on(np.vstack([levels[None], closes[:-1]]) * (1 + .1 * volatility * random.normal(size=shape)))
    wick = volatility * np.abs(random.normal(size=(2, *shape)))
    highs, lows = on(np.maximum(opens, closes) * (1 + wick[0])), on(np.minimum(opens, closes) * (1 - wick[1]))
    volume = np.round(2e6 / levels * np.exp(random.normal(0, .8, shape)) * (random.random(shape) > .01), 3)
    quoted, trades, bought = volume * closes, np.round(volume * levels / 1e3), volume * random.random(shape)
    around = quoted, trades, bought, on(closes * (1 + 1e-3 * random.normal(size=shape)))
    values = np.stack([opens, highs, lows, closes, volume, *around], axis=2).transpose(1, 0, 2)
    times, kept = START + step * np.arange(length), np.ones(length, bool)
    for begin in random.integers(length // 3, length - 20, holes): kept[begin:begin + random.integers(1, 8)] = False
    written(path, times[kept], [symbol(n) for n in range(symbols)], values[:, kept], *payments(times, symbols, random))


def payments(times, symbols, random):
    due = np.arange(-(-times[0] // (8 * HOUR)) * 8 * HOUR, times[-1], 8 * HOUR)
    return due, np.round(random.normal(1e-4, 3e-4, (symbols, len(due))), 8)


def written(path, times, symbols, values, due, rates):
    columns = COLUMNS[:values.shape[2]]
    np.savez(path, times=times, symbols=symbols, columns=columns, values=values, funding_times=due, funding_rates=rates)


def rates_of(table):
    "Funding rates by the minute that they were due"
    minutes = table.assign(timestamp=table["timestamp"] // 60_000 * 60_000).drop_duplicates("timestamp")
    return minutes.set_index("timestamp")["funding_rate"]


def real(path, files, begin, length):
    "Write a market of real candles, funding where its file is beside them; False where they are absent"
    import pandas as pd
    folder, tables = ROOT.parent / "shared" / "data", []
    if not all((folder / file).exists() for file in files): return False
    for file in files: tables.append(pd.read_parquet(folder / file).query(f"timestamp >= {begin}").iloc[:length])
    times = tables[0]["timestamp"].to_numpy()
    if not all(np.array_equal(times, each["timestamp"]) for each in tables): return False
    beside = [folder / file.replace("-1h", "-funding-8h") for file in files]
    found = [rates_of(pd.read_parquet(each)) for each in beside if each.exists() and "perp" in each.name]
    due, rates = np.zeros(0, np.int64), np.zeros((len(files), 0))
    if len(found) == len(files):
        joined = pd.concat(found, axis=1).loc[times[0]:times[-1]].dropna()
        due, rates = joined.index.to_numpy(), joined.to_numpy().T
    values = np.stack([each[list(COLUMNS[:5])].to_numpy() for each in tables])
    written(path, times, [symbol(n) for n in range(len(files))], values, due, rates)
    return True


MARKETS = {
    "one": dict(seed=1, length=700), "wild": dict(seed=2, length=700, volatility=.03, jumps=.03),
    "minutes": dict(seed=3, length=900, step=60_000, volatility=.001),
    "quarters": dict(seed=4, length=900, step=900_000),
    "holed": dict(seed=5, length=800, holes=6), "three": dict(seed=6, length=700, symbols=3),
    "three wild": dict(seed=7, length=700, symbols=3, volatility=.025, jumps=.02),
    "three holed": dict(seed=8, length=700, symbols=3, holes=5), "twenty": dict(seed=9, length=420, symbols=20),
    "twenty minutes": dict(seed=10, length=420, symbols=20, step=60_000, volatility=.002),
    "long": dict(seed=11, length=2_200, symbols=2),
    "calm": dict(seed=12, length=700, volatility=.002, jumps=0.)}
REAL = {  # files, time of the first candle, candles
    "bitcoin": (["BTCUSDT-perp-1h.parquet"], 1_651_363_200_000, 900),
    "days": (["BTCUSDT-1d.parquet"], 1_514_764_800_000, 1_200),
    "bitcoin and ether": (["BTCUSDT-perp-1h.parquet", "ETHUSDT-perp-1h.parquet"], 1_654_041_600_000, 800),
    "solana": (["SOLUSDT-15m.parquet"], 1_614_556_800_000, 900)}


# --- scenarios ------------------------------------------------------------------------------------------------------
def instruments(count, draw=None):
    "Instruments of the made candles; with `draw` now and then small orders, other fees of liquidation"
    rows = []
    for n in range(count):
        most = level(0) / level(n) * (draw.choice((1e5, 2., .3)) if draw else 1e5)
        rows.append(dict(symbol=symbol(n), price_tick=tick(n), quantity_step=.001 if level(n) > 1e3 else .1
                         if level(n) > 5 else 1.,
                         max_quantity=round(most, 3), min_notional=5. if n else 100.,
                         liquidation_fee=draw.choice((.0125, .005, 0.)) if draw else .0125,
                         brackets=BITCOIN_BRACKETS if n == 0 else OTHER_BRACKETS))
    return rows


def maybe(draw, share, *values): return draw.choice(values) if draw.random() < share else None


def stops(draw):
    kind = draw.randrange(8)
    fixed = dict(stop_loss=draw.choice((0., .005, .02, .05)), take_profit=draw.choice((0., .01, .04)))
    if kind == 0: return dict(stop_loss=0., take_profit=0.)
    if kind == 1: return fixed | dict(trailing_stop=draw.choice((.01, .03)))
    if kind == 2: return fixed | dict(stop_atr=draw.uniform(1, 4), target_atr=draw.uniform(1, 6),
                                      atr_period=draw.choice((3, 5, 7)))
    if kind == 3: return fixed | dict(trailing_atr=draw.uniform(1, 4), atr_period=draw.choice((3, 5, 7)))
    if kind == 4: return fixed | dict(max_age=draw.choice((1, 5, 24)))
    if kind == 5: return dict(stop_loss=.01, take_profit=0., target_atr=2., max_age=12, atr_period=5)
    return fixed


def limits(draw, count, decay=.3):
    "Random limits, each of them set now and then; what looks at the market is warm after 300 candles"
    size = draw.choice((.05, .2, .5, 1., 2.)) / (1 if count < 4 else 4)
    gross = max(size, draw.choice((1., 2., 3.)) * size * max(1., count / 3))
    leverage = draw.choice([each for each in (1, 2, 5, 10, 20) if each >= gross] or [50])
    found = dict(max_position=size, max_leverage=gross, leverage=leverage, min_trade=draw.choice((0., .001, .005))
                 if size > .02 else 0., decay=decay,
                 max_drawdown=draw.choice((.05, .15, .5, 1.)), min_margin_ratio=draw.choice((0., 2., 2., 8.)),
                 stops=stops(draw),
                 max_daily_loss=maybe(draw, .6, .01, .03, .05), max_participation=maybe(draw, .6, .1, .001, .00001),
                 price_band=maybe(draw, .6, .05, .01), max_orders=maybe(draw, .6, 100, 3, 1),
                 min_confidence=draw.choice((0., 0., .3)))
    for name, share, value in (("max_net", .3, gross * draw.uniform(.1, .9)),
                               ("max_order", .3, size * draw.uniform(.1, .9)),
                               ("capital", .2, draw.uniform(2e3, 9e3)),
                               ("target_volatility", .2, draw.uniform(.1, 1.5)),
                               ("max_var", .2, draw.uniform(.002, .05)),
                               ("drawdown_from", .3, found["max_drawdown"] * draw.uniform(.1, .8))):
        if draw.random() < share: found[name] = value
    if draw.random() < .2: found |= dict(max_group=gross * draw.uniform(.2, .9),
                                         group_correlation=draw.choice((.3, .7)))
    if count > 1 and draw.random() < .3:
        found |= dict(max_sector=gross * draw.uniform(.2, .9), sectors={symbol(n): "ABC"[n % 3] for n in range(count)})
    return found


def costs(draw):
    "Random costs, warm after 250 candles"
    kind = draw.randrange(6)
    if kind == 0: return "ideal"
    if kind == 1: return dict(realistic=True)
    if kind == 2: return {}
    part = dict(taker_fee=draw.choice((0., .0005, .001)), maker_fee=draw.choice((0., .0002)),
                slippage=draw.choice((0., .0001, .002)),
                latency=draw.choice((0, 0, 1, 3)), funding=draw.random() < .8)
    if draw.random() < .5: part["participation"] = draw.choice((.1, .01, .00002))
    if draw.random() < .3: part |= dict(spread_volatility=draw.uniform(.2, 1.5), spread_volume=draw.uniform(.2, 1.))
    if draw.random() < .4: part |= dict(impact=draw.uniform(.2, 3.), impact_half_life=draw.uniform(1., 12.))
    return part


def execution(draw):
    return dict(style=draw.choice(("market", "market", "post_only", "slices")), patience=draw.choice((1, 2, 3, 6)),
                slices=draw.choice((2, 4, 7)),
                protect=draw.random() < .4)


POLICIES = (dict(kind="momentum", numbers=[5, .004]), dict(kind="momentum", numbers=[20, .02]),
            dict(kind="cross", numbers=[5, 15]), dict(kind="fade"),
            dict(kind="network", seed=1, features=["return(1)", "rsi(5)", "bollinger(20,2)"], window=3,
                 scaler="standard", fit=800),
            dict(kind="network", seed=2, features=["return(1)", "time_of_day.sin", "volume_ratio(20)"], window=2,
                 scaler="robust", fit=400),
            dict(kind="noisy", numbers=[.3]), dict(kind="noisy", numbers=[.2], confident=True),
            dict(kind="python", numbers=[.001]),
            dict(kind="noisy", numbers=[.2], features=["funding_rate", "taker_share(3)", "basis", "quote_volume(8)",
                                                       "return(1)@4h"], window=1))
TARGETS = dict(kind="targets", every=3, idle=.2)
COUNTS = {name: recipe.get("symbols", 1) for name, recipe in MARKETS.items()}
COUNTS |= {name: len(files) for name, (files, *_) in REAL.items()}


def backtests(draw, number):
    for n in range(number):
        market = draw.choice(("one", "wild", "minutes", "quarters", "holed", "three", "three wild", "three holed",
                              "calm"))
        count, policy = COUNTS[market], draw.choice((*POLICIES, *[TARGETS] * 4))
        run = dict(kind="backtest", market=market, policy=dict(policy, seed=n), costs=costs(draw),
                   limits=limits(draw, count), execution=execution(draw),
                   form="event" if n % 3 == 1 else "array", instruments=instruments(count, draw),
                   funding=draw.random() < .8 or "features" in policy, gaps="holed" in market)
        if n % 4 == 0: run["deposit"] = draw.choice((500., 1e5, 1e7))
        if n % 5 == 0: run |= dict(beside=True, intervals=market == "one")
        if n % 7 == 0: run["start"] = 560
        yield run


def others(draw, number):
    "Backtests of orders, of twenty symbols, with symbols that are only looked at, of real candles, at default settings"
    for n in range(number):
        market = draw.choice(("one", "wild", "three", "three wild", "quarters", "holed", "three holed"))
        policy = dict(kind="orders", numbers=[draw.choice((1, 2, 4)), draw.choice((.3, .7))])
        yield dict(kind="backtest", name="orders", market=market, policy=policy, costs=costs(draw),
                   limits=limits(draw, COUNTS[market]), gaps="holed" in market,
                   form="event" if n % 3 == 1 else "array", instruments=instruments(COUNTS[market], draw),
                   execution=dict(protect=n % 4 == 0))
    for n in range(number // 3):
        market = ("twenty", "twenty minutes")[n % 2]
        yield dict(kind="backtest", name="twenty symbols", market=market,
                   policy=dict(draw.choice((TARGETS, POLICIES[6], POLICIES[0])), seed=n), costs=costs(draw),
                   limits=limits(draw, 20), execution=execution(draw), instruments=instruments(20), form="event"
                   if n % 4 == 1 else "array")
    for n in range(number // 4):
        policy = dict(kind="network", seed=n,
                      features=["return(1)", f"return(2)[{symbol(2)}]", f"rsi(5)@2h[{symbol(2)}][-1]"], window=2)
        yield dict(kind="backtest", name="watched", market="three", traded=1 + n % 2, policy=policy,
                   limits=limits(draw, 2), costs=costs(draw),
                   instruments=instruments(1 + n % 2), form="event" if n % 2 else "array")
    for n, market in enumerate((*REAL, *REAL, "one", "three", "holed", "minutes", "quarters", "wild")):
        yield dict(kind="backtest", name="defaults", market=market, policy=dict(POLICIES[(0, 2, 6, 8)[n % 4]], seed=n),
                   beside=True, intervals=n < 4, gaps=market in ("holed", "bitcoin", "solana"),
                   form="event" if n % 3 == 1 else "array",
                   execution=dict(style=("market", "post_only", "slices")[n % 3]))


def kernels(draw, number):
    for n in range(number):
        market = draw.choice(("one", "wild", "minutes", "three", "three wild", "calm", "twenty"))
        count = COUNTS[market]
        yield dict(kind="kernel", market=market, seed=n, costs=costs(draw), limits=limits(draw, count),
                   execution=execution(draw), instruments=instruments(count, draw),
                   start=300 if market == "twenty" else draw.choice((300, 450)), every=draw.choice((1, 3, 10)),
                   confident=n % 5 == 0, orders=draw.choice((0, 0, 0, 1, 3)))


def hard(draw, number):
    "What random limits seldom meet: liquidations, the margin, the brackets of a leverage, what is not known yet"
    free = dict(max_drawdown=1., max_daily_loss=None, price_band=None, max_participation=None, max_orders=None,
                min_margin_ratio=0.)
    none = dict(stop_loss=0., take_profit=0.)
    for n in range(number):
        market = ("wild", "three wild", "three", "bitcoin")[n % 4]
        count = COUNTS[market]
        found = (free | dict(max_position=8., max_leverage=12., leverage=20, stops=none
                             if n % 8 < 4 else dict(stop_loss=.03, take_profit=0.)),
                 free | dict(max_position=2., max_leverage=4., leverage=10, min_margin_ratio=60., stops=none),
                 free | dict(max_position=3., max_leverage=9., leverage=50, stops=none),
                 free | dict(max_position=.5, target_volatility=.5, max_var=.05, max_group=.8, price_band=.02,
                             decay=.1, stops=dict(none, stop_atr=2., atr_period=5)))[n // 4 % 4]
        early = n // 4 % 4 == 3   # before the costs could know the market
        run = dict(market=market, limits=found, costs={} if early else costs(draw), execution=execution(draw),
                   instruments=instruments(count), seed=n, deposit=(1e4, 1e5, 1e6)[n % 3])
        if n % 2: yield dict(run, kind="kernel", start=0 if early else 300, every=(1, 5, 30)[n % 3],
                             orders=(0, 2)[n // 16 % 2])
        else: yield dict(run, kind="backtest", policy=dict(TARGETS, seed=n, every=20)
                         if n % 3 else dict(kind="orders", numbers=[2, .5]), form=("array", "event")[n // 4 % 2])


def traders(draw, number):
    for n in range(number):
        market = draw.choice(("one", "three", "wild", "three wild"))
        states = draw.sample(["NORMAL", "NO_ENTRY", "REDUCE_ONLY", "FLATTEN", "HALT", "NORMAL"], 5)
        yield dict(kind="trader", market=market, seed=n, timeframe="1h", policy=POLICIES[n % 9],
                   limits=limits(draw, COUNTS[market]), states=["NORMAL", *states],
                   instruments=instruments(COUNTS[market]), start=300, every=draw.choice((7, 20)),
                   off=draw.choice((0., .02)))


def sweeps(draw, number):
    for n in range(number):
        table = [[draw.randrange(3), 3 + draw.randrange(3)] for _ in range(12)] if n % 2 else [[draw.uniform(-80, 80)]
                for _ in range(12)]
        run = dict(kind="sweep", market=draw.choice(("one", "wild", "calm", "long")), rule="cross"
                   if n % 2 else "numpy", table=table, widths=[3, 5, 8, 20, 30, 50],
                   parameters=["fast", "slow"] if n % 2 else ["steepness"], start=300, costs="ideal"
                   if n % 3 == 0 else costs(draw), traded=1, exact=n % 6 == 3)
        if n % 3: run |= dict(limits=limits(draw, 1), execution=execution(draw))
        yield run


def environments(draw, number):
    for n in range(number):
        market = draw.choice(("one", "three", "wild", "holed", "minutes"))
        run = dict(kind="environment", market=market, seed=n, n=8, length=60, steps=150,
                   features=["return(1)", "rsi(5)", "time_of_day.cos"], window=draw.choice((1, 3)), costs=costs(draw),
                   limits=limits(draw, COUNTS[market]), execution=execution(draw),
                   instruments=instruments(COUNTS[market]), gaps=market == "holed", single=n % 4 == 3)
        if n % 2: run["scaler"] = ("standard", "robust")[n % 4 // 2]
        if n % 3 == 1: run |= dict(reward=dict(differential_sharpe=.02, drawdown=.5),
                                   domain=dict(fees=[.5, 2.], spread=[.5, 3.], impact=[1., 4.]))
        yield run


FEATURES = """
ad_change(20) adx(14) adx(14).plus adx(14).minus aroon(25) aroon(25).up aroon(25).down atr(14) atr(14).relative
basis bollinger(20,2) bollinger(20,2).width bollinger(20,2).upper bollinger(20,2).lower bollinger(20,2).middle
cci(20) cmf(20) donchian(20) donchian(20).upper donchian(20).lower ema(20) ema(20).relative force_index(13)
force_index(13).relative funding_rate ichimoku(9,26,52) ichimoku(9,26,52).base ichimoku(9,26,52).span_a
ichimoku(9,26,52).span_b kama(10,2,30) kama(10,2,30).relative keltner(20,10,2) keltner(20,10,2).width
keltner(20,10,2).upper keltner(20,10,2).lower keltner(20,10,2).middle log_return(1) macd(12,26,9)
macd(12,26,9).signal macd(12,26,9).histogram macd(12,26,9).relative mfi(14) obv_change(20) obv_change(20).relative
ppo(12,26,9) ppo(12,26,9).signal ppo(12,26,9).histogram psar(0.02,0.2) psar(0.02,0.2).relative psar(0.02,0.2).trend
quote_volume(20) quote_volume(20).mean realised_volatility(24) return(1) return(24) roc(12) rsi(14) rsi(2) sma(20)
sma(20).relative stochastic(14,3) stochastic(14,3).d stochastic_rsi(14,3,3) stochastic_rsi(14,3,3).k
stochastic_rsi(14,3,3).d taker_share(1) time_of_day time_of_day.cos time_of_week time_of_week.cos trix(15)
tsi(25,13) ulcer(14) volatility(20) volume_ratio(20) vortex(14) vortex(14).plus vortex(14).minus vwap(14)
vwap(14).relative williams_r(14) wma(9) wma(9).relative rsi(14)@4h atr(5)@2h[-1] return(1)[-3] macd(5,10,3)@6h
bollinger(10,3) sma(3)@1d
""".split()
FOREIGN = """
awesome_oscillator bollinger_hband_indicator bollinger_lband_indicator donchian_channel_mband
donchian_channel_wband dpo ease_of_movement keltner_channel_hband keltner_channel_hband_indicator
keltner_channel_lband keltner_channel_lband_indicator keltner_channel_mband keltner_channel_pband
keltner_channel_wband kst kst_sig mass_index negative_volume_index pvo pvo_hist pvo_signal sma_ease_of_movement stc
ultimate_oscillator volume_price_trend
""".split()


def indicators(_, number):
    for n in range(number):
        market = ("one", "wild", "calm", "holed", "long", "three")[n % 6]
        features = FEATURES if n % 3 else [f for f in FEATURES if "@" not in f] + ["tradelab.strategies.example:gap"]
        yield dict(kind="indicators", market=market, traded=1, features=features, timeframe="1h", stream=300,
                   gaps=market == "holed")
    for market in ("one", "wild", "calm")[:max(1, number // 3)]: yield dict(kind="indicators", name="of ta",
            market=market, features=FOREIGN, timeframe="1h")


def rest(draw, few):
    for n in range(1 if few else 4):
        market = ("one", "three", "wild", "quarters")[n]
        yield dict(kind="stress", market=market, policy=POLICIES[(0, 2, 6, 3)[n]], limits=limits(draw, COUNTS[market]),
                   costs={} if n % 2 else dict(realistic=True))
    for n in range(1 if few else 6):
        yield dict(kind="scaler", market=("one", "wild", "three", "holed", "long", "calm")[n], traded=1,
                   how=("standard", "robust")[n % 2],
                   features=["return(1)", "rsi(5)", "volatility(20)", "quote_volume(8)", "taker_share(3)"], gaps=n == 3)
        yield dict(kind="risk", market=("one", "wild", "three", "three wild", "long", "calm")[n], seed=n,
                   timeframe="1h", days=5, limits=dict(stops=stops(draw)),
                   instruments=instruments((1, 1, 3, 3, 2, 1)[n]))
        yield dict(kind="breakers", seed=n, steps=400,
                   breakers=[dict(kind="latency", threshold=500., unit="ms", consecutive=1 + n % 3, asks="NO_ENTRY"),
                   dict(kind="volatility", threshold=.05, cool_down=90_000, asks="REDUCE_ONLY"),
                   dict(kind="drawdown", threshold=.01, consecutive=1, cool_down=900_000, asks="FLATTEN")])
    for n in range(1 if few else 3):
        yield dict(kind="candles", market=("one", "three holed", "calm")[n], seed=n, timeframe="1h",
                   timeframes=["2h", "4h", "1d"],
                   defects=["duplicate", "ohlc", "spike"]
                   if few else ["gap", "duplicate", "out_of_order", "off_grid", "unfinished", "revised",
                                "invalid_value", "ohlc", "zero_volume", "frozen", "spike", "swapped_columns",
                                "wrong_units"])
    for n, maker in enumerate(("ar1", "realistic") if few else ("ar1", "random_walk", "stochastic_volatility", "jumps",
                                                                "regimes", "mean_reverting", "garleanu_pedersen",
                                                                "correlated", "realistic", "traded")):
        yield dict(kind="synthetic", maker=maker, length=400, seed=n)
    for n in range(1 if few else 4):
        policy = POLICIES[0] if n % 2 else dict(kind="network", seed=5,
                                                features=["return(1)", "rsi(5)", "return(1)@2h", "taker_share(3)",
                                                          *([f"return(1)[{symbol(2)}]"] if n == 2 else [])], window=2)
        yield dict(kind="session", market=("one", "three", "three", "wild")[n], traded=(1, 3, 2, 1)[n], policy=policy,
                   timeframe="1h", start=400, parts=[12, 18] if n < 3 else [30], costs={},
                   instruments=instruments((1, 3, 2, 1)[n]),
                   limits=dict(max_position=.2, max_leverage=1., stops=dict(stop_loss=.01, take_profit=.02)))


def scenarios(few, seed=0):
    "All runs, as data; few: about twenty of every kind"
    draw, runs = random.Random(seed), []
    for make, many, some in ((backtests, 110, 4), (others, 32, 2), (kernels, 64, 3), (hard, 32, 2), (traders, 14, 1),
                             (sweeps, 14, 1), (environments, 16, 2), (indicators, 9, 1)):
        found = list(make(draw, some if few else many))
        runs += found if not few else found[:max(some, 3 if make is others else 0)]
    runs += rest(draw, few)
    for number, run in enumerate(runs):
        words = number, run["kind"], run.get("name", ""), run.get("market", run.get("maker", ""))
        run["name"] = " ".join(str(word) for word in words if word != "")
    return runs


# --- two packages ---------------------------------------------------------------------------------------------------
def git(*words): return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True,
                                       text=True).stdout.strip()


def checked_out(revision, folder):
    "A detached worktree of a revision; its files are always of one age, so that compiled code is found again"
    git("worktree", "prune")
    git("worktree", "add", "--force", "--detach", str(folder), revision)
    for path in folder.rglob("*.py"): os.utime(path, (1_000_000_000, 1_000_000_000))


def drive(root, driver, work, name):
    "Let the package below `root` do the scenarios; its report"
    out = work / name
    out.mkdir()
    apart = {key: value for key, value in os.environ.items() if not key.startswith("TRADELAB_")}
    apart |= {"PYTHONPATH": str(root), "XDG_CACHE_HOME": str(ROOT / ".cache" / "compare" / name), "MPLBACKEND": "Agg"}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-W", "ignore", str(driver), str(work / "scenarios.json"),
                           str(work / "markets"), str(out)], cwd=work, env=apart)
    if done.returncode: sys.exit(f"the driver of {name} failed: {driver}")
    report = json.loads((out / "done.json").read_text())
    if Path(report["package"]) != root / "tradelab":
        sys.exit(f"{name} was to be run by {root / 'tradelab'}, it was {report['package']}")
    print(f"{name}: {sum(report['seconds'].values()):.0f} s of CPU, {time.perf_counter() - begin:.0f} s in all",
          flush=True)
    return report


# --- comparison -----------------------------------------------------------------------------------------------------
def renamed(columns):
    "The columns of the other revision under the names of this one"
    found = {}
    for name, values in columns.items():
        pattern = next((each for each in RENAMED if re.fullmatch(each, name)), None)
        new = name if pattern is None else RENAMED[pattern] and re.sub(pattern, RENAMED[pattern], name)
        if new is not None: found[new] = in_our_words(values)
    return found


def in_our_words(values):
    if values.dtype.kind != "U" or not WORDS: return values
    return np.array([WORDS.get(word, word) for word in values.ravel().tolist()], str).reshape(values.shape)


def same(there, here):
    if there.dtype.kind == here.dtype.kind == "U": return there.shape == here.shape and bool((there == here).all())
    if there.dtype != here.dtype or there.shape != here.shape: return False
    return hashlib.sha256(there.tobytes()).digest() == hashlib.sha256(here.tobytes()).digest()


def first_difference(there, here):
    "Row and both values, as text"
    if there.shape != here.shape: return f"shape {there.shape} against {here.shape}"
    text = there.dtype.kind == here.dtype.kind == "U"
    if there.dtype != here.dtype and not text: return f"type {there.dtype} against {here.dtype}"
    one, two = there.ravel(), here.ravel()
    wrong = one != two
    if not text: wrong = (one.view(np.uint8) != two.view(np.uint8)).reshape(len(one), -1).any(axis=1)
    row = int(np.argmax(wrong))
    return f"row {np.unravel_index(row, there.shape) if there.ndim > 1 else row}: {one[row]!r} against {two[row]!r}"


def compared(runs, work, reports):
    "Count what is equal and what is not, by kind; the first differences, and what may move"
    counts, differences, moved = {}, [], Counter()
    for number, run in enumerate(runs):
        count = counts.setdefault(run["kind"], Counter())
        count["runs"] += 1
        if run["name"] in reports[0]["unknown"] + reports[1]["unknown"]:
            count["unknown"] += 1
            continue
        failed = {where: report["failed"].get(run["name"]) for where, report in zip(("there", "here"), reports)}
        if any(failed.values()):
            said = "\n".join(f"failed {where}: {text}" for where, text in failed.items() if text)
            count["different"] += 1
            differences.append((run["kind"], run["name"], "", said))
            continue
        there, here = (dict(np.load(work / where / f"{number}.npz")) for where in ("there", "here"))
        there = renamed(there)
        wrong = False
        for name in dict.fromkeys([*there, *here]):
            count["columns"] += 1
            if name in there and name in here and same(there[name], here[name]): continue
            if name not in there and any(fnmatchcase(name, each) for each in NEW): continue
            place = f"{run['kind']}/{name}"
            reason = next((why for pattern, why in MAY_MOVE.items() if fnmatchcase(place, pattern)), None)
            if reason:
                moved[reason] += 1
                continue
            said = f"only {'there' if name in there else 'here'}"
            if name in there and name in here: said = first_difference(there[name], here[name])
            count["columns that differ"], wrong = count["columns that differ"] + 1, True
            differences.append((run["kind"], run["name"], name, said))
        count["different" if wrong else "equal"] += 1
    return counts, differences, moved


NAMES = ("runs", "equal", "different", "unknown", "columns", "columns that differ")


def line(kind, count, seconds):
    numbers = "".join(f"{count[name]:>{max(len(name) + 2, 10)},}" for name in NAMES)
    return f"{kind:14}{numbers}" + "".join(f"{each:10.1f}" for each in seconds)


def tell(counts, differences, moved, reports):
    "Print what was found: a row per kind, and the first difference of each"
    print(f"\n{'kind':14}" + "".join(f"{name:>{max(len(name) + 2, 10)}}" for name in NAMES) + "   s there    s here")
    for kind, count in counts.items(): print(line(kind, count, [report["seconds"].get(kind, 0.) for report in reports]))
    print(line("all", sum(counts.values(), Counter()), [sum(report["seconds"].values()) for report in reports]))
    for reason, number in moved.items(): print(f"{number} columns moved, as they may: {reason}")
    seen = set()
    for kind, run, name, said in differences:
        if kind in seen: continue
        seen.add(kind)
        print(f"\nfirst difference of {kind}: run {run!r}, column {name!r}, there against here\n  {said}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="HEAD~1",
                        help="any git revision to compare the working tree with (default: HEAD~1)")
    parser.add_argument("--few", action="store_true", help="about twenty runs instead of a few hundred")
    parser.add_argument("--kind", action="append", help="only runs of this kind; may be given several times")
    parser.add_argument("--seed", type=int, default=0, help="draws other limits, costs and styles")
    parser.add_argument("--keep", type=Path, help="a new folder in which scenarios, candles and all that came out stay")
    asked = parser.parse_args()
    revision = git("rev-parse", "--verify", f"{asked.revision}^{{commit}}")
    package = git("rev-parse", f"{revision}:tradelab")
    base = ROOT / ".cache" / "compare"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as temporary:
        work, tree = (asked.keep or Path(temporary) / "work").resolve(), base / f"tree-{package[:12]}"
        (work / "markets").mkdir(parents=True)
        there = {name for name, (files, begin, length) in REAL.items()
                 if real(work / "markets" / f"{name}.npz", files, begin, length)}
        for name, recipe in MARKETS.items(): made(work / "markets" / f"{name}.npz", **recipe)
        if absent := set(REAL) - there:
            print(f"without real candles ({', '.join(sorted(absent))}): ../shared/data does not have them")
        runs = [run for run in scenarios(asked.few, asked.seed) if run.get("market") not in absent
                and (not asked.kind or run["kind"] in asked.kind)]
        (work / "scenarios.json").write_text(json.dumps(runs))
        said = git("log", "-1", "--format=%h %s", revision)
        print(f"{len(runs)} runs, {said} (there) against the working tree (here)", flush=True)
        try:
            checked_out(revision, tree)
            theirs = tree / DRIVER if (tree / DRIVER).exists() else ROOT / DRIVER
            reports = [drive(tree, theirs, work, "there"), drive(ROOT, ROOT / DRIVER, work, "here")]
        finally: git("worktree", "remove", "--force", str(tree))
        counts, differences, moved = compared(runs, work, reports)
        tell(counts, differences, moved, reports)
    sys.exit(bool(differences))


if __name__ == "__main__": main()
