"The doctor against a localnet over sockets, with each thing wrong in turn: it names it and says what to do"
import asyncio
import json
import re
import sqlite3
import time
from dataclasses import replace

import pytest
import safetensors.numpy
from test_bad_input import tradelab
from test_live import BITCOIN, localnet, orders_at, session, venue
from test_start import ask
from test_trust import make_run, reseal

from tradelab.config import settings
from tradelab.database.records import Lease, clock
from tradelab.database.rows import open_database
from tradelab.database.schema import FORMATS
from tradelab.live.doctor import at_start, case_of, examine
from tradelab.live.lease import acquire, this_process
from tradelab.live.ledger import Ledger
from tradelab.live.reconcile import StartRefusedError
from tradelab.live.recorder import recorded_settings
from tradelab.live.session import place_of
from tradelab.localnet.protocol import PERMISSIONS, ApiKey
from tradelab.policies import Policy
from tradelab.runs.registry import load, read
from tradelab.runs.run import Run
from tradelab.runs.self_test import SELF_TEST
from tradelab.secrets import DAY, set_secret
from tradelab.settings import CostModel, Limits
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration
RULE = "tradelab.strategies.example:Momentum"


def case(exchange, folder, place=None, runs=(), symbols=(BITCOIN,), **here):
    place = place or venue(exchange)
    given = settings(**{"database": f"sqlite:///{folder}/tradelab.db", "sessions": folder / "sessions"} | here)
    return replace(case_of(given, place, BinanceVenue(place), runs, ",".join(symbols)), patience=1.)


def seen(case): return asyncio.run(examine(case))
def found(report, name): return next(each for each in report.findings if each.name.split()[0] == name)
def left_at(exchange): return list(exchange.exchange.accounts["main"].open) + list(
    exchange.exchange.accounts["main"].waiting)


def test_with_nothing_wrong_it_is_silent_and_quick(project):
    with localnet() as exchange:
        case_of = case(exchange, project, runs=[load(RULE), make_run(project / "runs")])
        began = time.monotonic()
        report = seen(case_of)
        assert time.monotonic() - began < 20
        assert [str(each) for each in report.findings if each.verdict != "ok"] == []
        assert len(str(report).splitlines()) == 1
        assert f"{len(report.findings)} things were looked at" in str(report)
        assert len(report.findings) > 20
        assert not left_at(exchange)
        assert all(name.startswith("doctor-") for name in orders_at(exchange))


def reply(method, path, status, code, **more):
    return {"at": "request", "do": "reply", "method": method, "path": path, "status": status, "code": code,
            "msg": "as the test has it", "commit": False, "times": 0, **more}


@pytest.mark.parametrize("fault, name, sentence", [
    ({"at": "clock", "do": "skew", "ms": 3_000}, "clock", r"\+[23],\d\d\d ms ahead .*: set the clock .NTP."),
    ({"at": "user", "do": "lose", "times": 0}, "user", "nothing came on the user stream within 1 s: check the address"),
    (reply("POST", "v1/order", 400, -2019), "order", "was not taken .-2019 .*: an order of a session would not"),
    (reply("POST", "v1/algoOrder", 400, -4045), "stop", "was not taken .-4045 .*: an order of a session would not be"),
    (reply("GET", "v1/order", 400, -2013), "order", "not found when asked for .-2013 .*; it was cancelled: try again"),
    (reply("DELETE", "v1/order", 400, -1000), "order", "could not be cancelled .*: look for doctor-.*-1 at the"),
    (reply("DELETE", "v1/algoOrder", 400, -1000), "stop", "could not be cancelled .*: look for doctor-.*-2 at the"),
    (reply("GET", "v1/commissionRate", 400, -1000), "fees", "the fees: localnet at http.* gave no answer that can"),
    (reply("GET", "v3/account", 200, 0, text="<html>"), "connection", "no answer"),
], ids=["clock", "user", "order", "stop", "query", "cancel", "cancel stop", "fees", "account"])
def test_what_an_exchange_does_wrong_is_named(project, fault, name, sentence):
    with localnet(faults=[fault]) as exchange: report = seen(case(exchange, project))
    assert report.wrong
    told = found(report, name)
    assert told.verdict == "wrong", report
    assert re.search(sentence, told.text), told.text


