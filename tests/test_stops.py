"Stops against hand-computed exits, a second implementation, TA-Lib, properties, and the minutes inside real hours"
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import talib
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.account import POSITION, age, apply_fill, new_account
from tradelab.features.grammar import parse
from tradelab.features.loops import columns_of
from tradelab.instruments import BITCOIN
from tradelab.market.synthetic import realistic
from tradelab.risk.limits import Gate
from tradelab.risk.market_state import warm_up
from tradelab.risk.stops import enter, exit_price, levels, next_atr, simulate, touched, track
from tradelab.settings import NO_STOPS, Limits, Reason, Stops

FILE = next((place / "shared/data/BTCUSD-bitfinex-1m-2019.parquet" for place in Path(__file__).resolve().parents
             if (place / "shared/data/BTCUSD-bitfinex-1m-2019.parquet").exists()), None)
COLUMNS = ["open", "high", "low", "close", "volume"]
fraction = st.sampled_from((0., .005, .02))
ranges = st.sampled_from((0., .5, 2.))
ages = st.sampled_from((0, 1, 3, 10))


@st.composite
def rules(draw, additive=False):
    fixed = draw(st.booleans()) and not additive
    trailing = draw(st.booleans())
    return Stops(draw(fraction), draw(fraction), draw(fraction) if fixed else 0., draw(ranges), draw(ranges),
                 draw(ranges) if trailing and not fixed else 0., draw(st.sampled_from((3, 14))), draw(ages))


@st.composite
def markets(draw, length=60):
    "Candles on a grid of 1/64, so that mirrored and doubled prices are exact; one in eight opens with a gap"
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    moves = (random.normal(0, 1.5, (length, 4)) * (1 + 4 * (random.random((length, 1)) < .125))
             * (random.random((length, 4)) < [.4, 1, 1, 1]))
    path = 1_000 + np.cumsum(moves.ravel()).reshape(length, 4)
    path = np.rint(path * 64) / 64
    return np.stack([path[:, 0], path.max(1), path.min(1), path[:, 3], np.ones(length)], axis=1)


def second(candles, entries, stops, widths):
    "Plain Python: the price goes from the open to the worst price to the best one, and meets what stands in its way"
    exits = {}
    held = None
    before = None
    ranges_ = []

    def away(start, fixed, atrs): return atrs * held["atr"] if atrs else fixed * start if fixed else None

    for t, (opened, high, low, close, _) in enumerate(candles.tolist()):
        if held is None and entries[t]:
            average = None
            for number, one in enumerate(ranges_):
                average = one if number == 0 else average + (one - average) / stops.atr_period
            held = dict(side=1 if entries[t] > 0 else -1, entry=opened, best=opened, atr=average, since=t,
                        width=widths[t])
        if held is not None:
            side, width = held["side"], held["width"]
            stop = away(held["entry"], width * stops.stop_loss, width * stops.stop_atr)
            target = away(held["entry"], stops.take_profit, stops.target_atr)
            trail = away(held["best"], width * stops.trailing_stop, width * stops.trailing_atr)
            below = [(held["entry"] - side * stop, Reason.STOP_LOSS)] if stop is not None else []
            below += [(held["best"] - side * trail, Reason.TRAILING_STOP)] if trail is not None else []
            above = [(held["entry"] + side * target, Reason.TAKE_PROFIT)] if target is not None else []
            below.sort(key=lambda pair: (-side * pair[0], -pair[1]))
            found = None
            for number, price in enumerate((opened, low if side > 0 else high, high if side > 0 else low)):
                met = ([(level, code) for level, code in below if side * price <= side * level]
                       or [(level, code) for level, code in above if side * price >= side * level])
                if met: found = (opened if number == 0 else met[0][0], int(met[0][1]))
                elif number == 0 and stops.max_age and t - held["since"] >= stops.max_age:
                    found = (opened, int(Reason.TIME_STOP))
                if found: break
            held["best"] = max(held["best"], high) if side > 0 else min(held["best"], low)
            if found: exits[t], held = found, None
        ranges_.append(high - low if t == 0 else max(high - low, abs(high - before), abs(low - before)))
        before = close
    return exits


