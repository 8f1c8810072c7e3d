"A session goes on under other code only if its last decisions come out the same; otherwise nothing is sent or written"
import asyncio
import signal
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from test_disk import the_venue
from test_live import localnet, orders_at, session, start

from tradelab.compiled import compiled
from tradelab.features.observation import Observation
from tradelab.live import proof
from tradelab.live.ledger import Ledger
from tradelab.live.proof import prove
from tradelab.live.reconcile import StartRefusedError
from tradelab.live.recorder import Recording, chained, framed, read
from tradelab.live.session import Session
from tradelab.policies import Policy
from tradelab.risk.execution import OrderGate
from tradelab.settings import Execution, Limits
from tradelab.trader import Trader

NOT_SENT = "nothing was sent, what it holds stays, "


@compiled
def _follow(parameters, memory, observation, prices, targets):
    for n in range(len(targets)): targets[n] = min(max(parameters[0] * observation[n, 0], -1.), 1.)


class Sessions:
    "Sessions of one ledger and one exchange, each in a process of its own as far as they know"

    def __init__(self, folder):
        self.folder, self.venue, self.url = folder, the_venue(), f"sqlite:///{folder}/tradelab.db"
        self.asked = []
        connect = self.venue.connect

        async def noting(*arguments, **named):
            self.asked.append("connect")
            return await connect(*arguments, **named)
        self.venue.connect = noting

    @contextmanager
    def ledger(self):
        opened = Ledger(self.url)
        try: yield opened
        finally: opened.close()

    def run(self, candles, factor=20., execution=Execution(), window=1, **given):
        policy = Policy("follow", _follow, np.array([factor]), ("return(1)",), window)
        trader = Trader(policy, Observation.from_policy(policy), OrderGate, Limits(), self.venue.data.instruments,
                        execution=execution)
        given = dict(resume="one") | given
        with self.ledger() as ledger:
            live = Session(trader, self.venue, ledger, self.folder, timeframe="1h", say=lambda line: None,
                           **{"proof": prove} | given)
            asyncio.run(live.run(candles))
        return live

    def under(self, **code):
        "As if the last run had been under other code"
        with self.ledger() as ledger:
            known = ledger.session("one")["settings"]
            ledger.set_settings("one", code=known["code"] | code, version="0.0.9")

    def refused(self, why, **given):
        "It does not go on, asks the exchange nothing, and leaves everything as it was"
        self.asked.clear()
        before = self.contents()
        with pytest.raises(StartRefusedError, match=why) as told: self.run(5, **given)
        assert self.contents() == before
        assert self.asked == []
        return str(told.value)

    def contents(self):
        with self.ledger() as ledger: rows = ledger.intents("one"), ledger.session("one"), len(ledger.closes("one"))
        folder = self.folder / "one"
        return rows, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
                      and path.name != "lock"}


@pytest.fixture
def sessions(tmp_path):
    "A session that was stopped after two runs"
    made = Sessions(tmp_path)
    made.run(10, id="one", resume="")
    made.first = (tmp_path / "one" / "recording.zst").read_bytes()
    made.run(6)
    return made


@pytest.mark.parametrize("code", [{"tradelab": "0.0.9"}, {"sources": "0" * 16}, {"numpy": "1.26.4"},
                                  {"ta": "0.9"}, {"python": "3.9.0"}, {"a package": "that is gone"}])
def test_what_decides_alike_goes_on_and_it_is_written_down(sessions, code):
    sessions.under(**code)
    live = sessions.run(5)
    name, then = next(iter(code.items()))
    assert live.proven.startswith("the last 16 decisions come out the same under tradelab ")
    assert f"{name} {then} then, " in live.proven
    with sessions.ledger() as ledger:
        kept = ledger.notices("one")
        assert kept[kept["kind"] == "replayed"]["text"].tolist() == [live.proven]
        assert ledger.session("one")["settings"]["code"] == live.settings["code"]
        assert ledger.session("one")["settings"]["version"] == live.settings["version"]
        assert len(ledger.closes("one")) == 21
        assert ledger.check("one") == ""
    assert sessions.run(5).proven == ""       # the same code as the last run


def test_the_same_code_is_not_replayed(sessions, monkeypatch):
    monkeypatch.setattr(proof, "replay", None)
    assert sessions.run(5).proven == ""


def test_a_session_from_before_anybody_kept_the_code_is_replayed(sessions):
    with sessions.ledger() as ledger: ledger.set_settings("one", code={})
    assert "what it ran under is not known" in sessions.run(5).proven


def test_the_last_bit_of_a_policy_is_a_difference(sessions):
    said = sessions.refused("first difference at .* UTC, symbol 'BTC/USDT:USDT', column 'target': ",
                            factor=np.nextafter(20., 21.))
    assert said.startswith("session one would go on under other code (policy ")
    assert NOT_SENT + "without stops at the exchange, as execution.protect is false" in said
    assert "resume it under tradelab " in said
    assert sessions.run(5).proven == ""       # it still is what it was


def test_the_stops_of_what_it_holds_are_told(tmp_path):
    made, protected = Sessions(tmp_path), Execution(protect=True)
    made.run(10, id="one", resume="", execution=protected)
    said = made.refused("first difference", factor=19., execution=protected)
    assert NOT_SENT + "its stops stand at the exchange; resume it under" in said


