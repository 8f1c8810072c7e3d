"""The web API over a real socket, beside a session that trades: who may do what, once, and only what was meant.
Whatever is refused is in the audit, and nobody meets a 500 or a route that asks for nobody"""
import asyncio
import json
import re
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import create_connection, create_server

import httpx
import pandas as pd
import pytest
import websockets
from pydantic import SecretStr
from servers import until
from test_live import HISTORY, MARKET, session, trader
from test_schedule import notebook, write
from test_serve import free_port, localnet, orders_at, run_alone, served
from test_serve import refused as said_by_refused

from tradelab.config import ApiSettings, Settings, settings
from tradelab.database.accounts import Accounts
from tradelab.database.operations import Operations
from tradelab.database.reading import reading
from tradelab.database.records import Alert, Asked, clock
from tradelab.database.rows import Database
from tradelab.database.schema import AUDIT, COMMANDS
from tradelab.errors import ConfigurationError
from tradelab.evaluation.difference import first_difference
from tradelab.events import Candles, LimitsChange
from tradelab.live.ledger import Ledger
from tradelab.live.recorder import Recording, read
from tradelab.live.replay import first_other_action, replay, unproven
from tradelab.market.synthetic import funding
from tradelab.ops.feed import Feed
from tradelab.ops.health import Health, HealthWatch
from tradelab.ops.people import ROLES, Token, issue, new_account, read_token
from tradelab.ops.routes import Api, check_api
from tradelab.ops.samples import Gatherer
from tradelab.settings import changed
from tradelab.sim.backtest import backtest
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader
from tradelab.venues.binance import BinanceVenue
from tradelab.watching import example_session

pytestmark = pytest.mark.integration
SECRET = "pUQ7-3cWm9-Zk2eR-8vTn4-Ls6Xy-1bHd5-Jg0Af"
PASSWORD = "correct horse battery"
PEOPLE = {"vera": "viewer", "tom": "trader", "ada": "admin", "otto": "admin"}
WIDE = ApiSettings(port=0, rate=1e6, burst=100_000)


class World:
    "The API in a thread of its own, a client for it, and a clock that is turned by hand"

    def __init__(self, database, sessions, api=WIDE, prepare=lambda api: None, **given):
        self.ahead, self.logins, self.told, self.database = 0, 0, [], database
        here = Settings(database=database, sessions=sessions, api_secret=SecretStr(SECRET), api=api, **given)
        accounts = Accounts(database)
        for name, role in PEOPLE.items(): accounts.put(replace(ACCOUNTS[role], name=name))
        accounts.close()
        self.feed, self.began = Feed(here, every=.2), threading.Event()
        self.api = Api(here, self.feed, Gatherer(here), HealthWatch(self._healthy), self.told.append,
                       lambda: clock() + self.ahead)
        prepare(self.api)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.thread.start()
        until(lambda: self.api.register is not None and self.feed.last is not None and self.api.port)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.api.port}", timeout=20.)

    async def _healthy(self): return Health(clock())

    async def _run(self):
        self.loop = asyncio.get_running_loop()
        self.tasks = [asyncio.ensure_future(each) for each in (self.feed.run(), self.api.run())]
        await asyncio.wait(self.tasks)

    def close(self):
        self.client.close()
        for task in self.tasks: self.loop.call_soon_threadsafe(task.cancel)
        self.thread.join(10)
        assert not self.thread.is_alive()

    def token(self, name, **changed):
        "A token of somebody, without the second that a password takes"
        now = clock() + self.ahead
        self.logins += 1
        made = Token(name, "access", f"token-{self.logins}", f"login-{self.logins}", now, now + 3_600_000)
        return issue(replace(made, **changed), SECRET, self.api.register.generation)

    def ask(self, method, path, name="", body=None, token="", **headers):
        "An answer, and its JSON"
        given = {each.replace("_", "-"): value for each, value in headers.items()}
        if name or token: given["Authorization"] = f"Bearer {token or self.token(name)}"
        found = self.client.request(method, path if path.startswith("/api") or path.startswith("/health")
                                    else f"/api/v1{path}", json=body, headers=given)
        return found, found.json()

    def audit(self):
        with reading(self.database) as look: return look.rows(AUDIT)

    def commands(self):
        with reading(self.database) as look: return look.rows(COMMANDS)


ACCOUNTS = {role: new_account("somebody", role, PASSWORD, "root", 0) for role in ROLES}


