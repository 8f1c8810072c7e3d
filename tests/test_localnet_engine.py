"An account of localnet that sends the orders of a policy lives through the kernel's candles, bit for bit"
import gc
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory_venue import new_order

from tradelab.account import POSITION, mark, new_account
from tradelab.events import CLOSE
from tradelab.journal import JOURNAL
from tradelab.localnet.accounts import MONEY, Account, isolate
from tradelab.localnet.engine import Exchange, Questions, amend, begin, cancel, place, row_of, works, write_row
from tradelab.localnet.market import Close, Levels, Market, Prices, Rate, Tick
from tradelab.localnet.orders import ExchangeOrder
from tradelab.localnet.protocol import RequestDeniedError, format_number
from tradelab.localnet.sources import Replay
from tradelab.market.synthetic import ar1, funding
from tradelab.orders import LIMIT, MARKET, NONE, ORDER, working_orders
from tradelab.settings import NO_STOPS, CostModel, Execution, Limits
from tradelab.sim.kernel import Simulation, market_arrays, trading_rules
from tradelab.sim.matching import new_state
from tradelab.sim.prepared import market_data

SYMBOLS = ("BTC/USDT:USDT", "ETH/USDT:USDT")
SLOTS, START, STEPS = 3, 260, 40


def jumpy(seed):
    "Candles with a gap between them, small or large"
    candles, random = ar1(START + STEPS + 2, volatility=.01, seed=seed), np.random.default_rng(seed)
    gaps = np.where(random.random(len(candles)) < .1, .04, .002) * random.normal(size=len(candles))
    candles["open"] = (candles["open"] * (1 + gaps)).round(1)
    candles["high"] = candles[["open", "high"]].max(axis=1)
    candles["low"] = candles[["open", "low"]].min(axis=1)
    return candles


FRAMES = {symbol: jumpy(3 + n) for n, symbol in enumerate(SYMBOLS)}
RATES = {symbol: funding(frame, seed=3) for symbol, frame in FRAMES.items()}
VOLUME_USUAL = float(np.median([frame["volume"].median() for frame in FRAMES.values()]))
COSTS = {"ideal": CostModel.ideal(), "usual": CostModel(), "realistic": CostModel.realistic(),
         "scarce": CostModel(participation=.05 / VOLUME_USUAL), "late": CostModel(latency=1),
         "scarce and late": CostModel(participation=.05 / VOLUME_USUAL, latency=2, impact=1.)}
LIMITS = Limits(max_position=.6, max_daily_loss=None, max_drawdown=.9, max_participation=None, max_orders=None,
                price_band=None, stops=NO_STOPS)
FORCES = ("GTC", "IOC", "FOK", "GTX")


# the kernel lets a piece of an order through that is below the smallest notional, an exchange does not
INSTRUMENTS = tuple(replace(each, min_notional=0.) for each in market_data(FRAMES).instruments)


@cache
def data(): return market_data(FRAMES, funding=RATES)


def wild(random, prices, answer):
    "Leaves, moves, resizes, cancels, replaces and begins orders"
    for n in range(len(prices)):
        for row in answer[n]:
            chance = random.random()
            if row["kind"] == NONE:
                if chance < .5: new_order(row, prices[n], random)
            elif chance < .15: row["kind"] = NONE
            elif chance < .25: new_order(row, prices[n], random)
            elif chance < .4 and row["price"] > 0.: row["price"] *= 1. + float(random.uniform(-.003, .003))
            elif chance < .5: row["exposure"] *= .5
            if row["kind"] == LIMIT and abs(row["price"] / prices[n] - 1.) > .04: row["kind"] = NONE # out of the band


