"The store with real processes: who wins, what is asked for, who reads while another writes"
import json
import logging
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.errors import CandleError
from tradelab.events import COLUMNS
from tradelab.market.candles import OPTIONAL, data_hash, frame, times
from tradelab.market.store import (
    REVISABLE,
    DamagedMonthError,
    Store,
    absent,
    footer,
    holes,
    merge,
    months,
    spans,
    to_bytes,
)
from tradelab.market.store import from_file as month_of
from tradelab.market.synthetic import ar1
from tradelab.times import milliseconds, to_ms

SERIES, HOUR = ("okx", "BTC/USDT:USDT", "1h"), 3_600_000
FIRST = to_ms("2022-01-01")
MARKET = ar1(24 * 80, seed=1, start=FIRST)


def python(code, *arguments):
    "A program in a process of its own"
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


class Source:
    "An exchange that counts what it is asked for"
    def __init__(self, candles): self.candles, self.requests = candles, []
    def __call__(self, start, end):
        self.requests.append((start, end))
        return self.candles[(times(self.candles) >= start) & (times(self.candles) < end)]
    @property
    def rows(self): return sum((end - start) // HOUR for start, end in self.requests)


# ---- range, index, columns

@settings(max_examples=25)
@given(st.integers(-50, 2000), st.integers(-50, 2000), st.booleans(), st.booleans())
def test_a_range_is_read_to_the_candle(tmp_path_factory, start, end, open_start, open_end):
    store = Store(tmp_path_factory.getbasetemp() / "one")
    if not store.series(*SERIES).exists(): store.write(*SERIES, MARKET)
    bounds = None if open_start else FIRST + start * HOUR, None if open_end else FIRST + end * HOUR + 1
    opens, read = times(MARKET), store.read(*SERIES, *bounds)
    inside = ((opens >= (opens[0] if bounds[0] is None else bounds[0]))
              & (opens < (opens[-1] + 1 if bounds[1] is None else bounds[1])))
    pd.testing.assert_frame_equal(read, MARKET[inside], check_exact=True, check_freq=False)


def test_the_index_agrees_with_the_files(tmp_path):
    store = Store(tmp_path)
    assert store.held().columns.tolist() == ["source", "symbol", "timeframe", "first", "last", "candles", "months",
                                             "missing", "bytes"]
    store.write(*SERIES, MARKET[:100])
    store.write(*SERIES, MARKET[150:])
    store.write("okx", "ETH/USDT:USDT", "1h", MARKET[7:9])
    one, other = store.held().itertuples(index=False)
    assert one[:8] == (*SERIES, MARKET.index[0], MARKET.index[-1], len(MARKET) - 50, 3, 50)
    assert other[5:8] == (2, 1, 0)
    assert one.bytes == sum(path.stat().st_size for path in months(store.series(*SERIES)))
    assert all(footer(path)[2] == len(pd.read_parquet(path)) for path in months(store.series(*SERIES)))


def test_a_month_that_other_tools_have_written_is_read(tmp_path):
    store = Store(tmp_path)
    folder = Store(tmp_path).series(*SERIES)
    folder.mkdir(parents=True)
    MARKET.loc["2022-01"].to_parquet(folder / "2022-01.parquet")                    # pandas puts the times last
    assert data_hash(store.read(*SERIES)) == data_hash(MARKET.loc["2022-01"])
    assert store.held().candles.tolist() == [31 * 24]


@pytest.mark.parametrize("spoil", [lambda content: content[:700], lambda content: b"", lambda content: b"<html>",
                                   lambda content: content[:200] + bytes(100) + content[300:]])
@pytest.mark.parametrize("call", [lambda store: store.read(*SERIES), lambda store: store.held(),
                                  lambda store: store.write(*SERIES, MARKET[800:900])])
def test_a_spoiled_month_is_put_aside_and_asked_for_again(tmp_path, caplog, spoil, call):
    store = Store(tmp_path)
    path = store.write(*SERIES, MARKET).files[1]
    spoiled = spoil(path.read_bytes())
    path.write_bytes(spoiled)
    with caplog.at_level(logging.WARNING): call(store)
    if path.exists() and path.read_bytes() == spoiled: store.read(*SERIES)      # an index reads no candle
    assert len(store.read(*SERIES, end="2022-02-01")) == 31 * 24                # the other months are whole
    assert [each.read_bytes() for each in path.parent.glob("*.damaged")] == [spoiled]
    assert any("a damaged month was put aside" in record.getMessage() for record in caplog.records)
    filled = store.fill(*SERIES, times(MARKET)[0], times(MARKET)[-1] + HOUR, lambda start,
                        end: MARKET[(times(MARKET) >= start) & (times(MARKET) < end)])
    assert filled.asked
    assert not filled.missing
    assert data_hash(filled.candles) == data_hash(MARKET)


def test_no_flipped_bit_gives_other_candles(tmp_path):
    "Of 3,000 single bits a third gave other prices before a month kept its proof"
    path = tmp_path / "2022-01.parquet"
    month = MARKET.loc["2022-01"]
    content, random = to_bytes(month), np.random.default_rng(0)
    for place in random.integers(0, 8 * len(content), 1_000):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try: pd.testing.assert_frame_equal(month_of(path), month, check_freq=False)
        except DamagedMonthError: continue


def test_every_column_comes_back(tmp_path):
    store = Store(tmp_path)
    rich = frame(times(MARKET), MARKET, trades=np.arange(len(MARKET)), quote_volume=MARKET.volume * MARKET.close,
                 taker_buy_volume=MARKET.volume / 3)
    store.write(*SERIES, rich, now=times(MARKET)[-1] + HOUR)
    back = store.read(*SERIES)
    pd.testing.assert_frame_equal(back, rich, check_exact=True, check_freq=False)
    assert back.columns.tolist() == [*COLUMNS, *OPTIONAL]
    assert "seen_time" in store.rows(*SERIES)
    store.write(*SERIES, MARKET, now=times(MARKET)[-1] + 2 * HOUR)              # the same numbers from a poorer answer
    pd.testing.assert_frame_equal(store.read(*SERIES), rich, check_exact=True, check_freq=False)


# ---- which row wins

def test_the_later_answer_wins_whoever_comes_first(tmp_path, caplog):
    end = int(times(MARKET)[99]) + HOUR
    early = MARKET[:100]
    late = MARKET[:100].assign(close=MARKET.close[:100] - .1, low=MARKET.low[:100] - .1)
    for order in ((early, late), (late, early)):
        store = Store(tmp_path / ("forth" if order[0] is early else "back"))
        with caplog.at_level(logging.WARNING):
            written = [store.write(*SERIES, each, now=end + (1 if each is early else 2)) for each in order]
        assert written[0].added == 100
        assert written[1].added == written[1].same == 0
        assert set(written[1].conflicts.verdict) == {"revised" if order[1] is late else "outdated"}
        assert written[1].revised == (100 if order[1] is late else 0)
        assert data_hash(store.read(*SERIES)) == data_hash(late)
    said = [record.getMessage() for record in caplog.records if "candles came with other numbers"
            in record.getMessage()]
    assert len(said) == 2
    assert written[1].conflicts.columns.tolist() == [*(f"{column}_held" for column in COLUMNS),
                                                     *(f"{column}_new" for column in COLUMNS), "verdict"]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(1, 3), st.integers(0, 5)), min_size=1,
                max_size=6))
