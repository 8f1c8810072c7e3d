"""Every indicator: agreement with ta and TA-Lib on real candles, forgetting to the last bit, array and stream, no
look-ahead"""
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import ta
import talib
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from tradelab.events import COLUMNS, KNOWN, OPEN_TIME
from tradelab.features.grammar import INDICATORS, parse
from tradelab.features.stream import FeatureStream
from tradelab.market.candles import as_of, matrix, resample, with_funding
from tradelab.market.synthetic import ar1, correlated, funding, random_walk

ALL = [indicator().output(output) for indicator in INDICATORS.values() for output in indicator.outputs]
FIRST = [indicator() for indicator in INDICATORS.values()]
text = lambda feature: feature.text


def filled(frame):
    "Candles with every column that a feature can read"
    random = np.random.default_rng(len(frame))
    frame = frame.assign(quote_volume=frame.close * frame.volume, trades=random.integers(1, 1000, len(frame)),
                         taker_buy_volume=frame.volume * random.random(len(frame)),
                         index_price=frame.close * (1 + .001 * random.normal(size=len(frame))))
    return with_funding(frame, pd.concat([pd.Series([1e-4], [frame.index[0]]), funding(frame)]))


def known(frame): return matrix(frame, KNOWN)[1][:, 0]


SYNTHETIC = {"walk": known(filled(random_walk(6_000, seed=3))), "ar1": known(filled(ar1(6_000, seed=4)))}


@pytest.fixture(scope="module")
def real(request):
    shared = request.getfixturevalue("shared")
    table = pd.read_parquet(shared / "data" / "BTCUSDT-perp-1h.parquet")
    return filled(table[list(COLUMNS)].astype(float).set_axis(pd.DatetimeIndex(pd.to_datetime(table.timestamp,
        unit="ms", utc=True), name="open_time")))


def window_deviation(values, window):
    "The exact formula, window by window"
    return np.r_[[np.nan] * (window - 1), np.lib.stride_tricks.sliding_window_view(values, window).std(axis=1)]


