"localnet with the clients that will use it: ccxt and ccxt.pro over real sockets"
import asyncio
import json
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import aiohttp
import ccxt.pro
import numpy as np
import pandas as pd
import pytest

from tradelab import command
from tradelab.account import funding_amount
from tradelab.events import OPEN
from tradelab.instruments import BITCOIN
from tradelab.localnet.server import Localnet, state_at
from tradelab.localnet.service import milliseconds_now
from tradelab.localnet.sockets import PortInUseError
from tradelab.localnet.sources import Follow
from tradelab.market.candles import frame
from tradelab.settings import CostModel
from tradelab.sim.costs import CONDITION, market_fill

pytestmark = pytest.mark.integration
BTC = "BTC/USDT:USDT"
ETH = "ETH/USDT:USDT"
HOUR = 3_600_000
FIRST = 1_640_995_200_000


def walk(length, level, seed, tick):
    "A random walk whose prices stand on the tick"
    random = np.random.default_rng(seed)
    close = np.round(level * np.exp(np.cumsum(random.normal(0, .01, length))) / tick) * tick
    opened = np.concatenate([[level], close[:-1]]) + tick
    high = np.maximum(opened, close) + 3 * tick
    low = np.minimum(opened, close) - 3 * tick
    return frame(FIRST + np.arange(length) * HOUR,
                 np.round(np.stack([opened, high, low, close, random.uniform(1, 9, length)], 1), 6))


USUAL = np.array([(CostModel().slippage, 0., np.inf)], CONDITION)[0]
CANDLES = {BTC: walk(40, 20_000., 1, .1), ETH: walk(40, 1_500., 2, .01)}
FUNDING = {BTC: pd.Series([.0001, -.0003, .0002, .0004], pd.to_datetime(FIRST + np.arange(1, 5) * 8 * HOUR, unit="ms",
    utc=True))}
INSTRUMENTS = {ETH: replace(BITCOIN, symbol=ETH, price_tick=.01, min_notional=20.)}


def localnet(**options):
    return Localnet(**{"candles": CANDLES, "funding": FUNDING, "instruments": INSTRUMENTS, "start": FIRST + 6 * HOUR}
                    | options)


class Client(ccxt.pro.binanceusdm):
    "ccxt, pointed at localnet as its users point it; closed candles are also put where a test can await them"
    def __init__(self, venue, key="localnet-key", secret="localnet-secret"):
        super().__init__({"apiKey": key, "secret": secret, "enableRateLimit": False})
        self.closed, self.heard = asyncio.Queue(), []
        for name, url in self.urls["api"].items():
            if isinstance(url, str): self.urls["api"][name] = url.replace("https://fapi.binance.com", venue.url)
        self.urls["api"]["ws"]["linear"] = venue.url.replace("http", "ws") + "/ws"
        self.options["fetchCurrencies"] = False
        self.exceptions["exact"].update(self.exceptions["linear"]["exact"])

    def handle_message(self, client, message):
        if isinstance(message, dict) and message.get("k", {}).get("x"):
            self.closed.put_nowait((message["k"]["t"], message["k"]["s"]))
        self.heard.append(message)
        super().handle_message(client, message)


async def done(client, open_time):
    "Say that a candle has all it asked for, as a session in lockstep does"
    socket, = [socket for url, socket in client.clients.items() if "/market" in url]
    await socket.send({"method": "LIST_SUBSCRIPTIONS", "params": [], "id": open_time})


def visit(venue, talk, **keys):
    "Run a conversation with a client of its own, and close it"
    async def run():
        client = Client(venue, **keys)
        try: return await asyncio.wait_for(talk(client), 60)
        finally: await client.close()
    return asyncio.run(run())


def sim(venue): return state_at(venue.url, "localnet-key")


