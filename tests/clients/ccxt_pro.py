"ccxt.pro at localnet, by its sockets: python ccxt_pro.py URL KEY SECRET"
import asyncio

import ccxt.pro as ccxt
from steps import EVENTS, MOST, check, code_of, held, venue

BTC = "BTC/USDT:USDT"


class Client(ccxt.binanceusdm):
    "ccxt.pro, pointed at localnet; what comes by its sockets is kept"
    def __init__(self):
        url, key, secret = venue()
        super().__init__({"apiKey": key, "secret": secret, "enableRateLimit": False})
        self.heard = []
        for name, value in self.urls["api"].items():
            if isinstance(value, str): self.urls["api"][name] = value.replace("https://fapi.binance.com", url)
        self.urls["api"]["ws"]["linear"] = url.replace("http", "ws") + "/ws"
        self.urls["api"]["ws"]["ws-api"]["linear"] = url.replace("http", "ws") + "/ws-fapi/v1"
        self.options["fetchCurrencies"] = False
        self.exceptions["exact"].update(self.exceptions["linear"]["exact"])

    def handle_message(self, client, message):
        self.heard.append(message)
        super().handle_message(client, message)


async def refused(asked)->str:
    try: await asked
    except ccxt.BaseError as error: return str(error)
    return "nothing was refused"


async def shown(client)->tuple:
    "Candles and book as the streams show them; price and size of the best ask"
    await client.load_markets()
    held("load", BTC in client.markets)
    held("candles", await client.watch_ohlcv(BTC, "1m"))
    book = await client.watch_order_book(BTC)
    return book["asks"][0]


async def orders(client, events)->None:
    held("leverage", (await client.set_leverage(10, BTC))["leverage"] == 10)
    bought = await client.create_order_ws(BTC, "market", "buy", .02)
    while True:
        order = (await events())
        if order["id"] == bought["id"] and order["status"] == "closed": break
    held("market", abs(order["filled"] - .02) < 1e-9)
    price, size = (await client.fetch_order_book(BTC, 5))["asks"][0]
    waiting = await client.create_order_ws(BTC, "limit", "buy", .02, float(client.price_to_precision(BTC, .9 * price)))
    held("limit", (await client.fetch_order_ws(waiting["id"], BTC))["status"] == "open")
    amount = float(client.amount_to_precision(BTC, size + .01))
    crossing = await client.create_order_ws(BTC, "limit", "buy", amount, price)
    while True:
        order = await events()
        if order["id"] == crossing["id"] and order["filled"]: break
    held("partial fill", abs(order["filled"] - size) < 1e-9 and order["status"] == "open")
    for order in (waiting, crossing): await client.cancel_order_ws(order["id"], BTC)
    held("cancel", [(await client.fetch_order_ws(order["id"], BTC))["status"] for order in (waiting, crossing)]
         == ["canceled", "canceled"])


async def protection(client)->None:
    price = (await client.fetch_ticker(BTC))["last"]
    stop = await client.create_order(BTC, "STOP_MARKET", "sell", .02, None, {
        "stopLossPrice": client.price_to_precision(BTC, .8 * price), "reduceOnly": True})
    await client.cancel_order(stop["id"], BTC, {"trigger": True})
    size = (await client.fetch_positions([BTC]))[0]["contracts"]
    while not any(event.get("e") == "ALGO_UPDATE" and event["o"]["X"] == "CANCELED" for event in heard(client)):
        await asyncio.sleep(.01)
    held("conditional")
    await client.create_order_ws(BTC, "market", "sell", size, None, {"reduceOnly": True})
    held("reduce-only", not await client.fetch_positions([BTC]))


def heard(client)->list: return [event for event in client.heard if isinstance(event, dict)]


async def mistakes(client)->None:
    price = (await client.fetch_ticker(BTC))["last"]
    limit = float(client.price_to_precision(BTC, .9 * price))
    code_of([await refused(client.fapiPublicGetKlines({"symbol": "NOTUSDT", "interval": "1m"})),
             await refused(client.cancel_order_ws("123456789", BTC)),
             await refused(client.create_order_ws(BTC, "limit", "buy", MOST, limit)),
             await refused(client.create_order_ws(BTC, "market", "sell", .01, None, {"reduceOnly": True})),
             await refused(client.create_order_ws(BTC, "limit", "buy", .001, limit))])
    held("errors")


async def main()->None:
    client, queue = Client(), asyncio.Queue()
    async def watch():
        while True:
            for order in await client.watch_orders(): queue.put_nowait(order)
    try:
        await shown(client)
        watching = asyncio.ensure_future(watch())
        while not any("/private" in url for url in client.clients): await asyncio.sleep(.01)
        await asyncio.gather(*(each.connected for url, each in client.clients.items() if "/private" in url))
        await orders(client, queue.get)
        await protection(client)
        kinds = {event.get("e") for event in heard(client)}
        check(kinds >= EVENTS, EVENTS - kinds)
        held("user events")
        await mistakes(client)
        watching.cancel()
    finally: await client.close()


asyncio.run(main())
