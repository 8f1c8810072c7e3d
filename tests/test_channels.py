"People who are away hear over real servers, each of which is also dead, hangs, refuses, is slow, and comes back"
import asyncio
import json
import threading
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from email import message_from_bytes, policy
from unittest.mock import patch

import pytest
from aiosmtpd.controller import Controller
from apprise.plugins.slack import NotifySlack
from apprise.plugins.telegram import NotifyTelegram
from pydantic import SecretStr
from servers import free_port, hanging, webhook
from test_live import localnet, session

from tradelab.config import AlertSettings, settings
from tradelab.database.reading import reading
from tradelab.database.records import Delivery
from tradelab.database.schema import ALERTS, MEASURED
from tradelab.live.alerts import Alerts, others_tell
from tradelab.live.ledger import Ledger
from tradelab.live.session import tell
from tradelab.notices import Notice
from tradelab.ops.channels import AlertCentre, AppriseChannel, Message, Outbox, channel_lines, send_next
from tradelab.ops.feed import Feed
from tradelab.ops.happenings import Happening

TOKEN = "Tk4plantedtoken0123"
ADDRESSES = {
    "json": f"json://127.0.0.1:{{port}}/{TOKEN}",
    "mailto": f"mailto://127.0.0.1:{{port}}/?from=trader@example.com&to={TOKEN}@example.com&mode=insecure"
              "&smtp=127.0.0.1",
    "slack": f"slack://T1JJ3T3L2/A1BRTD4JD/{TOKEN}xIrd",
    "tgram": f"tgram://123456789:{TOKEN}_AAAAAAAAAAAAAAA/-10042"}
ANSWERS = {"json": b"{}", "slack": b"ok", "tgram": b'{"ok": true, "result": {"message_id": 1}}'}
MESSAGE = Message("tradelab CRITICAL: live_1", "**Halted**: at 15\\_02 &lt; 16", "Halted: at 15_02 < 16", "critical")


class Mailbox:
    def __init__(self, status, delay): self.status, self.delay, self.mails = status, delay, []

    async def handle_DATA(self, server, session, envelope):
        await asyncio.sleep(self.delay)
        if self.status == 200: self.mails.append(message_from_bytes(envelope.content, policy=policy.default))
        return "250 taken" if self.status == 200 else "554 refused"

    def bodies(self): return [mail.get_body(("html", "plain")).get_content() for mail in self.mails]


@contextmanager
def mail_server(port, status=200, delay=0.):
    box = Mailbox(status, delay)
    server = Controller(box, hostname="127.0.0.1", port=port)
    server.start()
    try: yield box
    finally: server.stop()


def server(kind, manner, port):
    "The service of a channel, as it is just now"
    if manner == "dead": return nullcontext()
    if manner == "hanging": return hanging(port)
    asked = {"port": port, "delay": .15 if manner == "slow" else 0., "status": 503 if manner == "refusing" else 200}
    return mail_server(**asked) if kind == "mailto" else webhook(answer=ANSWERS[kind], **asked)


@contextmanager
def channel(kind, limit=.5):
    "The channel, and the port of its service"
    port = free_port()
    with (patch.object(NotifySlack, "webhook_url", f"http://127.0.0.1:{port}/services"),
          patch.object(NotifyTelegram, "notify_url", f"http://127.0.0.1:{port}/bot")):
        yield AppriseChannel(kind, ADDRESSES[kind].format(port=port), limit), port


@pytest.mark.parametrize("manner", ["dead", "hanging", "refusing", "slow"])
@pytest.mark.parametrize("kind", [*ADDRESSES])
def test_what_was_to_be_told_is_told_when_the_channel_is_back(kind, manner):
    async def story():
        with channel(kind) as (there, port):
            told = []
            outbox = Outbox(there, lambda outbox, message, why: told.append(why), pause=.01)
            outbox.put(MESSAGE)
            with server(kind, manner, port):
                assert (await send_next(outbox) == 0.) == (manner == "slow")
            with server(kind, "answering", port) as back:
                if manner == "slow": outbox.put(MESSAGE)
                assert await send_next(outbox) == 0.
                assert "Halted" in back.bodies()[0]
            assert told[-1] == ""
            assert len(told) == 2
            assert TOKEN not in "".join(told)
            if manner == "hanging": assert told[0] == "no answer within 0.5 s"
            if manner == "refusing": assert ("failed." if kind == "mailto" else "error=503.") in told[0]
            done = outbox.delivered
            assert (done.sent, done.failed, done.dropped) == ((2, 0, 0) if manner == "slow" else (1, 1, 0))
    asyncio.run(story())


