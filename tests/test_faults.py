"Faults at a real exchange: each named one is met, in process and over sockets, and the accounts agree afterwards"
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import ccxt.pro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.localnet.faults import DOORS, OFTEN, SCENARIOS, SESSIONS, Faults, ScenarioError
from tradelab.localnet.limits import LimitSettings
from tradelab.localnet.memory import Memory
from tradelab.localnet.protocol import RequestDeniedError, signature
from tradelab.localnet.proxy import Proxy
from tradelab.localnet.server import ENDPOINTS, MOVES, Localnet, Terms, make_exchange
from tradelab.localnet.sources import Replay, Steps, WallClock
from tradelab.market.candles import frame

BTC = "BTC/USDT:USDT"
HOUR, FIRST = 3_600_000, 1_640_995_200_000


def candles(length=60):
    random = np.random.default_rng(3)
    close = np.round(20_000. * np.exp(np.cumsum(random.normal(0, .003, length))), 1)
    opened = np.concatenate([[20_000.], close[:-1]])
    prices = np.stack([opened, np.maximum(opened, close) + 9, np.minimum(opened, close) - 9, close], 1)
    return {BTC: frame(FIRST + HOUR * np.arange(length), np.column_stack([np.round(prices, 1), np.full(length, 5e3)]))}


class Session:
    "A session without sockets: it sends an order a candle and asks for it, at every door of the faults"
    def __init__(self, faults, profile="book"):
        source = Replay(candles(), {}, FIRST + 12 * HOUR)
        self.faults, self.steps, self.memory = faults, Steps(source.steps()), None
        self.exchange = make_exchange(source, Terms(profile=profile))
        self.exchange.market.wants = lambda stream: True
        self.account = self.exchange.accounts["main"]
        self.now, self.points = FIRST, ["dns", *(scenario.faults[0]["point"] for scenario in SESSIONS.values())]

    def ask(self, method, path, **asked):
        "A request, as a server would carry it out"
        self.now += 10
        fault = self.faults.request(method, path, asked, self.now, "main")
        self.faults.wire(method, path, self.now)
        if fault and not fault.commit and not fault.later_ms: return
        try: ENDPOINTS[method, path].reply(self.exchange, self.account, asked)
        except RequestDeniedError: return
        if self.memory: self.memory.request("main", (method, path), asked)

    def order(self, number, **more):
        self.ask("POST", "v1/order", **{"symbol": "BTCUSDT", "side": "BUY" if number % 3 else "SELL", "type": "MARKET",
                                        "quantity": "0.02", "newClientOrderId": f"mine-{number}"} | more)

    def step(self, number):
        moves = next(self.steps)
        seen = self.faults.moves(moves, self.now)
        self.exchange.step(seen)
        if self.memory: self.memory.step(moves, seen)
        for action in self.faults.on_step(self.exchange, self.now):
            if self.memory: self.memory.action(action)
        self.faults.market_events(self.exchange.market.take_events(), self.now)
        self.faults.server(self.now)
        self.faults.clock(self.now)
        for point in self.points: self.faults.session(point, self.now)
        self.order(number)
        price = round(.97 * self.exchange.market.last(0), 1)
        self.order(number, type="LIMIT", price=str(price), timeInForce="GTC", newClientOrderId=f"far-{number}",
                   side="BUY")
        self.ask("POST", "v1/algoOrder", symbol="BTCUSDT", side="SELL", type="STOP_MARKET", algoType="CONDITIONAL",
                 quantity="0.01", triggerPrice=str(round(.9 * price, 1)))
        self.ask("GET", "v1/order", symbol="BTCUSDT", origClientOrderId=f"mine-{number}")
        self.ask("GET", "v1/openOrders", symbol="BTCUSDT")
        self.ask("DELETE", "v1/order", symbol="BTCUSDT", origClientOrderId=f"far-{number - 1}")
        for path in ("v1/klines", "v3/account"):
            self.faults.request("GET", path, {}, self.now)
            self.faults.wire("GET", "/market/ws/0", self.now)
        self.faults.user_events(self.exchange.take_events(), self.now)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_every_scenario_is_met_and_the_accounts_agree(name):
    faults = Faults(name, seed=1)
    session = Session(faults)
    for number in range(1, 7): session.step(number)
    hits = faults.hits(name)
    assert hits, name
    assert [hit.number for hit in faults.log] == list(range(1, len(faults.log) + 1))
    account = session.account
    np.testing.assert_allclose(account.wallet(), sum(each.amount for each in account.incomes), atol=1e-6)
    np.testing.assert_allclose(sum(trade.quantity for trade in account.trades), account.held(0, "BOTH"), atol=1e-9)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 700), st.floats(), st.text(max_size=5), st.sampled_from(
    ["main", "BTCUSDT", "BREAK", "*", "v1/order", "c", "kline"]), st.lists(st.text(max_size=3), max_size=2))


