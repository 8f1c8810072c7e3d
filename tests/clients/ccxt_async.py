"ccxt (async) at localnet: python ccxt_async.py URL KEY SECRET"
import asyncio

import ccxt.async_support as ccxt
from steps import MOST, check, code_of, held, venue

BTC = "BTC/USDT:USDT"


def client()->ccxt.binanceusdm:
    url, key, secret = venue()
    client = ccxt.binanceusdm({"apiKey": key, "secret": secret, "enableRateLimit": False})
    for name, value in client.urls["api"].items():
        if isinstance(value, str): client.urls["api"][name] = value.replace("https://fapi.binance.com", url)
    client.options["fetchCurrencies"] = False
    client.exceptions["exact"].update(client.exceptions["linear"]["exact"])
    return client


async def refused(asked)->str:
    "The message of a request that is refused"
    try: await asked
    except ccxt.BaseError as error: return str(error)
    return "nothing was refused"


async def prices(client)->None:
    await client.load_markets()
    held("load", BTC in client.markets)
    candles = await client.fetch_ohlcv(BTC, "1m")
    held("candles", candles and all(low <= opened <= high for _, opened, high, low, *_ in candles))


async def orders(client)->None:
    book = await client.fetch_order_book(BTC, 5)
    price, size = book["asks"][0]
    held("leverage", (await client.set_leverage(10, BTC))["leverage"] == 10)
    bought = await client.create_order(BTC, "market", "buy", .02)
    bought = await client.fetch_order(bought["id"], BTC)
    check(bought["status"] == "closed", bought)
    held("market", (await client.fetch_positions([BTC]))[0]["contracts"] == .02)
    waiting = await client.create_order(BTC, "limit", "buy", .02, client.price_to_precision(BTC, .9 * price))
    held("limit", [order["id"] for order in await client.fetch_open_orders(BTC)] == [waiting["id"]])
    price, size = (await client.fetch_order_book(BTC, 5))["asks"][0]
    crossing = await client.create_order(BTC, "limit", "buy", client.amount_to_precision(BTC, size + .01), price)
    part = await client.fetch_order(crossing["id"], BTC)
    check(abs(part["filled"] - size) < 1e-9, part, size)
    held("partial fill", part["info"]["status"] == "PARTIALLY_FILLED")
    for order in (waiting, crossing): await client.cancel_order(order["id"], BTC)
    statuses = [(await client.fetch_order(order["id"], BTC))["status"] for order in (waiting, crossing)]
    held("cancel", statuses == ["canceled", "canceled"] and not await client.fetch_open_orders(BTC))


async def protection(client)->None:
    price = (await client.fetch_ticker(BTC))["last"]
    stop = await client.create_order(BTC, "STOP_MARKET", "sell", .02, None, {
        "stopLossPrice": client.price_to_precision(BTC, .8 * price), "reduceOnly": True})
    listed = await client.fetch_open_orders(BTC, params={"trigger": True})
    check([order["id"] for order in listed] == [stop["id"]], listed)
    await client.cancel_order(stop["id"], BTC, {"trigger": True})
    held("conditional", not await client.fetch_open_orders(BTC, params={"trigger": True}))
    size = (await client.fetch_positions([BTC]))[0]["contracts"]
    await client.create_order(BTC, "market", "sell", size, None, {"reduceOnly": True})
    held("reduce-only", not await client.fetch_positions([BTC]))


async def mistakes(client)->None:
    price = (await client.fetch_ticker(BTC))["last"]
    code_of([await refused(client.fapiPublicGetKlines({"symbol": "NOTUSDT", "interval": "1m"})),
             await refused(client.cancel_order("123456789", BTC)),
             await refused(client.create_order(BTC, "limit", "buy", MOST, client.price_to_precision(BTC, price))),
             await refused(client.create_order(BTC, "market", "sell", .01, None, {"reduceOnly": True})),
             await refused(client.create_order(BTC, "limit", "buy", .001, client.price_to_precision(BTC, .9 * price)))])
    held("errors")


async def main()->None:
    exchange = client()
    try:
        for part in (prices, orders, protection): await part(exchange)
        trades = await exchange.fetch_my_trades(BTC)
        held("user events", len(trades) >= 3 and all(trade["fee"]["cost"] > 0 for trade in trades))   # by REST here
        await mistakes(exchange)
    finally: await exchange.close()


asyncio.run(main())
