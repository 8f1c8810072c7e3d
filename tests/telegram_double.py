"""A Bot API of our own over a real socket: people write and press buttons by `say` and `press`, what the bot answers is
in `sent`, and `answers` says what it gets instead: a status, `hang`, `nonsense`; `away` closes the port"""
import asyncio
import json
import threading
import time
from collections import defaultdict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web
from servers import until

TOKEN = "4711:ABCdefGHIjklMNOpqrSTUvwxYZ0123456789"


@dataclass
class Sent:
    "A message of the bot"
    user:int
    text:str
    keys:dict[str, str] = field(default_factory=dict)  # data by text of a button


class TelegramDouble:
    def __init__(self, token=TOKEN):
        self.token = token
        self.sent, self.spun, self.asked = [], [], []  # messages, answers to buttons, methods
        self.answers = defaultdict(deque)              # by method: what it answers instead, once each
        self.blocked = set()                           # who has blocked the bot
        self.ahead = 0.                                # seconds by which its clock is ahead
        self._updates, self._number, self._port = [], 0, 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def url(self): return f"http://127.0.0.1:{self._port}"

    def _do(self, work): return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def back(self):
        "Listen, at the port of before"
        self._over = asyncio.Event()
        async def listen():
            app = web.Application()
            app.router.add_route("*", "/bot{token}/{method}", self._take)
            self._runner = web.AppRunner(app, shutdown_timeout=.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
            await site.start()
            self._port = site._server.sockets[0].getsockname()[1]
        self._do(listen())

    def away(self):
        self._loop.call_soon_threadsafe(self._over.set)
        self._do(self._runner.cleanup())

    def close(self):
        self.away()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _person(self, user): return {"id": user, "is_bot": False, "first_name": f"Person <{user}>"}

    def put(self, **update):
        self._number += 1
        self._updates.append({"update_id": self._number} | update)

    def say(self, user, text, ago=0.):
        "Somebody writes something, so many seconds ago"
        self.put(message={"message_id": 1, "date": int(time.time() + self.ahead - ago), "text": text,
                          "from": self._person(user), "chat": {"id": user, "type": "private", "first_name": "P"}})

    def press(self, user, data):
        self.put(callback_query={"id": str(self._number), "from": self._person(user), "chat_instance": "1",
                                 "data": data})

    async def _take(self, request):
        given = dict(await request.post()) or (await request.json() if request.can_read_body else {})
        method = request.match_info["method"]
        self.asked.append(method)
        if request.match_info["token"] != self.token: return _wrong(401, "Unauthorized")
        if self.answers[method]:
            answer = self.answers[method].popleft()
            if answer == "hang": await asyncio.wait_for(self._over.wait(), 60)
            if answer == "nonsense": return web.Response(text="<html>")
            if isinstance(answer, tuple): return _wrong(*answer)
            if isinstance(answer, dict): return web.json_response({"ok": True, **answer})
        return await getattr(self, f"_{method}", self._other)(given)

    async def _getMe(self, given):
        return _good({"id": 4711, "is_bot": True, "first_name": "t", "username": "tradelab_bot"})

    async def _sendChatAction(self, given):
        return _wrong(400, "Bad Request: chat not found") if int(given["chat_id"]) in self.blocked else _good(True)

    async def _getUpdates(self, given):
        until_then = time.monotonic() + float(given.get("timeout", 0))
        self._updates = [each for each in self._updates if each["update_id"] >= int(given.get("offset", 0))]
        while not self._updates and time.monotonic() < until_then and not self._over.is_set():
            await asyncio.sleep(.005)
        return _good(self._updates[:100])

    async def _sendMessage(self, given):
        user = int(given["chat_id"])
        if user in self.blocked: return _wrong(403, "Forbidden: bot was blocked by the user")
        rows = json.loads(given.get("reply_markup") or "{}").get("inline_keyboard", [])
        keys = {each["text"]: each["callback_data"] for row in rows for each in row}
        self.sent.append(Sent(user, given["text"], keys))
        return _good({"message_id": len(self.sent), "date": int(time.time()), "text": given["text"],
                      "chat": {"id": user, "type": "private"}})

    async def _answerCallbackQuery(self, given):
        self.spun.append(given["callback_query_id"])
        return _good(True)

    async def _other(self, given): return _wrong(404, "Not Found")

    def after(self, seen, more=1):
        "What the bot has sent beyond the first `seen`, as soon as there are so many"
        until(lambda: len(self.sent) >= seen + more)
        return self.sent[seen:]


def _good(result): return web.json_response({"ok": True, "result": result})


def _wrong(status, said, retry_after=None):
    return web.json_response({"ok": False, "error_code": status, "description": said} | (
        {"parameters": {"retry_after": retry_after}} if retry_after else {}), status=status)


@contextmanager
def telegram_double():
    double = TelegramDouble()
    double.back()
    try: yield double
    finally: double.close()