class Twins:
    "An account of the kernel that decides, and one of localnet that sends the same orders"

    def __init__(self, costs, execution=Execution(), slots=0, limits=LIMITS, instruments=INSTRUMENTS):
        self.candles, self.times = data().candles, data().times
        arrays = market_arrays(self.times, self.candles, data().rates, costs, limits)
        rules = trading_rules(costs, limits, instruments, execution, slots)
        state = new_state(new_account(10_000.), np.zeros(len(SYMBOLS), POSITION), rules.execution, 5_000)
        mark(state.account, state.positions, self.candles[START, :, CLOSE].copy())
        self.kernel = Simulation(arrays, state, rules)
        source = Replay(FRAMES, RATES, start=int(self.times[START + 1]), instruments=instruments)
        market = Market(source.history(), source.instruments, source.funding, costs)
        self.account = Account("main", market, costs)
        self.account.leverage = [int(each.brackets[0][1]) for each in market.instruments]
        self.exchange = Exchange(market, [self.account], costs, questions=Questions(reduce_only="keep"))
        self.steps = source.steps()
        self.exchange.step(next(self.steps))
        self.sent = {}           # (n, slot) -> revision and number
        self.seen = 0            # fills that were compared
        self.paid = 0.           # funding at the close before: the kernel pays it a candle later
        self.refused = []

    def child(self, n, order):
        "The order that a row without one becomes when it is filled"
        def made(account, number, time):
            child = ExchangeOrder(number, account.name, n, self.exchange.market.ids[n], f"child-{number}",
                                  "BUY" if order["quantity"] > 0 else "SELL", abs(float(order["quantity"])), "MARKET",
                                  reduce_only=bool(order["reduce_only"]), time=time)
            self.exchange.register(account, child)
            child.place = 3 * n, order["slot"]
            return child
        return made

    def cancel(self, n, k):
        "Take back what was sent before in a place"
        _, number = self.sent.pop((n, k))
        order = self.account.orders.get(number)
        if order is not None and order.is_open:
            asked = {"symbol": self.exchange.market.ids[n], "orderId": str(number)}
            cancel(self.exchange, self.account, asked)
        elif order is None and works(self.account, (3 * n, k), number):
            row_of(self.account, (3 * n, k))["kind"] = NONE

    def send(self, n, k, order):
        "Send an order of the kernel"
        if order["kind"] > LIMIT or order["reduce_only"]: return self.wait(n, k, order)
        asked = {"symbol": self.exchange.market.ids[n], "side": "BUY" if order["quantity"] > 0 else "SELL",
                 "type": "MARKET" if order["kind"] == MARKET else "LIMIT",
                 "quantity": format_number(abs(order["quantity"]))}
        if order["kind"] == LIMIT:
            asked |= {"price": format_number(order["price"]), "timeInForce": FORCES[order["in_force"]]}
        try: sent = place(self.exchange, self.account, asked, slot=k)
        except RequestDeniedError as refused:
            self.refused.append(refused.code)
            return None
        if sent.is_open: row_of(self.account, sent.place)["expires_in"] = order["expires_in"]
        return sent.number

    def wait(self, n, k, order):
        "As a conditional order does"
        begin(self.exchange, self.account)
        if self.account.name in self.exchange.closed: return None
        number = self.exchange.next_order()
        names = ("kind", "quantity", "price", "trigger", "in_force", "reduce_only", "callback", "expires_in")
        spot = write_row(self.account, n, "BOTH", number, k, **{name: order[name] for name in names})
        self.exchange.on_fill[number] = self.child(n, {name: order[name] for name in names} | {"slot": k})
        self.exchange.arrive(self.account, spot)
        return number

    def step(self, t, answer):
        "One candle for both"
        kernel, row = self.kernel, np.zeros(len(SYMBOLS), JOURNAL)
        kernel.step(t, answer, row, market=False)
        changed = []
        for n, k in np.ndindex(kernel.state.orders.shape):
            order = kernel.state.orders[n, k]
            works_there = order["kind"] != NONE
            if (n, k) in self.sent and (not works_there or self.sent[n, k][0] != order["revision"]): self.cancel(n, k)
            if works_there and (n, k) not in self.sent: changed.append((n, k))
        closed = set()           # the kernel knows that these orders come, and drops them with the position
        for n, k in changed:
            order, count = kernel.state.orders[n, k].copy(), len(self.account.trades)
            sent = None if order["reduce_only"] and n in closed else self.send(n, k, order)
            self.sent[n, k] = int(order["revision"]), sent
            if len(self.account.trades) > count and self.account.held(n) == 0.: closed.add(n)
        kernel.step(t, np.zeros(0), row)
        self.exchange.step(next(self.steps))
        self.compare(t)

    def compare(self, t):
        theirs, ours = self.kernel.state, self.account.cross.state
        for name in MONEY[:-1]: assert theirs.account[0][name] == ours.account[0][name], (t, name)
        assert theirs.account[0]["funding"] == self.paid, t
        self.paid = ours.account[0]["funding"]
        for name in ("quantity", "entry_price"):
            assert theirs.positions[name].tolist() == ours.positions[name][::3].tolist(), (t, name)
        fills = theirs.fills[:theirs.count[0]]
        trades = self.account.trades
        assert len(fills) == len(trades), t
        for fill, trade in zip(fills[self.seen:], trades[self.seen:]):
            assert (fill["symbol"], fill["quantity"], fill["price"], fill["fee"], fill["maker"]) == (
                trade.n, trade.quantity, trade.price, trade.fee, trade.maker), t
        self.seen = len(trades)
        for (n, k), (_, number) in list(self.sent.items()):
            order, row = theirs.orders[n, k], ours.orders[3 * n, k]
            if order["kind"] == NONE:
                assert number is None or not works(self.account, (3 * n, k), number), t
                self.sent.pop((n, k))
                continue
            for name in ("kind", "quantity", "price", "trigger", "resting", "expires_in", "delay"):
                if name == "trigger" and order["kind"] <= LIMIT: continue # an answer may say one, nobody reads it
                assert order[name] == row[name], (t, n, k, name)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(COSTS)))
