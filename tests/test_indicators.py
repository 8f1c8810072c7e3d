"""The exact window formula, no drift, no look-ahead, warm-up to the last bit: every indicator, random parameters, real
candles"""
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import ta
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_array_equal

from tradelab.compiled import compiled
from tradelab.events import COLUMNS
from tradelab.features.grammar import INDICATORS, find, parse
from tradelab.features.indicator import Feature, Indicator, IndicatorError, trial_candles
from tradelab.features.ta_wrapper import TA_ALIASES, library
from tradelab.features.trend import _way
from tradelab.features.windows import (
    append,
    complete,
    extreme_age,
    moments,
    push_recent,
    tick,
    window_high,
    window_low,
    window_sum,
)
from tradelab.market.synthetic import random_walk

WALK = random_walk(4_000, seed=5)[list(COLUMNS)].to_numpy()
MARKETS = ["BTCUSDT-perp-1h", "DOGEUSDT-1h", "BNBUSDT-1h", "SOLUSDT-15m", "BTCUSD-coinbase-1h"]
FROZEN = np.tile([.1, .1, .1, .1, 0.], (60, 1))


@pytest.fixture(scope="module")
def real(shared):
    return {name: pd.read_parquet(shared / "data" / f"{name}.parquet")[list(COLUMNS)].astype(float).to_numpy(copy=True)
            for name in MARKETS}


def windows(values, size): return np.vstack([np.full((size - 1, size), np.nan), sliding_window_view(values, size)])


def exact(candles):
    "Feature -> the formula written out, window by window"
    o, h, l, c, v = candles.T.copy()
    typical = (h + l + c) / 3
    returns = np.r_[np.nan, np.diff(np.log(c))]
    change = np.r_[np.nan, np.diff(c)]
    flow = np.where(h > l, v * ((c - l) - (h - c)) / np.where(h > l, h - l, 1), 0)
    money = typical * v
    moved = np.sign(np.r_[np.nan, np.diff(np.round(h + l + c, 6))]) # in ticks: the last bits of equal prices differ
    T, C = windows(typical, 20), windows(c, 20)
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = np.arange(1, 31)
        deviation = np.abs(T - T.mean(1, keepdims=True)).mean(1)
        rise = windows(np.where(moved > 0, money, 0 * moved), 14).sum(1)
        fall = windows(np.where(moved < 0, money, 0 * moved), 14).sum(1)
        volume = windows(v, 14).sum(1)
        mean, spread = C.mean(1), C.std(1)
        top, down = windows(h, 26), windows(l, 26)
        drawdown = 100 * (c / windows(c, 14).max(1) - 1)
        return {
            "sma(20)": mean, "sma(200)": windows(c, 200).mean(1), "wma(30)": (windows(c, 30) * weights).sum(1)
            / weights.sum(), "cci(20)": (typical - T.mean(1)) / (.015 * deviation),
            "bollinger(20,2).upper": mean + 2 * spread, "bollinger(20,2).width": 4 * spread / mean,
            "bollinger(20,2)": .5 + .25 * (c - mean) / spread,
            "volatility(168)": windows(returns, 168).std(1),
            "realised_volatility(168)": np.sqrt((windows(returns, 168) ** 2).sum(1)),
            "mfi(14)": 100 * rise / (rise + fall), "cmf(14)": windows(flow, 14).sum(1) / volume,
            "ad_change(14)": windows(flow, 14).sum(1),
            "vwap(14)": windows(money, 14).sum(1) / volume, "obv_change(14)": windows(v * np.sign(change), 14).sum(1),
            "volume_ratio(14)": 14 * v / volume,
            "ulcer(14)": np.sqrt((windows(drawdown, 14) ** 2).mean(1)), "donchian(26).upper": top.max(1),
            "donchian(26).lower": down.min(1),
            "aroon(25).up": 100 * (25 - top[:, ::-1].argmax(1)) / 25,
            "aroon(25).down": 100 * (25 - down[:, ::-1].argmin(1)) / 25,
            "williams_r(26)": -100 * (top.max(1) - c) / (top.max(1) - down.min(1)),
            "ichimoku(9,26,52).base": (top.max(1) + down.min(1)) / 2,
            "log_return(7)": np.r_[[np.nan] * 7, np.log(c[7:] / c[:-7])],
            "roc(7)": np.r_[[np.nan] * 7, 100 * (c[7:] / c[:-7] - 1)]}


