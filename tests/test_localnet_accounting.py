"""localnet's books: after any sequence of requests, candles, funding and liquidations, wallet, positions, incomes,
trades and events say the same, and the kernel that is fed the same has the same"""
import json
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from http.client import HTTPConnection
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

from tradelab.account import age, mark
from tradelab.events import CLOSE
from tradelab.instruments import BITCOIN
from tradelab.localnet import accounts, conditional, engine, market
from tradelab.localnet.accounts import SIDES, Account
from tradelab.localnet.engine import Exchange
from tradelab.localnet.faults import Faults
from tradelab.localnet.market import Market
from tradelab.localnet.orders import read_order
from tradelab.localnet.protocol import ApiKey, RequestDeniedError, format_number, signature
from tradelab.localnet.server import Localnet
from tradelab.localnet.service import milliseconds_now
from tradelab.localnet.sources import Replay
from tradelab.market.candles import frame
from tradelab.orders import LIMIT, MARKET, NONE
from tradelab.risk.execution import new_order
from tradelab.settings import CostModel
from tradelab.sim.kernel import advance, pay_funding

HOUR = 3_600_000
FIRST = 1_640_995_200_000
BTC, ETH = "BTC/USDT:USDT", "ETH/USDT:USDT"
INSTRUMENTS = (BITCOIN, replace(BITCOIN, symbol=ETH, price_tick=.01, min_notional=20., min_quantity=.01,
                                quantity_step=.01))
ENDPOINTS = market.ENDPOINTS | accounts.ENDPOINTS | engine.ENDPOINTS | conditional.ENDPOINTS
COSTS = CostModel(), CostModel.ideal(), CostModel(participation=.05), CostModel(latency=1), \
    CostModel(impact=1., spread_volatility=.02, participation=.2)
DEPOSIT = 2_000.
LENGTH = 310    # candles; most are history, from which costs are known
START = FIRST + 250 * HOUR
NAMES = "main", "other"


@cache
def candles(wild):
    "Two random walks on the tick, with funding every eight hours; a wild one moves by a tenth an hour"
    found = {}
    for symbol, level, tick, seed in ((BTC, 20_000., .1, 1), (ETH, 1_500., .01, 2)):
        random = np.random.default_rng(seed)
        scale = np.where(np.arange(LENGTH) < 250, .003, .1 if wild else .01)
        close = level * np.exp(np.cumsum(random.normal(0, scale)))
        opened = np.concatenate([[level], close[:-1]]) * np.exp(random.normal(0, .003, LENGTH))
        reach = np.exp(np.abs(random.normal(0, .05 if wild else .005, (2, LENGTH))))
        rows = [opened, np.maximum(opened, close) * reach[0], np.minimum(opened, close) / reach[1], close]
        rows = np.maximum(np.round(np.stack(rows) / tick), 1.) * tick
        found[symbol] = frame(FIRST + np.arange(LENGTH) * HOUR,
                              np.round(np.concatenate([rows, random.uniform(.2, 8., (1, LENGTH))]).T, 6))
    return found


def funding():
    times = pd.to_datetime(START + np.arange(1, 7) * 8 * HOUR, unit="ms", utc=True)
    return {BTC: pd.Series([.0001, -.0003, .0002, .0004, -.01, .01], times)}


class World:
    "An exchange of two accounts, and what its clients have heard"

    def __init__(self, profile, costs=COSTS[0], wild=False, names=NAMES):
        source = Replay(candles(wild), funding(), start=START)
        self.steps = source.steps()
        self.market = Market(source.history(), INSTRUMENTS, source.funding, costs, now=source.now)
        clients = [Account(name, self.market, costs, DEPOSIT) for name in names]
        self.exchange = Exchange(self.market, clients, costs, profile)
        conditional.Conditional(self.exchange)
        self.heard = {name: [] for name in names}
        self.refusals, self.faults = [], Faults()
        self.step()   # the market opens

    def step(self):
        "What one barrier lets pass; False at the end"
        moves = next(self.steps, None)
        if moves is None: return False
        self.exchange.step(self.faults.moves(moves, self.market.now))
        self.faults.on_step(self.exchange, self.market.now)
        self.listen()
        return True

    def listen(self):
        self.market.take_events()
        for name, event in self.exchange.take_events():
            json.dumps(event, allow_nan=False)
            self.heard[name].append(event)

    def ask(self, name, method, path, **asked):
        "The reply to a request; None if it was refused"
        asked = {key: text for key, text in asked.items() if text not in (None, "")}
        try: reply = ENDPOINTS[method, path].reply(self.exchange, self.exchange.accounts[name], asked)
        except RequestDeniedError as refused:
            self.refusals.append(refused.code)
            return None
        finally: self.listen()
        assert "e+" not in json.dumps(reply, allow_nan=False)
        return reply


