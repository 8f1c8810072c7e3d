"""Markets that stand still, burst, or cost next to nothing: every indicator is a number within its definition, and two
histories say the same, bit for bit"""
import numpy as np
import pandas as pd
import pytest
import ta
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from tradelab.account import POSITION, apply_fill, mark, new_account
from tradelab.features.grammar import INDICATORS, parse
from tradelab.features.observation import PORTFOLIO, Observation
from tradelab.features.regime import regime
from tradelab.features.ta_wrapper import library
from tradelab.settings import Limits

KINDS = ("frozen", "halted", "the same candle", "illiquid", "bursty", "a burst, then nothing", "tiny prices",
         "tiny sizes")
ALL = [indicator().output(output) for indicator in (*INDICATORS.values(), regime) for output in indicator.outputs]
THEIRS = [indicator() for indicator in library().values()]
BOUNDS = {"rsi": (0, 100), "tsi": (-100, 100), "adx": (0, 100), "stochastic": (0, 100), "stochastic_rsi": (0, 100),
          "williams_r": (-100, 0), "mfi": (0, 100), "cmf": (-1, 1), "obv_change.relative": (-1, 1),
          "taker_share": (0, 1), "donchian": (0, 1), "aroon": (0, 100), "aroon(25)": (-100, 100), "psar.trend": (-1, 1),
          "time_of_day": (-1, 1), "time_of_week": (-1, 1), "volatility": (0, 10),
          "realised_volatility": (0, 100), "ulcer": (0, 100), "atr": (0, np.inf), "volume_ratio": (0, 20),
          "quote_volume(20)": (0, 20), "vortex.plus": (0, np.inf), "vortex.minus": (0, np.inf), "stc": (0, 100),
          "bollinger_hband_indicator": (0, 1), "bollinger_lband_indicator": (0, 1),
          "keltner_channel_hband_indicator": (0, 1), "keltner_channel_lband_indicator": (0, 1),
          "ultimate_oscillator": (0, 100),
          "bollinger.width": (0, np.inf), "keltner.width": (0, np.inf),
          **{f"tradelab.features.regime:regime.{name}": (0, 1) for name in regime.outputs[1:]}}
# prices of the market
AVERAGES = ("sma(20)", "ema(20)", "wma(9)", "kama(10,2,30)", "vwap(14)", "bollinger(20,2).middle",
            "keltner(20,10,2).middle", "ichimoku(9,26,52)", "psar(0.02,0.2)")
text = lambda feature: feature.text


def bounds(feature):
    "Of the output, of the indicator, or none"
    name = feature.indicator.name
    found = [BOUNDS[key] for key in (feature.text, f"{name}.{feature.selected}", name) if key in BOUNDS
             and not (key == name and feature.column and name in ("donchian", "atr", "bollinger"))]
    return found[0] if found else (-np.inf, np.inf)


def market(kind, length, seed):
    "Candles of one kind, all columns, some of them wild at first"
    generator = np.random.default_rng(seed)
    wild = length // 2
    volume = generator.integers(0, 1_000, length) / 10.
    close = 100 * np.exp(np.cumsum(generator.normal(0, .01, length)))
    width = generator.random(length) * .01 * close
    still = np.arange(length) >= wild
    if kind == "frozen": close, width, volume = np.full(length, 100.1), 0. * close, 0. * volume
    if kind == "halted":
        close = np.where(still, close[wild], close)
        width = np.where(still, 0., width)
        volume = np.where(still, 0., volume)
    if kind == "the same candle":
        close = np.where(still, close[wild], close)
        width = np.where(still, .3, width)
        volume = np.where(still, 7., volume)
    if kind == "illiquid":
        close = 100 + .01 * np.where(generator.random(length) < .8, 0, generator.choice([-1, 1], length)).cumsum()
        width = 0. * width
        volume = np.where(generator.random(length) < .5, 0., volume)
    if kind == "bursty": volume = 10 ** generator.uniform(-8, 12, length) * (generator.random(length) < .9)
    if kind == "a burst, then nothing": volume = np.where(still, 0., 10 ** generator.uniform(-8, 12, length))
    if kind == "tiny prices": close, width, volume = 1e-10 * close, 1e-10 * width, 1e9 * volume
    if kind == "tiny sizes": volume = 10 ** generator.uniform(-323, -290, length)
    digits = 12 if kind == "tiny prices" else 2
    close, width = close.round(digits), width.round(digits)
    before = np.r_[close[0], close[:-1]]
    high = np.maximum(before, close) + width
    low = np.maximum(np.minimum(before, close) - width, 10. ** -digits)
    return np.column_stack([before, high, low, close, volume, close * volume, np.full(length, 3.),
                            volume * generator.random(length), np.full(length, 1e-4), close * 1.001,
                            3.6e6 * np.arange(length)])


@settings(max_examples=2, derandomize=True)
@given(st.integers(0, 2 ** 32 - 1), st.floats(0, 1))
@pytest.mark.parametrize("kind", KINDS)
def test_every_indicator_is_defined_and_forgets(kind, seed, share):
    for feature in ALL:
        warm_up = feature.warm_up
        candles = market(kind, 2 * warm_up + 120, seed)
        whole = feature.array(candles)
        start = 1 + int(share * (warm_up + 100))
        defined = whole[warm_up - 1:]
        assert np.isfinite(defined).all(), feature.text
        low, high = bounds(feature)
        assert low <= defined.min() and defined.max() <= high, (feature.text, defined.min(), defined.max())
        if feature.text in AVERAGES:
            assert candles[:, 2].min() * (1 - 1e-12) <= defined.min() and defined.max() <= candles[:,
                1].max() * (1 + 1e-12), feature.text
        for first in {1, start}:
            assert_array_equal(feature.array(candles[first:])[warm_up - 1:], whole[first + warm_up - 1:],
                               f"{feature.text} from {first}")


