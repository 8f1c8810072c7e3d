"""Files as their users have them: what each exporter writes comes back with the right values, and foreign bytes give
one sentence"""
import gzip
import io
import json
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tradelab.sources.tables as files
from tradelab.errors import CandleError
from tradelab.events import COLUMNS
from tradelab.market.candles import data_hash, frame, timed, times
from tradelab.market.synthetic import funding, realistic
from tradelab.sources.exogenous import read_exogenous
from tradelab.sources.funding import funding_history
from tradelab.sources.history import history
from tradelab.sources.tables import FILES, NoCandlesError, from_file

SYMBOL, HOUR = "BTC/USDT:USDT", 3_600_000


def market(timeframe="1h", scale=1., length=60):
    "Candles at another price; at 1e-8 each value has all its digits"
    candles = realistic(length, seed=3, timeframe=timeframe, start="2022-02-03")
    return frame(times(candles), candles.to_numpy() * [scale, scale, scale, scale, 1 / scale])


def table_of(candles, time="timestamp"):
    return candles.reset_index(drop=True).assign(**{time: times(candles)})[[time, *COLUMNS]]


def csv(table, **options): return table.to_csv(index=False, **options).encode()


def commas(table): return csv(table, sep=";", decimal=",")


def excel(table):
    written = io.BytesIO()
    table.to_excel(written, index=False)
    return written.getvalue()


def feather(table):
    written = io.BytesIO()
    table.to_feather(written)
    return written.getvalue()


def zipped(content, name):
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as file: file.writestr(name, content)
    return written.getvalue()


def split(candles, written="%Y.%m.%d"): return candles.index.strftime(written), candles.index.strftime("%H:%M:%S")


def metatrader(candles, ticks=7, traded=None):
    date, clock = split(candles)
    return pd.DataFrame({"<DATE>": date, "<TIME>": clock,
                         **{f"<{name.upper()}>": candles[name].to_numpy() for name in COLUMNS[:4]}, "<TICKVOL>": ticks,
                         "<VOL>": candles.volume.to_numpy() if traded is None else traded, "<SPREAD>": 12})