def others(frame):
    "Feature -> what another library, or the plain formula, says"
    h, l, c, v = (frame[name] for name in COLUMNS[1:])
    a = {name: frame[name].to_numpy(copy=True) for name in COLUMNS}
    hlc = a["high"], a["low"], a["close"]
    obv = talib.OBV(a["close"], a["volume"])
    macd = talib.MACD(a["close"])
    bands = talib.BBANDS(a["close"], 20, 2, 2)
    k, d = talib.STOCHF(*hlc, 14, 3)
    deviation = window_deviation(a["close"], 20)
    middle = talib.SMA(a["close"], 20)
    return {
        "return(1)": [c / c.shift(1) - 1, ta.momentum.roc(c, 1) / 100],
        "return(24)": [c / c.shift(24) - 1, talib.ROCP(a["close"], 24)],
        "sma(20)": [ta.trend.sma_indicator(c, 20), middle], "sma(20).relative": [c / middle - 1],
        "ema(20)": [ta.trend.ema_indicator(c, 20), talib.EMA(a["close"], 20)],
        "ema(20).relative": [c / talib.EMA(a["close"], 20) - 1],
        "macd(12,26,9)": [ta.trend.macd(c), macd[0]], "macd(12,26,9).signal": [ta.trend.macd_signal(c), macd[1]],
        "macd(12,26,9).histogram": [ta.trend.macd_diff(c), macd[2]],
        "macd(12,26,9).relative": [ta.trend.macd_diff(c) / c],
        "adx(14)": [talib.ADX(*hlc, 14)], "adx(14).plus": [talib.PLUS_DI(*hlc, 14)],
        "adx(14).minus": [talib.MINUS_DI(*hlc, 14)],
        "rsi(14)": [ta.momentum.rsi(c, 14), talib.RSI(a["close"], 14)],
        "cci(20)": [ta.trend.cci(h, l, c, 20), talib.CCI(*hlc, 20)],
        "stochastic(14,3)": [ta.momentum.stoch(h, l, c, 14, 3), k],
        "stochastic(14,3).d": [ta.momentum.stoch_signal(h, l, c, 14, 3), d],
        "williams_r(14)": [ta.momentum.williams_r(h, l, c, 14), talib.WILLR(*hlc, 14)],
        "atr(14)": [ta.volatility.average_true_range(h, l, c, 14), talib.ATR(*hlc, 14)],
        "atr(14).relative": [talib.NATR(*hlc, 14) / 100],
        "bollinger(20,2)": [.5 + .5 * (c - middle) / (2 * deviation)],
        "bollinger(20,2).width": [4 * deviation / middle],
        "bollinger(20,2).upper": [ta.volatility.bollinger_hband(c, 20, 2), bands[0]],
        "bollinger(20,2).lower": [ta.volatility.bollinger_lband(c, 20, 2), bands[2]],
        "bollinger(20,2).middle": [ta.volatility.bollinger_mavg(c, 20), bands[1]],
        "volatility(20)": [np.r_[np.nan, window_deviation(np.diff(np.log(a["close"])), 20)]],
        "donchian(20)": [ta.volatility.donchian_channel_pband(h, l, c, 20)],
        "donchian(20).upper": [ta.volatility.donchian_channel_hband(h, l, c, 20)],
        "donchian(20).lower": [ta.volatility.donchian_channel_lband(h, l, c, 20)],
        "mfi(14)": [ta.volume.money_flow_index(h, l, c, v, 14), talib.MFI(*hlc, a["volume"], 14)],
        "cmf(20)": [ta.volume.chaikin_money_flow(h, l, c, v, 20)],
        "obv_change(20)": [np.r_[[np.nan] * 20, obv[20:] - obv[:-20]]],
        "obv_change(20).relative": [np.r_[[np.nan] * 20, obv[20:] - obv[:-20]] / v.rolling(20).sum()],
        "volume_ratio(20)": [v / v.rolling(20).mean()],
    } | more(h, l, c, v, hlc, a) | around(frame)


def around(frame):
    hour = frame.index.hour.to_numpy()
    day = frame.index.day_of_week.to_numpy() * 24 + frame.index.hour.to_numpy()
    money = frame.quote_volume
    return {"funding_rate": [frame.funding_rate], "basis": [frame.close / frame.index_price - 1],
            "quote_volume(20)": [money / money.rolling(20).mean()], "quote_volume(20).mean": [money.rolling(20).mean()],
            "taker_share(1)": [frame.taker_buy_volume / frame.volume], "time_of_day": [np.sin(2 * np.pi * hour / 24)],
            "time_of_day.cos": [np.cos(2 * np.pi * hour / 24)],
            "time_of_week": [np.sin(2 * np.pi * day / 168)], "time_of_week.cos": [np.cos(2 * np.pi * day / 168)]}