@pytest.mark.parametrize("market", MARKETS)
def test_agrees_with_the_exact_window_formula_on_real_candles(real, market):
    candles = real[market][-12_000:]
    for text, formula in exact(candles).items():
        feature = parse(text)
        ours = feature.array(candles)[feature.warm_up - 1:]
        formula = formula[feature.warm_up - 1:]
        defined = np.isfinite(formula) # 0/0 where nothing moved or was traded
        assert np.isfinite(ours).all()
        assert defined.mean() > .99
        tolerance = 1e-9 * np.maximum(np.abs(formula), formula[defined].std())
        assert (np.abs(ours - formula) <= tolerance)[defined].all(), (text, np.abs(ours - formula)[defined].max())


@pytest.mark.parametrize("market", MARKETS)
@pytest.mark.parametrize("text", ["psar", "psar(0.01,0.1)", "psar(0.05,0.5).trend", "kama", "kama(20,2,30)", "tsi",
                                  "trix", "ppo.signal", "stochastic_rsi.d", "force_index.relative",
                                  "keltner.width", "mfi", "cmf", "obv_change", "vwap", "vortex", "ulcer",
                                  "realised_volatility(168)", "bollinger(200,2)", "ichimoku.span_b", "wma(50)"])
def test_the_warm_up_forgets_to_the_last_bit(real, market, text):
    candles, feature = real[market], parse(text)
    whole = feature.array(candles)
    for start in range(37, len(candles) - feature.warm_up - 50, 2_503):
        end = start + feature.warm_up + 50
        assert_array_equal(feature.array(candles[start:end])[feature.warm_up - 1:],
                           whole[start + feature.warm_up - 1:end], f"from {start}")


# ------------------------------------------------------------------ memory
values = st.one_of(st.floats(1e-6, 1e6), st.integers(0, 3).map(float))


@settings(max_examples=300)
@given(st.lists(values, min_size=1, max_size=200), st.integers(1, 30))
def test_windows_say_what_the_plain_formula_says(series, size):
    state = np.zeros(13 + 5 * size)
    for t, value in enumerate(series):
        last = series[max(0, t - size + 1):t + 1]
        clock = tick(state, size)
        assert window_sum(state, value, clock, 2, 13) == math.fsum(last)
        high = window_high(state, value, clock, 5, 13 + size)
        low = window_low(state, value, clock, 7, 13 + 2 * size)
        assert (high, low) == (max(last), min(last))
        assert extreme_age(state, high, clock, 6, 13 + size) == last[::-1].index(max(last))
        assert extreme_age(state, low, clock, 8, 13 + 2 * size) == last[::-1].index(min(last))
        start = append(state, value, clock, 13 + 3 * size)
        push_recent(state, value, 9)
        assert complete(state) == (len(last) == size)
        if not complete(state): continue
        assert state[start:start + size].tolist() == last
        mean, deviation = moments(state, value, 9, start, size)
        assert np.isclose(mean, np.mean(last), rtol=1e-13)
        assert np.isclose(deviation, np.std(last), rtol=1e-9, atol=1e-9 * max(last))
        if len(set(last)) == 1: assert (mean, deviation) == (last[0], 0)


sizes = st.one_of(st.just(0.), st.floats(-15, 15).map(lambda power: 10. ** power), st.floats(1, 2),
                  st.integers(0, 9).map(float))


@settings(max_examples=300)
@given(st.lists(st.tuples(sizes, st.sampled_from([-1., 1.])), min_size=1, max_size=120), st.integers(1, 60),
       st.integers(-300, 250))
