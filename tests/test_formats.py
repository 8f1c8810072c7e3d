"""What is kept carries the number of its format: another one is refused in one sentence that names the version"""
import json
from dataclasses import asdict

import numpy as np
import pytest
import yaml

from tradelab import __version__
from tradelab.config import settings
from tradelab.database.rows import open_database
from tradelab.database.schema import FORMATS
from tradelab.errors import ConfigurationError
from tradelab.instruments import BITCOIN
from tradelab.live.ledger import Ledger
from tradelab.live.reconcile import StartRefusedError
from tradelab.live.recorder import Recorder, RecordingError, chained, framed, read, recorded_settings
from tradelab.live.session import remember, settings_of
from tradelab.live.start import FORMAT as SESSION
from tradelab.policies import Policy, buy_and_hold, mlp, pack
from tradelab.runs.formats import CONFIG, FORMAT, MANIFEST, DamagedRunError, seal
from tradelab.runs.registry import read as read_run
from tradelab.runs.registry import save
from tradelab.runs.run import Run, make_trader
from tradelab.settings import Limits

ID = "train_BTC_20240101_20240201_SAC_lr0.0003_bs256_ws1_seed7_20240301_000000"
CONFIGURATION = dict(agent="SAC", steps=1, interrupted=False, learning_rate=3e-4, batch_size=256, seed=7, threads=1,
                     source="",
                     span=["2024-01-01", "2024-02-01"], data_hash="", created_time=0)


def changed_run(folder, change):
    "The folder of a run whose configuration was changed and sealed again"
    policy = Policy("p", mlp, pack([(np.ones((1, 5)), np.zeros(1))], "relu", "tanh"), ("return(1)",))
    kept = save(Run(ID, policy, instruments=(BITCOIN,), config=CONFIGURATION), folder=folder).folder
    config = yaml.safe_load((kept / CONFIG).read_text())
    change(config)
    (kept / CONFIG).write_text(yaml.safe_dump(config))
    (kept / MANIFEST).write_bytes(seal({path.name: path.read_bytes() for path in kept.iterdir()
                                        if path.name != MANIFEST}))
    return kept


def test_a_run_says_its_format(tmp_path):
    assert read_run(changed_run(tmp_path, lambda config: None)).config["format"] == FORMAT


def test_a_run_before_the_numbers_saw_another_portfolio_and_is_refused(tmp_path):
    with pytest.raises(DamagedRunError, match=f"has no format number, written by tradelab {__version__}: this version "
                       "reads 'tradelab run 2', load it with the version that wrote it, or train again"):
        read_run(changed_run(tmp_path, lambda config: config.pop("format")))


@pytest.mark.parametrize("number", ["tradelab run 1", "tradelab run 3", 2, "", False, [1], {"a": 1}])
def test_a_run_of_another_format_is_refused_before_its_keys(tmp_path, number):
    def other(config):
        for key in ("seed", "limits"): del config[key]
        config |= {"format": number, "invented": 1, "versions": {"tradelab": "7.8.9"}}
    with pytest.raises(DamagedRunError, match=r"^run train_.* is of the format .*, written by tradelab 7.8.9: this "
                       r"version reads 'tradelab run 2'"):
        read_run(changed_run(tmp_path, other))


@pytest.mark.parametrize("change",
                         [lambda config: config.pop("seed"), lambda config: config["limits"].update(max_hope=1.),
                          lambda config: config.update(steps="many"),
                                    lambda config: config["instruments"][0].pop("symbol")])
def test_a_run_that_does_not_fit_its_format_is_refused(tmp_path, change):
    with pytest.raises(DamagedRunError, match="train again"): read_run(changed_run(tmp_path, change))


def test_a_ledger_of_another_format_is_left_as_it_is(tmp_path):
    url = f"sqlite:///{tmp_path}/tradelab.db"
    with open_database(url).begin() as connection:
        connection.execute(FORMATS.update().values(format=2, version="7.8.9"))
        connection.exec_driver_sql("DROP TABLE notices")
    with pytest.raises(ValueError, match="^the ledger sqlite:////.*tradelab.db is of format 2, written by tradelab "
                       "7.8.9: this version reads format 8, use the version that wrote it"):
        Ledger(url)
    import sqlalchemy as sql
    assert not sql.inspect(sql.create_engine(url)).has_table("notices")


