"What REST clients read from localnet: one server on the wall clock, raw requests"
import http.client
import json
import time
from urllib.parse import urlencode

import pytest

from tradelab.localnet.engine import Questions
from tradelab.localnet.protocol import ApiKey, signature
from tradelab.localnet.server import KEY, SECRET, Localnet

pytestmark = pytest.mark.integration
BTC = {"symbol": "BTCUSDT"}
ORDER_UNKNOWN = {"code": -2013, "msg": "Order does not exist."}
BUY = BTC | {"side": "BUY", "type": "MARKET", "quantity": "0.01"}


class Client:
    "A client that signs its query"
    def __init__(self, net, key, secret):
        self.line, self.key, self.secret = http.client.HTTPConnection("127.0.0.1", net.port, timeout=20), key, secret

    def ask(self, method, path, **asked):
        query = urlencode(asked | {"timestamp": int(time.time() * 1000)})
        self.line.request(method, f"/fapi/{path}?{query}&signature={signature(self.secret, query)}",
                          headers={"X-MBX-APIKEY": self.key})
        reply = self.line.getresponse()
        self.headers = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, json.loads(reply.read())

    def get(self, path, **asked): return self.ask("GET", path, **asked)[1]


@pytest.fixture(scope="module")
def net():
    with Localnet(keys=[ApiKey("busy", "secret", "busy")]) as net: yield net


@pytest.fixture(scope="module")
def client(net): return Client(net, KEY, SECRET)


@pytest.mark.parametrize("interval", ["1m", "1h", "12h", "1d", "3d", "1w", "1M"])
@pytest.mark.parametrize("path", ["klines", "markPriceKlines", "premiumIndexKlines"])
def test_every_interval_shows_its_forming_candle(client, path, interval):
    last = client.get(f"v1/{path}", **BTC, interval=interval)[-1]
    assert last[0] <= client.get("v1/premiumIndex", **BTC)["time"] <= last[6] + 1


def test_the_entry_is_the_price_that_was_paid(client):
    number = client.ask("POST", "v1/order", **BUY)[1]["orderId"]
    paid = client.get("v1/order", **BTC, orderId=number)["avgPrice"]
    assert {client.get(path)[0]["entryPrice"] for path in ("v2/positionRisk", "v3/positionRisk")} == {paid}
    assert client.get("v2/account")["positions"][0]["entryPrice"] == paid


def test_too_many_orders_are_refused_with_the_count(net):
    busy, code = Client(net, "busy", "secret"), None
    while code != -1015:   # the count of ten seconds may begin anew once
        status, reply = busy.ask("POST", "v1/order", **BUY | {"quantity": "0.001"})
        code = reply["code"]
        assert code in (-4164, -1015)
    assert status == 429
    assert int(busy.headers["retry-after"]) >= 1
    assert busy.headers["x-mbx-order-count-10s"] == "300"
    assert busy.ask("DELETE", "v1/allOpenOrders", **BTC)[0] == 200


def test_a_modified_order_names_its_side(client):
    bid = float(client.get("v1/ticker/bookTicker", **BTC)["bidPrice"])
    price, lower = f"{bid * .98:.1f}", f"{bid * .97:.1f}"
    order = client.ask("POST", "v1/order", **BUY | {"type": "LIMIT", "timeInForce": "GTC", "price": price})[1]
    change = BTC | {"orderId": order["orderId"], "quantity": "0.02", "price": lower}
    status, reply = client.ask("PUT", "v1/order", **change)
    assert (status, reply["code"], "'side'" in reply["msg"]) == (400, -1102, True)
    assert float(client.ask("PUT", "v1/order", **change, side="BUY")[1]["price"]) == float(lower)


def test_open_questions_are_answered_as_the_localnet_is_told(client):
    asked = BTC | {"orderId": 999}
    assert client.ask("GET", "v1/order", **asked)[0] == 400
    with Localnet(questions=Questions(http_status={-2013: 404})) as told:
        assert Client(told, KEY, SECRET).ask("GET", "v1/order", **asked) == (404, ORDER_UNKNOWN)
    limit = [each["limit"] for each in client.get("v1/exchangeInfo")["symbols"][0]["filters"]
             if each["filterType"] == "MAX_NUM_ORDERS"]
    assert limit == [200]


def test_incomes_come_in_pages(client):
    for _ in range(3): client.ask("POST", "v1/order", **BUY)
    both = client.get("v1/income", limit=2)
    assert client.get("v1/income", limit=1) == both[1:]
    assert client.get("v1/income", limit=1, page=2) == both[:1]
    assert client.ask("GET", "v1/income", page=0)[1]["code"] == -1130


@pytest.mark.parametrize("body, packed, status", [(b"no gzip", "gzip", 400), (b"a=1&" * 300_000, "", 413)])
def test_a_body_that_cannot_be_read_is_refused(net, body, packed, status):
    line = http.client.HTTPConnection("127.0.0.1", net.port, timeout=20)
    line.request("POST", "/fapi/v1/order", body, {"Content-Encoding": packed} if packed else {})
    reply = line.getresponse()
    assert (reply.status, json.loads(reply.read())["code"]) == (status, -1130)