@pytest.mark.parametrize("method, asked, name, sentence", [
    ("PositionSideDual", {"dualSidePosition": "true"}, "position", "in hedge mode .*: switch it to one-way mode there"),
    ("MultiAssetsMargin", {"multiAssetsMargin": "true"}, "multi-assets", "in multi-assets mode .*: switch it to"),
    ("MarginType", {"symbol": "BTCUSDT", "marginType": "ISOLATED"}, "margin", "has isolated margin .*: switch it to"),
    ("Leverage", {"symbol": "BTCUSDT", "leverage": 3}, "leverage", "has the leverage 3 .*: set it to 5 there")])
def test_how_an_account_is_set_is_named_and_not_changed(project, method, asked, name, sentence):
    with localnet() as exchange:
        ask(exchange, f"fapiPrivatePost{method}", **asked)
        report = seen(case(exchange, project))
        assert [each.name.split()[0] for each in report.wrong] == [name], report
        assert re.search(sentence, found(report, name).text)
        assert not left_at(exchange)


@pytest.mark.parametrize("key, verdict, sentence", [
    (dict(permissions=PERMISSIONS | {"withdraw"}), "wrong", "this key may withdraw what is in the account: change"),
    (dict(permissions=frozenset({"read"})), "wrong", "this key may not trade futures: change that at the exchange"),
    (dict(permissions=PERMISSIONS | {"transfer"}), "warning", "this key may send money to other accounts: change that"),
    (dict(ip_restricted=False), "warning", "taken from any address: name this machine's at the exchange")],
    ids=["withdraw", "no futures", "transfer", "any address"])
def test_what_a_key_may_is_named(project, key, verdict, sentence):
    with localnet(keys=[ApiKey("another", "secret", **key)]) as exchange:
        told = found(seen(case(exchange, project, venue(exchange, "another", "secret"))), "keys")
        assert told.verdict == verdict
        assert sentence in told.text


def test_an_exchange_that_does_not_say_what_a_key_may_is_told_and_bars_nobody(project):
    fault = reply("GET", "/sapi/v1/account/apiRestrictions", 400, -1000)
    with localnet(faults=[fault]) as exchange: told = found(seen(case(exchange, project)), "keys")
    assert told.verdict == "warning"
    assert re.search("what they may do is not known .*: look at the exchange that they may not withdraw", told.text)


@pytest.mark.parametrize("keys", [("nobody's", "secret"), ("localnet-key", "another")], ids=["key", "secret"])
def test_keys_that_are_refused_are_named(project, keys):
    with localnet() as exchange:
        report = seen(case(exchange, project, venue(exchange, *keys)))
        assert "check localnet_key and localnet_secret in the settings" in found(report, "connection").text
        assert found(report, "database").verdict == "ok"     # the others were looked at


@pytest.mark.parametrize("rest, stream, name, sentence", [
    ("http://127.0.0.1:9", "", "host", "takes no connection .*: check the address, the network and the firewall"),
    ("", "wss://nowhere.invalid", "host", "nowhere.invalid is not found .*: check the address, and DNS"),
    ("https", "", "host", "does not prove who it is .*: check the address, and what stands between"),
    ("http://127.0.0.1:9", "", "connection", "the list of markets: localnet at http://127.0.0.1:9 gave no answer")])
def test_hosts_that_are_not_there_are_named(project, rest, stream, name, sentence):
    with localnet() as exchange:
        place = venue(exchange)
        rest = place.rest.replace("http", "https") if rest == "https" else rest or place.rest
        report = seen(case(exchange, project, replace(place, rest=rest, stream=stream or place.stream)))
        told = [each for each in report.wrong if each.name.split()[0] == name]
        assert any(re.search(sentence, each.text) for each in told), report


def test_streams_that_tell_nothing_are_named(project):
    "There is an HTTP server at that address, and no stream"
    with localnet() as exchange:
        place = replace(venue(exchange), stream=exchange.control_url.replace("http", "ws"))
        report = seen(case(exchange, project, place))
        assert [each.name for each in report.wrong] == ["market stream", "book stream", "user stream"]
        for each in report.wrong: assert "within 1 s: check the address of the stream, and what" in each.text
        assert not left_at(exchange)


@pytest.mark.parametrize("here, name, sentence", [
    (dict(deposit=20_000.), "money", "holds 10,000.00 USDT, a session is given 20,000.00: lower deposit"),
    (dict(costs=CostModel(taker_fee=.0001)), "fees", r"\[costs\] says .*: set costs.maker_fee = .* and backtest again"),
    (dict(risk=Limits(leverage=150, max_position=100., max_leverage=100.)), "leverage", "goes up to .*: lower risk")])
