"What a session finds before it trades: leases, halts of its strategy, commands, accounts that are set otherwise"
import asyncio
from contextlib import contextmanager
from dataclasses import replace

import pytest
from test_live import BITCOIN, ETHER, localnet, orders_at, session, venue

from tradelab.events import TradingState
from tradelab.live.lease import acquire, release, this_process
from tradelab.live.ledger import Asked, Lease, LeaseLostError, Ledger, clock
from tradelab.live.reconcile import StartRefusedError
from tradelab.live.venue import VenueError
from tradelab.localnet.faults import Faults
from tradelab.settings import Limits
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration


def run(live, candles=None): return asyncio.run(live.run(candles))
def ledger_of(folder): return Ledger(f"sqlite:///{folder}/tradelab.db")
def account_of(exchange): return exchange.exchange.accounts["main"]


@contextmanager
def refused(match, error=StartRefusedError):
    "One sentence, and nothing was traded"
    with pytest.raises(error, match=match) as caught: yield
    assert len(str(caught.value).splitlines()) == 1


def ask(exchange, method, **asked):
    "A signed request of a person, through the front door"
    async def once():
        broker = BinanceVenue(venue(exchange))
        try:
            await broker._exchange.load_markets()
            return await getattr(broker._exchange, method)(asked)
        finally: await broker.close()
    return asyncio.run(once())


def test_hedge_mode_is_switched_and_said_where_nothing_is_open_and_refused_where_something_is(tmp_path):
    with localnet() as exchange:
        ask(exchange, "fapiPrivatePostPositionSideDual", dualSidePosition="true")
        said = []
        run(session(exchange, tmp_path, say=said.append), 2)
        assert any("was in hedge mode and is in one-way mode now" in line for line in said)
        assert not account_of(exchange).dual
    with localnet() as exchange:
        ask(exchange, "fapiPrivatePostPositionSideDual", dualSidePosition="true")
        ask(exchange, "fapiPrivatePostOrder", symbol="BTCUSDT", side="BUY", positionSide="LONG", type="MARKET",
            quantity="0.01")
        with refused("the account is in hedge mode and holds BTC/USDT:USDT: close that"):
            run(session(exchange, tmp_path, id="held", say=str), 2)
        assert len(orders_at(exchange)) == 1
    with localnet() as exchange:
        ask(exchange, "fapiPrivatePostPositionSideDual", dualSidePosition="true")
        ask(exchange, "fapiPrivatePostOrder", symbol="BTCUSDT", side="BUY", positionSide="LONG", type="LIMIT",
            quantity="0.01", price="15000", timeInForce="GTC")
        with refused("localnet is in hedge mode, and the account has open orders or positions", VenueError):
            run(session(exchange, tmp_path, id="waits", say=str), 2)
        assert account_of(exchange).dual


def test_isolated_margin_is_refused(tmp_path):
    with localnet() as exchange:
        ask(exchange, "fapiPrivatePostMarginType", symbol="BTCUSDT", marginType="ISOLATED")
        leverage = list(account_of(exchange).leverage)
        with refused("BTC/USDT:USDT has isolated margin at localnet"): run(session(exchange, tmp_path, say=str), 2)
        assert account_of(exchange).leverage == leverage # nothing was changed behind anybody's back
        assert not orders_at(exchange)


def test_a_leverage_beyond_the_bracket_is_refused(tmp_path):
    with localnet() as exchange:
        with refused(r"leverage 150 goes up to [\d,]+ USDT at this exchange"):
            limits = Limits(leverage=150, max_position=100., max_leverage=100.)
            run(session(exchange, tmp_path, limits=limits, say=str), 2)
        assert not orders_at(exchange)


@pytest.mark.parametrize("name, whose", [("by-hand", "a person or another program"),
                                         ("tl-abcdefgh-k2x9-0-0", "another session")])
def test_an_open_order_that_is_not_ours_is_refused(tmp_path, name, whose):
    with localnet() as exchange:
        ask(exchange, "fapiPrivatePostOrder", symbol="BTCUSDT", side="BUY", type="LIMIT", quantity="0.01",
            price="15000", timeInForce="GTC", newClientOrderId=name)
        with refused(f"order {name} of BTC/USDT:USDT works at the exchange and is of {whose}"):
            run(session(exchange, tmp_path, say=str), 2)
        assert list(orders_at(exchange)) == [name]


def test_a_symbol_in_settlement_is_refused(tmp_path):
    with localnet() as exchange:
        exchange.exchange.market.shown[0].status = "SETTLING"
        exchange.exchange.market.shown[0].outdated = True
        with refused("BTC/USDT:USDT is not traded at localnet now, its status is SETTLING", VenueError):
            run(session(exchange, tmp_path, say=str), 2)


def test_a_clock_that_is_3_s_off_is_refused_and_one_that_is_1_5_s_off_is_used(tmp_path):
    with localnet(faults=Faults([{"at": "clock", "do": "skew", "ms": 3_000}])) as exchange:
        with refused(r"the clock of localnet is \+[23],\d\d\d ms ahead of this machine's"):
            run(session(exchange, tmp_path, say=str), 2)
        assert not orders_at(exchange)
    with localnet(faults=Faults([{"at": "clock", "do": "skew", "ms": -1_500}])) as exchange:
        assert run(session(exchange, tmp_path, say=str), 3).candles == 3