async def connect(client, symbols=(BTC, ETH)):
    "Both streams open, the first frame seen; then ready"
    pairs = [[symbol, "1h"] for symbol in symbols]
    client.held = [asyncio.ensure_future(hold(watch)) for watch in (lambda: client.watch_ohlcv_for_symbols(pairs),
        client.watch_orders)]
    while True:
        await asyncio.sleep(.01)
        kinds = [isinstance(message, dict) and "k" in message for message in client.heard]
        user = [socket for url, socket in client.clients.items() if "/private" in url and socket.connection
                and not socket.connection.closed]
        if sum(kinds) >= len(symbols) and user: return


async def hold(watch):
    while True: await watch()


def disconnect(client):
    for task in client.held: task.cancel()


def test_public_market_data():
    async def talk(client):
        await client.load_markets()
        before = milliseconds_now()
        assert before <= await client.fetch_time() <= milliseconds_now()
        with pytest.raises(ccxt.BadRequest, match="Invalid interval"): await client.fetch_ohlcv(BTC, "1m")
        some = await client.fetch_ohlcv(BTC, "1h", since=FIRST + HOUR, limit=2)
        return await client.fetch_ohlcv(BTC, "1h"), some, await client.fetch_funding_rate(BTC), client.market(ETH)
    with localnet() as venue: rows, part, funding, market = visit(venue, talk)
    assert [row[0] for row in rows] == [FIRST + n * HOUR for n in range(7)]
    assert [row[0] for row in part] == [FIRST + HOUR, FIRST + 2 * HOUR]
    assert np.array_equal([row[1:] for row in rows[:-1]], CANDLES[BTC].to_numpy()[:6])                # the very bits
    assert rows[-1][1:] == [CANDLES[BTC].iloc[6, OPEN]] * 4 + [0] # forming: only its open
    assert funding["markPrice"] == CANDLES[BTC]["close"].iloc[5]
    assert funding["fundingTimestamp"] == FIRST + 8 * HOUR
    assert market["precision"] == {**market["precision"], "amount": .001, "price": .01}
    assert market["limits"]["cost"]["min"] == 20


def test_account_and_settings():
    async def talk(client):
        balance = await client.fetch_balance()
        positions = await client.fetch_positions()
        assert balance["USDT"]["total"] == 10_000
        assert positions == []
        assert (await client.set_leverage(5, BTC))["leverage"] == 5
        assert (await client.fetch_leverage(BTC))["longLeverage"] == 5
        assert (await client.fetch_position_mode(BTC))["hedged"] is False
        assert (await client.fetch_trading_fee(BTC))["taker"] == .0005
        with pytest.raises(ccxt.BadRequest, match="Leverage 500 is not valid"):
            await client.fapiPrivatePostLeverage({"symbol": "BTCUSDT", "leverage": 500})
        with pytest.raises(ccxt.MarginModeAlreadySet):
            await client.fapiPrivatePostMarginType({"symbol": "BTCUSDT", "marginType": "CROSSED"})
        await client.set_margin_mode("isolated", BTC)
        assert (await client.fetch_margin_mode(BTC))["marginMode"] == "isolated"
        with pytest.raises(ccxt.BaseError, match="-4059"): await client.set_position_mode(False)
    with localnet() as venue: visit(venue, talk)


def test_market_orders():
    async def talk(client):
        await client.load_markets()
        bought = await client.create_order(BTC, "market", "buy", .1, params={"clientOrderId": "tl-1"})
        assert bought["status"] == "closed"
        assert bought["filled"] == .1
        assert bought["clientOrderId"] == "tl-1"
        assert bought["average"] is None
        found = await client.fetch_order(None, BTC, {"origClientOrderId": "tl-1"})
        assert found["id"] == bought["id"] == "1"
        assert (await client.fetch_order("1", BTC))["average"] == found["average"]
        held = (await client.fetch_positions())[0]
        assert held["contracts"] == .1
        assert held["side"] == "long"
        assert held["entryPrice"] == found["average"]
        # shrinks to what is held
        sold = await client.create_order(BTC, "market", "sell", .3, params={"reduceOnly": True})
        assert sold["filled"] == .1
        assert await client.fetch_positions() == []
        # the id of a filled order may come again
        await client.create_order(ETH, "market", "sell", 1, params={"clientOrderId": "tl-1"})
        assert (await client.fetch_order(None, ETH, {"origClientOrderId": "tl-1"}))["id"] == "3"
        assert (await client.fetch_positions())[0]["side"] == "short"
        trades = await client.fetch_my_trades(BTC)
        orders = await client.fetch_orders(BTC)
        assert [trade["side"] for trade in trades] == ["buy", "sell"]
        assert [order["id"] for order in orders] == ["1", "2"]
        assert await client.fetch_open_orders(BTC) == []
        return found["average"], trades[0]
    with localnet() as venue:
        price, trade = visit(venue, talk)
        expected, fee = market_fill(.1, CANDLES[BTC].iloc[6, OPEN], 0., USUAL, CostModel().row()[()], BITCOIN.row()[()])
    assert price == trade["price"] == expected
    assert trade["fee"]["cost"] == fee
    assert trade["timestamp"] == FIRST + 6 * HOUR