class Pausing:
    "Makes a venue at which each of these things is done once, by the number of the candle behind which it is done"

    def __init__(self, deeds): self.deeds, self.met, self.steps = deeds, [], {}

    def __call__(self, *given):
        pausing = self

        class Venue(BinanceVenue):
            async def waits(self, open_time, trade=None):
                if deed := pausing.due(open_time): await asyncio.to_thread(deed)
                await super().waits(open_time, trade)
        return Venue(*given)

    def due(self, open_time):
        self.steps.setdefault(open_time, len(self.steps))
        deed = self.deeds.get(self.steps[open_time])
        if deed is None or deed.__name__ in self.met: return None
        self.met.append(deed.__name__)
        return deed


@contextmanager
def world(database, sessions, **given):
    made = World(database, sessions, **given)
    try: yield made
    finally: made.close()


@pytest.fixture
def alone(tmp_path):
    "Where no session has run"
    url = f"sqlite:///{tmp_path}/tradelab.db"
    Database(url).close()
    with world(url, tmp_path / "sessions") as made: yield made


WRITES = { # a path and a body, and who may at least
    "POST /emergency": ({"reason": "why"}, "trader"), "POST /positions/BTCUSDT/close": ({"reason": "why"}, "trader"),
    "POST /orders/create": ({"symbol": "BTCUSDT", "side": "buy", "quantity": .01, "reason": "why"}, "trader"),
    "POST /orders/x/cancel": ({"reason": "why"}, "trader"), "POST /orders/cancel-all": ({"reason": "why"}, "trader"),
    "PUT /risk/mode": ({"mode": "NO_ENTRY", "reason": "why"}, "trader"),
    "POST /risk/update-limits": ({"limits": {"max_position": .9}, "reason": "why"}, "admin"),
    "POST /risk/breakers/price_move/reset": ({"reason": "why"}, "admin"),
    "POST /alerts/1/acknowledge": (None, "trader"), "POST /alerts/1/resolve": (None, "trader"),
    "PUT /thresholds/drawdown_ratio": ({"warning": .05, "critical": .1}, "admin"), "POST /auth/rotate": (None, "admin"),
    "POST /jobs/nightly/run": (None, "admin"), "POST /ml/retrain": (None, "admin")}


def routes_of(world): return world.ask("GET", "/openapi.json", "vera")[1]["paths"]


def test_every_write_is_tried_by_those_who_may_not_and_is_refused_and_audited(alone):
    expired = alone.token("ada", expires=clock() - 1_000)
    for each, (body, least) in WRITES.items():
        method, path = each.split()
        before = len(alone.audit())
        for token, status in (("", 401), (expired, 401), ("a.b.c", 401)):
            assert alone.ask(method, path, body=body, token=token)[0].status_code == status, each
        below = [name for name, role in PEOPLE.items() if ROLES.index(role) < ROLES.index(least)]
        for name in below: assert alone.ask(method, path, name, body)[0].status_code == 403, each
        new = alone.audit()[before:]
        assert len(new) == 3 + len(below), each
        assert {row["outcome"] for row in new} == {"refused"}
    assert not alone.commands()


def test_there_is_no_write_that_was_not_tried_and_no_route_without_authority(alone):
    tried = {re.sub(r"/(BTCUSDT|x|price_move|1|drawdown_ratio|nightly)(?=/|$)", "/*", each) for each in WRITES}
    for path, methods in routes_of(alone).items():
        if path.startswith("/health"): continue
        for method, said in methods.items():
            there = path.removeprefix("/api/v1")
            name = f"{method.upper()} {re.sub(r'{[^}]*}', '*', there)}"
            free = there in ("/auth/token", "/auth/refresh")
            assert ("x-role" in said) != free, name
            if free: continue
            found = alone.client.request(method, re.sub(r"{[^}]*}", "1", path))
            assert found.status_code == 401, name
            assert set(found.json()) == {"error"}
            harmless = ("/risk/validate-signal", "/data/validate", "/auth/revoke")
            if method != "get" and there not in harmless: assert name in tried


