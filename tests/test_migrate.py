"Settings of other systems: under our names or with a reason, never real money, never a secret on the screen"
import json
import os
import stat
import tempfile
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from tradelab.command import main
from tradelab.config import FORBIDDING, _flat, read_variables, settings, venue_for
from tradelab.errors import ConfigurationError
from tradelab.migrate import KEYS, read_foreign, translate, unheard, with_key, with_variable, write

KEY, SECRET = "AbCdEfGh" * 8, "s3cr3tOf" * 8
OWNER = {"EXCHANGE": "binance", "EXCHANGE_API_KEY": KEY, "EXCHANGE_SECRET_KEY": SECRET, "SANDBOX": "true",
         "SYMBOLS": "BTC/USDT,XRPUSDT", "TIMEFRAME": "4h", "INITIAL_CAPITAL": "2500", "MAX_POSITION_SIZE": "0.1",
         "STOP_LOSS_PCT": "2.0", "TAKE_PROFIT_PCT": "0.04", "MAX_DRAWDOWN": "20%", "ENVIRONMENT": "production",
         "LOG_LEVEL": "debug"}
EXPECTED = {"exchanges": ["binanceusdm", "okx", "bybit"], "testnet_key": KEY, "testnet_secret": SECRET,
            "venue": "testnet", "symbol": "BTC/USDT,XRPUSDT", "timeframe": "4h", "deposit": 2500.,
            "risk.max_position": .1,
            "risk.stops.stop_loss": .02, "risk.stops.take_profit": .04, "risk.max_drawdown": .2,
            "environment": "production", "log_level": "DEBUG"}
NESTED = {"exchange": {"name": "binance", "apiKey": KEY, "secretKey": SECRET, "sandbox": True},
          "environment": "production", "logging": {"log_level": "debug"},
          "trading": {"symbols": ["BTC/USDT", "XRPUSDT"], "timeframe": "4h", "initial_capital": 2500,
                      "risk": {"max_position_size": .1, "stop_loss_pct": 2., "takeProfitPct": .04, "max_drawdown": 20}}}


@pytest.fixture
def clean(project, monkeypatch):
    for name in KEYS: monkeypatch.delenv(name, raising=False)
    return project


@pytest.mark.parametrize("name, content", [
    (".env", "\n".join(f"{name}={value}" for name, value in OWNER.items())),
    ("owner.env.sh", "#!/usr/bin/env bash\nset -euo pipefail\n" + "\n".join(f"export {name}='{value}'  # {name.lower()}"
    for name, value in OWNER.items()) + "\necho done\n"),
    (".env.production", "\n".join(f'{name.lower()} = "{value}"' for name, value in OWNER.items())),
    ("config.json", json.dumps(NESTED)), ("config.yaml", yaml.safe_dump(NESTED)),
    ("config.yml", yaml.safe_dump({name.lower(): value for name, value in OWNER.items()}))])
def test_a_file_of_the_owner_becomes_settings(clean, name, content):
    (clean / name).write_text(content)
    said = CliRunner().invoke(main, ["config", "import", name])
    assert said.exit_code == 0, said.output
    taken, left = translate(read_foreign(clean / name))
    assert {each.key: each.value for each in taken} == EXPECTED
    here = settings()
    assert (here.venue, here.symbol, here.timeframe, here.deposit, here.environment, here.log_level) == ("testnet",
        "BTC/USDT,XRPUSDT", "4h", 2500., "production", "DEBUG")
    assert (here.risk.max_position, here.risk.stops.stop_loss, here.risk.stops.take_profit,
            here.risk.max_drawdown) == (.1, .02, .04, .2)
    assert here.testnet_key.get_secret_value() == KEY
    assert here.testnet_secret.get_secret_value() == SECRET
    assert venue_for(here).name == "testnet"
    assert KEY not in (clean / "tradelab.toml").read_text()
    assert stat.S_IMODE((clean / ".env").stat().st_mode) == 0o600
    assert SECRET[:8] not in said.output
    assert KEY[:8] not in said.output


def test_keys_of_another_file_and_what_is_not_taken(clean):
    (clean / "config.json").write_text(json.dumps({"exchange": {"name": "binance", "sandbox": True},
                                                   "alert_channels": ["mail"],
                                                   "monitoring": {"monitoring_enabled": True},
                                                   "influxdb": {"token": SECRET}, "model": {"password": SECRET}}))
    (clean / "secrets.json").write_text(json.dumps({"exchange_api_key": KEY, "exchange_secret_key": "your_secret_here",
                                                    "telegram": {"bot_token": SECRET, "chat_id": 1}}))
    taken, left = translate([pair for name in ("config.json", "secrets.json") for pair in read_foreign(clean / name)])
    assert {each.key for each in taken} == {"exchanges", "venue", "testnet_key"}
    why = {each.name: each.why for each in left}
    assert all("later version" in why[name] for name in ("alert_channels", "monitoring.monitoring_enabled", "influxdb",
                                                         "telegram"))
    assert why["model.password"] == "is not a name that is known here"
    assert "placeholder" in why["EXCHANGE_SECRET_KEY"]
    assert SECRET not in str(left)


