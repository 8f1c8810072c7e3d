"""Several `tradelab serve` at one ledger with a real Redis between them, which is killed, hangs and comes back: what
happens is told by each of them, once, and while Redis is away each of them is as if it were alone"""
import asyncio
import json
import re
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from time import monotonic

import httpx
import pytest
from pydantic import SecretStr
from servers import free_port, redis, until
from test_api import ACCOUNTS, SECRET
from test_serve import refused, served

from tradelab.config import Settings, settings
from tradelab.database.accounts import Accounts
from tradelab.database.records import clock
from tradelab.database.redis import Redis, check_redis
from tradelab.live.ledger import Ledger
from tradelab.ops import sharing
from tradelab.ops.dashboard import Views
from tradelab.ops.feed import Feed
from tradelab.ops.people import Token, issue
from tradelab.ops.requests import Buckets
from tradelab.ops.sharing import COUNTS, READS, Sharing, counted
from tradelab.watching import example_session

pytestmark = pytest.mark.integration
SCOPE = "tradelab:example"


async def soon(true, seconds=20.):
    "Wait, in the loop, until it is true"
    end = monotonic() + seconds
    while not true():
        assert monotonic() < end, f"nothing within {seconds:g} s"
        await asyncio.sleep(.02)


@pytest.fixture(scope="module")
def server():
    with redis() as made: yield made


def sharing_one(server, secret=SECRET):
    made = Redis(f"{server.url}/0", SCOPE, secret)
    made.up = True
    return made


def test_an_answer_is_made_once_for_all_who_can_read_its_seal(server):
    made = []

    async def make():
        made.append(b"[1]")
        return made[-1]

    async def ask():
        one, other, stranger = sharing_one(server), sharing_one(server), sharing_one(server, "x" * 32)
        found = [await each.answer("equity 24", .3, make) for each in (one, other, other)]
        assert (len(made), set(found)) == (1, {b"[1]"})
        assert await stranger.answer("equity 24", .3, make) == b"[1]"
        assert len(made) == 2                           # and what it has kept there nobody else takes
        assert await one.answer("equity 24", .3, make) == b"[1]"
        assert len(made) == 3
        assert await one.answer("equity 48", .3, make) == b"[1]"
        assert len(made) == 4
        keys = await one.client.keys(f"{SCOPE}:answer:*")
        for key in keys: await one.client.set(key, b'[{"equity": 1e9}]', keepttl=True, xx=True) # somebody lies
        assert await other.answer("equity 24", .3, make) == b"[1]"
        assert len(made) == 5
        while await one.client.keys(f"{SCOPE}:answer:*"): await asyncio.sleep(.02) # all of it ends by itself
        for each in (one, other, stranger): await each.close()
    asyncio.run(ask())


def test_requests_are_counted_together_and_a_burst_is_the_deepest_debt(server):
    async def ask():
        clients = [sharing_one(server) for _ in range(3)]
        scripts = [each.client.register_script(COUNTS) for each in clients]
        places = [Buckets(60., 10) for _ in range(3)]

        async def all_count(name):
            for each in zip(clients, scripts, places): await counted(each[0], each[1], name, each[2])
        def let_in(place, times): return sum(places[place].take("ada", monotonic()) == 0. for _ in range(times))
        assert let_in(0, 8) == 8
        await all_count("one")
        assert let_in(1, 1) == 1                        # it has not heard of the others yet
        await all_count("one")
        assert let_in(1, 9) == 1                        # ten in all
        assert let_in(0, 5) in (1, 2)                   # what was said to it last
        await all_count("one")
        assert let_in(0, 5) == let_in(1, 5) == 0
        for each in places: each.__init__(60., 10)
        for place in range(3): assert let_in(place, 20) == 10
        for _ in range(2):                              # 30 of 10 within one tick: eleven seconds to wait, no more
            await all_count("two")
            waits = [each.take("ada", monotonic()) for each in places]
        assert all(9. < wait <= 11. for wait in waits), waits
        assert 0 < await clients[0].client.pttl(f"{SCOPE}:two:ada") <= 21_000
        for each in clients: await each.close()
    asyncio.run(ask())


class Process:
    "What of a process that serves has to do with others"

    def __init__(self, here, server):
        self.feed = Feed(here, every=.3)
        self.sharing = Sharing(Redis(f"{server.url}/1", SCOPE, SECRET), self.feed, {"token": Buckets(60., 10)})
        self.heard, self.looks = [], 0
        self._looks = self.feed.subscribe("test")

    async def listen(self):
        while True:
            self.looks += 1
            self.heard += [each.told.text for each in (await self._looks.next()).notices]


