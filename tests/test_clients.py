"localnet and the clients that people trade with, each a process of its own with its own packages: tests/clients"
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tradelab.localnet.server import Localnet
from tradelab.market.candles import frame
from tradelab.settings import CostModel

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("CLIENTS_FOR_TESTS", ROOT / ".cache/clients"))
OWN = ("ccxt_async", "ccxt_pro")                                   # live in the project's own environment
OTHERS = ("python_binance", "connector", "sdk", "nautilus")
STEPS = ["load", "candles", "leverage", "market", "limit", "partial fill", "cancel", "conditional", "reduce-only",
         "user events", "errors"]


def candles():
    "Three hours of minutes; the first hour is history, then the market waits for sessions that name its candles"
    random = np.random.default_rng(1)
    close = np.round(20_000. * np.exp(np.cumsum(random.normal(0, .001, 180))), 1)
    opened = np.concatenate([[20_000.], close[:-1]])
    prices = np.stack([opened, np.maximum(opened, close) + 1, np.minimum(opened, close) - 1, close, np.full(180, 5.)],
                      1)
    return {"BTC/USDT:USDT": frame(1_640_995_200_000 + 60_000 * np.arange(180), np.round(prices, 1))}


def python_of(name:str)->Path:
    "The interpreter of a client's environment; its test is skipped where there is none"
    if name in OWN: return Path(sys.executable)
    if not (FOLDER / name / "ready").exists(): pytest.skip(f"{name} is not installed in {FOLDER}: run .ci/clients")
    return FOLDER / name / "bin/python"


@pytest.mark.parametrize("name", OWN + OTHERS)
def test_a_client_trades_as_on_binance(name):
    start = 1_640_995_200_000 + 60 * 60_000
    with Localnet(candles(), start=start, profile="book", deposit=100_000., costs=CostModel(impact=1.)) as net:
        ran = subprocess.run([python_of(name), ROOT / f"tests/clients/{name}.py", net.url, "localnet-key",
                              "localnet-secret"], capture_output=True, text=True, timeout=120,
                             env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    shown = [line for line in ran.stdout.splitlines() if line in STEPS]
    assert (ran.returncode, shown) == (0, STEPS), ran.stdout[-2000:] + ran.stderr[-4000:]
    assert "Error handling" not in ran.stdout + ran.stderr         # of a message that NautilusTrader could not read