def more(h, l, c, v, hlc, a):
    aroon = talib.AROON(*hlc[:2], 25)
    sar = talib.SAR(*hlc[:2], .02, .2)
    ichimoku = ta.trend.IchimokuIndicator(h, l)
    keltner = ta.volatility.KeltnerChannel(h, l, c, 20, 10, original_version=False, multiplier=2)
    returns = np.diff(np.log(a["close"]))
    strength = talib.STOCHRSI(a["close"], 14, 14, 3)
    lines = [talib.AD(*hlc, a["volume"]), ta.volume.acc_dist_index(h, l, c, v).to_numpy()]
    vortex = ta.trend.VortexIndicator(h, l, c, 14)
    vwap = ta.volume.volume_weighted_average_price(h, l, c, v, 14)
    force = ta.volume.force_index(c, v, 13)
    return {
        "wma(9)": [talib.WMA(a["close"], 9), ta.trend.wma_indicator(c, 9)],
        "wma(9).relative": [c / talib.WMA(a["close"], 9) - 1],
        "kama(10,2,30)": [ta.momentum.kama(c), talib.KAMA(a["close"], 10)],
        "kama(10,2,30).relative": [c / ta.momentum.kama(c) - 1],
        "trix(15)": [ta.trend.trix(c, 15), talib.TRIX(a["close"], 15)],
        "aroon(25)": [talib.AROONOSC(*hlc[:2], 25)], "aroon(25).up": [aroon[1]], "aroon(25).down": [aroon[0]],
        "vortex(14)": [vortex.vortex_indicator_diff()], "vortex(14).plus": [vortex.vortex_indicator_pos()],
        "vortex(14).minus": [vortex.vortex_indicator_neg()],
        "psar(0.02,0.2)": [sar], "psar(0.02,0.2).relative": [c / sar - 1],
        "psar(0.02,0.2).trend": [np.where(c > sar, 1., -1.)],
        "ichimoku(9,26,52)": [ichimoku.ichimoku_conversion_line()],
        "ichimoku(9,26,52).base": [ichimoku.ichimoku_base_line()],
        "ichimoku(9,26,52).span_a": [ichimoku.ichimoku_a()], "ichimoku(9,26,52).span_b": [ichimoku.ichimoku_b()],
        "log_return(1)": [np.r_[np.nan, returns], ta.others.daily_log_return(c) / 100],
        "roc(12)": [ta.momentum.roc(c, 12), talib.ROC(a["close"], 12)],
        "tsi(25,13)": [ta.momentum.tsi(c, 25, 13)],
        "ppo(12,26,9)": [ta.momentum.ppo(c), talib.PPO(a["close"], 12, 26, 1)],
        "ppo(12,26,9).signal": [ta.momentum.ppo_signal(c)], "ppo(12,26,9).histogram": [ta.momentum.ppo_hist(c)],
        "stochastic_rsi(14,3,3)": [100 * ta.momentum.stochrsi(c), strength[0]],
        "stochastic_rsi(14,3,3).k": [100 * ta.momentum.stochrsi_k(c), strength[1]],
        "stochastic_rsi(14,3,3).d": [100 * ta.momentum.stochrsi_d(c)],
        "realised_volatility(24)":
        [np.r_[[np.nan] * 24, np.sqrt((np.lib.stride_tricks.sliding_window_view(returns, 24) ** 2).sum(1))]],
        "ulcer(14)": [ta.volatility.ulcer_index(c, 14)], "keltner(20,10,2)": [keltner.keltner_channel_pband()],
        "keltner(20,10,2).width": [keltner.keltner_channel_wband() / 100],
        "keltner(20,10,2).upper": [keltner.keltner_channel_hband()],
        "keltner(20,10,2).lower": [keltner.keltner_channel_lband()],
        "keltner(20,10,2).middle": [keltner.keltner_channel_mband()],
        "ad_change(20)": [np.r_[[np.nan] * 19, line[19:] - np.r_[0, line[:-20]]] for line in lines], "vwap(14)": [vwap],
        "vwap(14).relative": [c / vwap - 1],
        "force_index(13)": [force],
        "force_index(13).relative": [force / v.iloc[1:].ewm(span=13, adjust=False).mean().reindex(v.index) / c],
    }


def assert_agrees(feature, candles, other):
    ours = feature.array(candles)[feature.warm_up - 1:]
    other = np.asarray(other, float)[feature.warm_up - 1:]
    assert np.isfinite(ours).all()
    defined = np.isfinite(other)    # ta says 0/0 where nothing moved
    assert defined.mean() > .99
    difference = np.abs(ours - other)[defined].max()
    assert difference <= 1e-9 * max(np.abs(other[defined]).max(), other[defined].std()), (feature.text, difference)


def test_agrees_on_real_candles(real):
    "On the newest of them: some of the other libraries take a millisecond a candle"
    candles = real.iloc[-3_000:]
    expected, ours = others(candles), known(candles)
    assert {feature.text for feature in ALL} - {"return(1)"} <= set(expected), "an indicator without an outside truth"
    for name, truths in expected.items():
        for other in truths: assert_agrees(parse(name), ours, other)