def test_orders_that_are_refused():
    async def talk(client):
        await client.load_markets()
        async def refused(kind, text, *order, **params):
            with pytest.raises(kind, match=text): await client.create_order(*order, params=params)
        await refused(ccxt.InsufficientFunds, "-2019", BTC, "market", "buy", 50)
        await refused(ccxt.InvalidOrder, "-2022", BTC, "market", "sell", .1, reduceOnly=True)
        await refused(ccxt.InvalidOrder, "-4164.*no smaller than 100", BTC, "market", "buy", .001)
        async def raw(kind, code, **change):
            with pytest.raises(kind, match=code):
                await client.fapiPrivatePostOrder({"symbol": "BTCUSDT", "side": "BUY", "type": "MARKET",
                                                   "quantity": "1"} | change)
        await raw(ccxt.BadRequest, "-1116", type="DANCE", price="20000")
        await raw(ccxt.BaseError, "-4120", type="STOP_MARKET")
        await raw(ccxt.BadSymbol, "-1121", symbol="NOUSDT")
        await raw(ccxt.BadRequest, "-1111", quantity="0.00012")
        await refused(ccxt.BadRequest, "-4015", BTC, "market", "buy", .1, clientOrderId="not valid!")
        await refused(ccxt.BaseError, "-4061", BTC, "market", "buy", .1, positionSide="LONG")
        with pytest.raises(ccxt.OrderNotFound, match="-2013"): await client.fetch_order("77", BTC)
        with pytest.raises(ccxt.OrderNotFound, match="-2011"): await client.cancel_order("77", BTC)
        assert (await client.fapiPrivateDeleteAllOpenOrders({"symbol": "BTCUSDT"}))["code"] == 200
        return await client.fetch_balance()
    with localnet() as venue:
        assert visit(venue, talk)["USDT"]["total"] == 10_000
        assert venue.exchange.accounts["main"].orders == {}
        with pytest.raises(HTTPError) as unknown: urlopen(f"{venue.url}/fapi/v1/nothing")
        assert unknown.value.code == 404
        assert json.loads(unknown.value.read())["code"] == -5000


def test_wrong_keys_and_clocks():
    async def talk(client): await client.fetch_balance()
    async def late(client):
        client.milliseconds = lambda: milliseconds_now() - 20_000
        await client.fetch_balance()
    async def early(client):
        client.milliseconds = lambda: milliseconds_now() + 5_000
        await client.fetch_balance()
    with localnet() as venue:
        with pytest.raises(ccxt.AuthenticationError, match="-2015"): visit(venue, talk, key="somebody")
        with pytest.raises(ccxt.AuthenticationError, match="-2014"): visit(venue, talk, key="not a key!")
        with pytest.raises(ccxt.AuthenticationError, match="-1022"): visit(venue, talk, secret="guessed")
        with pytest.raises(ccxt.InvalidNonce, match="outside of the recvWindow"): visit(venue, late)
        with pytest.raises(ccxt.InvalidNonce, match="1000ms ahead"): visit(venue, early)
        with pytest.raises(HTTPError) as unsigned: urlopen(f"{venue.url}/fapi/v3/account")
        assert unsigned.value.code == 401


