"One channel to a person who is away, over a server that answers, hangs, refuses, closes, is slow: no session minds"
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from unittest.mock import patch

import pytest
from pydantic import SecretStr
from test_live import localnet, session

from tradelab.config import AlertSettings, settings
from tradelab.database.records import Delivery
from tradelab.errors import ConfigurationError
from tradelab.live.alerts import Alerts, Sieve, Waiting, send
from tradelab.live.session import tell
from tradelab.notices import Notice
from tradelab.venues.binance import BinanceVenue

TOKEN = "Tk4planted-token-0123"
EVERYTHING = AlertSettings("info", 10_000.)


class Ear(BaseHTTPRequestHandler):
    "A service on this machine, as its server says"

    def do_POST(self):
        server = self.server
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.release()
        if server.manner == "hangs": return server.over.wait()
        if server.manner == "slow": server.over.wait(.4)
        if server.manner == "closes": return self.connection.shutdown(socket.SHUT_RDWR)
        if server.manner != "refuses": server.taken.append(said["message"])
        self.send_response(503 if server.manner == "refuses" else 200)
        self.end_headers()

    def log_message(self, *words): pass


@contextmanager
def service(manner="answers"):
    "Its address, and what it has taken"
    with ThreadingHTTPServer(("127.0.0.1", 0), Ear) as server:
        server.daemon_threads, server.manner, server.taken = True, manner, []
        server.asked, server.over = threading.Semaphore(0), threading.Event()
        server.url = f"json://127.0.0.1:{server.server_port}/{TOKEN}"
        serving = threading.Thread(target=server.serve_forever, args=(.05,), daemon=True)
        serving.start()
        try: yield server
        finally:
            server.over.set()
            server.shutdown()


def until(true):
    "Wait for a sign"
    for _ in range(1_000):
        if true(): return
        threading.Event().wait(.01)
    raise AssertionError("it does not come")


class Brief(Alerts):
    "With a short time at the end"
    def end(self, within=.3): return super().end(within)


def traded(folder, alerts=None, candles=12):
    "A session that has something to tell at each candle; it, and how long it took"
    with localnet() as exchange:
        live = session(exchange, folder, alerts=alerts, say=lambda line: None)
        def progress(done):
            for n in range(30): tell(live, Notice("rejected", f"order {n} of candle {done.candles}"))
            tell(live, Notice("halt", "abcdefghijkl"[done.candles % 12]))
        live.progress = progress
        began = monotonic()
        asyncio.run(live.run(candles))
        return live, monotonic() - began


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The same without alerts, once to compile and once to compare"
    traded(tmp_path_factory.mktemp("first"))
    return traded(tmp_path_factory.mktemp("alone"))


def alerts_of(live): return live.ledger.measured(live.id, Delivery)
def notices_of(live, kind):
    told = live.ledger.notices(live.id)
    return told["text"][told["kind"] == kind].tolist()


@pytest.mark.integration
@pytest.mark.parametrize("manner", ["answers", "hangs", "refuses", "closes", "slow", "nobody"])
def test_whatever_the_channel_does_the_session_is_the_same(manner, alone, tmp_path):
    with service(manner) as there:
        url = f"json://127.0.0.1:9/{TOKEN}" if manner == "nobody" else there.url
        limit = .2 if manner in ("hangs", "slow") else 10.
        live, took = traded(tmp_path, Brief(SecretStr(url), EVERYTHING, limit, pause=.05))
        other, alone_took = alone
        left, right = (each.ledger.journal(each.id) for each in (live, other))
        assert left.equals(right)
        assert took < alone_took + 3.
        kept, troubles = alerts_of(live), notices_of(live, "alerts")
        assert {each.channel for each in kept} == {"json"}
        assert TOKEN not in str(kept) + str(troubles)
        counted = Counter(each.text for each in kept)
        if manner == "answers":
            assert all(each.good for each in kept)
            assert troubles == []
            assert "".join(there.taken).count("rejected: order") == 2      # the first, and how many were like it
            assert "359 more like it" in "".join(there.taken)
        else:
            assert not any(each.good for each in kept) or manner == "slow"
            assert max(counted.values()) == 1                               # each line failed once
            assert troubles[0].startswith("json did not take an alert (")
            assert len(troubles) == 1
            why = {"hangs": "no answer within 0.2 s", "slow": "no answer within 0.2 s", "refuses": "error=503"}
            assert why.get(manner, "onnection") in troubles[0]


@pytest.mark.integration
def test_what_waited_goes_together_when_the_channel_is_back(tmp_path):
    "Thirteen lines in two messages, each of them in the ledger as failed and then as sent"
    with service("refuses") as there:
        kept, said = [], []
        alerts = Alerts(SecretStr(there.url), EVERYTHING, pause=.01)
        alerts.begin("tradelab", kept.append, said.append)
        for n in range(13): alerts.tell(Notice("halt", "abcdefghijklm"[n]))
        until(lambda: len(kept) == 10)
        there.manner = "answers"
        until(lambda: len([each for each in kept if each.good]) == 13)
        assert alerts.end() == 0
        assert [len(message.splitlines()) for message in there.taken] == [10, 3]
        assert len([each for each in kept if not each.good]) == 10
        assert [line.partition(" (")[0] for line in said] == ["json did not take an alert", "json takes alerts again"]