@st.composite
def faults(draw):
    "Nearly right faults"
    at = draw(st.sampled_from(sorted(DOORS)))
    door = DOORS[at]
    words = draw(st.sets(st.sampled_from(sorted({*OFTEN, *door.on, *door.values}))))
    asked = {"at": at, "do": draw(st.sampled_from(door.does))} | {word: draw(VALUES) for word in sorted(words)}
    return asked | ({"then": [draw(faults())]} if draw(st.integers(0, 5)) == 0 else {})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(faults(), VALUES), max_size=4))
def test_any_scenario_is_refused_in_one_sentence_or_does_no_harm(asked):
    try: armed = Faults(asked)
    except ScenarioError as error:
        assert str(error).startswith("the scenario, line 1")
        return
    session = Session(armed)
    for number in (1, 2): session.step(number)


# ---- restarts ----

ASKED = ("v3/account", "v3/positionRisk", "v1/openOrders", "v1/openAlgoOrders", "v1/income")


def everything(exchange, account="main"):
    "What an account is told, over all interfaces"
    asked = {"symbol": "BTCUSDT"}
    known = [ENDPOINTS["GET", path].reply(exchange, exchange.accounts[account], {}) for path in ASKED]
    return known + [ENDPOINTS["GET", path].reply(exchange, exchange.accounts[account], asked)
                    for path in ("v1/allOrders", "v1/userTrades", "v1/allAlgoOrders")]


@pytest.mark.parametrize("profile", ["book", "backtest"])
@pytest.mark.parametrize("scenario", ["", "hand_trade", "flash_crash", "commit_then_timeout", "filters_change"])
def test_an_exchange_is_rebuilt_with_all_that_clients_and_faults_did(tmp_path, scenario, profile):
    file = tmp_path / "localnet.jsonl"
    def opened(**more):
        session = Session(Faults(scenario), profile)
        def carry_out(account, name, asked): ENDPOINTS[name].reply(session.exchange, session.account, asked)
        session.memory = Memory(file, session.exchange, carry_out, session.steps, MOVES, **more)
        return session
    first = opened()
    for number in range(1, 7): first.step(number)
    first.memory.close()
    second = opened()
    assert everything(second.exchange) == everything(first.exchange)
    for number in (7, 8):
        second.step(number)
    second.memory.close()
    fresh = opened(loss=True)
    assert fresh.exchange.market.now == second.exchange.market.now
    assert fresh.account.trades == []
    assert fresh.account.wallet() == 10_000.


# ---- over sockets ----

class Client(ccxt.pro.binanceusdm):
    "ccxt at a port, with what came by its sockets"
    def __init__(self, port):
        super().__init__({"apiKey": "localnet-key", "secret": "localnet-secret", "enableRateLimit": False,
                          "timeout": 2000})
        self.heard = []
        url = f"http://127.0.0.1:{port}"
        for name, value in self.urls["api"].items():
            if isinstance(value, str): self.urls["api"][name] = value.replace("https://fapi.binance.com", url)
        self.urls["api"]["ws"]["linear"] = url.replace("http", "ws") + "/ws"
        self.options["fetchCurrencies"] = False
        self.exceptions["exact"].update(self.exceptions["linear"]["exact"])

    def handle_message(self, client, message):
        self.heard.append(message)
        super().handle_message(client, message)

    async def buy(self, name):
        return await self.create_order(BTC, "market", "buy", .02, None, {"newClientOrderId": name})

    async def find(self, name): return await self.fetch_order(None, BTC, {"origClientOrderId": name})


