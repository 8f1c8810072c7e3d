"Candles, store and sources against real files, real sockets and real processes"
import json
import subprocess
import sys
import textwrap
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.errors import CandleError
from tradelab.market.candles import COLUMNS, check, data_hash, matrix, times
from tradelab.market.store import Store
from tradelab.market.synthetic import ar1, funding, random_walk
from tradelab.sources.exchange import connect
from tradelab.sources.funding import funding_history
from tradelab.sources.history import history
from tradelab.sources.tables import NoCandlesError, UnreachableError
from tradelab.times import format_time, to_ms

SYMBOL, HOUR = "BTC/USDT:USDT", 3_600_000


def python(code, *arguments, **options):
    "A program in a process of its own"
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


# ---- real files

def names(shared, pattern): return sorted(path.name for path in (shared / "data").glob(pattern))


def test_every_perpetual_passes(shared):
    files = names(shared, "*-perp-1h.parquet")
    assert len(files) == 4
    for name in files:
        symbol = f"{name.partition('USDT')[0]}/USDT:USDT"
        candles = history(symbol, "1h", source=shared / "data" / name)
        raw = pd.read_parquet(shared / "data" / name)
        assert {key: candles.attrs[key] for key in ("source", "symbol")} == {"source": f"file {name}", "symbol": symbol}
        assert np.array_equal(times(candles), raw.timestamp)
        assert np.array_equal(candles.to_numpy(), raw[list(COLUMNS)].to_numpy())


@pytest.mark.parametrize("symbol, missing, before", [("BTC", 6, "2017-09-06 16:00"), ("ETH", 6, "2017-09-06 16:00"),
                                                     ("LTC", 1, "2018-01-04 03:00"), ("BNB", 1, "2018-01-04 03:00"),
                                                     ("ADA", 10, "2018-06-26 01:00"),
                                                     ("XRP", 10, "2018-06-26 01:00"), ("DOGE", 8, "2019-08-15 01:00"),
                                                     ("SOL", 1, "2020-11-30 05:00")])
def test_spot_outages_are_named(shared, symbol, missing, before):
    path = shared / "data" / f"{symbol}USDT-1h.parquet"
    with pytest.raises(CandleError, match=f"^{path.name}: gap of {missing} candles after {before} UTC, the next is "):
        history(f"{symbol}/USDT", "1h", source=path)
    # a span without an outage is good
    assert len(history(f"{symbol}/USDT", "1h", "2021-10-01", "2022-10-01", source=path)) == 365 * 24


def test_daily_spot_passes(shared):
    for name in names(shared, "*-1d.parquet"):
        assert len(history(f"{name.partition('USDT')[0]}/USDT", "1d", source=shared / "data" / name)) > 700


@pytest.mark.parametrize("name, timeframe, message", [
    ("BTCUSD-bitfinex-1m-2019.parquet", "1m", "gap of "),
    ("raw/BTCUSDT-1h-appended-tail.csv", "1h", "10:00 UTC follows 2023-06-14 11:00 UTC, the rows are not sorted"),
    ("BTCUSDT-1h.parquet", "4h", "is not on the grid of 4h"),
    ("raw/BTC_USDT_USDT-8h-funding_rate.json.gz", "8h", "its rows have no column names"),
    ("BTCUSDT-perp-funding-8h.parquet", "8h", "no column 'open' among timestamp, funding_rate")])
def test_refused_real_files(shared, name, timeframe, message):
    with pytest.raises(CandleError, match=message): history("BTC/USD", timeframe, source=shared / "data" / name)


def test_other_real_files(shared):
    coinbase = shared / "data" / "BTCUSD-coinbase-1h.parquet" # ten hours of 2017-11-12 lie out of order in this file
    with pytest.raises(CandleError, match="2017-11-11 23:00 UTC follows 2017-11-12 04:00 UTC, the rows are not "
                       "sorted: sort them"):
        history("BTC/USD", "1h", source=coinbase)
    assert (history("BTC/USD", "1h", "2018-01-01", source=coinbase).volume == 0).sum() > 15
    assert len(history("BTC/USD", "1m", source=shared / "data" / "BTCPERP-ftx-1m-202201.parquet")) == 45_031