def test_a_channel_gets_what_it_reads():
    "HTML in mail and at Telegram, its own Markdown at Slack, plain text at a webhook"
    async def said(kind):
        with channel(kind, 10.) as (there, port), server(kind, "answering", port) as back:
            assert await there.send(MESSAGE) == ""
            return back.bodies()[0]
    assert "<strong>Halted</strong>: at 15_02 &lt; 16" in asyncio.run(said("mailto"))
    telegram = json.loads(asyncio.run(said("tgram")))
    assert telegram["parse_mode"] == "HTML"
    assert "<b>Halted</b>: at 15_02 &lt; 16" in telegram["text"]
    slack = json.loads(asyncio.run(said("slack")))["attachments"][0]
    assert slack["text"] == "*Halted*: at 15\\_02 &lt; 16"
    assert json.loads(asyncio.run(said("json")))["message"] == "Halted: at 15_02 < 16"


class Ear:
    "A channel that takes what it is told, unless there is a reason"
    def __init__(self, name="ear", why=""): self.name, self.why, self.taken = name, why, []

    async def send(self, message):
        if not self.why: self.taken.append(message.plain)
        return self.why


async def until(true):
    "Wait for a sign"
    for _ in range(1_000):
        if true(): return
        await asyncio.sleep(.01)
    raise AssertionError("it does not come")


@asynccontextmanager
async def serving(here, channels, killed=False):
    "The feed and the centre, as `tradelab serve` runs them; killed: it does not end in order"
    feed = Feed(here, every=.02)
    centre = AlertCentre(here, feed, channels)
    for outbox in centre.all_outboxes(): outbox.pause = .01
    tasks = [asyncio.create_task(each.run()) for each in (feed, centre)]
    try:
        await until(lambda: centre.recalled)
        yield centre
    finally:
        with patch("tradelab.ops.channels._close") if killed else nullcontext():
            for task in tasks: task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        centre.operations.close()


@pytest.fixture
def here(tmp_path):
    "Settings, with a ledger that has a session"
    found = settings(database=f"sqlite:///{tmp_path}/tradelab.db", sessions=tmp_path / "sessions")
    ledger = Ledger(found.database)
    ledger.open_session("momentum_test", {"symbols": ["BTC/USDT:USDT"], "venue": "localnet"})
    ledger.set_state("momentum_test", "stopped")
    ledger.close()
    return found


def notice(here, kind, text):
    ledger = Ledger(here.database)
    ledger.notice("momentum_test", kind, text)
    ledger.close()


def told(here):
    "By alert: the channels that it arrived at"
    with reading(here.database) as look:
        sent = look.rows(MEASURED[Delivery], good=True)
        return {row["kind"]: sorted(each["channel"] for each in sent if each["alert"] == row["number"])
                for row in look.rows(ALERTS)}


def test_a_channel_that_hangs_holds_no_other_up_and_is_told_later(here):
    async def story():
        with ExitStack() as stack:
            there = {kind: stack.enter_context(channel(kind, 10.)) for kind in ("json", "mailto", "tgram")}
            there["json"][0].attempts.limit = .3
            boxes = [stack.enter_context(server(kind, "answering", there[kind][1])) for kind in ("mailto", "tgram")]
            async with serving(here, [each for each, _ in there.values()]) as centre:
                with hanging(there["json"][1]):
                    notice(here, "halt", "a limit was reached")
                    await until(lambda: all(box.bodies() for box in boxes))
                    await until(lambda: centre.outboxes[0].failures)
                with server("json", "answering", there["json"][1]) as back:
                    await until(back.bodies)
                    assert "Trading halted: a limit was reached" in back.bodies()[0]
                    await until(lambda: told(here)["halt"] == ["json", "mailto", "tgram"])
            assert ["\n".join(box.bodies()).count("a limit was reached") for box in boxes] == [1, 1]
        assert "json: sent 1, failed" in channel_lines(here.database)[0]
        assert TOKEN not in "".join(channel_lines(here.database))
    asyncio.run(story())


