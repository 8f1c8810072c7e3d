"""The bot of Telegram against a Bot API of our own, over a socket: who may do what, how often, with which code; and
Telegram away, hanging, refusing. No test waits for a minute: the bot's clock is passed in"""
import asyncio
import json
import threading
import time
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from pydantic import SecretStr
from servers import until
from telegram_double import TOKEN, telegram_double

from tradelab.command import main
from tradelab.config import Settings, TelegramSettings
from tradelab.database.operations import Operations
from tradelab.database.reading import reading
from tradelab.database.records import Alert, Audited, Service, clock
from tradelab.database.schema import AUDIT, record_of
from tradelab.live.ledger import Ledger
from tradelab.lock import Lock
from tradelab.ops.channels import Message
from tradelab.ops.telegram import Codes, bot_for
from tradelab.watching import example_session

ADMIN, OTHER_ADMIN, VIEWER, STRANGER = 1, 2, 3, 9
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::telegram.warnings.PTBDeprecationWarning")]
PEOPLE = TelegramSettings(admins=(ADMIN, OTHER_ADMIN), viewers=(VIEWER,))


class World:
    "A bot in a thread of its own, its Telegram, its ledger, and a clock that is turned by hand"

    def __init__(self, double, database, sessions, **given):
        self.double, self.database, self.ahead, self.told = double, database, 0, []
        here = Settings(database=database, sessions=sessions, telegram_token=SecretStr(TOKEN), telegram=PEOPLE,
                        telegram_api=double.url, **given)
        self.bot = bot_for(here, hear=self.told.append, now=lambda: clock() + self.ahead, limit=.5, poll=1.,
                           patience=.3, pause=.02)
        self.bot.codes = Codes(lambda: "0042")
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.thread.start()

    async def _run(self):
        self.loop, self.task = asyncio.get_running_loop(), asyncio.ensure_future(self.bot.run())
        try: await self.task
        except asyncio.CancelledError: pass

    def close(self):
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(5)
        assert not self.thread.is_alive()
        self.bot.close()

    def later(self, seconds=6.):
        self.ahead += int(1_000 * seconds)
        self.double.ahead += seconds

    def asks(self, user, text, more=1, **given):
        "What somebody is answered; the six seconds between two commands pass before"
        self.later()
        return self.at_once(user, text, more, **given)

    def at_once(self, user, text, more=1, **given):
        seen = len(self.double.sent)
        self.double.say(user, text, **given)
        found = self.double.after(seen, more)
        assert {each.user for each in found} == {user}
        return "\n".join(each.text for each in found)

    def presses(self, user, data, more=1):
        seen = len(self.double.sent)
        self.double.press(user, data)
        return self.double.after(seen, more)[0].text

    def audit(self):
        with reading(self.database) as look: return [record_of(Audited, row) for row in look.rows(AUDIT)]

    def send(self, message):
        return asyncio.run_coroutine_threadsafe(self.bot.send(message), self.loop).result(20)


@contextmanager
def world(folder, database="", **given):
    with telegram_double() as double:
        made = World(double, database or f"sqlite:///{folder}/tradelab.db", given.pop("sessions", folder), **given)
        try: yield made
        finally: made.close()


@contextmanager
def silent_session(ledger, folder, name, strategy="momentum"):
    "One that holds its lock and does not answer"
    (folder / name).mkdir()
    ledger.open_session(name, {"symbols": ["BTC/USDT:USDT"], "policy": f"{strategy}(1)", "venue": "localnet",
                               "timeframe": "1h"})
    with Lock(folder / name / "lock", name): yield


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    yield ledger
    ledger.close()


READ = ["start", "help", "status", "positions", "orders", "balance", "profit", "performance", "metrics", "trades",
        "risk", "locks", "alerts", "logs", "version", "breakers"]
ACT = ["stop", "reduce", "resume", "emergency", "breakers reset latency", "ack 1"]