def test_settings_that_do_not_fit_the_exchange_are_named(project, here, name, sentence):
    with localnet() as exchange:
        told = found(seen(case(exchange, project, **here)), name)
        assert told.verdict == "wrong"
        assert re.search(sentence, told.text), told


@pytest.mark.parametrize("symbol, sentence", [("BTX/USDT:USDT", "does not list 'BTX/USDT:USDT': did you mean BTC"),
                                              (BITCOIN, "is not traded at localnet now, its status is SETTLING")])
def test_a_symbol_that_cannot_be_traded_is_named(project, symbol, sentence):
    with localnet() as exchange:
        shown = exchange.exchange.market.shown[0]
        if symbol == BITCOIN: shown.status, shown.outdated = "SETTLING", True
        assert sentence in found(seen(case(exchange, project, symbols=[symbol])), "connection").text


def test_where_a_session_trades_nothing_is_placed(project):
    with localnet() as exchange:
        ledger = Ledger(f"sqlite:///{project}/tradelab.db")
        broker = BinanceVenue(venue(exchange))
        async def alias():
            try:
                await broker.connect([BITCOIN])
                return (await broker.account()).alias
            finally: await broker.close()
        acquire(ledger, Lease(place_of(broker), asyncio.run(alias()), (BITCOIN,), "first", this_process()), clock())
        report = seen(case(exchange, project))
        assert "session first in " in found(report, "lease").text
        assert "nothing is placed beside it; stop it first" in found(report, "lease").text
        assert [found(report, name).verdict for name in ("order", "stop", "user")] == 3 * ["not checked"]
        assert not report.wrong
        assert not orders_at(exchange)


def test_a_ledger_that_cannot_be_used_is_named(project):
    url = f"sqlite:///{project}/tradelab.db"
    with localnet() as exchange:
        with open_database(url).begin() as connection:
            connection.execute(FORMATS.update().values(format=99, version="9.9.9"))
        report = seen(case(exchange, project))
        assert "is of format 99, written by tradelab 9.9.9" in found(report, "database").text
        assert found(report, "order").verdict == "not checked" # it may hold a lease
        assert not orders_at(exchange)
        (project / "tradelab.db").unlink()
        Ledger(url).close()
        other = sqlite3.connect(project / "tradelab.db")
        other.execute("BEGIN EXCLUSIVE")
        assert "locked" in found(seen(case(exchange, project)), "database").text
        other.rollback()
        assert not seen(case(exchange, project)).wrong


def test_a_place_that_cannot_be_written_is_named(project):
    (project / "file").touch()
    with localnet() as exchange:
        assert found(seen(case(exchange, project, sessions=project / "file")), "disk").verdict == "wrong"


def test_files_that_others_may_read_or_write_and_keys_that_are_old_are_named(project, monkeypatch):
    (project / "passphrase").write_text("a long passphrase")
    (project / "passphrase").chmod(0o600)
    monkeypatch.setenv("TRADELAB_PASSPHRASE_FILE", str(project / "passphrase"))
    with localnet() as exchange:
        place = replace(venue(exchange), name="testnet")
        set_secret(settings(), "testnet_key", "a key of the testnet", clock() - 100 * DAY)
        looked = case(exchange, project, place)
        told = found(seen(looked), "age")
        assert (told.verdict, told.text[:27]) == ("warning", "testnet_key is 100 days old")
        looked.here.secrets_file.chmod(0o644)
        told = found(seen(case(exchange, project, place)), "files")
        assert (told.verdict, "chmod go-r" in told.text) == ("warning", True)
        looked = case(exchange, project, place)
        (project / "tradelab.toml").touch()
        (project / "tradelab.toml").chmod(0o666)
        told = found(seen(looked), "files")
        assert (told.verdict, "chmod go-w" in told.text) == ("wrong", True)


def changed_run(folder):
    "A run whose stored decisions are not those of its network"
    run = make_run(folder)
    kept = safetensors.numpy.load((run.folder / SELF_TEST).read_bytes())
    kept["targets"][3] += 1e-12
    (run.folder / SELF_TEST).write_bytes(safetensors.numpy.save(kept, {"surroundings": '{"numpy": "1.0"}'}))
    reseal(run.folder)
    return read(run.folder)