def test_an_account_without_usdt_is_refused(tmp_path):
    answer = {"at": "request", "do": "reply", "path": "*/account", "status": 200,
              "text": '{"assets": [], "positions": []}'}
    with localnet(faults=Faults([answer])) as exchange:
        with refused("holds no USDT balance", VenueError): run(session(exchange, tmp_path, say=str), 2)
        assert not orders_at(exchange)


def test_a_second_session_is_refused_and_one_of_another_symbol_is_not(tmp_path):
    with localnet((BITCOIN, ETHER)) as exchange:
        async def both():
            first = session(exchange, tmp_path, id="first", say=str)
            running = asyncio.ensure_future(first.run(30))
            while not first.files: await asyncio.sleep(.01)
            with refused("BTC/USDT:USDT on localnet .* is traded by session first in .*: stop it first"):
                await session(exchange, tmp_path, id="second", say=str).run(2)
            first.stop()
            await running
            return first.lease
        lease = asyncio.run(both())
        row = ledger_of(tmp_path).leases.of(lease.venue, lease.account)[BITCOIN]
        assert (row["session"], row["beat"]) == ("first", 0)                           # it was given back


def test_a_session_whose_lease_was_taken_stops_and_sends_nothing_more(tmp_path):
    with localnet() as exchange:
        async def overtaken():
            live = session(exchange, tmp_path, say=str, waits={"heartbeat": 20})
            running = asyncio.ensure_future(live.run())
            while live.statistics.orders < 3: await asyncio.sleep(.01)
            lease, other = live.lease, Ledger(f"sqlite:///{tmp_path}/tradelab.db")
            with other.transaction():
                taken = replace(lease, session="other", owner="elsewhere process 1", epoch=lease.epoch + 1)
                other.leases.take(taken, 1, {symbol: lease.epoch for symbol in lease.symbols})
            with pytest.raises(LeaseLostError, match="session other in elsewhere process 1 has taken over BTC/USDT"):
                await running
            sent = len(orders_at(exchange))
            assert other.leases.of(lease.venue, lease.account)[BITCOIN]["session"] == "other"
            return sent
        assert asyncio.run(overtaken()) == len(orders_at(exchange))


def halting(exchange, folder, name, most=.02, **options):
    return session(exchange, folder, id=name, limits=Limits(max_position=.9, max_drawdown=most, max_daily_loss=None),
                   say=str, **options)


def test_a_new_session_does_not_forget_a_halt_and_a_person_resets_it(tmp_path):
    with localnet() as exchange:
        run(halting(exchange, tmp_path, "one"), 60)
        one = ledger_of(tmp_path).journal("one")
        assert one["drawdown"].max() >= .02
        sent = len(orders_at(exchange))
        two = halting(exchange, tmp_path, "two")
        run(two, 10)
        assert two.trader.account["halted"][0] == 1
        assert len(orders_at(exchange)) == sent
        assert "halt" in set(ledger_of(tmp_path).notices("two")["kind"])

        async def reset():
            live = halting(exchange, tmp_path, "three", .5, waits={"heartbeat": 10})
            running = asyncio.ensure_future(live.run(20))
            while not live.lease: await asyncio.sleep(.01)
            number = live.ledger.commands.ask(Asked("reset", "looked at it", "anna", session="three"))
            await running
            return live, next(row for row in live.ledger.commands.all() if row["number"] == number)
        live, row = asyncio.run(reset())
        assert "reset" in row["answer"]
        assert live.trader.account["halted"][0] == 0
        assert len(orders_at(exchange)) > sent


def test_a_command_under_an_older_lease_is_refused(tmp_path):
    with localnet() as exchange:
        ledger, place = ledger_of(tmp_path), f"localnet {exchange.url}"
        release(ledger, acquire(ledger, Lease(place, "main", (BITCOIN,), "one", this_process()), clock()))
        number = ledger.commands.ask(Asked("halt", "it was going wrong", "anna", strategy="momentum"))
        live = session(exchange, tmp_path, id="two", say=str, waits={"heartbeat": 10})

        async def hear():
            running = asyncio.ensure_future(live.run())
            while not ledger.commands.all()[0]["answered"] or not live.statistics.candles: await asyncio.sleep(.01)
            live.stop()
            await running
        asyncio.run(hear())
        assert "refused: halt was asked for under epoch 1 of the lease, session two has epoch 2" in (
            ledger.commands.all()[0]["answer"])
        assert live.trader.account["required_state"][0] == TradingState.NORMAL
        assert number == 1


def test_an_exception_in_a_task_is_told(tmp_path):
    class Broken(BinanceVenue):
        async def waits(self, open_time, trade=None):
            asyncio.get_running_loop().call_soon(lambda: 1 / 0)
            await super().waits(open_time, trade)

    with localnet() as exchange:
        run(session(exchange, tmp_path, broker=Broken, say=str), 2)
        notices = ledger_of(tmp_path).notices("momentum_test")
        assert notices[notices["kind"] == "task"]["text"].str.contains("ZeroDivisionError").any()