@pytest.mark.parametrize("name, value, why", [
    ("MAX_POSITION_SIZE", "1000", "can be percent, coins or an amount"),
    ("STOP_LOSS_PCT", "0.5", "can be 0.5 % or 50 %"), ("MAX_DRAWDOWN", "1", "can be 1 % or 100 %"),
    ("STOP_LOSS_PCT", "-2", "no number above 0"),
    ("INITIAL_CAPITAL", "nan", "no number above 0"), ("INITIAL_CAPITAL", "True", "is no number"),
    ("TIMEFRAME", "7x", "7x"), ("SYMBOLS", "a b", "are not names of markets"),
    ("ENVIRONMENT", "moon", "is not one of development"),
    ("LOG_LEVEL", "loud", "is not one of DEBUG"), ("SANDBOX", "perhaps", "is neither true nor false"),
    ("DRY_RUN", "false", "opens nothing here"), ("EXCHANGE_API_KEY", KEY, "does not say for which account"),
    ("SYMBOLS", "", "is empty")])
def test_what_cannot_be_taken_says_why(name, value, why):
    taken, left = translate([((name,), value)])
    assert not taken
    assert why in left[0].why
    assert KEY not in str(left)


SWITCH = st.sampled_from([None, "true", "false", "1", "0", "yes", "no", "", True, False, "perhaps"])


@given(st.fixed_dictionaries({name: SWITCH for name in FORBIDDING}), st.sampled_from(["binance", "okx", None]),
       st.booleans())
def test_no_combination_of_switches_leads_to_real_money(switches, exchange, keys):
    found = [((name,), value) for name, value in {**switches, "EXCHANGE": exchange,
                                                  **({"EXCHANGE_API_KEY": KEY, "EXCHANGE_SECRET_KEY": SECRET} if keys
                                                     else {})}.items() if value is not None]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("TRADELAB_") or name in KEYS]: patch.delenv(name)
        patch.chdir(folder)
        Path("tradelab.toml").touch()
        taken, _ = translate(found)
        write(taken)
        assert settings().venue in (None, "dry_run", "testnet")
        assert settings().mainnet_confirmation == ""
        on = [name for name, value in switches.items() if str(value).lower() in ("true", "1", "yes")]
        if "DRY_RUN" in on: assert settings().venue == "dry_run"
        elif on: assert settings().venue == "testnet"
        with pytest.raises(ConfigurationError) as refused: venue_for(settings(venue="mainnet"))
        assert str(refused.value).startswith('venue is "mainnet", which is real money: ')
        assert all(f"{name} in .env" in str(refused.value) for name in on if "DRY_RUN" not in on or name == "DRY_RUN")


def test_what_is_set_already_is_kept_unless_forced(clean):
    (clean / "tradelab.toml").write_text('# mine\nlog_level = "INFO" # quiet\n[risk]\nmax_drawdown = 0.3 # long pain\n')
    (clean / ".env").write_text(f"# my keys\nTRADELAB_TESTNET_KEY={'k' * 20}\nSTRANGER=1\n")
    (clean / ".env").chmod(0o644)
    before = {name: (clean / name).read_bytes() for name in ("tradelab.toml", ".env")}
    taken, _ = translate([((name,), value) for name, value in OWNER.items()])
    with pytest.raises(ConfigurationError) as refused: write(taken)
    assert all(key in str(refused.value) for key in ("risk.max_drawdown", "log_level", "testnet_key in .env"))
    assert KEY not in str(refused.value)
    assert "kkkk" not in str(refused.value)
    assert before == {name: (clean / name).read_bytes() for name in before}
    write(taken, dry=True, force=True)
    assert before == {name: (clean / name).read_bytes() for name in before}
    write(taken, force=True)
    assert settings().risk.max_drawdown == .2
    assert settings().testnet_key.get_secret_value() == KEY
    assert read_variables(clean / ".env")["STRANGER"] == "1"
    assert "# mine" in (clean / "tradelab.toml").read_text()
    assert "# my keys" in (clean / ".env").read_text()
    assert stat.S_IMODE((clean / ".env").stat().st_mode) == 0o600
    again = (clean / "tradelab.toml").read_bytes(), (clean / ".env").read_bytes()
    write(taken)
    assert again == ((clean / "tradelab.toml").read_bytes(), (clean / ".env").read_bytes())


