"A recording that was changed in any way is never taken for what a session wrote"
import io
import json
import os
import random
import shutil
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tradelab.account import wallet
from tradelab.compiled import compiled
from tradelab.evaluation.difference import first_difference
from tradelab.events import Candles, Depth, Fill, Quote, Timer, Trade
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN, Instrument
from tradelab.journal import EQUITY, JOURNAL
from tradelab.live.core import Terms
from tradelab.live.messages import (
    Amend,
    Answered,
    Cancel,
    Decided,
    Event,
    Fetch,
    Fetched,
    Intents,
    Open,
    Opened,
    Received,
    Send,
    Step,
    Stop,
    Wake,
    Write,
)
from tradelab.live.order_states import State
from tradelab.live.recorder import (
    FORMAT,
    MemoryRecorder,
    Recorder,
    Recording,
    RecordingError,
    chained,
    decode,
    encode,
    framed,
    read,
    recorded_settings,
)
from tradelab.live.replay import SEEN, replay, unproven
from tradelab.live.session import CoreInputs, Statistics, Stopwatch, carry_out, keep, make_core
from tradelab.live.venue import AccountSnapshot, Answer, Candle, OrderReport, Outcome, VenueError
from tradelab.market.candles import matrix
from tradelab.market.synthetic import random_walk
from tradelab.notices import NOTICES, Notice
from tradelab.orders import LIMIT, OWN, Order
from tradelab.policies import Policy, buy_and_hold
from tradelab.risk.execution import OrderGate
from tradelab.settings import Limits
from tradelab.sim.backtest import backtest
from tradelab.trader import Trader

SETTINGS = dict(policy="buy and hold", origin="tradelab.policies:buy_and_hold", venue="localnet", timeframe="1h",
                version="0.1.0", symbols=["BTC/USDT:USDT"], instruments=[], limits={}, execution={}, deposit=10_000.)


def trader(): return Trader(buy_and_hold(), Observation(("return(1)",)), OrderGate, instruments=(BITCOIN,))


class ByHand:
    "An exchange that fills every order at once, and says of the account what the trader expects"

    def __init__(self, times, candles, step=3_600_000, recorder=None):
        self.times, self.candles, self.step = times, candles, step
        self.recorder = recorder or MemoryRecorder()
        self.fills = 0

    def candle(self, t, n): return [*self.candles[t, n, :8].tolist(), *[0.] * (8 - self.candles.shape[2])]

    def fetched(self, what, arguments, now):
        match what:
            case "account":
                held = dict(zip(self.core.trader.symbols, self.core.trader.positions["quantity"].tolist()))
                return AccountSnapshot(float(wallet(self.core.trader.account)), {s: q for s, q in held.items() if q})
            case "history":
                symbol, _, limit, since = arguments
                rows = np.flatnonzero((self.times + self.step <= now) & (self.times >= (since or 0)))[-limit:]
                n = self.core.trader.seen.index(symbol)
                return self.times[rows], np.array([self.candle(t, n) for t in rows])
            case "forming": return int(now) // self.step * self.step
        return []

    def told(self, action, now):
        "What the exchange tells about it"
        match action:
            case Open(): return [Opened("market"), Opened("user")]
            case Fetch(number, what, arguments): return [Fetched(number, self.fetched(what, arguments, now))]
            case Send(order):
                self.fills += 1
                report = OrderReport(order.order_id, State.FILLED, abs(order.quantity), str(self.fills))
                return [Fill(order.symbol, order.quantity, order.decision_price, 1.25, now, order.order_id,
                             str(self.fills)), Answered(action, Answer(Outcome.ACCEPTED, report))]
        return []

    def tell(self, now, events):
        "Tell the core, and all that follows; returns its actions"
        done = []
        while True:
            received = Received(int(now), events)
            self.recorder.received(received)
            actions = self.core.on(received)
            self.recorder.answered(actions)
            done += actions
            events = [event for action in actions for event in self.told(action, int(now))]
            if not events: return done

    def start(self, trader, terms, now, events=()):
        inputs = CoreInputs(terms)
        self.core = make_core(trader, inputs)
        self.recorder.start(SETTINGS, encode(inputs))
        self.tell(now, list(events))

    def close(self, t):
        "The candles of one close"
        return self.tell(self.times[t] + self.step, [Candle(symbol, int(self.times[t]), tuple(self.candle(t, n)))
                                                     for n, symbol in enumerate(self.core.trader.seen)])

    def trade(self, trader, terms, rows):
        "A session of these candles"
        self.start(trader, terms, self.times[rows[0]])
        for t in rows: self.close(t)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    "A recording of forty decisions, and what the ledger would hold of them"
    times, candles, symbols = matrix({"BTC/USDT:USDT": random_walk(52, seed=1)})
    path = tmp_path_factory.mktemp("session") / "recording.zst"
    recorder = Recorder(path)
    exchange = ByHand(times, candles, recorder=recorder)
    exchange.start(trader(), Terms("demo", "1h"), times[10])
    rows = []
    for t in range(10, 50):
        recorder.frame("market", {"e": "kline", "k": {"t": int(times[t]), "c": str(candles[t, 0, 3])}})
        decided, = [action for action in exchange.close(t) if isinstance(action, Decided)]
        recorder.flush()
        rows.append({"open_time": pd.Timestamp(times[t], unit="ms", tz="UTC"), "symbol": symbols[0]}
                    | {name: decided.rows[name][0] for name in SEEN})
    recorder.close()
    journal = pd.DataFrame(rows).set_index("open_time")
    journal.index = pd.DatetimeIndex(journal.index.astype("datetime64[ms, UTC]"), name="open_time")
    return path, journal