def test_a_service_that_is_killed_tells_the_rest_when_it_is_back_and_nothing_twice(here):
    async def story():
        ear, wall = Ear("ear"), Ear("wall", "it is a wall")
        async with serving(here, [ear, wall], killed=True) as centre:
            notice(here, "halt", "before")
            await until(lambda: ear.taken and centre.outboxes[1].failures)
            await until(lambda: told(here).get("halt") == ["ear"])
            ear.why = "it is deaf"
            notice(here, "margin call", "nobody hears it")
            await until(lambda: "margin call" in told(here))
        notice(here, "failed", "while nobody serves")
        ear.why = wall.why = ""
        async with serving(here, [ear, wall]):
            kinds = ("halt", "margin call", "failed")
            await until(lambda: [told(here).get(kind) for kind in kinds] == 3 * [["ear", "wall"]])
        assert ear.taken[0] == "Trading halted: before"
        assert "Trading halted: before" not in "\n".join(ear.taken[1:])
        for words in ("before", "nobody hears it", "while nobody serves"):
            assert "\n".join(wall.taken).count(words) == 1
            assert "\n".join(ear.taken).count(words) == 1
    asyncio.run(story())


def test_a_ledger_that_hangs_lets_people_be_told_and_has_it_later(here):
    async def story():
        over = threading.Event()
        async with serving(here, [ear := Ear()]) as centre:
            centre.thread.limit = .1
            with patch.object(centre.operations, "take", lambda *words: over.wait() and [1]):
                centre.hear(Happening("security", arguments={"text": "a stranger"}))
                await until(lambda: ear.taken)
                assert ear.taken == ["Security: a stranger"]
            over.set()
            centre.thread.limit, centre.again = 5., 0.
            await until(lambda: told(here).get("security") == ["ear"])
    asyncio.run(story())


def test_what_nobody_acknowledges_goes_to_whom_escalations_go(here):
    async def story():
        with webhook() as normal, webhook() as higher:
            above = settings(database=here.database, sessions=here.sessions, alerts={"escalate_after": .001},
                             escalation_url=f"json://127.0.0.1:{higher.port}/{TOKEN}")
            way = AppriseChannel("json", f"json://127.0.0.1:{normal.port}/{TOKEN}")
            async with serving(above, [way]):
                notice(above, "halt", "a limit was reached")
                await until(higher.bodies)
                assert "Nobody has acknowledged this" in higher.bodies()[0]
            assert "Nobody has acknowledged this" not in normal.bodies()[0]
    asyncio.run(story())


@pytest.mark.integration
@pytest.mark.parametrize("served", [True, False])
def test_a_session_tells_by_itself_only_where_no_service_does(served, tmp_path):
    async def story():
        with webhook() as own, localnet() as exchange:
            alone = Alerts(SecretStr(f"json://127.0.0.1:{own.port}/{TOKEN}"), AlertSettings("critical"),
                           serving=lambda: others_tell(here.database))
            live = session(exchange, tmp_path, alerts=alone, say=lambda line: None)
            live.progress = lambda done: tell(live, Notice("halt", "abcdefghijkl"[done.candles % 12]))
            here = settings(database=f"sqlite:///{tmp_path}/tradelab.db", sessions=tmp_path / "sessions")
            async with serving(here, [ear := Ear()] if served else []):
                if served: await until(lambda: others_tell(here.database))
                await asyncio.to_thread(lambda: asyncio.run(live.run(6))) # a loop of its own, as in a process
                if served: await until(lambda: "".join(ear.taken).count("Trading halted: ") >= 6)
            assert len([line for body in own.bodies() for line in json.loads(body)["message"].splitlines()
                        if "halt:" in line]) == (0 if served else 6)
            assert not others_tell(here.database)
    asyncio.run(story())
