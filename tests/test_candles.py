"Longer candles, several symbols and several timeframes, against the exchange's own candles and as properties"
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.errors import CandleError
from tradelab.events import COLUMNS, KNOWN
from tradelab.features.grammar import parse
from tradelab.features.observation import Observation
from tradelab.learn.agents import provenance
from tradelab.localnet.sources import Replay
from tradelab.market.candles import (
    OPTIONAL,
    align,
    as_of,
    check,
    data_hash,
    frame,
    matrix,
    resample,
    rows_as_of,
    timeframe_of,
    times,
)
from tradelab.market.filters import instruments_for
from tradelab.market.quality import check_quality
from tradelab.market.synthetic import ar1
from tradelab.policies import buy_and_hold
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import prepare
from tradelab.sim.stress import stress
from tradelab.sim.sweep import sweep
from tradelab.times import TIMEFRAMES, milliseconds, next_opening, parts, to_ms

HOUR = 3_600_000


def real(shared, name):
    table = pd.read_parquet(shared / "data" / f"{name}.parquet")
    return frame(table.timestamp, table[list(COLUMNS)])


# ---- longer candles

@pytest.mark.parametrize("short, long, full", [("SOLUSDT-15m", "SOLUSDT-1h", 18_961),
                                               *((f"{coin}USDT-1h", f"{coin}USDT-1d", None)
                                                 for coin in ("BTC", "ETH", "BNB", "XRP", "ADA", "LTC", "SOL",
                                                              "DOGE"))])
def test_resampling_gives_the_exchanges_own_candles_to_the_bit(shared, short, long, full):
    parts, exchange = real(shared, short), real(shared, long)
    made = resample(parts, long.split("-")[1])
    assert full is None or len(made) == full
    assert len(made) > 700
    assert made.index.isin(exchange.index).all()
    pd.testing.assert_frame_equal(made, exchange.loc[made.index], check_freq=False, check_exact=True)


def test_real_holes_are_dropped_or_marked_and_never_filled(shared):
    hours = real(shared, "BTCUSDT-1h")
    whole = resample(hours, "1d")
    marked = resample(hours, "1d", partial=True)
    assert np.array_equal(times(marked[marked.complete == 1]), times(whole))
    assert (marked.complete * 24).sum() == len(hours)
    assert marked.complete["2018-02-08"] == 1 / 24
    assert marked.complete["2018-02-09"] == 14 / 24 # the outage of 33 hours
    with pytest.raises(CandleError, match="BTC: the candle of 2017-08-17 00:00 UTC is made of 83% of its parts: drop "
                       "partial candles"):
        check(marked, "1d", "BTC")
    with pytest.raises(CandleError, match="gap of"): check(whole, "1d")


def test_resampling_twice_is_resampling_once(shared):
    quarters = real(shared, "SOLUSDT-15m")["2021-09-30":]
    assert data_hash(resample(resample(quarters, "1h"), "1d")) == data_hash(resample(quarters, "1d"))


@settings(max_examples=60)
@given(st.sampled_from([("1m", "5m"), ("15m", "1h"), ("1h", "4h"), ("1h", "1d"), ("8h", "1d")]), st.integers(2, 120),
       st.integers(0, 30), st.sets(st.integers(0, 119)), st.integers(0, 9), st.data())
