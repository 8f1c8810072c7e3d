"""Stops and targets that stand at localnet fill as the kernel says, to the last digit: a client places them by hand,
over real sockets, behind each fill and before the candle goes on"""
import asyncio
import json
import time
from collections import Counter
from urllib.parse import urlencode

import aiohttp
import numpy as np
import pandas as pd
import pytest
from pydantic import SecretStr

from tradelab.account import POSITION, apply_fill, mark, new_account
from tradelab.config import VenueSettings
from tradelab.evaluation.difference import first_difference
from tradelab.events import CLOSE, HIGH, LOW
from tradelab.live.ledger import Ledger
from tradelab.live.session import Session
from tradelab.localnet.protocol import signature
from tradelab.localnet.server import Localnet
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1, funding
from tradelab.policies import Policy
from tradelab.risk.execution import triggers
from tradelab.risk.stops import enter, track
from tradelab.runs.run import make_trader
from tradelab.settings import CostModel, Execution, Limits, Stops
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import SimulationSettings, market_data
from tradelab.venues.binance import BinanceVenue
from tradelab.venues.memory import MemoryVenue

pytestmark = pytest.mark.integration
HISTORY, LIVE = 300, 1_000
SYMBOLS = "BTC/USDT:USDT", "ETH/USDT:USDT"
LIMITS = Limits(max_position=.8, max_daily_loss=None, max_drawdown=.9, max_participation=None, max_orders=None,
                price_band=None, stops=Stops(stop_loss=.012, take_profit=.02, trailing_stop=.016))
KEY = {"X-MBX-APIKEY": "key"}
FRAMES = {symbol: ar1(HISTORY + LIVE + 2, volatility=.008, seed=21 + n) for n, symbol in enumerate(SYMBOLS)}
RATES = {symbol: funding(frame, seed=3) for symbol, frame in FRAMES.items()}
DATA = market_data(FRAMES, funding=RATES)
START, BEGIN = FRAMES[SYMBOLS[0]].index[HISTORY], int(times(FRAMES[SYMBOLS[0]])[HISTORY])


def targets(seed):
    "Targets that stay for some candles, turn round, grow and go"
    random = np.random.default_rng(seed)
    index = FRAMES[SYMBOLS[0]].index[HISTORY:]
    rows = random.choice([-.9, -.4, 0., .3, .5, 1.], (len(index), 2)) / 2
    stays = random.random((len(index), 2)) < .8
    return pd.DataFrame(np.where(stays, np.nan, rows), index, SYMBOLS).ffill().fillna(0.)