def test_events_of_a_fill_arrive_in_order():
    async def talk(client):
        await connect(client)
        balance = asyncio.ensure_future(client.watch_balance())
        await asyncio.sleep(0)
        await client.create_order(BTC, "market", "buy", .1, params={"clientOrderId": "tl-1"})
        total = (await balance)["USDT"]["total"]
        while not [message for message in client.heard if message.get("e") == "ORDER_TRADE_UPDATE"
                   and message["o"]["X"] == "FILLED"]:
            await asyncio.sleep(.01)
        disconnect(client)
        return total, [message for message in client.heard if message.get("e", "kline") != "kline"]
    with localnet() as venue:
        total, events = visit(venue, talk)
        assert [event["e"] for event in events] == ["ORDER_TRADE_UPDATE", "TRADE_LITE", "ACCOUNT_UPDATE",
                                                    "ORDER_TRADE_UPDATE"]
        trade = events[-1]["o"]
        assert (trade["c"], trade["x"], trade["l"], trade["N"]) == ("tl-1", "TRADE", "0.1", "USDT")
        assert events[-1]["T"] == FIRST + 6 * HOUR
        assert np.isclose(total, 10_000 - float(trade["n"]), rtol=0, atol=1e-8)
        assert len(trade["n"].partition(".")[2]) == 8