def test_any_orders_are_the_kernels(seed, costs):
    random = np.random.default_rng(seed)
    twins = Twins(COSTS[costs], slots=SLOTS)
    answer = np.zeros((len(SYMBOLS), SLOTS), ORDER)
    for t in range(START, START + STEPS):
        working_orders(twins.kernel.state.orders, answer)
        wild(random, twins.candles[t, :, CLOSE], answer)
        twins.step(t, answer.copy())
    assert len(twins.account.trades) > 5
    assert set(twins.refused) <= {-5021, -5022}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(COSTS)),
       st.sampled_from([Execution(), Execution("post_only", patience=2), Execution("slices", slices=3)]))
def test_any_targets_in_any_style_are_the_kernels(seed, costs, execution):
    random = np.random.default_rng(seed)
    twins = Twins(COSTS[costs], execution)
    targets = np.zeros(len(SYMBOLS))
    for t in range(START, START + STEPS):
        turned = random.random(len(SYMBOLS)) < .6
        targets[turned] = random.choice([-1., -.4, 0., .4, 1.], turned.sum())
        twins.step(t, targets.copy())
    assert len(twins.account.trades) > 5


# one bracket: little is needed to open a position, and much to keep it
DARING = tuple(replace(each, brackets=((1e12, 100, .02),)) for each in INSTRUMENTS)
LIQUIDATED = []


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(COSTS)), st.sampled_from([0, SLOTS]))
def test_an_account_is_liquidated_where_the_kernel_liquidates_it(seed, costs, slots):
    random = np.random.default_rng(seed)
    limits = replace(LIMITS, max_position=10., max_leverage=20., leverage=100, min_margin_ratio=1., max_drawdown=1.)
    twins = Twins(COSTS[costs], slots=slots, limits=limits, instruments=DARING)
    answer = np.zeros((len(SYMBOLS), slots), ORDER)
    targets = np.zeros(len(SYMBOLS))
    for t in range(START, START + STEPS):
        if slots:
            working_orders(twins.kernel.state.orders, answer)
            wild(random, twins.candles[t, :, CLOSE], answer)
        else: targets = random.choice([-1., -.4, .4, 1.], len(SYMBOLS))
        twins.step(t, answer.copy() if slots else targets)
    LIQUIDATED.append(len(twins.account.forced))


def test_accounts_were_liquidated():
    if LIQUIDATED: assert any(LIQUIDATED)


SIDES = {"BUY": 1, "SELL": -1}


def bookish(seed, accounts=2):
    "A market with a book of ten levels a side, and accounts that trade in it"
    market = Market({SYMBOLS[0]: FRAMES[SYMBOLS[0]].iloc[:START]}, INSTRUMENTS[:1])
    exchange = Exchange(market, [Account(f"account-{k}", market, deposit=1e6) for k in range(accounts)],
                        profile="book")
    random = np.random.default_rng(seed)
    exchange.step([levels(exchange, random)])
    return exchange, random


def levels(exchange, random, middle=None):
    "A whole new book"
    middle = middle or round(exchange.market.last(0), 1)
    def side(sign):
        prices = np.round(middle + sign * np.cumsum(random.integers(1, 4, 10)) / 10, 1)
        return np.stack([prices, random.integers(1, 900, 10) / 1e3], axis=1)
    return Levels(exchange.market.now + 100, 0, side(-1), side(1))


