"A dry run: live public prices over real sockets, of a localnet in the place of mainnet, and an invented account"
import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from pydantic import SecretStr

from tradelab.config import VenueSettings, settings, venue_for
from tradelab.events import Fill
from tradelab.inputs import venue_at
from tradelab.instruments import BITCOIN
from tradelab.live.ledger import Ledger
from tradelab.live.session import Session, place_of
from tradelab.localnet.limits import LimitSettings
from tradelab.localnet.memory import LostMemoryError
from tradelab.localnet.server import TOKEN, Localnet, candles_left, find_or_start
from tradelab.localnet.sources import Follow, Patience
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1
from tradelab.runs.registry import load

pytestmark = pytest.mark.integration
SYMBOL, HISTORY = "BTC/USDT:USDT", 60
CANDLES = ar1(2_000, volatility=.01, seed=3)
OFF = LimitSettings(enforced=False)
TRADELAB = Path(sys.executable).parent / "tradelab"
FAST = "tradelab.strategies.example:Momentum(2, .001)"


@pytest.fixture
def mainnet():
    "An exchange in its place whose candles close when a test says so"
    with Localnet({SYMBOL: CANDLES}, start=int(times(CANDLES)[HISTORY]), limits=OFF, instruments=[BITCOIN]) as net:
        yield net


def told(net, path, method="POST", /, **words):
    "What the control port of an exchange answers"
    asked = Request(f"{net.control_url}/{path}", json.dumps(words).encode(), {TOKEN: net.token}, method=method)
    with urlopen(asked) as answer: return json.load(answer)


def close(net, count=1):
    "Let the next candles of an exchange close"
    told(net, "step", count=count)


PLACE = VenueSettings("dry_run", "a test", "http://127.0.0.1:0", "ws://127.0.0.1:0", SecretStr("localnet"),
                      SecretStr("localnet"))
PATIENCE = Patience(silence=30., close=.2, pause=.02, reply=10.)


def started(url, memory=None, continued=False):
    "The exchange of a dry run"
    follow = Follow(url, url.replace("http", "ws"), [SYMBOL], "1h", PATIENCE)
    return find_or_start(PLACE, {}, continued, source=follow, profile="book", memory=memory)


async def traded(at, folder, candles, ready, **name):
    "A session there; `ready` is told each time that it waits for the next candle"
    broker, ledger, run = venue_at(at), Ledger(f"sqlite:///{folder}/tradelab.db"), load(FAST)
    await broker.connect([SYMBOL])
    waited = []

    async def waits(open_time, trade=None):
        if open_time in waited: return
        waited.append(open_time)
        await ready(len(waited))
    broker.waits = waits
    live = Session(run.trader(10_000., broker.instruments([SYMBOL])), broker, ledger, folder, timeframe="1h",
                   say=lambda line: None, **name)
    await live.run(candles)
    return live, ledger


def seen(ledger, name="dry"):
    "The candles that a session decided on are those of the other exchange, none is missing"
    journal = ledger.journal(name)
    assert journal["close"].tolist() == CANDLES["close"].reindex(journal.index).tolist()
    assert np.diff(times(journal)).tolist() == [3_600_000] * (len(journal) - 1)
    return journal


def test_it_trades_on_the_prices_of_the_other_exchange(mainnet, tmp_path):
    async def run(at):
        async def ready(count): await asyncio.to_thread(close, mainnet)
        return await traded(at, tmp_path, 8, ready, id="dry")
    with started(mainnet.url) as at:
        assert (at.name, candles_left(at)) == ("dry_run", None)
        live, ledger = asyncio.run(run(at))
        assert live.venue.name == "dry_run"
        assert place_of(live.venue) == f"dry_run {at.rest}"
    journal = seen(ledger)
    assert len(journal) == 8
    fills = [entry for _, entry in ledger.booked("dry") if isinstance(entry, Fill)]
    assert len(fills) > 2
    assert all(CANDLES["low"].min() < fill.price < CANDLES["high"].max() for fill in fills)
    assert live.statistics.disagreements == live.statistics.rejected == 0
    assert not any(account.orders for account in mainnet.exchange.accounts.values())   # nothing was sent there
    ledger.close()