def test_real_funding(shared):
    rates = funding_history(SYMBOL, source=shared / "data" / "BTCUSDT-perp-funding-8h.parquet")
    assert len(rates) == 4206
    assert abs(rates.sum() - .58156409) < 1e-9
    assert set(rates.index.hour) == {0, 8, 16}
    assert (len(funding_history(SYMBOL, "2022-07-01", "2023-01-01",
                                shared / "data" / "BTCUSDT-perp-funding-8h.parquet")) == 184 * 3)


@pytest.mark.parametrize("change, message",
                         [(lambda table: table.drop(columns="close"), "no column 'close' among timestamp, open, high, "
                           "low, volume: rename it; exporters also call it c, Close"),
                          (lambda table: table.assign(high=table.high.where(table.index != 7)),
                           "high is nan at 2022-07-01 07:00 UTC, not a number"),
                          (lambda table: table.assign(timestamp=table.timestamp // 60_000), "timestamp 27610560 is not "
                           "in seconds, milliseconds"),
                          (lambda table: table.rename(columns={"high": "low", "low": "high"}),
                           "high is .* at .* below another price of its candle"),
                          (lambda table: table.drop(index=[3, 4]), "gap of 2 candles after 2022-07-01 02:00 UTC"),
                          (lambda table: table[:0], "no rows")])
def test_a_spoiled_file_gives_one_sentence(shared, tmp_path, change, message):
    table = pd.read_parquet(shared / "data" / "BTCUSDT-perp-1h.parquet")
    table = table[table.timestamp >= to_ms("2022-07-01")][:100].reset_index(drop=True)
    change(table).to_parquet(tmp_path / "btc.parquet")
    with pytest.raises(CandleError, match=f"^btc.parquet: .*{message}") as caught:
        history(SYMBOL, "1h", source=tmp_path / "btc.parquet")
    assert "\n" not in str(caught.value)


def test_a_truncated_parquet_is_refused(shared, tmp_path):
    whole = (shared / "data" / "BTCUSDT-perp-1h.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(CandleError, match="cut.parquet: not a whole .parquet file .*: fetch it again"):
        history(SYMBOL, "1h", source=tmp_path / "cut.parquet")


@settings(max_examples=20)
@given(st.sampled_from(["parquet", "csv", "json", "csv.gz", "json.gz"]), st.permutations(["time", *COLUMNS]),
       st.sampled_from(["timestamp", "open_time"]), st.booleans())
def test_any_file_gives_the_same_bits(tmp_path_factory, kind, order, time_name, iso):
    market = ar1(30, seed=5)
    stamps = [stamp.isoformat() for stamp in market.index] if iso else times(market)
    table = market.reset_index(drop=True).assign(time=stamps)[order].rename(columns={"time": time_name})
    path = tmp_path_factory.mktemp("files") / f"btc.{kind}"
    if kind == "parquet": table.to_parquet(path)
    elif kind.startswith("csv"): table.to_csv(path, index=False)
    else: table.to_json(path, orient="records", double_precision=15)
    assert data_hash(history(SYMBOL, "1h", source=str(path))) == data_hash(market)


# ---- synthetic

@settings(max_examples=15)
@given(st.integers(2, 400), st.floats(-.9, .9), st.floats(.0005, .03), st.integers(0, 2 ** 32),
       st.sampled_from(["1m", "1h", "8h", "1d"]))
def test_synthetic_candles_pass_the_check(length, rho, volatility, seed, timeframe):
    market = check(ar1(length, rho, volatility, seed, timeframe), timeframe)
    assert len(market) == length
    assert (market.open[1:].to_numpy() == market.close[:-1].to_numpy()).all()
    assert (market.volume > 0).all()
    assert (market[["open", "high", "low", "close"]] == (market[["open", "high", "low", "close"]] * 10).round()
            / 10).all(axis=None)


def test_several_symbols_share_one_axis():
    axis, candles, symbols = matrix({"A": ar1(50, seed=1), "B": random_walk(50, seed=2)})
    assert candles.shape == (50, 2, 5)
    assert symbols == ("A", "B")
    assert len(axis) == 50
    assert not np.array_equal(candles[:, 0], candles[:, 1])


# ---- an exchange on loopback

class Exchange:
    "A server that speaks Binance's public protocol over `market`, and misbehaves on request"
    def __init__(self, market, now, fault=None):
        self.market = market
        self.now = now
        self.fault = fault
        self.asked = []
        exchange = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments): pass
            def do_GET(self):
                path = urlsplit(self.path).path.split("/")[-1]
                query = dict(parse_qsl(urlsplit(self.path).query))
                exchange.asked.append((path, query))
                status, body = exchange.answer(path, query)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()

    def connect(self): return connect("binanceusdm", f"http://127.0.0.1:{self.server.server_port}")
    def pages(self): return sum(path == "klines" for path, _ in self.asked)

    def answer(self, path, query):
        since = int(query.get("startTime", 0))
        limit = int(query.get("limit", 500))
        if path == "time":
            return ((200, b"<html>log in to the hotel</html>") if self.fault == "portal"
                    else (200, {"serverTime": self.now}))
        if path == "exchangeInfo":
            return (200,
                    {"symbols": [dict(symbol="BTCUSDT", pair="BTCUSDT", baseAsset="BTC", quoteAsset="USDT",
                                      marginAsset="USDT", contractType="PERPETUAL", status="TRADING", onboardDate=0,
                                     deliveryDate=4133404800000, pricePrecision=1, quantityPrecision=3, filters=[])]})
        if path == "fundingRate": return 200, []
        if self.fault == "html": return 200, b"<html>maintenance</html>"
        if self.fault == "empty": return 200, []
        if self.fault == "once busy" and self.pages() < 2:
            return 503, {"code": -1001, "msg": "Internal error; unable to process your request."}
        rows = [[t, *map(str, row), t + HOUR - 1, "0", 1, "0", "0", "0"] for t, row in zip(times(self.market).tolist(),
            self.market.to_numpy().tolist()) if since <= t <= self.now]
        if self.fault == "gap": del rows[5]
        if self.fault == "nan": rows[5][4] = "none"
        return 200, rows[:limit]


@pytest.fixture
def exchange():
    made = []
    def make(*arguments): return made.append(Exchange(*arguments)) or made[-1]
    yield make
    for each in made:
        each.server.shutdown()
        each.server.server_close()


MARKET = ar1(2600, seed=4, start="2022-01-01")
NOON = to_ms("2022-04-10 12:30")


def test_download_walks_pages_and_keeps_closed_candles_only(exchange, tmp_path):
    venue, store = exchange(MARKET, NOON), Store(tmp_path)
    candles = history(SYMBOL, "1h", "2022-01-01", source=venue.connect(), store=store)
    assert data_hash(candles) == data_hash(MARKET[:"2022-04-10 11:00"])
    assert (candles.attrs["source"], candles.attrs["symbol"], candles.attrs["instrument"]["origin"]) == ("binanceusdm",
        SYMBOL, "binanceusdm")
    assert venue.pages() == 3
    assert data_hash(store.read("binanceusdm", SYMBOL, "1h")) == data_hash(candles)


def test_held_candles_are_not_asked_for_again(exchange, tmp_path):
    venue, store = exchange(MARKET, NOON), Store(tmp_path)
    history(SYMBOL, "1h", "2022-01-01", "2022-02-01", source=venue.connect(), store=store)
    before = len(venue.asked)
    assert len(history(SYMBOL, "1h", "2022-01-10", "2022-02-01", source="auto", store=store)) == 22 * 24
    assert len(venue.asked) == before # from the store; no internet is needed
    history(SYMBOL, "1h", "2022-01-01", "2022-02-03", source=venue.connect(), store=store)
    assert [int(query["startTime"]) for path, query in venue.asked[before:]
            if path == "klines"] == [to_ms("2022-02-01")]


@pytest.mark.parametrize("fault, reason", [("html", "answered|refused|has no candles"),
                                           ("empty", "has no candles of BTC/USDT:USDT"),
                                           ("gap", "gap of 1 candles after 2022-01-01 04:00"),
                                           ("nan", "close is nan|answered"),
                                           ("portal", "cannot be reached")])
def test_a_bad_answer_is_not_stored_and_the_next_exchange_is_asked(exchange, tmp_path, caplog, fault, reason):
    bad = exchange(MARKET, NOON, fault).connect()
    good = exchange(MARKET, NOON).connect()
    store = Store(tmp_path)
    bad.id = "bad"
    with pytest.raises((NoCandlesError, CandleError), match=reason):
        history(SYMBOL, "1h", "2022-01-01", "2022-01-20", source=bad, store=store)
    assert store.held().empty
    candles = history(SYMBOL, "1h", "2022-01-01", "2022-01-20", source=[bad, good, "synthetic"], store=store)
    assert candles.attrs["source"] == "binanceusdm"
    assert store.held().source.tolist() == ["binanceusdm"]
    assert len(candles) == 19 * 24
    assert any("trying the next" in record.getMessage() for record in caplog.records)


def test_a_busy_exchange_is_asked_again(exchange):
    assert len(history(SYMBOL, "1h", "2022-01-01", "2022-01-03",
                       source=exchange(MARKET, NOON, "once busy").connect())) == 48


def test_an_unlisted_symbol_is_an_error_even_where_synthetic_is_allowed(exchange):
    with pytest.raises(NoCandlesError, match="binanceusdm does not list 'BTC/USDT:USD', did you mean 'BTC/USDT:USDT'"):
        history("BTC/USDT:USD", "1h", "2022-01-01", "2022-01-03", source=[exchange(MARKET, NOON).connect(),
            "synthetic"])


def test_a_silent_host_is_given_up(tmp_path):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as silent:                     # takes connections and never answers
        with pytest.raises(UnreachableError, match="binanceusdm cannot be reached"):
            history(SYMBOL, "1h", "2022-01-01", "2022-01-03",
                    source=connect("binanceusdm", f"http://127.0.0.1:{silent.getsockname()[1]}"))


def test_without_internet_auto_says_synthetic_loudly(tmp_path):
    alone = ["unshare", "-rn"]
    try: subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("this system cannot start a process without a network (unshare -rn)")
    code = (f"from tradelab.sources.history import history; c = history({SYMBOL!r}, '1h', '2022-01-01', '2022-02-01'); "
            "print(len(c), c.attrs)")
    done = subprocess.run([*alone, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "*** NO EXCHANGE COULD BE REACHED. The 744 candles of BTC/USDT:USDT are SYNTHETIC" in done.stdout
    assert "'source': 'synthetic ar1(" in done.stdout
    assert "SYNTHETIC CANDLES" in done.stderr
    assert "binanceusdm cannot be reached" in done.stdout


def test_nothing_heavy_is_imported():
    done = subprocess.run([sys.executable, "-c", "import sys, tradelab.sources.history; print([name for name in "
                           "('ccxt', 'tqdm', 'matplotlib', 'torch', 'requests') if name in sys.modules])"],
                           capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_funding_of_an_exchange_without_any(exchange):
    assert len(funding_history(SYMBOL, "2022-01-01", "2022-01-05", exchange(MARKET, NOON).connect())) == 0 < len(
        funding(MARKET))


# ---- the store

WRITER = """
    import sys
    from tradelab.market.store import Store
    from tradelab.market.synthetic import ar1
    market = ar1(24 * 80, seed=1, start="2022-01-01")
    print("ready", flush=True)
    for i in range(10_000): Store(sys.argv[1]).write("kraken", "BTC/USD", "1h", market * (1 + i % 2))
"""


@pytest.mark.integration
def test_kill_at_any_moment_leaves_a_readable_store(tmp_path):
    market = ar1(24 * 80, seed=1, start="2022-01-01")
    Store(tmp_path).write("kraken", "BTC/USD", "1h", market)
    for delay in (.02, .05, .11, .17):
        writer = python(WRITER, tmp_path)
        assert writer.stdout.readline() == "ready\n"
        try: writer.wait(delay)
        except subprocess.TimeoutExpired: writer.kill()
        writer.communicate()
        held = Store(tmp_path).read("kraken", "BTC/USD", "1h")
        assert np.array_equal(times(held), times(market))
        for month in (1, 2, 3):
            these = held[held.index.month == month]
            assert any(data_hash(these) == data_hash(market.loc[these.index] * factor) for factor in (1, 2))
    Store(tmp_path).write("kraken", "BTC/USD", "1h", market[:5])
    assert {path.name for path in Store(tmp_path).series("kraken", "BTC/USD", "1h").iterdir()} == {".lock",
        "2022-01.parquet", "2022-02.parquet", "2022-03.parquet"}


@pytest.mark.integration
def test_a_reader_beside_a_writer_sees_whole_months(tmp_path):
    market = ar1(24 * 80, seed=1, start="2022-01-01")
    Store(tmp_path).write("kraken", "BTC/USD", "1h", market)
    writer = python(WRITER, tmp_path)
    assert writer.stdout.readline() == "ready\n"
    for _ in range(100): assert len(Store(tmp_path).read("kraken", "BTC/USD", "1h")) == len(market)
    writer.kill()
    writer.communicate()


def test_a_full_disk_changes_nothing(tmp_path):
    store = Store(tmp_path)
    market = ar1(24 * 80, seed=1, start="2022-01-01")
    store.write("kraken", "BTC/USD", "1h", market[:100])
    writer = python("""
        import resource, sys
        from tradelab.market.store import StorageError, Store
        from tradelab.market.synthetic import ar1
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))      # no file may grow beyond 20 kB
        try: Store(sys.argv[1]).write("kraken", "BTC/USD", "1h", ar1(24 * 80, seed=1, start="2022-01-01") * 2)
        except StorageError as error: sentence = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)                   # coverage may write its own file
        sys.exit(sentence)
    """, tmp_path)
    out, error = writer.communicate()
    assert writer.returncode == 1
    assert "cannot keep" in error
    assert "File too large: make room there or choose another folder; no file was left half-written" in error
    assert "Traceback" not in error
    assert data_hash(store.read("kraken", "BTC/USD", "1h")) == data_hash(market[:100])
    assert {path.name for path in store.series("kraken", "BTC/USD", "1h").iterdir()} == {".lock", "2022-01.parquet"}


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 1900), st.integers(2, 900), st.integers(0, 3)), min_size=1, max_size=5),
       st.integers(0, 2000), st.integers(0, 2000))
def test_the_store_is_the_last_word_on_every_candle(tmp_path_factory, writes, start, end):
    store = Store(tmp_path_factory.mktemp("store"))
    truth = {}
    first = to_ms("2022-01-01")
    for at, length, seed in writes:
        market = ar1(length, seed=seed, start=first + at * HOUR)
        store.write("okx", SYMBOL, "1h", market)
        truth |= dict(zip(times(market).tolist(), market.to_numpy().tolist()))
    read = store.read("okx", SYMBOL, "1h", first + start * HOUR, first + end * HOUR)
    wanted = {t: row for t, row in sorted(truth.items()) if first + start * HOUR <= t < first + end * HOUR}
    assert times(read).tolist() == list(wanted)
    assert read.to_numpy().tolist() == list(wanted.values())
    held, = store.held().itertuples(index=False)
    assert (held.source, held.symbol, held.timeframe, held.candles, format_time(to_ms(held.first))) == ("okx", SYMBOL,
        "1h", len(truth), format_time(min(truth)))