@pytest.mark.parametrize("sleep", [0., .1])
def test_lockstep_gives_every_candle_once_and_in_order(sleep):
    async def talk(client):
        await connect(client)
        seen, count = [], 33 if not sleep else 8
        await done(client, FIRST + 5 * HOUR)                                 # ready
        while len(seen) < 2 * count:
            for _ in range(2): seen.append(await client.closed.get())
            await asyncio.sleep(sleep)
            await client.create_order(BTC, "market", "buy" if len(seen) % 4 else "sell", .01)
            await asyncio.sleep(sleep)
            if len(seen) < 2 * count: await done(client, seen[-1][0])
        disconnect(client)
        return seen
    with localnet() as venue:
        seen, state = visit(venue, talk), sim(venue)
        assert seen == [(FIRST + (6 + n) * HOUR, name) for n in range(len(seen) // 2)
                        for name in ("BTCUSDT", "ETHUSDT")]
        opens = CANDLES[BTC].iloc[7:, OPEN] # decided at a close, filled at the next open
        for n, trade in enumerate(venue.exchange.accounts["main"].trades):
            expected, _ = market_fill(trade.quantity, opens.iloc[n], 0., USUAL, CostModel().row()[()],
                                      BITCOIN.row()[()])
            assert trade.price == expected
            assert trade.time == FIRST + (7 + n) * HOUR
        assert state["steps"] == 1 + len(seen) // 2 # the first one opens the market
        assert state["left"] == 33 - len(seen) // 2
        assert not state["finished"]


def test_money_adds_up_with_funding():
    async def talk(client):
        await connect(client)
        await client.create_order(BTC, "market", "buy", .2)
        await done(client, FIRST + 5 * HOUR)
        for n in range(33):
            await client.closed.get()
            open_time, _ = await client.closed.get()
            if n % 5 == 0: await client.create_order(BTC, "market", "sell" if n % 2 else "buy", .1 if n % 2 else .05)
            if n == 10: await client.create_order(ETH, "market", "sell", 2)
            await done(client, open_time)
        disconnect(client)
        incomes = await client.fapiPrivateGetIncome({"limit": 1000})
        return incomes, await client.fapiPrivateV3GetAccount(), client.heard, await client.fetch_funding_history(BTC)
    with localnet() as venue:
        incomes, account, heard, history = visit(venue, talk)
        assert venue.finished.wait(5)
        assert sim(venue)["finished"]
        assert np.isclose(sum(float(row["income"]) for row in incomes), float(account["totalWalletBalance"]), rtol=0,
                          atol=1e-6)
        assert np.isclose(float(account["totalMarginBalance"]), float(account["totalWalletBalance"])
                          + float(account["totalUnrealizedProfit"]), rtol=0, atol=1e-7)
        assert account["totalWalletBalance"] == f"{venue.exchange.accounts['main'].wallet():.8f}"
    paid = [event for event in heard if event.get("e") == "ACCOUNT_UPDATE" and event["a"]["m"] == "FUNDING_FEE"]
    assert [update["T"] for update in paid] == [FIRST + 8 * n * HOUR for n in range(1, 5)] == [row["timestamp"]
        for row in history]
    assert [update["a"]["B"][0]["bc"] for update in paid] == [row["info"]["income"] for row in history]
    assert all(update["a"]["S"] == "BTCUSDT" for update in paid)
    held = .2 + .05
    close = CANDLES[BTC]["close"].iloc[7] # funding at 08:00 is valued at the close of the candle of 07:00
    assert float(history[0]["info"]["income"]) == funding_amount(held, close, .0001)
    money, told = 10_000., 10_000.
    for event in (event for event in heard if event.get("e") in ("ACCOUNT_UPDATE", "ORDER_TRADE_UPDATE")):
        if event["e"] == "ACCOUNT_UPDATE":
            told = float(event["a"]["B"][0]["wb"])
            money = money + float(event["a"]["B"][0]["bc"])
        elif event["o"]["x"] == "TRADE": money += float(event["o"]["rp"]) - float(event["o"]["n"])
        if event.get("o", {}).get("x") == "TRADE" or event.get("a", {}).get("m") == "FUNDING_FEE":
            assert np.isclose(money, told, rtol=0, atol=1e-6)


def test_the_market_waits_between_two_sessions():
    async def three(client):
        await connect(client)
        seen = []
        for _ in range(3):
            await done(client, sim(venue)["step"])
            seen.append((await client.closed.get())[0])
            await client.closed.get()
        disconnect(client)
        return seen
    async def only_look(client): return await client.fetch_balance()
    with localnet() as venue:
        first = visit(venue, three)
        for _ in range(3): visit(venue, only_look) # who only asks lets nothing close
        assert first + visit(venue, three) == [FIRST + (6 + n) * HOUR for n in range(6)]


def test_a_name_that_is_lost_repeated_or_wrong_lets_no_candle_pass_that_nobody_saw():
    async def talk(client):
        await connect(client)
        for hour in (0, 5, 5, 5, 9): await done(client, FIRST + hour * HOUR)
        seen = [await client.closed.get() for _ in range(2)]
        for _ in range(20): await done(client, FIRST + 5 * HOUR) # more than ten frames a second
        await client.fetch_balance()
        assert not any(task.done() for task in client.held)
        disconnect(client)
        return seen, client.closed.qsize()
    with localnet() as venue:
        assert visit(venue, talk) == ([(FIRST + 6 * HOUR, name) for name in ("BTCUSDT", "ETHUSDT")], 0)
        assert sim(venue)["steps"] == 2


def test_plain_ccxt_sees_candles_move():
    async def talk(client):
        first = await client.watch_ohlcv(BTC, "1h")
        orders = asyncio.ensure_future(hold(client.watch_orders))
        while not sim(venue)["session"]: await asyncio.sleep(.01)
        second = first
        await done(client, FIRST + 5 * HOUR)
        while second[-1][0] == first[-1][0]:
            second = await client.watch_ohlcv(BTC, "1h")
            await done(client, sim(venue)["step"])
        orders.cancel()
        return first[-1][0], second[-1][0]
    with localnet() as venue: first, second = visit(venue, talk)
    assert first == FIRST + 6 * HOUR < second                 # one candle may pass unseen while ccxt tells of another
    assert second % HOUR == 0


def test_out_of_lockstep_candles_come_by_the_clock():
    async def talk(client):
        await connect(client)
        seen = [await client.closed.get() for _ in range(10)]
        disconnect(client)
        return seen
    with localnet(interval_ms=5) as venue:
        assert [time for time, _ in visit(venue, talk)[::2]] == [FIRST + (6 + n) * HOUR for n in range(5)]


def test_a_listen_key_lives_until_it_is_closed():
    async def talk(client):
        with pytest.raises(ccxt.AuthenticationError, match="-1125"): await client.fapiPrivatePutListenKey()
        first = await client.fapiPrivatePostListenKey()
        again = await client.fapiPrivatePostListenKey()
        assert first == again == await client.fapiPrivatePutListenKey()
        await connect(client)
        await client.fapiPrivateDeleteListenKey()
        while sim(venue)["session"]: await asyncio.sleep(.01)
        disconnect(client)
        assert await client.fapiPrivatePostListenKey() != first
        async with client.session.ws_connect(venue.url.replace("http", "ws")
                                             + "/private/ws?listenKey=nobody") as socket:
            await socket.receive()
            assert socket.close_code == 1008
    with localnet() as venue: visit(venue, talk)


def test_all_paths_of_sockets():
    async def talk(client):
        await client.load_markets()
        base = venue.url.replace("http", "ws")
        hello = {"method": "SUBSCRIBE", "params": ["btcusdt@kline_1h"], "id": "x"}
        key = (await client.fapiPrivatePostListenKey())["listenKey"]
        for path in ("/ws", "/ws/", "/ws/any/tail", "/market/ws/0", "/public/ws/2", f"/private/ws?listenKey={key}",
                     f"/ws/{key}", "/market/stream",
                     "/stream?streams=ethusdt@markPrice"):
            async with client.session.ws_connect(base + path) as socket:
                if "streams=" in path: assert (await socket.receive_json())["data"]["e"] == "markPriceUpdate"
                await socket.send_json(hello)
                assert await socket.receive_json() == {"result": None, "id": "x"}
                event = await socket.receive_json()
                assert ((event["stream"] == "btcusdt@kline_1h" and event["data"]["k"]["x"] is False)
                        if "/stream" in path else event["k"]["t"] == FIRST + 6 * HOUR)
                await socket.send_json({"method": "UNSUBSCRIBE", "params": ["btcusdt@kline_1h"], "id": 2})
                await socket.send_json({"method": "SUBSCRIBE", "params": ["btcusdt@nothing"], "id": 3})
                assert (await socket.receive_json())["id"] == 2
                assert (await socket.receive_json())["error"]["code"] == 2
    with localnet() as venue: visit(venue, talk)


def test_the_same_requests_get_the_same_replies():
    async def talk(client):
        await client.load_markets()
        order = {"symbol": "BTCUSDT", "type": "MARKET", "newOrderRespType": "RESULT"}
        orders = [await client.fapiPrivatePostOrder(order | {"side": side, "quantity": size, "newClientOrderId": side})
                  for side, size in (("BUY", "0.1"), ("SELL", "0.25"))]
        trades = await client.fapiPrivateGetUserTrades({"symbol": "BTCUSDT"})
        return *orders, trades, await client.fapiPrivateV3GetAccount()
    runs = []
    for _ in range(2):
        with localnet() as venue: runs.append(visit(venue, talk))
    assert runs[0] == runs[1]
    assert [order["orderId"] for order in runs[0][:2]] == [1, 2]


def test_the_classic_profile_still_tells_the_price():
    async def talk(client):
        await client.load_markets()
        return await client.create_order(BTC, "market", "buy", .1)
    with localnet(order_reply="classic") as venue: assert visit(venue, talk)["average"] > 0


def test_one_localnet_follows_another():
    async def trades(net, count):
        async with aiohttp.ClientSession(net.url) as http, http.ws_connect("/market/ws/btcusdt@aggTrade") as socket:
            heard = [await asyncio.wait_for(socket.receive_json(), 20) for _ in range(count)]
            return [tuple(trade[name] for name in "spqm") for trade in heard]
    async def run():
        async with Localnet() as leader:
            follow = Follow(leader.url, leader.url.replace("http", "ws"), leader.source.symbols)
            async with Localnet(source=follow) as follower:
                return await asyncio.gather(trades(leader, 3), trades(follower, 1))
    there, here = asyncio.run(run())
    assert here[0] in there


def test_bad_input_and_a_clean_end():
    with localnet() as venue:
        in_use = f"port {venue.port} on 127.0.0.1 is in use: stop what listens there, or choose another port"
        with pytest.raises(PortInUseError, match=in_use), localnet(port=venue.port): pass
        with pytest.raises(HTTPError) as unknown: urlopen(f"{venue.url}/fapi/v1/klines?symbol=XYZUSDT&interval=1h")
        assert json.loads(unknown.value.read()) == {"code": -1121, "msg": "Invalid symbol."}
    assert not [thread for thread in threading.enumerate() if thread.name == "localnet"]
    with localnet(port=venue.port): pass                                     # the port is free again
    with pytest.raises(ValueError, match="start must be the open time of a candle"): localnet(start=FIRST + 39 * HOUR)


def test_who_serves_a_localnet_ends_when_its_market_fails(monkeypatch):
    "A process that only waited for signals would stay for ever, with nothing behind its port"
    server, begun = localnet(), threading.Event()
    async def fails():
        server.hall.opened.set()
        await asyncio.to_thread(begun.wait)
        raise ArithmeticError("the market broke")
    monkeypatch.setattr(server.hall, "play", fails)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(command.click, "echo", lambda sentence: begun.set())
    with pytest.raises(ArithmeticError, match="the market broke"), server: command.serve(server, "it listens")


def test_in_the_foreground_until_a_signal():
    program = "from test_localnet import localnet; localnet().run_forever()"
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent, stdout=subprocess.PIPE,
                          text=True) as process:
        url = process.stdout.readline().split()[3]
        assert json.loads(urlopen(f"{url}/fapi/v1/ping").read()) == {}
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "localnet has stopped\n"
        assert process.wait(20) == 0


