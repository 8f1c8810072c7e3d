"What a session finds before it trades: leases, halts of its strategy, commands, accounts that are set otherwise"
import asyncio
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
from servers import until
from test_bad_input import tradelab
from test_live import BITCOIN, ETHER, localnet, orders_at, session, venue
from test_trust import ID, make_run, reseal

from tradelab.account import wallet
from tradelab.database.records import Asked, Lease, LeaseLostError, clock
from tradelab.events import TradingState
from tradelab.live.lease import acquire, release, this_process
from tradelab.live.ledger import Ledger
from tradelab.live.reconcile import StartRefusedError
from tradelab.live.venue import VenueError
from tradelab.localnet.faults import Faults
from tradelab.runs.formats import CONFIG, POLICY
from tradelab.runs.registry import save
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


@pytest.mark.parametrize("method, asked, sentence", [
    ("PositionSideDual", {"dualSidePosition": "true"}, "the account is in hedge mode .*: switch it to one-way mode"),
    ("MultiAssetsMargin", {"multiAssetsMargin": "true"}, "in multi-assets mode .*: switch it to single-asset mode"),
    ("Leverage", {"symbol": "BTCUSDT", "leverage": 3}, "has the leverage 3 .*: set it to 5 there, or risk.leverage"),
    ("MarginType", {"symbol": "BTCUSDT", "marginType": "ISOLATED"}, "has isolated margin .*: switch it to cross")])
def test_an_account_that_is_set_otherwise_is_refused_and_not_changed(tmp_path, method, asked, sentence):
    with localnet() as exchange:
        ask(exchange, f"fapiPrivatePost{method}", **asked)
        account = account_of(exchange)
        def is_set(): return account.dual, account.multi_assets, list(account.leverage), account.isolated
        before = is_set()
        with refused(sentence): run(session(exchange, tmp_path, say=str), 2)
        assert is_set() == before
        assert not orders_at(exchange)


def test_hedge_mode_names_what_is_to_be_closed_first(tmp_path):
    with localnet() as exchange:
        ask(exchange, "fapiPrivatePostPositionSideDual", dualSidePosition="true")
        ask(exchange, "fapiPrivatePostOrder", symbol="BTCUSDT", side="BUY", positionSide="LONG", type="MARKET",
            quantity="0.01")
        with refused("switch it to one-way mode there once BTC/USDT:USDT is closed"):
            run(session(exchange, tmp_path, id="held", say=str), 2)
        assert len(orders_at(exchange)) == 1


def test_a_leverage_that_is_higher_than_the_trader_needs_stays(tmp_path):
    with localnet() as exchange:
        run(session(exchange, tmp_path, say=str), 2)
        assert account_of(exchange).leverage == [20]


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


def test_a_session_whose_loop_hangs_shows_no_sign_of_life_until_it_turns_again(tmp_path):
    hanging, release_it = threading.Event(), threading.Event()

    def progress(statistics):
        if statistics.candles != 3: return
        hanging.set()
        release_it.wait()
    with localnet() as exchange:
        live = session(exchange, tmp_path, say=str, waits={"heartbeat": 20}, progress=progress)
        live.hangs = .2
        trading = threading.Thread(target=run, args=(live, 6))
        trading.start()
        try:
            assert hanging.wait(60)
            def beat(): return ledger_of(tmp_path).leases.of(live.lease.venue, live.lease.account)[BITCOIN]["beat"]
            until(lambda: clock() - beat() > 1_000)
        finally: release_it.set()
        trading.join(60)
        assert live.statistics.candles == 6
        assert beat() == 0 # given back: nobody had taken it


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


def test_two_sessions_of_different_symbols_trade_in_one_account_and_neither_is_foreign_to_the_other(tmp_path):
    with localnet((BITCOIN, ETHER), deposit=20_000.) as exchange:
        one, two = (session(exchange, tmp_path, id=symbol[:3], symbols=(symbol,), say=str)
                    for symbol in (BITCOIN, ETHER))
        async def both(): await asyncio.gather(one.run(40), two.run(40))
        asyncio.run(both())
        account = account_of(exchange)
        for number, live in enumerate((one, two)):
            assert live.statistics.candles == 40
            assert live.statistics.orders > 10
            assert live.statistics.disagreements == 0
            assert account.held(number) == pytest.approx(live.trader.positions["quantity"][0])
            assert set(live.ledger.notices(live.id)["kind"]) <= {"kept"}
        own = sum(wallet(live.trader.account) for live in (one, two))
        assert account.wallet() == pytest.approx(own)


def of_another(one, other): shutil.copy(other / CONFIG, one / CONFIG)


def of_another_sealed(one, other):
    of_another(one, other)
    reseal(one)


def one_byte(one, other):
    content = bytearray((one / POLICY).read_bytes())
    content[-1] ^= 1
    (one / POLICY).write_bytes(content)