def test_who_may_do_what_and_how_often(tmp_path, ledger):
    with silent_session(ledger, tmp_path, "one"), world(tmp_path) as lab:
        for command in READ:
            for user in (ADMIN, VIEWER):
                said = lab.asks(user, f"/{command}")
                assert "Not done" not in said, (command, said)
                assert "<b>one</b>" in said or command != "status"
        assert "/emergency" in lab.asks(ADMIN, "/help")
        assert "/emergency" not in lab.asks(VIEWER, "/help")
        for command in ACT: assert lab.asks(VIEWER, f"/{command}") == "Not done: only an admin may do that"
        assert ledger.commands.all() == []
        for user in (ADMIN, VIEWER): # twice within five seconds, each told once
            assert "<b>one</b>" in lab.asks(user, "/status")
            assert lab.at_once(user, "/profit").startswith("Not done: one command in 5 s, say it again in ")
        before = len(lab.double.sent)
        for command in ("/status", "/profit"): lab.double.say(ADMIN, command)
        for command in (*READ, *ACT): lab.double.say(STRANGER, f"/{command}")
        lab.double.press(STRANGER, "code:0042")
        until(lambda: lab.told)
        assert "There is no /deployments: /help lists" in lab.asks(ADMIN, "/deployments")
        assert "There is no /rollback" in lab.asks(ADMIN, "/rollback")
        assert {each.user for each in lab.double.sent[before:]} == {ADMIN}
        assert [(each.kind, each.arguments["person"]) for each in lab.told] == [("unknown person", "9")]
        lab.later(3_600)
        lab.double.say(STRANGER, "/start")
        until(lambda: len(lab.told) == 2)
        assert not ledger.commands.all()
        kept = lab.audit()
        assert {each.channel for each in kept} == {"telegram"}
        assert sum(each.outcome == "done" and each.person.endswith("(1)") for each in kept) >= len(READ)
        assert [each.text for each in kept if each.action == "/reduce"] == ["Not done: only an admin may do that"]
        assert sum("one command in 5 s" in each.text for each in kept) == 3
        assert sum(each.action == "message of an unknown id" for each in kept) == 2


def test_a_busy_session_is_told_and_its_answer_follows(tmp_path, ledger):
    with silent_session(ledger, tmp_path, "one"), world(tmp_path) as lab:
        assert "<b>one</b>" in lab.asks(ADMIN, "/status")
        assert "one is busy and has not answered yet" in lab.at_once(ADMIN, "/stop the train is late") # no 5 s
        assert lab.at_once(ADMIN, "/stop once more").startswith("Not done: one command in 5 s")
        row, = ledger.commands.all()
        assert (row["name"], row["session"], row["reason"]) == ("state", "one", "the train is late")
        assert json.loads(row["arguments"]) == {"state": "NO_ENTRY", "stricter": True}
        assert row["person"] == "Person <1> (1)"
        seen = len(lab.double.sent)
        ledger.commands.done(row["number"], "no entries: <until> it is resumed")
        assert lab.double.after(seen)[0].text == "<b>one</b>: no entries: &lt;until&gt; it is resumed"
        assert [(each.action, each.outcome, each.target) for each in lab.audit()] == [
            ("/status", "done", ""), ("/stop", "asked", "one"), ("/stop", "refused", ""), ("/stop", "done", "one")]
        seen, asked = len(lab.double.sent), len(ledger.commands.all())
        lab.later()
        lab.double.say(ADMIN, "/reduce one")
        until(lambda: len(ledger.commands.all()) > asked)
        ledger.commands.done(ledger.commands.all()[-1]["number"], "refused: a person requires HALT already")
        assert "refused: a person requires HALT already" in lab.double.after(seen)[0].text
        assert lab.audit()[-1].outcome == "refused"


def test_a_code_is_for_one_person_and_one_minute(tmp_path, ledger):
    with silent_session(ledger, tmp_path, "one"), world(tmp_path) as lab:
        assert lab.at_once(ADMIN, "0042") == "Not done: nothing of yours waits for a code"
        for command, word in (("resume", "resume"), ("emergency", "halt"), ("breakers reset latency", "breaker_reset")):
            asked = lab.asks(ADMIN, f"/{command}")
            assert "Send 0042 within 60 s, or press the button" in asked
            assert lab.double.sent[-1].keys == {"Confirm 0042": "code:0042"}
            assert lab.at_once(OTHER_ADMIN, "0042") == "Not done: nothing of yours waits for a code"
            assert lab.presses(OTHER_ADMIN, "code:0042") == "Not done: nothing of yours waits for a code"
            assert lab.presses(VIEWER, "code:0042") == "Not done: only an admin may do that"
            lab.later(61)
            assert lab.at_once(ADMIN, "0042").startswith("Not done: the code has expired")
            lab.asks(ADMIN, f"/{command}")
            assert lab.at_once(ADMIN, "0043") == "Not done: that is not the code, 2 tries left"
            assert not ledger.commands.find(name=word)
            assert "one is busy" in (lab.at_once(ADMIN, "0042") if word == "resume" else
                                     lab.presses(ADMIN, "code:0042"))
            row, = ledger.commands.find(name=word)
            assert lab.presses(ADMIN, "code:0042") == "Not done: nothing of yours waits for a code"
            ledger.commands.done(row["number"], "done")
            until(lambda: lab.double.sent[-1].text == "<b>one</b>: done")
        assert json.loads(row["arguments"]) == {"name": "latency"}
        assert "did you mean latency? say /breakers reset KIND" in lab.asks(ADMIN, "/breakers reset latenci")
        assert "say /breakers reset KIND, with one of latency" in lab.asks(ADMIN, "/breakers reset")