@pytest.mark.parametrize("kind", KINDS)
def test_what_ta_computes_is_defined_and_forgets(kind):
    for feature in THEIRS:
        warm_up = feature.warm_up
        candles = market(kind, 2 * warm_up + 120, 1)
        whole = feature.array(candles)
        defined = whole[warm_up - 1:]
        assert np.isfinite(defined).all(), feature.text
        low, high = bounds(feature)
        assert low - 1e-9 <= defined.min() and defined.max() <= high + 1e-9, (feature.text, defined.min(),
            defined.max())
        for first in (1, warm_up // 2, warm_up + 50):
            ours = feature.array(candles[first:])[warm_up - 1:]
            other = whole[first + warm_up - 1:]
            assert (np.abs(ours - other) <= 1e-9
                    * (np.abs(other) + np.abs(defined).max())).all(), f"{feature.text} from {first}"


@pytest.mark.parametrize("kind", ("halted", "bursty", "a burst, then nothing", "illiquid"))
def test_the_stream_says_the_same_there(kind):
    for feature in ALL:
        candles = market(kind, 400, 3)
        stream = feature.stream("1h")
        assert_array_equal(feature.array(candles), [stream.update(candle)[0] for candle in candles], feature.text)


NEUTRAL = {"rsi(14)": 50, "mfi(14)": 50, "stochastic_rsi(14,3,3).d": 50, "tsi(25,13)": 0, "adx(14)": 0,
           "adx(14).plus": 0, "macd(12,26,9).histogram": 0, "macd(12,26,9).signal": 0, "ppo(12,26,9)": 0, "trix(15)": 0,
           "ema(20).relative": 0, "kama(10,2,30).relative": 0, "psar(0.02,0.2).trend": 1, "psar(0.02,0.2).relative": 0,
           "atr(14)": 0, "keltner(20,10,2)": .5, "keltner(20,10,2).width": 0, "force_index(13)": 0,
           "force_index(13).relative": 0, "cmf(20)": 0, "obv_change(20).relative": 0, "vwap(14).relative": 0,
           "taker_share(1)": .5, "volume_ratio(20)": 1, "quote_volume(20)": 1, "pvo(26,12,9)": 0,
           "stc(50,23,10,3,3)": 50}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_halted_market_is_exactly_neutral(name):
    feature = parse(name)
    candles = market("halted", 2 * feature.warm_up + 200, 2)
    assert (feature.array(candles)[-20:] == NEUTRAL[name]).all()


prices = st.integers(1, 99).map(lambda ticks: round(.01 * ticks, 2))


@settings(max_examples=200)
@given(st.lists(st.tuples(prices, prices, prices, st.integers(1, 9)), min_size=25, max_size=60))
@example([(.37, 1.19, 1.89, 1), (.87, .93, 1.65, 9)] * 20)
def test_what_is_equal_in_ticks_is_equal_here(rows):
    "The formulas on whole ticks, where nothing is rounded"
    values = np.sort(np.array([row[:3] for row in rows]), axis=1)
    close = values[:, 1]
    volume = np.array([row[3] for row in rows], float)
    candles = np.column_stack([close, values[:, 2], values[:, 0], close, volume])
    ticks = [(100 * column).round() for column in (values[:, 2], values[:, 0], close)]
    window = 5
    typical = sum(ticks)
    money = typical * volume
    moved = np.sign(np.diff(typical, prepend=typical[0]))
    rise, fall = (np.array([np.where(moved == side, money, 0.)[max(0, t - window + 1):t + 1].sum()
                            for t in range(len(rows))]) for side in (1, -1))
    expected = np.where(rise + fall > 0, 100 * rise / np.maximum(rise + fall, 1e-300), 50.)
    np.testing.assert_allclose(parse("mfi(5)").array(candles)[window:], expected[window:], rtol=1e-9)
    up, down = np.diff(ticks[0]), -np.diff(ticks[1])
    assert_array_equal(parse("adx(1).plus").array(candles)[1:] > 0, (up > down) & (up > 0))
    assert_array_equal(parse("adx(1).minus").array(candles)[1:] > 0, (down > up) & (down > 0))
    if typical.std() == 0: assert (parse("cci(5)").array(candles)[window:] == 0).all()


def test_a_last_bit_is_no_rise():
    "`ta` counts it as one"
    candles = np.tile([[1.89, .37, 1.19, 1.], [1.65, .87, .93, 9.]], (20, 1))
    assert ta.volume.money_flow_index(*map(pd.Series, candles.T.copy()), 14).iloc[-1] > 89
    assert parse("mfi(14)").array(np.column_stack([candles[:, 2], candles]))[-1] == 50


amounts = st.floats(-1e12, 1e12, allow_nan=False)


@settings(max_examples=200)
@given(st.floats(-1e6, 1e6), st.floats(1e-8, 1e6), st.floats(1e-8, 1e6), amounts)
@example(1., 100., 100., 1_000.)
@example(1., 100., 100., 2_000.)
def test_an_account_that_has_lost_everything_sees_numbers(quantity, entry, price, fee):
    account = new_account(1_000.)
    positions = np.zeros(1, POSITION)
    stream = Observation(()).stream(1)
    apply_fill(account, positions, 0, quantity, entry, fee)
    mark(account, positions, np.array([price]))
    stream.push(np.ones((1, 5)))
    seen = stream.observe(account, positions, Limits())
    assert np.isfinite(seen).all()
    assert seen.shape == (1, len(PORTFOLIO))
    # a long position is long, also of an account that owes
    if abs(quantity) > 1e-6: assert np.sign(seen[0, 0]) == np.sign(quantity)