def test_sums_of_any_size_and_sign_are_exact_whatever_came_before(series, size, power):
    series = [value * sign * 10. ** power for value, sign in series]
    state = np.zeros(5 + size)
    for t, value in enumerate(series):
        assert window_sum(state, value, tick(state, size), 2, 5) == math.fsum(series[max(0, t - size + 1):t + 1])


def summed(state, value): return window_sum(state, value, tick(state, 20), 2, 5)


@settings(max_examples=300)
@given(st.lists(st.one_of(st.floats(1, 1.2), st.floats(1e-6, 1e6), st.sampled_from([.1, .3, 1.])), min_size=2,
                max_size=400), st.integers(1, 12))
def test_the_way_of_a_price_is_exact_whether_or_not_it_needs_a_rest(closes, size):
    state, changes = np.zeros(5 + size), np.abs(np.diff(closes))
    for t, change in enumerate(changes):
        assert _way(state, change, closes[t + 1], tick(state, size), 2,
                    5) == math.fsum(changes[max(0, t - size + 1):t + 1])


@pytest.mark.parametrize("market", MARKETS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 9, 21, 200])
def test_windows_of_any_length_agree_with_the_formula_on_real_candles(real, market, size):
    close = real[market][-3_000:, 3]
    rows = windows(close, size)[size:]
    weights = np.arange(1, size + 1)
    candles = real[market][-3_000:]
    for text, formula in {f"wma({size})": (rows * weights).sum(1) / weights.sum(),
                          f"bollinger({size},2).middle": rows.mean(1), f"bollinger({size},2).upper": rows.mean(1)
                          + 2 * rows.std(1),
                          f"volatility({size})": windows(np.diff(np.log(close)), size)[size - 1:].std(1)}.items():
        assert np.abs(parse(text).array(candles)[size:] - formula).max() <= 1e-9 * max(np.abs(formula).max(),
            formula.std()), text


def test_a_sum_does_not_drift():
    series = np.random.default_rng(0).lognormal(0, 3, 300_000)
    sums = np.zeros(25)
    for value in series: total = summed(sums, value)
    assert total == math.fsum(series[-20:])
    for _ in range(20): total = summed(sums, 0.)
    assert total == 0


def test_the_absurd_is_forgotten():
    sums = np.zeros(25)
    for value in (1e-9, 1e300, 3., 1e-200): summed(sums, value)
    for _ in range(9 * 20): summed(sums, .1)
    assert sums[2:4].sum() == math.fsum([.1] * 20)


FLAT = {"volatility(20)": 0, "volatility(7)": 0, "realised_volatility(24)": 0, "bollinger(20,2).width": 0,
        "bollinger(20,2)": .5, "ulcer(14)": 0, "cci(20)": 0, "donchian(20)": .5,
        "cmf(20)": 0, "obv_change(20)": 0, "ad_change(20)": 0, "mfi(14)": 50, "vortex(14)": 0, "return(5)": 0,
        "log_return(5)": 0, "roc(5)": 0, "stochastic(14,3)": 50, "wma(9)": .1,
        "vwap(14)": .1, "williams_r(14)": -50, "volume_ratio(20)": 1, "aroon(25)": 0}


@pytest.mark.parametrize("text", FLAT)
def test_a_frozen_price_after_real_ones_is_exactly_flat(real, text):
    assert (parse(text).array(np.vstack([real["BTCUSDT-perp-1h"], FROZEN]))[-10:] == FLAT[text]).all()


# ------------------------------------------------------------------ no look-ahead
def sees_the_future(feature, candles, position, disturb):
    "Whether another future changes what was said before"
    other = candles.copy()
    other[position:, :4] *= disturb[:, :1]
    other[position:, 4] *= disturb[:, 1]
    return not all(np.array_equal(feature.array(candles)[:position], feature.array(changed)[:position], equal_nan=True)
                   for changed in (other, candles[:position]))


