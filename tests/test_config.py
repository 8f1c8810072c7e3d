"Settings as files and variables of a real process"
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradelab.config import (
    FORBIDDING,
    REAL,
    TABLES,
    _flat,
    _variables,
    forbidding,
    job_settings,
    known_keys,
    overridden,
    settings,
    venue_for,
)
from tradelab.errors import ConfigurationError
from tradelab.settings import Limits

ROOT = Path(__file__).parents[1]
SECRETS = {"testnet_key", "testnet_secret", "mainnet_key", "mainnet_secret", "alert_url", "escalation_url",
           "watchdog_url", "telegram_token", "influx_token", "metrics_token", "api_secret", "redis_url"}
UNSET = {"venue", "mainnet_confirmation", "passphrase_file", "alerts.templates", "alerts.levels", "api.certificate",
         "api.certificate_key"}


@contextmanager
def place(variables=()):
    "A new, empty project with these variables and no others of ours: an example of hypothesis needs its own"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("TRADELAB_")]: patch.delenv(name)
        for name in variables: patch.setenv(name, variables[name])
        patch.chdir(folder)
        Path("tradelab.toml").touch()
        yield


def test_later_places_win(project, monkeypatch):
    (project / "tradelab.toml").write_text("[risk]\nmax_position = 0.1\nmax_drawdown = 0.1\nmin_trade = "
                                           "0.01\n[costs]\ntaker_fee = 0.001")
    (project / ".env").write_text("TRADELAB_RISK__MAX_POSITION=0.2\nTRADELAB_RISK__MAX_DRAWDOWN=0.2\nOTHER_TOOL=1")
    monkeypatch.setenv("TRADELAB_RISK__MAX_POSITION", "0.3")
    here = settings(costs={"slippage": .5})
    assert (here.risk.min_trade, here.risk.max_drawdown, here.risk.max_position, here.costs.taker_fee,
            here.costs.slippage) == (.01, .2, .3, .001, .5)
    assert settings(risk={"max_position": .4}).risk.max_position == .4


@pytest.mark.parametrize("place, sentence", [
    ("toml", r"risk.max_levrage in tradelab.toml is not a setting: did you mean risk.max_leverage\?"),
    ("dotenv", r"TRADELAB_RISK__MAX_LEVRAGE in .env is not a setting: did you mean TRADELAB_RISK__MAX_LEVERAGE\?"),
    ("environment", r"TRADELAB_RISK__MAX_LEVRAGE in the environment is not a setting: did you mean "
     r"TRADELAB_RISK__MAX_LEVERAGE\?"),
    ("production", r"risk.max_levrage in tradelab.toml \[production\] is not a setting"),
    ("parameters", r"risk.max_levrage in the parameters is not a setting: did you mean risk.max_leverage\?")])
def test_an_unknown_key_is_an_error_everywhere(project, monkeypatch, place, sentence):
    if place == "toml": (project / "tradelab.toml").write_text("[risk]\nmax_levrage = 2")
    if place == "production": (project / "tradelab.toml").write_text("[production.risk]\nmax_levrage = 2")
    if place == "dotenv": (project / ".env").write_text("TRADELAB_RISK__MAX_LEVRAGE=2")
    if place == "environment": monkeypatch.setenv("TRADELAB_RISK__MAX_LEVRAGE", "2")
    with pytest.raises(ConfigurationError, match=sentence):
        settings(**({"risk": {"max_levrage": 2}} if place == "parameters" else {}))


def test_a_session_says_where_it_goes_and_to_mainnet_by_two_deliberate_acts(project):
    "The venue that is set, and a sentence that names the account"
    (project / ".env").write_text("TRADELAB_MAINNET_KEY=0123456789abcdef\nTRADELAB_MAINNET_SECRET=fedcba9876543210")
    (project / ".env").chmod(0o600)
    assert venue_for(settings()).name == "localnet"
    (project / "tradelab.toml").write_text('venue = "mainnet"')
    with pytest.raises(ConfigurationError, match="mainnet_confirmation does not name the account"):
        venue_for(settings())
    sentence = "I trade real money with the key {}"
    for wrong in ("76543210", "ABCDEFGH", "0123456789abcdef"):
        (project / "tradelab.toml").write_text(f'venue = "mainnet"\nmainnet_confirmation = "{sentence.format(wrong)}"')
        with pytest.raises(ConfigurationError, match="mainnet_confirmation does not name the account"):
            venue_for(settings())
    confirmed = f'mainnet_confirmation = "{sentence.format("01234567")}"'
    (project / "tradelab.toml").write_text(confirmed)
    assert venue_for(settings()).name == "localnet"
    (project / "tradelab.toml").write_text(f'venue = "mainnet"\n{confirmed}')
    assert venue_for(settings()).rest == REAL[0]