def test_the_other_exchange_goes_away_and_what_closed_meanwhile_is_asked_for(mainnet, tmp_path):
    def away():
        "No connection lasts, three candles close, and it is tried again and again"
        told(mainnet, "fault", at="wire", do="reset", path="*", times=0)
        mainnet.loop.call_soon_threadsafe(mainnet.proxy.cut)
        close(mainnet, 3)
        while len(told(mainnet, "faults", "GET")) < 5: time.sleep(.01)
        told(mainnet, "disarm")

    async def run(at):
        async def ready(count): await (asyncio.to_thread(away) if count == 4 else asyncio.to_thread(close, mainnet))
        return await traded(at, tmp_path, 12, ready, id="dry")
    with started(mainnet.proxy_url) as at: live, ledger = asyncio.run(run(at))
    assert len(seen(ledger)) == 12
    assert live.statistics.disagreements == 0
    ledger.close()


RUN = """
import asyncio, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import test_dry_run as here
url, control, token, folder = *sys.argv[2:5], Path(sys.argv[5])
public = SimpleNamespace(control_url=control, token=token)
async def ready(count):
    if count == 6: os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.to_thread(here.close, public)
with here.started(url, folder / "localnet.jsonl") as at:
    asyncio.run(here.traded(at, folder, 40, ready, id="dry"))
"""


def test_a_killed_dry_run_goes_on_with_its_account_on_the_candles_it_has_missed(mainnet, tmp_path):
    ran = subprocess.run([sys.executable, "-c", RUN, Path(__file__).parent, mainnet.url, mainnet.control_url,
                          mainnet.token, tmp_path], capture_output=True, text=True, timeout=120)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    before = len(ledger.journal("dry")), len(ledger.intents("dry"))
    assert before[0] >= 4
    assert before[1] > 0
    ledger.close()
    close(mainnet, 2)

    async def run(at):
        async def ready(count): await asyncio.to_thread(close, mainnet)
        return await traded(at, tmp_path, 6, ready, resume="dry")
    with pytest.raises(LostMemoryError, match="kept none of its own"), started(mainnet.url, continued=True): pass
    with started(mainnet.url, tmp_path / "localnet.jsonl", True) as at: live, ledger = asyncio.run(run(at))
    assert len(seen(ledger)) >= before[0] + 6
    assert live.statistics.disagreements == 0
    assert ledger.check("dry") == ""
    ledger.close()


def test_nobody_there_is_one_sentence(project):
    (project / "tradelab.toml").write_text('dry_run_rest = "http://127.0.0.1:9"\ndry_run_stream = "ws://127.0.0.1:9"\n')
    ran = subprocess.run([TRADELAB, "live", "-p", "venue", "dry_run"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "http://127.0.0.1:9/fapi/v1/exchangeInfo cannot be reached" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_the_job_says_what_it_is_and_needs_no_key(project, mainnet):
    stream = mainnet.url.replace("http", "ws")
    (project / "tradelab.toml").write_text(f'venue = "dry_run"\ndry_run_port = 0\ndry_run_rest = "{mainnet.url}"\n'
                                           f'dry_run_stream = "{stream}"\n')
    assert venue_for(settings()).name == "dry_run"
    job = subprocess.Popen([TRADELAB, "live", "-p", "policy", FAST, "-p", "candles", "3"], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while job.poll() is None and not any(project.glob("sessions/*/session.json")): time.sleep(.05)
    ledger = Ledger(settings().database)
    while job.poll() is None:
        if len(ledger.journal(ledger.sessions()[0])) < 3: close(mainnet)
        time.sleep(.5)
    said = job.communicate()[0]
    assert job.returncode == 0, said
    kind = f"live public prices of {mainnet.url}, simulated fills"
    assert f'venue: dry_run (venue = "dry_run": a dry run, {kind})' in said
    name, = ledger.sessions()
    assert ledger.session(name)["settings"]["source"] == f"dry run: {kind}"
    assert ledger.session(name)["settings"]["venue"] == "dry_run"
    seen(ledger, name)
    record, = project.glob("reports/live/*.html")
    assert f"dry run: {kind}" in record.read_text()
    ledger.close()