def test_the_order_of_arrival_makes_no_difference_where_times_are_said(writes):
    # one answer for one time
    answers = [(MARKET[start:start + length] * factor).assign(seen_time=10 * seen + factor) for start, length, factor,
               seen in writes]
    forth = back = answers[0][:0]
    for answer in answers: forth = merge(forth, answer)
    for answer in answers[::-1]: back = merge(back, answer)
    pd.testing.assert_frame_equal(forth, back, check_exact=True, check_freq=False)
    assert forth.index.is_unique
    assert forth.index.is_monotonic_increasing


def test_a_candle_that_is_still_forming_is_refused(tmp_path):
    store, closes = Store(tmp_path), int(times(MARKET)[9]) + HOUR
    with pytest.raises(CandleError, match="okx BTC/USDT:USDT: the candle of 2022-01-01 09:00 UTC was not closed at "
                       "2022-01-01 09:59 UTC: leave it out"):
        store.write(*SERIES, MARKET[:10], now=closes - 1)
    assert store.held().empty
    assert store.write(*SERIES, MARKET[:10], now=closes).added == 10


# ---- gaps and freshness

@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 370), st.integers(2, 60)), max_size=4),
       st.sets(st.integers(1, 398), max_size=20), st.integers(0, 200), st.integers(201, 400))