def any_request(exchange, random):
    "Parameters of a random order, most of them near the market"
    book = exchange.market.book(0)
    side = random.choice(["BUY", "SELL"])
    asked = {"symbol": "BTCUSDT", "side": side, "quantity": format_number(random.integers(5, 2_000) / 1e3),
             "selfTradePreventionMode": random.choice(["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"])}
    if random.random() < .3: asked["reduceOnly"] = "true"
    if random.random() < .4: return asked | {"type": "MARKET"}
    middle = book.best(-1) if side == "BUY" else book.best(1)
    if middle != middle: middle = exchange.market.last(0)
    price = round(middle - SIDES[side] * random.integers(-12, 25) / 10, 1)
    return asked | {"type": "LIMIT", "price": format_number(price), "timeInForce": random.choice([*FORCES, "GTC"])}


def walked(levels, quantity, limit, sign):
    "What a quantity meets in levels, by hand"
    met = []
    for price, shown in levels:
        if quantity <= 1e-9 or (limit is not None and sign * (limit - price) < 0): break
        met.append((price, min(round(quantity, 8), shown)))
        quantity = round(quantity - shown, 8)
    return met


def consistent(exchange):
    "What is shown of our orders is what is left of them, and the money adds up"
    shown = {1: {}, -1: {}}
    for account in exchange.accounts.values():
        for order in account.open.values():
            assert order.left > 0
            side = shown[SIDES[order.side]]
            side[order.price] = round(side.get(order.price, 0.) + order.left, 8)
        assert sum(row.amount for row in account.incomes) == pytest.approx(account.wallet(), abs=1e-6)
        for order in account.orders.values():
            done = [trade for trade in account.trades_of["order", order.number]]
            assert sum(abs(trade.quantity) for trade in done) == pytest.approx(order.executed)
            assert (order.status == "FILLED") == (order.left == 0.)
        assert sum(trade.quantity for trade in account.trades) == pytest.approx(account.held(0))
    book = exchange.market.book(0)
    for side in (1, -1):
        rested = {price: round(quantity, 8) for price, quantity in book.rested(side).items()}
        assert rested == shown[side]
        assert {price: {number for number in queue} for price, queue in exchange.queues[0, side].items()} == {
            price: {order.number for account in exchange.accounts.values() for order in account.open.values()
                    if order.price == price and SIDES[order.side] == side} for price in shown[side]}
    assert not book.best(1) >= book.best(-1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_what_an_account_takes_is_the_book_that_was_shown(seed):
    exchange, random = bookish(seed)
    for _ in range(60):
        account = exchange.accounts[f"account-{random.integers(2)}"]
        chance = random.random()
        if chance < .1: exchange.step([levels(exchange, random)])
        elif chance < .2:
            price = round(exchange.market.last(0) + random.integers(-15, 16) / 10, 1)
            exchange.step([Tick(exchange.market.now + 10, 0, price, random.integers(1, 500) / 1e3,
                                bool(random.random() < .5))])
        elif chance < .3 and account.open:
            number = random.choice(list(account.open))
            cancel(exchange, account, {"symbol": "BTCUSDT", "orderId": str(number)})
        elif chance < .4 and account.open:
            order = account.orders[random.choice(list(account.open))]
            price = round(order.price + random.integers(-5, 6) / 10, 1)
            asked = {"symbol": "BTCUSDT", "orderId": str(order.number), "side": order.side,
                     "price": format_number(price), "quantity": format_number(random.integers(5, 2_000) / 1e3)}
            try: amend(exchange, account, asked)
            except RequestDeniedError as refused:
                assert refused.code in (-2019, -2022, -4016, -4024, -4118, -4164, -5027)
        else: placed(exchange, account, any_request(exchange, random))
        consistent(exchange)
    assert sum(len(account.trades) for account in exchange.accounts.values()) > 5


def placed(exchange, account, asked):
    "Place an order, and compare its trades with the book before"
    sign, book = SIDES[asked["side"]], exchange.market.book(0)
    shown, held = book.levels(-sign), account.held(0)
    own = {order.price for order in account.open.values() if SIDES[order.side] != sign}
    try: order = place(exchange, account, asked)
    except RequestDeniedError as refused:
        assert refused.code in (-2022, -5021, -5022, -4164, -2019, -4118, -4131, -4016, -4024), refused
        return
    done = [(trade.price, abs(trade.quantity)) for trade in account.trades_of["order", order.number]
            if not trade.maker]
    limit = float(asked["price"]) if "price" in asked else None
    if not own: assert done == walked(shown, order.quantity, limit, sign)
    if order.reduce_only: assert order.quantity <= abs(held)
    if asked["type"] == "MARKET" and order.left: assert order.status in ("EXPIRED", "EXPIRED_IN_MATCH")


def any_order(exchange, account, random):
    "Parameters of a random order in the mode of the account"
    n = int(random.integers(len(exchange.market.ids)))
    side, price = random.choice(["BUY", "SELL"]), exchange.market.last(n)
    asked = {"symbol": exchange.market.ids[n], "side": str(side),
             "quantity": format_number(random.integers(5, 400) / 1e3)}
    if account.dual: asked["positionSide"] = str(random.choice(["LONG", "SHORT"]))
    elif random.random() < .2: asked["reduceOnly"] = "true"
    if random.random() < .5: return asked | {"type": "MARKET"}
    limit = round(price * (1 + .02 * float(random.normal())), 1)
    force = str(random.choice([*FORCES, "GTC", "GTD"]))
    more = {"goodTillDate": str(exchange.market.now + 7_200_000)} if force == "GTD" else {}
    return asked | {"type": "LIMIT", "price": format_number(limit), "timeInForce": force} | more


def any_candle(exchange, random):
    "A candle of all symbols, now and then one that ruins somebody"
    wild = .2 if random.random() < .06 else .01
    opened = np.array([exchange.market.last(n) for n in range(len(exchange.market.ids))])
    moves = np.sort(wild * random.normal(size=(3, len(opened))), axis=0)
    closed = opened * (1 + moves[1])
    high, low = np.maximum(opened * (1 + moves[2]), opened), np.minimum(opened * (1 + moves[0]), opened)
    known = np.zeros((len(opened), 11))
    known[:, :5] = np.stack([opened, high, low, closed, np.full(len(opened), 500.)], axis=1).round(1)
    return known


def lived(exchange, random, known, volume):
    "Let a candle close and the next open"
    market = exchange.market
    time = market.open_time
    end = time + market.step
    rates = [Rate(end, n, 1e-4 * float(random.normal())) for n in range(len(known)) if random.random() < .3]
    opened = known[:, 3] * (1 + (.15 if random.random() < .05 else .002) * random.normal(size=len(known)))
    exchange.step([Close(end, time, known), *rates]
                  + [Tick(end, n, round(float(price), 1), 0., False, volume) for n, price in enumerate(opened)])


def adds_up(exchange, told):
    "Orders, trades, positions, money and what was told of them agree"
    for name, event in exchange.take_events(): told[name].append(event)
    for name, account in exchange.accounts.items():
        assert sum(row.amount for row in account.incomes) == pytest.approx(account.wallet(), abs=1e-5)
        for order in account.orders.values():
            done = sum(abs(trade.quantity) for trade in account.trades_of["order", order.number])
            assert done == pytest.approx(order.executed)
            assert (order.number in account.open) == order.is_open
            if order.is_open: assert abs(row_of(account, order.place)["quantity"]) == pytest.approx(order.left)
        for n in range(len(exchange.market.ids)):
            for side in ("BOTH", "LONG", "SHORT"):
                held = sum(trade.quantity for trade in account.trades if (trade.n, trade.position_side) == (n, side))
                assert held == pytest.approx(account.held(n, side), abs=1e-8)
                assert side == "BOTH" or account.held(n, side) * (1 if side == "LONG" else -1) >= 0.
        updates = [event for event in told[name] if event["e"] == "ACCOUNT_UPDATE"]
        if updates: assert float(updates[-1]["a"]["B"][0]["wb"]) == pytest.approx(account.wallet(), abs=1e-6)
        last = {event["o"]["i"]: event["o"] for event in told[name] if event["e"] == "ORDER_TRADE_UPDATE"}
        assert set(last) == set(account.orders)
        for number, seen in last.items():
            order = account.orders[number]
            assert (seen["X"], float(seen["z"])) == (order.status, order.executed)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from(sorted(COSTS)))