def older_run(folder):
    "A run of a version that stored no self-test"
    run = make_run(folder)
    (run.folder / SELF_TEST).unlink()
    reseal(run.folder)
    return read(run.folder)


CALLS = []
def forgetful(parameters, memory, observation, prices, targets):
    CALLS.append(1)
    targets[:] = len(CALLS) / 1_000


@pytest.mark.parametrize("make, verdict, sentence", [
    (changed_run, "wrong", r"the answer to them differs: targets of .*; around it: numpy was 1.0 and is .*: go back"),
    (older_run, "warning", "no self-test was stored with it, .*; train again to have one"),
    (lambda folder: Run("forgetful", Policy("forgetful", forgetful)), "wrong",
     "asked twice it decides otherwise .*: let it keep")], ids=["changed", "older", "rule"])
def test_a_model_that_decides_otherwise_is_named(project, make, verdict, sentence):
    with localnet() as exchange:
        told = found(seen(case(exchange, project, runs=[make(project / "runs")])), "model")
        assert told.verdict == verdict
        assert re.search(sentence, told.text), told


def test_the_short_form_stands_in_the_record_of_a_session(tmp_path):
    with localnet() as exchange:
        said = []
        asyncio.run(session(exchange, tmp_path, say=said.append, check_on_start=at_start).run(3))
    folder = tmp_path / "sessions" / "momentum_test"
    checks = json.loads((folder / "session.json").read_text())["checks"]
    assert [each["name"].split()[0] for each in checks] == ["model", "clock", "keys", "database", "streams"]
    assert {each["verdict"] for each in checks} == {"ok"}
    assert [each["name"] for each in recorded_settings(folder / "recording.zst")["checks"]] == [
        each["name"] for each in checks[:-1]]
    ledger = Ledger(f"sqlite:///{tmp_path}/tradelab.db")
    notices = ledger.notices("momentum_test")
    told, = notices["text"][notices["kind"] == "check"]
    assert told.endswith("streams: market, user opened (ok)") or "streams: book, market, user opened (ok)" in told
    assert any(line.startswith("check: model ") for line in said)


@pytest.mark.parametrize("rights, fault, sentence", [
    ({"withdraw"}, [], "keys: this key may withdraw what is in the account: change that at the exchange"),
    (set(), [{"at": "clock", "do": "skew", "ms": 3_000}], "clock: the clock of localnet is")])
def test_what_is_wrong_at_the_start_refuses_it_in_one_sentence(tmp_path, rights, fault, sentence):
    key = ApiKey("another", "secret", permissions=PERMISSIONS | rights)
    with localnet(keys=[key], faults=fault) as exchange:
        with pytest.raises(StartRefusedError, match=f"^{sentence}") as refused:
            live = session(exchange, tmp_path, keys=("another", "secret"), check_on_start=at_start, say=str)
            asyncio.run(live.run(3))
        assert len(str(refused.value).splitlines()) == 1
        assert not orders_at(exchange)
    assert not Ledger(f"sqlite:///{tmp_path}/tradelab.db").sessions()


def test_the_command_of_a_person(project):
    with localnet(keys=[ApiKey("localnet", "localnet")]) as exchange:
        def typed(*words): return tradelab(project, "doctor", *words, TRADELAB_LOCALNET_PORT=str(exchange.port))
        said = typed("-p", RULE)
        assert said.returncode == 0, said.stdout + said.stderr
        assert "nothing is wrong" in said.stdout
        assert len(said.stdout.splitlines()) == 1
        ask(exchange, "fapiPrivatePostLeverage", symbol="BTCUSDT", leverage=2)
        said = typed("--venue", "localnet", "--json")
        assert said.returncode == 1
        told = json.loads(said.stdout)["findings"]
        assert [each["name"] for each in told if each["verdict"] == "wrong"] == ["leverage BTC/USDT:USDT"]
        said = typed("--no-orders")
        assert "wrong       leverage BTC/USDT:USDT  BTC/USDT:USDT has the leverage 2 at this exchange" in said.stdout
        assert len(list((project / "reports" / "doctor").glob("*.json"))) == 3
        said = typed("-p", "no_such_module:Rule")
        assert said.returncode == 1
        assert len(said.stderr.splitlines()) == 1