def test_what_cannot_wait_is_counted():
    waiting = Waiting(Sieve("error", 1_000))
    for n in range(250): waiting.put(Notice("halt", chr(97 + n % 26) * (1 + n // 26)))
    assert (len(waiting.lines), waiting.lost) == (100, 150)


def test_to_tell_something_costs_less_than_a_millisecond_while_the_channel_hangs():
    with service("hangs") as there:
        alerts = Brief(SecretStr(there.url), EVERYTHING)
        alerts.begin("tradelab", lambda alert: None, lambda text: None)
        alerts.tell(Notice("failed", "the first"))
        assert there.asked.acquire(timeout=10)
        began = monotonic()
        for n in range(1_000): alerts.tell(Notice("halt", str(n)))
        assert monotonic() - began < 1.
        assert alerts.end(within=.01) == 2


def test_no_secret_is_in_what_is_told_and_nothing_of_the_address_in_why_it_was_not():
    with service("refuses") as there:
        why = send(there.url, "tradelab", "an example")
        assert "error=503" in why and TOKEN not in why
    sieve = Sieve("info", 1)
    assert "hunter" not in sieve.take(Notice("failed", "https://x/?signature=hunter2hunter2&token=hunter3"), 0)


@pytest.mark.parametrize("url", [TOKEN, f"nonsense://{TOKEN}", f"tgram://{TOKEN}", f"slack://{TOKEN}", "http://", " "])
def test_a_wrong_address_is_refused_before_anything_starts_and_not_repeated(url, project):
    from tradelab.checks import check_job
    with patch.dict(os.environ, TRADELAB_ALERT_URL=url), pytest.raises(ConfigurationError) as refused:
        check_job(venue="localnet")
    assert TOKEN not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "alert_url is no address that apprise knows" in str(refused.value)


@pytest.mark.parametrize("text, sentence", [
    ('[alerts]\nlevel = "loud"', "alerts.level must be 'info', 'warning', 'error' or 'critical', was 'loud': change"),
    ("[alerts]\nminutes = 0", "alerts.minutes must be greater than 0, was 0: change it in tradelab.toml"),
    ("[alerts]\nminuets = 1", "did you mean alerts.minutes?"),
    (f'alert_url = ["{TOKEN}"]', "alert_url must be a valid string: change it in tradelab.toml")])
def test_a_wrong_setting_is_one_sentence(project, text, sentence):
    (project / "tradelab.toml").write_text(text)
    with pytest.raises(ConfigurationError) as refused: settings()
    assert sentence in str(refused.value)
    assert TOKEN not in str(refused.value)


@pytest.mark.integration
def test_a_start_that_is_refused_is_told(tmp_path):
    "No session, so nothing of it is in the ledger; the person hears it"
    with service() as there:
        with localnet() as exchange: pass # it is gone
        live = session(exchange, tmp_path, alerts=Alerts(SecretStr(there.url)), say=lambda line: None)
        with pytest.raises(Exception, match="gave no answer"): asyncio.run(live.run(3))
        assert len(there.taken) == 1
        assert "error, refused: VenueError" in there.taken[0]


class FailingVenue(BinanceVenue):
    async def waits(self, *words): raise ArithmeticError("a mistake in the program")


@pytest.mark.integration
def test_a_session_that_fails_says_so_last(tmp_path):
    with service() as there, localnet() as exchange:
        live = session(exchange, tmp_path, FailingVenue, alerts=Alerts(SecretStr(there.url)), say=lambda line: None)
        with pytest.raises(ArithmeticError): asyncio.run(live.run(5))
        assert "critical, failed: ArithmeticError: a mistake in the program" in there.taken[-1]
        assert alerts_of(live)[-1].good


def hanging(url, folder, address, begun):
    "A session in a process of its own, whose channel hangs"
    from types import SimpleNamespace
    live = session(SimpleNamespace(url=url), folder, alerts=Brief(SecretStr(address), EVERYTHING), say=print)
    def progress(done):
        tell(live, Notice("halt", "abcdefghijkl"[done.candles % 12]))
        if done.candles == 3: begun.set()
    live.progress = progress
    asyncio.run(live.run(8))


@pytest.mark.integration
@pytest.mark.parametrize("killed", [False, True])
def test_a_process_whose_channel_hangs_ends_when_its_session_does_and_one_that_is_killed_is_resumed(killed, tmp_path):
    context = multiprocessing.get_context("spawn")
    with (service("hangs") as there, localnet() as exchange,
          patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))):
        begun = context.Event()
        process = context.Process(target=hanging, args=(exchange.url, tmp_path, there.url, begun))
        process.start()
        assert begun.wait(120)
        if killed: os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == (-signal.SIGKILL if killed else 0)
        if not killed: return
        there.manner = "answers"
        again = session(exchange, tmp_path, id="", resume="momentum_test", say=lambda line: None,
                        alerts=Alerts(SecretStr(there.url), EVERYTHING))
        asyncio.run(again.run(2))
        assert again.statistics.candles == 2
        assert any(each.good for each in alerts_of(again))
