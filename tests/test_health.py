"The table of dependencies, walked through: each real server is stopped, hung and brought back, and health says it"
import asyncio
import json
import threading
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from postgres import database_at
from pydantic import SecretStr
from servers import free_port, hanging, influxdb, redis, victoria_metrics, webhook
from test_outages import Told

from tradelab.config import settings
from tradelab.database.operations import Operations
from tradelab.database.records import Delivery, Service, clock
from tradelab.live.ledger import Ledger
from tradelab.ops.health import DEPENDENCIES, DOWN, OFF, UP, Examiner, facts, session_words, venue_words

pytestmark = pytest.mark.integration
LIMIT = 1.5


def look(here): return asyncio.run(Examiner(here, LIMIT)())


def how(found, name): return next(each for each in found.found if each.name == name)


@pytest.fixture
def here(tmp_path):
    "Of a project with a ledger, in which nothing runs"
    here = settings().model_copy(update={"database": f"sqlite:///{tmp_path}/tradelab.db", "logs": tmp_path / "logs",
                                         "sessions": tmp_path / "sessions"})
    Ledger(here.database).close()
    return here


def states(found): return {each.name: each.state for each in found.found}


QUIET = {"ledger": UP, "disk": UP, "session": OFF, "venue": OFF, "serve": OFF, "watchdog": OFF, "telegram": OFF,
         "influx": OFF, "redis": OFF}


def down(here, name, words, **others):
    "Exactly this one is away, and the words say why, and what degrades"
    found = look(here)
    assert states(found) == QUIET | others | {name: DOWN}
    assert words in how(found, name).text
    table = DEPENDENCIES[name.partition(" ")[0]]
    assert json.loads(found.json())["degraded"] == {name: table.degrades}
    assert f"{how(found, name).text}; {table.degrades}" in str(found)
    assert found.ready == (not table.needed)
    return found


def test_all_of_it_is_there_or_nobody_asked_for_it(here):
    found = look(here)
    assert states(found) == QUIET
    assert found.ready


def test_a_ledger_that_is_stopped_hangs_and_is_back(here, own_server):
    with database_at(own_server.url, "health") as url:
        here = here.model_copy(update={"database": url})
        Ledger(url).close()
        assert states(look(here)) == QUIET
        own_server.stop()
        try: down(here, "ledger", "cannot be read: connection failed")
        finally: own_server.start()
        assert states(look(here)) == QUIET
    with hanging() as port:
        url = f"postgresql://postgres:planted-0123@127.0.0.1:{port}/postgres"
        found = down(here.model_copy(update={"database": url}), "ledger", "no answer within 1.5 s")
    assert how(found, "session").text == "not known while the ledger cannot be read"
    assert "planted" not in found.json()


@pytest.mark.parametrize("server", [influxdb, victoria_metrics])
def test_a_database_of_figures_that_is_killed_hangs_and_is_back(here, server):
    with server() as there:
        here = here.model_copy(update={"influx_url": there.url})
        assert states(look(here)) == QUIET | {"influx": UP}
        there.hang()
        down(here, "influx", "no answer")
        there.go_on()
        assert states(look(here)) == QUIET | {"influx": UP}
        there.kill()
        down(here, "influx", "annot connect")
        there.start()
        assert states(look(here)) == QUIET | {"influx": UP}
    with webhook(status=503) as wrong:
        down(here.model_copy(update={"influx_url": wrong.url}), "influx", "it answers 503")


def test_a_redis_that_is_killed_hangs_wants_a_password_and_is_back(here):
    with redis("--requirepass", "planted-0123") as there:
        url = f"redis://:planted-0123@127.0.0.1:{there.port}/0"
        asked = here.model_copy(update={"redis_url": SecretStr(url)})
        assert states(look(asked)) == QUIET | {"redis": UP}
        there.hang()
        down(asked, "redis", "no answer within 2 s")
        there.go_on()
        assert states(look(asked)) == QUIET | {"redis": UP}
        other = here.model_copy(update={"redis_url": SecretStr(url.replace("planted", "wrong"))})
        found = down(other, "redis", "invalid username-password pair")
        assert "0123" not in found.json() + str(found)
        there.kill()
        down(asked, "redis", "onnect")
        there.start()
        assert states(look(asked)) == QUIET | {"redis": UP}


class Mail:
    async def handle_DATA(self, *_): return "250 taken"


