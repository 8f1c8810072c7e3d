"Binance's adapter: its requests beside ccxt's own, its reading of real and official answers, and orders on localnet"
import asyncio
import json
from dataclasses import replace
from inspect import iscoroutinefunction, signature

import ccxt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tradelab.config import VenueSettings
from tradelab.events import Fill
from tradelab.instruments import BITCOIN as LISTED
from tradelab.live.order_states import State
from tradelab.live.venue import MarketData, OrderReport, Outcome, Venue
from tradelab.localnet.server import Localnet
from tradelab.market.synthetic import ar1
from tradelab.notices import Notice
from tradelab.orders import Kind, Order, TimeInForce
from tradelab.venues.binance import BinanceVenue
from tradelab.venues.binance_client import exchange_for
from tradelab.venues.binance_messages import OURS, Children, frame_events, normalise
from tradelab.venues.binance_orders import (
    CONDITIONAL,
    amend_request,
    answer_of,
    format_price,
    format_quantity,
    order_request,
)
from tradelab.venues.binance_streams import Streams

BITCOIN = "BTC/USDT:USDT"
SELL = Order("tl-1", BITCOIN, -.003, True, 0, 20_000.)
RESTING = replace(SELL, kind=Kind.LIMIT, price=20_100.1)
STOP = replace(SELL, kind=Kind.STOP, trigger=19_000.)
TAKE = replace(SELL, kind=Kind.TAKE_PROFIT, trigger=21_000.)
FILTERS = [{"filterType": "PRICE_FILTER", "tickSize": "0.10", "minPrice": "0.1", "maxPrice": "1000000"},
           {"filterType": "LOT_SIZE", "stepSize": "0.001", "minQty": "0.001", "maxQty": "1000"},
           {"filterType": "MARKET_LOT_SIZE", "stepSize": "0.001", "minQty": "0.001", "maxQty": "120"},
           {"filterType": "MIN_NOTIONAL", "notional": "100"}]
TYPES = ["LIMIT", "MARKET", "STOP", "STOP_MARKET", "TAKE_PROFIT", "TAKE_PROFIT_MARKET", "TRAILING_STOP_MARKET"]
LISTING = {"symbol": "BTCUSDT", "pair": "BTCUSDT", "contractType": "PERPETUAL", "deliveryDate": 4_133_404_800_000,
           "onboardDate": 1, "status": "TRADING", "baseAsset": "BTC", "quoteAsset": "USDT", "marginAsset": "USDT",
           "pricePrecision": 2, "quantityPrecision": 3, "baseAssetPrecision": 8, "quotePrecision": 8,
           "filters": FILTERS, "orderTypes": TYPES, "timeInForce": ["GTC", "IOC", "FOK", "GTX"]}


class SentError(Exception): pass


@pytest.fixture(scope="module")
def client():
    "ccxt, which raises what it would send"
    client = ccxt.binanceusdm({"options": {"fetchCurrencies": False}})
    client.fapiPublicGetExchangeInfo = lambda parameters=None: {"symbols": [LISTING]}
    client.set_markets(client.fetch_markets())
    def sender(name):
        def send(parameters): raise SentError(name, parameters)
        return send
    for name in ("fapiPrivatePostOrder", "fapiPrivatePostAlgoOrder", "fapiPrivatePutOrder"):
        setattr(client, name, sender(name))
    return client


def sent(call, *arguments):
    with pytest.raises(SentError) as caught: call(*arguments)
    name, parameters = caught.value.args
    return name, {key: "true" if value is True else str(value) for key, value in parameters.items()}


CLOSING = {"reduceOnly": True}