class ByHand:
    "A client of localnet that trades the orders of a journal, and protects what it holds itself"

    def __init__(self, exchange, orders, instruments):
        self.url, self.orders, self.instruments = exchange.url, orders, [each.row()[()] for each in instruments]
        self.ids = [symbol.split("/")[0] + "USDT" for symbol in SYMBOLS]
        self.account, self.positions = new_account(10_000.), np.zeros(2, POSITION)
        self.rows, self.limits = np.zeros(2), LIMITS.row()
        self.last = [0, 0]            # trade of each symbol that is booked
        self.standing = [{}, {}]      # by kind of stop: its number, quantity and trigger
        self.fills, self.equity, self.halts, self.replies = [], [], 0, Counter()

    async def ask(self, method, path, **asked):
        text = urlencode({**asked, "timestamp": int(time.time() * 1000)})
        url = f"{self.url}/fapi/v1/{path}?{text}&signature={signature('secret', text)}"
        async with self.http.request(method, url, headers=KEY) as answer: reply = await answer.json()
        if isinstance(reply, dict) and "code" in reply: self.replies[reply["code"]] += 1
        return reply

    async def catch_up(self):
        "Book what the exchange has filled; true if there was anything"
        rows = [(row["id"], n, row) for n, name in enumerate(self.ids)
                for row in await self.ask("GET", "userTrades", symbol=name, fromId=self.last[n] + 1)]
        for number, n, row in sorted(rows, key=lambda each: each[0]):
            quantity = float(row["qty"]) * (1. if row["side"] == "BUY" else -1.)
            self.fills.append((n, quantity, float(row["price"]), float(row["commission"]), row["maker"]))
            apply_fill(self.account, self.positions, n, *self.fills[-1][1:4])
            self.last[n] = number
        return bool(rows)

    async def protect(self):
        "Place what should stand, then cancel what should not; a stop that would trigger at once is a market order"
        for n, name in enumerate(self.ids):
            position = self.positions[n]
            held, wanted = float(position["quantity"]), {}
            if held:
                if position["best_price"] == 0.: enter(position, 0., 1.)
                levels = triggers(position, self.limits, self.instruments[n])
                wanted = {kind: (held, float(level)) for kind, level in enumerate(levels) if not np.isnan(level)}
            old, self.standing[n] = self.standing[n], {}
            for kind, terms in wanted.items():
                if kind in old and old[kind][1:] == terms: self.standing[n][kind] = old.pop(kind)
                elif number := await self.place_stop(name, kind, *terms): self.standing[n][kind] = (number, *terms)
            for number, *_ in old.values(): await self.ask("DELETE", "algoOrder", symbol=name, algoId=number)
            await self.catch_up()

    async def place_stop(self, name, kind, held, level):
        order = {"symbol": name, "side": "SELL" if held > 0 else "BUY", "quantity": abs(held), "reduceOnly": "true"}
        stop = {"algoType": "CONDITIONAL", "type": "TAKE_PROFIT_MARKET" if kind == 1 else "STOP_MARKET",
                "triggerPrice": level}
        reply = await self.ask("POST", "algoOrder", **order, **stop)
        if reply.get("code") == -2021: await self.ask("POST", "order", **order, type="MARKET")
        return reply.get("algoId")

    async def trade(self, open_time):
        "The orders that were decided at a close, one that closes before one that opens"
        for n, quantity in enumerate(self.orders[open_time]):
            held = float(self.positions[n]["quantity"])
            closing = max(min(quantity, -held), 0.) if held < 0 else min(max(quantity, -held), 0.)
            for part, closes in ((closing, "true"), (round(quantity - closing, 8), "false")):
                if part: await self.ask("POST", "order", symbol=self.ids[n], side="BUY" if part > 0 else "SELL",
                                        type="MARKET", quantity=abs(part), reduceOnly=closes)
        await self.catch_up()

    async def step(self, open_time, closed):
        await self.catch_up()
        for n in range(2):
            if self.positions[n]["quantity"] and self.positions[n]["best_price"]:
                track(self.positions[n], closed[n][HIGH], closed[n][LOW])
        mark(self.account, self.positions, np.array(closed)[:, CLOSE].copy())
        self.equity.append(float(self.account[0]["equity"]))
        if open_time not in self.orders: return False
        await self.trade(open_time)
        await self.protect()
        return True

    async def run(self):
        "Candle after candle until the journal ends"
        listen = await self.http_and_key()
        streams = "/".join(f"{name.lower()}@kline_1h" for name in self.ids)
        socket = self.url.replace("http", "ws")
        async with (self.http, self.http.ws_connect(f"{socket}/private/ws/{listen}") as user,
                    self.http.ws_connect(f"{socket}/market/stream?streams={streams}") as market):
            queue = asyncio.Queue()
            tasks = [asyncio.ensure_future(self.hear(each, queue)) for each in (user, market)]
            await self.act(user)
            await market.send_json({"method": "LIST_SUBSCRIPTIONS", "id": self.begin})
            await self.live(queue, user, market)
            for task in tasks: task.cancel()

    async def http_and_key(self):
        self.http = aiohttp.ClientSession()
        return (await self.ask("POST", "listenKey"))["listenKey"]

    async def hear(self, socket, queue):
        async for message in socket: queue.put_nowait(json.loads(message.data))

    async def act(self, user):
        await user.send_json({"method": "LIST_SUBSCRIPTIONS", "id": f"acted{max(self.last)}"})

    async def live(self, queue, user, market):
        closed = {}
        while True:
            frame = await queue.get()
            if frame.get("e") == "ORDER_TRADE_UPDATE" and frame["o"]["x"] == "TRADE":
                if await self.catch_up():
                    self.halts += 1
                    await self.protect()
                await self.act(user)
            kline = frame.get("data", {}).get("k", {})
            if not kline.get("x"): continue
            closed.setdefault(kline["t"], {})[kline["s"]] = [float(kline[name]) for name in "ohlcv"]
            if len(closed[kline["t"]]) < 2: continue
            if not await self.step(kline["t"], [closed[kline["t"]][name] for name in self.ids]): return
            await self.act(user)
            await market.send_json({"method": "LIST_SUBSCRIPTIONS", "id": kline["t"]})


