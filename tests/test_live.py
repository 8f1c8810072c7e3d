"The live session against localnet, over real sockets and through ccxt"
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import SecretStr

from tradelab.compiled import compiled
from tradelab.config import VenueSettings
from tradelab.errors import FeedError, InsufficientBalanceError
from tradelab.evaluation.difference import first_difference
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN as LISTED
from tradelab.instruments import Instrument
from tradelab.live.ledger import Ledger
from tradelab.live.order_states import State, decision_id
from tradelab.live.reconcile import StartRefusedError
from tradelab.live.recorder import Recording, find_session, read, recorded_settings
from tradelab.live.replay import first_other_action, replay, unproven
from tradelab.live.session import Session
from tradelab.live.venue import Answer, Outcome, VenueError
from tradelab.localnet.protocol import format_number
from tradelab.localnet.server import Localnet
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1, funding
from tradelab.orders import Order
from tradelab.policies import Policy
from tradelab.risk.execution import OrderGate
from tradelab.settings import NO_STOPS, CostModel, Limits
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration

BITCOIN, ETHER = "BTC/USDT:USDT", "ETH/USDT:USDT"
MARKET, HISTORY = ar1(140, seed=3), 40


def localnet(symbols=(BITCOIN,), **options):
    candles = {symbol: ar1(140, seed=3 + n) for n, symbol in enumerate(symbols)}
    paid = {symbol: funding(frame, seed=n) for n, (symbol, frame) in enumerate(candles.items())}
    return Localnet(candles, paid, [replace(LISTED, symbol=symbol) for symbol in symbols], CostModel(),
                    start=int(times(MARKET)[HISTORY]), **options)


def venue(exchange, key="localnet-key", secret="localnet-secret"):
    return VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"), SecretStr(key),
                 SecretStr(secret))


def trader(symbols=(BITCOIN,), limits=Limits()):
    policy = Momentum(lookback=5, threshold=.005)
    return Trader(policy, Observation.from_policy(policy), OrderGate, limits,
                  tuple(replace(LISTED, symbol=symbol) for symbol in symbols))


def session(exchange, folder, broker=BinanceVenue, symbols=(BITCOIN,), limits=Limits(), keys=(), **options):
    ledger = Ledger(f"sqlite:///{folder}/tradelab.db")
    return Session(trader(symbols, limits), broker(venue(exchange, *keys)), ledger, folder / "sessions",
                   **({"id": "momentum_test"} | options))


def run(session, candles=None): return asyncio.run(session.run(candles))
def journal(folder, name="momentum_test"): return Ledger(f"sqlite:///{folder}/tradelab.db").journal(name)
def recording(folder, name="momentum_test"): return folder / "sessions" / name / "recording.zst"
def told(lines, kind): return [event for line in lines if line["kind"] == "received" for event in line["events"]
                               if event["type"] == kind]
