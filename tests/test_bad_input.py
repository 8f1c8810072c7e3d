"What a person gets wrong: one clear sentence, an exit code that is not zero, and nothing half-written"
import os
import socket
import sys
from pathlib import Path

import forked
import numpy as np
import pytest

from tradelab.localnet.server import Localnet
from tradelab.market.synthetic import ar1

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder for runs, sessions and reports, and three files of candles"
    folder = tmp_path_factory.mktemp("place")
    candles = ar1(400, seed=1)
    candles.to_parquet(folder / "good.parquet")
    candles.drop(columns="volume").to_parquet(folder / "four.parquet")
    hole = candles.copy()
    hole.iloc[77, 3] = np.nan
    hole.to_parquet(folder / "hole.parquet")
    return folder


def tradelab(place, *words, **variables):
    "The command, as a person types it"
    environment = {f"TRADELAB_{name.upper()}": str(place / name) for name in ("runs", "sessions", "reports", "logs",
        "data")}
    environment |= {"TRADELAB_DATABASE": f"sqlite:///{place}/tradelab.db", "TRADELAB_LOCALNET_PORT": "0"} | variables
    # what is measured here is measured elsewhere, and slows every start
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRADELAB_", "COVERAGE_"))}
    return forked.run([Path(sys.executable).parent / "tradelab", *words], cwd=ROOT, env=clean | environment,
                      text=True)


def refused(place, *words, **variables):
    "What the command said; it must be one sentence, and leave nothing but the record of the failure"
    before = {path for name in ("runs", "sessions") for path in (place / name).rglob("*")}
    ran = tradelab(place, *words, **variables)
    assert ran.returncode not in (0, None), ran.stdout
    assert "Traceback" not in ran.stderr and len(ran.stderr.strip().splitlines()) <= 2, ran.stderr
    assert {path for name in ("runs", "sessions") for path in (place / name).rglob("*")} == before
    return ran.stderr


@pytest.mark.parametrize("words, sentence", [
    (("run", "backtest", "-p", "policy", "train_nobody"), "there is no run 'train_nobody'"),
    (("run", "live", "-p", "policy", "tradelab.strategies.example:Momentun"), "did you mean Momentum?"),
    (("run", "live", "-p", "polcy", "latest"), "did you mean policy"),
    (("run", "live", "-p", "candles", "many"), "parameter candles must be int, was 'many'"),
    (("run", "lvie"), "did you mean live"),
    (("run", "live", "-p", "venue", "mainnet"), 'venue is "mainnet", which is real money: its keys are not configured'),
    (("run", "live", "-p", "venue", "manet"), "'localnet', 'dry_run', 'testnet' or 'mainnet', was 'manet'"),
    (("run", "drill", "-p", "venue", "mainnet"), "a drill closes every position of an account"),
    (("run", "train", "-p", "agent", "SAK"), "did you mean SAC"),
    (("run", "train", "-p", "features", "rsj(14)"), "did you mean 'rsi'"),
    (("run", "replay"), "no session 'latest'"),
    (("run", "backtest", "-p", "span", "2022"), "is not a span"),
], ids=lambda value: "-".join(value[1:]) if isinstance(value, tuple) else "")
def test_a_word_that_is_wrong(place, words, sentence): assert sentence in refused(place, *words)


@pytest.mark.parametrize("file, sentence", [("four", "four.parquet: no column 'volume' among open, high, low, close"),
                                            ("hole", "close is nan at 2024-01-04 05:00 UTC"), ("nowhere", "no file")])
def test_a_file_that_is_wrong(place, file, sentence):
    assert sentence in refused(place, "run", "backtest", "-p", "source", str(place / f"{file}.parquet"), "-p", "span",
                               "")


def test_a_run_with_a_changed_file(tmp_path):
    assert tradelab(tmp_path, "run", "train", "-p", "steps", "100").returncode == 0
    run = next((tmp_path / "runs").glob("train_*"))
    (run / "scaler_train.json").write_text((run / "scaler_train.json").read_text().replace("1", "2", 1))
    assert "scaler_train.json" in refused(tmp_path, "run", "backtest", "-p", "policy", "latest")


def test_real_money_needs_its_confirmation(place):
    keys = dict(TRADELAB_MAINNET_KEY="ijklmnop12345678", TRADELAB_MAINNET_SECRET="another-secret")
    said = refused(place, "run", "live", "-p", "venue", "mainnet", **keys)
    assert "real money" in said
    assert "ijklmnop" not in said
    assert "another" not in said


def test_a_port_in_use(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refused(place, "run", "live", "-p", "candles", "3",
                                                                TRADELAB_LOCALNET_PORT=str(port))


def test_an_exchange_that_does_not_list_the_symbol_and_one_that_refuses_the_keys(place):
    candles = ar1(200, seed=2)
    with Localnet({"ETH/USDT:USDT": candles}, start=candles.index[150].value // 10**6, api_key="localnet",
                  api_secret="localnet") as exchange:
        assert "does not list" in refused(place, "run", "live", "-p", "candles", "3",
                                          TRADELAB_LOCALNET_PORT=str(exchange.port))
    with Localnet({"BTC/USDT:USDT": candles}, start=candles.index[150].value // 10**6, api_key="other",
                  api_secret="other") as exchange:
        assert "refuses these keys" in refused(place, "run", "live", "-p", "candles", "3",
                                               TRADELAB_LOCALNET_PORT=str(exchange.port))


def test_a_planted_difference_stops_the_replay(place):
    "The replay job names candle, column and both values"
    from tradelab.live.recorder import Recorder
    from tradelab.live.recorder import read as lines_of
    assert tradelab(place, "run", "live", "-p", "candles", "20").returncode == 0
    recording = next((place / "sessions").glob("*/recording.zst"))
    lines = list(lines_of(recording))
    candle = [event for line in lines if line["kind"] == "received" for event in line["events"]
              if event["type"] == "Candle" and event["values"][3] > event["values"][2]][7]
    close = candle["values"][3]
    candle["values"][3] = float(np.nextafter(close, 0))
    recording.unlink()
    again = Recorder(recording)
    for line in lines:
        if line["kind"] not in ("recording", "end"): again.line(**line)
    again.close()
    said = refused(place, "run", "replay")
    assert "does not replay" in said
    assert "column 'close'" in said
    assert str(close) in said
    assert str(candle["values"][3]) in said


def test_a_damaged_result_is_no_other_result(tmp_path):
    "Flipped bits, cut ends and foreign bytes: the same numbers, or one sentence"
    from tradelab.evaluation.difference import first_difference
    from tradelab.export import load, save
    from tradelab.market.synthetic import random_walk
    from tradelab.sim.backtest import backtest
    from tradelab.strategies.example import SmaCross
    kept = backtest(SmaCross(), random_walk(120, seed=1))
    path = tmp_path / "sma.result"
    random = np.random.default_rng(0)
    content = save(kept, path).read_bytes()
    spoiled = ([content[:int(end)] for end in random.integers(0, len(content), 20)] + [b"", b"PK\x03\x04", b"<html>",
        bytes(1000)])
    for place in random.integers(0, 8 * len(content), 300):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        spoiled.append(bytes(flipped))
    refused = 0
    for each in spoiled:
        path.write_bytes(each)
        try: back = load(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path} ")
        else: assert first_difference(kept, back) is None
    assert refused > 200