def test_a_mail_server_that_is_stopped_hangs_and_is_back(here):
    port = free_port()
    url = f"mailto://127.0.0.1:{port}/?from=a@example.org&to=b@example.org"
    here = here.model_copy(update={"alert_url": SecretStr(url)})
    server = Controller(Mail(), hostname="127.0.0.1", port=port)
    server.start()
    try: assert states(look(here)) == QUIET | {"channel mailto": UP}
    finally: server.stop()
    down(here, "channel mailto", "onnect")
    server = Controller(Mail(), hostname="127.0.0.1", port=port)
    server.start()
    try: assert states(look(here)) == QUIET | {"channel mailto": UP}
    finally: server.stop()
    with hanging() as silent:
        url = f"mailto://127.0.0.1:{silent}/?from=a@example.org&to=b@example.org"
        down(here.model_copy(update={"alert_url": SecretStr(url)}), "channel mailto", "no answer within 1.5 s")


def test_a_webhook_that_is_away_and_one_that_took_no_message(here):
    with webhook() as hook:
        urls = f"json://127.0.0.1:{hook.port}/Tk-planted-0123 tgram://123456789:planted-0123/77"
        here = here.model_copy(update={"alert_url": SecretStr(urls)})
        both = {"channel json": UP, "channel tgram": UP}
        assert states(look(here)) == QUIET | both
        Operations(here.database).delivered("", [Delivery(clock(), "json", "hello", False)])
        found = down(here, "channel json", "the last message did not arrive, 0 s ago", **both)
        Operations(here.database).delivered("", [Delivery(clock() + 1, "json", "hello")])
        assert states(look(here)) == QUIET | both
    found = down(here, "channel json", "onnect", **both)
    assert "planted" not in found.json() + str(found)


def test_a_telegram_that_is_away_hangs_refuses_the_token_and_is_back(here):
    token = "123456789:planted-0123456789"
    asked = here.model_copy(update={"telegram_token": SecretStr(token)})
    with webhook(answer=b'{"ok":true,"result":{"username":"bot"}}') as double:
        there = asked.model_copy(update={"telegram_api": double.url})
        assert states(look(there)) == QUIET | {"telegram": UP}
        assert double.heard[0][0] == f"/bot{token}/getMe"
        double.status, double.answer = 401, b'{"ok":false}'
        down(there, "telegram", "telegram_token is not known there: tradelab secrets set telegram_token")
        double.status = 429
        down(there, "telegram", "it answers 429")
        double.status, double.answer = 200, b"<html>"
        down(there, "telegram", "it answers 200")
    found = down(there, "telegram", "annot connect")
    with hanging() as port:
        more = down(asked.model_copy(update={"telegram_api": f"http://127.0.0.1:{port}"}), "telegram", "no answer")
    assert "planted" not in found.json() + more.json()


def test_services_that_beat_no_more_and_a_disk_that_takes_nothing(here):
    operations = Operations(here.database)
    for name in ("serve", "watchdog"):
        beats = Service(name, "elsewhere process 7", 1, clock())
        operations.beat(beats)
        assert states(look(here)) == QUIET | {name: UP}
        operations.beat(Service(name, "elsewhere process 7", 1, clock() - 30_000))
        down(here, name, f"{name} was heard of 30 s ago")
        operations.end(beats)
        assert states(look(here)) == QUIET
    (Path(here.logs).parent / "file").touch()
    down(here.model_copy(update={"logs": Path(here.logs).parent / "file" / "logs"}), "disk", "Not a directory")


def test_an_exchange_that_is_away_for_a_while_is_down_and_up_again(here, tmp_path):
    trading = threading.Thread(target=lambda: Told(tmp_path, [("too_many_requests", {"lasts_ms": 1_000})]))
    trading.start()
    seen = []
    while trading.is_alive():
        trading.join(.1) # it shares this processor
        known = facts(here, clock())
        if not session_words(known): continue
        try: seen.append((UP, venue_words(known)))
        except LookupError as error: seen.append((DOWN, str(error)))
    trading.join()
    assert (DOWN, "session outage is guarded: limited") in [(state, text.partition(" (")[0]) for state, text in seen]
    assert seen[-1][0] == UP
    assert seen[-1][1].startswith("localnet http://127.0.0.1:")
    assert states(look(here)) == QUIET                                      # it ended in order