@pytest.mark.parametrize("order, asked", [
    (SELL, ("market", "sell", .003, None, CLOSING)),
    (replace(SELL, quantity=.5, reduce_only=False), ("market", "buy", .5, None, {})),
    (RESTING, ("limit", "sell", .003, 20_100.1, CLOSING)),
    (replace(RESTING, in_force=TimeInForce.IOC), ("limit", "sell", .003, 20_100.1, CLOSING | {"timeInForce": "IOC"})),
    (replace(RESTING, in_force=TimeInForce.FOK), ("limit", "sell", .003, 20_100.1, CLOSING | {"timeInForce": "FOK"})),
    (replace(RESTING, in_force=TimeInForce.GTX), ("limit", "sell", .003, 20_100.1, CLOSING | {"postOnly": True})),
    (STOP, ("market", "sell", .003, None, CLOSING | {"stopLossPrice": 19_000})),
    (replace(STOP, price=18_990.), ("limit", "sell", .003, 18_990, CLOSING | {"stopLossPrice": 19_000})),
    (TAKE, ("market", "sell", .003, None, CLOSING | {"takeProfitPrice": 21_000})),
    (replace(TAKE, price=21_010.), ("limit", "sell", .003, 21_010, CLOSING | {"takeProfitPrice": 21_000})),
    (replace(SELL, kind=Kind.TRAILING, callback=.015),
     ("market", "sell", .003, None, CLOSING | {"trailingPercent": 1.5}))],
    ids=lambda value: f"{value.kind.name}-{value.in_force.name}-{value.price:g}" if isinstance(value, Order) else "")
def test_an_order_is_sent_as_ccxt_sends_it(client, order, asked):
    "But for what is ours alone: prices of the contract, said; a time to live of limited conditional orders, said"
    *arguments, parameters = asked
    name, theirs = sent(client.create_order, BITCOIN, *arguments, parameters | {"clientOrderId": "tl-1"})
    ours = order_request(order, client.markets[BITCOIN])
    assert name == ("fapiPrivatePostAlgoOrder" if order.kind in CONDITIONAL else "fapiPrivatePostOrder")
    assert ours.pop("workingType", "CONTRACT_PRICE") == "CONTRACT_PRICE"
    assert ours == {"timeInForce": "GTC"} | theirs if "price" in ours else ours == theirs


def test_an_amendment_is_sent_as_ccxt_sends_it(client):
    name, theirs = sent(client.edit_order, "77", BITCOIN, "limit", "sell", .005, 20_100.1, {"clientOrderId": "tl-1"})
    assert name == "fapiPrivatePutOrder"
    ours = amend_request(RESTING, client.markets[BITCOIN], .002)
    assert ours == {key: theirs[key] for key in theirs if key not in ("orderId", "clientOrderId")}


@given(st.integers(1, 10**9), st.sampled_from([.1, .01, .5, 1., 1e-5, 1e-8, 10.]))
def test_what_is_on_the_grid_goes_out_as_it_is(number, size):
    "And never with an exponent, whatever the float was added up from"
    value = number * size
    for text in (format_price(value, size), format_quantity(value, size), format_quantity(-value, size)):
        assert "e" not in text.lower()
        assert float(text) == pytest.approx(value, rel=1e-12)


def example(shared, name):
    return json.loads((shared / "fixtures/binance/binance_sdk_examples/rest_api" / f"{name}.json").read_text())


@pytest.mark.parametrize("name, state", [("new_order", State.WORKING), ("query_order", State.WORKING),
                                         ("modify_order", State.WORKING), ("cancel_order", State.CANCELED),
                                         ("new_algo_order", State.WORKING), ("query_algo_order", State.CANCELED),
                                         ("cancel_algo_order", State.CANCELED)])
def test_the_official_examples_of_answers_are_read(shared, name, state):
    reply = example(shared, name)
    answer = answer_of(reply)
    assert answer.outcome is Outcome.ACCEPTED
    assert answer.report.order_id == reply.get("clientOrderId", reply.get("clientAlgoId"))
    assert answer.report.state is state
    assert answer.report.executed == float(reply.get("executedQty", 0))
    assert answer.report.exchange_id.removeprefix("algo ") == str(reply.get("orderId", reply.get("algoId")))


