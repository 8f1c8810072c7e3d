"""How fast localnet is, over real sockets: `python benchmarks/localnet.py [name ...]`, all of them by default.

round_trip  an order by a raw client and by ccxt while 20 symbols stream, and again after 100,000 orders
throughput  orders a second, 32 in flight, order limits off
streams     10 clients with 50 streams each: frames sent and received
day         24 hours of 1m candles of 20 symbols: seconds and growth of memory
candle      one candle of one symbol in process, without sockets, and an order in each
"""
import asyncio
import hashlib
import hmac
import json
import resource
import statistics
import sys
import time
from itertools import product
from urllib.parse import urlencode

import aiohttp
import ccxt.async_support as ccxt

from tradelab.localnet.limits import LimitSettings
from tradelab.localnet.server import ENDPOINTS, Localnet, Terms, make_exchange
from tradelab.localnet.sources import Replay
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1
from tradelab.settings import CostModel

OFF = LimitSettings(enforced=False)
KEY, SECRET = "benchmark-key", "benchmark-secret"
SYMBOLS = [f"{chr(65 + n // 26)}{chr(65 + n % 26)}C/USDT:USDT" for n in range(20)]
MINUTES = 1_440


def market(count=MINUTES + 100):
    "SYNTHETIC candles of 1 minute for 20 symbols"
    return {symbol: ar1(count, seed=seed, timeframe="1m") for seed, symbol in enumerate(SYMBOLS)}


def server(candles, **options):
    return Localnet(candles, api_key=KEY, api_secret=SECRET, **options)


def order_body(side, quantity="0.01", symbol="AACUSDT", **more):
    asked = {"symbol": symbol, "side": side, "type": "MARKET", "quantity": quantity, "newOrderRespType": "RESULT",
             "timestamp": int(time.time() * 1000), "recvWindow": 10_000, **more}
    text = urlencode(asked)
    return f"{text}&signature={hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).hexdigest()}"