def test_whatever_happens_orders_trades_positions_and_money_agree(seed, dual, own, costs):
    random = np.random.default_rng(seed)
    market = Market({name: frame.iloc[:START + 1] for name, frame in FRAMES.items()}, INSTRUMENTS, costs=COSTS[costs])
    accounts = [Account(name, market, COSTS[costs]) for name in ("one", "two")]
    for account in accounts:
        account.dual = dual
        if own: isolate(account, 0)
        account.leverage = [int(random.integers(2, 60)) for _ in SYMBOLS]
    exchange = Exchange(market, accounts, COSTS[costs])
    told = {account.name: [] for account in accounts}
    for _ in range(25):
        for account in accounts:
            for _ in range(3):
                try: place(exchange, account, any_order(exchange, account, random))
                except RequestDeniedError as refused:
                    assert refused.code in (-2019, -2022, -2023, -2027, -4016, -4024, -4118, -5021, -5022), refused
            if account.open and random.random() < .5:
                order = account.open[int(random.choice(list(account.open)))]
                asked = {"symbol": order.symbol, "orderId": str(order.number), "side": order.side}
                if random.random() < .5: cancel(exchange, account, asked)
                elif order.kind == "LIMIT":
                    price = round(market.last(order.n) * (1 + .01 * float(random.normal())), 1)
                    more = {"price": format_number(price), "quantity": format_number(random.integers(5, 400) / 1e3)}
                    try: amend(exchange, account, asked | more)
                    except RequestDeniedError as refused:
                        assert refused.code in (-2019, -2022, -2023, -2027, -4016, -4024, -4118, -5027), refused
        lived(exchange, random, any_candle(exchange, random), .5 * VOLUME_USUAL)
        adds_up(exchange, told)
    assert sum(len(account.trades) for account in accounts) > 20