def test_what_is_seen_otherwise_is_a_difference(sessions):
    "An observation of another width cannot be compared number by number"
    sessions.refused("cannot be replayed: .*|first difference", window=2)


def test_settings_that_are_others_are_said_first(sessions):
    sessions.under(numpy="1.0")
    sessions.refused("session one has execution .* not ", execution=Execution(style="slices"))


def test_without_a_proof_nobody_goes_on(sessions):
    sessions.under(numpy="1.0")
    sessions.refused("ran under other code .numpy 1.0 then, .* now., and nothing proves that this one decides alike",
                     proof=None)


@pytest.mark.parametrize("damage, why", [
    ("gone", "its decisions cannot be replayed: .*No such file"),
    ("empty", "the recording holds no decision"),
    ("cut", "[0-9]+ of 16 decisions of the ledger cannot be read in the recording, .*; .* bytes behind them are not"),
    ("flipped", "decisions of the ledger cannot be read in the recording|cannot be replayed"),
    ("older", "6 of 16 decisions of the ledger cannot be read in the recording, the first is that of ")])
def test_what_no_recording_proves_is_refused(sessions, damage, why):
    file = sessions.folder / "one" / "recording.zst"
    whole = bytearray(file.read_bytes())
    file.unlink()
    if damage == "empty": file.touch()
    if damage == "cut": file.write_bytes(whole[:len(whole) // 2])
    if damage == "flipped":
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole)
    if damage == "older": file.write_bytes(sessions.first)
    sessions.under(numpy="1.0")
    said = sessions.refused(why)
    assert "resume it under tradelab 0.0.9 as it was, or close what it holds and start a new session" in said


def test_a_torn_end_behind_the_last_decision_is_no_reason(sessions):
    "As a power cut leaves it: all that the ledger knows is on the disk before it"
    file = sessions.folder / "one" / "recording.zst"
    file.write_bytes(file.read_bytes() + b"\x5b\x2a\x4d\x18 torn")
    sessions.under(numpy="1.0")
    assert sessions.run(5).proven.startswith("the last 16 decisions come out the same")


def test_a_recording_that_tells_other_decisions_than_the_ledger_proves_nothing(sessions):
    "Rewritten from its first line on, so that each link is right"
    file = sessions.folder / "one" / "recording.zst"
    lines = list(read(file))
    told = next(line for line in lines if line["kind"] == "received" and any(
        event["type"] == "Candle" for event in line["events"]))
    candle = next(event for event in told["events"] if event["type"] == "Candle")
    candle["values"][3] = float(np.nextafter(candle["values"][3], 0.))
    recorder, link, text = Recording(file), Recording(file).link, b""
    for number, line in enumerate(lines):
        made = chained(line, number, link)
        link, text = made[-35:-3].decode(), text + made
    file.write_bytes(framed(text, recorder.seal)[0])
    sessions.under(numpy="1.0")
    sessions.refused("first difference at |is not what the ledger says")


def test_only_the_newest_decisions_are_made_again_from_the_run_that_has_them(sessions, monkeypatch):
    sessions.run(7)
    monkeypatch.setattr(proof, "NEWEST", 9)
    told = []
    def noting(lines, trader, since):
        recorded = replay(told.extend(lines) or told, trader, since)
        told.append(recorded[0].index.nunique())
        return recorded
    replay = proof.replay
    monkeypatch.setattr(proof, "replay", noting)
    sessions.under(numpy="1.0")
    assert sessions.run(5).proven.startswith("the last 9 decisions come out the same")
    *lines, count = told
    assert count == 9
    assert [line["kind"] for line in lines].count("start") == 2    # of three runs
    assert [line["kind"] for line in lines].count("decision") == 6 + 7


def test_a_session_that_is_stopped_while_it_is_replayed_starts_nothing(sessions):
    sessions.under(numpy="1.0")
    def stopping(session, changed):
        session._stopping = True
        return prove(session, changed)
    sessions.refused("the session was stopped before its decisions were proven", proof=stopping)


@pytest.mark.integration
def test_a_killed_session_goes_on_under_another_version_or_leaves_all_to_its_stops(tmp_path):
    "kill -9 behind the answer to its fifth order, over sockets"
    with localnet() as exchange:
        process = start(exchange, tmp_path, "after", 5)
        said = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, said
        ledger, placed = Ledger(f"sqlite:///{tmp_path}/tradelab.db"), orders_at(exchange)
        known = ledger.session("momentum_test")["settings"]
        ledger.set_settings("momentum_test", code=known["code"] | {"sources": "another version's"}, version="0.0.9")
        changed = session(exchange, tmp_path, id="", resume="momentum_test", proof=prove)
        other = replace(changed.trader.policy, parameters=changed.trader.policy.parameters * 10)
        changed.trader = Trader(other, Observation.from_policy(other), OrderGate, changed.trader.limits,
                                changed.trader.instruments)
        with pytest.raises(StartRefusedError, match="first difference at .*nothing was sent, what it holds stays"):
            asyncio.run(changed.run(5))
        assert orders_at(exchange) == placed
        live = session(exchange, tmp_path, id="", resume="momentum_test", proof=prove)
        asyncio.run(live.run(5))
        assert "sources another version's then" in live.proven
        assert set(orders_at(exchange).values()) == {1}
        assert live.statistics.disagreements == 0
    ledger.close()