class Raw:
    "HTTP/1.1 over one kept-alive socket, nothing else"

    async def open(self, url):
        host, port = url.removeprefix("http://").split(":")
        self.reader, self.writer = await asyncio.open_connection(host, int(port))
        return self

    async def post(self, body, path="/fapi/v1/order"):
        self.writer.write(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-MBX-APIKEY: {KEY}\r\nContent-Type: "
                          f"application/x-www-form-urlencoded\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        reply = json.loads(await self.reader.readexactly(length))
        if "orderId" not in reply: raise RuntimeError(reply)

    def close(self): self.writer.close()


async def timed(send, count):
    "Milliseconds of each call"
    taken = []
    for number in range(count):
        begin = time.perf_counter()
        await send("BUY" if number % 2 == 0 else "SELL")
        taken.append((time.perf_counter() - begin) * 1000)
    return taken


def told(name, taken):
    ordered = sorted(taken)
    print(f"{name:44} {statistics.median(ordered):8.2f} {ordered[int(len(ordered) * .99)]:8.2f}", flush=True)


async def listen(session, url, streams, heard):
    "Read a combined socket until it is closed"
    address = f"{url.replace('http', 'ws')}/stream?streams={'/'.join(streams)}"
    async with session.ws_connect(address, max_msg_size=0) as socket:
        heard.append(0)
        number = len(heard) - 1
        async for message in socket:
            if message.type is aiohttp.WSMsgType.TEXT: heard[number] += 1


async def while_streaming(url, work, streams=("kline_1m", "bookTicker", "aggTrade")):
    "Do something while all symbols stream to one reader"
    names = [symbol.split("/")[0].lower() + "usdt@" + kind for symbol in SYMBOLS for kind in streams]
    heard = []
    async with aiohttp.ClientSession() as session:
        reader = asyncio.ensure_future(listen(session, url, names, heard))
        await work()
        reader.cancel()
    return sum(heard)


def client_of(url):
    client = ccxt.binanceusdm({"apiKey": KEY, "secret": SECRET, "enableRateLimit": False})
    for name, address in client.urls["api"].items():
        if isinstance(address, str): client.urls["api"][name] = address.replace("https://fapi.binance.com", url)
    client.options["fetchCurrencies"] = False
    return client


def round_trip():
    print(f"{'ms for one order, 20 symbols streaming':44} {'median':>8} {'99 %':>8}")
    with server(market(), lockstep=False, speed=60, limits=OFF, deposit=1e9) as venue: # for the fees
        async def work(prefix="", many=2_000):
            raw = await Raw().open(venue.url)
            async def direct(side): await raw.post(order_body(side))
            told(f"{prefix}raw client", await timed(direct, many))
            client = client_of(venue.url)
            await client.load_markets()
            async def through(side): await client.create_order("AAC/USDT:USDT", "market", side.lower(), .01)
            told(f"{prefix}ccxt", await timed(through, many // 4))
            await client.close()
            raw.close()
        asyncio.run(while_streaming(venue.url, work))
        asyncio.run(send_many(venue.url, 100_000))
        asyncio.run(while_streaming(venue.url, lambda: work("after 100,000 orders, ")))


async def send_many(url, count, at_once=32):
    "Orders over that many sockets; seconds"
    left = iter(range(count))
    async def worker():
        raw = await Raw().open(url)
        for number in left: await raw.post(order_body("BUY" if number % 2 == 0 else "SELL"))
        raw.close()
    begin = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return time.perf_counter() - begin


def throughput():
    with server(market(200), lockstep=False, speed=60, limits=OFF) as venue:
        asyncio.run(send_many(venue.url, 500))
        taken = asyncio.run(send_many(venue.url, 5_000))
    print(f"orders a second with 32 in flight: {5_000 / taken:,.0f}")


def streams():
    kinds = ("kline_1m", "bookTicker", "aggTrade", "markPrice@1s", "depth5")
    names = [symbol.split("/")[0].lower() + "usdt@" + kind for symbol in SYMBOLS for kind in kinds][:50]
    with server(market(160), lockstep=False, speed=600) as venue:
        async def work():
            heard = []
            async with aiohttp.ClientSession() as session:
                readers = [asyncio.ensure_future(listen(session, venue.url, names, heard)) for _ in range(10)]
                while not venue.finished.is_set(): await asyncio.sleep(.1)
                await asyncio.sleep(.5)
                for reader in readers: reader.cancel()
            return heard
        heard = asyncio.run(work())
    print(f"10 clients x 50 streams: {min(heard):,} to {max(heard):,} frames a client, {sum(heard):,} in all")


def day():
    with server(market(), lockstep=False, speed=100_000) as venue:
        async def work():
            while not venue.finished.is_set(): await asyncio.sleep(.1)
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        frames = asyncio.run(while_streaming(venue.url, work))
        taken = time.perf_counter() - begin
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"24 hours of 1m candles of 20 symbols: {taken:.1f} s, {frames:,} frames, memory grew by {grown:.0f} MiB")


def candle():
    "Under `all costs` a book has impact, and an order walks through some ten of its levels: ten fills"
    print(f"{'ms for a candle and an order, no sockets':44} {'median':>8} {'99 %':>8}")
    order = {"symbol": "AACUSDT", "type": "MARKET", "quantity": "0.01"}
    candles = {SYMBOLS[0]: ar1(5_000, seed=0, timeframe="1m")}
    for profile, (name, costs) in product(("backtest", "book"), (("usual costs", CostModel()),
                                                                 ("all costs", CostModel.realistic()))):
        source = Replay(candles, start=int(times(candles[SYMBOLS[0]])[costs.warm_up]))
        exchange, taken = make_exchange(source, Terms(profile=profile, costs=costs)), []
        steps = list(source.steps())
        for number, moves in enumerate(steps):
            begin = time.perf_counter()
            exchange.step(moves)
            asked = order | {"side": "BUY" if number % 2 == 0 else "SELL"}
            if number < len(steps) - 1:
                ENDPOINTS["POST", "v1/order"].reply(exchange, exchange.accounts["main"], asked)
            exchange.take_events()
            exchange.market.take_events()
            taken.append((time.perf_counter() - begin) * 1000)
        told(f"{profile}, {name}", taken[500:])


MEASURES = {each.__name__: each for each in (round_trip, throughput, streams, day, candle)}

if __name__ == "__main__":
    for name in sys.argv[1:] or MEASURES: MEASURES[name]()
