"""What `tradelab serve` costs a session that trades beside it, in one table: `python benchmarks/operations.py [TIMES]`.
The same session on localnet, by turns alone and beside a process that serves it with everything on: telemetry to
VictoriaMetrics and Prometheus, alerts to a webhook, Telegram, thresholds, the API, and the dashboard with three pages
open. The pages are clients that sign in and follow the stream as the page does, in a process of their own; they read
and do not draw, because a browser is on somebody's desk and not on the trader's two cores. At most 5 % more time per
candle"""
import asyncio
import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from time import monotonic

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from servers import get, until, victoria_metrics, webhook
from telegram_double import TOKEN, telegram_double
from test_api import ACCOUNTS, PASSWORD, SECRET
from test_live import HISTORY, LISTED, session, times
from test_serve import free_port, served

from tradelab.database.accounts import Accounts
from tradelab.database.operations import serving
from tradelab.database.records import clock
from tradelab.instruments import BITCOIN
from tradelab.localnet.server import Localnet
from tradelab.market.synthetic import ar1
from tradelab.settings import CostModel

CANDLES, MOST, PAGES = 1_000, 1.05, 3


def localnet():
    "A market in lockstep, long enough"
    candles = ar1(HISTORY + CANDLES + 10, seed=3)
    return Localnet({BITCOIN.symbol: candles}, {}, [LISTED], CostModel(), start=int(times(candles)[HISTORY]))


@contextmanager
def project():
    "An empty project"
    here = os.getcwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("tradelab.toml").write_text('[alerts]\nlevel = "info"\n[telegram]\nadmins = [7]\n')
        try: yield Path(folder)
        finally: os.chdir(here)


def follow(port, views):
    "What a page does: sign in, and follow the stream; the views it was sent are counted in `views`"
    line = HTTPConnection("127.0.0.1", port, timeout=60)
    line.request("POST", "/api/v1/auth/token", json.dumps({"name": "vera", "password": PASSWORD}),
                 {"Content-Type": "application/json"})
    token = json.loads(line.getresponse().read())["access_token"]
    line.request("GET", "/api/v1/dashboard/stream", headers={"Authorization": f"Bearer {token}"})
    answer = line.getresponse()
    assert answer.status == 200, answer.status
    while said := answer.read1(65_536): views.append(said.count(b"\n\n")) # each ends so


def look_on(port):
    "Pages that are open until stdin ends; prints how many views each was sent"
    pages: list[list[int]] = [[] for _ in range(PAGES)]
    for views in pages: threading.Thread(target=follow, args=(port, views), daemon=True).start()
    until(lambda: all(map(sum, pages)))
    print("open", flush=True)
    sys.stdin.read()
    print(json.dumps([*map(sum, pages)]))


@contextmanager
def pages(port):
    "Pages that are open; a list that holds how many views each was sent, once they are closed"
    sent: list[int] = []
    with subprocess.Popen([sys.executable, __file__, "pages", str(port)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        try: yield sent
        finally: sent += json.loads(process.communicate(timeout=30)[0] or "[]")


@contextmanager
def everything(folder):
    "A process that serves, once it is heard of"
    accounts = Accounts(f"sqlite:///{folder}/tradelab.db")
    accounts.put(replace(ACCOUNTS["viewer"], name="vera"))
    accounts.close()
    with ExitStack() as stack:
        figures, hook, telegram = (stack.enter_context(each) for each in (victoria_metrics(), webhook(),
                                                                         telegram_double()))
        process = stack.enter_context(served(
            influx_url=figures.url, alert_url=f"json://127.0.0.1:{hook.port}/", telegram_token=TOKEN,
            telegram_api=telegram.url, api_secret=SECRET, api__port=(port := free_port())))
        yield hook, telegram, process, port


def trade(beside):
    "Milliseconds of each candle, and how much of it people heard and saw"
    views: list[int] = []
    with project() as folder, localnet() as exchange, ExitStack() as stack:
        live, times = session(exchange, folder, say=lambda line: None), []
        heard = stack.enter_context(everything(folder)) if beside else None
        if beside:
            until(lambda: serving(f"sqlite:///{folder}/tradelab.db", clock()))
            figures = f"http://127.0.0.1:{heard[2].port}/metrics"
            until(lambda: b"tradelab_ledger_up 1" in get(figures), 120.) # it has started, and compiled what it needs
            views = stack.enter_context(pages(heard[3]))
        live.progress = lambda done: times.append(monotonic())
        asyncio.run(live.run(CANDLES))
        if beside: until(lambda: heard[0].heard and heard[1].sent)
        said = len(heard[0].heard) + len(heard[1].sent) if beside else 0
    assert not beside or len(views) == PAGES and min(views) > 1, f"not all pages were shown what happens: {views}"
    return [1_000 * (after - before) for before, after in zip(times[20:], times[21:])], said, sum(views)


if __name__ == "__main__":
    if sys.argv[1:2] == ["pages"]: sys.exit(look_on(int(sys.argv[2])))
    took: dict[bool, list[list[float]]] = {False: [], True: []}
    said, seen = 0, 0
    trade(False)
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        for beside in took:
            candles, more, views = trade(beside)
            took[beside].append(candles)
            said, seen = said + more, seen + views
    ratios = {} # of the quietest turns: others use this machine, too
    for name, of in (("median", median), ("mean", mean)):
        alone, beside = ([of(each) for each in took[served]] for served in (False, True))
        ratios[name] = min(beside) / min(alone)
        for where, found in (("alone", alone), ("beside tradelab serve", beside)):
            print(f"{where:<22} {name:<7} quietest {min(found):7.2f} ms a candle   "
                  f"{'  '.join(f'{each:.2f}' for each in found)}")
    told = ", ".join(f"{each:.3f} of the {name}" for name, each in ratios.items())
    print(f"ratios {told}, at most {MOST}; people got {said} messages, and {PAGES} pages {seen} views")
    sys.exit(max(ratios.values()) > MOST)