def test_stops_that_stand_at_localnet_fill_as_the_kernel_says():
    costs = CostModel.realistic()
    expected = backtest(targets(5), FRAMES, START, costs=costs, limits=LIMITS, funding=RATES,
                        execution=Execution(protect=True), baselines=())
    journal = expected.rows
    orders = {int(row["open_time"][0]): row["order"].tolist() for row in journal[:LIVE]}
    with Localnet(FRAMES, RATES, start=BEGIN, api_key="key", api_secret="secret", costs=costs) as exchange:
        client = ByHand(exchange, orders, DATA.instruments)
        client.begin = exchange.exchange.market.open_time - 3_600_000
        asyncio.run(client.run())
    wanted = [(int(row["symbol"]), float(row["quantity"]), float(row["price"]), float(row["fee"]), bool(row["maker"]))
              for row in expected.fill_rows if row["open_time"] <= journal[LIVE]["open_time"][0]]
    assert client.fills == wanted
    paid = np.concatenate([[0.], journal["funding"].sum(axis=1).cumsum()])[:LIVE + 1]   # the client books fills alone
    assert np.abs(client.equity + paid - journal["equity"][:LIVE + 1, 0]).max() < 1e-9
    protects = expected.fill_rows["protects"] != 0
    entered = {(row["symbol"], row["open_time"]) for row in expected.fill_rows[~protects]}
    of_the_entry = [row for row in expected.fill_rows[protects] if (row["symbol"], row["open_time"]) in entered]
    assert protects.sum() > 100
    assert len(of_the_entry) > 20


def wander(parameters, memory, observation, prices, targets):
    "Targets that stay for some candles, turn round, grow and go, as a seed and the number of the decision say"
    memory[0] += 1.
    random = np.random.default_rng([int(parameters[0]), int(memory[0])])
    for n in range(len(prices)):
        if memory[0] == 1. or random.random() < .2: memory[n + 1] = random.choice([-.9, -.4, 0., .3, .5, 1.]) / 2
        targets[n] = memory[n + 1]


def told(fill_rows):
    "Symbol by symbol: which of two is filled first at one open is of no account"
    rows = [(SYMBOLS[row["symbol"]], float(row["quantity"]), float(row["price"]), float(row["fee"]))
            for row in fill_rows]
    return by_symbol(rows)


def by_symbol(rows): return sorted(rows, key=lambda row: row[0])


def live(folder, venue, execution, count):
    "The journal of a session that protects itself"
    trader = make_trader(Policy("wander", wander, np.array([5.]), memory=3), LIMITS, DATA.instruments, timeframe="1h",
                         execution=execution)
    ledger = Ledger(f"sqlite:///{folder}/tradelab.db")
    asyncio.run(Session(trader, venue, ledger, folder, origin="stops", id="stops", say=lambda line: None).run(count))
    return ledger.journal("stops")


def of_the_backtest(execution):
    return backtest(Policy("wander", wander, np.array([5.]), memory=3), FRAMES, START, costs=CostModel.realistic(),
                    limits=LIMITS, funding=RATES, execution=execution, baselines=())


def test_a_session_that_protects_itself_is_its_backtest(tmp_path):
    "Over sockets: decisions bit for bit, fills to the last digit, those of stops in the candle of their entry, too"
    execution = Execution(protect=True)
    costs = CostModel.realistic()
    with Localnet(FRAMES, RATES, start=BEGIN, api_key="key", api_secret="secret", costs=costs) as exchange:
        settings = VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"),
                                 SecretStr("key"), SecretStr("secret"))
        journal = live(tmp_path, BinanceVenue(settings), execution, LIVE)
        trades = exchange.exchange.accounts["main"].trades
    expected = of_the_backtest(execution)
    assert first_difference(expected.journal[:len(journal) - 2], journal[:-2]) is None
    fills = [(SYMBOLS[trade.n], trade.quantity, trade.price, trade.fee) for trade in trades]
    assert by_symbol(fills) == told(expected.fill_rows[:len(trades)])
    assert np.abs(journal["equity"].to_numpy() - expected.journal["equity"].to_numpy()[:len(journal)]).max() < 1e-9
    assert expected.fill_rows["protects"][:len(trades)].sum() > 100


@pytest.mark.parametrize("style", ["market", "post_only"])
def test_in_memory_too(tmp_path, style):
    "Post-only, positions are bought within a candle, and protected in the rest of it"
    execution = Execution(style, patience=2, protect=True)
    venue = MemoryVenue(DATA, SimulationSettings(CostModel.realistic(), LIMITS), start=BEGIN)
    live(tmp_path, venue, execution, 250)
    expected = of_the_backtest(execution).fill_rows
    fills = [(fill.symbol, fill.quantity, fill.price, fill.fee) for fill in venue.held.fills]
    assert by_symbol(fills) == told(expected[:len(fills)])
    assert expected["protects"][:len(fills)].sum() > 20