def test_people_sign_in_refresh_once_and_out(alone):
    found, pair = alone.ask("POST", "/auth/token", body={"name": "vera", "password": PASSWORD})
    assert found.status_code == 200
    assert pair["role"] == "viewer"
    assert alone.ask("GET", "/positions", token=pair["access_token"])[0].status_code == 200
    assert alone.ask("GET", "/positions", token=pair["refresh_token"])[1]["error"].startswith("this is a token of")
    newer = alone.ask("POST", "/auth/refresh", body={"refresh_token": pair["refresh_token"]})[1]
    stolen, said = alone.ask("POST", "/auth/refresh", body={"refresh_token": pair["refresh_token"]})
    assert stolen.status_code == 401
    assert "was used before" in said["error"]
    assert alone.ask("GET", "/positions", token=newer["access_token"])[0].status_code == 401
    again = alone.ask("POST", "/auth/token", body={"name": "vera", "password": PASSWORD})[1]
    assert alone.ask("POST", "/auth/revoke", token=again["access_token"])[1] == {"answer": "signed out"}
    assert alone.ask("GET", "/positions", token=again["access_token"])[0].status_code == 401
    assert "was used before" in alone.told[-1].arguments["text"]


def test_who_signs_in_from_another_address_than_before_is_told(alone):
    body = {"name": "tom", "password": PASSWORD}
    for _ in range(2): assert alone.ask("POST", "/auth/token", body=body)[0].status_code == 200
    assert alone.told == []
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as elsewhere:
        url = f"http://127.0.0.1:{alone.api.port}/api/v1/auth/token"
        for _ in range(2): assert elsewhere.post(url, json=body).status_code == 200
    told, = alone.told
    assert (told.kind, told.arguments["person"], told.arguments["address"]) == ("new address", "tom", "127.0.0.2")


def test_who_fails_waits_longer_each_time_and_people_are_told(alone):
    wrong = {"name": "eve", "password": "wrong horse battery"}
    statuses = [alone.ask("POST", "/auth/token", body=wrong)[0] for _ in range(4)]
    assert [each.status_code for each in statuses] == [401, 401, 401, 429]
    assert int(statuses[-1].headers["Retry-After"]) >= 1
    assert [each.kind for each in alone.told] == ["failed login"] * 3
    assert alone.told[0].arguments == {"person": "eve", "channel": "the API", "address": "127.0.0.1"}
    refusals = [row for row in alone.audit() if row["action"] == "POST /auth/token"]
    assert {row["outcome"] for row in refusals} == {"refused"}
    assert "wrong horse" not in json.dumps(refusals)


def test_keys_that_are_made_new_end_every_token(alone):
    key = {"Idempotency_Key": "rotate-1"}
    code = alone.ask("POST", "/auth/rotate", "ada", **key)[1]["confirm"]
    old = alone.token("vera")
    assert alone.ask("POST", "/auth/rotate", "otto", X_Confirm=code, **key)[0].status_code == 403
    assert alone.ask("POST", "/auth/rotate", "ada", X_Confirm=code, **key)[0].status_code == 200
    assert alone.ask("GET", "/positions", token=old)[0].status_code == 401
    assert alone.ask("GET", "/positions", "vera")[0].status_code == 200


def test_the_door(tmp_path):
    url = f"sqlite:///{tmp_path}/tradelab.db"
    Database(url).close()
    with world(url, tmp_path, api=ApiSettings(port=0, rate=60., burst=3)) as made:
        found = [made.ask("GET", "/positions", "vera")[0] for _ in range(5)]
        assert [each.status_code for each in found] == [200, 200, 200, 429, 429]
        assert found[-1].json()["error"].startswith("too many requests: wait")
        assert found[-1].headers["Retry-After"] == "1"
        assert made.ask("GET", "/health/live")[0].status_code == 200 # probes are not counted
    with world(url, tmp_path, api=ApiSettings(port=0, allowed=("10.0.0.0/8",))) as made:
        found, said = made.ask("POST", "/emergency", "ada", {"reason": "why"})
        assert (found.status_code, said) == (403, {"error": "this address may not ask"})
        assert made.audit()[-1]["text"] == "this address may not ask"


def test_bodies_and_headers(alone):
    def post(content, **headers):
        found = alone.client.post("/api/v1/emergency", content=content, headers=headers | {
            "Authorization": f"Bearer {alone.token('ada')}", "Content-Type": "application/json"})
        return found.status_code, found.json()["error"]
    assert post(b"{") == (400, "the body is no JSON")
    assert post(b"\xff\xfe") == (400, "the body is no JSON")
    assert post(b'{"reason": "x", "hope": 1}')[0] == 422
    assert post(b"x" * 1_000_001) == (413, "a body has at most 1,000,000 bytes")
    assert post(b"x" * 65_536 for _ in range(20)) == (413, "a body has at most 1,000,000 bytes") # no length is said
    found, _ = alone.ask("GET", "/nothing", "ada")
    assert found.json() == {"error": "there is no /api/v1/nothing"}
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert found.headers["x-content-type-options"] == "nosniff"
    old, _ = alone.ask("GET", "/api/system/status", "vera")
    assert (old.status_code, old.headers["deprecation"]) == (200, "@1796083200")
    assert "deprecation" not in alone.ask("GET", "/system/status", "vera")[0].headers
    cookie = {"Cookie": f"tradelab={alone.token('ada')}"}
    assert alone.client.get("/api/v1/positions", headers=cookie).status_code == 200
    assert alone.client.post("/api/v1/orders/cancel-all", headers=cookie).json()["error"].startswith("with a cookie")


