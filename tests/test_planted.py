"""A planted passphrase, key and secret are looked for in everything that good and failing runs leave behind: files,
terminals, arguments of processes, tracebacks, what objects say of themselves. Real jobs over a real localnet"""
import base64
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import zstandard

from tradelab import secrets
from tradelab.config import settings
from tradelab.instruments import BITCOIN
from tradelab.localnet.server import Localnet
from tradelab.localnet.sources import WallClock
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1
from tradelab.secrets import COSTS, set_secret
from tradelab.settings import CostModel

pytestmark = pytest.mark.integration
SYMBOL = "BTC/USDT:USDT"
MARKET = ar1(200, seed=3)
KEY, SECRET, PASSPHRASE = "Kq7planted_key-0123", 'Zs9planted"secret/0123', "Wp3 planted passphrase %"
WRONG = "Xx5 planted and wrong"
TOKEN = "Tk4planted-token-0123"
PLANTED = KEY, SECRET, PASSPHRASE, WRONG, TOKEN


def spellings(word):
    "The ways in which a program may write a word"
    raw = word.encode()
    return {raw, json.dumps(word)[1:-1].encode(), repr(word)[1:-1].encode(), quote(word, safe="").encode(),
            json.dumps(json.dumps(word))[3:-3].encode(), raw.hex().encode(), base64.b64encode(raw), word[3:12].encode()}


SOUGHT = set().union(*map(spellings, PLANTED))


def found_in(content):
    "What of the planted words is in these bytes"
    return sorted(each for each in SOUGHT if each in content)


def plain(path):
    "The contents of a file, unpacked"
    content = path.read_bytes()
    if path.suffix != ".zst": return content
    return zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True).read()


class Watcher:
    "Reads what every process below this one was started with, again and again, while jobs run"

    def __enter__(self):
        self.seen, self.over = {}, threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self):
        while not self.over.is_set():
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if folder.stat().st_uid != os.geteuid(): continue
                    words = (folder / "cmdline").read_bytes()
                    if b"planted.ipynb" in words or b"kernel" in words: self.seen[folder.name] = words
                except OSError: continue
            self.over.wait(.05)

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


PROGRAM = (sys.executable, "-c",
           "from tradelab import command, secrets; secrets.COST = secrets.COSTS[0]; command.main()")


def tradelab(*words, **given):
    "The command of a person; what it shows"
    return subprocess.run([*PROGRAM, *words], capture_output=True, timeout=600, stdin=subprocess.DEVNULL, **given)


@pytest.fixture
def exchange():
    "In the place of the testnet, which keeps real time"
    with Localnet(source=WallClock(), profile="book", api_key=KEY, api_secret=SECRET) as net: yield net


@pytest.fixture
def replayed():
    "With candles that wait for nobody's clock"
    with Localnet({SYMBOL: MARKET}, {}, [BITCOIN], CostModel(), start=int(times(MARKET)[100]), api_key=KEY,
                  api_secret=SECRET) as net:
        yield net


def configure(project, net, more=""):
    (project / "tradelab.toml").write_text(f'venue = "testnet"\nlog_level = "DEBUG"\ntestnet_rest = "{net.url}"\n'
                                           f'testnet_stream = "{net.url.replace("http", "ws")}"\n{more}')


@pytest.fixture
def kept(project, exchange, monkeypatch):
    "A project whose keys are in the encrypted file"
    monkeypatch.setattr(secrets, "COST", COSTS[0])
    (project / "word").write_text(PASSPHRASE)
    (project / "word").chmod(0o600)
    monkeypatch.setenv("TRADELAB_PASSPHRASE_FILE", str(project / "word"))
    configure(project, exchange, '[alerts]\nlevel = "info"\n')
    for name, value in (("testnet_key", KEY), ("testnet_secret", SECRET), ("alert_url", f"json://127.0.0.1:9/{TOKEN}")):
        set_secret(settings(), name, value)
    return project


LIVE = "live", "-p", "symbol", SYMBOL, "-p", "timeframe", "1m", "-p", "candles", "0", "--output"


def live(name, **variables):
    "The job of a live session, with these variables beside those that there are"
    return tradelab(*LIVE, f"{name}.planted.ipynb", env=os.environ | variables)