def orders_at(exchange): return Counter(order.client_id for order in exchange.exchange.accounts["main"].orders.values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Eighty candles in one go: what every interrupted session must have done, too"
    folder = tmp_path_factory.mktemp("whole")
    with localnet() as exchange:
        live = session(exchange, folder)
        statistics = run(live, 80)
        orders = orders_at(exchange)
    return {"folder": folder, "statistics": statistics, "orders": orders, "journal": journal(folder)}


def test_orders_flow_and_the_books_agree_with_the_exchange_at_every_candle(whole):
    statistics, steps = whole["statistics"], whole["journal"]
    assert statistics.candles == len(steps) == 80
    assert statistics.late == statistics.rejected == statistics.disagreements == 0
    assert (steps["order"] > 0).sum() > 5
    assert (steps["order"] < 0).sum() > 5
    assert (steps["fill_quantity"] == steps["order"]).all()
    flips = (steps["order"] * steps["position"] < 0) & (steps["order"].abs() > steps["position"].abs())
    assert statistics.orders == statistics.fills == (steps["order"] != 0).sum() + flips.sum() # a flip is two orders
    assert (steps["funding"] != 0).any()
    assert np.isclose(steps["fee"].sum(), statistics.fees)
    assert np.isclose(steps["funding"].sum(), statistics.funding)
    assert set(whole["orders"].values()) == {1}
    assert len(whole["orders"]) == statistics.orders
    assert list(times(steps)) == list(times(MARKET)[HISTORY:HISTORY + 80])


def test_what_a_session_leaves(whole):
    folder = whole["folder"] / "sessions" / "momentum_test"
    worth = pd.read_csv(folder / "equity.csv")
    assert list(worth["open_time"]) == list(whole["journal"].index.as_unit("ms").asi8)
    for name in ("equity", "drawdown"): # this policy decides at every close
        assert (worth[name].to_numpy() == whole["journal"][name].to_numpy()).all()
    table = pd.read_csv(folder / "journal.csv")
    assert list(table.pop("decision")) == [decision_id("momentum_test", symbol, open_time)
                                           for symbol, open_time in zip(table.symbol, table.open_time)]
    table.index = pd.DatetimeIndex(table.pop("open_time").to_numpy().astype("datetime64[ms]"), tz="UTC",
                                   name="open_time")
    pd.testing.assert_frame_equal(table, whole["journal"], check_exact=True, check_dtype=False, check_index_type=False)
    status = json.loads((folder / "session.json").read_text())
    assert status["state"] == "stopped"
    assert status["pid"] == os.getpid()
    assert status["statistics"]["candles"] == 80
    kinds = Counter(line["kind"] for line in read(folder / "recording.zst"))
    assert kinds["decision"] == 80
    assert kinds["frame"] > 160
    assert kinds["request"] == whole["statistics"].orders
    assert len([event for event in told(read(folder / "recording.zst"), "Fill")]) == whole["statistics"].fills
    assert Ledger(f"sqlite:///{whole['folder']}/tradelab.db").session("momentum_test")["state"] == "stopped"
    then = recorded_settings(find_session(whole["folder"] / "sessions", "latest") / "recording.zst")
    assert then["policy"] == then["origin"] == "momentum(5,0.005)"
    assert then["symbols"] == [BITCOIN]
    assert Limits(**then["limits"]) == Limits()
    assert then["deposit"] == 10_000
    assert [Instrument(**each) for each in then["instruments"]] == [replace(LISTED, symbol=BITCOIN)]
    proven = Recording(folder / "recording.zst")
    assert {line["kind"] for line in proven} >= {"recording", "start", "received", "end"}
    assert proven.ended
    assert proven.decisions == 80
    assert unproven(proven, replay(proven, trader())[0], whole["journal"]) == ""
    written = ((folder / "session.json").read_text() + "".join(json.dumps(line)
                                                               for line in read(folder / "recording.zst")))
    assert "localnet-secret" not in written
    assert "localnet-key" not in written
    assert "listenKey" not in written


def test_replay_finds_no_difference_and_finds_a_planted_one(whole):
    recorded, recomputed = replay(recording(whole["folder"]), trader())
    assert len(recorded) == 80
    assert first_difference(recorded, recomputed) is None
    lines = list(read(recording(whole["folder"])))
    candle = [event for event in told(lines, "Candle") if event["values"][1] > event["values"][3]][30]
    candle["values"][3] = float(np.nextafter(candle["values"][3], np.inf))
    found = first_difference(*replay(lines, trader()))
    assert found.bar == pd.Timestamp(candle["open_time"], unit="ms", tz="UTC")
    assert found.column == "close"
    assert found.a != found.b


def test_a_session_that_was_stopped_and_resumed_is_the_session_that_was_not(whole, tmp_path):
    with localnet() as exchange:
        assert run(session(exchange, tmp_path), 30).candles == 30
        assert run(session(exchange, tmp_path, id="", resume="momentum_test"), 1).candles == 1
        assert run(session(exchange, tmp_path, id="", resume="momentum_test"), 49).candles == 49
        orders = orders_at(exchange)
    assert first_difference(whole["journal"], journal(tmp_path)) is None
    assert orders == whole["orders"]
    recorded, recomputed = replay(recording(tmp_path), trader())
    assert len(recorded) == 80
    assert first_difference(recorded, recomputed) is None
    assert first_difference(recorded, replay(recording(whole["folder"]), trader())[0]) is None


@compiled
def _follow(parameters, memory, observation, prices, targets):
    for n in range(len(targets)):
        change = observation[n, 0]
        targets[n] = 0. if abs(change) < .002 else min(max(60. * change, -1.), 1.)


def test_positions_that_are_added_up_in_steps_close_without_dust(tmp_path):
    policy = Policy("follow", _follow, np.zeros(0), ("return(1)",))
    make = lambda: Trader(policy, Observation.from_policy(policy), OrderGate, Limits(),
                          (replace(LISTED, symbol=BITCOIN),))
    with localnet() as exchange:
        live = Session(make(), BinanceVenue(venue(exchange)), Ledger(f"sqlite:///{tmp_path}/tradelab.db"),
                       tmp_path / "sessions", id="momentum_test")
        statistics = run(live, 95)
        held = {order.client_id: format_number(order.quantity)
                for order in exchange.exchange.accounts["main"].orders.values()}
    steps = journal(tmp_path)
    assert statistics.orders > 50
    assert statistics.disagreements == statistics.rejected == 0
    assert set(live.ledger.notices("momentum_test")["kind"]) <= {"kept"}
    assert all(len(quantity.partition(".")[2]) <= 3 for quantity in held.values())
    assert np.allclose(steps["fill_quantity"], steps["order"], atol=1e-12)
    assert (steps["position"] == 0).any()
    assert first_difference(*replay(recording(tmp_path), make())) is None


KILLED = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_live import BinanceVenue, SecretStr, Session, VenueSettings, Ledger, trader, BITCOIN

class Killed(BinanceVenue):
    sent = 0
    async def place(self, order):
        Killed.sent += 1
        if {moment!r} == "before" and Killed.sent == {nth}: os.kill(os.getpid(), signal.SIGKILL)
        answer = await super().place(order)
        if {moment!r} == "after" and Killed.sent == {nth}: os.kill(os.getpid(), signal.SIGKILL)
        return answer

    async def account(self):
        if {moment!r} == "account" and Killed.sent == {nth}: os.kill(os.getpid(), signal.SIGKILL)
        return await super().account()

if {moment!r} == "intent":
    intend = Ledger.intend
    def killed(self, session, orders):
        intend(self, session, orders)
        Killed.sent += len(orders)
        if Killed.sent >= {nth}: os.kill(os.getpid(), signal.SIGKILL)
    Ledger.intend = killed

folder = Path({folder!r})
venue = VenueSettings("localnet", "a test", {url!r}, {url!r}.replace("http", "ws"),
              SecretStr("localnet-key"), SecretStr("localnet-secret"))
ledger = Ledger(f"sqlite:///{{folder}}/tradelab.db")
session = Session(trader(), Killed(venue), ledger, folder / "sessions", id="momentum_test")
asyncio.run(session.run(80))
"""


def start(exchange, folder, moment="", nth=0):
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), url=exchange.url, moment=moment,
                           nth=nth)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("moment, nth", [("intent", 5), ("after", 5), ("account", 5), ("after", 1)])
def test_a_session_that_was_killed_neither_repeats_nor_loses_an_order(whole, tmp_path, moment, nth):
    with localnet() as exchange:
        process = start(exchange, tmp_path, moment, nth)
        said = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, said
        done = [line["open_time"] for line in read(recording(tmp_path)) if line["kind"] == "decision"]
        assert len(done) >= nth                                    # the recording of a killed session can be read
        run(session(exchange, tmp_path, id="", resume="momentum_test"), 80 - len(journal(tmp_path)))
        orders = orders_at(exchange)
    assert orders == whole["orders"]
    assert first_difference(whole["journal"], journal(tmp_path)) is None
    recorded, recomputed = replay(recording(tmp_path), trader())
    assert len(recorded) == 80
    assert first_difference(recorded, recomputed) is None


def test_an_order_that_was_about_to_be_sent_is_never_sent_again(whole, tmp_path):
    "It is looked for, found nowhere, twice, and given up; then its symbol is traded again"
    with localnet() as exchange:
        assert start(exchange, tmp_path, "before", 5).wait() == -signal.SIGKILL
        resumed = session(exchange, tmp_path, id="", resume="momentum_test", patience=2., waits={"absent_after": 100})
        run(resumed, 80 - len(journal(tmp_path)))
        orders = orders_at(exchange)
    lost, = [name for name in whole["orders"] if name not in orders and name in {intent.order.order_id
             for intent in resumed.ledger.intents("momentum_test") if intent.state is State.ABSENT}]
    assert set(orders.values()) == {1}
    assert not any(name.startswith(lost[:-1]) for name in orders)               # nor under the name of another attempt
    assert "absent" in set(resumed.ledger.notices("momentum_test")["kind"])
    assert resumed.statistics.disagreements == 0
    assert resumed.statistics.orders > 5
    assert first_difference(*replay(recording(tmp_path), trader())) is None


WITH_ITS_EXCHANGE = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_live import BinanceVenue, localnet, run, session

class Killed(BinanceVenue):
    sent = 0
    async def place(self, order):
        Killed.sent += 1
        answer = await super().place(order)
        if Killed.sent == 5: os.kill(os.getpid(), signal.SIGKILL)
        return answer

with localnet(memory=Path({folder!r}) / "localnet.jsonl") as exchange:
    run(session(exchange, Path({folder!r}), Killed), 80)
"""


def test_a_session_that_died_with_its_localnet_goes_on(whole, tmp_path):
    "The exchange is made again from what it was asked, and the session does what it would have done"
    script = WITH_ITS_EXCHANGE.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
    with localnet(memory=tmp_path / "localnet.jsonl") as exchange:
        run(session(exchange, tmp_path, id="", resume="momentum_test"), 80 - len(journal(tmp_path)))
        orders = orders_at(exchange)
    assert orders == whole["orders"]
    assert first_difference(whole["journal"], journal(tmp_path)) is None
    proven = Recording(recording(tmp_path))
    recorded, recomputed = replay(proven, trader())
    assert len(recorded) == 80
    assert first_difference(recorded, recomputed) is None
    assert unproven(proven, recorded, journal(tmp_path)) == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_session_in_order(whole, tmp_path, number):
    with localnet() as exchange:
        process = start(exchange, tmp_path)
        status = tmp_path / "sessions" / "momentum_test" / "session.json"
        while process.poll() is None and not (status.exists() and len(journal(tmp_path)) > 10): time.sleep(.02)
        assert json.loads(status.read_text())["pid"] == process.pid
        process.send_signal(number)
        said = process.communicate()[0]
    assert process.returncode == 0
    assert "stopped: candles" in said
    assert json.loads(status.read_text())["state"] == "stopped"
    steps = journal(tmp_path)
    assert 10 < len(steps) < 80
    assert first_difference(whole["journal"].iloc[:len(steps)], steps) is None
    assert len(replay(recording(tmp_path), trader())[0]) == len(steps)


class Slow(BinanceVenue):
    "Waits 100 ms before everything it says"
    async def place(self, order):
        await asyncio.sleep(.1)
        return await super().place(order)
    async def account(self):
        await asyncio.sleep(.1)
        return await super().account()


def test_a_slow_client_does_the_same(whole, tmp_path):
    with localnet() as exchange: run(session(exchange, tmp_path, Slow), 40)
    assert first_difference(whole["journal"].iloc[:40], journal(tmp_path)) is None


class Deaf(BinanceVenue):
    "Loses a socket again and again"
    calls, route = 0, ""

    async def account(self):
        Deaf.calls += 1
        if Deaf.calls % 9 == 0:
            for url, client in list(self._exchange.clients.items()):
                if self.route in url and client.connection: await client.connection.close()
        return await super().account()


@pytest.mark.parametrize("route", ["/private", "/market", "ws://"])
def test_what_a_lost_stream_did_not_tell_is_fetched(whole, tmp_path, route):
    with localnet() as exchange:
        statistics = run(session(exchange, tmp_path, type("Deaf", (Deaf,), {"route": route})), 40)
    events = Ledger(f"sqlite:///{tmp_path}/tradelab.db").notices("momentum_test")
    assert {"lost", "trading"} <= set(events["kind"])
    assert statistics.disagreements == 0
    assert first_difference(whole["journal"].iloc[:40], journal(tmp_path)) is None


def test_two_symbols(tmp_path):
    symbols = (BITCOIN, ETHER)
    with localnet(symbols) as exchange:
        statistics = run(session(exchange, tmp_path, symbols=symbols), 15)
        assert run(session(exchange, tmp_path, symbols=symbols, id="", resume="momentum_test"), 15).disagreements == 0
    steps = journal(tmp_path)
    assert statistics.disagreements == 0
    assert len(steps) == 60
    assert list(steps["symbol"][:2]) == list(symbols)
    assert (steps["fill_quantity"] == steps["order"]).all()
    assert first_difference(*replay(recording(tmp_path), trader(symbols))) is None


class Mute(BinanceVenue):
    "Loses every order of Bitcoin, and never tells what became of it"
    async def place(self, order):
        return Answer(Outcome.UNKNOWN, text="no answer") if order.symbol == BITCOIN else await super().place(order)
    async def query(self, order):
        lost = order.symbol == BITCOIN
        return Answer(Outcome.UNKNOWN, text="no answer") if lost else await super().query(order)


def test_an_order_without_an_answer_holds_the_place_of_its_symbol(tmp_path, monkeypatch):
    """With `max_positions` of 1, nothing else is opened while nobody knows what became of it: it is decided as ever,
    and withheld; the replay decides the same"""
    monkeypatch.setattr("tradelab.live.order_manager.PAUSE", 50)
    symbols, limits, waits = (BITCOIN, ETHER), Limits(max_positions=1), {"quiet": 100}
    with localnet(symbols) as exchange:
        live = session(exchange, tmp_path, Mute, symbols, limits, patience=.5, waits=waits)
        run(live, 25)
    steps = journal(tmp_path)
    lost = steps["order"].ne(0) & steps["symbol"].eq(BITCOIN)
    first = steps.index[lost][0]
    ether = steps[steps["symbol"] == ETHER]
    wanted = ether["order"].ne(0) & (ether.index > first)
    assert wanted.any()
    assert (ether["position"][first:] == 0).all()
    assert live.statistics.withheld >= wanted.sum() - 1
    said = live.ledger.notices("momentum_test").query("kind == 'withheld'")["text"]
    assert said.str.startswith(ETHER).sum() == 1                                    # told once
    make = lambda: trader(symbols, limits)
    lines = list(read(recording(tmp_path)))
    assert first_difference(*replay(lines, make())) is None
    assert first_other_action(lines, make()) == ""
    for event in told(lines, "Answered"): event["answer"] |= {"outcome": "rejected"}
    assert first_other_action(lines, make()) != ""


def test_a_halt_is_an_event_and_survives_a_restart(tmp_path):
    limits = Limits(max_position=.25, max_drawdown=.002, stops=NO_STOPS)
    with localnet() as exchange:
        run(session(exchange, tmp_path, limits=limits), 30)
        events = Ledger(f"sqlite:///{tmp_path}/tradelab.db").notices("momentum_test")
        assert list(events["kind"]) == ["halt", "emergency", "emergency"]
        assert "everything is closed and stays closed" in events["text"][0]
        run(session(exchange, tmp_path, limits=limits, id="", resume="momentum_test"), 10)
    assert (journal(tmp_path)["order"].iloc[30:] == 0).all()
    assert journal(tmp_path)["position"].iloc[-1] == 0


def refused(error, match, live, folder):
    with pytest.raises(error, match=match) as caught: run(live, 5)
    assert not (folder / "sessions").exists()
    assert journal(folder).empty
    return str(caught.value)


def test_wrong_keys_are_one_sentence_without_the_key(tmp_path):
    with localnet() as exchange:
        said = refused(VenueError, "localnet refuses these keys .*: check localnet_key and localnet_secret",
                       session(exchange, tmp_path, keys=("somebody", "localnet-secret")), tmp_path)
        assert "somebody" not in said
        said = refused(VenueError, "localnet refuses these keys .-1022",
                       session(exchange, tmp_path, keys=("localnet-key", "guessed-secret")), tmp_path)
        assert "guessed" not in said
        assert "localnet-key" not in said
        assert "signature=" not in said


def test_a_symbol_that_the_exchange_does_not_list(tmp_path):
    with localnet() as exchange:
        refused(VenueError, "localnet does not list 'BTC/USDC:USDC': did you mean BTC/USDT:USDT",
                session(exchange, tmp_path, symbols=("BTC/USDC:USDC",)), tmp_path)


def test_a_position_that_the_ledger_does_not_explain(tmp_path):
    async def buy(broker):
        await broker.connect([BITCOIN])
        await broker.place(Order("by-hand", BITCOIN, .1, False, 0, 20_000.))
        await broker.close()

    with localnet() as exchange:
        asyncio.run(buy(BinanceVenue(venue(exchange))))
        refused(StartRefusedError, "the exchange holds 0.1 BTC/USDT:USDT, the ledger explains 0.0: close the "
                "difference by hand", session(exchange, tmp_path), tmp_path)


def test_a_trade_by_hand_while_the_session_was_down_is_found_and_named(tmp_path):
    async def sell(broker):
        await broker.connect([BITCOIN])
        await broker.place(Order("by-hand", BITCOIN, -.05, False, 0, 20_000.))
        await broker.close()

    with localnet() as exchange:
        live = session(exchange, tmp_path)
        run(live, 20)
        while not live.trader.positions["quantity"][0]:
            live = session(exchange, tmp_path, id="", resume="momentum_test")
            run(live, 1)
        before = journal(tmp_path)
        asyncio.run(sell(BinanceVenue(venue(exchange))))
        resumed = session(exchange, tmp_path, id="", resume="momentum_test")
        run(resumed, 1)
    events = Ledger(f"sqlite:///{tmp_path}/tradelab.db").notices("momentum_test")
    assert "foreign" in set(events["kind"])
    assert len(journal(tmp_path)) == len(before) + 1
    assert resumed.statistics.disagreements == 0


def test_more_money_or_less_than_the_trader_was_given(tmp_path):
    with localnet(deposit=15_000.) as exchange:
        live = session(exchange, tmp_path)
        assert run(live, 10).disagreements == 0
        assert live.reserve == 5_000
        assert run(session(exchange, tmp_path, id="", resume="momentum_test"), 10).disagreements == 0
    with localnet(deposit=500.) as exchange:
        with pytest.raises(InsufficientBalanceError, match="the account holds 500.00 USDT, the trader was given "
                           "10,000.00: "
                           "lower its deposit"):
            run(session(exchange, tmp_path, id="poor"), 5)


def test_a_session_is_resumed_as_it_was(tmp_path):
    with localnet((BITCOIN, ETHER)) as exchange:
        run(session(exchange, tmp_path), 3)
        with pytest.raises(StartRefusedError, match="has symbols .* resume it as it was, or start a new one"):
            run(session(exchange, tmp_path, symbols=(ETHER,), id="", resume="momentum_test"))
        with pytest.raises(ValueError, match="is in the ledger already: resume it"): run(session(exchange, tmp_path), 1)
        with pytest.raises(KeyError, match="knows no session 'another'"):
            run(session(exchange, tmp_path, id="", resume="another"), 1)


def test_too_little_history(tmp_path):
    market = {BITCOIN: MARKET}
    with Localnet(market, start=int(times(MARKET)[3])) as exchange:
        with pytest.raises(StartRefusedError, match="localnet has 3 closed candles of BTC/USDT:USDT, policy "
                           "momentum.* needs"):
            run(session(exchange, tmp_path), 5)


def test_a_timeframe_that_the_exchange_does_not_have(tmp_path):
    with localnet() as exchange:
        with pytest.raises((VenueError, StartRefusedError, FeedError)):
            run(session(exchange, tmp_path, timeframe="15m", patience=3.), 5)


def test_a_session_of_longer_candles_than_those_of_the_exchange(tmp_path):
    "Between two of its candles it is not waited for, and the market does not run away from it"
    with localnet() as exchange:
        statistics = run(session(exchange, tmp_path, timeframe="4h"), 12)
        assert statistics.candles == 12
        assert statistics.late == statistics.disagreements == 0
    opens = times(journal(tmp_path))
    assert (opens == opens[0] + 4 * 3_600_000 * np.arange(12)).all()


def test_stop_from_another_thread(tmp_path):
    with localnet() as exchange:
        live = session(exchange, tmp_path)
        live.progress = lambda statistics: live.stop() if statistics.candles == 7 else None
        assert run(live).candles == 7


def test_a_cancelled_session_loses_nothing(whole, tmp_path):
    async def cancelled(live):
        task = asyncio.ensure_future(live.run())
        live.progress = lambda statistics: task.cancel() if statistics.candles == 12 else None
        await task

    with localnet() as exchange:
        with pytest.raises(asyncio.CancelledError): asyncio.run(cancelled(session(exchange, tmp_path, Slow)))
        assert json.loads((tmp_path / "sessions" / "momentum_test" / "session.json").read_text())["state"] == "stopped"
        run(session(exchange, tmp_path, id="", resume="momentum_test"), 10)
    assert first_difference(whole["journal"].iloc[:len(journal(tmp_path))], journal(tmp_path)) is None