def test_a_ledger_before_the_numbers_is_refused_in_a_sentence(tmp_path):
    url = f"sqlite:///{tmp_path}/tradelab.db"
    ledger = Ledger(url)
    ledger.open_session("before", {"venue": "localnet"})
    with open_database(url).begin() as connection: connection.exec_driver_sql("DROP TABLE formats")
    with pytest.raises(ValueError, match="tradelab.db is of format 1 or 2, and does not say which: this version reads "
                       "format 8, use the version that wrote it"):
        Ledger(url)


def test_a_recording_of_another_format_is_named_and_not_called_damaged(tmp_path):
    "Its chain begins with its own format, so ours cannot prove even its first line"
    for name, said, by in (("tradelab recording 1", {}, "a version that did not say its number"),
                           ("tradelab recording 2", {"version": "7.8.9"}, "tradelab 7.8.9")):
        file = tmp_path / f"{by}.zst"
        file.write_bytes(framed(chained({"kind": "recording", "format": name} | said, 0, name), b"")[0])
        for reader in (recorded_settings, lambda path: list(read(path))):
            with pytest.raises(RecordingError, match=f"is of the format '{name}', written by {by}: this version reads "
                               "'tradelab recording 3'"):
                reader(file)


def test_a_recording_says_which_version_wrote_it(tmp_path):
    recorder = Recorder(tmp_path / "recording.zst")
    recorder.close()
    assert next(read(tmp_path / "recording.zst"))["version"] == __version__


@pytest.mark.parametrize("change, match",
                         [({"format": "tradelab session 3"}, "is of the format 'tradelab session 3', written by "
                           "tradelab 7.8.9: this version reads 'tradelab session 2'"),
                          ({}, "is of the format 'tradelab session 1', written by tradelab 7.8.9"), # no number
                          ({"format": SESSION, "limits": {"max_hope": 1.}}, "was written by tradelab 7.8.9, its "
                           "limits are not this version's")])
def test_a_session_of_another_format_is_not_resumed(tmp_path, change, match):
    trader = make_trader(buy_and_hold(), instruments=(BITCOIN,))
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    ledger.open_session("other", {"version": "7.8.9", "origin": "x", "limits": asdict(Limits())} | change)
    with pytest.raises(StartRefusedError, match=f"^session other {match}"):
        remember(ledger, "other", {}, trader)


def test_a_session_before_some_limits_is_resumed(tmp_path):
    trader = make_trader(buy_and_hold(), instruments=(BITCOIN,))
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    given = settings_of(trader, "localnet", "1h", "an example", "")
    told = json.loads(json.dumps(given | {"reserve": 5.}))
    del told["limits"]["max_orders"]
    ledger.open_session("before", told)
    ledger.keep("before", 1_700_000_000_000, trader.snapshot(), 0)
    kept = remember(ledger, "before", given, trader)
    assert kept.step["open_time"] == 1_700_000_000_000
    assert kept.settings["reserve"] == 5.
    with pytest.raises(StartRefusedError, match="^session before was written by tradelab .*: state of another version: "
                       "its fields are"):
        torn = json.loads(json.dumps(trader.snapshot()).replace('"deposit"', '"deposits"'))
        ledger.keep("before", 1_700_000_000_000, torn, 0)
        remember(ledger, "before", given, trader)


@pytest.mark.parametrize("number", ["0", "2", '"1"', "true", "[1]", "1.5"])
def test_settings_of_another_format_are_refused_before_their_keys(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tradelab.toml").write_text(f"format = {number}\ninvented = 1\n")
    with pytest.raises(ConfigurationError, match=f"^tradelab.toml is of format .*, tradelab {__version__} "
                       "reads format 1"):
        settings()


def test_settings_of_this_format_need_no_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("deposit = 5.0", "format = 1\ndeposit = 5.0"):
        (tmp_path / "tradelab.toml").write_text(text)
        assert settings().deposit == 5
