"Runs, sessions and candles as the command lists, compares, tags and deletes them"
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tradelab.command import main
from tradelab.instruments import Instrument
from tradelab.live.asking import LOCK
from tradelab.live.ledger import Ledger
from tradelab.lock import Lock
from tradelab.market.store import Store
from tradelab.market.synthetic import ar1
from tradelab.policies import Policy, mlp, pack
from tradelab.runs.formats import CONFIG
from tradelab.runs.registry import save
from tradelab.runs.run import Run
from tradelab.settings import Limits

NAMES = [f"train_XRP-USDT-USDT_20240101_20240201_SAC_lr0.0003_bs64_ws1_seed{seed}_20240201_15064{seed}"
         for seed in (1, 2)]


def tradelab(*words, **options):
    ran = CliRunner().invoke(main, [str(word) for word in words], **options)
    if ran.exception and not isinstance(ran.exception, SystemExit): raise ran.exception
    return ran


@pytest.fixture
def runs(project):
    "Two runs that nobody trained; the second has another limit"
    for seed, name in enumerate(NAMES, 1):
        random = np.random.default_rng(seed)
        policy = Policy("random", mlp,
                        pack([(random.normal(size=(4, 5)), random.normal(size=4)),
                              (random.normal(size=(1, 4)), random.normal(size=1))], "relu", "tanh"), ("return(1)",))
        config = dict(agent="SAC", steps=1_000 * seed, interrupted=False, learning_rate=3e-4, batch_size=64, seed=seed,
                      threads=1, source="synthetic ar1", span=["2024-01-01", "2024-02-01"], data_hash="",
                      created_time=1_706_800_000_000 + seed)
        save(Run(name, policy, limits=Limits(max_position=.1 * seed),
                 instruments=(Instrument("XRP/USDT:USDT", 1e-4, .1),), timeframe="1h", config=config),
                 {"learning_curve.csv": f"step,reward\n1,0\n2,{seed}e-4\n".encode()})
    return project / "runs"


def test_runs_are_listed_shown_and_tagged(runs):
    listed = tradelab("runs", "list").output
    assert all(name in listed for name in NAMES)
    assert "XRP/USDT:USDT" in listed
    assert "2024-01-01/2024-02-01" in listed
    assert "2,000" in listed
    assert tradelab("runs", "tag", NAMES[0], "good", "v1").output == "good v1\n"
    assert tradelab("runs", "tag", NAMES[0], "-r", "v1").output == "good\n"
    only = tradelab("runs", "list", "--tag", "good").output
    assert NAMES[0] in only
    assert NAMES[1] not in only
    shown = tradelab("runs", "show", NAMES[0]).output
    assert "tags      good" in shown
    assert "learning_curve.csv" in shown
    assert "1,000 steps" in shown
    assert "did you mean" in tradelab("runs", "tag", NAMES[0][:-1], "x").output
    assert tradelab("runs", "tag", NAMES[0], "a b").exit_code == 1
    (runs / NAMES[1] / CONFIG).write_text("[")
    assert "damaged: " in tradelab("runs", "list").output
    assert "was changed since the training" in tradelab("runs", "show", NAMES[1]).output


def test_two_runs_are_compared_by_metrics_and_by_what_differs(runs):
    said = tradelab("runs", "compare", *NAMES).output
    metrics, differ = said.split("settings that differ")
    assert all(word in metrics for word in ("Total return [%]", "Sharpe ratio [annual]", "Max drawdown [%]", "1.000",
                                            "2.000", "synthetic", "out of sample"))
    assert all(word in differ for word in ("seed", "steps", "limits.max_position"))
    assert not any(word in differ for word in ("learning_rate", "window", "costs", "timeframe"))
    assert "is compared with itself" in tradelab("runs", "compare", NAMES[0], NAMES[0]).output
    assert "there is no run" in tradelab("runs", "compare", NAMES[0], "train_nobody").output


def test_two_runs_on_a_file_that_both_are_tested_on(runs, tmp_path):
    ar1(400, seed=9).reset_index().to_csv(tmp_path / "c.csv", index=False)
    said = tradelab("runs", "compare", *NAMES, "--source", tmp_path / "c.csv", "--span", "2024-01-10/").output
    assert "file c.csv" in said
    assert "in sample" in said.replace("IN SAMPLE", "in sample")


def test_a_deleted_run_keeps_its_line_in_the_log_of_trials(runs):
    log = (runs / "trials.jsonl").read_bytes()
    assert [json.loads(line)["run"] for line in log.splitlines()] == NAMES
    tradelab("runs", "tag", NAMES[0], "bad")
    assert tradelab("runs", "delete", NAMES[0], input="n\n").exit_code == 1
    assert (runs / NAMES[0]).exists()
    assert tradelab("runs", "delete", NAMES[0], input="y\n").exit_code == 0
    assert tradelab("runs", "delete", NAMES[1], "--yes").exit_code == 0
    assert sorted(path.name for path in runs.iterdir()) == ["tags.json", "trials.jsonl"]
    assert (runs / "trials.jsonl").read_bytes() == log
    assert json.loads((runs / "tags.json").read_text()) == {}