def test_every_bar_is_its_own_parts(frames, length, offset, missing, decimals, data):
    short, long = frames
    market = ar1(length, seed=3, timeframe=short, start=to_ms("2022-01-01") + offset * milliseconds(short))
    market = market.assign(volume=market.volume.round(decimals), trades=np.arange(float(length)),
                           quote_volume=market.volume * market.close, taker_buy_volume=0.)
    market = market.drop(market.index[[i for i in missing if i < length]])
    if market.empty: return
    made = resample(market, long, short)
    marked = resample(market, long, short, partial=True)
    groups = market.groupby(times(market) // milliseconds(long))
    assert len(marked) == len(groups)
    assert times(made).tolist() == [bar * milliseconds(long) for bar, rows in groups if len(rows) == parts(short, long)]
    for (bar, rows), (opened, row) in zip(groups, marked.iterrows(), strict=True):
        assert to_ms(opened) == bar * milliseconds(long)
        assert row.complete == len(rows) / parts(short, long)
        assert (row.open, row.high, row.low, row.close) == (rows.open.iloc[0], rows.high.max(), rows.low.min(),
                                                            rows.close.iloc[-1])
        assert row.trades == rows.trades.sum()
        assert np.isclose(row.quote_volume, rows.quote_volume.sum(), rtol=1e-14)
        assert abs(row.volume - rows.volume.sum()) <= 1e-12 * row.volume
        assert (decimals > 8 or row.volume == round(row.volume, decimals))
    cut = data.draw(st.integers(0, len(market))) # what comes later changes no bar that is complete
    if cut:
        pd.testing.assert_frame_equal(resample(market[:cut], long, short),
                                      made[:len(resample(market[:cut], long, short))], check_exact=True)


def test_what_cannot_be_resampled():
    market = ar1(48, seed=1)
    with pytest.raises(ValueError, match="15m is not a multiple of 1h: 1h, 2h, 4h, 6h, 8h, 12h, 1d, 3d, 1w can "
                       "be made of it"):
        resample(market, "15m")
    with pytest.raises(ValueError, match="12h is not a multiple of 8h"): resample(resample(market, "8h"), "12h")
    with pytest.raises(ValueError, match="unknown timeframe '2w'"): resample(market, "2w")
    with pytest.raises(CandleError, match="BTC: the smallest of 3 steps is 1260000 ms, no timeframe is that long"):
        timeframe_of(market.set_index(market.index[0] + pd.to_timedelta(np.arange(48) * 21, unit="min"))[:4], "BTC")
    with pytest.raises(CandleError, match="is not on the grid of 1h"): resample(market.shift(1, freq="min"), "4h")
    with pytest.raises(CandleError, match="high is .* below another price"): resample(market.assign(high=1.), "4h")
    with pytest.raises(CandleError, match="close is nan"): resample(market.assign(close=np.nan), "4h")


def test_a_timeframe_makes_itself_and_all_its_multiples():
    market = ar1(2 * 1440, seed=1, timeframe="1m")
    for timeframe, step in TIMEFRAMES.items():
        if step > TIMEFRAMES["1d"]: continue
        made = resample(market, timeframe)
        assert len(made) == 2 * TIMEFRAMES["1d"] // step
        assert made.high.max() == market.high.max()
        assert np.isclose(made.volume.sum(), market.volume.sum())
    assert resample(market, "1m").equals(market)


# ---- as of the close

@settings(max_examples=60)
@given(st.sampled_from([("1h", "4h"), ("15m", "1h"), ("1h", "1d"), ("4h", "1h"), ("1h", "1h"), ("8h", "12h")]),
       st.integers(1, 60), st.integers(0, 40), st.sets(st.integers(0, 59)))
def test_a_value_is_known_only_once_its_candle_has_closed(frames, length, offset, missing):
    short, long = (milliseconds(each) for each in frames)
    opens = (offset + np.arange(length)) * short
    others = np.array([i * long for i in range(60) if i not in missing], "int64")
    for open_time, row in zip(opens.tolist(), rows_as_of(opens, frames[0], others, frames[1]).tolist(), strict=True):
        closed = [i for i, other in enumerate(others.tolist()) if other + long <= open_time + short < other + 2 * long]
        assert row == (closed[0] if closed else -1)


def test_the_future_of_a_longer_candle_is_not_seen():
    hours = ar1(400, seed=2)
    before = as_of(hours, resample(hours, "4h"), "4h")
    for cut in (37, 200, 399):
        changed = hours.copy()
        changed.iloc[cut:] *= 1.5
        after = as_of(changed, resample(changed, "4h"), "4h")
        pd.testing.assert_frame_equal(after[:cut], before[:cut], check_exact=True)
        assert not after[cut:].equals(before[cut:]) or cut == 399 # the last hour completes no candle that is looked at
    naive = resample(hours, "4h").close.reindex(hours.index, method="ffill")     # the mistake: joined on the open time
    assert (naive[3:] != before.close[3:]).mean() > .7


def test_features_of_another_length_come_as_of_their_close():
    hours = ar1(100, seed=2)
    slow = resample(hours, "4h").close.rolling(3).mean().to_frame("slow")
    seen = as_of(hours, slow, "4h").slow
    assert seen[:11].isna().all()
    assert np.isclose(seen.iloc[11], hours.close.iloc[[3, 7, 11]].mean(), rtol=1e-14)


# ---- several symbols

def test_real_symbols_with_different_lives(shared):
    frames = {coin: real(shared, f"{coin}USDT-perp-1h") for coin in ("BTC", "ETH", "BNB", "XRP")}
    market = align(frames, "1h")
    assert market.symbols == tuple(frames)
    assert market.candles.shape == (33_692, 4, 5)
    assert market.lives.candles.tolist() == [33_692, 31_782, 29_981, 30_821]
    for symbol, each in frames.items():
        pd.testing.assert_frame_equal(market.frame(symbol), each, check_freq=False, check_exact=True)
    assert np.isnan(market.candles[~market.listed]).all()
    assert np.isfinite(market.candles[market.listed]).all()


def test_an_outage_of_all_stays_a_row_without_candles(shared):
    frames = {coin: real(shared, f"{coin}USDT-1h") for coin in ("BTC", "ETH")}
    with pytest.raises(CandleError, match="BTC: gap of 6 candles after 2017-09-06 16:00 UTC"): align(frames, "1h")
    market = align(frames, "1h", gaps=True)
    assert (np.diff(market.times) == HOUR).all()
    assert (~market.listed).all(axis=1).sum() == 127


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(2, 50)), min_size=1, max_size=4))
def test_alignment_keeps_every_candle_and_makes_none(lives):
    frames = {f"S{n}": ar1(length, seed=n, start=start * HOUR) for n, (start, length) in enumerate(lives)}
    market = align(frames, "1h")
    assert market.listed.sum() == sum(map(len, frames.values()))
    assert market.times[0] == min(times(each)[0] for each in frames.values())
    assert all(data_hash(market.frame(symbol)) == data_hash(each) for symbol, each in frames.items())