@asynccontextmanager
async def processes(here, server, number):
    made = [Process(here, server) for _ in range(number)]
    tasks = [[asyncio.create_task(work) for work in (each.feed.run(), each.sharing.run(), each.listen())]
             for each in made]
    try: yield made, tasks
    finally:
        for task in sum(tasks, []): task.cancel()
        await asyncio.wait(sum(tasks, []))


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    made.open_session("demo", {"symbols": []})
    yield made
    made.close()


@pytest.fixture
def here(ledger, tmp_path):
    return Settings(database=f"sqlite:///{tmp_path}/tradelab.db", sessions=tmp_path / "sessions",
                    logs=tmp_path / "logs")


@pytest.fixture
def seldom(monkeypatch):
    "Who hears in time was told, and who has a place must give it up"
    monkeypatch.setattr(sharing, "SELDOM", 600.)
    monkeypatch.setattr(sharing, "LASTS", 600_000)


class Telling:
    "Notices, and whether they have been heard"

    def __init__(self, ledger): self.ledger, self.said = ledger, []

    async def __call__(self, *listeners):
        self.said.append(f"notice {len(self.said)}")
        self.ledger.notice("demo", "halt", self.said[-1])
        await soon(lambda: all(each.heard == self.said for each in listeners))


def readers(made): return [each for each in made if each.sharing.reads]


async def in_order(made):
    "One of them reads for all"
    await soon(lambda: len(readers(made)) == 1 and [each.feed.every for each in made].count(600.) == len(made) - 1)


def test_one_reads_for_all_and_whatever_happens_to_redis_each_hears_everything_once(ledger, here, seldom):
    tell = Telling(ledger)

    async def walk(server):
        async with processes(here, server, 3) as (three, tasks):
            await in_order(three)
            await tell(*three)
            before = [each.looks for each in three]
            reader = three.index(readers(three)[0])
            await soon(lambda: three[reader].looks > before[reader] + 8)
            await tell(*three)
            looks = [each.looks - was for each, was in zip(three, before, strict=True)]
            assert sum(looks) - looks[reader] <= 4, looks
            for be_away, come_back in ((server.hang, server.go_on), (server.kill, server.start)):
                be_away()
                await tell(*readers(three))                 # who reads hears of it as ever
                await soon(lambda: {each.feed.every for each in three} == {.3})
                await tell(*three)
                await asyncio.to_thread(come_back)
                await in_order(three)
                await tell(*three)
            reader = three.index(readers(three)[0])
            for task in tasks[reader]: task.cancel()        # it ends in order, and gives the place up
            others = [each for each in three if each is not three[reader]]
            await in_order(others)
            await tell(*others)
    with redis() as server: asyncio.run(walk(server))


def test_a_message_that_is_lost_is_made_up_for(server, ledger, here, seldom, monkeypatch):
    async def deaf(sharing, wire): await asyncio.sleep(.1)
    monkeypatch.setattr(sharing, "_hear", deaf)
    tell = Telling(ledger)

    async def walk():
        async with processes(here, server, 2) as (both, _):
            await in_order(both)
            for _ in range(3): await tell(*both)
    asyncio.run(walk())


def test_who_cannot_read_the_ledger_does_not_read_for_others(server, ledger, here):
    async def ask():
        client = sharing_one(server)
        script = client.client.register_script(READS)
        async def place(who, state, lasts=500): return await client.ask(script, ["who"], who, state, lasts)
        assert await place("one", "one 1") == [b"one", b"one 1"]
        assert await place("other", "other 7") == [b"one", b"one 1"]
        assert await place("one", "") == [b"", b""]
        assert await place("one", "") == [b"", b""]
        assert await place("other", "other 7") == [b"other", b"other 7"]
        wire = client.client.pubsub(ignore_subscribe_messages=True)
        await wire.subscribe(f"{SCOPE}:who")
        for state in ("other 8", "other 8", "other 9"): await place("other", state)
        await place("one", "one 5")                     # it is not its turn
        heard = [await wire.get_message(timeout=.5) for _ in range(4)] # one of them that it listens
        assert [each["data"] for each in heard if each] == [b"other 8", b"other 9"]
        await wire.aclose()
        await asyncio.sleep(.6)                         # it is silent
        assert await place("one", "one 2") == [b"one", b"one 2"]
        await client.close()
    asyncio.run(ask())