def scattered(length, seed):
    "Entries on both sides, none at the first candle"
    random = np.random.default_rng(seed)
    entries = np.where(random.random(length) < .3, random.choice([1., -1.], length), 0.)
    entries[0] = 0.
    return entries, random.choice([.5, 1., 1.5], length)


@settings(max_examples=300)
@given(markets(), rules(), st.integers(0, 10**6))
def test_against_plain_python(candles, stops, seed):
    entries, widths = scattered(len(candles), seed)
    prices, codes, _ = simulate(candles, entries, Limits(stops=stops).row(), widths)
    expected = second(candles, entries, stops, widths)
    assert {t: int(codes[t]) for t in np.flatnonzero(codes)} == {t: code for t, (_, code) in expected.items()}
    np.testing.assert_allclose([prices[t] for t in expected], [price for price, _ in expected.values()], rtol=1e-12)
    assert np.array_equal(np.isnan(prices), codes == 0)


@pytest.mark.parametrize("candle, stops, side, expected", [
    ((100, 105, 97, 99), Stops(), 1, ("STOP_LOSS", 98)), # stop and target in one candle: the stop
    ((100, 105, 99, 99), Stops(), 1, ("TAKE_PROFIT", 104)), ((100, 104, 99, 99), Stops(), 1, ("TAKE_PROFIT", 104)),
    ((95, 105, 94, 99), Stops(), 1, ("STOP_LOSS", 95)), # a gap through the stop fills at the open
    ((107, 108, 90, 99), Stops(), 1, ("TAKE_PROFIT", 107)), # and so does one beyond the target, whatever comes later
    ((98, 99, 97, 98), Stops(), 1, ("STOP_LOSS", 98)),                                  # touched is enough
    ((100, 103, 97, 99), Stops(), -1, ("STOP_LOSS", 102)),
    ((107, 108, 100, 101), Stops(), -1, ("STOP_LOSS", 107)),
    ((100, 101, 95, 99), Stops(), -1, ("TAKE_PROFIT", 96)),
    ((100, 101, 98.5, 99), Stops(trailing_stop=.01), 1, ("TRAILING_STOP", 99)),         # the nearer of two
    ((100, 100, 90, 91), Stops(max_age=1), 1, ("TIME_STOP", 100)), # its time is over at the open, before the stop
    ((95, 100, 90, 91), Stops(stop_loss=0., take_profit=0., stop_atr=1.5), 1, ("STOP_LOSS", 95)),
    ((99, 100, 90, 91), Stops(stop_loss=0., take_profit=0., stop_atr=1.5), 1, ("STOP_LOSS", 97)),
    ((100, 100.5, 99.5, 100), Stops(), 1, None), ((100, 200, 1, 100), NO_STOPS, 1, None)])
def test_by_hand(candle, stops, side, expected):
    "Entered at 100 after a candle of range 2, one quiet candle, and then this one"
    candles = np.array([(100, 101, 99, 100, 1), (100, 100, 100, 100, 1), (*candle, 1)], float)
    prices, codes, _ = simulate(candles, np.array([0., side, 0.]), Limits(stops=stops).row())
    assert not codes[:2].any()
    assert (codes[2], np.nan_to_num(prices[2])) == ((Reason[expected[0]], expected[1]) if expected else (0, 0.))


def test_the_average_true_range_is_the_features_and_talibs():
    "Over candles with a gap before each"
    candles = realistic(1_500, seed=9)[COLUMNS].to_numpy(copy=True)
    candles[:, :4] *= np.exp(np.random.default_rng(9).normal(0, .01, (1_500, 1)))
    def followed(candles, period):
        atr = np.nan
        before = np.nan
        values = []
        for _, high, low, close, _ in candles:
            atr = next_atr(atr, high, low, before, float(period))
            before = close
            values.append(atr)
        return np.array(values)
    for period in (3, 14):
        values = followed(candles, period)
        memory = warm_up(Limits(stops=Stops(stop_loss=0., stop_atr=2., atr_period=period)))
        assert memory == 40 * period
        assert np.array_equal(values[memory:], parse(f"atr({period})").over(columns_of(candles))[memory:])
        # where it began is forgotten
        assert np.array_equal(values[300 + memory:], followed(candles[300:], period)[memory:])
        np.testing.assert_allclose(values[memory:], talib.ATR(*(candles[:, k].copy() for k in (1, 2, 3)),
                                                              period)[memory:], rtol=1e-12)