def trade_live(exchange, folder, train_id, **variables):
    "The job as a person types it, on a localnet that is there already"
    return tradelab(folder, "live", "--train-id", train_id, "-p", "venue", "localnet", "-p", "candles", "5",
                    TRADELAB_LOCALNET_PORT=str(exchange.port), **variables)


@pytest.mark.parametrize("change, sentence", [
    (of_another, f"{CONFIG} was changed since the training"), (one_byte, f"{POLICY} was changed since the training"),
    (of_another_sealed, f"{CONFIG} is that of run {ID.replace('seed7', 'seed8')}: restore its own")])
def test_a_run_that_is_not_what_was_trained_is_refused_and_nothing_is_traded(tmp_path, change, sentence):
    one, other = (make_run(tmp_path / "runs", name) for name in (ID, ID.replace("seed7", "seed8")))
    change(one.folder, other.folder)
    with localnet(api_key="localnet", api_secret="localnet") as exchange:
        ran = trade_live(exchange, tmp_path, ID)
        assert ran.returncode == 1
        assert ran.stderr.strip().splitlines()[-1].startswith(f"Error: live: run {ID}: {sentence}")
        assert not orders_at(exchange)
    assert not (tmp_path / "sessions").exists()


def test_limits_that_a_run_brings_are_those_of_the_house_where_they_are_stricter(tmp_path):
    run = make_run(tmp_path / "runs")
    loose = Limits(leverage=100, max_leverage=100., max_position=50., max_drawdown=.9)
    name = ID.replace("seed7", "loose")
    save(replace(run, id=name, limits=loose), folder=tmp_path / "runs")
    with localnet(api_key="localnet", api_secret="localnet") as exchange:
        ran = trade_live(exchange, tmp_path, name)
        assert ran.returncode == 0, ran.stderr
        house = Limits()
        for limit in ("leverage", "max_leverage", "max_position", "max_drawdown"):
            theirs, ours = getattr(loose, limit), getattr(house, limit)
            assert f"limits: {limit}: the run says {theirs}, [risk] says {ours}, {ours} is in force" in ran.stdout
        ledger = ledger_of(tmp_path)
        kept = ledger.session(ledger.sessions()[0])["settings"]["limits"]
        assert Limits(**kept).max_leverage == house.max_leverage
        assert account_of(exchange).leverage[0] == 20 # nobody has changed it


def test_a_halt_that_a_person_resets_while_no_session_runs_is_lifted_for_the_next_one(tmp_path):
    with localnet() as exchange:
        run(halting(exchange, tmp_path, "one"), 60)
        two = halting(exchange, tmp_path, "two")
        run(two, 3)
        assert two.trader.account["halted"][0] == 1
        sent = len(orders_at(exchange))
        said = tradelab(tmp_path, "reset", "--reason", " ")
        assert "a reset needs a reason" in said.stderr
        said = tradelab(tmp_path, "reset", "--reason", "looked at it")
        assert "reset: its next session may open positions again" in said.stdout, said.stderr
        again = halting(exchange, tmp_path, "three", .5)
        run(again, 15)
        assert again.trader.account["halted"][0] == 0
        assert len(orders_at(exchange)) > sent
        told = ledger_of(tmp_path).notices("three")
        assert told["text"].str.contains("where a person left it: reset by .*: looked at it").any()
        assert "there is nothing to" not in said.stdout
        assert "is not halted" in tradelab(tmp_path, "reset", "--reason", "once more").stderr


def test_a_halt_that_a_person_says_while_no_session_runs_holds_for_the_next_one_and_for_one_that_is_resumed(tmp_path):
    with localnet() as exchange:
        run(session(exchange, tmp_path, id="one", say=str), 20)
        said = tradelab(tmp_path, "halt", "one", "--reason", "the weekend")
        assert "halted: its next session opens nothing until a reset" in said.stdout, said.stderr
        sent = len(orders_at(exchange))
        resumed = session(exchange, tmp_path, id="", resume="one", say=str)
        run(resumed, 10)
        assert resumed.trader.account["required_state"][0] == TradingState.HALT
        entries = [each for each in resumed.ledger.intents("one")][sent:]
        assert all(each.order.reduce_only for each in entries)
        assert account_of(exchange).held(0) == 0
        kept = [(row["name"], row["reason"], row["answer"][:6]) for row in resumed.ledger.commands.all()]
        assert kept == [("halt", "the weekend", "halted")]
        assert "reset: its next" in tradelab(tmp_path, "reset", "momentum", "--reason", "monday").stdout
        again = session(exchange, tmp_path, id="", resume="one", say=str)
        before = len(orders_at(exchange))
        run(again, 15)
        assert len(orders_at(exchange)) > before