def texts(value): return format_number(round(value, 8))


def on_tick(price, tick): return texts(max(round(price / tick), 1) * tick)


SYMBOLS = st.sampled_from([0, 1])
PLAIN = st.fixed_dictionaries(dict(
    what=st.just("order"), n=SYMBOLS, side=st.sampled_from(["BUY", "SELL"]), type=st.sampled_from(["MARKET", "LIMIT"]),
    away=st.integers(-300, 300), lots=st.integers(1, 60), force=st.sampled_from(["GTC", "GTC", "IOC", "FOK", "GTX"]),
    reduce=st.booleans(), position=st.sampled_from(["LONG", "SHORT"]), batch=st.integers(0, 4)))
WAITING = st.fixed_dictionaries(dict(
    what=st.just("algo"), n=SYMBOLS, side=st.sampled_from(["BUY", "SELL"]),
    type=st.sampled_from(list(conditional.KINDS)), away=st.integers(-300, 300), lots=st.integers(1, 60),
    close=st.booleans(), reduce=st.booleans(),
    position=st.sampled_from(["LONG", "SHORT"]), activate=st.booleans(),
    force=st.sampled_from(["GTC", "GTC", "IOC", "GTD", "GTE_GTC"]),
    working=st.sampled_from(["CONTRACT_PRICE", "MARK_PRICE"])))
CHANGE = st.fixed_dictionaries(dict(
    what=st.sampled_from(["cancel", "modify", "cancel algo", "cancel all"]), which=st.integers(0, 9),
    away=st.integers(-300, 300), lots=st.integers(1, 60), n=SYMBOLS))
SETTING = st.fixed_dictionaries(dict(
    what=st.sampled_from(["leverage", "margin type", "dual", "margin", "transfer"]), n=SYMBOLS,
    value=st.integers(1, 125), yes=st.booleans(), position=st.sampled_from(["LONG", "SHORT"])))
FAULT = st.fixed_dictionaries(dict(
    what=st.just("fault"), do=st.sampled_from(["trade", "flatten", "fill", "transfer", "liquidate", "stick", "crash",
                                              "suspend"]),
    n=SYMBOLS, side=st.sampled_from(["BUY", "SELL"]), by=st.sampled_from([-.2, -.05, .05])))
STEP = st.just({"what": "step"})
ACTIONS = st.lists(st.tuples(st.sampled_from(NAMES), st.one_of(PLAIN, PLAIN, PLAIN, WAITING, WAITING, CHANGE, SETTING,
                                                               FAULT, STEP, STEP, STEP)), min_size=20, max_size=60)


def order_of(world, account, asked):
    "Symbol, side, quantity of a random order, and a function to set a price; most of what reduces could reduce"
    n = asked["n"]
    position = asked["position"] if account.dual else "BOTH"
    held = account.held(n, position)
    closes = (asked["reduce"] or asked.get("close")) and held
    sent = {"symbol": world.market.ids[n], "side": ("SELL" if held > 0. else "BUY") if closes else asked["side"],
            "type": asked["type"], "quantity": texts(asked["lots"] * (.01 if n == 0 else .1)),
            "reduceOnly": "true" if asked["reduce"] and not account.dual else None,
            "positionSide": position if account.dual else None}
    return sent, lambda away: on_tick(world.market.last(n) * (1. + away / 1e4), INSTRUMENTS[n].price_tick)


def plain(world, account, asked):
    sent, price = order_of(world, account, asked)
    if asked["type"] == "LIMIT": sent |= {"price": price(asked["away"]), "timeInForce": asked["force"]}
    return {key: text for key, text in sent.items() if text}