def verdict(path, journal, live):
    "What the replay job concludes: empty where it would say `no difference`"
    try:
        recording = Recording(path)
        recorded_settings(path)
        recorded, recomputed = replay(recording, live)
        return str(first_difference(recorded, recomputed) or "") or unproven(recording, recorded, journal)
    except ValueError as error: return str(error)


def test_what_was_written_is_proven(session):
    path, journal = session
    recording = Recording(path)
    kinds = [line["kind"] for line in recording]
    assert kinds[:3] == ["recording", "start", "received"]
    assert kinds[-1] == "end"
    assert recording.ended
    assert recording.decisions == 40
    assert recording.proven == path.stat().st_size
    assert verdict(path, journal, trader()) == ""
    # any zstd tool reads it
    assert b'"kind": "end", "lines": ' in zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes()),
        read_across_frames=True).read()


def damaged(content, how, chance):
    "The bytes of a recording after one thing that disks, copies and editors do"
    at = chance.randrange(len(content))
    other = chance.randrange(len(content))
    match how:
        case "bit": return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1:]
        case "cut": return content[:at]
        case "zeros": return content[:at] + bytes(min(512, len(content) - at)) + content[at + 512:]
        case "moved":
            return content[:min(at, other)] + content[max(at, other):] + content[min(at, other):max(at, other)]
        case "doubled": return content[:at] + content[min(at, other):max(at, other)] + content[at:]
    lines = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content),
                                                       read_across_frames=True).read().splitlines(keepends=True)
    a, b = sorted(chance.sample(range(len(lines)), 2))
    match how.split()[0]:
        case "drop": del lines[a:b]
        case "repeat": lines.insert(b, lines[a])
        case "swap": lines[a], lines[b] = lines[b], lines[a]
        case "end": lines = lines[:b]
        case "edit":
            lines[b] = (lines[b][:20] + lines[b][20:-48].translate(bytes.maketrans(b"123456789", b"234567891"))
                        + lines[b][-48:])
    return framed(b"".join(lines), b"")[0] if how.endswith("framed") else zstandard.compress(b"".join(lines))


