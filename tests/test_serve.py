"`tradelab serve` as a process beside sessions: nothing starts half, nothing of it is felt by those who trade"
import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from email import message_from_bytes
from email.policy import default
from pathlib import Path
from socket import SHUT_RDWR, SHUT_WR, create_connection, create_server, socket

import pytest
from aiosmtpd.controller import Controller
from servers import free_port, get, redis, until, webhook
from telegram_double import TOKEN, telegram_double
from test_live import localnet, orders_at, session

from tradelab.config import settings
from tradelab.database.operations import serving
from tradelab.database.reading import reading
from tradelab.database.records import Delivery, clock
from tradelab.database.rows import Database
from tradelab.database.schema import MEASURED
from tradelab.live.audit import faults
from tradelab.live.session import tell
from tradelab.notices import Notice
from tradelab.venues.binance import BinanceVenue

COMMAND = "from tradelab.command import main; main()"


class Served:
    "A process that serves the project in the current folder"

    def __init__(self, before="", out="serve.out", **variables): # before: what it does first, in Python
        self.port, self.file = variables["metrics_port"], Path(out)
        given = {f"TRADELAB_{name.upper()}": str(value) for name, value in variables.items()}
        self.out = self.file.open("w+")
        self.process = subprocess.Popen([sys.executable, "-c", before + COMMAND, "serve"], stdout=self.out,
                                        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                        env=os.environ | given | {"PYTHONUNBUFFERED": "1"})

    @property
    def said(self): return self.file.read_text()

    def begun(self):
        until(lambda: "is at work" in self.said or self.process.poll() is not None, 60.)
        assert self.process.poll() is None, self.said
        return self

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(30)


@contextmanager
def served(before="", out="serve.out", **variables):
    made = Served(before, out, metrics_port=free_port(), **variables)
    try: yield made.begun()
    finally:
        if made.process.poll() is None: made.process.kill()
        made.process.wait()
        made.out.close()


def refused(**variables):
    "What is said by one that does not start"
    given = {f"TRADELAB_{name.upper()}": str(value) for name, value in variables.items()}
    ran = subprocess.run([sys.executable, "-c", COMMAND, "serve"], capture_output=True, text=True, timeout=60,
                         stdin=subprocess.DEVNULL, env=os.environ | given)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "is at work" not in ran.stdout
    return ran.stderr


def test_it_waits_for_a_ledger_beats_and_ends_in_order(project):
    url = settings().database
    with served() as process:
        assert not Path("tradelab.db").exists()
        Database(url).close()
        until(lambda: serving(url, clock()))
        assert "tradelab serve is running already, in process" in refused()
        assert process.end() == 0
        assert process.said.endswith("tradelab serve has ended\n")
        assert not serving(url, clock())


def test_nothing_starts_where_a_setting_is_wrong(project):
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused(metrics_port=taken.getsockname()[1])
        assert said.startswith("Error: metrics_port: nobody can listen at 127.0.0.1:")
        assert said.count("\n") == 1


class Door:
    "A port in front of another one: open, shut, hanging (accepts and never answers) or slow"

    def __init__(self, behind):
        self.behind, self.manner, self.met, self._lines = behind, "open", 0, []
        self.port = free_port()
        self._listen()

    def _listen(self):
        self._server = create_server(("127.0.0.1", self.port), backlog=50, reuse_port=False)
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def _accept(self, server):
        while True:
            try: line, _ = server.accept()
            except OSError: return
            self.met += 1
            self._lines.append(line)
            if self.manner == "hanging": continue
            try: other = create_connection(("127.0.0.1", self.behind), 5)
            except OSError:
                line.close()
                continue
            self._lines.append(other)
            for a, b in ((line, other), (other, line)):
                threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, a, b):
        try:
            while data := a.recv(65_536):
                if self.manner == "slow": threading.Event().wait(.3)
                b.sendall(data)
            b.shutdown(SHUT_WR)
        except OSError: pass

    def be(self, manner):
        "Be like this from now on, also to those who are inside"
        was, self.manner, self.met = self.manner, manner, 0
        for line in self._lines:
            with suppress(OSError): line.shutdown(SHUT_RDWR)
            line.close()
        self._lines.clear()
        if manner == "shut":
            with suppress(OSError): self._server.shutdown(SHUT_RDWR)
            self._server.close()
        elif was == "shut": self._listen()

    def close(self): self.be("shut")


HOOK, MAIL = "Tk4planted-hook-0123", "Tk4planted-mail-0123"
QUICK = """
import tradelab.ops.channels as channels, tradelab.ops.line_protocol as line_protocol
channels.LONGEST = line_protocol.LONGEST = .5
channels.Outbox.__init__.__defaults__ = ("en", channels.MOST, .1)
channels.AppriseChannel.__init__.__defaults__ = (1.,)
line_protocol.LineSink.__init__.__defaults__ = (1., .1, line_protocol.MOST)
import tradelab.ops.sharing as sharing
sharing.PAUSES = .1, .5
"""


class Mailbox:
    def __init__(self): self.mails = []

    async def handle_DATA(self, server, session, envelope):
        mail = message_from_bytes(envelope.content, policy=default)
        self.mails.append(mail.get_body(("html", "plain")).get_content())
        return "250 taken"