@settings(max_examples=100)
@given(markets(), rules(), st.integers(0, 10**6))
def test_stream_and_array_have_the_same_bits(candles, stops, seed):
    row, (entries, widths) = Limits(stops=stops).row(), scattered(len(candles), seed)
    prices, codes, trail = simulate(candles, entries, row, widths)
    account = new_account(1.)
    positions = np.zeros(1, POSITION)
    atr = np.nan
    before = np.nan
    for t, (opened, high, low, close, _) in enumerate(candles):
        if positions[0]["quantity"] == 0 and entries[t]:
            apply_fill(account, positions, 0, entries[t], opened, 0.)
            enter(positions[0], atr, widths[t])
        if positions[0]["quantity"] != 0:
            code, price = exit_price(positions[0], opened, high, low, row)
            assert code == codes[t]
            assert np.array_equal([price, levels(positions[0], row)[2]], [prices[t], trail[t]], equal_nan=True)
            track(positions[0], high, low)
            age(positions)
            if code: apply_fill(account, positions, 0, -positions[0]["quantity"], price, 0.)
        atr = next_atr(atr, high, low, before, row["atr_period"])
        before = close


@settings(max_examples=150)
@given(markets(), rules(), st.integers(0, 10**6), st.integers(2, 58))
def test_what_always_holds(candles, stops, seed, cut):
    row, (entries, widths) = Limits(stops=stops).row(), scattered(len(candles), seed)
    prices, codes, trail = simulate(candles, entries, row, widths)
    out = np.flatnonzero(codes)
    assert ((prices[out] >= candles[out, 2]) & (prices[out] <= candles[out, 1])).all() # it was traded there
    side, since = 0., 0
    for t in range(len(candles)):
        if side == 0. and entries[t]: side, since = entries[t], t
        # never loosens
        if side and t > since and not np.isnan(trail[t - 1]): assert side * (trail[t] - trail[t - 1]) >= 0
        # never better than the open
        if codes[t] and codes[t] != Reason.TAKE_PROFIT: assert side * (prices[t] - candles[t, 0]) <= 0
        if codes[t] == Reason.TAKE_PROFIT: assert side * (prices[t] - candles[t, 0]) >= 0
        if codes[t]: side = 0.
    future = candles.copy()
    future[cut:, :4] *= 1.25
    for now, then in zip(simulate(future, entries, row, widths), (prices, codes, trail)):
        assert np.array_equal(now[:cut], then[:cut], equal_nan=True)
    doubled = simulate(candles * [2, 2, 2, 2, 1], entries, row, widths)
    assert np.array_equal(doubled[1], codes)
    assert np.array_equal(doubled[0], 2 * prices, equal_nan=True)


@settings(max_examples=150)
@given(markets(), rules(additive=True), st.sampled_from((1., -1.)), st.sampled_from((.5, 1., 1.5)))
def test_long_and_short_are_mirror_images(candles, stops, side, width):
    """Reflected at the entry price; a trailing stop in percent is left out, since a percent of the reflected best price
    is another distance"""
    entries, entry = np.zeros(len(candles)), 20
    entries[entry] = side
    reflected = 2 * candles[entry, 0] - candles[:, [0, 2, 1, 3, 4]]
    one, two = (simulate(each, sign * entries, Limits(stops=stops).row(), width) for each,
                sign in ((candles, 1), (reflected, -1)))
    assert np.array_equal(one[1], two[1])
    np.testing.assert_allclose(2 * candles[entry, 0] - one[0], two[0], rtol=1e-12)
    np.testing.assert_allclose(2 * candles[entry, 0] - one[2], two[2], rtol=1e-12)