def visit(talk, scenario="", **options):
    "A conversation through a proxy with an exchange that has these faults; each as many as its rules say"
    net = Localnet(candles(), start=FIRST + 12 * HOUR, profile="book", faults=Faults(scenario), **options)
    async def run():
        async with Proxy(net.port, net.faults) as proxy:
            client = Client(proxy.port)
            try:
                await client.load_markets()
                return await asyncio.wait_for(talk(client, net), 30)
            finally: await client.close()
    with net: return asyncio.run(run())


@pytest.mark.integration
@pytest.mark.parametrize("name, exists", [
    ("commit_then_timeout", True), ("timeout_before_accept", False), ("timeout_after_fill", True), ("tcp_drop", False),
    ("unavailable_with_commit", True), ("unavailable_without_commit", False), ("bus_1006", True),
    ("unknown_code_5xx", True), ("wire_drop_after", True), ("wire_drop_before", False), ("wire_reset_after", True),
    ("wire_reset_before", False), ("wire_half_open", True), ("wire_cut_json", True), ("wire_html", True)])
def test_an_order_without_an_answer_is_there_or_not(name, exists):
    async def talk(client, net):
        try: answer = await client.buy("mine")
        except ccxt.BaseError: answer = {"id": None}
        assert answer["id"] is None                    # of a cut reply ccxt makes an empty order, without an exception
        assert len(net.faults.hits(name)) == 1
        if exists: return (await client.find("mine"))["status"]
        with pytest.raises(ccxt.OrderNotFound): await client.find("mine")
        return (await client.buy("mine"))["info"]["status"]
    assert visit(talk, name) == ("closed" if exists else "FILLED")


@pytest.mark.integration
def test_an_order_that_is_matched_late():
    async def talk(client, net):
        with pytest.raises(ccxt.RequestTimeout, match="-1007"): await client.buy("mine")
        with pytest.raises(ccxt.OrderNotFound, match="-2013"): await client.find("mine")
        while True:
            try: return (await client.find("mine"))["filled"]
            except ccxt.OrderNotFound: await asyncio.sleep(.05)
    assert visit(talk, [{"scenario": "matched_late", "later_ms": 300}]) == .02


@pytest.mark.integration
def test_a_lost_fill_and_a_socket_that_is_cut():
    async def talk(client, net):
        watching = asyncio.ensure_future(client.watch_orders())
        while not any("/private" in url for url in client.clients): await asyncio.sleep(.01)
        await asyncio.gather(*(each.connected for url, each in client.clients.items() if "/private" in url))
        await client.buy("first")
        await client.buy("second")
        while not any(isinstance(event, dict) and event.get("e") == "ORDER_TRADE_UPDATE" and event["o"]["x"] == "TRADE"
                      for event in client.heard): await asyncio.sleep(.01)
        filled = {event["o"]["c"] for event in client.heard if event.get("e") == "ORDER_TRADE_UPDATE"
                  and event["o"]["x"] == "TRADE"}
        trades = await client.fetch_my_trades(BTC)
        watching.cancel()
        net.faults.arm("reconnect_without_rest", lasts_ms=200)
        with pytest.raises(ccxt.NetworkError):
            while True: await client.watch_orders()
        with pytest.raises(ccxt.ExchangeNotAvailable): await client.fetch_positions()
        while True:
            try: return filled, len({trade["order"] for trade in trades}), await client.fetch_positions()
            except ccxt.ExchangeNotAvailable: await asyncio.sleep(.05)
    filled, orders, positions = visit(talk, "lost_fill")
    assert filled == {"second"}
    assert orders == 2
    assert positions[0]["contracts"] == .04


@pytest.mark.integration
def test_a_ban_says_until_when():
    async def talk(client, net):
        net.faults.arm("ban", lasts_ms=60_000)
        with pytest.raises(ccxt.DDoSProtection, match="IP banned until"): await client.fetch_ticker(BTC)
        assert 0 < int(client.last_response_headers["Retry-After"]) <= 60
        net.faults.disarm()
        return await client.fetch_ticker(BTC)
    assert visit(talk)["last"] > 0