HOW = ["bit", "cut", "zeros", "moved", "doubled", *(f"{what} {form}" for what in ("drop", "repeat", "swap", "edit")
                                                    for form in ("framed", "plain")), "end plain"]


@pytest.mark.parametrize("how", HOW)
def test_no_damage_passes(session, tmp_path, how):
    path, journal = session
    content = path.read_bytes()
    chance = random.Random(how)
    live = trader()
    file = tmp_path / "recording.zst"
    for _ in range(12):
        changed = damaged(content, how, chance)
        if changed == content: continue
        file.write_bytes(changed)
        assert verdict(file, journal, live), how


def test_a_recording_that_ends_early_is_counted_by_the_ledger(session, tmp_path):
    "Whole frames, a true chain, and 28 decisions too few: only the ledger can know"
    path, journal = session
    recorder = Recorder(tmp_path / "recording.zst")
    for line in list(read(path))[:-1]:
        if any(event.get("open_time") == int(journal.index[12].timestamp() * 1000) for event in line.get("events", ())):
            break
        if line["kind"] != "recording": recorder.line(**line)
    recorder.close()
    assert verdict(tmp_path / "recording.zst", journal, trader()).startswith("28 of 40 decisions of the ledger cannot "
        "be read in the recording, the first is that of ")
    assert verdict(tmp_path / "recording.zst", journal[:12], trader()) == ""


def test_damage_in_the_middle_is_counted_and_put_aside(session, tmp_path):
    path, journal = session
    file = tmp_path / "recording.zst"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    said = verdict(file, journal, trader())
    number = int(said.split(" of 40 decisions of the ledger cannot be read")[0])
    recording = Recording(file)
    lines = list(recording)
    assert number == 40 - recording.decisions > 5
    assert "bytes behind them are not" in said
    recorder = Recorder(file)
    recorder.close()
    assert (tmp_path / "recording.damaged-1.zst").read_bytes() == content
    assert "the damaged file is kept whole in recording.damaged-1.zst" in recorder.mended
    after = list(read(file))
    assert [line["kind"] for line in after[-2:]] == ["mended", "end"]
    assert after[:-2] == lines[:len(after) - 2]
    assert verdict(file, journal, trader()).startswith(f"{number} of 40 decisions")
    content[-9] ^= 4
    shutil.copy(path, file)
    file.write_bytes(content)
    Recorder(file).close()
    assert (tmp_path / "recording.damaged-2.zst").read_bytes() == content


@given(content=st.binary(max_size=400), head=st.booleans(), link=st.booleans())
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
def test_any_bytes_are_refused_in_our_words(tmp_path_factory, content, head, link):
    file = tmp_path_factory.getbasetemp() / "any.zst"
    if link: content = chained({"kind": "recording", "format": content.hex()}, 0, FORMAT)
    file.write_bytes(framed(content, b"")[0] if head else content)
    if not file.stat().st_size: return
    with pytest.raises(RecordingError): list(read(file))
    with pytest.raises(RecordingError): recorded_settings(file)


VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=5),
                                st.sampled_from(["<f8", "|O", "BTC/USDT:USDT"])),
                                lambda inner: st.one_of(st.lists(inner, max_size=3),
                                                        st.dictionaries(st.text(max_size=4), inner, max_size=3)),
                                                        max_leaves=5)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_any_line_that_is_proven_is_replayed_or_refused(session, data):
    "A chain can be true and its lines those of another program"
    lines = list(read(session[0]))[:30]
    number = data.draw(st.integers(1, len(lines) - 1))
    lines[number] = here = json.loads(json.dumps(lines[number]))
    key = data.draw(st.sampled_from(sorted(set(here) - {"kind"})))
    while isinstance(here[key], dict | list) and here[key] and data.draw(st.booleans()):
        here = here[key]
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
    here[key] = data.draw(VALUES)
    try: replay(lines, trader())
    except ValueError as error: assert str(error)