def waiting(world, account, asked):
    "The parameters of a random conditional order; most could wait"
    sent, price = order_of(world, account, asked)
    up = (sent["side"] == "BUY") == (asked["type"] in ("STOP", "STOP_MARKET"))
    away = asked["away"] if asked["lots"] == 1 else abs(asked["away"]) * (1 if up else -1)
    sent |= {"algoType": "CONDITIONAL", "triggerPrice": price(away), "timeInForce": asked["force"],
             "goodTillDate": str(world.market.now + 5 * HOUR), "workingType": asked["working"]}
    if asked["type"] in ("STOP", "TAKE_PROFIT"): sent["price"] = price(away + (10 if sent["side"] == "BUY" else -10))
    if asked["type"] == "TRAILING_STOP_MARKET":
        sent |= {"callbackRate": texts(.1 * asked["lots"]), "activatePrice": price(away) if asked["activate"] else None}
    if asked["close"] and asked["type"] in conditional.CLOSING:
        sent |= {"closePosition": "true", "quantity": None, "reduceOnly": None}
    return {key: text for key, text in sent.items() if text}


def change(world, name, asked):
    account = world.exchange.accounts[name]
    n = asked["n"]
    if asked["what"] == "cancel all": return world.ask(name, "DELETE", "v1/allOpenOrders", symbol=world.market.ids[n])
    if asked["what"] == "cancel algo":
        waits = list(account.waiting)
        if waits: world.ask(name, "DELETE", "v1/algoOrder", algoId=str(waits[asked["which"] % len(waits)]))
        return None
    if not account.open: return None
    order = list(account.open.values())[asked["which"] % len(account.open)]
    sent = {"symbol": order.symbol, "orderId": str(order.number)}
    if asked["what"] == "cancel": return world.ask(name, "DELETE", "v1/order", **sent)
    price = on_tick(world.market.last(order.n) * (1. + asked["away"] / 1e4), INSTRUMENTS[order.n].price_tick)
    return world.ask(name, "PUT", "v1/order", **sent, side=order.side, price=price,
                     quantity=texts(asked["lots"] * (.01 if order.n == 0 else .1)))


def setting(world, name, asked):
    symbol, yes = world.market.ids[asked["n"]], asked["yes"]
    match asked["what"]:
        case "leverage": world.ask(name, "POST", "v1/leverage", symbol=symbol, leverage=str(asked["value"]))
        case "margin type":
            world.ask(name, "POST", "v1/marginType", symbol=symbol, marginType="ISOLATED" if yes else "CROSSED")
        case "dual": world.ask(name, "POST", "v1/positionSide/dual", dualSidePosition=str(yes).lower())
        case "margin":
            world.ask(name, "POST", "v1/positionMargin", symbol=symbol, amount=str(asked["value"]),
                      type="1" if yes else "2",
                      positionSide=asked["position"] if world.exchange.accounts[name].dual else None)
        case "transfer":
            try: world.exchange.accounts[name].transfer(float(asked["value"] * (1 if yes else -1)))
            except RequestDeniedError: pass
            world.listen()


def fault(world, name, asked):
    "Something that nobody has asked for, at the next step"
    if asked["do"] == "crash": more = {"at": "moves", "by": asked["by"]}
    else: more = {"at": "step", "account": name}
    if asked["do"] == "trade": more |= {"side": asked["side"], "quantity": .05}
    if asked["do"] == "suspend": more |= {"status": "BREAK" if asked["side"] == "BUY" else "TRADING"}
    if asked["do"] == "transfer": more |= {"amount": 1_000. * asked["by"]}
    world.faults.arm(more | {"do": asked["do"], "symbol": world.market.ids[asked["n"]]})


def perform(world, name, asked):
    account = world.exchange.accounts[name]
    match asked["what"]:
        case "step": world.step()
        case "fault": fault(world, name, asked)
        case "order" if asked["batch"] == 0:
            batch = [plain(world, account, asked | {"lots": lots}) for lots in (asked["lots"], 1, 2)]
            world.ask(name, "POST", "v1/batchOrders", batchOrders=json.dumps(batch))
        case "order": world.ask(name, "POST", "v1/order", **plain(world, account, asked))
        case "algo": world.ask(name, "POST", "v1/algoOrder", **waiting(world, account, asked))
        case "cancel" | "modify" | "cancel algo" | "cancel all": change(world, name, asked)
        case _: setting(world, name, asked)