@pytest.mark.parametrize("text", ["risk = { max_drawdown = 0.3 }\n", 'note = """\n[risk]\n"""\n'])
def test_a_file_that_cannot_be_added_to_safely_is_left(clean, text):
    (clean / "tradelab.toml").write_text(text)
    taken, _ = translate([(("MAX_POSITION_SIZE",), .1)])
    with pytest.raises(ConfigurationError, match="risk.max_position = 0.1|note"): write(taken)
    assert (clean / "tradelab.toml").read_text() == text


NAMES = st.sampled_from(["a", "b", "risk.a", "risk.b", "risk.stops.a", "costs.x"])
VALUES = st.one_of(st.integers(-9, 9), st.booleans(), st.text(max_size=6),
                   st.floats(allow_nan=False, allow_infinity=False), st.lists(st.text("ab", max_size=2), max_size=2))


@given(st.lists(st.tuples(NAMES, VALUES), max_size=8), st.lists(st.sampled_from(["", "# word", "  "]), max_size=3))
@example([("a", "\x85"), ("a", 0)], [])
@example([("a", "x\u2028y"), ("b", "\x0b\x1c\r")], ["# \u2029"])
def test_keys_added_one_by_one_are_the_table(pairs, notes):
    text = "\n".join(notes)
    for key, value in pairs: text = with_key(text, key, value)
    assert _flat(tomllib.loads(text)) == dict(pairs)
    assert all(note in text.split("\n") for note in notes if note.strip())


@given(st.dictionaries(st.sampled_from(["A", "B", "C_D"]),
                       st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"], exclude_characters="$"),
                               min_size=1, max_size=20), max_size=3))
def test_variables_added_one_by_one_are_the_file(variables):
    text = "# mine\n"
    for name, value in variables.items(): text = with_variable(text, name, value)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".env").write_text(text)
        assert read_variables(Path(folder) / ".env") == variables


@given(st.one_of(st.binary(max_size=60), st.text("{}[]:,\"' \n-&*!#=aEXCHANGE_1", max_size=60).map(str.encode)),
       st.sampled_from([".json", ".yaml", ".env", ".env.sh"]))
def test_whatever_a_strangers_file_holds_only_our_error_comes(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"x{suffix}").write_bytes(content)
        try: translate(read_foreign(Path(folder) / f"x{suffix}"))
        except ConfigurationError as error: assert str(error).encode()


@pytest.mark.parametrize("name, content", [("a.json", "[" * 200_000), ("a.json", '{"a": ' * 5_000),
                                           ("a.json", '{"a": 1' + "0" * 5_000 + "}"), ("a.yaml", "[" * 900),
                                           ("a.yaml", "a: !!python/object/apply:os.system ['true']"),
                                           ("a.yaml", "? [a]\n: 1"),
                                           ("a.yaml", "a: &a [x, x, x, x, x, x, x, x, x]\n"
                                            + "".join(f"{new}: &{new} {{" + ", ".join(f"k{n}: *{old}" for n in range(9))
                                                      + "}\n" for old, new in zip("abcdefgh", "bcdefghi"))),
                                           ("a.env", "A=" + "x" * 2_000_000), ("a.json", "\udcff")],
                                           ids=lambda text: text[:12])
def test_a_strangers_file_is_read_within_bounds(tmp_path, name, content):
    (tmp_path / name).write_text(content, errors="surrogateescape")
    try: translate(read_foreign(tmp_path / name))
    except ConfigurationError as error: assert name in str(error)


@pytest.mark.parametrize("place", [".env", "the environment"])
def test_a_command_says_first_which_names_it_does_not_hear(clean, monkeypatch, place):
    if place == ".env": (clean / ".env").write_text("STOP_LOSS_PCT=2\nDRY_RUN=false\nPATH_OF_MINE=x\n")
    else: monkeypatch.setenv("STOP_LOSS_PCT", "2")
    assert unheard() == [f"STOP_LOSS_PCT in {place}"]
    said = CliRunner().invoke(main, ["stop"]).output.splitlines()
    assert said[0].startswith(f"set, and without effect here: STOP_LOSS_PCT in {place}")
    assert "no session is running" in said[1]
    (clean / "tradelab.toml").write_text("[risk.stops]\nstop_loss = 0.02")
    assert unheard() == []
