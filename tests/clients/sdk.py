"Binance's SDK for USD-M futures at localnet: python sdk.py URL KEY SECRET"
import asyncio

from binance_common.configuration import ConfigurationRestAPI, ConfigurationWebSocketStreams
from binance_sdk_derivatives_trading_usds_futures.derivatives_trading_usds_futures import DerivativesTradingUsdsFutures
from binance_sdk_derivatives_trading_usds_futures.rest_api.models import (
    KlineCandlestickDataIntervalEnum,
    NewAlgoOrderAlgoTypeEnum,
    NewAlgoOrderReduceOnlyEnum,
    NewAlgoOrderSideEnum,
    NewAlgoOrderTypeEnum,
    NewOrderNewOrderRespTypeEnum,
    NewOrderReduceOnlyEnum,
    NewOrderSideEnum,
    NewOrderTimeInForceEnum,
    NewOrderTypeEnum,
)
from steps import MOST, check, code_of, held, venue

BTC = "BTCUSDT"
MODELS = {"TradeLite", "AccountUpdate", "OrderTradeUpdate", "AlgoUpdate", "AccountConfigUpdate"}    # of the events
BUY, SELL = NewOrderSideEnum.BUY, NewOrderSideEnum.SELL


def refused(ask, *asked, **more)->str:
    "The message of a request that is refused; the SDK keeps the code beside it"
    try: ask(*asked, **more)
    except Exception as error: return f"{error} {vars(error)}"
    return "nothing was refused"


def best(rest)->tuple[float, float]:
    price, size = rest.order_book(BTC, limit=5).data().asks[0]
    return float(price), float(size)


def market(rest, side, quantity, reduce_only=None):
    return rest.new_order(BTC, side, NewOrderTypeEnum.MARKET, quantity=quantity, reduce_only=reduce_only,
                          new_order_resp_type=NewOrderNewOrderRespTypeEnum.RESULT).data()


def limit(rest, quantity, price):
    return rest.new_order(BTC, BUY, NewOrderTypeEnum.LIMIT, time_in_force=NewOrderTimeInForceEnum.GTC,
                          quantity=round(quantity, 3), price=round(price, 1)).data()


def position(rest)->float:
    return sum(float(each.position_amt) for each in rest.position_information_v3(BTC).data())


def orders(rest)->None:
    held("leverage", rest.change_initial_leverage(BTC, 10).data().leverage == 10)
    check(market(rest, BUY, .02).status == "FILLED")
    held("market", position(rest) == .02)
    price, _ = best(rest)
    waiting = limit(rest, .02, .9 * price)
    held("limit", [order.order_id for order in rest.current_all_open_orders(BTC).data()] == [waiting.order_id])
    price, size = best(rest)
    crossing = limit(rest, size + .01, price)
    part = rest.query_order(BTC, order_id=crossing.order_id).data()
    check(abs(float(part.executed_qty) - size) < 1e-9, part, size)
    held("partial fill", part.status == "PARTIALLY_FILLED")
    cancelled = [rest.cancel_order(BTC, order_id=order.order_id).data().status for order in (waiting, crossing)]
    held("cancel", cancelled == ["CANCELED", "CANCELED"])


def protection(rest)->None:
    price, _ = best(rest)
    stop = rest.new_algo_order(NewAlgoOrderAlgoTypeEnum.CONDITIONAL, BTC, NewAlgoOrderSideEnum.SELL,
                               NewAlgoOrderTypeEnum.STOP_MARKET, quantity=.02, trigger_price=round(.8 * price, 1),
                               reduce_only=NewAlgoOrderReduceOnlyEnum.TRUE).data()
    listed = [order.algo_id for order in rest.current_all_algo_open_orders(symbol=BTC).data()]
    check(listed == [stop.algo_id], listed)
    rest.cancel_algo_order(algo_id=stop.algo_id).data()
    held("conditional", not rest.current_all_algo_open_orders(symbol=BTC).data())
    market(rest, SELL, position(rest), NewOrderReduceOnlyEnum.TRUE)
    held("reduce-only", position(rest) == 0)


def mistakes(rest)->None:
    price, _ = best(rest)
    code_of([refused(rest.kline_candlestick_data, "NOTUSDT", KlineCandlestickDataIntervalEnum.INTERVAL_1m),
             refused(rest.cancel_order, BTC, order_id=123456789), refused(limit, rest, MOST, price),
             refused(market, rest, SELL, .01, NewOrderReduceOnlyEnum.TRUE), refused(limit, rest, .001, .9 * price)])
    held("errors")


async def main()->None:
    url, key, secret = venue()
    client = DerivativesTradingUsdsFutures(
        ConfigurationRestAPI(api_key=key, api_secret=secret, base_path=url),
        config_ws_streams=ConfigurationWebSocketStreams(stream_url=url.replace("http", "ws")))
    rest, kinds, connection = client.rest_api, set(), await client.websocket_streams.create_connection()
    try:
        held("load", BTC in [symbol.symbol for symbol in rest.exchange_information().data().symbols])
        held("candles", rest.kline_candlestick_data(BTC, KlineCandlestickDataIntervalEnum.INTERVAL_1m).data())
        stream = await connection.user_data(rest.start_user_data_stream().data().listen_key)
        stream.on("message", lambda event: kinds.add(type(getattr(event, "actual_instance", event)).__name__))
        for part in (orders, protection): await asyncio.to_thread(part, rest)
        while not kinds >= MODELS: await asyncio.sleep(.01)
        held("user events")
        await asyncio.to_thread(mistakes, rest)
    finally: await connection.close_connection(close_session=True)


asyncio.run(main())
