"""NautilusTrader's live node at localnet: python nautilus.py URL KEY SECRET

Before it starts, somebody else buys and leaves an order; the node finds both when it compares itself with the exchange.
"""
import hashlib
import hmac
import json
import os
import sys
import time
from datetime import timedelta
from decimal import Decimal
from urllib.request import Request, urlopen

from nautilus_trader.adapters.binance import (
    BINANCE,
    BinanceAccountType,
    BinanceDataClientConfig,
    BinanceExecClientConfig,
    BinanceLiveDataClientFactory,
    BinanceLiveExecClientFactory,
)
from nautilus_trader.adapters.binance.common.symbol import BinanceSymbol
from nautilus_trader.config import InstrumentProviderConfig, LiveExecEngineConfig, LoggingConfig, TradingNodeConfig
from nautilus_trader.live.node import TradingNode
from nautilus_trader.model.data import BarType
from nautilus_trader.model.enums import OrderSide, OrderStatus, TimeInForce
from nautilus_trader.model.events import OrderRejected
from nautilus_trader.model.identifiers import InstrumentId, TraderId
from nautilus_trader.trading.strategy import Strategy
from steps import MOST, check, held, venue

BTC = InstrumentId.from_str("BTCUSDT-PERP.BINANCE")
BARS = BarType.from_str(f"{BTC}-1-MINUTE-LAST-EXTERNAL")
BUY, SELL = OrderSide.BUY, OrderSide.SELL


def signed(method:str, path:str, asked:str="")->dict|list:
    "A request without any client"
    url, key, secret = venue()
    query = f"{asked}&timestamp={time.time_ns() // 1_000_000}"
    query += "&signature=" + hmac.new(secret.encode(), query.encode(), hashlib.sha256).hexdigest()
    return json.load(urlopen(Request(f"{url}/fapi/{path}?{query}", method=method, headers={"X-MBX-APIKEY": key})))


class Scenario(Strategy):
    "The steps in sequence; it looks again and again whether the next one may be done"
    def __init__(self, node):
        super().__init__()
        self.node, self.story, self.seen, self.failure = node, None, [], None

    def on_start(self):
        self.story = self.steps()
        self.subscribe_quote_ticks(BTC)
        self.clock.set_timer("look", timedelta(milliseconds=20), callback=lambda event: self.go_on())

    def on_event(self, event): self.seen.append(event)
    def on_historical_data(self, data): self.seen.append(data)
    def on_stop(self): self.clock.cancel_timers()

    def go_on(self):
        "Look whether the next step may be done"
        try: next(self.story)
        except StopIteration: self.node.stop()
        except (Exception, SystemExit) as error:
            self.failure = self.failure or error
            self.node.stop()

    def until(self, condition):
        while not condition(): yield

    def order(self, side, quantity, price=None, **more):
        "Send a market or a limit order"
        amount = self.instrument.make_qty(Decimal(str(quantity)))
        order = (self.order_factory.market(BTC, side, amount, **more) if price is None else
                 self.order_factory.limit(BTC, side, amount, self.instrument.make_price(price), TimeInForce.GTC))
        self.submit_order(order)
        return order

    def ends(self, order, status): return self.until(lambda: order.status == status)

    def steps(self):
        self.instrument = self.cache.instrument(BTC)
        held("load", self.instrument is not None)
        self.request_bars(BARS, start=self.clock.utc_now().replace(year=2021))
        yield from self.until(lambda: self.seen and self.cache.quote_tick(BTC))
        held("candles")
        held("leverage", signed("GET", "v1/symbolConfig", "symbol=BTCUSDT")[0]["leverage"] == 10)
        found = [position.signed_qty for position in self.cache.positions_open(instrument_id=BTC)]
        check(found == [.02], "reconciled positions", found)
        left = self.cache.orders_open(instrument_id=BTC)
        check([order.quantity.as_double() for order in left] == [.03], "reconciled orders", left)
        yield from self.trades(left[0])

    def trades(self, left):
        quote = self.cache.quote_tick(BTC)
        price, size = float(quote.ask_price), float(quote.ask_size)
        yield from self.ends(self.order(BUY, .02), OrderStatus.FILLED)
        held("market", self.portfolio.net_position(BTC) == Decimal("0.04"))
        waiting = self.order(BUY, .02, .9 * price)
        yield from self.ends(waiting, OrderStatus.ACCEPTED)
        held("limit")
        quote = self.cache.quote_tick(BTC)
        price, size = float(quote.ask_price), float(quote.ask_size)
        crossing = self.order(BUY, size + .01, price)
        yield from self.ends(crossing, OrderStatus.PARTIALLY_FILLED)
        held("partial fill", crossing.filled_qty > 0)
        for order in (waiting, crossing, left): self.cancel_order(order)
        for order in (waiting, crossing, left): yield from self.ends(order, OrderStatus.CANCELED)
        held("cancel")
        yield from self.stops(price)

    def stops(self, price):
        "This version sends stops to the old path, which refuses them with a code of its own"
        stop = self.order_factory.stop_market(BTC, SELL, self.instrument.make_qty(.02),
                                              self.instrument.make_price(.8 * price))
        self.submit_order(stop)
        yield from self.ends(stop, OrderStatus.REJECTED)
        held("conditional", "-4120" in self.reason())
        size = self.portfolio.net_position(BTC)
        yield from self.ends(self.order(SELL, size, reduce_only=True), OrderStatus.FILLED)
        yield from self.until(lambda: self.portfolio.is_flat(BTC))
        held("reduce-only", not signed("GET", "v3/positionRisk"))
        kinds = {"OrderAccepted", "OrderFilled", "OrderCanceled", "OrderRejected"}
        yield from self.until(lambda: kinds <= {type(event).__name__ for event in self.seen})
        held("user events")
        yield from self.ends(self.order(BUY, MOST, price), OrderStatus.REJECTED)
        held("errors", "-2019" in self.reason())

    def reason(self): return [event.reason for event in self.seen if isinstance(event, OrderRejected)][-1]


