"People who are away hear over real servers, each of which is also dead, hangs, refuses, is slow, and comes back"
import asyncio
import json
from contextlib import contextmanager, nullcontext
from email import message_from_bytes, policy
from unittest.mock import patch

import pytest
from aiosmtpd.controller import Controller
from apprise.plugins.slack import NotifySlack
from apprise.plugins.telegram import NotifyTelegram
from servers import free_port, hanging, webhook

from tradelab.ops.channels import AppriseChannel, Message, Outbox, send_next

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