def test_a_source_is_asked_for_what_is_missing_and_nothing_else(tmp_path_factory, writes, down, start, end):
    store = Store(tmp_path_factory.mktemp("store"))
    source = Source(MARKET[:400].drop(MARKET.index[sorted(down)]))
    for at, length in writes: store.write(*SERIES, source.candles[at:at + length], gaps=True)
    span = FIRST + start * HOUR, FIRST + end * HOUR
    held = set(times(store.read(*SERIES, *span)).tolist())
    filled = store.fill(*SERIES, *span, source)
    assert data_hash(filled.candles) == data_hash(source.candles[(times(source.candles) >= span[0])
        & (times(source.candles) < span[1])])
    asked = {time for request in source.requests for time in range(*request, HOUR)}
    assert not asked & held
    assert filled.asked == tuple(source.requests)
    assert all(span[0] <= time < span[1] for time in asked)
    assert (asked | held | {time for hole in absent(store.series(*SERIES)) for time in range(*hole, HOUR)}
            >= set(range(*span, HOUR)))
    # only what nobody has, at the edges of an answer
    assert {time for span in filled.missing for time in range(*span, HOUR)} <= {FIRST + i * HOUR for i in down}


def test_the_newest_candles_are_asked_for_until_they_are_final(tmp_path):
    minutes = ar1(600, .3, .001, 1, "1m", FIRST)
    store, asked = Store(tmp_path, revisable=600_000), []
    def ask(start, end):
        asked.append((end - start) // 60_000)
        return minutes[(times(minutes) >= start) & (times(minutes) < end)]
    for now in range(100, 200):
        store.fill("okx", "BTC/USDT", "1m", FIRST, FIRST + 600 * 60_000, ask, FIRST + now * 60_000)
    assert asked == [100, *[11] * 99] # one new candle and the ten that may still be revised
    assert len(store.read("okx", "BTC/USDT", "1m")) == 199
    store.fill("okx", "BTC/USDT", "1m", FIRST, FIRST + 199 * 60_000, ask, FIRST + 300 * 60_000)
    assert asked[-1] == 10
    assert store.missing("okx", "BTC/USDT", "1m", FIRST, FIRST + 199 * 60_000, FIRST + 10_000 * 60_000) == []


def test_a_revision_reaches_the_store_while_it_is_fresh_and_not_after(tmp_path):
    store, step = Store(tmp_path), HOUR
    span = FIRST, FIRST + 24 * step
    source = Source(MARKET)
    store.fill(*SERIES, *span, source, span[1] + 1_000)
    source.candles = MARKET.assign(volume=MARKET.volume + 1)                    # late trades, in every candle
    store.fill(*SERIES, *span, source, span[1] + REVISABLE)
    changed = store.read(*SERIES).volume - MARKET.volume[:24]
    assert changed.tolist() == [0] * 23 + [1]
    assert source.requests[1] == (span[1] - step, span[1])
    store.fill(*SERIES, *span, source, span[1] + 10 * REVISABLE)
    assert len(source.requests) == 2


def test_a_hole_near_the_present_is_not_believed(tmp_path):
    store = Store(tmp_path, revisable=2 * HOUR)
    source = Source(MARKET[:24].drop(MARKET.index[22]))
    end = FIRST + 24 * HOUR
    filled = store.fill(*SERIES, FIRST, end, source, end)
    assert absent(store.series(*SERIES)) == []
    assert filled.missing == ((end - 2 * HOUR, end - HOUR),)
    assert len(filled.candles) == 23
    source.candles = MARKET                                                     # it comes late
    assert data_hash(store.fill(*SERIES, FIRST, end, source, end + 1).candles) == data_hash(MARKET[:24])


@pytest.mark.parametrize("answer, message",
                         [(lambda start, end: MARKET[:10].assign(close=np.nan), "close is nan at 2022-01-01 00:00"),
                          (lambda start, end: MARKET[:10][::-1], "the rows are not sorted"),
                          (lambda start, end: MARKET[:10].drop(columns="low"), "no column 'low'")])
def test_a_bad_answer_leaves_the_store_as_it_was(tmp_path, answer, message):
    store = Store(tmp_path)
    store.write(*SERIES, MARKET[20:30])
    with pytest.raises(CandleError, match=message): store.fill(*SERIES, FIRST, FIRST + 30 * HOUR, answer)
    assert data_hash(store.read(*SERIES)) == data_hash(MARKET[20:30])
    assert absent(store.series(*SERIES)) == []


def test_the_holes_of_a_real_exchange_are_asked_for_once(shared, tmp_path):
    table = pd.read_parquet(shared / "data" / "BTCUSDT-1h.parquet")
    hours = frame(table.timestamp, table[list(COLUMNS)])
    store, source = Store(tmp_path), Source(hours)
    span = int(times(hours)[0]), int(times(hours)[-1]) + HOUR
    filled = store.fill(*SERIES, *span, source)
    assert data_hash(filled.candles) == data_hash(hours)
    assert filled.missing == ()
    assert len(source.requests) == 1
    assert store.fill(*SERIES, *span, source).asked == ()
    assert len(absent(store.series(*SERIES))) == 27 == len(holes(hours, HOUR))
    assert store.held().missing.tolist() == [127]


# ---- processes

READER = """
    import sys
    from tradelab.market.store import Store
    from tradelab.market.synthetic import ar1
    market, store = ar1(24 * 80, seed=1, start="2022-01-01"), Store(sys.argv[1])
    print("ready", flush=True)
    for _ in range(60):
        read = store.read("okx", "BTC/USDT:USDT", "1h")
        assert len(read) == len(market)
        factors = (read.close / market.close).groupby(read.index.month)
        assert (factors.nunique() == 1).all() and factors.first().isin([1., 2.]).all(), factors.first()
        assert store.held().candles.tolist() == [len(market)]
    print("done")
"""
WRITER = """
    import sys
    from tradelab.market.store import Store
    from tradelab.market.synthetic import ar1
    market = ar1(24 * 80, seed=1, start="2022-01-01")
    print("ready", flush=True)
    for i in range(10_000): Store(sys.argv[1]).write("okx", "BTC/USDT:USDT", "1h", market * (1 + i % 2))
"""


@pytest.mark.integration
def test_many_readers_beside_a_writer_see_whole_months(tmp_path):
    Store(tmp_path).write(*SERIES, MARKET)
    writer = python(WRITER, tmp_path)
    readers = [python(READER, tmp_path) for _ in range(3)]
    try:
        for process in (writer, *readers): assert process.stdout.readline() == "ready\n"
        for reader in readers:
            out, error = reader.communicate()
            assert out == "done\n", error
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.communicate()


@pytest.mark.integration
def test_two_writers_lose_nothing(tmp_path):
    code = """
        import sys
        from tradelab.market.store import Store
        from tradelab.market.synthetic import ar1
        market, part = ar1(24 * 80, seed=1, start="2022-01-01"), int(sys.argv[2])
        for i in range(part, 40, 2):
            Store(sys.argv[1]).write("okx", "BTC/USDT:USDT", "1h", market[48 * i:48 * (i + 1)], gaps=True)
    """
    writers = [python(code, tmp_path, part) for part in (0, 1)]
    for writer in writers: assert writer.communicate()[1] == "" and writer.returncode == 0
    assert data_hash(Store(tmp_path).read(*SERIES)) == data_hash(MARKET)


@pytest.mark.integration
def test_a_fill_that_is_killed_goes_on_where_it_was(tmp_path):
    code = """
        import sys, time
        from tradelab.market.candles import times
        from tradelab.market.store import Store
        from tradelab.market.synthetic import ar1
        market, store, wait = ar1(24 * 80, seed=1, start="2022-01-01"), Store(sys.argv[1]), float(sys.argv[2])
        def ask(start, end):
            print(start, end, flush=True)
            time.sleep(wait)
            return market[(times(market) >= start) & (times(market) < end)]
        opens = times(market)
        for day in range(80):
            store.fill("okx", "BTC/USDT:USDT", "1h", opens[24 * day], opens[24 * day] + 24 * 3_600_000, ask)
    """
    first = python(code, tmp_path, .02)
    before = [first.stdout.readline() for _ in range(30)]
    first.kill()
    first.communicate()
    second = python(code, tmp_path, 0)
    after = second.communicate()[0].splitlines(keepends=True)
    assert not set(before[:-1]) & set(after)
    assert 50 <= len(after) <= 51
    assert data_hash(Store(tmp_path).read(*SERIES)) == data_hash(MARKET)


def test_the_list_of_holes_is_whole_or_absent(tmp_path):
    store = Store(tmp_path)
    store.write(*SERIES, MARKET.drop(MARKET.index[5:9]), gaps=True)
    path = store.series(*SERIES) / "absent.json"
    assert [tuple(span) for span in json.loads(path.read_text())] == [(FIRST + 5 * HOUR,
        FIRST + 9 * HOUR)] == absent(path.parent)
    store.write(*SERIES, MARKET[5:9])                                           # somebody had them after all
    assert data_hash(store.read(*SERIES)) == data_hash(MARKET)
    assert store.missing(*SERIES, FIRST, FIRST + 80 * 24 * HOUR) == []
    path.write_text("{")
    with pytest.raises(CandleError, match="absent.json: not a list of spans"):
        store.missing(*SERIES, FIRST, FIRST + HOUR)
    assert spans(times(MARKET), milliseconds("1h")) == [(FIRST, FIRST + 80 * 24 * HOUR)]
