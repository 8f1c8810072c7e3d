"What localnet shows agrees with itself while accounts trade in it, and a recorded book is shown as it was"
import json
from pathlib import Path

import numpy as np
import pytest

from tradelab.instruments import BITCOIN
from tradelab.localnet.accounts import Account
from tradelab.localnet.engine import ENDPOINTS, Exchange
from tradelab.localnet.market import Market, depth, klines
from tradelab.localnet.protocol import RequestDeniedError
from tradelab.localnet.sources import Recorded, Replay
from tradelab.market.candles import frame
from tradelab.settings import CostModel

CAPTURE = Path(__file__).resolve().parents[2] / "shared/fixtures/binance/cryptofeed_real_2021-07"
HOUR, START = 3_600_000, 1_640_995_200_000


def walk(random, length=60):
    "A random walk of hours on the tick"
    close = np.round(20_000 * np.exp(np.cumsum(random.normal(0, .005, length))), 1)
    opened = np.concatenate([[20_000.], close[:-1]])
    prices = [opened, np.maximum(opened, close) + 30, np.minimum(opened, close) - 30, close]
    return {"BTC/USDT:USDT": frame(START + np.arange(length) * HOUR,
                                   np.round(np.stack([*prices, random.uniform(50, 90, length)], 1), 3))}


def trade(exchange, random):
    "A random order of a random account; how often it was refused"
    side, name = ("BUY", "SELL")[random.integers(2)], ("a", "b")[random.integers(2)]
    asked = {"symbol": "BTCUSDT", "side": side, "type": "MARKET", "quantity": f"{random.integers(10, 900) / 1000:.3f}"}
    if random.integers(2):
        price = exchange.market.last(0) + random.integers(-300, 300) / 10
        asked |= {"type": "LIMIT", "timeInForce": "GTC", "price": f"{price:.1f}"}
    try: ENDPOINTS["POST", "v1/order"].reply(exchange, exchange.accounts[name], asked)
    except RequestDeniedError: return 1
    return 0


def session(seed, costs):
    "An exchange in which two accounts trade at random, what its public streams sent, and how many orders it refused"
    random = np.random.default_rng(seed)
    source = Replay(walk(random), start=START + 20 * HOUR, instruments=[BITCOIN])
    market = Market(source.history(), source.instruments, costs=costs, interval=source.interval, now=source.now)
    market.wants = lambda stream: True
    exchange = Exchange(market, [Account(name, market, costs, 1e6) for name in "ab"], costs, profile="book")
    events, refused = [], 0
    for step in source.steps():
        exchange.step(step)
        for _ in range(4):
            refused += trade(exchange, random)
            events += market.take_events()
            assert market.book(0).best_bid < market.book(0).best_ask
        exchange.take_events()
    return exchange, events, refused


@pytest.mark.parametrize("costs", [CostModel(), CostModel.realistic()], ids=["spread", "impact"])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_shown_agrees_while_accounts_trade(seed, costs):
    exchange, events, refused = session(seed, costs)
    sent = lambda stream: [event for name, event in events if name == f"btcusdt@{stream}"]
    trades = sent("aggTrade")
    assert refused < 20
    assert len(trades) > 200
    assert [each["a"] for each in trades] == list(range(trades[0]["a"], trades[0]["a"] + len(trades)))
    closed = [event["k"] for event in sent("kline_1h") if event["k"]["x"]]
    assert len(closed) == 39
    for candle in closed:
        inside = [each for each in trades if candle["t"] <= each["T"] <= candle["T"]]
        prices = [float(each["p"]) for each in inside]
        assert [float(candle["h"]), float(candle["l"]), candle["n"]] == [max(prices), min(prices), len(inside)]
        assert float(candle["v"]) == pytest.approx(sum(float(each["q"]) for each in inside))
    assert [row[1:6] for row in klines(exchange.market, 0, {"interval": "1h"})[-40:-1]] == [
        [candle[name] for name in "ohlcv"] for candle in closed]
    assert all(float(event["b"]) < float(event["a"]) for event in sent("bookTicker"))
    json.dumps(events, allow_nan=False)


@pytest.mark.parametrize("speed", ["", "@100ms", "@500ms"])
def test_a_copy_of_the_book_that_follows_the_diffs_is_the_book(speed):
    exchange, events, _ = session(5, CostModel())
    market, copy, number = exchange.market, {"b": {}, "a": {}}, None
    snapshot = depth(market, {"symbol": "BTCUSDT", "limit": "1000"})
    for event in (event for name, event in [*events, *market.take_events()] if name == f"btcusdt@depth{speed}"):
        assert number in (None, event["pu"])
        number = event["u"]
        for side in "ba": copy[side] |= dict(event[side])
    assert number == snapshot["lastUpdateId"]
    for side, name in (("b", "bids"), ("a", "asks")):
        left = {price: quantity for price, quantity in copy[side].items() if float(quantity)}
        assert left == dict(snapshot[name])


@pytest.mark.skipif(not CAPTURE.exists(), reason="the shared fixtures are not here")
def test_a_recorded_book_is_shown_with_the_numbers_of_its_recording():
    source = Recorded(CAPTURE)
    market = Market(source.history(), source.instruments, interval=source.interval, now=source.now)
    market.wants = lambda stream: True
    events = []
    for step in source.steps():
        for move in step: market.apply(move)
        events += market.take_events()
    real = [json.loads(line)["data"] for line in (CAPTURE / "ws.jsonl").read_text().splitlines()]
    for name in market.ids:
        numbers = {event["u"] for event in real if event["e"] == "depthUpdate" and event["s"] == name}
        shown = [event for stream, event in events if stream == f"{name.lower()}@depth@100ms"]
        assert len(shown) > 100
        assert {event["u"] for event in shown[2:]} <= numbers
        assert all(later["pu"] == event["u"] for event, later in zip(shown, shown[1:]))
