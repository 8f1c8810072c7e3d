"Random clients of localnet: hedge mode, isolated margin, both profiles; whatever they do, the money adds up"
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.instruments import BITCOIN
from tradelab.localnet import accounts, engine
from tradelab.localnet.accounts import MONEY, SIDES, Account, isolate
from tradelab.localnet.engine import Exchange
from tradelab.localnet.market import Close, Levels, Market, Rate, Tick
from tradelab.localnet.protocol import RequestDeniedError
from tradelab.market.candles import frame

HOUR, START, PRICE = 3_600_000, 1_672_531_200_000, 20_000.
QUIET = frame(START + np.arange(30) * HOUR, np.tile([PRICE, PRICE + 10., PRICE - 10., PRICE, 1e3], (30, 1)))
ENDPOINTS = accounts.ENDPOINTS | engine.ENDPOINTS


class Client:
    "An account, and random requests, in a market that moves at random"

    def __init__(self, seed, profile):
        self.random = np.random.default_rng(seed)
        self.market = Market({"BTC/USDT:USDT": QUIET}, [BITCOIN])
        self.account = Account("main", self.market, deposit=float(self.random.choice([500., 10_000.])))
        self.exchange = Exchange(self.market, [self.account], profile=profile)
        self.price = PRICE
        self.account.dual = self.random.random() < .4
        if self.random.random() < .5: isolate(self.account, 0)
        self.open()

    def any(self, *choices): return choices[self.random.integers(len(choices))]

    def ask(self, method, path, **asked):
        texts = {"symbol": "BTCUSDT"} | {name: str(value) for name, value in asked.items()}
        return ENDPOINTS[method, f"v1/{path}"].reply(self.exchange, self.account, texts)

    def sided(self): return {"positionSide": self.any("LONG", "SHORT")} if self.account.dual else {}

    def open(self):
        self.exchange.step([Tick(self.market.now, 0, self.price, 0., False, 1e3)])
        if self.exchange.profile == "backtest": return
        bids, asks = (np.array([[self.price + side * (.1 + k), .5] for k in range(5)]) for side in (-1, 1))
        self.exchange.step([Levels(self.market.now, 0, bids, asks)])

    def close(self):
        time, spread = self.market.open_time, self.any(.01, .04) * self.random.standard_normal(3)
        close = round(self.price * (1. + spread[0]), 1)
        high, low = (round(extreme(self.price, close) * (1. + side * abs(by)), 1)
                     for extreme, side, by in ((max, 1., spread[1]), (min, -1., spread[2])))
        if self.exchange.profile == "book":
            for price in (high, low, close): self.exchange.step([Tick(time + 1, 0, price, .3, True, 1e3)])
        row = np.zeros((1, 11))
        row[0, :5] = self.price, high, low, close, 1e3
        self.exchange.step([Close(time + HOUR, time, row)])
        self.price = close
        self.open()

    def order(self):
        limit = {"type": "LIMIT", "price": round(self.price * self.random.uniform(.98, 1.02), 1),
                 "timeInForce": self.any("GTC", "GTC", "IOC", "GTX", "FOK")}
        reducing = {} if self.account.dual or self.random.random() < .8 else {"reduceOnly": "true"}
        self.ask("POST", "order", side=self.any("BUY", "SELL"), quantity=round(self.random.uniform(.006, .5), 3),
                 **self.any(limit, {"type": "MARKET"}), **self.sided(), **reducing)

    def act(self):
        rare = "cancel", "leverage", "type", "mode", "margin", "rate", "transfer"
        match self.any(*["order"] * 8, *["close"] * 3, *rare):
            case "order": self.order()
            case "close": self.close()
            case "cancel": self.ask("DELETE", "allOpenOrders")
            case "leverage": self.ask("POST", "leverage", leverage=self.any(1, 5, 20, 100))
            case "type": self.ask("POST", "marginType", marginType=self.any("ISOLATED", "CROSSED"))
            case "mode": self.ask("POST", "positionSide/dual", dualSidePosition=self.any("true", "false"))
            case "margin": self.ask("POST", "positionMargin", amount=round(self.random.uniform(1., 99.), 2),
                                    type=self.any(1, 2), **self.sided())
            case "rate": self.exchange.step([Rate(self.market.now, 0, self.random.uniform(-.001, .001))])
            case "transfer": self.account.transfer(round(self.random.uniform(-50., 50.), 2))


def check(account):
    held, executed = defaultdict(float), defaultdict(float)
    for trade in account.trades:
        held[trade.position_side] = round(held[trade.position_side] + trade.quantity, 8)
        executed[trade.order] += abs(trade.quantity)
    assert {side: held[side] for side in SIDES} == {side: account.held(0, side) for side in SIDES}
    for order in account.orders.values(): assert np.isclose(executed[order.number], order.executed, atol=1e-8)
    assert all(order.is_open for order in account.open.values())
    assert np.isclose(sum(row.amount for row in account.incomes), account.wallet(), atol=1e-6)
    balance = account.balance()
    assert np.isclose(account.equity(), balance.wallet + balance.profit, atol=1e-6)
    for part in account.parts():
        assert part.state.count[0] == 0
        for name in MONEY: assert part.told.account[0][name] == part.state.account[0][name]
        for name in ("quantity", "entry_price"):
            assert np.array_equal(part.told.positions[name], part.state.positions[name])
    for row, part in account.own.items():
        if account.held(0, SIDES[row]) == 0.: assert part.money() == 0.
        else: assert part.money() > 0.


def heard(events, money, positions):
    "The wallet and the positions that one knows from the user stream alone"
    for _, event in events:
        if event["e"] != "ACCOUNT_UPDATE": continue
        money = float(event["a"]["B"][0]["wb"])
        for told in event["a"]["P"]: positions[told["ps"]] = float(told["pa"])
    return money


@pytest.mark.parametrize("profile", ["backtest", "book"])
@given(st.integers(0, 2**32), st.integers(5, 60))
@settings(max_examples=40)
def test_the_money_of_a_random_client_adds_up(profile, seed, actions):
    client, positions = Client(seed, profile), {}
    money = client.account.wallet()
    for _ in range(actions):
        try: client.act()
        except RequestDeniedError: pass
        money = heard(client.exchange.take_events(), money, positions)
        check(client.account)
        assert np.isclose(money, client.account.wallet(), atol=1e-7)
        for side, told in positions.items(): assert told == client.account.held(0, side)
    for (method, _), endpoint in accounts.ENDPOINTS.items():
        if method == "POST": continue
        reply = endpoint.reply(client.exchange, client.account, {"symbol": "BTCUSDT"})
        assert "nan" not in repr(reply).lower()