@dataclass
class Ledger:
    "What an account must have by its trades alone: a second computation, by average cost"
    held: float = 0.
    cost: float = 0.       # of what is held, signed quote
    realised: float = 0.
    trades: list = field(default_factory=list)

    def add(self, quantity, price):
        closing = min(abs(quantity), abs(self.held)) if quantity * self.held < 0. else 0.
        if closing:
            entry, side = self.cost / self.held, np.sign(self.held)
            self.realised += closing * side * (price - entry)
            self.cost -= closing * side * entry
            self.held -= closing * side
        opening = quantity - np.sign(quantity) * closing
        self.held = round(self.held + opening, 8)
        self.cost = self.cost + opening * price if self.held else 0.


def check_trades(account):
    "Positions and incomes follow from the trades"
    ledgers = {row: Ledger() for row in range(len(account.changed))}
    for trade in account.trades: ledgers[account.row(trade.n, trade.position_side)].add(trade.quantity, trade.price)
    for row, ledger in ledgers.items():
        n, side = divmod(row, len(SIDES))
        assert abs(account.held(n, SIDES[side]) - ledger.held) < 1e-7
        part, k = account.part(row)
        if ledger.held: assert np.isclose(part.state.positions[k]["entry_price"], ledger.cost / ledger.held, rtol=1e-6)
        assert part.state.positions[k] == part.told.positions[k] or part.state.positions[k].tobytes()
        assert part.told.positions[k]["quantity"] == part.state.positions[k]["quantity"]
    total = {kind: sum(income.amount for income in account.incomes if income.kind == kind)
             for kind in {income.kind for income in account.incomes}}
    assert np.isclose(total.get("REALIZED_PNL", 0.), sum(each.realised for each in ledgers.values()), atol=1e-4)
    assert np.isclose(total.get("REALIZED_PNL", 0.), sum(trade.realised for trade in account.trades), atol=1e-6)
    fees = sum(trade.fee for trade in account.trades)
    charged = sum(income.amount for income in account.incomes if income.trade is not None
                  and income.kind in ("COMMISSION", "INSURANCE_CLEAR"))
    assert np.isclose(charged, -fees, atol=1e-6)
    assert np.isclose(sum(income.amount for income in account.incomes), account.wallet(), atol=1e-6)


def check_orders(exchange, account):
    "What was executed is the sum of the trades; open orders and only they are in the list, and in the kernel or book"
    for order in account.orders.values():
        traded = sum(abs(trade.quantity) for trade in account.trades_of["order", order.number])
        assert abs(order.executed - traded) < 1e-7, order
        assert order.executed <= order.quantity + 1e-9, order
        assert (order.status == "FILLED") == (abs(order.executed - order.quantity) < 1e-9), order
        assert order.is_open == (order.number in account.open) == (order.number in account.open_of[order.n]), order
    if exchange.profile == "backtest": check_rows(exchange, account)


def check_rows(exchange, account):
    "The kernel's rows are the open orders and the conditional ones that wait"
    waits = exchange.conditional.of(account)
    numbers = {number: order.sign * order.left for number, order in account.open.items()}
    algos = {algo.child_number for algo in waits.open.values() if algo.place}
    found = {}
    for part in account.parts():
        for k, slot in zip(*np.nonzero(part.state.orders["kind"] != NONE)):
            row = part.state.orders[k, slot]
            found[int(row["decision_price"])] = float(row["quantity"])
    assert found.keys() == numbers.keys() | algos
    for number, left in numbers.items():
        if not account.orders[number].close_position: assert abs(found[number] - left) < 1e-8