@contextmanager
def mail_server():
    box, port = Mailbox(), free_port()
    server = Controller(box, hostname="127.0.0.1", port=port)
    server.start()
    box.port = port
    try: yield box
    finally: server.stop()


class Outside:
    "All that a process that serves leans on, each behind a door"
    def __init__(self, hook, mail, figures, telegram, shared):
        self.hook, self.mail, self.figures, self.telegram = hook, mail, figures, telegram
        ports = {"hook": hook.port, "mail": mail.port, "figures": figures.port,
                 "telegram": int(telegram.url.rpartition(":")[2]), "redis": shared.port}
        self.doors = {name: Door(port) for name, port in ports.items()}

    def settings(self):
        at = {name: f"127.0.0.1:{door.port}" for name, door in self.doors.items()}
        mail = f"mailto://{at['mail']}/?from=a@example.com&to={MAIL}@example.com&mode=insecure&smtp=127.0.0.1"
        return {"influx_url": f"http://{at['figures']}", "alert_url": f"json://{at['hook']}/{HOOK} {mail}",
                "telegram_api": f"http://{at['telegram']}", "telegram_token": TOKEN, "redis_url": f"redis://{at['redis']}"}

    def be(self, manner):
        for each in self.doors.values(): each.be(manner)

    def has_heard(self, words):
        return all(any(words in each for each in told) for told in (
            self.hook.bodies(), self.mail.mails, [each.text for each in self.telegram.sent]))


@contextmanager
def outside():
    with (webhook() as hook, mail_server() as mail, webhook(204) as figures, telegram_double() as telegram,
          redis() if shutil.which("redis-server") else webhook() as shared): # or what is there, and is none
        made = Outside(hook, mail, figures, telegram, shared)
        try: yield made
        finally: made.be("shut")


def run_alone(folder, candles):
    "Journal and orders of a session that nobody serves"
    with localnet() as exchange:
        live = session(exchange, folder, say=lambda line: None)
        asyncio.run(live.run(candles))
        return live.ledger.journal(live.id), orders_at(exchange)


MANNERS = {5: "open", 15: "shut", 25: "hanging", 35: "slow", 45: "open again"}


def bother(port):
    "Those who ask for figures and never read, or never finish asking"
    for words in (b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") * 5:
        line = create_connection(("127.0.0.1", port), 5)
        line.sendall(words)
        yield line


@pytest.mark.integration
def test_whatever_becomes_of_the_outside_a_session_trades_the_same_and_people_are_told(project):
    "Each of them is there, gone, hanging, slow and back while a session trades; it waits for the test alone"
    Path("tradelab.toml").write_text('[alerts]\nlevel = "info"\nminutes = 0.0001\n[telegram]\nadmins = [7]\n'
                                     '[telemetry]\ninterval = 0.2\n[monitor]\ninterval = 0.2\n')
    (project / "alone").mkdir()
    journal, orders = run_alone(project / "alone", 55)
    with outside() as world, localnet() as exchange, served(QUICK, **world.settings()) as process:
        steps, lines = {}, []

        def signs(manner):
            if manner == "open": until(lambda: world.has_heard("the outside is open"))
            elif manner == "shut": until(lambda: {"json", "mailto", "telegram"} <= failed())
            elif manner in ("hanging", "slow"): until(lambda: all(each.met for each in world.doors.values()))

        class Pausing(BinanceVenue):
            async def waits(self, open_time, trade=None):
                if (manner := MANNERS.get(steps.setdefault(open_time, len(steps)), "")) and manner not in met:
                    met.append(manner)
                    world.be(manner.removesuffix(" again"))
                    tell(live, Notice("halt", f"the outside is {manner}"))
                    if manner == "hanging": lines.extend(bother(process.port))
                    await asyncio.to_thread(signs, manner)
                await super().waits(open_time, trade)
        met: list[str] = []
        live = session(exchange, project, Pausing, say=lambda line: None)
        asyncio.run(live.run(55))
        assert met == [*MANNERS.values()]
        assert live.ledger.journal(live.id).equals(journal)
        assert orders_at(exchange) == orders
        until(lambda: all(world.has_heard(f"the outside is {manner}") for manner in MANNERS.values()), 60.)
        world.figures.heard.clear()
        until(lambda: world.figures.heard)
        if shutil.which("redis-server"): until(lambda: of_redis()[-1] == "Redis answers")
        assert "Redis is away" in of_redis()
        until(lambda: b"tradelab_ledger_up 1" in get(f"http://127.0.0.1:{process.port}/metrics"))
        for line in lines: line.close()
        assert process.end(signal.SIGINT) == 0
        assert "failed and is started again" not in process.said
    assert faults(settings().database) == []
    written = process.said + Path("logs/tradelab.jsonl").read_text()
    assert not [secret for secret in (HOOK, MAIL, TOKEN) if secret in written]


def of_redis():
    "What the log says of it"
    return re.findall("Redis answers|Redis is away", Path("logs/tradelab.jsonl").read_text())


def failed():
    "The channels that have not taken something"
    with reading(settings().database) as look: return {row["channel"] for row in look.rows(MEASURED[Delivery])
                                                       if not row["good"]}