def values_of(kind):
    "Values of a declared type, by the declaration alone"
    inner = get_args(kind)
    if kind is Notice: return st.builds(Notice, st.sampled_from(sorted(NOTICES)), st.text())
    if is_dataclass(kind):
        types = get_type_hints(kind)
        return st.builds(kind, **{each.name: values_of(types[each.name]) for each in fields(kind)})
    if kind is np.ndarray: return st.lists(st.floats(), max_size=3).map(np.array)
    if kind is Exception: return st.builds(VenueError, st.text())
    if kind is float: return st.floats(allow_nan=False, allow_infinity=False)
    if kind is int: return st.integers(1 - 2**62, 2**62 - 1)
    if get_origin(kind) in (Union, UnionType): return st.one_of(*map(values_of, inner))
    if get_origin(kind) is list: return st.lists(values_of(inner[0]), max_size=3)
    if get_origin(kind) is dict: return st.dictionaries(values_of(inner[0]), values_of(inner[1]), max_size=3)
    if inner and inner[-1] is ...: return st.lists(values_of(inner[0]), max_size=3).map(tuple)
    if inner: return st.tuples(*map(values_of, inner))
    return st.from_type(kind)


@pytest.mark.parametrize("kind", get_args(Event))
@settings(max_examples=30)
@given(data=st.data())
def test_every_event_comes_back_as_it_was(kind, data):
    event = data.draw(values_of(kind))
    assert repr(decode(json.loads(json.dumps(encode(event))), Event)) == repr(event)


@pytest.mark.parametrize("place, value, message", [
    ((), 7, "events is '7'"), ((), {"type": "Record"}, r"events is .\{'type': 'Record'\}"),
    (("price",), "20000", "Fill.price is '20000'"), (("price",), float("nan"), "Fill.price is 'nan'"),
    (("fill_time",), 7., "Fill.fill_time is '7.0'"), (("fill_time",), True, "Fill.fill_time is 'True'"),
    (("fill_time",), 2**70, "Fill.fill_time is '1180591620717411303424'"),
    (("protects",), 0, "Fill.protects is '0'"), (("price",), None, "Fill.price is 'None'"),
    (("more",), 1, "Fill has .*commission, more, not symbol, quantity, price, fee, fill_time, .*commission$")])
def test_a_wrong_event_is_named_by_its_line_and_field(place, value, message):
    inputs = encode(CoreInputs(Terms("demo", "1h")))
    event = encode(Fill("BTC/USDT:USDT", .5, 20_000., 4., 7))
    event = event | {place[0]: value} if place else value
    lines = [{"kind": "start", "core": inputs}, {"kind": "received", "time": 7, "events": [event]}]
    with pytest.raises(RecordingError, match=f"line 1 of the recording, 'received', cannot be replayed: .*{message}"):
        replay(lines, trader())
    lines[1] = {"kind": "received", "time": "now", "events": []}
    with pytest.raises(RecordingError, match="line 1 .*: TypeError time is 'now'"): replay(lines, trader())
    lines[0]["core"]["terms"]["patience"] = "long"
    with pytest.raises(RecordingError, match="line 0 of the recording, 'start', cannot be replayed: TypeError "
                                             "CoreInputs.Terms.patience is 'long'"): replay(lines, trader())


def test_a_bomb_is_not_unpacked(tmp_path):
    file = tmp_path / "recording.zst"
    file.write_bytes(framed(bytes(400_000_000), b"")[0])
    assert file.stat().st_size < 100_000
    with pytest.raises(RecordingError, match="a frame does not hold whole lines"): list(read(file))
    deep = b'{"n": 0, "kind": ' + b"[" * 100_000 + b', "link": "' + b"0" * 32 + b'"}\n'
    file.write_bytes(framed(deep, b"")[0])
    with pytest.raises(RecordingError): list(read(file))


def test_numbers_keep_their_bits(tmp_path):
    recorder = Recorder(tmp_path / "recording.zst")
    values = [1 / 3, -0., 5e-324, float(np.nextafter(1, 2)), float("inf")]
    recorder.line("number", values=values)
    recorder.close()
    assert np.array(list(read(tmp_path / "recording.zst"))[1]["values"]).tobytes() == np.array(values).tobytes()