@pytest.mark.parametrize("own", [False, True], ids=["cross", "isolated"])
def test_in_a_book_a_position_beyond_its_margin_is_closed_where_somebody_buys(own):
    market = Market({SYMBOLS[0]: FRAMES[SYMBOLS[0]].iloc[:START]}, INSTRUMENTS[:1])
    account = Account("main", market, deposit=10_000.)
    if own: isolate(account, 0)
    account.leverage[0] = 50
    exchange = Exchange(market, [account], profile="book")
    middle = round(market.last(0))
    def around(price): return Levels(market.now + 100, 0, [(price - 1, 3.), (price - 5, 500.)], [(price + 1, 500.)])
    exchange.step([around(middle)])
    asked = {"symbol": "BTCUSDT", "side": "BUY", "quantity": "10"}
    place(exchange, account, asked | {"type": "MARKET"})
    bid = place(exchange, account, asked | {"type": "LIMIT", "timeInForce": "GTC", "quantity": ".1",
                                            "price": str(round(middle * .952))})
    exchange.take_events()
    low = round(account.liquidation_price(0)) - 10
    exchange.step([around(low), Prices(market.now + 100, 0, mark=float(low))])
    assert account.held(0) == 0.
    assert (bid.status, bid.expiry_reason) == ("EXPIRED", 5)
    told = [event["o"] for _, event in exchange.take_events() if event["e"] == "ORDER_TRADE_UPDATE"]
    assert [(each["x"], each["X"]) for each in told] == [("EXPIRED", "EXPIRED"), ("CALCULATED", "NEW"),
                                                        ("CALCULATED", "PARTIALLY_FILLED"), ("CALCULATED", "FILLED")]
    assert [float(each["L"]) for each in told[2:]] == [low - 1, low - 5]
    assert sum(row.amount for row in account.incomes) == pytest.approx(account.wallet(), abs=1e-6)
    assert account.wallet() > -1e-6
    assert market.book(0).rested(1) == {}


def test_an_order_is_found_as_fast_after_twenty_thousand_others():
    exchange, random = bookish(1)
    account = exchange.accounts["account-0"]
    asked = {"symbol": "BTCUSDT", "side": "BUY", "type": "LIMIT", "timeInForce": "GTC", "quantity": "0.1",
             "price": format_number(round(exchange.market.last(0) * .97))}
    def batch():
        "Calls of a profile: time would depend on who else is at work, and a garbage collection calls whom it likes"
        calls = 0
        def count(frame, event, argument):
            nonlocal calls
            calls += 1
        gc.disable()
        sys.setprofile(count)
        try:
            for _ in range(10): place(exchange, account, asked)
            for number in list(account.open): cancel(exchange, account, {"symbol": "BTCUSDT", "orderId": str(number)})
        finally:
            sys.setprofile(None)
            gc.enable()
        exchange.take_events()
        return calls
    batch()
    first = batch()
    while len(account.orders) < 20_000:
        for _ in range(50): place(exchange, account, asked)
        exchange.cancel_all(account)
        exchange.take_events()
    assert batch() == first