def test_several_sessions_are_told_apart_and_none_is_said_so(tmp_path, ledger):
    with world(tmp_path) as lab:
        assert "Not done: no session is running (looked in" in lab.asks(ADMIN, "/stop")
        assert "Not done: no session is running (looked in" in lab.asks(ADMIN, "/resume")
        lab.asks(ADMIN, "/emergency")
        assert "no strategy has traded: the ledger knows none" in lab.at_once(ADMIN, "0042")
        with silent_session(ledger, tmp_path, "one"), silent_session(ledger, tmp_path, "two"):
            assert "/stop: which session?" in lab.asks(ADMIN, "/stop")
            assert set(lab.double.sent[-1].keys.values()) == {"do:stop:one", "do:stop:two"}
            assert ledger.commands.all() == []
            assert "two is busy" in lab.presses(ADMIN, "do:stop:two")
            assert ledger.commands.all()[-1]["session"] == "two"
            assert "<b>resume, one</b>" in lab.asks(ADMIN, "/resume one it was the feed")
            assert "/breakers reset latency: which session?" in lab.asks(ADMIN, "/breakers reset latency")
            assert "do:breakers reset latency:one" in lab.double.sent[-1].keys.values()
            assert "<b>breakers, one</b>" in lab.presses(ADMIN, "do:breakers reset latency:one")
            both = lab.asks(VIEWER, "/positions")
            assert "<b>one</b>" in both and "<b>two</b>" in both
            assert "<b>one</b>" not in lab.asks(VIEWER, "/status two")
            assert "there is no session three: did you mean" in lab.asks(VIEWER, "/status three")


def test_what_was_said_in_an_outage_is_not_done(tmp_path, ledger):
    with silent_session(ledger, tmp_path, "one"), world(tmp_path) as lab:
        lab.double.away()
        time.sleep(.1)
        for n in range(150): lab.double.say(ADMIN, "/stop", ago=300 - n)
        lab.double.say(ADMIN, "/status")
        lab.double.put(message={"nonsense": 1})
        lab.double.put(poll={})
        lab.double.back()
        until(lambda: any("<b>one</b>" in each.text for each in lab.double.sent))
        assert sum("too old" in each.text for each in lab.double.sent) == 1
        assert len(lab.double.sent) == 2
        assert ledger.commands.all() == []
        assert "<b>one</b>" in lab.asks(VIEWER, "/status")


@pytest.mark.parametrize("answer", ["hang", "nonsense", (502, "Bad Gateway"), (500, "Oops"), {"result": {"a": 1}},
                                    {"result": [7]}, (429, "Too Many Requests: retry after 9", 9)], ids=str)
def test_the_bot_hears_again(tmp_path, ledger, answer):
    with world(tmp_path) as lab:
        lab.double.answers["getUpdates"].extend([answer] * 2)
        lab.double.answers["sendMessage"].extend(["hang" if answer == "hang" else (502, "Bad Gateway")] * 2)
        lab.double.say(VIEWER, "/version")
        assert "tradelab" in lab.double.after(0)[0].text
        assert not lab.told


def test_a_long_wait_of_the_voice_does_not_make_the_bot_deaf(tmp_path, ledger):
    with silent_session(ledger, tmp_path, "one"), world(tmp_path) as lab:
        lab.double.answers["sendMessage"].append((429, "Too Many Requests: retry after 600", 600))
        lab.double.say(VIEWER, "/status")
        until(lambda: not lab.double.answers["sendMessage"])
        lab.double.say(ADMIN, "/stop")
        until(lambda: ledger.commands.all())


@pytest.mark.parametrize("answer, words", [((409, "Conflict: other getUpdates request"), "another process hears"),
                                           ((401, "Unauthorized"), "does not take the token")], ids=["409", "401"])
def test_a_token_that_others_have_is_told_once_without_it(tmp_path, ledger, answer, words, caplog):
    with world(tmp_path) as lab:
        lab.double.answers["getUpdates"].extend([answer] * 3)
        lab.bot.pause = .0001
        lab.double.say(VIEWER, "/version")
        assert "tradelab" in lab.double.after(0)[0].text
        happening, = lab.told
        assert happening.kind == "security"
        assert words in happening.arguments["text"]
        assert TOKEN not in repr(lab.told) + caplog.text
        asked = len(lab.double.asked)
        lab.bot.pause = 1.
        lab.double.token = "revoked"
        time.sleep(1.3)
        assert len(lab.double.asked) - asked < 4 # it does not ask at full speed