@pytest.mark.integration
def test_the_control_port_arms_faults_and_tells_what_was_injected():
    async def talk(client, net):
        def control(path, asked=None):
            request = Request(net.control_url + path, json.dumps(asked).encode() if asked else None,
                              {"X-Localnet-Token": net.token})
            try: return json.loads(urlopen(request).read())
            except HTTPError as refused: return json.loads(refused.read())["error"]
        armed = await asyncio.to_thread(control, "/fault", {"scenario": "html_with_200"})
        assert isinstance(armed, dict)
        assert (await client.fetch_balance())["total"] == {}                   # LIVE: an empty balance, no exception
        wrong = await asyncio.to_thread(control, "/fault", {"scenario": "html"})
        return wrong, await asyncio.to_thread(control, "/faults")
    wrong, log = visit(talk)
    assert wrong.startswith('the scenario, line 1: scenario "html" is unknown: choose one of timeout_before_accept')
    assert [(hit["number"], hit["scenario"]) for hit in log] == [(1, "html_with_200")]


CLOCKS = {"lockstep": {}, "speed": {"speed": 3600.}, "wall clock": {"source": WallClock()}}


@pytest.mark.integration
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("loss", [True, False])
def test_a_server_that_restarts_forgets_all_or_nothing(tmp_path, loss, kept, clock):
    async def talk(client, net):
        await client.buy("mine")
        service, hall, now = net.service, net.hall, net.exchange.market.now
        if not (loss or kept):
            net.faults.arm("server_forgets", loss=False)
            while not net.faults.hits("server_forgets"): await asyncio.sleep(.01)
            assert net.service is service
            return (await client.fetch_positions())[0]["contracts"], (await client.find("mine"))["status"]
        net.faults.arm("server_forgets", loss=loss)
        while net.hall is hall: # made last, when all else is there
            try: await client.fetch_time()
            except ccxt.BaseError: pass
            await asyncio.sleep(.01)
        assert 0 <= net.exchange.market.now - now < 20 * 60_000       # of the market: no way back, and no jump
        positions = await client.fetch_positions()
        if not loss: return positions[0]["contracts"], (await client.find("mine"))["status"]
        with pytest.raises(ccxt.OrderNotFound): await client.find("mine")
        return positions
    kept = {"memory": tmp_path / "localnet.jsonl"} if kept else {}
    assert visit(talk, **CLOCKS[clock], **kept) == ([] if loss else (.02, "closed"))


# ---- killed in real time ----

def serve_forever(clock, profile, file, port=0):
    Localnet(candles(), start=FIRST + 12 * HOUR, profile=profile, memory=file, port=port, **CLOCKS[clock],
             limits=LimitSettings(enforced=False)).run_forever()