# ---- shapes, against Binance's own examples ----

EXAMPLES = {
    "account_information_v2": ("fapiPrivateV2GetAccount", {}),
    "account_information_v3": ("fapiPrivateV3GetAccount", {}),
    "account_trade_list": ("fapiPrivateGetUserTrades", "symbol"),
    "all_orders": ("fapiPrivateGetAllOrders", "symbol"),
    "change_initial_leverage": ("fapiPrivatePostLeverage", {"symbol": "BTCUSDT", "leverage": 9}),
    "cancel_all_open_orders": ("fapiPrivateDeleteAllOpenOrders", "symbol"),
    "check_server_time": ("fapiPublicGetTime", {}),
    "exchange_information": ("fapiPublicGetExchangeInfo", {}),
    "futures_account_balance_v2": ("fapiPrivateV2GetBalance", {}),
    "futures_account_balance_v3": ("fapiPrivateV3GetBalance", {}),
    "futures_account_configuration": ("fapiPrivateGetAccountConfig", {}),
    "get_current_multi_assets_mode": ("fapiPrivateGetMultiAssetsMargin", {}),
    "get_current_position_mode": ("fapiPrivateGetPositionSideDual", {}),
    "get_funding_rate_history": ("fapiPublicGetFundingRate", {}),
    "get_income_history": ("fapiPrivateGetIncome", {}),
    "keepalive_user_data_stream": ("fapiPrivatePutListenKey", {}),
    "kline_candlestick_data": ("fapiPublicGetKlines", {"symbol": "BTCUSDT", "interval": "1h"}),
    "mark_price": ("fapiPublicGetPremiumIndex", "symbol"),
    "new_order": ("fapiPrivatePostOrder", {"symbol": "BTCUSDT", "side": "BUY", "type": "MARKET", "quantity": "0.01"}),
    "notional_and_leverage_brackets": ("fapiPrivateGetLeverageBracket", {}),
    "position_information_v2": ("fapiPrivateV2GetPositionRisk", {}),
    "position_information_v3": ("fapiPrivateV3GetPositionRisk", {}),
    "query_order": ("fapiPrivateGetOrder", {"symbol": "BTCUSDT", "orderId": 1}),
    "start_user_data_stream": ("fapiPrivatePostListenKey", {}),
    "symbol_configuration": ("fapiPrivateGetSymbolConfig", "symbol"),
    "user_commission_rate": ("fapiPrivateGetCommissionRate", "symbol"),
}
NOT_HERE = {"activatePrice", "priceRate"}      # of trailing stops
FILTERS = "symbols.filters"                    # the example merges all filters into one