def test_a_view_is_read_once_for_two_dashboards(server):
    with example_session(24, 0., True) as place:
        here = Settings(database=place.database, sessions=place.sessions, logs=place.sessions.parent / "logs")

        async def look():
            shared = [sharing_one(server), sharing_one(server)]
            one, other = [Views(here, every=30., shared=each) for each in shared]
            seen = [await one.now(), await other.now()]
            assert seen[0]["time"] == seen[1]["time"]
            assert seen[0] == seen[1]
            assert [each["id"] for each in seen[0]["sessions"]] == [place.session]
            own = await Views(here, every=30.).now()
            assert own["time"] > seen[0]["time"]
            assert set(own) == set(seen[0])
            for each in shared: await each.close()
        asyncio.run(look())


@contextmanager
def hearing(port):
    "The notices that come over the stream of one process"
    now = clock()
    headers = {"Authorization": f"Bearer {issue(Token('vera', 'access', 'x', 'y', now, now + 600_000), SECRET, 0)}"}
    url, told, over = f"http://127.0.0.1:{port}/api/v1/events", [], threading.Event()

    def hear():
        with suppress(httpx.HTTPError), httpx.stream("GET", url, timeout=60., headers=headers) as stream:
            assert stream.status_code == 200
            told.append("listens")
            for line in stream.iter_lines():
                if over.is_set(): return
                if line.startswith("data: ") and "text" in (data := json.loads(line[6:])): told.append(data["text"])
    until(lambda: httpx.get(f"http://127.0.0.1:{port}/api/v1/sessions", headers=headers).status_code == 200)
    threading.Thread(target=hear, daemon=True).start()
    until(lambda: told)
    yield told
    over.set()


def test_two_that_serve_tell_each_notice_once_while_redis_comes_and_goes(project):
    "Processes, their API, their streams: what happens is heard at both, and once"
    ledger = Ledger(settings().database)
    ledger.open_session("demo", {"symbols": []})
    accounts = Accounts(settings().database)
    accounts.put(ACCOUNTS["viewer"].__class__(**vars(ACCOUNTS["viewer"]) | {"name": "vera"}))
    with redis("--requirepass", "planted-0123") as server:
        given = {"redis_url": f"redis://:planted-0123@127.0.0.1:{server.port}/0", "api_secret": SECRET}
        ports = free_port(), free_port()
        with (served(out="one.out", api__port=ports[0], logs=project / "one", **given) as one,
              served(out="two.out", api__port=ports[1], logs=project / "two", **given) as two,
              hearing(ports[0]) as first, hearing(ports[1]) as second):
            def log_of(name): return (project / name / "tradelab.jsonl").read_text()
            def last_of(name): return re.findall("Redis (answers|is away)", log_of(name))[-1:]
            def both_say(words): until(lambda: last_of("one") == last_of("two") == [words], 60.)
            told = ["listens"]

            def tell():
                told.append(f"notice {len(told)}")
                ledger.notice("demo", "halt", told[-1])
                until(lambda: first == second == told)
            both_say("answers")
            tell()
            for be_away, come_back in ((server.hang, server.go_on), (server.kill, server.start)):
                be_away()
                tell()
                both_say("is away")
                tell()
                come_back()
                both_say("answers")
                tell()
            for each in (one, two): assert each.end() == 0
            assert first == second == told
            assert "shared by Redis at 127.0.0.1:" in one.said
            assert "planted" not in one.said + two.said + log_of("one") + log_of("two")
            assert "failed and is started again" not in one.said + two.said
    accounts.close()
    ledger.close()


def test_an_address_that_is_none_is_one_sentence_and_nothing_of_redis_is_imported_without_one(project):
    said = refused(metrics_port=free_port(), redis_url="planted:0123")
    assert said.startswith("Error: redis_url is no address such as redis://127.0.0.1:6379/0")
    assert said.count("\n") == 1
    assert "planted" not in said
    Ledger(settings().database).close()
    before = "import atexit, sys; atexit.register(lambda: print('loaded:', 'redis' in sys.modules)); "
    for url, loaded in (("", False), ("redis://127.0.0.1:9", True)):
        with served(before, redis_url=url) as process:
            assert process.end() == 0
            assert f"loaded: {loaded}" in process.said
    assert check_redis(SecretStr("redis://db").get_secret_value()) == "db:6379"
