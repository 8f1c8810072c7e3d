"Real money takes the venue by name and a sentence that names the account; without both no socket is opened"
import asyncio
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tradelab.config import CONFIRMATION, UNCONFIRMED, settings, venue_for
from tradelab.errors import ConfigurationError
from tradelab.inputs import venue_at
from tradelab.live.ledger import Ledger
from tradelab.live.venue import Outcome
from tradelab.localnet.server import Localnet
from tradelab.localnet.sources import WallClock
from tradelab.orders import Order

pytestmark = pytest.mark.integration
SYMBOL = "BTC/USDT:USDT"
KEY, SECRET = "Kq7Real9-and-the-rest-of-it", "a-secret-of-the-same-account"
YES = CONFIRMATION.format(KEY[:8])
WRONG = ["", KEY[:8], "yes", "true", YES + ".", YES.lower(), CONFIRMATION, CONFIRMATION.format("ABCDEFGH"),
         CONFIRMATION.format(KEY[:7]), CONFIRMATION.format(KEY)]
WATCHED = """
import sys
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
sys.addaudithook(lambda event, said: print("NETWORK", event, said[1:], file=sys.stderr) if event in NETWORK else None)
from tradelab import command
command.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def mainnet():
    "A localnet in its place: the adapter, the routes and the keys are those of mainnet"
    with Localnet(source=WallClock(), profile="book", api_key=KEY, api_secret=SECRET) as net: yield net


@pytest.fixture
def there(project, mainnet):
    "A project with keys of that account"
    stream = mainnet.url.replace("http", "ws")
    (project / "tradelab.toml").write_text(f'mainnet_rest = "{mainnet.url}"\nmainnet_stream = "{stream}"\n')
    (project / ".env").write_text(f"TRADELAB_MAINNET_KEY={KEY}\nTRADELAB_MAINNET_SECRET={SECRET}\n")
    (project / ".env").chmod(0o600)
    return project


def watched(*words, **variables):
    "The command of a person, in a process that says when it asks for a network"
    return subprocess.run([sys.executable, "-c", WATCHED, *words], capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL, env=os.environ | variables)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_name_the_account_confirms_nothing(there, wrong):
    with pytest.raises(ConfigurationError) as refused: venue_for(settings(venue="mainnet", mainnet_confirmation=wrong))
    assert str(refused.value) == f'venue is "mainnet", which is real money: {UNCONFIRMED}'


@pytest.mark.parametrize("words", [("live", "--live"), ("run", "live", "-p", "venue", "mainnet"),
                                   ("live", "--live", "-p", "settings", "real"), ("live",)],
                         ids=["--live", "-p venue", "section", "settings"])
def test_an_unconfirmed_start_opens_no_socket_and_leaves_nothing(there, words):
    said, venue = there / "tradelab.toml", 'venue = "mainnet"\n' if words == ("live",) else ""
    said.write_text(f"{venue}{said.read_text()}[settings.real]\ndeposit = 100.0\n")
    ran = watched(*words)
    assert ran.returncode == 1
    assert ran.stderr.strip() == f'Error: venue is "mainnet", which is real money: {UNCONFIRMED}'
    assert not (there / "sessions").exists()


def test_the_watch_sees_a_network(mainnet):
    "So that the test above could fail"
    code = f"{WATCHED.partition('from tradelab')[0]}import urllib.request as r; r.urlopen('{mainnet.url}/fapi/v1/ping')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "NETWORK socket.connect" in ran.stderr


@pytest.mark.parametrize("spoilt, why", [
    (dict(DRY_RUN="true"), "DRY_RUN in the environment forbids it"),
    (dict(TRADELAB_MAINNET_REST="http://example.com"), "http://example.com can be read and changed on the way"),
    (dict(TRADELAB_MAINNET_KEY="another-key-of-another-account"), UNCONFIRMED)])
def test_a_confirmed_start_is_refused_for_what_else_is_wrong(there, spoilt, why):
    ran = watched("live", "--live", TRADELAB_MAINNET_CONFIRMATION=YES, **spoilt)
    assert ran.returncode == 1
    assert why in ran.stderr
    assert "NETWORK" not in ran.stderr


def test_keys_that_others_may_read_are_refused(there):
    (there / ".env").chmod(0o644)
    ran = watched("live", "--live", TRADELAB_MAINNET_CONFIRMATION=YES)
    assert ran.stderr.strip() == ('Error: venue is "mainnet", which is real money: others may read .env, which holds '
                                  "keys of mainnet: chmod go-r .env")


def test_a_drill_is_held_nowhere_near_real_money(there):
    ran = watched("drill", "-p", "venue", "mainnet", TRADELAB_MAINNET_CONFIRMATION=YES)
    assert "a drill closes every position of an account" in ran.stderr
    assert "NETWORK" not in ran.stderr


def typed(project, words):
    "What a terminal shows while a person starts a session there, and types this when asked"
    here, there = pty.openpty()
    ran = subprocess.Popen([sys.executable, "-c", WATCHED, "live", "--live", "-p", "policy", "tradelab.strategies."
                            "example:Momentum", "-p", "candles", "0", "-p", "timeframe", "1m"], stdin=there,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(here, words.encode() + b"\n")
    while ran.poll() is None and not any(project.glob("sessions/*/session.json")): time.sleep(.05)
    stop = [Path(sys.executable).parent / "tradelab", "stop"]
    if ran.poll() is None: subprocess.run(stop, check=True, capture_output=True)
    said = ran.communicate(timeout=120)
    for end in (here, there): os.close(end)
    return ran.returncode, *said


def test_a_person_at_a_terminal_names_the_account(there, mainnet):
    code, said, wrong = typed(there, KEY[:8])
    assert code == 0, wrong
    assert "This trades real money with tradelab.strategies.example:Momentum. The first eight characters" in said
    assert 'venue: mainnet (venue = "mainnet")' in said
    name, = Ledger(settings().database).sessions()
    assert Ledger(settings().database).session(name)["settings"]["venue"] == "mainnet"
    assert KEY[:8] not in Path("tradelab.toml").read_text()


def test_a_person_who_names_another_account_starts_nothing(there):
    code, _, wrong = typed(there, "ABCDEFGH")
    assert code == 1
    assert UNCONFIRMED in wrong
    assert "NETWORK" not in wrong
    assert not (there / "sessions").exists()


def test_a_confirmed_account_is_traded(there, mainnet):
    place = venue_for(settings(venue="mainnet", mainnet_confirmation=YES))
    async def trade():
        venue = venue_at(place)
        await venue.connect([SYMBOL])
        try:
            bought = await venue.place(Order("tl-real-1", SYMBOL, .01, False, 0, 20_000.))
            return bought, await venue.account()
        finally: await venue.close()
    bought, account = asyncio.run(trade())
    assert bought.outcome is Outcome.ACCEPTED
    assert account.positions == {SYMBOL: .01}


def test_no_adapter_is_made_for_an_account_that_nobody_has_confirmed(there):
    "The settings of a venue are the only way to an adapter, and they ask"
    place = venue_for(settings(venue="mainnet", mainnet_confirmation=YES))
    for change in ({"confirmation": ""}, {"confirmation": CONFIRMATION.format("ABCDEFGH")}):
        with pytest.raises(ConfigurationError) as refused: type(place)(**vars(place) | change)
        assert str(refused.value) == UNCONFIRMED
    with pytest.raises(ConfigurationError, match="fapi.binance.com is mainnet, which is real money, and venue is "):
        type(place)(**vars(place) | {"name": "localnet", "rest": "https://fapi.binance.com"})