def test_a_ledger_that_hangs_is_said_and_reading_goes_on(alone):
    alone.api.threads.limit = .3
    with Operations(alone.database)._alone(): # somebody holds it
        found, said = alone.ask("PUT", "/thresholds/drawdown_ratio", "ada", {"warning": .05, "critical": .1})
        assert found.status_code == 503
        assert "ledger" in said["error"]
        assert alone.ask("GET", "/system/status", "vera")[0].status_code == 200
    alone.api.threads.limit = 10.
    assert alone.ask("PUT", "/thresholds/drawdown_ratio", "ada", {"warning": .05, "critical": .1})[0].status_code == 200


def test_what_cannot_be_is_one_sentence_before_anything_starts(tmp_path):
    def refused(**given):
        with pytest.raises(ConfigurationError) as caught: check_api(Settings(api_secret=SecretStr(SECRET), **given))
        return str(caught.value)
    with pytest.raises(ConfigurationError, match="api_secret is too weak"):
        check_api(Settings(api_secret=SecretStr("x")))
    assert "belong together" in refused(api=ApiSettings(certificate=Path("a.pem")))
    assert "cannot be used" in refused(api=ApiSettings(certificate=Path("a.pem"), certificate_key=Path("b.pem")))
    with create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"api: nobody can listen at 127.0.0.1:{port}" in refused(api=ApiSettings(port=port))
    assert "are both 8000" in refused(api=ApiSettings(port=8_000))


def owners_examples(here, session):
    "What the owner's documents ask for"
    found = here.ask("GET", "/api/system/status", "vera")[1]
    assert {"system_status", "active_alerts"} <= set(found)
    assert [each["session"] for each in found["sessions"]] == [session]
    def measured(): return here.ask("GET", "/api/system/metrics?hours=48", "vera")[1]
    until(lambda: measured()["performance"][session]["candles"])
    found = measured()
    signal = {"symbol": "BTCUSDT", "action": "buy", "position_size": .05, "confidence": .8}
    before = len(here.commands())
    found = here.ask("POST", "/api/risk/validate-signal", "vera", signal)[1]
    assert found["valid"] in (True, False)
    assert found["symbol"] == "BTC/USDT:USDT"
    assert not here.ask("POST", "/risk/validate-signal", "vera", signal | {"position_size": 9.})[1]["valid"]
    assert len(here.commands()) == before


def reads(here, session):
    "All routes that only read, of a session that trades"
    for path in ("/positions", "/orders", "/orders?state=all", "/equity", "/balance", f"/sessions/{session}",
                 f"/sessions/{session}/why", "/risk/limits", "/risk/report", "/risk/mode", "/risk/breakers",
                 "/history/trades?limit=2", "/history/decisions", "/history/emergencies", "/history/circuit-breakers",
                 "/ml/predictions", "/ml/models", "/venues", "/data/quality/BTC%2FUSDT%3AUSDT", "/data/sources",
                 "/metrics", "/alerts?all=true", "/jobs", "/thresholds", "/system/logs", "/system/version"):
        found, said = here.ask("GET", path, "vera")
        assert found.status_code == 200, (path, said)
    first = here.ask("GET", "/history/trades?limit=1", "vera")[1]
    second = here.ask("GET", f"/history/trades?limit=1&cursor={first['cursor']}", "vera")[1]
    assert first["items"] != second["items"]
    assert here.ask("GET", "/history/trades?cursor=x", "vera")[0].status_code == 422
    assert here.ask("GET", "/audit", "tom")[0].status_code == 403