@pytest.mark.parametrize("feature", ALL, ids=text)
@pytest.mark.parametrize("market", SYNTHETIC)
def test_forgets_its_start_on_synthetic_candles(feature, market):
    forgets(feature, SYNTHETIC[market], range(1, 4_000, 97))


@pytest.mark.parametrize("feature", ALL, ids=text)
def test_forgets_its_start_on_real_candles(feature, real):
    forgets(feature, known(real), range(100, 30_000, 1_013))


def forgets(feature, candles, starts):
    whole = feature.array(candles)
    for start in starts:
        end = start + feature.warm_up + 50
        assert_array_equal(feature.array(candles[start:end])[feature.warm_up - 1:],
                           whole[start + feature.warm_up - 1:end], f"from {start}")


@pytest.mark.parametrize("name", ["ema(100)", "rsi(50)", "atr(100)", "macd(50,100,50).histogram", "adx(30)", "rsi(2)",
                                  "ema(1)"])
def test_forgets_with_other_windows(name, real):
    forgets(parse(name), known(real), range(100, 20_000, 997))


@pytest.mark.parametrize("feature", FIRST, ids=text)
def test_is_defined_from_the_warm_up_on(feature):
    array = feature.array(SYNTHETIC["walk"])
    assert np.isfinite(array[feature.warm_up - 1:]).all()
    assert (np.isnan(array[0]) or feature.warm_up == 1)
    defined = np.flatnonzero(np.isfinite(array))
    assert (np.diff(defined) == 1).all()
    assert defined[0] < feature.warm_up


@st.composite
def features(draw, symbols=("",)):
    "Any indicator, any output, random parameters, timeframe and lag"
    indicator = INDICATORS[draw(st.sampled_from(sorted(INDICATORS)))]
    values = [draw(st.integers(1, 12) if isinstance(default, int) else st.floats(.5, 4))
              for default in indicator.parameters.values()]
    feature = indicator(*values).output(draw(st.sampled_from(indicator.outputs)))
    return replace(feature, timeframe=draw(st.sampled_from(["", "", "1h", "2h", "4h"])), lag=draw(st.integers(0, 3)),
                   symbol=draw(st.sampled_from(symbols)))


@st.composite
def histories(draw):
    "Candles on a coarse grid, so that equal prices and empty volumes are common; all columns, from any hour on"
    rows = draw(st.lists(st.tuples(*[st.integers(1, 40)] * 4, st.integers(0, 3), st.integers(0, 9), st.integers(-5, 5)),
                         min_size=3, max_size=60))
    times = 3_600_000. * (draw(st.integers(0, 200)) + np.arange(len(rows)))
    return np.array([(o, max(o, h, l, c), min(o, h, l, c), c, v, v * c, 7, v * taken / 9, rate / 1e4,
                      c * (1 + rate / 1e3), time) for (o, h, l, c, v, taken, rate), time in zip(rows, times)], float)


@settings(max_examples=400)
@given(features(), histories(), st.data())
def test_array_and_stream_hold_the_same_bits_and_the_past_does_not_see_the_future(feature, candles, data):
    array, stream = feature.array(candles), feature.stream("1h")
    assert_array_equal(array, [stream.update(candle)[0] for candle in candles])
    now = data.draw(st.integers(2, len(candles)))
    altered = candles.copy()
    altered[now:, :OPEN_TIME] *= data.draw(st.floats(.5, 2))
    assert_array_equal(array[:now], feature.array(candles[:now]))
    assert_array_equal(array[:now], feature.array(altered)[:now])
    assert not np.isinf(array).any()


@settings(max_examples=100)
@given(features(("", "ETH/USDT:USDT", "1000PEPE/USDT")))
def test_a_feature_is_what_its_text_says(feature):
    assert parse(feature.text) == feature
    assert parse(feature.text).text == feature.text