def test_what_the_ledger_will_say_is_on_the_disk_first(tmp_path, monkeypatch):
    """A power cut leaves what was synced: a decision is flushed before its order, and synced once before its step is
    kept"""
    synced, size = [], lambda file: os.fstat(file).st_size
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(size(file)))
    recorder = Recorder(tmp_path / "recording.zst")
    recorder.line("decision", open_time=1)
    recorder.flush()
    assert synced == []
    assert (tmp_path / "recording.zst").stat().st_size > 0
    recorder.sync()
    recorder.sync()                                                     # nothing new: nothing is asked of the disk
    assert synced == [(tmp_path / "recording.zst").stat().st_size]
    recorder.line("fill")
    recorder.flush()
    recorder.sync()
    recorder.close()
    assert len(synced) == 3
    assert synced[-1] == (tmp_path / "recording.zst").stat().st_size


def test_what_was_told_and_answered_is_in_the_file_before_anything_is_done(tmp_path):
    path = tmp_path / "recording.zst"
    recorder = Recorder(path)
    order = Order("tl-1", "BTC/USDT:USDT", .5, False, 0, 20_000.)
    def kinds(): return [line["kind"] for line in read(path)] if path.stat().st_size else []
    recorder.received(Received(7, (Stop(),)))
    recorder.answered([Wake(9), Fetch(1, "account")])
    assert kinds() == []                                                # a question changes nothing
    for action in (Send(order), Amend(order, 0.), Cancel(order)):
        recorder.received(Received(8, ()))
        recorder.answered([action])
        assert kinds()[-3:] == ["received", "answered", "request"]
    recorder.received(Received(9, ()))
    recorder.answered([Write(Intents((order,)))])
    assert kinds()[-2:] == ["received", "answered"]


def test_a_session_syncs_its_recording_before_it_keeps_a_step():
    order = []
    def noting(name): return lambda *_: order.append(name)
    files = SimpleNamespace(recorder=SimpleNamespace(sync=noting("sync")),
                            journal=SimpleNamespace(write=noting("write")),
                            equity=SimpleNamespace(write=noting("equity")))
    live = SimpleNamespace(id="s", files=files, statistics=Statistics(), stopwatch=Stopwatch(Statistics()), lease=None,
                           ledger=SimpleNamespace(step=noting("step"), transaction=lambda *_: nullcontext(True)))
    step = Step(("BTC/USDT:USDT",), np.zeros(1, JOURNAL), {}, 0, np.zeros(1, EQUITY))
    keep(live, [step])
    carry_out(live, Write(step))
    assert order == ["sync", "step", "write", "equity"]


@compiled
def _around_the_middle(parameters, memory, observation, prices, orders):
    "A bid and an ask at a distance from the middle, moved when it has moved by half of that"
    for n in range(len(prices)):
        if abs(prices[n] - memory[n]) < .5 * parameters[0] * memory[n]: continue
        memory[n] = prices[n]
        for k, side in ((0, 1.), (1, -1.)):
            orders[n, k]["kind"] = LIMIT
            orders[n, k]["exposure"] = .5 * side
            orders[n, k]["price"] = prices[n] * (1. - side * parameters[0])
            orders[n, k]["expires_in"] = np.inf


def quotes_of(shared):
    "Best bids and asks of four perpetuals as Binance sent them on 22 July 2021"
    lines = (shared / "fixtures/binance/cryptofeed_real_2021-07/ws.jsonl").read_text().splitlines()
    for data in (json.loads(line)["data"] for line in lines if "@bookTicker" in line):
        yield Quote(f"{data['s'].removesuffix('USDT')}/USDT:USDT", float(data["b"]), float(data["a"]), float(data["B"]),
                    float(data["A"]), data["T"])