def acts(here, session):
    "What has an effect has it once, and only if it was meant"
    found, said = here.ask("PUT", "/risk/mode", "tom", {"mode": "NO_ENTRY", "reason": "news"}, Idempotency_Key="mode-1")
    if found.status_code == 202: said = until(lambda: (row := here.ask("GET", f"/commands/{said['command']}", "tom")[1])
                                              ["answer"] and row)
    assert here.commands()[-1]["arguments"] == '{"state": "NO_ENTRY", "stricter": true}'
    assert here.commands()[-1]["id"] == "api-tom-mode-1"
    until(lambda: here.ask("GET", "/risk/mode", "vera")[1][0]["mode"] == "NO_ENTRY")
    assert here.ask("PUT", "/risk/mode", "tom", {"mode": "ACTIVE", "reason": "over"})[0].status_code == 403 # looser
    limits = {"limits": {"max_position": .2}, "reason": "nervous"}
    assert here.ask("POST", "/risk/update-limits", "ada", limits)[0].status_code in (200, 202)
    looser = {"limits": {"max_position": .9}, "reason": "bold"}
    assert here.ask("POST", "/risk/update-limits", "ada", looser)[0].status_code == 400 # it needs a key


def confirmed(here, session):
    "A code is somebody's, for one thing, for a minute, once"
    order, key = {"reason": "too large"}, {"Idempotency_Key": "halt-1"}
    seen = len(here.commands())
    found, plan = here.ask("POST", "/emergency", "tom", order, **key)
    assert found.status_code == 202
    assert plan["plan"].startswith(f"halt in {session}: Close everything")
    code = plan["confirm"]
    for name, body, more in (("ada", order, {}), ("tom", {"reason": "another"}, {}),
                             ("tom", order, {"X_Confirm": "000"})):
        assert here.ask("POST", "/emergency", name, body, **key | {"X_Confirm": code} | more)[0].status_code == 403
    here.ahead += 60_001
    stale, said = here.ask("POST", "/emergency", "tom", order, X_Confirm=code, **key)
    assert (stale.status_code, said["error"]) == (403, "the code has expired: ask for another")
    assert len(here.commands()) == seen
    code = here.ask("POST", "/emergency", "tom", order, **key)[1]["confirm"]
    answers = []
    def confirm(): answers.append(here.ask("POST", "/emergency", "tom", order, X_Confirm=code, **key)[0].status_code)
    both = [threading.Thread(target=confirm) for _ in range(2)]
    for each in both: each.start()
    for each in both: each.join()
    assert sum(each in (200, 202) for each in answers) == 1, answers
    assert len(here.commands()) == seen + 1
    again, _ = here.ask("POST", "/emergency", "tom", order, **key)
    assert again.headers["idempotent-replay"] == "true"
    other, said = here.ask("POST", "/emergency", "tom", {"reason": "another"}, **key)
    assert (other.status_code, len(here.commands())) == (422, seen + 1)
    assert {"planned", "refused", "done", "replayed"} <= {row["outcome"] for row in here.audit()}


def answered(here, path, body, **headers):
    "What a session says to what ada asks, when it has said it"
    found, said = here.ask("POST", path, "ada", body, **headers)
    assert found.status_code in (200, 202), said
    return until(lambda: here.ask("GET", f"/commands/{said['command']}", "vera")[1]["answer"])


def in_force(here): return here.ask("GET", "/risk/limits", "vera")[1][0]["limits"]["max_position"]


def tightened(here):
    "Stricter limits are taken at once; what cannot be is asked of no session"
    until(lambda: in_force(here) == .05)
    seen = len(here.commands())
    for limits, words in (({"max_position": 2.}, "max_position"), ({"hope": 1.}, "there is no limit 'hope'"),
                          ({"leverage": 9.}, "there is no limit 'leverage'"), ({"max_drawdown": 1.5}, "max_drawdown")):
        found, said = here.ask("POST", "/risk/update-limits", "ada", {"limits": limits, "reason": "bold"})
        assert found.status_code == 422
        assert words in said["error"]
    assert len(here.commands()) == seen
    said = answered(here, "/risk/update-limits", {"limits": {"max_position": .02}, "reason": "nervous"})
    assert said == "from the next decision on, to the end of this session: max_position 0.02, was 0.05"
    until(lambda: in_force(here) == .02)