ADDRESSES = st.builds("{}://{}{}{}".format, st.sampled_from(["https", "http", "wss", "ws", "HTTPS"]),
                      st.sampled_from(["", "www.", "key:secret@", "fapi.binance.com@"]),
                      st.sampled_from(["fapi.binance.com", "FAPI.BINANCE.COM.", "fapi.binance.com:443", "binance.us",
                                       "fapi1.binance.com", "\uff46api.binance.com", "fapi%2ebinance.com",
                                       "example.com", "fapi.binance.com\\.example.com"]),
                      st.sampled_from(["", "/", "/fapi", "#x", "?x"]))


@given(st.sampled_from(["testnet_rest", "testnet_stream", "localnet_host"]), ADDRESSES)
def test_no_spelling_of_mainnets_address_is_reached_under_another_name(setting, address):
    "And nothing beyond this machine without TLS; an address that is refused is not repeated with its password"
    keys = dict(testnet_key="0123456789abcdef", testnet_secret="fedcba9876543210", mainnet_key="0123456789abcdef",
                mainnet_confirmation="I trade real money with the key 01234567")
    value = address.split("//")[1] if setting == "localnet_host" else address
    with place():
        try: found = venue_for(settings(venue=setting.split("_")[0], **keys, **{setting: value}))
        except ConfigurationError as refused: assert "secret@" not in str(refused)
        else:
            assert "binance" not in (found.rest + found.stream).replace(settings().testnet_rest, "").replace(
                settings().testnet_stream, "").lower()
            assert setting != "localnet_host" and address.lower().startswith(("https", "wss"))


@pytest.mark.parametrize("name", ["tradelab.toml", ".env"])
@pytest.mark.parametrize("mode, way", [(0o602, "written by all"), (0o620, "written by a group"),
                                       (0o600, "owned by another")])
def test_settings_that_others_could_have_written_are_refused(project, name, mode, way):
    (project / name).write_text('log_level = "DEBUG"' if name.endswith("toml") else "TRADELAB_LOG_LEVEL=DEBUG")
    if way != "written by all" and os.geteuid(): pytest.skip("only root can give a file away")
    if way == "written by a group": os.chown(project / name, -1, 54321)
    if way == "owned by another": os.chown(project / name, 54321, -1)
    (project / name).chmod(mode)
    with pytest.raises(ConfigurationError, match=f"{name} is not read: (others may write it|another user owns it)"):
        settings()
    if way == "owned by another": return
    (project / name).chmod(0o644)
    assert settings().log_level == "DEBUG"


@pytest.mark.parametrize("value, forbids", [("true", True), ("True", True), ("1", True), ("yes", True), ("tru", True),
                                            ("false", False), ("0", False), ("no", False), ("", False)])
@pytest.mark.parametrize("name", FORBIDDING)
def test_a_switch_of_another_system_forbids_real_money_and_never_opens_it(project, monkeypatch, name, value, forbids):
    for other in FORBIDDING: monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert bool(forbidding()) == forbids
    assert venue_for(settings()).name == "localnet"
    with pytest.raises(ConfigurationError, match=f"{name} in the environment forbids it" if forbids
                       else "real money: its keys are not configured"):
        venue_for(settings(venue="mainnet"))
    monkeypatch.delenv(name)
    (project / ".env").write_text(f"{name}={value}")
    assert bool(forbidding()) == forbids


KEYS = [*known_keys(), "risk", "costs", "production", "risk.stops", "risk.sectors", "risk.sectors.a",
        "production.venue", ""]
VALUES = st.one_of(st.integers(-5, 5), st.floats(), st.booleans(), st.text(max_size=8),
                   st.sampled_from(["localnet", "nan", "1e400", "testnet"]), st.lists(st.integers(), max_size=2),
                   st.just({}))
LINES = st.lists(st.tuples(st.sampled_from(KEYS), VALUES).map(lambda pair: f"{pair[0]} = {json.dumps(pair[1])}"),
                 max_size=4).map("\n".join)
VARIABLES = st.dictionaries(st.sampled_from(KEYS).map(lambda key: f"TRADELAB_{key.upper().replace('.', '__')}"),
                            st.binary(max_size=8).map(lambda text: os.fsdecode(text.replace(b"\0", b""))), max_size=4)


def only_its_own_error():
    try: settings()
    except ConfigurationError as error: assert str(error).encode()


@given(st.one_of(LINES.map(str.encode), st.binary(max_size=30),
                 st.text("[]{}=.\"'\n#arisk", max_size=30).map(str.encode)))
def test_whatever_tradelab_toml_holds_only_its_own_error_comes(text):
    with place(): Path("tradelab.toml").write_bytes(text), only_its_own_error()


@given(st.one_of(VARIABLES.map(lambda each: "\n".join(f"{name}={value}" for name, value in each.items()).encode("utf-8",
    "surrogateescape")), st.binary(max_size=30),
                 st.text("TRADELAB_=#'\"\n \\$!{}", max_size=40).map(str.encode)))
def test_whatever_the_dotenv_file_holds_only_its_own_error_comes(text):
    with place(): Path(".env").write_bytes(text), only_its_own_error()