def test_alerts_come_once_to_each_and_are_acknowledged_by_a_button(tmp_path, ledger):
    operations = Operations(f"sqlite:///{tmp_path}/tradelab.db")
    number, = operations.take(Service("serve", "me", 0, clock()), [Alert(0, clock(), "stuck", "error", "one",
                                                                        text="guarded <long>")], {})
    operations.close()
    told = Message("tradelab ERROR: one", "**Stuck**: guarded", "Stuck: guarded <long>", "error", number)
    with world(tmp_path, language="es") as lab:
        until(lambda: hasattr(lab, "loop"))
        lab.double.answers["sendMessage"].append((502, "Bad Gateway"))
        lab.double.blocked.add(OTHER_ADMIN)
        assert lab.send(told).startswith("1: Telegram cannot be asked: NetworkError: Bad Gateway")
        assert lab.send(told) == "" # nobody gets it twice
        assert [each.user for each in lab.double.sent] == [VIEWER, ADMIN]
        assert [list(each.keys.values()) for each in lab.double.sent] == [[], [f"ack:{number}"]]
        assert lab.double.sent[0].text == "<b>tradelab ERROR: one</b>\nStuck: guarded &lt;long&gt;"
        assert lab.presses(VIEWER, f"ack:{number}") == "No se ha hecho: solo puede hacerlo un administrador"
        assert f"alert {number} is acknowledged by Person &lt;1&gt; (1)" in lab.presses(ADMIN, f"ack:{number}")
        assert f"has acknowledged alert {number}" in lab.asks(ADMIN, f"/ack {number}")
        assert lab.asks(ADMIN, "/ack") == "¿Qué aviso? /ack NÚMERO, /alerts los muestra"
        assert "confirmado, 1 veces desde" in lab.asks(VIEWER, "/alerts")
        lab.double.blocked |= {ADMIN, VIEWER}
        assert "Forbidden: bot was blocked by the user" in lab.send(Message("t", "x", "x"))


def test_a_session_that_trades_is_stopped_and_resumed_and_closed(tmp_path):
    with example_session(330, .05) as place, world(tmp_path, place.database, sessions=place.sessions) as lab:
        lab.bot.patience = 8.
        assert "no entries: no new position is opened until it is resumed" in lab.asks(ADMIN, "/stop I am away")
        assert "[cause.person]" in lab.asks(VIEWER, "/locks")
        assert "reducing: nothing is opened or enlarged" in lab.asks(ADMIN, "/reduce")
        assert "refused: a person requires REDUCE_ONLY already" in lab.asks(ADMIN, "/stop")
        lab.asks(ADMIN, "/resume")
        assert "resumed: nothing restricts it" in lab.at_once(ADMIN, "0042")
        lab.asks(ADMIN, "/emergency the exchange is in trouble")
        assert "halted: everything is closed now" in lab.at_once(ADMIN, "0042")
        assert "HALT" in lab.asks(VIEWER, "/locks")
        for command in READ: assert "Not done" not in lab.asks(VIEWER, f"/{command}")
        done = [(each.action, each.outcome) for each in lab.audit() if each.person == "Person <1> (1)"]
        assert done == [("/stop", "done"), ("/reduce", "done"), ("/stop", "refused"), ("/resume", "asked"),
                        ("/resume", "done"), ("/emergency the exchange is in trouble", "asked"), ("/emergency", "done")]


def test_the_command_tells_whom_the_bot_would_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tradelab.toml").write_text('telegram = { admins = [1], viewers = [3] }\n')
    with telegram_double() as double:
        monkeypatch.setenv("TRADELAB_TELEGRAM_API", double.url)
        assert "no telegram_token is set" in CliRunner().invoke(main, ["telegram", "test"]).output
        monkeypatch.setenv("TRADELAB_TELEGRAM_TOKEN", TOKEN)
        double.blocked.add(3)
        said = CliRunner().invoke(main, ["telegram", "test"])
        assert said.output == ("Telegram takes the token, which is that of @tradelab_bot\nadmin 1 is answered\n"
                               "viewer 3 cannot be told anything, and must send /start to the bot first (Chat not "
                               "found)\n")
        double.token = "another"
        refused = CliRunner().invoke(main, ["telegram", "test"])
        assert "Error: Telegram does not take the token: ask @BotFather" in refused.output
        assert TOKEN not in refused.output