def loosened(here):
    "Looser ones are an admin's, with a code: once, for nobody else, nothing else, and for a minute"
    path, key = "/risk/update-limits", {"Idempotency_Key": "looser-1"}
    body, seen = {"limits": {"max_position": .1}, "reason": "calm"}, len(here.commands())
    def refused(name, body, **headers):
        found, said = here.ask("POST", path, name, body, **headers)
        return found.status_code, said.get("error", "")
    assert refused("tom", body, **key)[0] == 403
    assert refused("ada", body)[0] == 400 # it needs a key
    found, plan = here.ask("POST", path, "ada", body, **key)
    assert found.status_code == 202
    assert plan["plan"].endswith("It may do more from its next candle on: max_position is 0.02 now")
    code = plan["confirm"]
    assert refused("otto", body, X_Confirm=code, **key)[0] == 403
    assert refused("ada", body | {"limits": {"max_position": .4}}, X_Confirm=code, **key)[0] == 403
    here.ahead += 60_001
    assert refused("ada", body, X_Confirm=code, **key) == (403, "the code has expired: ask for another")
    assert len(here.commands()) == seen
    code = here.ask("POST", path, "ada", body, **key)[1]["confirm"]
    said = answered(here, path, body, X_Confirm=code, **key)
    assert said == "from the next decision on, to the end of this session: max_position 0.1, was 0.02"
    until(lambda: in_force(here) == .1)
    again, _ = here.ask("POST", path, "ada", body, **key)
    assert again.headers["idempotent-replay"] == "true"
    assert refused("ada", body | {"reason": "another"}, **key)[0] == 422
    assert [json.loads(row["arguments"]) for row in here.commands()[seen:]] == [{"looser": True, "max_position": .1}]
    outcomes = [row["outcome"] for row in here.audit() if row["action"] == "POST /risk/update-limits"]
    assert outcomes == [*["refused"] * 4, "done", *["refused"] * 2, "planned", *["refused"] * 3, "planned", "done",
                        "replayed", "refused"]


def unsaid(here):
    "Who writes a looser limit into the table of commands and does not say that it is one, is refused by the session"
    ledger = Ledger(here.database)
    number = ledger.commands.ask(Asked("limits", "a test", "eve", session="momentum_test",
                                       arguments='{"max_position": 0.3}'))
    answer = until(lambda: ledger.commands.find(number=number)[0]["answer"])
    ledger.close()
    assert answer.startswith("refused: max_position 0.3 is looser than the 0.1 in force")


def limits_told(path, ledger):
    "What a session's limits were changed to, by the candle that was the first to be decided under them"
    taken = {row["number"] for row in ledger.commands.all() if not row["answer"].startswith("refused")}
    found, given = {}, {}
    for line in read(path):
        if line["kind"] == "received":
            for each in line["events"]:
                if each["type"] == "Command" and each["name"] == "limits" and each["number"] in taken:
                    given |= {name: value for name, value in each["arguments"].items() if name != "looser"}
        if line["kind"] == "decision" and given: found[line["open_time"]], given = given, {}
    return found


def largest(steps):
    "The largest position that was held in some steps, as a fraction of the equity"
    return (steps["position"].abs() * steps["close"] / steps["equity"]).max()


def alerts(here):
    operations = Operations(here.database)
    number = operations.raise_alert(Alert(0, clock(), "stop", "error", text="the stop was refused"))
    operations.close()
    until(lambda: here.ask("GET", "/system/status", "vera")[1]["active_alerts"])
    assert here.ask("POST", f"/alerts/{number}/acknowledge", "tom")[0].status_code == 200
    assert here.ask("POST", f"/alerts/{number}/acknowledge", "ada")[0].status_code == 409
    assert here.ask("POST", "/alerts/999/resolve", "tom")[0].status_code == 404
    assert here.ask("PUT", "/thresholds/hope", "ada", {"warning": 1, "critical": 2})[0].status_code == 422


@contextmanager
def listening(here):
    "What is told over SSE and over a WebSocket meanwhile"
    told = {"sse": [], "socket": []}

    def hear_sse():
        with httpx.stream("GET", f"http://127.0.0.1:{here.api.port}/api/v1/events", timeout=20.,
                          headers={"Authorization": f"Bearer {here.token('vera')}"}) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            for line in stream.iter_lines(): told["sse"].append(line)

    async def hear_socket():
        url = f"ws://127.0.0.1:{here.api.port}/api/v1/stream"
        headers = {"Authorization": f"Bearer {here.token('vera')}"}
        async with websockets.connect(url, additional_headers=headers) as one:
            async for text in one: told["socket"].append(json.loads(text))

    def quiet(work):
        try: work()
        except (httpx.HTTPError, OSError, websockets.WebSocketException): pass
    threads = [threading.Thread(target=quiet, args=(each,), daemon=True)
               for each in (hear_sse, lambda: asyncio.run(hear_socket()))]
    for each in threads: each.start()
    until(lambda: told["sse"] and told["socket"])
    yield told
    until(lambda: any("event: notice" in line for line in told["sse"])
          and any(each["event"] == "notice" for each in told["socket"]))