@pytest.mark.parametrize("name", ["../x", "tags.json", "", "latest", "."])
def test_only_a_run_can_be_deleted(runs, name):
    before = sorted(Path(".").rglob("*"))
    assert tradelab("runs", "delete", name, "--yes").exit_code == 1
    assert sorted(Path(".").rglob("*")) == before


@pytest.fixture
def session(runs):
    "What a session that traded the first run has left"
    folder = runs.parent / "sessions/one"
    folder.mkdir(parents=True)
    ledger = Ledger(f"sqlite:///{runs.parent}/tradelab.db")
    ledger.open_session("one", {"origin": NAMES[0], "venue": "localnet", "symbols": ["XRP/USDT:USDT"],
                                "timeframe": "1h"})
    ledger.notice("one", "rejected", "a text of\x1b[2J the exchange")
    ledger.close()
    (folder / "session.json").write_text(json.dumps({"statistics": {"candles": 7}, "state": "running", "pid": 1}))
    return folder


def test_a_session_runs_where_its_lock_is_held_and_not_where_a_file_says_so(session):
    assert "killed" in tradelab("sessions", "list").output
    with Lock(session / LOCK, "one"):
        assert "running" in tradelab("sessions", "list").output
        assert "killed" not in tradelab("sessions", "list").output
        assert "one is running: stop it first" in tradelab("sessions", "delete", "one", "--yes").output
        assert f"{NAMES[0]} is traded by a running session: stop it first" in tradelab("runs", "delete", NAMES[0],
            "--yes").output
    shown = tradelab("sessions", "show", "one").output
    assert NAMES[0] in shown
    assert "candles" in shown
    assert "rejected: a text of the exchange" in shown
    assert "\x1b" not in shown
    assert tradelab("sessions", "tag", "one", "rehearsal").output == "rehearsal\n"
    assert tradelab("sessions", "delete", "one", "--yes").output == "deleted one\n"
    assert not session.exists()
    assert Ledger(f"sqlite:///{session.parents[1]}/tradelab.db").session("one")["settings"]["origin"] == NAMES[0]


@pytest.mark.parametrize("content", ["{", "[1]", '{"statistics": 3}', '"x"', "\x00"])
def test_a_damaged_status_is_no_end_of_the_list(session, content):
    (session / "session.json").write_text(content)
    assert "one" in tradelab("sessions", "list").output
    assert "one" in tradelab("sessions", "show", "one").output


def test_candles_are_listed_checked_and_deleted(project):
    store = Store(project / "data")
    for symbol in ("BTC/USDT:USDT", "1000PEPE/USDT:USDT"): store.write("binanceusdm", symbol, "1h", ar1(100, seed=1))
    assert all(word in tradelab("data", "list").output for word in ("binanceusdm", "1000PEPE/USDT:USDT", "100"))
    assert tradelab("data", "check").exit_code == 0
    assert tradelab("data", "check", "--symbol", "nobody").exit_code == 1
    assert tradelab("data", "delete", "binanceusdm", "1000PEPE/USDT:USDT", "../..", "--yes").exit_code == 1
    assert tradelab("data", "delete", "binanceusdm", "1000PEPE/USDT:USDT", "1h", "--yes").exit_code == 0
    assert "1000PEPE" not in tradelab("data", "list").output
    assert len(store.held()) == 1


def test_candles_are_downloaded_once(project, monkeypatch):
    "From an exchange that is not there in a test: its candles come from a generator"
    from tradelab.sources import history as sources
    asked, candles = [], ar1(2_000, seed=1, start="2024-01-01")
    def fetch(symbol, timeframe, start, end, store, *_):
        asked.append((start, end))
        return store.fill("binanceusdm", symbol, timeframe, start, end, lambda first, last: asked.append("fetched")
                          or candles)
    monkeypatch.setattr(sources, "first_available", lambda symbol, timeframe, start, end, named, store,
                        gaps: fetch(symbol, timeframe, start, end, store).candles)
    for _ in range(2): said = tradelab("data", "download", "BTC/USDT:USDT", "--span", "2024-01-02/2024-01-05")
    assert said.exit_code == 0
    assert "72 candles of BTC/USDT:USDT 1h from 2024-01-02 00:00 to 2024-01-04 23:00 UTC" in said.output
    assert asked.count("fetched") == 1


def test_a_job_that_names_no_symbol_takes_that_of_the_settings(project):
    from tradelab.inputs import meant, symbols_and_timeframe
    assert meant("")[0] == ("BTC/USDT:USDT",)
    (project / "tradelab.toml").write_text('symbol = "ETH/USDT,XRPUSDT"\ntimeframe = "4h"\n')
    rule = Run("rule", Policy("random", mlp, pack([(np.ones((1, 5)), np.ones(1))], "relu", "tanh"), ("return(1)",)))
    assert symbols_and_timeframe(rule, "", "")[:2] == (("ETH/USDT:USDT", "XRP/USDT:USDT"), "4h")
    assert symbols_and_timeframe(rule, "BTCUSDT", "1h")[:2] == (("BTC/USDT:USDT",), "1h")