@pytest.mark.parametrize("name", ["current_all_open_orders", "current_all_algo_open_orders"])
def test_the_official_examples_of_what_is_open_are_read(shared, name):
    assert all(answer_of(reply).report for reply in example(shared, name))


def test_a_real_stop_is_heard_from_its_trigger_to_its_end(shared):
    "DOGEUSDT, 2025-12-11: TRIGGERING, TRIGGERED, FINISHED"
    folder = shared / "fixtures/binance/nautilus_trader/resources/ws_messages"
    symbols, heard, children = {"DOGEUSDT": "DOGE/USDT:USDT"}, [], Children()
    for step in ("triggering", "triggered", "finished"):
        frame = json.loads((folder / f"ws_futures_algo_update_{step}.json").read_text())["data"]
        heard += children.named(frame, normalise(frame, symbols))
    name = "O-20251211-053131-TEST-000-1"
    assert heard == [OrderReport(name, State.WORKING, 0., "algo 1000000033225453", triggered=True),
                     OrderReport(name, State.WORKING, 0., "88937381063"),
                     OrderReport(name, State.FILLED, 38., "88937381063")]
    fill = Fill("DOGE/USDT:USDT", 38., .13856, .002, 5, "x-88", "9")
    frame = {"e": "ORDER_TRADE_UPDATE", "o": {"i": 88937381063}}
    assert children.named(frame, [fill, Notice("fee", "")]) == [replace(fill, order_id=name), Notice("fee", "")]
    assert children.named({"e": "ORDER_TRADE_UPDATE", "o": {"i": 1}}, [fill]) == [fill]
    ended = json.loads((folder / "ws_futures_algo_update_finished_canceled.json").read_text())["data"]
    assert normalise(ended, symbols)[0].state is State.WORKING      # the order that it became tells of its end


@pytest.fixture
def sockets(client):
    "ccxt as a venue has it, subscribed as it is in a session, without a connection"
    nowhere = VenueSettings("localnet", "a test", "http://127.0.0.1:9", "ws://127.0.0.1:9", SecretStr("k"),
                            SecretStr("s"))
    exchange = exchange_for(nowhere, paced=False, timeout=5)
    exchange.set_markets(client.markets)
    exchange.streams = Streams(exchange, asyncio.Queue(), lambda socket, frame: frame_events(socket, frame, {}, "USDT"))
    yield exchange
    asyncio.run(exchange.close())


USER, MARKET = "ws://127.0.0.1:9/private/ws?listenKey=x", "ws://127.0.0.1:9/market/ws/0"
ANSWER = {"result": ["x@markPrice@1s"], "id": "acted57"}
OUR_FRAMES = [(USER, ANSWER), (USER, {"e": "TRADE_LITE"}),
              (USER, {"e": "ACCOUNT_UPDATE", "a": {"m": "ORDER", "B": [None]}}),
              (MARKET, {"result": [], "id": 3_600_000}), (MARKET, {"result": None, "id": OURS}),
              (MARKET, {"error": {"code": 2, "msg": "Invalid request"}, "id": OURS}),
              (MARKET, {"e": "contractInfo", "s": "BTCUSDT", "cs": "TRADING"}),
              (MARKET, {"e": "markPriceUpdate", "s": "X"}),
              (MARKET.replace("market", "public"), {"e": "bookTicker", "s": "X", "T": 1})]


def test_what_ccxt_did_not_ask_for_never_reaches_it(sockets, caplog):
    "An answer on the user stream: of its subscriptions there ccxt keeps True, and looks for a number in it"
    async def hear(frames):
        for url, frame in frames:
            client = sockets.client(url)
            client.subscriptions["linear" if url == USER else "ohlcv"] = True if url == USER else {"id": 1}
            sockets.handle_message(client, frame)
        return {hash: error for client in sockets.clients.values() for hash, error in client.rejections.items()}
    assert asyncio.run(hear(OUR_FRAMES)) == {}
    assert caplog.messages == []
    sockets.heard = lambda url, frame: False # as if nobody heard them before ccxt
    assert list(asyncio.run(hear([OUR_FRAMES[5]]))) == [str(OURS)]
    asyncio.run(hear([OUR_FRAMES[0]]))
    assert caplog.messages == ["ccxt cannot handle a frame: AttributeError"]