def seconds(candles): return table_of(candles, "time").assign(time=times(candles) // 1000)


WRITERS = {
    "capital.csv": lambda c: csv(table_of(c).rename(columns=str.capitalize)),
    "shouted.csv": lambda c: csv(table_of(c, "DATE").rename(columns=str.upper)),
    "letters.csv": lambda c: csv(table_of(c).set_axis([*"tohlcv"], axis=1)),
    "tradingview.csv": lambda c: csv(seconds(c).rename(columns={"volume": "Volume"})),
    "tradingview iso.csv": lambda c:
    csv(table_of(c, "time").assign(time=c.index.strftime("%Y-%m-%dT%H:%M:%SZ")).rename(columns={"volume": "Volume"})),
    "XBTUSD_60.csv": lambda c: csv(seconds(c).assign(trades=5), header=False),
    "comma.csv": lambda c: commas(table_of(c).assign(timestamp=c.index.strftime("%d.%m.%Y %H:%M"))),
    "comma number.csv": lambda c: commas(seconds(c).rename(columns=str.capitalize)),
    "semicolon.csv": lambda c: csv(table_of(c), sep=";"), "mt5.csv": lambda c: csv(metatrader(c), sep="\t"),
    "mt5 utf16.csv": lambda c: metatrader(c).to_csv(index=False, sep="\t").encode("utf-16"),
    "mt4.csv": lambda c: csv(metatrader(c).drop(columns=["<TICKVOL>", "<SPREAD>"]), header=False),
    "tabs.tsv": lambda c: csv(table_of(c), sep="\t"), "newest.csv": lambda c: csv(table_of(c)[::-1]),
    "newest.json": lambda c: json.dumps(table_of(c)[::-1].to_dict("records")).encode(),
    "bom.csv": lambda c: b"\xef\xbb\xbf" + csv(table_of(c)), "bom bare.csv": lambda c: b"\xef\xbb\xbf"
    + csv(table_of(c), header=False), "bom.json": lambda c: b"\xef\xbb\xbf"
    + json.dumps(table_of(c).to_dict("records")).encode(),
    "lines.json": lambda c: "\n".join(map(json.dumps, table_of(c).to_dict("records"))).encode(),
    "lines.jsonl": lambda c: "\n".join(map(json.dumps, table_of(c).to_numpy().tolist())).encode(),
    "columns.json": lambda c: json.dumps({"s": "ok", **dict(zip("tohlcv", seconds(c).to_numpy().T.tolist()))}).encode(),
    "book.xlsx": lambda c: excel(table_of(c)),
    "dates.xlsx": lambda c:
    excel(table_of(c, "Date").assign(Date=c.index.tz_localize(None)).rename(columns=str.capitalize)),
    "naive.feather": lambda c: feather(table_of(c, "date").assign(date=c.index.tz_localize(None).as_unit("ns"))),
    "pandas.csv": lambda c: csv(table_of(c).set_axis(range(6), axis=1)), "excel.csv": lambda c: b"sep=;\n"
    + commas(table_of(c)), "micro.csv": lambda c: csv(table_of(c).assign(timestamp=times(c) * 1000)),
    "dukascopy.csv": lambda c:
    csv(table_of(c, "Gmt time").assign(**{"Gmt time": c.index.strftime("%d.%m.%Y %H:%M:%S.000")})),
    "american.csv": lambda c: csv(table_of(c, "date").assign(date=c.index.strftime("%m/%d/%Y %H:%M"))),
    "packed.csv.gz": lambda c: gzip.compress(csv(table_of(c))), "packed.zip": lambda c: zipped(csv(table_of(c)),
    "any.csv"), "wrong name.csv": lambda c: excel(table_of(c)),
}


@pytest.mark.parametrize("timeframe, scale", [("1m", 1.), ("1h", 1e-8), ("1d", 1.), ("4h", .003)])
@pytest.mark.parametrize("name", WRITERS)
def test_every_exporter_comes_back(tmp_path, name, timeframe, scale):
    candles = market(timeframe, scale)
    (tmp_path / name).write_bytes(WRITERS[name](candles))
    if name == "american.csv" and candles.index.day.max() <= 12:
        with pytest.raises(CandleError, match="which is the day and which the month cannot be determined"):
            from_file(tmp_path / name, timeframe)
        return
    read = history(SYMBOL, timeframe, source=tmp_path / name)
    # openpyxl writes sixteen digits
    if WRITERS[name](candles)[:2] == b"PK" and name != "packed.zip":
        assert np.array_equal(times(read), times(candles))
        assert (np.allclose(read[list(COLUMNS)], candles, rtol=1e-15,
            atol=0))
    else: assert data_hash(read) == data_hash(candles)


def test_what_a_file_does_not_say_is_said(tmp_path, caplog):
    (tmp_path / "mt5.csv").write_bytes(csv(metatrader(market(), ticks=9, traded=0), sep="\t"))
    read = history(SYMBOL, "1h", source=tmp_path / "mt5.csv")
    assert (read.volume == 9).all()
    assert read.attrs["volume"].startswith("counted in changes of the price")
    assert "clock of its server" in read.attrs["time"]
    assert "assumptions about a file" in caplog.text
    grouped = table_of(market()).assign(volume=[f"{1234 + n:,}".replace(",", ".") for n in range(60)],
                                        close=[f"{value:,.1f}".translate({44: ".", 46: ","})
                                               for value in market().close])
    (tmp_path / "grouped.csv").write_bytes(commas(grouped))
    assert np.array_equal(from_file(tmp_path / "grouped.csv", "1h").volume, 1234. + np.arange(60))
    assert from_file(tmp_path / "grouped.csv", "1h").close.equals(market().close)


@pytest.mark.parametrize("name, content, message", [
    ("two.csv", csv(table_of(market()).assign(Volume=1., VOLUME=2.).drop(columns="volume")),
     "two.csv: which of Volume, VOLUME is the volume cannot be determined: leave one of them"),
    ("fewer.csv", b"timestamp,open,high,low,close\n1640995200000,1,1,1,1,1\n1640998800000,1,1,1,1,1\n",
     "fewer.csv: it is a table whose header names 5 columns, but its rows have 6: name all of them"),
    ("serial.xlsx", excel(table_of(market()).assign(timestamp=44_562.)), "serial.xlsx: timestamp 44562 is not in "
     "seconds, milliseconds"), ("two.zip", zipped(b"x", "a").replace(b"PK\x05\x06", b"PK\x05\x07"),
                                "two.zip: not a whole .csv file"),
    ("mixed.csv",
     csv(table_of(market()).assign(timestamp=np.where(np.arange(60) < 9, times(market()) // 1000, times(market())))),
     "is not in seconds since the epoch, as .* is: write all times in one unit"),
    ("old.xls", b"\xd0\xcf\x11\xe0", "old.xls: it is an old Excel workbook"),
    ("frame.pkl", b"\x80\x04abc", "frame.pkl: it is a pickle, which can run code"),
    ("store.h5", b"\x89HDF\r\n", "store.h5: it is an HDF5 file: convert it"),
    ("binary.csv", b"a,b\n\0\0\0", "binary.csv: not a whole .csv file .it is not text.")])
def test_what_is_refused_is_said_truly(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CandleError, match=message) as caught: from_file(tmp_path / name, "1h")
    assert "\n" not in str(caught.value)
    assert "web page" not in str(caught.value)


def test_a_file_is_judged_like_an_exchange(tmp_path, caplog):
    cents = realistic(3000, seed=1)
    cents.iloc[1500:, :4] *= 100
    table_of(cents).to_csv(tmp_path / "cents.csv", index=False)
    with pytest.raises(CandleError, match="cents.csv: wrong_units at 2024-03-03 12:00 UTC, prices are 10.2 times "
                       "those before"):
        history(SYMBOL, "1h", source=tmp_path / "cents.csv")
    wicked = realistic(3000, seed=1)
    wicked.iloc[1500, 1] *= 1.2
    table_of(wicked).to_csv(tmp_path / "wick.csv", index=False)
    assert data_hash(history(SYMBOL, "1h", source=tmp_path / "wick.csv")) == data_hash(wicked)
    assert "doubtful candles are kept" in caplog.text
    assert "spike" in caplog.text


# ---- funding

@pytest.mark.parametrize("kind", ["feather", "json", "csv", "parquet", "bare"])
def test_freqtrade_keeps_rates_as_candles(tmp_path, kind):
    rates = funding(market(length=600))
    table = pd.DataFrame({"date": rates.index, "open": rates.to_numpy(), "high": 0., "low": 0., "close": 0.,
                          "volume": 0.})
    path = tmp_path / f"BTC_USDT_USDT-8h-funding_rate.{'json' if kind == 'bare' else kind}"
    if kind == "feather": table.to_feather(path)
    elif kind == "parquet": table.to_parquet(path)
    elif kind == "csv": table[::-1].to_csv(path, index=False)
    else:
        path.write_text(json.dumps(table.assign(date=times(rates)).to_numpy().tolist() if kind == "bare"
                                   else table.assign(date=times(rates)).to_dict("records")))
    assert funding_history(SYMBOL, source=path).equals(rates)


def test_rates_that_cover_less_than_asked_are_said(tmp_path, caplog):
    rates = funding(market(length=600))
    rates.reset_index(name="funding_rate").to_csv(tmp_path / "rates.csv", index=False)
    funding_history(SYMBOL, "2022-02-03", rates.index[-1] + pd.Timedelta("8h"), tmp_path / "rates.csv")
    assert "shorter" not in caplog.text
    for span in (("2022-02-01", None), (None, "2022-03-09"), ("2022-04-01", "2022-05-01")):
        caplog.clear()
        funding_history(SYMBOL, *span, tmp_path / "rates.csv")
        assert "span is shorter than requested" in caplog.text


# ---- a table straight from a file

def test_a_backtest_takes_what_pandas_reads(tmp_path):
    from tradelab.policies import buy_and_hold
    from tradelab.sim.backtest import backtest
    candles = market(length=400)
    expected = backtest(buy_and_hold(), candles).equity.to_numpy()
    for table in (table_of(candles), candles, candles.tz_localize(None), candles.reset_index(),
                  candles.tz_localize(None).set_axis(candles.index.as_unit("ns")),
                  table_of(candles).assign(seen_time=1, note="x")):
        table.to_parquet(tmp_path / "candles.parquet")
        assert np.array_equal(backtest(buy_and_hold(), pd.read_parquet(tmp_path / "candles.parquet")).equity, expected)
    with pytest.raises(CandleError, match="no column open_time or timestamp"):
        backtest(buy_and_hold(), candles.reset_index(drop=True))


def test_the_shared_files_and_the_store_are_taken(shared, tmp_path):
    from tradelab.market.store import Store
    raw = pd.read_parquet(shared / "data/BTCUSDT-perp-1h.parquet")
    assert np.array_equal(times(timed(raw)), raw.timestamp)
    path = Store(tmp_path).write("okx", SYMBOL, "1h", market(), now=int(times(market())[-1]) + HOUR).files[0]
    assert data_hash(timed(pd.read_parquet(path))) == data_hash(market())


# ---- bounds and fuzz

def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(files, "MAX_ROWS", 1000)
    monkeypatch.setattr(files, "MAX_LINE", 1 << 16)
    zeros = b"0" * (4 << 20)
    written = io.BytesIO()
    pd.DataFrame({"x": np.zeros(2000)}).to_parquet(written)
    for name, content, message in (("a.csv.gz", gzip.compress(zeros), "larger than 1,048,576 bytes"),
                                   ("a.zip", zipped(zeros, "a.csv"), "larger than 1,048,576 bytes"),
                                   ("a.xlsx", zipped(zeros, "[Content_Types].xml"), "larger than 1,048,576 bytes"),
                                   ("long.csv", b"a,b\n" + b"1" * (1 << 17) + b",2\n", "a line has 131,"),
                                   ("rows.csv", b"1,2\n" * 3000, "3,000 rows, more than 1,000"),
                                   ("wide.csv", b",".join(b"%d" % n for n in range(5, 2000)) + b"\n", "1,995 columns"),
                                   ("rows.parquet", written.getvalue(), "2,000 rows")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CandleError, match=f"^{name}: .*{message}"): from_file(tmp_path / name, "1h")


SEEDS = {name: WRITERS[name](market()) for name in ("capital.csv", "mt5.csv", "comma.csv", "lines.json", "columns.json",
                                                    "book.xlsx", "naive.feather", "packed.csv.gz", "packed.zip",
                                                    "american.csv", "XBTUSD_60.csv")}
written = io.BytesIO()
market().to_parquet(written)
SEEDS["candles.parquet"] = written.getvalue()


@settings(max_examples=150)
@given(st.sampled_from(sorted(SEEDS)), st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 8)),
                                                min_size=1, max_size=4),
                                                st.sampled_from([None, *FILES, ".csv.gz", ".zip"]))
def test_readers_give_only_their_own_error(tmp_path_factory, name, changes, suffix):
    content = bytearray(SEEDS[name])
    for at, put, cut in changes:
        place = int(at * len(content))
        content[place:place + cut] = put
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix or name[name.index('.'):]}"
    path.write_bytes(bytes(content))
    for read in (lambda: from_file(path, "1h"), lambda: funding_history(SYMBOL, source=path),
                 lambda: read_exogenous(path, value="close", reference="timestamp", lag="1h")):
        try: read()
        except (CandleError, NoCandlesError) as error: assert "\n" not in str(error)


@settings(max_examples=100)
@given(st.sampled_from([".csv", ".json", ".txt"]),
       st.text(alphabet=st.sampled_from(list("0123456789.,;:-\t\n\"'{}[]<>eTZ/ abcolhnvt")), max_size=200))
def test_readers_give_only_their_own_error_about_text(tmp_path_factory, suffix, text):
    path = tmp_path_factory.getbasetemp() / f"text{suffix}"
    path.write_text(text)
    for read in (lambda: from_file(path, "1h"), lambda: funding_history(SYMBOL, source=path)):
        try: read()
        except (CandleError, NoCandlesError) as error: assert "\n" not in str(error)
