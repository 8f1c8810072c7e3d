"Sources of localnet's market: recordings of a real exchange, and another exchange that is followed over sockets"
import asyncio
import json
import time
from contextlib import ExitStack, aclosing, asynccontextmanager
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from tradelab.errors import SymbolNotSupportedError, VenueConnectionError
from tradelab.events import CLOSE, COLUMNS, HIGH, LOW, OPEN, VOLUME
from tradelab.localnet.limits import LimitSettings
from tradelab.localnet.market import Close, Levels, Market, Prices, Tick, klines
from tradelab.localnet.protocol import signature
from tradelab.localnet.server import Localnet
from tradelab.localnet.sources import Follow, Patience, Recorded, Replay, kline_candle
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1, correlated
from tradelab.sources.book import BookUpdate, OrderBook, book_diff, book_snapshot, put_levels

pytestmark = pytest.mark.integration
BTC = "BTC/USDT:USDT"
SYMBOLS = ("AKRO/USDT:USDT", "CTK/USDT:USDT", "KEEP/USDT:USDT", "SUSHI/USDT:USDT")
NAMES = [symbol.partition("/")[0] + "USDT" for symbol in SYMBOLS]
MINUTE = 1_626_992_700_000 # the one in which the capture begins
OFF = LimitSettings(enforced=False)
QUICK = Patience(silence=20., close=.3, pause=.02, reply=10.)


@pytest.fixture
def capture(shared):
    folder = shared / "fixtures" / "binance" / "cryptofeed_real_2021-07"
    if not folder.exists(): pytest.skip("the capture of 2021 is absent")
    return folder


def books_of(moves, count):
    "The books that levels make, as dictionaries of bids and asks"
    books = [({}, {}) for _ in range(count)]
    for move in moves:
        if not isinstance(move, Levels): continue
        if move.whole: books[move.n] = ({}, {})
        for side, levels in zip(books[move.n], (move.bids, move.asks)): put_levels(side, levels)
    return books


def test_a_recorded_book_ends_as_the_exchange_left_it(capture):
    recorded = Recorded(capture, changes=100)
    assert sorted(recorded.symbols) == sorted(SYMBOLS)
    assert {each.symbol: each.price_tick for each in recorded.instruments}["SUSHI/USDT:USDT"] == .001
    steps = list(recorded.steps())
    moves = [move for moves in steps for move in moves]
    assert [sum(isinstance(move, Levels) for move in moves) for moves in steps[1:-1]] == [100] * (len(steps) - 2)
    truth = {name: OrderBook(name) for name in NAMES}
    for event in recorded.events:
        if isinstance(event, BookUpdate): truth[event.symbol].take(event)
    assert books_of(moves, 4) == [truth[name].sides for name in recorded.names]
    clock = [move.time for move in moves]
    assert clock == sorted(clock)


def test_the_market_shows_the_candles_of_its_source():
    "While a candle forms, its trades fold to it: just before the close it is what the close says, to the last digit"
    frames = correlated(40, seed=4)
    source = Replay(frames, start=int(times(frames[BTC])[10]))
    market = Market(source.history(), source.instruments, source.funding, interval=source.interval, now=source.now)
    def shown(n):
        rows = klines(market, n, {"interval": "1h", "limit": "40"})
        return [[float(each) for each in row[:6]] for row in rows]
    for t, moves in enumerate(source.steps(), 9):
        for move in moves:
            if isinstance(move, Close): assert [shown(n)[-1][1:] for n in range(2)] == [
                each.iloc[t].tolist() for each in frames.values()]
            market.apply(move)
    for n, each in enumerate(frames.values()):
        assert [row[1:] for row in shown(n)[:-1]] == each[:-1].to_numpy().tolist()
        assert shown(n)[-1][1:] == [each.open.iloc[-1]] * 4 + [0.]


