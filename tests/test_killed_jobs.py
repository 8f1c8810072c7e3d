"A job that trades is killed: papermill, or the kernel under it. Resumed, it neither repeats nor loses an order"
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tradelab.evaluation.difference import first_difference
from tradelab.instruments import BITCOIN
from tradelab.live.ledger import Ledger
from tradelab.localnet.server import Localnet
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1
from tradelab.settings import CostModel
from tradelab.sim.backtest import backtest
from tradelab.strategies.example import Momentum

pytestmark = pytest.mark.integration
SYMBOL, HISTORY, CANDLES = "BTC/USDT:USDT", 960, 600
MARKET = ar1(HISTORY + CANDLES + 20, seed=3)


def papermill(root, *parameters):
    words = [word for pair in (("venue", "localnet"), ("symbol", SYMBOL), *parameters) for word in ("-p", *pair)]
    return subprocess.Popen([sys.executable, "-m", "papermill", "--engine", "tradelab", "--no-progress-bar",
                             str(root / "nbs/live.ipynb"), "out.ipynb", *words],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def is_alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def until(said, process=None):
    while not said():
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(.02)


@pytest.fixture
def exchange(project):
    with Localnet({SYMBOL: MARKET}, {}, [replace(BITCOIN, symbol=SYMBOL)], CostModel(),
                  start=int(times(MARKET)[HISTORY]), api_key="localnet", api_secret="localnet") as net:
        (project / "tradelab.toml").write_text(f"localnet_port = {net.url.rpartition(':')[2]}\n")
        yield net


@pytest.mark.parametrize("killed", ["papermill", "kernel"])
def test_a_killed_job_that_is_resumed_is_the_job_that_was_not(exchange, project, root, killed):
    ledger = lambda: Ledger(f"sqlite:///{project}/tradelab.db")
    job = papermill(root, ("policy", "tradelab.strategies.example:Momentum"), ("candles", str(CANDLES)))
    until(lambda: list(project.glob("sessions/*/session.json")), job)
    folder, = project.glob("sessions/*")
    until(lambda: len(ledger().journal(folder.name)) > 5, job)
    kernel = json.loads((folder / "session.json").read_text())["pid"]
    os.kill(job.pid if killed == "papermill" else kernel, signal.SIGKILL)
    said = job.communicate()[0]
    assert job.returncode != 0, said
    until(lambda: not is_alive(kernel)) # nobody is left who would trade beside what comes next
    left = CANDLES - len(ledger().journal(folder.name))
    assert left > 0
    again = papermill(root, ("policy", "tradelab.strategies.example:Momentum"), ("candles", str(left)),
                      ("resume", folder.name))
    said = again.communicate()[0]
    assert again.returncode == 0, said
    journal, orders = ledger().journal(folder.name), exchange.exchange.accounts["main"].orders.values()
    expected = backtest(Momentum(), MARKET, MARKET.index[HISTORY], baselines=())
    assert first_difference(expected.journal[:CANDLES], journal) is None
    assert max(Counter(order.client_id for order in orders).values()) == 1
    assert {order.client_id for order in orders} == {intent.order.order_id for intent in ledger().intents(folder.name)}
