"Money and what is not ours: a real session on localnet, and what somebody else does to its account"
import asyncio

import pytest
from test_live import BITCOIN, journal, localnet, run, session, venue

from tradelab.live.guards import is_emergency
from tradelab.live.ledger import Ledger
from tradelab.live.messages import Command
from tradelab.live.venue import UNITS, units
from tradelab.orders import Order
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration




def met(folder, scenario, word="", candles=40, **changes):
    "A session that meets a fault at its eleventh candle, what it told but for its end, and the account there"
    folder.mkdir(exist_ok=True)
    with localnet(faults=[{"scenario": scenario, "after": 10} | changes]) as exchange:
        live = session(exchange, folder, patience=4.)
        say, said = live.say, []

        def hear(line):
            say(line)
            if word and line.startswith("foreign:") and not said:
                said.append(line)
                live.venue.events.put_nowait(Command(1, word, BITCOIN, "an example", "Ada"))
        live.say = hear
        run(live, candles)
        account = exchange.exchange.accounts["main"]
        assert exchange.faults.log
        told = live.ledger.notices("momentum_test").query("kind != 'kept'").reset_index(drop=True)
        return live, told, account


def own(live): return live.trader.positions["quantity"][0]


def same_money(live, account):
    "The exchange's own rows give its wallet, to the last decimal"
    return sum(row.amount for paid in live.ledger.paid("momentum_test") for row in paid.rows) == units(
        f"{account.wallet():.8f}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with localnet() as exchange:
        live = session(exchange, folder)
        run(live, 40)
    return own(live), journal(folder)


def test_a_hand_trade_of_twenty_times_the_limit_is_neither_adopted_nor_traded_against(tmp_path):
    live, notices, account = met(tmp_path, "hand_trade", side="BUY", quantity=.5)
    assert list(notices["kind"]) == ["foreign", "withheld"]
    assert "+0.5 at" in notices["text"][0]
    assert "by a person or another program, order web_1" in notices["text"][0]
    assert live.statistics.orders == live.statistics.fills == 3        # those before it
    assert account.held(0) == pytest.approx(own(live) + .5)            # untouched
    assert live.statistics.disagreements == 0
    assert same_money(live, account)
    assert [each.verdict for each in live.ledger.foreign("momentum_test")] == ["waits"]


def test_what_waits_for_a_person_still_waits_after_a_restart(tmp_path):
    with localnet(faults=[{"scenario": "hand_trade", "after": 10}]) as exchange:
        run(session(exchange, tmp_path, patience=4.), 20)
        again = session(exchange, tmp_path, id="", resume="momentum_test", patience=4.)
        run(again, 20)
        assert again.statistics.orders == 0
        assert own(again) - .01 == pytest.approx(exchange.exchange.accounts["main"].held(0))
        again = session(exchange, tmp_path, id="", resume="momentum_test", patience=4.)
        again.venue.events.put_nowait(Command(1, "adopt", BITCOIN, "an example", "Ada"))
        run(again, 10)
        assert again.statistics.orders > 0
        assert own(again) == pytest.approx(exchange.exchange.accounts["main"].held(0))
        assert again.statistics.disagreements == 0


def test_adopted_it_is_the_traders(tmp_path):
    live, _, account = met(tmp_path, "hand_trade", "adopt")
    assert account.held(0) == pytest.approx(own(live))
    assert live.statistics.fills == live.statistics.orders + 1
    assert live.statistics.disagreements == 0
    assert same_money(live, account)


def test_ignored_it_changes_nothing_of_what_is_traded(tmp_path, undisturbed):
    live, _, account = met(tmp_path, "hand_trade", "ignore")
    expected, steps = undisturbed
    assert own(live) == expected == pytest.approx(account.held(0) + .01)
    assert (journal(tmp_path)["position"] == steps["position"]).all()
    assert live.statistics.rejected == live.statistics.disagreements == 0
    assert same_money(live, account)


def test_flattened_it_is_closed_by_orders_that_only_reduce_and_trading_goes_on(tmp_path):
    live, notices, account = met(tmp_path, "hand_trade", "flatten", side="BUY", quantity=.5)
    closing = [each.order for each in live.ledger.intents("momentum_test") if is_emergency(each.order)]
    assert closing
    assert all(order.reduce_only for order in closing)
    assert sum(order.quantity for order in closing) <= -.5
    assert list(notices["kind"])[:3] == ["foreign", "over", "emergency"]
    assert account.held(0) == pytest.approx(own(live))
    assert live.statistics.orders > 10
    assert live.statistics.disagreements == 0
    assert same_money(live, account)


def test_a_second_session_is_seen_as_one(tmp_path):
    live, notices, account = met(tmp_path, "second_session", client_id="tl-0123456789abcd-lqv-")
    assert list(notices["kind"][:1]) == ["foreign"]
    assert "by another session, order tl-0123456789abcd-lqv-1" in notices["text"][0]
    assert live.statistics.orders == 3
    assert account.held(0) == pytest.approx(own(live) + .02)


def test_a_position_that_was_closed_by_hand_waits_for_a_person(tmp_path):
    live, notices, account = met(tmp_path, "external_close")
    assert set(notices["kind"]) == {"foreign", "withheld"}
    assert account.held(0) == 0
    assert live.statistics.orders == 3
    live, _, account = met(tmp_path / "adopted", "external_close", "adopt")
    assert account.held(0) == pytest.approx(own(live))
    assert live.statistics.orders > 3
    assert live.statistics.disagreements == 0


def test_a_liquidation_halts_whoever_adopts_it(tmp_path):
    for word in ("", "adopt"):
        live, notices, account = met(tmp_path / (word or "alone"), "liquidation", word)
        assert {"foreign", "halt"} <= set(notices["kind"])
        assert "by the exchange (liquidation)" in notices[notices["kind"] == "foreign"]["text"].iloc[0]
        assert live.statistics.orders == 3
        assert account.held(0) == 0
        assert own(live) == (0 if word else .025)
        assert live.statistics.disagreements == 0


def test_a_transfer_is_no_disagreement_and_the_trader_sizes_by_what_is_there(tmp_path):
    live, notices, account = met(tmp_path, "transfer")
    assert list(notices["kind"]) == ["transfer"]
    assert live.trader.account["deposit"][0] == 9_000
    assert live.trader.account["drawdown"][0] < .01                    # it is no loss
    assert live.statistics.disagreements == 0
    assert live.statistics.orders > 10
    assert same_money(live, account)
    assert sum(row.amount for paid in live.ledger.paid("momentum_test") for row in paid.rows
               if row.kind == "TRANSFER") == 9_000 * UNITS


def test_a_lost_fill_is_found_by_the_number_of_the_trade(tmp_path, undisturbed):
    live, notices, account = met(tmp_path, "lost_fill")
    assert notices.empty
    assert own(live) == undisturbed[0] == pytest.approx(account.held(0))
    assert (journal(tmp_path)["position"] == undisturbed[1]["position"]).all()
    fills = [entry for _, entry in Ledger(f"sqlite:///{tmp_path}/tradelab.db").booked("momentum_test")
             if hasattr(entry, "realised")]
    assert sum(fill.realised for fill in fills) == units(f"{live.trader.account['realised'][0]:.8f}")
    assert sum(fill.commission for fill in fills) == units(f"{live.trader.account['fees'][0]:.8f}")


def test_the_account_says_its_settings(tmp_path):
    async def told(exchange):
        broker = BinanceVenue(venue(exchange))
        await broker.connect([BITCOIN])
        before = await broker.account()
        await broker.place(Order("by-hand", BITCOIN, .1, False, 0, 20_000.))
        after = await broker.account()
        newest = await broker.fills(BITCOIN)
        name = await broker.name_of(BITCOIN, newest[0].order_id)
        nobody = await broker.name_of(BITCOIN, "987654")
        await broker.close()
        return before, after, newest, (name, nobody)

    with localnet() as exchange: before, after, newest, names = asyncio.run(told(exchange))
    assert before.alias
    assert (before.hedge_mode, before.multi_assets) == (False, False)
    assert (before.held[BITCOIN].quantity, before.held[BITCOIN].leverage) == (0, 20)
    assert not before.held[BITCOIN].isolated
    assert after.held[BITCOIN].entry_price == pytest.approx(newest[0].price)
    assert after.available < before.available
    assert after.update_time >= newest[0].fill_time
    assert names == ("by-hand", "")