@settings(max_examples=100)
@given(markets(length=12), rules(), st.sampled_from((1., -1.)))
def test_a_close_and_an_exchange_see_the_same_touch(candles, stops, side):
    "What the gate asks at a close and what an order at the exchange meets differ only where the open decides"
    row = Limits(stops=stops).row()
    positions = np.zeros(1, POSITION)
    apply_fill(new_account(1.), positions, 0, side, candles[0, 0], 0.)
    enter(positions[0], 2., 1.)
    for opened, high, low, _, _ in candles:
        (seen, at), (met, price) = (touched(positions[0], high, low, row), exit_price(positions[0], opened, high, low,
            row))
        assert (seen > 0) == (met > 0)
        assert (met == 0 or price == opened or (seen, at) == (met, price))
        track(positions[0], high, low)
        age(positions)


def test_the_gate_takes_the_width_that_a_driver_has_set():
    def code(width, low):
        gate = Gate(Limits(), [BITCOIN])
        account = new_account(10_000.)
        positions = np.zeros(1, POSITION)
        gate.market["width"] = width
        apply_fill(account, positions, 0, 1., 100., 0.)
        return gate.decide(10**12, np.array([[100., 100.5, low, 99., 1e6]]), np.ones(1), account,
                           positions)[0]["reason"]
    assert code(1., 97.9) == Reason.STOP_LOSS != code(2., 97.9)
    assert code(2., 95.9) == Reason.STOP_LOSS


def test_a_stop_in_atrs_widens_with_the_regime():
    candles = realistic(3_000, seed=3)[COLUMNS].to_numpy()
    rules = Limits(stops=Stops(stop_loss=0., take_profit=0., stop_atr=1.)).row()
    entries = np.where(np.arange(3_000) % 20 == 19, 1., 0.)
    narrow, wide = (np.count_nonzero(simulate(candles, entries, rules, width)[1]) for width in (1., 3.))
    assert narrow > wide > 0


@pytest.mark.skipif(FILE is None, reason="the real minutes are not here")
def test_how_often_the_worst_first_is_wrong_in_real_hours():
    """Stop and target of half a percent on Bitcoin's minutes of 2019: an hour says stop where the minutes say target,
    never the other way, and its mean exit is the worse one"""
    raw = pd.read_parquet(FILE)
    raw = raw.set_index(pd.to_datetime(raw.timestamp, unit="ms", utc=True))[COLUMNS]["2019-05":"2019-07"]
    hours = raw.resample("1h").agg({"open": "first", "high": "max", "low": "min", "close": "last",
                                    "volume": "sum"}).dropna()
    fine = raw.to_numpy()
    coarse = hours.to_numpy()
    starts = np.searchsorted(raw.index, hours.index)
    def left(candles, side, row):
        prices, codes, _ = simulate(candles, side * np.eye(1, len(candles))[0], row)
        k = np.argmax(codes > 0)
        return k, Reason(codes[k]).name, side * (prices[k] / candles[0, 0] - 1)
    for stops, most in ((Stops(), .001), (Stops(.005, .005), .1)):
        row = Limits(stops=stops).row()
        pairs = []
        results = []
        for i in range(0, len(coarse) - 240, 4):
            for side in (1., -1.):
                k, code, hourly = left(coarse[i:i + 240], side, row)
                if code == "ACCEPTED": continue
                _, true, exact = left(fine[starts[i]:starts[i + k + 1]], side, row)
                pairs.append((code, true))
                results.append((hourly, exact))
        wrong = [pair for pair in pairs if pair[0] != pair[1]]
        assert set(wrong) <= {("STOP_LOSS", "TAKE_PROFIT")}
        assert len(wrong) <= most * len(pairs)
        assert len(pairs) > 900
    hourly, exact = np.mean(results, axis=0)
    assert len(wrong) > 20
    assert hourly < exact