def differences(example, served, where=""):
    "Fields of the example that are missing, or of another JSON type"
    if type(example) is not type(served) and not {type(example), type(served)} <= {int, float}:
        return [f"{where}: {type(served).__name__}, not {type(example).__name__}"]
    if isinstance(example, list) and example and served: return differences(example[0], served[0], where)
    if isinstance(example, list):
        return [] if not example or where.endswith(("Filters", "SubType")) else [f"{where}: empty"]
    if not isinstance(example, dict) or where.endswith(FILTERS): return []
    return [problem for name, value in example.items() if name not in NOT_HERE
            for problem in ([f"{where}.{name}: missing"] if name not in served else differences(value, served[name],
        f"{where}.{name}"))]


@pytest.fixture(scope="module")
def fixtures(shared):
    if not (shared / "fixtures/binance").exists():
        pytest.skip(f"Binance's examples are absent: {shared / 'fixtures/binance'}")
    return shared / "fixtures/binance"


def test_replies_have_the_fields_and_types_of_the_examples(fixtures):
    async def talk(client):
        client.parse_number_json, problems = None, {}
        client.on_rest_response = lambda code, reason, url, method, headers, body, *_: body
        await client.load_markets()
        await client.fapiPrivatePostListenKey()
        await client.create_order(BTC, "market", "buy", .1)
        for name, (method, asked) in EXAMPLES.items():
            await getattr(client, method)({"symbol": "BTCUSDT"} if asked == "symbol" else dict(asked))
            example = json.loads((fixtures / f"binance_sdk_examples/rest_api/{name}.json").read_text())
            if found := differences(example, json.loads(client.last_http_response)): problems[name] = found
        return problems
    with localnet(start=FIRST + 9 * HOUR) as venue: assert visit(venue, talk) == {}