@given(VARIABLES)
def test_whatever_the_environment_holds_only_its_own_error_comes(variables):
    with place(variables): only_its_own_error()


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "[a" + ".a" * 5_000 + "]", "a = 1" + "0" * 5_000,
                                  "production = 3", 'data = "a\\u0000b"', 'database = "nonsense"'],
                                  ids=lambda text: text[:20])
def test_a_file_that_no_reader_expects(project, text):
    (project / "tradelab.toml").write_text(text)
    with pytest.raises(ConfigurationError): settings()


def test_the_settings_are_those_of_the_project_from_any_folder_in_it(project):
    (project / "tradelab.toml").write_text('log_level = "DEBUG"')
    (project / "nbs/10_market").mkdir()
    probe = "from tradelab.config import settings; here = settings(); print(here.log_level, here.runs)"
    ran = subprocess.run([sys.executable, "-c", probe], cwd=project / "nbs/10_market", capture_output=True, text=True)
    assert ran.stdout.strip() == f"DEBUG {project.resolve() / 'runs'}"


def test_the_examples_name_every_setting_and_its_default(project):
    text = (ROOT / "tradelab.toml.example").read_text()
    (project / "tradelab.toml").write_text(text)
    assert settings().model_dump() == settings(**{}).model_dump()
    written = set(_flat({name: value for name, value in tomllib.loads(text).items() if name not in ("production",
        "format")}))
    unlimited = ({f"{table}.{field.name}" for table, record in TABLES.items() for field in fields(record)
                  if field.default is None} | {key for key in known_keys() if key.startswith("instrument.")})
    assert written == set(known_keys()) - SECRETS - UNSET - unlimited
    assert all(name.rpartition(".")[2] in text for name in SECRETS | UNSET | unlimited)
    example = settings()
    (project / "tradelab.toml").write_text("")
    assert example == settings()
    dotenv = dict(line.lstrip("# ").split("=") for line in (ROOT / ".env.example").read_text().splitlines()
                  if line.lstrip("# ").startswith("TRADELAB_"))
    assert set(_variables({name: value or "x" for name, value in dotenv.items()})) <= set(known_keys())


def test_limits_and_stops_are_set_like_the_rest(project, monkeypatch):
    (project / "tradelab.toml").write_text('[risk]\nmax_sector = 0.3\nsectors = { "BTC/USDT:USDT" = "money" '
                                           '}\n[risk.stops]\nstop_loss = 0.01')
    monkeypatch.setenv("TRADELAB_RISK__STOPS__TAKE_PROFIT", "0.05")
    monkeypatch.setenv("TRADELAB_RISK__MAX_NET", "0.5")
    here = settings().risk
    assert (here.max_sector, here.sectors, here.stops.stop_loss, here.stops.take_profit, here.max_net) == (.3,
        {"BTC/USDT:USDT": "money"}, .01, .05, .5)


@pytest.mark.parametrize("text, sentence", [
    ("[risk]\nmax_var = -1.0", "risk.max_var must be a finite number above 0, was -1.0: change it in tradelab.toml"),
    ("[risk]\nmax_net = nan", "risk.max_net must be a finite number above 0, was nan"),
    ("[risk.stops]\nstop_loss = 2.0", "stop_loss must be below 1"),
    ("[risk]\nmax_net = 3.0", "risk.max_net 3.0 is above max_leverage 1.0"),
    ("[risk.stops]\nstop_los = 0.1", "did you mean risk.stops.stop_loss")])
def test_a_limit_that_cannot_be_is_refused_at_start(project, text, sentence):
    (project / "tradelab.toml").write_text(text)
    with pytest.raises(ConfigurationError) as refused: settings()
    assert sentence in str(refused.value)


@pytest.fixture
def no_section():
    yield
    job_settings("")


def test_a_jobs_section_counts_more_than_every_other_place_and_what_a_run_was_trained_with(project, monkeypatch,
        no_section):
    (project / "tradelab.toml").write_text("gaps = true\n[risk]\nmax_position = 0.1\n[production.risk]\nmax_position = "
                                           "0.2\n[settings.careful]\ngaps = "
                                           "false\n[settings.careful.risk]\nmax_position = 0.02")
    monkeypatch.setenv("TRADELAB_RISK__MAX_POSITION", "0.3")
    assert settings().risk.max_position == .3
    assert settings().gaps
    assert job_settings("careful").risk.max_position == .02
    assert not settings().gaps
    assert settings(environment="production").risk.max_position == .02
    assert overridden(Limits(max_position=.5, max_drawdown=.3), "risk") == Limits(max_position=.02, max_drawdown=.3)
    assert job_settings("").risk.max_position == .3
    assert overridden(Limits(max_position=.5), "risk") == Limits(max_position=.5)


@pytest.mark.parametrize("key", ["[settings.careful]\nmax_positon = 1", "[settings.careful.risk]\nmax_positon = 1",
                                 "[settings]\ngaps = true", "[settings.careful]\nenvironment = 'staging'",
                                 "[careful]\ngaps = true"])
def test_a_section_is_checked_though_nobody_names_it(project, key):
    (project / "tradelab.toml").write_text(key)
    with pytest.raises(ConfigurationError, match="tradelab.toml"): settings()