# ---- the schema

def test_optional_columns_survive_the_way():
    market = ar1(48, seed=1)
    rich = frame(times(market), market, trades=np.arange(48), taker_buy_volume=market.volume / 2,
                 quote_volume=market.volume * market.close)
    assert check(rich, "1h").columns.tolist() == [*COLUMNS, *OPTIONAL]
    day = resample(rich.assign(trades=rich.trades.where(rich.index.day == 2)), "1d")
    assert np.isnan(day.trades.iloc[0])
    assert day.trades.iloc[1] == sum(range(24, 48))
    with pytest.raises(CandleError, match="BTC: taker_buy_volume is .* more than the volume of its candle"):
        check(rich.assign(taker_buy_volume=rich.volume * 2), "1h", "BTC")


@pytest.mark.parametrize("table, message",
                         [(None, "XRP: a NoneType is not a table of candles: give a DataFrame with columns open, high, "
                           "low, close, volume"), ([1, 2], "a list is not a table"),
                           (ar1(9).close, "a Series is not a table"),
                          (pd.concat([ar1(9), ar1(9)[["high"]]], axis=1), "XRP: column 'high' is there more than once: "
                           "keep the right one")])
def test_what_is_no_table_of_candles(table, message):
    with pytest.raises(CandleError, match=message): check(table, "1h", "XRP")


# ---- grids that do not begin with the epoch