def live_and_stopped(name, project):
    "The same, until it runs and a person stops it"
    ran = subprocess.Popen([*PROGRAM, *LIVE, f"{name}.planted.ipynb"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    timer = threading.Timer(600, ran.kill)
    timer.start()
    while not any(b"running" in path.read_bytes() for path in project.glob("sessions/*/session.json")):
        assert ran.poll() is None, ran.communicate()
        time.sleep(.05)
    tradelab("stop")
    stdout, stderr = ran.communicate()
    timer.cancel()
    return subprocess.CompletedProcess(ran.args, ran.returncode, stdout, stderr)


SHOWN = """
import asyncio
import gc
from dataclasses import replace
from tradelab.config import settings, venue_for
from tradelab.inputs import venue_at
from tradelab.live.ledger import Ledger
from tradelab.live.session import Session
from tradelab.log import configure
from tradelab.runs.registry import load
from tradelab.secrets import open_box, passphrase_for, with_keys
configure()
here = with_keys(settings())
place = replace(venue_for(here), name="localnet", rest="{url}", stream="{url}".replace("http", "ws"))
box = open_box(here.secrets_file, passphrase_for(here))
async def trade():
    venue = venue_at(place)
    await venue.connect(["BTC/USDT:USDT"])
    run = load("tradelab.strategies.example:SmaCross(fast=2, slow=5)")
    session = Session(run.trader(10_000., venue.instruments(["BTC/USDT:USDT"])), venue, Ledger(here.database),
                      here.sessions, id="shown", timeframe="1h")
    asked = asyncio.create_task(session.run(20))
    while asked.done() is False and not any(type(each).__name__ == "Core" for each in gc.get_objects()):
        await asyncio.sleep(.01)
    core = next(each for each in gc.get_objects() if type(each).__name__ == "Core")
    print(await asked)
    parts = [each for each in gc.get_objects() if str(type(each).__module__).startswith("tradelab")]
    assert {{"Core", "Session", "BinanceVenue", "VenueSettings", "Box"}} <= {{type(each).__name__ for each in parts}}
    for each in parts:
        print(repr(each), str(each))
        if hasattr(each, "apiKey"): continue # ccxt's client has to know what it signs with, and does not say so
        print(*map(repr, getattr(each, "__dict__", {{}}).values()))
    print(here.model_dump())
asyncio.run(trade())
"""

REFUSED = """
from tradelab.config import settings, venue_for
from tradelab.secrets import with_keys
venue_for(with_keys(settings({})))
"""


def python(code): return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=600)


def plant(path, words):
    "A file that only its owner may read; its name"
    path.write_text(words)
    path.chmod(0o600)
    return str(path)


class Runs:
    "What runs have shown, by their names"

    def __init__(self): self.shown = {}

    def keep(self, name, ran, sentence=b"", code=1):
        for stream in ("stdout", "stderr"): self.shown[f"{name}: {stream}"] = getattr(ran, stream)
        assert ran.returncode == code, (name, ran.stdout[-2000:], ran.stderr[-2000:])
        assert sentence in ran.stdout + ran.stderr, (name, ran.stderr[-2000:])


def good_and_failing(project, exchange, replayed, keep):
    "Runs that trade, are refused before they start, and fail while they run"
    keep("live", live_and_stopped("good", project), code=0)
    keep("list", tradelab("secrets", "list"), b"testnet_secret", 0)
    keep("alerts", tradelab("alerts", "test"), b"json did not take the message: ")
    keep("no alerts", live("alerts", TRADELAB_ALERT_URL=f"nonsense://{TOKEN}"), b"is no address that apprise knows")
    keep("no token", live("token", TRADELAB_ALERT_URL=TOKEN), b"is no address that apprise knows")
    keep("rotate", tradelab("secrets", "rotate"), b"has a new data key", 0)
    keep("shown", python(SHOWN.format(url=replayed.url)), b"fills", 0)
    keep("wrong passphrase", live("wrong", TRADELAB_PASSPHRASE_FILE=plant(project / "wrong", WRONG)), b"does not open")
    keep("a passphrase, not its file", live("mistaken", TRADELAB_PASSPHRASE_FILE=PASSPHRASE), b"that is not there")
    keep("no such setting", live("setting", TRADELAB_PASSPHRASE=PASSPHRASE), b"is not a setting")
    keep("mainnet", live("mainnet", TRADELAB_VENUE="mainnet", TRADELAB_MAINNET_KEY=KEY, TRADELAB_MAINNET_SECRET=SECRET),
         b"mainnet_confirmation does not name the account")
    address = f"https://{quote(KEY, safe='')}:{quote(SECRET, safe='')}@fapi.binance.com"
    keep("keys in an address", live("address", TRADELAB_TESTNET_REST=address), b"without a user")
    keep("traceback", python(REFUSED.format('passphrase_file="wrong"')), b"Traceback")
    keep("traceback of mainnet", python(REFUSED.format(f'venue="mainnet", mainnet_key={KEY!r}')), b"Traceback")
    keep("refused by the exchange", live("keys", TRADELAB_TESTNET_SECRET=WRONG))
    exchange.__exit__(None, None, None)
    keep("nobody there", live("nobody"))
    whole = (project / "tradelab.secrets").read_text()
    (project / "tradelab.secrets").write_text(whole[:-20])
    keep("cut off", live("cut"), b"is not as tradelab wrote it")
    (project / "tradelab.secrets").write_text(whole)


KINDS = ("tradelab.jsonl", "tradelab.db", ".zst", "session.json", "journal.csv", ".ipynb", ".html", "tradelab.secrets",
         "arguments", "stderr")


def test_what_is_planted_is_found_nowhere(kept, exchange, replayed):
    runs = Runs()
    with Watcher() as watcher: good_and_failing(kept, exchange, replayed, runs.keep)
    artefacts = runs.shown | {f"process {number}: arguments": words for number, words in watcher.seen.items()}
    artefacts |= {str(path.relative_to(kept)): plain(path) for path in kept.rglob("*")
                  if path.is_file() and path.name not in ("word", "wrong")}
    print(*artefacts, sep="\n")
    assert [kind for kind in KINDS if not any(kind in name for name in artefacts)] == []
    assert len(artefacts) >= 30
    assert b"json did not take an alert (" in b"".join(artefacts.values())
    assert {name: found_in(content) for name, content in artefacts.items() if found_in(content)} == {}


def test_what_is_sought_would_be_found():
    "The search itself: each spelling of each word, in the middle of something"
    for word in PLANTED:
        for spelling in spellings(word): assert found_in(b"\0before " + spelling + b" after") != []
    assert found_in(b"planted") == []