def test_a_session_that_trades_is_seen_and_asked():
    with example_session(400, .02) as place, world(place.database, place.sessions) as here:
        until(lambda: here.ask("GET", "/sessions", "vera")[1])
        owners_examples(here, place.session)
        until(lambda: len(here.ask("GET", "/history/trades", "vera")[1]["items"]) > 1)
        reads(here, place.session)
        alerts(here)
        with listening(here):
            acts(here, place.session)
            confirmed(here, place.session)
        with pytest.raises(websockets.InvalidStatus), asyncio.Runner() as runner:
            runner.run(websockets.connect(f"ws://127.0.0.1:{here.api.port}/api/v1/stream").__aenter__())


def test_limits_change_while_a_session_trades_and_it_decides_as_replay_and_backtest_do(tmp_path, monkeypatch):
    "Stricter, then looser, kept over a restart; every decision comes out the same, bit for bit"
    Database(url := f"sqlite:///{tmp_path}/tradelab.db").close()
    quick = {"waits": {"heartbeat": 50}, "say": lambda line: None}
    with localnet() as exchange, world(url, tmp_path / "sessions") as here:
        deeds = {number: partial(deed, here) for number, deed in ((15, tightened), (40, loosened), (45, unsaid))}
        for number, deed in deeds.items(): deed.__name__ = f"deed {number}"
        pausing = Pausing(deeds)
        first = session(exchange, tmp_path, pausing, **quick)
        asyncio.run(first.run(60))
        assert len(pausing.met) == 3
        again = session(exchange, tmp_path, id="", resume="momentum_test", **quick)
        asyncio.run(again.run(20))
        assert again.trader.limits.max_position == .1
        path, journal = tmp_path / "sessions" / "momentum_test" / "recording.zst", again.ledger.journal(again.id)
        changes = limits_told(path, again.ledger)
    assert [journal.index.get_loc(pd.Timestamp(each, unit="ms", tz="UTC")) for each in changes] == [15, 40]
    assert .03 < largest(journal[:16]) < .055
    assert largest(journal[20:41]) < .025
    assert .06 < largest(journal[45:60]) < .11
    assert .06 < largest(journal[62:]) < .11
    recorded, recomputed = replay(path, trader())
    assert first_difference(recorded, recomputed) is None
    assert first_other_action(path, trader()) == ""
    proven = Recording(path)
    assert unproven(proven, replay(proven, trader())[0], journal) == ""

    class Told(Trader):
        def on(self, event):
            given = changes.get(event.open_time) if isinstance(event, Candles) else None
            if given: super().on(LimitsChange(changed(self.limits, given), "as the session was told", event.open_time))
            return super().on(event)
    monkeypatch.setattr("tradelab.sim.backtest.Trader", Told)
    expected = backtest(Momentum(5, .005), MARKET, MARKET.index[HISTORY], funding=funding(MARKET, seed=0),
                        engine="event", baselines=())
    assert first_difference(expected.journal[:len(journal)], journal) is None


def test_candles_are_judged_and_not_kept(alone):
    def ask(*candles): return alone.ask("POST", "/data/validate", "vera", {"candles": candles})
    good, bad = [1704067200000, 100, 101, 99, 100.5, 12], [1704070800000, 100, 90, 99, 101, 9]
    found, said = ask(good, bad)
    assert found.status_code == 200
    assert said["findings"]
    assert said["consistency"] < 1.
    assert "whole milliseconds" in ask(good, [1e300, *bad[1:]])[1]["error"]
    assert "at most 20,000" in ask([0, *good[1:]], bad)[1]["error"]


def test_what_a_token_says_is_read_the_same_by_everybody(alone):
    token, account = read_token(alone.token("vera"), "access", SECRET, alone.api.register, clock())
    assert (token.person, account.role) == ("vera", "viewer")


def test_an_api_that_is_asked_hangs_and_is_killed_changes_no_session(project):
    "What it decides and orders is what it decides and orders where there is none"
    (project / "alone").mkdir()
    journal, orders = run_alone(project / "alone", 30)
    port = free_port()
    Database(settings().database).close() # or it is made while others open it
    with localnet() as exchange, served(api_secret=SECRET, api__port=port, api__rate=1e6, api__burst=1000) as process:
        accounts = Accounts(settings().database)

        def ask():
            accounts.put(replace(ACCOUNTS["viewer"], name="vera"))
            now = clock()
            token = issue(Token("vera", "access", "x", "y", now, now + 60_000), SECRET, 0)
            headers = {"Authorization": f"Bearer {token}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", headers=headers) as client:
                until(lambda: client.get("/sessions").status_code == 200)
                assert {client.get("/system/status").status_code for _ in range(50)} == {200}

        def hang(): process.process.send_signal(signal.SIGSTOP)

        def kill(): process.process.kill()
        pausing = Pausing({5: ask, 12: hang, 20: kill})
        live = session(exchange, project, pausing, say=lambda line: None)
        asyncio.run(live.run(30))
        accounts.close()
    assert pausing.met == ["ask", "hang", "kill"]
    assert live.ledger.journal(live.id).equals(journal)
    assert orders_at(exchange) == orders


