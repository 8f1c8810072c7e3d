"""Stops that stand at a real localnet, over sockets: where the simulation has them, replaced without a naked moment,
found again by a session that was killed"""
import asyncio
import time
from collections import Counter
from dataclasses import replace
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
from pydantic import SecretStr

from tradelab.config import VenueSettings
from tradelab.evaluation.difference import first_difference
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN as LISTED
from tradelab.live.ledger import Ledger
from tradelab.live.messages import Command
from tradelab.live.order_states import State, protects
from tradelab.live.recorder import read
from tradelab.live.session import Session
from tradelab.localnet.protocol import signature
from tradelab.localnet.server import Localnet
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1, funding
from tradelab.orders import Kind
from tradelab.policies import buy_and_hold
from tradelab.risk.execution import OrderGate
from tradelab.settings import CostModel, Execution, Limits, Stops
from tradelab.sim.backtest import backtest
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration

BITCOIN, HISTORY = "BTC/USDT:USDT", 40
STOPPED = Limits(stops=Stops(stop_loss=.006, take_profit=.01, trailing_stop=.008), max_drawdown=.9, max_daily_loss=None)
WIDE = replace(STOPPED, stops=Stops(stop_loss=.2, take_profit=0.))
POLICY, HOLDING = Momentum(lookback=5, threshold=.002), buy_and_hold()


def market(symbols=(BITCOIN,), candles=260):
    return {symbol: ar1(candles, volatility=.006, seed=3 + n) for n, symbol in enumerate(symbols)}


def localnet(symbols=(BITCOIN,), candles=260, **options):
    frames = market(symbols, candles)
    paid = {symbol: funding(frame, seed=n) for n, (symbol, frame) in enumerate(frames.items())}
    return Localnet(frames, paid, [replace(LISTED, symbol=symbol) for symbol in symbols], CostModel(),
                    start=int(times(frames[BITCOIN])[HISTORY]), **options)


def session(exchange, folder, symbols=(BITCOIN,), limits=STOPPED, policy=POLICY, **options):
    trader = Trader(policy, Observation.from_policy(policy), OrderGate, limits,
                    tuple(replace(LISTED, symbol=symbol) for symbol in symbols), execution=Execution(protect=True))
    settings = VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"),
                             SecretStr("localnet-key"), SecretStr("localnet-secret"))
    return Session(trader, BinanceVenue(settings), Ledger(f"sqlite:///{folder}/tradelab.db"), folder / "sessions",
                   **({"id": "protected", "say": lambda line: None} | options))


def run(live, candles=None): return asyncio.run(live.run(candles))


def frames_of(folder):
    "What the exchange told of stops and positions, in its order"
    for line in read(folder / "sessions" / "protected" / "recording.zst"):
        frame = line.get("frame") if line["kind"] == "frame" else None
        if isinstance(frame, dict) and frame.get("e") in ("ALGO_UPDATE", "ACCOUNT_UPDATE"): yield frame


def moments_between(folder):
    "Stops that were taken back, and those of them behind which no other of their kind stood while something was held"
    held, standing, replaced, naked = {}, {}, [], []
    for frame in frames_of(folder):
        if frame["e"] == "ACCOUNT_UPDATE": held |= {row["s"]: float(row["pa"]) for row in frame["a"]["P"]}
        else:
            order = frame["o"]
            if order["X"] == "NEW": standing[order["caid"]] = order
            else: standing.pop(order["caid"], None)
            if order["X"] != "CANCELED" or not held.get(order["s"]): continue
            replaced.append(order["caid"])
            if not any(all(each[name] == order[name] for name in "osS") for each in standing.values()):
                naked.append(order["caid"])
    return replaced, naked


def signed(exchange, method, path, **asked):
    "A request as the exchange's own web page would make it"
    query = urlencode(asked | {"timestamp": int(time.time() * 1000)})
    url = f"{exchange.url}/fapi/{path}?{query}&signature={signature('localnet-secret', query)}"
    return urlopen(Request(url, method=method, headers={"X-MBX-APIKEY": "localnet-key"}), timeout=10).read()


def standing(exchange):
    "The stops and targets that wait at the exchange"
    kept = exchange.exchange.conditional
    return list(kept.of(exchange.exchange.accounts["main"]).open.values()) if kept else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with localnet() as exchange:
        live = session(exchange, folder)
        run(live, 200)
    return folder, live