def check_book(exchange):
    "What rests in the book is what open orders show there"
    for n in range(len(exchange.market.ids)):
        for side in (1, -1):
            shown_there = {}
            for account in exchange.accounts.values():
                for order in account.open_of[n].values():
                    if order.sign == side: shown_there[order.price] = shown_there.get(order.price, 0.) + order.left
            rested = exchange.market.book(n).rested(side)
            assert rested.keys() == shown_there.keys()
            for price, quantity in shown_there.items(): assert abs(rested[price] - quantity) < 1e-7


def check_heard(account, heard, money):
    "The last event about each thing is how it is"
    orders, algos, traded, wallet = {}, {}, {}, None
    for event in heard:
        if event["e"] == "ORDER_TRADE_UPDATE":
            orders[event["o"]["i"]] = event["o"]
            if event["o"]["x"] in ("TRADE", "CALCULATED"):
                traded[event["o"]["i"]] = traded.get(event["o"]["i"], 0.) + float(event["o"]["l"])
        if event["e"] == "ALGO_UPDATE": algos.setdefault(event["o"]["aid"], []).append(event["o"]["X"])
        if event["e"] == "ACCOUNT_UPDATE": wallet = float(event["a"]["B"][0]["wb"])
    assert orders.keys() == account.orders.keys()
    for number, order in account.orders.items():
        assert orders[number]["X"] == order.status, order
        assert abs(float(orders[number]["z"]) - order.executed) < 1e-9
        assert abs(traded.get(number, 0.) - order.executed) < 1e-7
    if wallet is not None and money: assert abs(wallet - account.wallet()) < 1e-6
    return algos


LIVES = ("NEW",), ("NEW", "TRIGGERING"), ("NEW", "CANCELED"), ("NEW", "EXPIRED"), ("NEW", "TRIGGERING", "REJECTED"), (
    "NEW", "TRIGGERING", "TRIGGERED"), ("NEW", "TRIGGERING", "TRIGGERED", "FINISHED")


def check_algos(exchange, account, told):
    "A conditional order has one of six lives, and ends with the order that it became"
    kept = exchange.conditional.of(account)
    assert told.keys() == kept.orders.keys()
    for number, algo in kept.orders.items():
        assert tuple(told[number]) in LIVES, told[number]
        assert told[number][-1] == algo.status
        assert (algo.status == "NEW") == (number in kept.open)
        if algo.child: assert (algo.status == "TRIGGERED") == algo.child.is_open, (algo, algo.child)
        if algo.child: assert account.orders[algo.child.number] is algo.child
    assert exchange.on_fill.keys() == {algo.child_number for each in exchange.conditional.kept.values()
                                       for algo in each.open.values() if algo.place}


def check_replies(world, name):
    "What REST says adds up"
    totals = world.ask(name, "GET", "v3/account")
    number = {key: float(value) for key, value in totals.items() if isinstance(value, str)}
    assert abs(number["totalMarginBalance"] - number["totalWalletBalance"] - number["totalUnrealizedProfit"]) < 1e-6
    incomes = world.ask(name, "GET", "v1/income", limit="1000")
    account = world.exchange.accounts[name]
    if len(account.incomes) <= 1000:
        assert abs(sum(float(row["income"]) for row in incomes) - number["totalWalletBalance"]) < 1e-6
    assert len(world.ask(name, "GET", "v1/openOrders")) == len(account.open)
    assert len(world.ask(name, "GET", "v1/openAlgoOrders")) == len(world.exchange.conditional.of(account).open)


def check(world):
    world.listen()
    for name, account in world.exchange.accounts.items():
        check_trades(account)
        check_orders(world.exchange, account)
        money = all(hit.do != "liquidate" for hit in world.faults.log)   # that one says nothing
        check_algos(world.exchange, account, check_heard(account, world.heard[name], money))
        check_replies(world, name)
    if world.exchange.profile == "book": check_book(world.exchange)


@pytest.mark.parametrize("profile", ["backtest", "book"])
@given(actions=ACTIONS, costs=st.sampled_from(COSTS), wild=st.booleans())
@settings(max_examples=120)
def test_the_books_of_any_sequence_agree(profile, actions, costs, wild):
    world = World(profile, costs if profile == "backtest" else COSTS[0], wild)
    for name, asked in actions:
        perform(world, name, asked)
        if asked["what"] == "step": check(world)
    check(world)


