"python-binance at localnet: python python_binance.py URL KEY SECRET"
import asyncio

from binance import AsyncClient, BinanceSocketManager
from binance.exceptions import BinanceAPIException
from steps import EVENTS, MOST, check, code_of, held, venue

BTC = {"symbol": "BTCUSDT"}


def client()->AsyncClient:
    "A client pointed at localnet; it is not made by `create`, which asks the real exchange"
    url, key, secret = venue()
    AsyncClient.FUTURES_URL, AsyncClient.FUTURES_DATA_URL = url + "/fapi", url + "/futures/data"
    BinanceSocketManager.FSTREAM_URL = url.replace("http", "ws") + "/"
    return AsyncClient(key, secret)


async def refused(asked)->str:
    try: await asked
    except BinanceAPIException as error: return str(error)
    return "nothing was refused"


async def best(client)->tuple[float, float]:
    price, size = (await client.futures_order_book(**BTC, limit=5))["asks"][0]
    return float(price), float(size)


async def limit(client, quantity, price, **more)->dict:
    return await client.futures_create_order(**BTC, side="BUY", type="LIMIT", timeInForce="GTC",
                                             quantity=f"{quantity:.3f}", price=f"{price:.1f}", **more)


async def orders(client)->None:
    await client.futures_change_leverage(**BTC, leverage=10)
    held("leverage", (await client._request_futures_api("get", "symbolConfig", True, data=dict(BTC)))[0]["leverage"]
         == 10)
    bought = await client.futures_create_order(**BTC, side="BUY", type="MARKET", quantity=.02,
                                               newOrderRespType="RESULT")
    check(bought["status"] == "FILLED", bought)
    held("market", float((await client.futures_position_information(**BTC))[0]["positionAmt"]) == .02)
    price, _ = await best(client)
    waiting = await limit(client, .02, .9 * price)
    held("limit", [order["orderId"] for order in await client.futures_get_open_orders(**BTC)] == [waiting["orderId"]])
    price, size = await best(client)
    crossing = await limit(client, size + .01, price)
    part = await client.futures_get_order(**BTC, orderId=crossing["orderId"])
    check(abs(float(part["executedQty"]) - size) < 1e-9, part, size)
    held("partial fill", part["status"] == "PARTIALLY_FILLED")
    cancelled = [(await client.futures_cancel_order(**BTC, orderId=order["orderId"]))["status"]
                 for order in (waiting, crossing)]
    held("cancel", cancelled == ["CANCELED", "CANCELED"])


async def protection(client)->None:
    price, _ = await best(client)
    stop = await client.futures_create_order(**BTC, side="SELL", type="STOP_MARKET", stopPrice=f"{.8 * price:.1f}",
                                             quantity=.02, reduceOnly="true")
    listed = await client.futures_get_open_algo_orders(**BTC)
    check([order["algoId"] for order in listed] == [stop["algoId"]], listed)
    await client.futures_cancel_algo_order(**BTC, algoId=stop["algoId"])
    held("conditional", not await client.futures_get_open_algo_orders(**BTC))
    size = (await client.futures_position_information(**BTC))[0]["positionAmt"]
    await client.futures_create_order(**BTC, side="SELL", type="MARKET", quantity=size, reduceOnly="true")
    held("reduce-only", not await client.futures_position_information(**BTC))


async def heard(socket)->set[str]:
    "The kinds of events until the position is closed"
    kinds = set()
    while True:
        event = await asyncio.wait_for(socket.recv(), 20)
        kinds.add(event.get("e"))
        if event.get("e") == "ACCOUNT_UPDATE" and [float(each["pa"]) for each in event["a"]["P"]] == [0.]: return kinds


async def mistakes(client)->None:
    price, _ = await best(client)
    code_of([await refused(client.futures_klines(symbol="NOTUSDT", interval="1m")),
             await refused(client.futures_cancel_order(**BTC, orderId=123456789)),
             await refused(limit(client, MOST, price)),
             await refused(client.futures_create_order(**BTC, side="SELL", type="MARKET", quantity=.01,
                                                       reduceOnly="true")),
             await refused(limit(client, .001, .9 * price))])
    held("errors")


async def main()->None:
    exchange = client()
    try:
        symbols = (await exchange.futures_exchange_info())["symbols"]
        held("load", "BTCUSDT" in [symbol["symbol"] for symbol in symbols])
        held("candles", await exchange.futures_klines(**BTC, interval="1m"))
        async with BinanceSocketManager(exchange).futures_user_socket() as socket:
            await orders(exchange)
            await protection(exchange)
            kinds = await heard(socket)
            check(kinds >= EVENTS, EVENTS - kinds)
            held("user events")
        await mistakes(exchange)
    finally: await exchange.close_connection()


asyncio.run(main())