@pytest.mark.parametrize("timeframe", TIMEFRAMES)
def test_every_timeframe_is_its_own_grid(timeframe):
    """Weeks begin on a Monday, three days where Binance's first ones did (2017-08-17); both are made of days, and seen
    as of their close"""
    step = milliseconds(timeframe)
    days = ar1(40, timeframe="1d", start="2017-08-01")
    candles = ar1(30, timeframe=timeframe, start=next_opening(to_ms("2017-08-01"), step))
    check(candles, timeframe)
    with pytest.raises(CandleError, match="is not on the grid"):
        check(candles.set_axis(candles.index + pd.Timedelta(minutes=.5)), timeframe)
    if step < milliseconds("1d"): return
    longer = resample(days, timeframe)
    first = {"1d": "2017-08-01", "3d": "2017-08-02", "1w": "2017-08-07"}[timeframe]
    assert longer.index[0] == pd.Timestamp(first, tz="UTC")
    assert pd.Timestamp("2017-08-17", tz="UTC") in resample(days, "3d").index
    rows = rows_as_of(times(days), "1d", times(longer), timeframe)
    for day, row in zip(days.index, rows):
        closed = longer.index[longer.index + pd.Timedelta(step, "ms") <= day + pd.Timedelta(days=1)]
        assert (row == -1 and not len(closed)) or longer.index[row] == closed[-1]


def test_a_feature_of_a_week_is_that_of_the_weekly_candles():
    days = ar1(200, timeframe="1d", start="2021-01-01")
    known = matrix(days, KNOWN)[1][:, 0]
    for timeframe in ("3d", "1w"):
        longer = resample(days, timeframe)
        rows = rows_as_of(times(days), "1d", times(longer), timeframe)
        expected = np.where(rows >= 0, longer["close"].pct_change().to_numpy()[rows], np.nan)
        array = parse(f"return(1)@{timeframe}").array(known)
        np.testing.assert_allclose(array[14:], expected[14:], rtol=1e-12)
        stream = parse(f"return(1)@{timeframe}").stream("1d")
        assert np.array_equal([stream.update(candle)[0] for candle in known], array, equal_nan=True)


# ---- a table whose times are a column, as a file gives it

@pytest.mark.parametrize("give",
                         [lambda good: good.reset_index(),
                          lambda good: good.reset_index().assign(open_time=times(good)),
                          lambda good: good.tz_localize(None),
                          lambda good: good.reset_index(drop=True).assign(timestamp=times(good))],
                         ids=["open_time", "milliseconds", "without a zone", "timestamp"])
def test_every_door_takes_the_frame_that_a_file_gives_and_reads_the_same(give):
    good = ar1(300, seed=3)
    raw = give(good)
    look = Observation(["return(1)", "return(5)"])
    assert data_hash(raw) == data_hash(good)
    assert data_hash({"ETH/USDT:USDT": raw}) == data_hash({"ETH/USDT:USDT": good})
    assert provenance(raw)["data_hash"] == provenance(good)["data_hash"]
    assert provenance(raw)["span"] == provenance(good)["span"]
    assert look.fit(raw).sha256 == look.fit(good).sha256
    assert np.array_equal(prepare(raw, look).features, prepare(good, look).features, equal_nan=True)
    assert np.array_equal(Replay({"BTC/USDT:USDT": raw}).times, Replay({"BTC/USDT:USDT": good}).times)
    assert len(check_quality(raw, "1h").findings) == len(check_quality(good, "1h").findings)
    assert instruments_for(raw) == instruments_for(good)
    targets = pd.Series(np.where(np.arange(300) % 7 < 3, 1., 0.), raw.index)
    assert backtest(targets, raw, baselines=()).equity.tolist() == backtest(targets.set_axis(good.index), good,
        baselines=()).equity.tolist()
    tables = [sweep(lambda parameters, columns: columns[:, 0] * parameters[0], each, pd.DataFrame({"n": [.5, 1.]}),
        pd.DataFrame({"x": targets.to_numpy()}, each.index), progress=False).table() for each in (raw, good)]
    pd.testing.assert_frame_equal(*tables)
    assert stress(buy_and_hold(), raw).table().equals(stress(buy_and_hold(), good).table())


def test_numbered_targets_of_another_length_are_nobodys():
    raw = ar1(300, seed=3).reset_index()
    with pytest.raises(ValueError, match="no target stands at a candle"): backtest(pd.Series(1., raw.index[:-1]), raw)