def test_stops_trade_at_localnet_as_in_the_simulation(whole):
    _, live = whole
    candles = market()[BITCOIN]
    expected = backtest(POLICY, candles, candles.index[HISTORY], limits=STOPPED, funding=funding(candles, seed=0),
                        execution=Execution(protect=True), baselines=(), instruments=[LISTED])
    assert expected.fills["protects"].sum() > 10
    assert first_difference(expected.journal[:200], live.ledger.journal("protected")) is None


def test_a_stop_is_replaced_without_a_moment_between(whole):
    replaced, naked = moments_between(whole[0])
    assert len(replaced) > 20
    assert naked == []


def test_what_stands_when_a_session_ends_is_said_and_found_again(tmp_path):
    "A stop that no close moves: a session that is resumed keeps it under its name"
    with localnet() as exchange:
        live = session(exchange, tmp_path, limits=WIDE, policy=HOLDING)
        run(live, 5)
        first, = standing(exchange)
        said = live.ledger.notices("protected")
        assert list(said["kind"]) == ["kept", "resting"]
        said = said[said["kind"] == "resting"]
        assert "protects the position while nobody watches" in said["text"].iloc[0]
        run(session(exchange, tmp_path, limits=WIDE, policy=HOLDING, id="", resume="protected"), 5)
        assert standing(exchange) == [first]
        assert len(exchange.exchange.conditional.of(exchange.exchange.accounts["main"]).orders) == 1


# --- what breaks

STOP = {"at": "request", "method": "POST", "path": "v1/algoOrder"}
UNSAID = {"status": 408, "code": -1007, "msg": "Timeout waiting for response from backend server."}
FULL = {"status": 400, "code": -4045, "msg": "Reach max stop order limit."}
WAITS = {"absent_after": 500, "first_delay": 50, "quiet": 300, "stop_patience": 300, "stop_deadline": 600}
FOUND = {  # faults after which it trades as if nothing had been
    "accepted, and not said": [STOP | {"do": "reply", "commit": True} | UNSAID],
    "half the answer is lost": [STOP | {"do": "drop", "commit": True}],
    "overloaded": [STOP | {"do": "reply", "commit": False, "status": 503, "code": -1008, "msg": "Busy", "times": 2}],
    "the stream says nothing of it": [{"at": "user", "do": "lose", "event": "ALGO_UPDATE", "times": 6}],
    "the user stream is cut": [{"at": "server", "do": "close", "route": "private", "code": 1006}],
}

MISSED = {  # faults after which there was no stop for some candles
    "never accepted, and not said": [STOP | {"do": "reply", "commit": False} | UNSAID],
    "unavailable": [STOP | {"do": "reply", "commit": False, "status": 503, "text": "<html>503</html>"}],
}


def through(rules, folder, candles=60, after=3, length=260, **options):
    "A session through a fault: the exchange, the session, and its notices by kind"
    with localnet(candles=length) as exchange:
        exchange.faults.arm([each | {"after": after} for each in rules])
        live = session(exchange, folder, patience=5., waits=WAITS | options.pop("waits", {}), **options)
        run(live, candles)
        assert exchange.faults.log, "the fault was not met"
        held = exchange.exchange.accounts["main"].held(0)
        assert held == pytest.approx(live.trader.positions["quantity"][0])
        stops = [each for each in standing(exchange) if each.kind == "STOP_MARKET"]
        assert bool(held) == bool(stops)
        assert all(each.sign * held < 0. for each in stops)
    return exchange, live, Counter(live.ledger.notices("protected")["kind"])


@pytest.mark.parametrize("name", FOUND)
def test_a_stop_stands_after_each_fault(whole, tmp_path, name):
    _, live, _ = through(FOUND[name], tmp_path)
    assert first_difference(whole[1].ledger.journal("protected")[:60], live.ledger.journal("protected")) is None
    assert moments_between(tmp_path)[1] == []


@pytest.mark.parametrize("name", MISSED)
def test_a_stop_that_never_arrived_is_put_up_again(tmp_path, name):
    _, live, _ = through(MISSED[name], tmp_path, 200, policy=HOLDING, limits=WIDE, after=0)
    states = [each.state.name for each in live.ledger.intents("protected") if protects(each.order)]
    assert states == ["ABSENT", "WORKING"]