def main():
    url, key, secret = venue()
    price = float(json.load(urlopen(f"{url}/fapi/v1/depth?symbol=BTCUSDT&limit=5"))["asks"][0][0])
    signed("POST", "v1/order", "symbol=BTCUSDT&side=BUY&type=MARKET&quantity=0.02")
    signed("POST", "v1/order",
           f"symbol=BTCUSDT&side=BUY&type=LIMIT&timeInForce=GTC&quantity=0.03&price={.8 * price:.1f}")
    common = {"api_key": key, "api_secret": secret, "account_type": BinanceAccountType.USDT_FUTURES,
              "base_url_http": url, "base_url_ws": url.replace("http", "ws"),
              "instrument_provider": InstrumentProviderConfig(load_ids=frozenset([BTC]))}
    node = TradingNode(TradingNodeConfig(
        trader_id=TraderId("LOCALNET-001"), logging=LoggingConfig(log_level="ERROR"),
        exec_engine=LiveExecEngineConfig(reconciliation=True, reconciliation_startup_delay_secs=0.),
        data_clients={BINANCE: BinanceDataClientConfig(**common)},
        exec_clients={BINANCE: BinanceExecClientConfig(**common, futures_leverages={BinanceSymbol("BTCUSDT"): 10})},
        timeout_connection=20., timeout_reconciliation=10., timeout_portfolio=10., timeout_disconnection=5.,
        timeout_post_stop=1.))
    scenario = Scenario(node)
    node.trader.add_strategy(scenario)
    node.add_data_client_factory(BINANCE, BinanceLiveDataClientFactory)
    node.add_exec_client_factory(BINANCE, BinanceLiveExecClientFactory)
    node.build()
    node.run()
    if scenario.failure is not None: print(repr(scenario.failure), file=sys.stderr, flush=True)
    os._exit(scenario.failure is not None)     # its threads may outlive the interpreter, which then hangs


main()