class Twin:
    "The kernel's own step, on an account that is fed the same orders at each close"

    def __init__(self, world):
        account = world.exchange.accounts["main"]
        self.world, self.market = world, world.market
        part = account.cross
        self.part = accounts.collateral(part.rows, part.rules.costs, part.rules.instruments, DEPOSIT)
        self.state = self.part.state._replace(fills=np.zeros(4_000, self.part.state.fills.dtype))

    def write(self, place, number, **fields):
        "An order that the decision at the close has made"
        row, slot = place
        orders = self.state.orders[row]
        if orders[slot]["kind"] != NONE: slot = np.flatnonzero(orders["kind"] == NONE)[0]
        new_order(orders[slot], fields["kind"], fields["quantity"], fields.get("price", 0.), fields.get("trigger", 0.),
                  fields["in_force"], fields["reduce_only"], float(number), self.part.rules)
        orders[slot]["callback"] = fields.get("callback", 0.)
        self.state.execution_state[row]["active"] = 1

    def clear(self, number):
        self.state.orders["kind"][self.state.orders["decision_price"] == number] = NONE

    def step(self, moves):
        "From the close before to the close in these moves"
        close = next(move for move in moves if isinstance(move, market.Close))
        prices = np.ascontiguousarray(close.candles[:, :5])
        candle = engine.candle_of(close.open_time, prices, self.market.condition_rows)
        advance(self.state, self.part.rules, engine.NOBODY, np.zeros((len(self.part.rows), 1)), candle.prices, candle)
        for move in moves:   # due at this close; the kernel's next step would begin with it
            if isinstance(move, market.Rate):
                rates = np.zeros((len(self.part.rows), 1))
                rates[3 * move.n:3 * move.n + 3] = move.rate
                pay_funding(self.state, self.part.rules, engine.NOBODY, rates, candle.prices)
        mark(self.state.account, self.state.positions, candle.prices[:, CLOSE].copy())
        age(self.state.positions)


def feed(world, twin, asked, slots):
    "Send an order to both; `slots` counts those that are taken"
    exchange, account = world.exchange, world.exchange.accounts["main"]
    if asked["what"] == "order":
        order = read_order(plain(world, account, asked | {"reduce": asked["reduce"]}), asked["n"],
                           world.market.ids[asked["n"]], INSTRUMENTS[asked["n"]], world.market.now)
        slots[asked["n"]] += 1
        exchange.submit(account, order, slots[asked["n"]])
        twin.write(order.place, order.number, kind=MARKET if order.kind == "MARKET" else LIMIT,
                   quantity=order.sign * order.quantity, price=order.price, in_force=engine.FORCES[order.in_force],
                   reduce_only=int(order.reduce_only))
        return
    asked = asked | {"activate": False, "force": "IOC" if asked["force"] == "IOC" else "GTC",
                     "close": asked["close"] and account.costs.participation is None}
    algo = conditional.place(exchange.conditional, account, waiting(world, account, asked))
    twin.write(algo.place, algo.child_number, kind=conditional.KINDS[algo.kind],
               quantity=algo.sign * (algo.quantity or conditional.ALL), price=algo.price,
               trigger=float(engine.row_of(account, algo.place)["trigger"]), callback=algo.callback,
               in_force=engine.FORCES.get(algo.in_force, 0), reduce_only=int(algo.reduce_only))


@given(candles_of=st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=2), st.lists(WAITING, max_size=2),
                                     st.lists(PLAIN, min_size=1, max_size=4)), min_size=4, max_size=12),
       costs=st.sampled_from(COSTS), wild=st.booleans())
