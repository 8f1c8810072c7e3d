"binance-futures-connector at localnet: python connector.py URL KEY SECRET"
import json
from queue import Queue

from binance.error import ClientError
from binance.um_futures import UMFutures
from binance.websocket.um_futures.websocket_client import UMFuturesWebsocketClient
from steps import EVENTS, MOST, check, code_of, held, venue

BTC = "BTCUSDT"


def refused(ask, *asked, **more)->str:
    try: ask(*asked, **more)
    except ClientError as error: return str(error)
    return "nothing was refused"


def best(client)->tuple[float, float]:
    price, size = client.depth(BTC, limit=5)["asks"][0]
    return float(price), float(size)


def limit(client, quantity, price)->dict:
    return client.new_order(symbol=BTC, side="BUY", type="LIMIT", timeInForce="GTC", quantity=f"{quantity:.3f}",
                            price=f"{price:.1f}")


def orders(client)->None:
    held("leverage", client.change_leverage(symbol=BTC, leverage=10)["leverage"] == 10)
    bought = client.new_order(symbol=BTC, side="BUY", type="MARKET", quantity=.02, newOrderRespType="RESULT")
    check(bought["status"] == "FILLED", bought)
    held("market", float(client.get_position_risk(symbol=BTC)[0]["positionAmt"]) == .02)
    price, _ = best(client)
    waiting = limit(client, .02, .9 * price)
    held("limit", [order["orderId"] for order in client.get_orders(symbol=BTC)] == [waiting["orderId"]])
    price, size = best(client)
    crossing = limit(client, size + .01, price)
    part = client.query_order(symbol=BTC, orderId=crossing["orderId"])
    check(abs(float(part["executedQty"]) - size) < 1e-9, part, size)
    held("partial fill", part["status"] == "PARTIALLY_FILLED")
    cancelled = [client.cancel_order(symbol=BTC, orderId=order["orderId"])["status"] for order in (waiting, crossing)]
    held("cancel", cancelled == ["CANCELED", "CANCELED"])


def protection(client)->None:
    "This client has no call for conditional orders: they are sent as its users would have to"
    price, _ = best(client)
    stop = client.sign_request("POST", "/fapi/v1/algoOrder", {
        "algoType": "CONDITIONAL", "symbol": BTC, "side": "SELL", "type": "STOP_MARKET", "quantity": .02,
        "triggerPrice": f"{.8 * price:.1f}", "reduceOnly": "true"})
    old = refused(client.new_order, symbol=BTC, side="SELL", type="STOP_MARKET", quantity=.02,
                  stopPrice=f"{.8 * price:.1f}")
    check("-4120" in old, old)
    client.sign_request("DELETE", "/fapi/v1/algoOrder", {"algoId": stop["algoId"]})
    held("conditional", not client.sign_request("GET", "/fapi/v1/openAlgoOrders", {"symbol": BTC}))
    size = client.get_position_risk(symbol=BTC)[0]["positionAmt"]
    client.new_order(symbol=BTC, side="SELL", type="MARKET", quantity=size, reduceOnly="true")
    held("reduce-only", not [each for each in client.get_position_risk(symbol=BTC) if float(each["positionAmt"])])


def heard(events)->set[str]:
    "The kinds of events until the position is closed"
    kinds = set()
    while True:
        event = json.loads(events.get(timeout=20))
        kinds.add(event.get("e"))
        if event.get("e") == "ACCOUNT_UPDATE" and [float(each["pa"]) for each in event["a"]["P"]] == [0.]: return kinds


def mistakes(client)->None:
    price, _ = best(client)
    code_of([refused(client.klines, "NOTUSDT", "1m"), refused(client.cancel_order, symbol=BTC, orderId=123456789),
             refused(limit, client, MOST, price),
             refused(client.new_order, symbol=BTC, side="SELL", type="MARKET", quantity=.01, reduceOnly="true"),
             refused(limit, client, .001, .9 * price)])
    held("errors")


def main()->None:
    url, key, secret = venue()
    client, events = UMFutures(key, secret, base_url=url), Queue()
    held("load", BTC in [symbol["symbol"] for symbol in client.exchange_info()["symbols"]])
    held("candles", client.klines(BTC, "1m"))
    sockets = UMFuturesWebsocketClient(url.replace("http", "ws"), on_message=lambda _, message: events.put(message))
    try:
        sockets.user_data(client.new_listen_key()["listenKey"])
        check(json.loads(events.get(timeout=20)).get("result", "") is None)
        orders(client)
        protection(client)
        kinds = heard(events)
        check(kinds >= EVENTS, EVENTS - kinds)
        held("user events")
        mistakes(client)
    finally: sockets.stop()


main()