@st.composite
def any_feature(draw, indicators):
    indicator = indicators[draw(st.sampled_from(sorted(indicators)))]
    parameters = [draw(st.integers(1, 40) if isinstance(default, int) else st.floats(.01, 4))
                  for default in indicator.parameters.values()]
    return indicator(*parameters).output(draw(st.sampled_from(indicator.outputs)))


@settings(max_examples=400)
@given(any_feature({name: indicator for name, indicator in INDICATORS.items() if not indicator.needs}),
       st.integers(1, 999), st.integers(0, 3_000), st.integers(0, 2 ** 32 - 1))
def test_the_past_does_not_see_the_future(feature, position, start, seed):
    candles = WALK[start:start + 1_000]
    disturb = np.random.default_rng(seed).lognormal(0, 1, (1_000 - position, 2))
    assert not sees_the_future(feature, candles, position, disturb)
    stream = feature.stream()
    assert_array_equal(feature.array(candles), [stream.update(candle)[0] for candle in candles])


LIBRARY_PARAMETERS = {"stc": (20, 10, 5, 3, 3), "kst": (3, 5, 7, 9, 3, 3, 3, 4), "kst_sig": (3, 5, 7, 9, 3, 3, 3, 4, 3),
                      "mass_index": (5, 9),
                      **{name: (10, 5, 4) for name in ("pvo", "pvo_signal", "pvo_hist")}}


@pytest.mark.parametrize("name", sorted(library()))
def test_what_ta_computes_does_not_see_the_future_and_streams_the_same(name):
    candles, generator = WALK[:1_300], np.random.default_rng(0)
    feature = library()[name](*LIBRARY_PARAMETERS.get(name, ()))
    whole, warm_up = feature.array(candles), feature.warm_up
    for position in (warm_up, 900, 1_250):
        assert not sees_the_future(feature, candles, position, generator.lognormal(0, 1, (1_300 - position, 2)))
    stream, seen = feature.stream(), []
    for candle in candles[:warm_up + 60]: seen.append(stream.update(candle)[0])
    assert np.isnan(seen[:warm_up - 1]).all()
    ours = whole[warm_up - 1:warm_up + 60]
    spread = whole[warm_up - 1:].std()
    assert (np.abs(np.array(seen[warm_up - 1:]) - ours) <= 1e-9 * np.maximum(np.abs(ours), spread)).all()
    copy = feature.stream()
    for mine, its in zip((copy.memory, *copy._asked.values()), (stream.memory, *stream._asked.values())): mine[:] = its
    assert copy.update(candles[warm_up + 60]) == stream.update(candles[warm_up + 60])
    assert np.isfinite(feature.array(np.vstack([candles, np.tile([9., 9., 9., 9., 0.], (100, 1))]))[warm_up - 1:]).all()


@pytest.mark.parametrize("market", MARKETS[:2])
@pytest.mark.parametrize("name", sorted(library()))
def test_a_bounded_window_is_enough_for_what_ta_computes_on_real_candles(real, market, name):
    candles, feature = real[market][-6_000:], library()[name]()
    whole = feature.array(candles)
    spread = np.nanstd(whole)
    for end in range(feature.warm_up + 11, 6_000, 397):
        bounded = feature.array(candles[end - feature.warm_up:end])[-1]
        assert abs(bounded - whole[end - 1]) <= 1e-9 * max(abs(bounded), spread), end


class Scaled(Feature):
    "Planted: a feature divided by its deviation over the whole history"
    def array(self, candles):
        values = super().array(candles)
        return values / np.nanstd(values)


class Next(Feature):
    "Planted: the return of the next candle"
    def array(self, candles): return np.r_[super().array(candles)[1:], np.nan]


class Filled(Feature):
    "Planted: as ta fills the start of a shifted series, with the mean of the whole history"
    def array(self, candles): return ta.trend.trix(pd.Series(candles[:, 3]), 1).to_numpy()