@pytest.mark.parametrize("feature", ALL, ids=text)
def test_a_stream_goes_on_from_a_copy_of_its_state(feature):
    candles = SYNTHETIC["walk"][:300]
    first, second = feature.stream(), feature.stream()
    for candle in candles[:150]: first.update(candle)
    second.memory[:] = first.memory
    assert_array_equal([first.update(candle)[0] for candle in candles[150:]],
                       [second.update(candle)[0] for candle in candles[150:]])


@pytest.mark.parametrize("feature", ALL, ids=text)
def test_a_frozen_price_after_wild_ones_is_not_a_nan(feature):
    candles = np.vstack([SYNTHETIC["walk"][:200], np.tile([100.1, 100.1, 100.1, 100.1, 0., 0., 0., 0., 1e-4, 100., 0.],
                                                          (100, 1))])
    assert np.isfinite(feature.array(candles)[feature.indicator.cells(feature.parameters) + 60:]).all()


@pytest.mark.parametrize("name", ["volatility(20)", "bollinger(20,2).width"])
def test_a_frozen_price_has_no_deviation(name, real):
    candles = np.vstack([known(real)[:, :5], np.tile([100.1, 100.1, 100.1, 100.1, 0.], (30, 1))])
    assert (parse(name).array(candles)[-5:] == 0).all()


def test_takes_arrays_of_any_layout():
    candles = SYNTHETIC["walk"][:100]
    frozen = candles.copy()
    frozen.setflags(write=False)
    wide = np.zeros((100, 22))
    wide[:, ::2] = candles
    for other in (frozen, np.asfortranarray(candles), wide[:, ::2]):
        assert_array_equal(parse("rsi").array(other), parse("rsi").array(candles))


def test_bad_candles_are_refused_and_leave_no_trace():
    candles = SYNTHETIC["walk"][:100]
    stream = parse("rsi(3)").stream()
    for candle in candles[:50]: stream.update(candle)
    before = stream.memory.copy()
    for bad in (np.nan, np.inf, 0., -1.):
        candle = candles[50].copy()
        candle[3] = bad
        with pytest.raises(ValueError, match="candle 0 is not usable"): stream.update(candle)
    with pytest.raises(ValueError, match="a candle is 5 numbers"): stream.update(candles[50, :4])
    assert_array_equal(stream.memory, before)
    with pytest.raises(ValueError, match=r"shape \(T, 5\)"): parse("rsi(3)").array(candles[0])
    assert len(parse("rsi(3)").array(candles[:0])) == 0


UNCOMPILED = """
import json, sys
import numpy as np
from tradelab.features.grammar import parse
candles = np.array(json.load(sys.stdin), float)
print(json.dumps({text: np.nan_to_num(parse(text).array(candles), nan=-1e9).tolist() for text in sys.argv[1:]}))
"""


def test_uncompiled_functions_say_the_same():
    candles = SYNTHETIC["walk"][:120]
    texts = [feature.text for feature in ALL]
    done = subprocess.run([sys.executable, "-c", UNCOMPILED, *texts], input=json.dumps(candles.tolist()),
                          capture_output=True, text=True,
                          env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, check=True)
    for name, values in json.loads(done.stdout).items():
        assert_allclose(values, np.nan_to_num(parse(name).array(candles), nan=-1e9), rtol=1e-9, atol=1e-12,
                        err_msg=name)


# ---- other timeframes, other symbols, other columns

@pytest.mark.parametrize("name", ["rsi(14)", "return(1)", "volume_ratio(5)", "taker_share(3)", "quote_volume(4).mean",
                                  "funding_rate", "basis", "macd(3,6,4).signal"])