def test_what_ccxt_asked_for_reaches_it(sockets):
    async def hear():
        client = sockets.client(MARKET)
        client.subscriptions["ohlcv"] = {"id": 1}
        candle, refused = client.future("ohlcv::BTC/USDT:USDT::1h"), client.future("ohlcv")
        sockets.handle_message(client, {"e": "kline", "k": {"s": "BTCUSDT", "i": "1h", "t": 0, "x": False}})
        sockets.handle_message(client, {"error": {"code": 2, "msg": "Invalid request"}, "id": 1})
        return candle.done(), str(refused.exception())
    assert asyncio.run(hear()) == (True, 'binanceusdm {"code":2,"msg":"Invalid request"}')


def test_every_method_of_the_protocol_is_there_and_takes_the_same():
    for protocol in (MarketData, Venue):
        for name, promised in vars(protocol).items():
            if name.startswith("_") or not callable(promised): continue
            ours = getattr(BinanceVenue, name)
            assert iscoroutinefunction(ours) == iscoroutinefunction(promised), name
            assert [*signature(ours).parameters] == [*signature(promised).parameters], name


@pytest.mark.integration
def test_orders_on_localnet():
    limit, stop = replace(RESTING, order_id="tl-2"), replace(STOP, order_id="tl-3")
    async def trade(venue):
        await venue.connect([BITCOIN])
        bought = replace(SELL, quantity=.1, reduce_only=False)
        answers = {"placed": await venue.place(bought), "again": await venue.query(bought),
                   "ended": await venue.cancel(bought),
                   "never sent": await venue.query(replace(SELL, order_id="tl-9")),
                   "ended amended": await venue.amend(RESTING),
                   **{order.kind.name: await venue.place(order) for order in (limit, stop)}}
        answers["empty"] = await venue.place(replace(RESTING, price=0.))
        answers["amended"] = await venue.amend(replace(limit, price=21_000.))
        works = await venue.open_orders(BITCOIN)
        for order in (limit, stop): answers[f"{order.kind.name} cancelled"] = await venue.cancel(order)
        return answers, works, (await venue.account()).positions

    with Localnet({BITCOIN: ar1(60, seed=3)}, instruments=[replace(LISTED, symbol=BITCOIN)]) as exchange:
        settings = VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"),
                                 SecretStr("localnet-key"), SecretStr("localnet-secret"))
        async def run():
            venue = BinanceVenue(settings)
            try: return await trade(venue)
            finally: await venue.close()
        answers, open_now, positions = asyncio.run(run())
    assert answers["placed"].report.executed == .1
    assert answers["again"].report == answers["placed"].report
    assert answers["ended"].outcome is Outcome.NOT_FOUND
    assert answers["never sent"].outcome is Outcome.NOT_FOUND
    assert answers["never sent"].report is None
    assert {report.order_id for report in open_now} == {"tl-2", "tl-3"}
    assert {report.state for report in open_now} == {State.WORKING}
    assert positions == {BITCOIN: .1}
    for name in ("LIMIT", "STOP", "amended", "LIMIT cancelled", "STOP cancelled"):
        assert answers[name].outcome is Outcome.ACCEPTED, answers[name]
    assert answers["LIMIT cancelled"].report.state is answers["STOP cancelled"].report.state is State.CANCELED
    assert answers["ended amended"].outcome is Outcome.NOT_FOUND
    assert answers["empty"].outcome is Outcome.REJECTED
    assert answers["empty"].text == f"order tl-1 of {BITCOIN} is a LIMIT and needs a price above 0, its price is 0.0"