def test_recorded_minutes_are_the_exchanges_own_where_they_are_whole(shared):
    "Bitcoin, spot: six minutes; between two closes the trades are the candle"
    path = shared / "data" / "BTCUSDT-spot-l2-20240808.gz"
    if not path.exists(): pytest.skip("the capture of 2024 is absent")
    recorded, traded = Recorded(path, changes=500), []
    closes = 0
    for moves in recorded.steps():
        for move in moves:
            if isinstance(move, Tick) and move.quantity: traded.append(move)
            if not isinstance(move, Close): continue
            candle, closes = move.candles[0], closes + 1
            prices = [tick.price for tick in traded]
            assert candle[[OPEN, HIGH, LOW, CLOSE]].tolist() == [prices[0], max(prices), min(prices), prices[-1]]
            assert candle[VOLUME] == pytest.approx(sum(tick.quantity for tick in traded), abs=1e-7)
            traded = []
    assert closes >= 5
    assert recorded.instruments[0].price_tick == .01


class Stage:
    "An exchange that plays a capture: whoever has subscribed hears its messages, and its books are right"
    def __init__(self, folder, refuses=()):
        self.info = json.loads((folder / "exchangeInfo.json").read_text())
        self.messages = [json.loads(line) for line in (folder / "ws.jsonl").read_text().splitlines()]
        snapshots = [json.loads((folder / f"depth_{name}.json").read_text()) for name in NAMES]
        self.snapshots = sorted(snapshots, key=lambda each: each["recv"])
        self.books = {name: OrderBook(name) for name in NAMES}
        self.refuses, self.sockets, self.played, self.closed = set(refuses), {}, 0, {name: [] for name in NAMES}
        self.asked, self.withheld, self.busy = [], set(), False

    async def rest(self, request):
        what, name = request.path.rpartition("/")[2], request.query.get("symbol", "")
        self.asked.append((what, name))
        if what == "exchangeInfo": return web.json_response(self.info)
        if what == "fundingRate": return web.json_response([])
        if what == "klines": return web.json_response(self.klines(name))
        book = self.books[name]
        if what == "depth" and self.busy:
            return web.json_response({"code": -1003, "msg": "Way too many"}, status=429, headers={"Retry-After": "60"})
        if what != "depth" or not book.complete: return web.json_response({"code": -1000, "msg": "not yet"}, status=503)
        return web.json_response({"lastUpdateId": book.last, "E": book.time, "T": book.time,
                                  "bids": [[repr(each) for each in row] for row in book.bids().tolist()],
                                  "asks": [[repr(each) for each in row] for row in book.asks().tolist()]})

    def klines(self, name):
        "The minutes that closed so far, and one that forms"
        first = next(each["data"]["k"] for each in self.messages if each["data"]["e"] == "kline"
                     and each["data"]["s"] == name)
        def row(kline): return [kline[field] for field in (*"tohlcv", "T", *"qnVQ")] + ["0"]
        closed = [row(kline) for kline in self.closed[name]]
        forming = row(first) if not closed else [MINUTE + 60_000, *[closed[-1][4]] * 4, "0", MINUTE + 119_999, "0", 0,
                                                 "0", "0", "0"]
        return [*closed, forming]

    async def socket(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[socket] = set()
        async for message in socket:
            asked = json.loads(message.data)
            kind = asked["params"][0].partition("@")[2]
            if kind in self.refuses:
                wrong = {"code": 2, "msg": "Invalid request: invalid stream"}
                await socket.send_json({"error": wrong, "id": asked["id"]})
            else:
                self.sockets[socket] |= set(asked["params"])
                await socket.send_json({"result": None, "id": asked["id"]})
        self.sockets.pop(socket, None)
        return socket

    def heard(self): return set().union(*self.sockets.values())

    async def play(self, end):
        "The messages up to a number"
        for each in self.messages[self.played:end]:
            while self.snapshots and self.snapshots[0]["recv"] < each["recv"]:
                told = self.snapshots.pop(0)
                self.books[told["symbol"]].take(book_snapshot(told["symbol"], told["body"]))
            data = each["data"]
            if data["e"] == "depthUpdate": self.books[data["s"]].take(book_diff(data))
            if data["e"] == "kline" and data["k"]["x"]: self.closed[data["s"]].append(data["k"])
            if each["stream"] in self.withheld: continue
            for socket in [socket for socket, streams in self.sockets.items() if each["stream"] in streams]:
                await socket.send_json({"stream": each["stream"], "data": data})
        self.played = end

    async def cut(self, kind):
        "Close the sockets that hear a kind of stream"
        for socket in [socket for socket, streams in self.sockets.items() if any(kind in name for name in streams)]:
            self.sockets.pop(socket)
            await socket.close()


async def until(true, what):
    for _ in range(2000):
        if true(): return
        await asyncio.sleep(.005)
    raise AssertionError(f"after ten seconds still not: {what}")


@asynccontextmanager
async def followed(stage, patience=QUICK, symbols=SYMBOLS):
    "A stage, who follows it, and the moves that came"
    app = web.Application()
    app.router.add_get("/fapi/v1/{what}", stage.rest)
    for route in ("market", "public"): app.router.add_get(f"/{route}/stream", stage.socket)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"127.0.0.1:{runner.addresses[0][1]}"
    follow = await Follow(f"http://{address}", f"ws://{address}", symbols, patience=patience).prepare()
    moves = []
    async def listen():
        async with aclosing(follow.steps()) as steps:
            async for step in steps: moves.extend(step)
    task = asyncio.create_task(listen())
    try: yield follow, moves
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await runner.cleanup()


def streams(*kinds): return {f"{name.lower()}@{kind}" for name in NAMES for kind in kinds}


ALL = streams("aggTrade", "kline_1m", "markPrice@1s", "depth@100ms")


@pytest.mark.parametrize("lost", [None, 0, 40], ids=["whole", "broken", "with a gap"])
def test_following_ends_with_the_books_of_the_exchange(capture, lost):
    "Half of a real capture, a broken connection and messages that nobody hears, and the other half"
    async def run():
        stage = Stage(capture)
        async with followed(stage) as (follow, moves):
            def same(): return books_of(moves, 4) == [stage.books[name].sides for name in NAMES]
            await until(lambda: stage.heard() == ALL, "subscribed")
            await stage.play(700)
            await until(same, "the books after half of the capture")
            asked = stage.asked.count(("depth", "SUSHIUSDT"))
            if lost is not None:
                await stage.cut("depth")
                await stage.play(700 + lost)
                await until(lambda: stage.heard() == ALL, "subscribed again")
            await stage.play(len(stage.messages))
            await until(same, "the books at the end of the capture")
            assert (stage.asked.count(("depth", "SUSHIUSDT")) > asked) == (lost is not None)
            assert not follow.silent
            assert follow.refused == set()
        market = Market(follow.history(), follow.instruments, follow.funding, interval="1m", now=follow.now)
        for move in moves: market.apply(move)
        for n, name in enumerate(NAMES):
            assert [dict(market.book(n).levels(sign)) for sign in (1, -1)] == list(stage.books[name].sides)
        close, = [move for move in moves if isinstance(move, Close)]
        assert (close.time, close.open_time) == (MINUTE + 60_000, MINUTE)
        for n, name in enumerate(NAMES):
            assert np.array_equal(close.candles[n], kline_candle(stage.closed[name][0]), equal_nan=True)
        place = moves.index(close)
        assert all(move.time < close.time for move in moves[:place])
        assert all(move.time >= close.time for move in moves[place:])
        sent = [each["data"] for each in stage.messages if each["data"]["e"] == "aggTrade"]
        ticks = [move for move in moves if isinstance(move, Tick) and move.time > MINUTE]
        if not lost:
            assert sorted((tick.n, tick.price, tick.quantity) for tick in ticks) == sorted(
                (NAMES.index(each["s"]), float(each["p"]), float(each["q"])) for each in sent)
    asyncio.run(run())


def test_what_is_refused_is_replaced(capture):
    "Without trades the candles tell them, without changes of the book the best prices are one"
    async def run():
        stage = Stage(capture, refuses={"aggTrade", "depth@100ms", "markPrice@1s"})
        async with followed(stage) as (follow, moves):
            await until(lambda: stage.heard() == streams("kline_1m", "bookTicker"), "subscribed")
            await stage.play(len(stage.messages))
            last = {each["data"]["s"]: each["data"] for each in stage.messages if each["data"]["e"] == "bookTicker"}
            top = [({float(last[name]["b"]): float(last[name]["B"])}, {float(last[name]["a"]): float(last[name]["A"])})
                   for name in NAMES]
            await until(lambda: books_of(moves, 4) == top, "the best prices at the end")
            assert follow.refused == {"aggTrade", "depth@100ms", "markPrice@1s"}
        close, = [move for move in moves if isinstance(move, Close)]
        for n in range(4):
            ticks = [move for move in moves[:moves.index(close)] if isinstance(move, Tick) and move.n == n]
            prices = [tick.price for tick in ticks]
            assert [prices[0], max(prices), min(prices), prices[-1]] == close.candles[n, :4].tolist()
            assert sum(tick.quantity for tick in ticks) == pytest.approx(close.candles[n, VOLUME])
        assert ("depth", "SUSHIUSDT") not in stage.asked
    asyncio.run(run())


def test_a_close_that_is_not_told_is_asked_for(capture):
    async def run():
        stage = Stage(capture)
        stage.withheld = {"keepusdt@kline_1m"}
        async with followed(stage) as (_, moves):
            await until(lambda: stage.heard() == ALL, "subscribed")
            await stage.play(len(stage.messages))
            await until(lambda: any(isinstance(move, Close) for move in moves), "the close")
        close, = [move for move in moves if isinstance(move, Close)]
        assert close.candles[2, CLOSE] == float(stage.closed["KEEPUSDT"][0]["c"])
    asyncio.run(run())


WRONG = {"e": "depthUpdate", "s": "SUSHIUSDT", "E": 1, "U": 1, "u": 9e15, "pu": 1, "b": [[1]], "a": 0}
PASSED_OVER = ("[]", '{"data": 7}', '{"data": {"e": ["x"]}}', json.dumps({"data": WRONG}),
               '{"data": {"e": "depthUpdate", "s": "SUSHIUSDT", "u": 1}}')


def test_what_is_no_message_is_passed_over(capture):
    "Messages that lack their fields are passed over; a line that speaks no JSON is opened again"
    async def run():
        stage = Stage(capture)
        async with followed(stage) as (_, moves):
            def same(): return books_of(moves, 4) == [stage.books[name].sides for name in NAMES]
            async def send(nonsense):
                for socket in list(stage.sockets): await socket.send_str(nonsense)
            await until(lambda: stage.heard() == ALL, "subscribed")
            for nonsense in PASSED_OVER:
                await send(nonsense)
                await stage.play(stage.played + 150)
            await until(same, "the books")
            for nonsense in ("<html>", '{"error": {}, "id": "x"}'):
                await send(nonsense)
                stage.sockets.clear()
                await until(lambda: stage.heard() == ALL, "subscribed again")
                await stage.play(stage.played + 350)
                await until(same, "the books after a new line")
    asyncio.run(run())


def test_who_is_busy_is_left_alone(capture):
    "Snapshots are refused with 429 for a minute: one request a symbol, however many changes come"
    async def run():
        stage = Stage(capture)
        stage.busy = True
        async with followed(stage) as (_, moves):
            await until(lambda: stage.heard() == ALL, "subscribed")
            await stage.play(100)
            await until(lambda: stage.asked.count(("depth", "SUSHIUSDT")) == 1, "asked")
            await stage.play(len(stage.messages))
            trades = sum(each["data"]["e"] == "aggTrade" for each in stage.messages)
            def heard(): return sum(isinstance(move, Tick) and move.time > MINUTE for move in moves)
            await until(lambda: heard() == trades, "trades")
            assert len([path for path, _ in stage.asked if path == "depth"]) <= 4
            assert not any(isinstance(move, Levels) for move in moves)
    asyncio.run(run())


def test_silence_is_told(capture):
    async def run():
        stage = Stage(capture)
        async with followed(stage, Patience(silence=.2, close=.3, pause=.02, reply=10.)) as (follow, _):
            await until(lambda: stage.heard() == ALL, "subscribed")
            await until(lambda: follow.silent, "silent")
            async def speak():
                while True:
                    await stage.play(min(stage.played + 5, len(stage.messages)))
                    await asyncio.sleep(.005)
            speaking = asyncio.create_task(speak())
            try: await until(lambda: not follow.silent, "heard again")
            finally: speaking.cancel()
    asyncio.run(run())


def test_an_exchange_that_is_not_there_or_lacks_a_symbol(capture):
    async def nobody(): await Follow("http://127.0.0.1:9", "ws://127.0.0.1:9", SYMBOLS).prepare()
    with pytest.raises(VenueConnectionError, match="http://127.0.0.1:9/fapi/v1/exchangeInfo cannot be reached"):
        asyncio.run(nobody())
    async def page():
        stage = Stage(capture)
        stage.info = {"symbols": [{"symbol": "SUSHIUSDT"}]}
        async with followed(stage, symbols=SYMBOLS[-1:]): raise AssertionError("followed")
    with pytest.raises(VenueConnectionError, match="does not reply as Binance does .* give the address of USD-M"):
        asyncio.run(page())
    async def other():
        async with followed(Stage(capture), symbols=("XYZ/USDT:USDT",)): raise AssertionError("followed")
    with pytest.raises(SymbolNotSupportedError, match="does not list XYZ/USDT:USDT: follow what is traded there"):
        asyncio.run(other())


def folded(moves):
    "Open, high, low, close and volume of the trades between two closes"
    ticks = [move for move in moves if isinstance(move, Tick) and move.quantity]
    prices = [tick.price for tick in ticks]
    return [prices[0], max(prices), min(prices), prices[-1], round(sum(tick.quantity for tick in ticks), 8)]


async def user_stream(session, url):
    "A localnet waits for a session: one whose user stream is connected"
    async with session.post(f"{url}/fapi/v1/listenKey") as told: key = (await told.json())["listenKey"]
    return session.ws_connect(f"{url.replace('http', 'ws')}/private/ws?listenKey={key}")


def test_a_localnet_is_followed():
    "All streams are served: closes are its candles, and the trades between two of them fold to these"
    candles = ar1(40, seed=3)
    async def run(url):
        follow = await Follow(url, url.replace("http", "ws"), [BTC], interval="1h", patience=QUICK).prepare()
        assert follow.now == times(candles)[6]
        assert follow.history()[BTC][[*COLUMNS]].equals(candles[:6])
        moves = []
        async with aiohttp.ClientSession(headers={"X-MBX-APIKEY": "localnet-key"}) as session:
            async with await user_stream(session, url), aclosing(follow.steps()) as steps:
                async for step in steps:
                    moves += step
                    if sum(isinstance(move, Close) for move in moves) >= 10: break
        places = [place for place, move in enumerate(moves) if isinstance(move, Close)][:10]
        assert [moves[place].open_time for place in places] == times(candles)[6:16].tolist()
        assert [moves[place].candles[0, :5].tolist() for place in places] == candles.to_numpy()[6:16].tolist()
        between = [folded(moves[begin:end]) for begin, end in zip(places[:-1], places[1:])]
        assert between == candles.to_numpy()[7:16].tolist()
        assert follow.refused == set()
        assert {Levels, Prices} <= {type(move) for move in moves}
    with Localnet({BTC: candles}, start=int(times(candles)[6]), lockstep=False, interval_ms=20) as venue:
        asyncio.run(run(venue.url))


def test_a_localnet_follows_another_and_takes_no_order_in_silence():
    candles, patience = ar1(40, seed=3), Patience(silence=2., close=.3, pause=.05, reply=5.)
    async def run(first, second):
        async with aiohttp.ClientSession(headers={"X-MBX-APIKEY": "localnet-key"}) as session:
            async with await user_stream(session, first.url):
                asked = {"symbol": "BTCUSDT", "interval": "1h", "limit": 500}
                async def rows():
                    async with session.get(f"{second.url}/fapi/v1/klines", params=asked) as told:
                        return await told.json()
                while len(shown := await rows()) < 25: await asyncio.sleep(.01)
                closed = [[float(each) for each in row[1:6]] for row in shown[:-1]]
                assert closed == candles.to_numpy()[:len(closed)].tolist()
                book = second.exchange.market.book(0)
                assert 0 < book.best_bid < book.best_ask
                assert not second.service.silent()
    async def order(url):
        asked = f"symbol=BTCUSDT&side=BUY&type=MARKET&quantity=0.01&timestamp={time.time_ns() // 1_000_000}"
        signed = f"{url}/fapi/v1/order?{asked}&signature={signature('localnet-secret', asked)}"
        async with aiohttp.ClientSession(headers={"X-MBX-APIKEY": "localnet-key"}) as session:
            async with session.post(signed) as told: return await told.json()
    with ExitStack() as stack:
        start = int(times(candles)[6])
        first = stack.enter_context(Localnet({BTC: candles}, start=start, lockstep=False, interval_ms=20))
        follow = Follow(first.url, first.url.replace("http", "ws"), [BTC], interval="1h", patience=patience)
        with Localnet(source=follow) as second:
            asyncio.run(run(first, second))
            assert asyncio.run(order(second.url))["status"] in ("NEW", "FILLED")
            stack.close()
            asyncio.run(until(second.service.silent, "silent"))
            assert asyncio.run(order(second.url))["code"] == -1008


def test_a_localnet_that_follows_goes_on_after_a_stop_with_the_candles_that_it_has_missed(tmp_path):
    candles, patience = ar1(2_000, seed=3), Patience(silence=5., close=.3, pause=.05, reply=5.)
    start = int(times(candles)[6])
    def ask(net, method, path, **asked):
        text = urlencode({"symbol": "BTCUSDT", "timestamp": time.time_ns() // 1_000_000} | asked)
        signed = f"{net.url}/fapi/{path}?{text}&signature={signature('localnet-secret', text)}"
        return json.loads(urlopen(Request(signed, headers={"X-MBX-APIKEY": "localnet-key"}, method=method)).read())
    def following():
        return Localnet(source=Follow(first.url, first.url.replace("http", "ws"), [BTC], "1h", patience),
                        profile="book", memory=tmp_path / "kept.jsonl", limits=OFF)
    def shown(net): return ask(net, "GET", "v1/klines", interval="1h", limit=1000)[:-1]
    def wait_for_candles(net, count):
        while len(shown(net)) < count: time.sleep(.01)
    with Localnet({BTC: candles}, start=start, speed=36_000., limits=OFF) as first:
        with following() as second:
            wait_for_candles(second, 12)
            bought = ask(second, "POST", "v1/order", side="BUY", type="MARKET", quantity="0.01")
            far = ask(second, "POST", "v1/order", side="BUY", type="LIMIT", quantity="0.01", timeInForce="GTC",
                      price=int(.8 * float(shown(second)[-1][4])))
            before, trades = ask(second, "GET", "v3/account"), ask(second, "GET", "v1/userTrades")
        wait_for_candles(first, missed := len(shown(first)) + 5)
        with following() as second:
            assert ask(second, "GET", "v1/userTrades") == trades
            assert ask(second, "GET", "v3/account")["totalWalletBalance"] == before["totalWalletBalance"]
            assert [each["orderId"] for each in ask(second, "GET", "v1/openOrders")] == [far["orderId"]]
            assert bought["orderId"] == trades[0]["orderId"]
            wait_for_candles(second, missed + 5)
            rows = shown(second)
    assert [row[0] for row in rows] == times(candles)[:len(rows)].tolist()
    for row, candle in zip(rows, candles.to_numpy()):
        if not row[0] <= trades[0]["time"] <= row[6]: assert [float(each) for each in row[1:6]] == candle.tolist()