@pytest.mark.parametrize("timeframe", ["4h", "1d"])
def test_another_timeframe_is_the_feature_of_the_longer_candles_as_of_their_close(name, timeframe, real):
    frame = real[:6_000]
    longer = resample(frame, timeframe, name="BTC")
    assert_allclose(longer.taker_buy_volume[1:],
                    frame.taker_buy_volume.resample({"4h": "4h", "1d": "1D"}[timeframe]).sum()[longer.index][1:],
                    rtol=1e-12)
    expected = as_of(frame, pd.DataFrame({"value": parse(name).array(known(longer))}, longer.index), timeframe)["value"]
    assert_allclose(parse(f"{name}@{timeframe}").array(known(frame)), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name, bits", [("rsi(14)@4h", True), ("return(1)@4h[-2]", True), ("obv_change(5)@4h", False)])
def test_the_exchange_s_own_longer_candles_give_the_same(name, bits, shared):
    short, own = (pd.read_parquet(shared / "data"
                                  / f"SOLUSDT-{timeframe}.parquet").pipe(
        lambda table: table.set_index(pd.DatetimeIndex(pd.to_datetime(table.timestamp, unit="ms", utc=True),
                                                       name="open_time")))["2021-10":"2022-03"]
                  for timeframe in ("15m", "1h"))
    name = name.replace("4h", "1h")
    ours = parse(name).array(known(short))
    expected = as_of(short, pd.DataFrame({"value": parse(name.replace("@1h", "")).array(known(own))}, own.index),
                     "1h")["value"].to_numpy()
    (assert_array_equal if bits else assert_allclose)(ours[3:], expected[3:])


@pytest.mark.parametrize("name", ["rsi(14)@4h", "ema(20).relative@2h[-3]", "taker_share(5)@1d", "return(1)[-5]",
                                  "atr(5).relative@1d[-1]"])
def test_other_timeframes_and_lags_forget_their_start(name):
    feature, candles = parse(name), SYNTHETIC["walk"]
    whole = feature.array(candles)
    warm_up = feature.history("1h")
    for start in range(1, 6_000 - warm_up - 60, 191):
        assert_array_equal(feature.array(candles[start:start + warm_up + 50])[warm_up - 1:],
                           whole[start + warm_up - 1:start + warm_up + 50], f"from {start}")


def test_many_symbols_and_features_in_one_stream_are_their_arrays():
    frames = correlated(500, ("BTC/USDT:USDT", "ETH/USDT:USDT", "SOL/USDT:USDT"), seed=5)
    candles = matrix({symbol: filled(frame) for symbol, frame in frames.items()}, KNOWN)[1]
    wanted = [(row, replace(feature, timeframe=timeframe, lag=lag)) for row, timeframe,
              lag in ((0, "", 0), (1, "4h", 2), (2, "2h", 0)) for feature in [*ALL, parse("mass_index(3,5)")]]
    stream = FeatureStream([feature for _, feature in wanted], "1h", [row for row, _ in wanted], 3)
    seen = np.array([stream.update(candle).copy() for candle in candles])
    for (row, feature), values in zip(wanted, seen.T):
        (assert_allclose if feature.indicator.update is None else assert_array_equal)(values,
            feature.array(candles[:, row]), err_msg=feature.text)


def test_a_missing_column_is_named_and_nothing_is_seen():
    candles = SYNTHETIC["walk"][:5]
    stream = parse("taker_share(2)").stream()
    stream.update(candles[0])
    before = stream.memory.copy()
    with pytest.raises(ValueError, match=r"taker_share\(2\) needs taker_buy_volume, which candle 0 does not have: take "
                       r"candles from a source that has it"):
        stream.update(candles[1, :5])
    assert_array_equal(stream.memory, before)
    with pytest.raises(ValueError, match=r"taker_share\(2\) needs taker_buy_volume, which candle 3 does not have"):
        parse("taker_share(2)").array(np.where((np.arange(5)[:, None] == 3) & (np.arange(11) == 7), np.nan, candles))
    with pytest.raises(ValueError, match=r"rsi\(14\)@4h: .*|candles have no open times, and 4h"):
        parse("rsi(14)@4h").array(candles[:, :5])
    with pytest.raises(ValueError, match="15m is not a multiple of 1h"): parse("rsi(14)@15m").stream("1h")