def asking(port):
    "What asks a process that serves, as ada"
    accounts = Accounts(settings().database)
    accounts.put(replace(ACCOUNTS["admin"], name="ada"))
    accounts.close()
    now = clock()
    token = issue(Token("ada", "access", "x", "y", now, now + 600_000), SECRET, 0)
    return httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", headers={"Authorization": f"Bearer {token}"})


@pytest.mark.integration
def test_a_job_is_started_by_its_name_once_as_the_schedule_starts_it(project):
    for name in ("hang", "train"): # both until a file says so
        notebook(name, f"import os, time\nopen('began-{name}', 'a').write('x')\n"
                       f"while not os.path.exists('end-{name}'): time.sleep(.05)")
    nightly = 'cron = "0 0 1 1 *"', "time_limit = 5"
    write("[schedule.nightly]", 'notebook = "hang"', *nightly, "[schedule.weekly]", 'notebook = "train"', *nightly)
    Database(settings().database).close()
    port = free_port()
    given = {"api_secret": SECRET, "api__port": port, "api__rate": 1e6, "api__burst": 1000}
    with served(**given), asking(port) as client:
        until(lambda: create_connection(("127.0.0.1", port), 1).close() is None)
        until(lambda: client.get("/jobs").json() == {"items": [], "cursor": None})
        key = {"Idempotency-Key": "run-1"}
        begun = client.post("/jobs/nightly/run", headers=key)
        assert (begun.status_code, begun.json()["answer"]) == (202, "job nightly has begun")
        def rows(**asked): return client.get("/jobs", params=asked).json()["items"]
        run, = rows()
        assert (run["number"], run["job"], run["state"]) == (begun.json()["run"], "nightly", "running")
        again = client.post("/jobs/nightly/run", headers=key)
        assert (again.json(), again.headers["idempotent-replay"]) == (begun.json(), "true")
        other = client.post("/jobs/weekly/run", headers=key) # the key is that of another request
        assert other.status_code == 422
        busy = client.post("/jobs/nightly/run")
        assert (busy.status_code, busy.json()["error"]) == (409, "job nightly is running already")
        for name, status in (("nigthly", 404), ("hang", 404), ("..%2Fhang", 404), ("ledger%20backup", 404)):
            assert client.post(f"/jobs/{name}/run").status_code == status, name
        assert client.post("/ml/retrain", json={"job": "nightly"}).status_code == 404
        training = client.post("/ml/retrain").json()
        assert training["job"] == "weekly"
        until(lambda: Path("began-train").exists() and Path("began-hang").exists(), 60.)
        for name in ("hang", "train"): Path(f"end-{name}").touch()
        until(lambda: [row["state"] for row in rows()] == ["done", "done"], 60.)
        assert [row["number"] for row in rows(job="weekly")] == [training["run"]]
        assert Path("began-hang").read_text() == "x"
        audit = [row for row in client.get("/audit").json()["items"] if row["action"] == "POST /jobs/run"]
    assert {(row["person"], row["target"], row["outcome"]) for row in audit} >= {
        ("ada", "nightly", "done"), ("ada", "nightly", "replayed"), ("ada", "nightly", "refused"),
        ("ada", "weekly", "refused"), ("ada", "hang", "refused")}


def test_without_a_schedule_no_job_is_started_and_the_answer_says_what_to_do(alone):
    for path in ("/jobs/nightly/run", "/ml/retrain"):
        found, said = alone.ask("POST", path, "ada")
        assert found.status_code == 409
        assert "tradelab.toml, and start tradelab serve anew" in said["error"]
    assert [row["outcome"] for row in alone.audit()] == ["refused"] * 2


def test_serve_says_where_it_answers_and_starts_nothing_where_it_cannot(project):
    assert "api_secret is too weak" in said_by_refused(metrics_port=free_port(), api_secret="secret")
    with create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"nobody can listen at 127.0.0.1:{port}" in said_by_refused(metrics_port=free_port(), api_secret=SECRET,
                                                                          api__port=port)