def test_events_have_the_fields_and_types_of_the_schemas(fixtures):
    schemas = json.loads((fixtures / "schemas/binance_sdk_18.0.1_fields.json").read_text())["websocket_streams"]
    kinds = {"str": str, "int": int, "bool": bool}
    optional = {"additional_properties", "S", "M", "AP", "cr", "N", "n"}

    def problems(event, model):
        fields = {name: kind for name, (kind, _) in schemas[model].items() if kind in kinds}
        missing = [name for name in fields if name not in event and name not in optional]
        return (missing + [name for name, kind in fields.items() if not isinstance(event.get(name, kinds[kind]()),
            kinds[kind])])

    async def talk(client):
        await connect(client)
        await client.fapiPrivatePostOrder({"symbol": "BTCUSDT", "side": "BUY", "type": "MARKET", "quantity": "0.1"})
        await client.watch_mark_price(BTC)
        await client.fetch_balance()
        for socket in [socket for url, socket in client.clients.items() if "/market/ws/0" in url]:
            await socket.send({"method": "LIST_SUBSCRIPTIONS", "params": [], "id": FIRST + 5 * HOUR})
        await client.closed.get()
        disconnect(client)
        return client.heard
    with localnet() as venue: heard = visit(venue, talk)
    events = {event["e"]: event for event in heard if "e" in event}
    assert problems(events["kline"], "KlineCandlestickStreamsResponse") == problems(events["kline"]["k"],
        "KlineCandlestickStreamsResponseK") == []
    assert problems(events["ORDER_TRADE_UPDATE"]["o"], "OrderTradeUpdateO") == problems(events["TRADE_LITE"],
        "TradeLite") == []
    update = events["ACCOUNT_UPDATE"]["a"]
    assert problems(update["B"][0], "AccountUpdateABInner") == problems(update["P"][0],
        "AccountUpdateAPInner") == problems(events["ACCOUNT_UPDATE"], "AccountUpdate") == []
    assert problems(events["markPriceUpdate"], "MarkPriceStreamResponse") == []