@settings(max_examples=120)
def test_backtest_equals_the_kernel_that_is_fed_the_same(candles_of, costs, wild):
    world = World("backtest", costs, wild, NAMES[:1])
    account = world.exchange.accounts["main"]
    twin, slots = Twin(world), [29, 29]
    for cancelled, algos, orders in candles_of:
        for which in cancelled:
            working = list(account.open.values())
            if not working: continue
            order = working[which % len(working)]
            engine.end(world.exchange, account, order)
            twin.clear(order.number)
        # as the kernel goes through them: symbol by symbol, and the slots of one in their order. What only reduces is
        # dropped there when its position has closed, and an exchange has not heard of what is sent after that
        closed = set()
        for asked in sorted((*algos, *orders), key=lambda asked: asked["n"]):
            if slots[asked["n"]] >= 59 or (asked["n"] in closed and asked.get("reduce")): continue
            held = account.held(asked["n"])
            with suppress(RequestDeniedError): feed(world, twin, asked, slots)
            if held and not account.held(asked["n"]): closed.add(asked["n"])
        moves = next(world.steps)
        twin.step(moves)
        world.exchange.step(moves)
        world.listen()
        for name in ("deposit", "realised", "fees", "funding"):
            assert account.cross.state.account[0][name] == twin.state.account[0][name], name
        for name in ("quantity", "entry_price"):
            assert np.array_equal(account.cross.state.positions[name], twin.state.positions[name]), name
        mine, theirs = (sorted((int(trade[0]), *map(float, trade[1:])) for trade in trades) for trades in (
            [(trade.n, trade.quantity, trade.price, trade.fee) for trade in account.trades],
            [(fill["symbol"] // 3, fill["quantity"], fill["price"], fill["fee"])
             for fill in twin.state.fills[:twin.state.count[0]]]))
        assert mine == theirs


class Remote(World):
    "The same over real sockets: requests are signed and sent, events are heard on the user stream of each account"

    def __init__(self, net):
        self.net, self.exchange, self.market = net, net.exchange, net.exchange.market
        self.refusals, self.heard = [], {name: [] for name in NAMES}
        self.faults = net.service.faults
        self.http = HTTPConnection("127.0.0.1", net.port)
        self.control = HTTPConnection("127.0.0.1", net.control_port)
        self.stack, base = ExitStack(), net.url.replace("http", "ws")
        keys = {name: self.send(name, "POST", "/fapi/v1/listenKey", "")[1]["listenKey"] for name in NAMES}
        self.streams = {name: self.stack.enter_context(connect(f"{base}/ws/{keys[name]}")) for name in NAMES}

    def send(self, name, method, path, query):
        self.http.request(method, f"{path}?{query}" if query else path, headers={"X-MBX-APIKEY": f"key-{name}"})
        answer = self.http.getresponse()
        return answer.status, json.loads(answer.read())

    def ask(self, name, method, path, **asked):
        asked = {key: text for key, text in asked.items() if text not in (None, "")}
        query = urlencode(asked | {"timestamp": milliseconds_now()})
        query += f"&signature={signature(f'secret-{name}', query)}"
        status, reply = self.send(name, method, f"/fapi/{path}", query)
        if status == 200: return reply
        assert status == 400, reply
        self.refusals.append(reply["code"])
        return None

    def steer(self, method, path, asked):
        self.control.request(method, path, json.dumps(asked), {"X-Localnet-Token": self.net.token})
        return json.loads(self.control.getresponse().read())

    def step(self):
        made = self.steer("GET", "/state", {})
        if not made["left"]: return
        self.steer("POST", "/step", {"count": 1})
        while self.steer("GET", "/state", {})["steps"] == made["steps"]: pass

    def listen(self):
        "Whatever was said before the answer to a question has been heard"
        for name, stream in self.streams.items():
            stream.send('{"method": "GET_PROPERTY", "params": ["combined"], "id": "heard"}')
            while "id" not in (told := json.loads(stream.recv(timeout=10))): self.heard[name].append(told)

    def close(self):
        self.stack.close()
        for each in (self.http, self.control): each.close()


@pytest.mark.integration
@pytest.mark.parametrize("profile", ["backtest", "book"])
@given(actions=ACTIONS, wild=st.booleans())
@settings(max_examples=25)
def test_the_books_agree_over_sockets(profile, actions, wild):
    keys = [ApiKey(f"key-{name}", f"secret-{name}", name) for name in NAMES]
    with Localnet(candles(wild), funding(), INSTRUMENTS, deposit=DEPOSIT, start=START, keys=keys,
                  profile=profile) as net:
        world = Remote(net)
        try:
            for name, asked in actions:
                if asked["what"] != "transfer": perform(world, name, asked)
            check(world)
        finally: world.close()