@pytest.mark.parametrize("planted", [Scaled, Next, Filled])
def test_a_planted_look_ahead_is_caught(planted):
    feature = planted(INDICATORS["return"], (1,), "value")
    for position in (25, 100, 399):
        assert sees_the_future(feature, WALK[:400], position, np.random.default_rng(position).lognormal(0, 1,
            (400 - position, 2)))


def test_what_lies_before_the_warm_up_of_ta_is_cut_off():
    close = pd.Series(WALK[:60, 3])
    # ta: a later candle changes an earlier value
    assert ta.trend.kst_sig(close, 2, 2, 2, 2, 2, 2, 2, 2, 2)[2] != ta.trend.kst_sig(close[:40], 2, 2, 2, 2, 2, 2, 2, 2,
        2)[2]
    assert np.isnan(library()["kst_sig"](2, 2, 2, 2, 2, 2, 2, 2, 2).array(WALK[:60])[:5]).all()


# ------------------------------------------------------------------ the rest
def test_the_stream_does_not_care_what_was_compiled_first():
    program = ("import numpy as np; from tradelab.features.grammar import parse; s = parse('bollinger(5,2)').stream(); "
               "print([float(s.update([1, 2, 1, c, 1])[0]) for c in (1.1, 1.7, 1.3, 1.9, 1.2, 1.6)])")
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    candles = np.array([[1, 2, 1, c, 1] for c in (1.1, 1.7, 1.3, 1.9, 1.2, 1.6)])
    assert printed.strip() == str(parse("bollinger(5,2)").array(candles).tolist())


def test_an_update_of_the_user_may_allocate_nothing_else_is_asked_of_it():
    @compiled
    def update(state, parameters, candle, out):
        state[0] += 1.
        out[0] = state[0] * parameters[0]
    count = Indicator(name="count", update=update, parameters={"step": 2},
                      state=lambda step: {"count": 1}, warm_up=lambda step: 1)
    assert count(3).array(WALK[:4]).tolist() == [3, 6, 9, 12]


REMEMBER = [indicator for indicator in INDICATORS.values() if indicator.state(*indicator.parameters.values())]


@pytest.mark.parametrize("indicator", REMEMBER, ids=lambda indicator: indicator.name)
def test_an_update_that_reaches_beyond_its_state_is_refused(indicator):
    "Every indicator, with a cell less than it needs, as an array and as a stream"
    def short(*parameters):
        *parts, (last, cells) = indicator.state(*parameters).items()
        return {**dict(parts), last: cells - 1}
    feature = replace(indicator, state=short)()
    cells = indicator.cells(feature.parameters)
    for use in (lambda: feature.array(trial_candles(30).T), feature.stream):
        with pytest.raises(IndicatorError, match=rf"^{indicator.name}\(.*\) (writes cell {cells - 1}, |reaches beyond "
                           rf"its arrays .*; )its state has {cells - 1} \(.*\): declare the cell, or correct the"):
            use()


def test_an_indicator_is_written_by_keyword():
    with pytest.raises(TypeError, match="positional"): Indicator("count", None)


@pytest.mark.parametrize("text, message", {"kama(10)": "kama takes 3 parameters", "psar(0,1)": "step must be a "
                                           "number above 0", "keltner(20,1.5,2)": "atr must be a whole number above 0",
    "ichimoku.cloud": "ichimoku has no output 'cloud': choose one of conversion, base, span_a, span_b",
    "kamma": "did you mean 'kama'", "mas_index": "did you mean 'mass_index'",
    "mass_index(9)": "mass_index takes 2 parameters", "vortex_indicator_pos": "of ta is 'vortex.plus' here"}.items())
def test_bad_input(text, message):
    with pytest.raises(ValueError, match=message): parse(text)


def test_every_name_of_ta_leads_somewhere():
    for name, ours in TA_ALIASES.items():
        assert parse(ours).warm_up > 0
        with pytest.raises(ValueError, match=f"feature {name!r} of ta is {ours!r} here"): find(name)
    assert parse("tradelab.features.trend:kama").text == "tradelab.features.trend:kama(10,2,30)"
    assert replace(find("kama"), name="x").name == "x"