class Served:
    "A localnet in a process of its own"
    def __init__(self, *words):
        program = f"from test_faults import serve_forever; serve_forever{words}"
        self.process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent, text=True,
                                        stdout=subprocess.PIPE)

    def __enter__(self):
        self.url = self.process.stdout.readline().split()[3]
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, method, path, **asked):
        "A signed request; what was refused is an answer, too"
        text = urlencode(asked | {"timestamp": time.time_ns() // 1_000_000})
        request = Request(f"{self.url}/fapi/{path}?{text}&signature={signature('localnet-secret', text)}",
                          headers={"X-MBX-APIKEY": "localnet-key"}, method=method)
        try: return json.loads(urlopen(request, timeout=20).read())
        except HTTPError as refused: return json.loads(refused.read())

    def known(self):
        "What only grows: trades, income and orders; and what each order was told at its beginning"
        both = {"symbol": "BTCUSDT", "limit": 1000}
        orders = [{name: each[name] for name in ("orderId", "clientOrderId", "price", "origQty", "time")}
                  for each in self.ask("GET", "v1/allOrders", **both)]
        return self.ask("GET", "v1/userTrades", **both), self.ask("GET", "v1/income", limit=1000), orders


@pytest.mark.integration
@pytest.mark.parametrize("profile", ["book", "backtest"])
@pytest.mark.parametrize("clock", ["speed", "wall clock"])
def test_a_localnet_that_is_killed_in_real_time_goes_on_with_what_clients_were_answered(tmp_path, clock, profile):
    words = clock, profile, str(tmp_path / "localnet.jsonl")
    def order(net, number, **more):
        return net.ask("POST", "v1/order", symbol="BTCUSDT", quantity="0.02", newClientOrderId=f"mine-{number}", **more)
    with Served(*words) as net:
        for number in range(12):
            price = float(net.ask("GET", "v1/ticker/price", symbol="BTCUSDT")["price"])
            assert "orderId" in order(net, number, side="SELL" if number % 3 else "BUY", type="MARKET")
            order(net, f"{number}-waits", side="BUY", type="LIMIT", price=f"{price - number:.1f}", timeInForce="GTC")
            net.ask("POST", "v1/countdownCancelAll", symbol="BTCUSDT", countdownTime=1 + 40 * (number % 2))
        waits = order(net, "far", side="BUY", type="LIMIT", price=f"{.98 * price:.1f}", timeInForce="GTC")
        before = net.known()
    with Served(*words) as net:
        after = net.known()
        for old, new in zip(before, after): assert new[:len(old)] == old
        assert len(before[0]) >= 12
        told = net.ask("GET", "v1/order", symbol="BTCUSDT", orderId=waits["orderId"])
        assert told["clientOrderId"] == "mine-far"
        account = net.ask("GET", "v3/account")
        trades, incomes, _ = net.known()
    held = sum(float(each["qty"]) * (1 if each["side"] == "BUY" else -1) for each in trades)
    assert sum(float(each["positionAmt"]) for each in account["positions"]) == pytest.approx(held)
    assert float(account["totalWalletBalance"]) == pytest.approx(sum(float(each["income"]) for each in incomes))
    fresh = Localnet(candles(), start=FIRST + 12 * HOUR, profile=profile, memory=words[2], **CLOCKS[clock])
    assert len(fresh.exchange.accounts["main"].trades) >= len(trades)
    fresh.memory.close()


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(6))
def test_whatever_was_done_in_real_time_is_rebuilt_to_the_last_digit(tmp_path, seed):
    "Market, limit and conditional orders, some refused, countdowns of some milliseconds, a fault, while prices run"
    random, file = np.random.default_rng(seed), tmp_path / "localnet.jsonl"
    options = {"start": FIRST + 12 * HOUR, "profile": ("book", "backtest")[seed % 2], "memory": file,
               "limits": LimitSettings(enforced=False), "speed": (3600., 36_000., 200_000.)[seed % 3]}
    fault = random.choice(["hand_trade", "flash_crash", "liquidation", "transfer", "filters_change", "funding_extreme"])
    with Localnet(candles(), faults=[{"scenario": str(fault), "after": 3}], **options) as net:
        def ask(method, path, **more): return Served.ask(net, method, path, symbol="BTCUSDT", **more)
        for _ in range(60):
            price, kind = float(ask("GET", "v1/ticker/price")["price"]), random.choice(5, p=[.3, .3, .15, .15, .1])
            side, near = str(random.choice(["BUY", "SELL"])), f"{price + random.uniform(-60, 60):.1f}"
            waits = {"side": side, "quantity": "0.02"}
            if kind == 0: ask("POST", "v1/order", side=side, type="MARKET", quantity=random.choice(["0", "0.02", "9"]))
            if kind == 1: ask("POST", "v1/order", type="LIMIT", price=near,
                              timeInForce=random.choice(["GTC", "IOC", "GTX"]), **waits)
            if kind == 2: ask("POST", "v1/algoOrder", type="STOP_MARKET", algoType="CONDITIONAL", triggerPrice=near,
                              **waits)
            if kind == 3: ask("POST", "v1/countdownCancelAll", countdownTime=random.choice([1, 3, 10, 30]))
            if kind == 4: ask("POST", "v1/leverage", leverage=random.integers(1, 100))
        ask("POST", "v1/countdownCancelAll", countdownTime=0)
    again = Localnet(candles(), **options)
    again.memory.close()
    assert everything(again.exchange) == everything(net.exchange)