def test_a_stop_whose_fill_is_lost_is_booked_late(tmp_path):
    events = ["ALGO_UPDATE", "ORDER_TRADE_UPDATE", "ACCOUNT_UPDATE"]
    _, live, _ = through([{"at": "user", "do": "lose", "event": events, "times": 12}], tmp_path)
    assert live.ledger.journal("protected")["late"].sum() > 0.
    assert [each for each in live.ledger.intents("protected") if each.works and not protects(each.order)] == []


def test_a_stop_that_somebody_takes_back_is_put_up_again(tmp_path):
    "Over REST, as a person would: nobody tells the session"
    def by_hand(statistics):
        if statistics.candles == 5: signed(exchange, "DELETE", "v1/algoOpenOrders", symbol="BTCUSDT")
    with localnet() as exchange:
        exchange.faults.arm([{"at": "user", "do": "lose", "event": "ALGO_UPDATE", "after": 1, "times": 1}])
        live = session(exchange, tmp_path, policy=HOLDING, limits=WIDE, progress=by_hand)
        run(live, 10)
        placed = exchange.exchange.conditional.of(exchange.exchange.accounts["main"]).orders.values()
        assert [each.status for each in placed] == ["CANCELED", "NEW"]
    stops = [each for each in live.ledger.intents("protected") if protects(each.order)]
    assert [each.state.name for each in stops] == ["CANCELED", "WORKING"]


def test_a_stop_without_a_position_is_taken_back_though_the_symbol_waits_for_a_person(tmp_path):
    with localnet(profile="book") as exchange:
        exchange.faults.arm("orphaned_stop", after=5)
        live = session(exchange, tmp_path, policy=HOLDING, limits=WIDE)
        run(live, 12)
        assert exchange.exchange.accounts["main"].held(0) == 0.
        assert standing(exchange) == []
    said = live.ledger.notices("protected")
    assert "foreign" in set(said["kind"])
    assert any("is gone, it is taken back" in text for text in said["text"])


def test_a_refused_stop_restricts_its_symbol_until_one_stands(tmp_path):
    _, live, notices = through([STOP | {"do": "reply", "commit": False, "times": 3} | FULL], tmp_path, 200, 0,
                               policy=HOLDING, limits=WIDE)
    said = live.ledger.notices("protected")
    moves = list(said["text"][said["kind"] == "ladder"])
    assert notices["rejected"] == 3
    assert "no_stop tripped" in moves[0]
    assert "Reach max stop order limit" in moves[0]
    assert "no_stop restarted" in moves[-1]


def test_a_stop_of_which_nothing_comes_is_not_waited_for(tmp_path):
    "TRIGGERING for ever: the position is closed at the market"
    _, live, notices = through([{"at": "step", "do": "stick"}], tmp_path, 200, 5, policy=HOLDING, limits=WIDE)
    intents = live.ledger.intents("protected")
    stuck, = [each for each in intents if each.message == "it triggered, and no order came of it"]
    closed = [each for each in intents if protects(each.order) and each.order.kind is Kind.MARKET]
    assert stuck.state is State.EXPIRED
    assert notices["stop"]
    assert {each.state for each in closed} == {State.FILLED}


def test_beside_what_a_person_ignored_a_stop_is_for_what_the_exchange_holds_and_that_is_said_once(tmp_path):
    with localnet() as exchange:
        exchange.faults.arm([{"at": "step", "do": "trade", "side": "SELL", "quantity": .01, "client_id": "web_",
                              "after": 4}])
        live = session(exchange, tmp_path, policy=HOLDING, limits=WIDE, patience=2., waits=WAITS)

        def ignore(line):
            if not line.startswith("foreign:"): return
            live.venue.events.put_nowait(Command(1, "ignore", BITCOIN, "an example", "Ada"))
        live.say = ignore
        run(live, 12)
        held = exchange.exchange.accounts["main"].held(0)
        assert held == pytest.approx(live.trader.positions["quantity"][0] - .01)
        assert [each.quantity for each in standing(exchange)] == [pytest.approx(held)]
    said = live.ledger.notices("protected")
    told, = said["text"][said["kind"] == "ladder"]
    assert "is held without its stop, beside -0.01 that was ignored: the exchange holds" in told
    assert "rejected" not in set(said["kind"])
    answered = said["text"][said["kind"] == "command"].iloc[0]
    assert answered.endswith("is ours, and no stop or close of ours is for more than that")