def quoting(symbols, edge=.0005):
    policy = Policy("quotes", _around_the_middle, np.array([edge]), order_slots=2, memory=len(symbols), clock="book")
    return Trader(policy, Observation(()), OrderGate, Limits(max_position=.1),
                  tuple(Instrument(symbol, 1e-5, 1.) for symbol in symbols))


def test_a_policy_that_quotes_decides_again_on_recorded_quotes(shared):
    heard = sorted(quotes_of(shared), key=lambda quote: quote.quote_time)
    symbols = tuple(sorted({quote.symbol for quote in heard}))
    first = {symbol: next(quote.bid for quote in heard if quote.symbol == symbol) for symbol in symbols}
    closed = np.array([[first[symbol]] * 4 + [1e6] for symbol in symbols])
    live = quoting(symbols)
    opened = heard[0].quote_time // 60_000 * 60_000 - 60_000 * np.arange(live.warm_up + 1, 0, -1)
    exchange = ByHand(opened, np.array([closed] * len(opened)), 60_000)
    exchange.start(live, Terms("quotes", "1m"), heard[0].quote_time)
    for quote in heard:
        decided, = [action for action in exchange.tell(quote.quote_time, [quote]) if isinstance(action, Decided)]
        decision = decided.decision
        for n, symbol in enumerate(symbols):
            bid, ask = decision.orders[n, OWN], decision.orders[n, OWN + 1]
            middle = live.view.middles[n] if np.isfinite(live.view.middles[n]) else first[symbol]
            assert bid["price"] < middle < ask["price"]
            assert abs(.5 * (bid["price"] + ask["price"]) / middle - 1) < .0005 # never further from it than it moves
            assert bid["quantity"] > 0 > ask["quantity"]
    assert exchange.fills == 0 # what is decided between two closes is not sent yet
    exchange.tell(quote.quote_time, [Depth(symbols[0], ((1., 2.),), ((1.1, 2.),), quote.quote_time),
                                     Trade(symbols[0], -1., 1., quote.quote_time), Timer(quote.quote_time)])
    recorded, recomputed = replay(exchange.recorder.lines, quoting(symbols))
    assert len(recorded.index.unique()) > 400
    assert first_difference(recorded, recomputed) is None
    _, other = replay(exchange.recorder.lines, quoting(symbols, edge=.01))
    assert first_difference(recorded, other) is not None
    revisions = decision.orders["revision"][:, OWN]
    assert (revisions < len(heard) / 4).all() # left alone where the middle stayed
    assert (revisions > 1).any()


def test_a_market_event_out_of_order_is_refused():
    live = quoting(("BTC/USDT:USDT",))
    live.on(Candles(0, np.array([[100., 100., 100., 100., 5.]])))
    live.on(Quote("BTC/USDT:USDT", 99., 101., 1., 1., 60_000))
    before = live.snapshot()
    for wrong, message in ((Timer(59_999), "Timer.timer_time=59999. does not follow 60000"),
                           (Quote("BTC/USDT:USDT", 102., 101., 1., 1., 60_001), "its bid must be below its ask"),
                           (Quote("BTC/USDT:USDT", np.nan, 101., 1., 1., 60_001), "its bid must be below its ask")):
        with pytest.raises(ValueError, match=message): live.on(wrong)
    assert live.snapshot() == before


def test_candles_do_not_decide_for_another_clock():
    policy = replace(buy_and_hold(), clock=250)
    with pytest.raises(ValueError, match="buy and hold decides by the clock 250, and candles show their closes alone"):
        backtest(policy, random_walk(50, seed=1))
    live = Trader(policy, Observation(()), OrderGate, instruments=(BITCOIN,))
    assert live.on(Candles(0, np.array([[100., 100., 100., 100., 5.]]))) is None
    assert live.on(Quote("BTC/USDT:USDT", 99., 101., 1., 1., 60_000)) is None
    assert live.on(Timer(60_250)).open_time == 60_250
