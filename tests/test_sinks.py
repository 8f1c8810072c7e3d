"""What leaves for databases of time series, for Prometheus and for the ledger, at real servers: it comes back by query,
also after a server was away; one that hangs or is dead holds up nobody"""
import asyncio
import json
import re
import subprocess
from time import monotonic

import aiohttp
import pytest
import yaml
from pydantic import SecretStr
from servers import (
    alertmanager,
    ask,
    get,
    hanging,
    influx_query,
    influxdb,
    program,
    prometheus,
    refusing,
    until,
    victoria_metrics,
    webhook,
    written,
)

from tradelab.config import settings
from tradelab.database.operations import Operations
from tradelab.database.reading import reading
from tradelab.database.records import SystemMetric, clock
from tradelab.database.schema import MEASURED
from tradelab.live.ledger import Ledger
from tradelab.ops.exposition import text_of
from tradelab.ops.line_protocol import AGAIN, HOUR, LedgerSink, LineSink, target_of
from tradelab.ops.metrics import METRICS, Sample
from tradelab.ops.provision import BOARDS, RULES, Places, dashboard_of, provision
from tradelab.ops.samples import Gatherer

pytestmark = pytest.mark.integration
NOW = clock() // 60_000 * 60_000
TOKEN = "planted-token-of-influx-0123"
EVIL = ("a b", "a,b", "a=b", 'a"b', "a'b", "BTC/USDT:USDT", "ends,", "ends=", "ends ", "ö€", "a\\", "a\\,b", "\\",
        "line\nend", "a\ttab", "es\x1b[2Jcape", "x" * 5_000, "#", "{}", "$x", "sur\ud800rogate")
READ = {"ends ": "ends", "a\\": "a/", "a\\,b": "a/,b", "\\": "/", "line\nend": "line end", "a\ttab": "a tab",
        "es\x1b[2Jcape": "escape",
        "x" * 5_000: "x" * 199 + "…", "sur\ud800rogate": "surrogate"}


def sample(name, value, labels=None, time=NOW): return Sample(name, value, labels or {}, time)


def sink_to(url, database="", token=True, **others):
    here = settings(influx_url=url, influx_token=SecretStr(TOKEN) if token else None,
                    telemetry={"database": database, "org": "us", "bucket": "tradelab"})
    return LineSink(target_of(here), **{"pause": 0., **others})


def sent(sink, samples=()):
    "What waits is sent once"
    async def once():
        async with aiohttp.ClientSession() as session: await sink.send(session)
    sink.take(samples)
    asyncio.run(once())
    return sink


MANY = [sample("equity_quote", number / 7, {"session": "one"}, NOW - 1_000 * number) for number in range(5_000)]


def test_influxdb_gives_back_what_it_was_sent():
    with influxdb() as server:
        influx_query(server, "CREATE DATABASE mine")
        sink = sent(sink_to(server.url, "mine"), [*MANY, sample("process_cpu_ratio", .25)])
        assert (sink.trouble, sink.dropped) == ("", 0)
        (found,) = influx_query(server, "SELECT count(equity_quote), sum(equity_quote) FROM tradelab", "mine")
        assert found["values"][0][1:] == [5_000, pytest.approx(sum(each.value for each in MANY))]
        (found,) = influx_query(server, "SELECT equity_quote FROM tradelab WHERE session = 'one' LIMIT 2", "mine")
        assert [row[1] for row in found["values"]] == [4_999 / 7, 4_998 / 7]
        (found,) = influx_query(server, "SELECT system_cpu_usage FROM tradelab", "mine")  # the owner's name
        assert [row[1] for row in found["values"]] == [.25]
        sent(sink, [sample("orders_total", 1.), sample("orders_total", 2.)])    # of one millisecond
        (found,) = influx_query(server, "SELECT orders_total FROM tradelab", "mine")
        assert [row[1] for row in found["values"]] == [1., 2.]
        sent(sink, [sample("equity_quote", 1., {"session": text}) for text in EVIL])
        (found,) = influx_query(server, "SHOW TAG VALUES FROM tradelab WITH KEY = session", "mine")
        assert {row[1] for row in found["values"]} == {"one"} | {READ.get(text, text) for text in EVIL}
        assert (sink.trouble, sink.dropped) == ("", 0)


@pytest.mark.parametrize("database", ["", "mine"], ids=["api/v2/write", "write"])
def test_victoria_metrics_gives_back_what_it_was_sent(database):
    with victoria_metrics() as server:
        labelled = [sample("positions", float(number), {"session": text}) for number, text in enumerate(EVIL)]
        sink = sent(sink_to(server.url, database), [*MANY, *labelled])
        assert (sink.trouble, sink.dropped) == ("", 0)
        written(server)
        exported = get(f"{server.url}/api/v1/export?match[]=tradelab_equity_quote").splitlines()
        values = [value for line in exported for value in json.loads(line)["values"]]
        assert sorted(values) == pytest.approx([each.value for each in MANY])
        found = ask(f"{server.url}/api/v1/query", query="tradelab_active_positions", time=NOW / 1_000)["data"]["result"]
        assert {series["metric"]["session"]: float(series["value"][1]) for series in found} == {
            READ.get(text, text): float(number) for number, text in enumerate(EVIL)}


def test_what_a_server_missed_it_gets_when_it_is_back():
    with influxdb() as server:
        influx_query(server, "CREATE DATABASE mine")
        sink = sink_to(server.url, "mine", limit=.3, most=4)
        async def life():
            part = asyncio.create_task(sink.run())
            async def so(true):
                async with asyncio.timeout(20):
                    while not true(): await asyncio.sleep(.01)
            for number, (harm, mend) in enumerate(((server.kill, server.start), (server.hang, server.go_on))):
                await asyncio.to_thread(harm)
                sink.take([sample("equity_quote", float(number), {}, NOW + 1_000 * (10 * number + row))
                           for row in range(6)])
                await so(lambda: sink.trouble)
                sink.pause = .01
                await asyncio.to_thread(mend)
                await so(lambda: not sink.trouble and not sink.waiting.lines)
            part.cancel()
            await asyncio.gather(part, return_exceptions=True)
        sink.pause = .01
        asyncio.run(life())
        assert sink.dropped == 4  # twice the two oldest of six
        (found,) = influx_query(server, "SELECT equity_quote FROM tradelab", "mine")
        assert [row[1] for row in found["values"]] == [0.] * 4 + [1.] * 4


@pytest.mark.parametrize("dead", [refusing, hanging], ids=["refuses", "hangs"])
def test_it_ends_at_once_at_a_dead_server(dead, caplog):
    with dead() as port:
        sink = sink_to(f"http://127.0.0.1:{port}", limit=.1, pause=.01, most=100)
        async def life():
            part = asyncio.create_task(sink.run())
            sink.take(MANY)
            async with asyncio.timeout(20):
                while sink.failures < 2: await asyncio.sleep(.01)
            part.cancel()
            began = monotonic()
            await asyncio.gather(part, return_exceptions=True)
            return monotonic() - began
        assert asyncio.run(life()) < 1.
        assert sink.dropped == len(MANY)
        said = [record.message for record in caplog.records if "does not take samples" in record.message]
        assert len(said) == 1
        assert TOKEN not in said[0]


def test_what_an_old_server_answers_is_said_without_the_token():
    with influxdb() as server:
        sink = sent(sink_to(server.url, pause=1.), MANY[:3])
        assert sink.trouble.startswith("404")    # InfluxDB 1.6 knows no /api/v2/write
        assert len(sink.waiting.lines) == 3
        assert sent(sink_to(server.url, "nobodys", pause=1.), MANY[:3]).trouble.startswith("404")
    with webhook(401, f"unauthorized: {TOKEN}\n".encode() + b"x" * 100_000_000) as server:
        sink = sent(sink_to(server.url, pause=1.), MANY[:3])
        assert sink.trouble.startswith("401 unauthorized: [redacted] xxx")
        assert len(sink.trouble) < 300
        (path, headers, _), = server.heard
        assert path == "/api/v2/write?org=us&bucket=tradelab"
        assert headers["Authorization"] == f"Token {TOKEN}"


def test_a_server_that_answers_nonsense_is_a_failure_like_others():
    with webhook(200, b"x" * 1_000) as server:
        sink = sink_to(server.url)
        assert sent(sink, MANY[:1]).trouble == ""
        server.status = 999
        sink.pause = 1.
        assert sent(sink, MANY[:1]).trouble.startswith("999")
        assert len(sink.waiting.lines) == 1


def kept(url, session):
    "What the ledger keeps of the figures of a session, newest last"
    with reading(url) as look: rows = look.rows(MEASURED[SystemMetric], session=session)
    return [(row["time"], row["name"], row["value"]) for row in sorted(rows, key=lambda row: row["time"])]


def test_gauges_are_kept_in_the_ledger_for_so_many_days(database_url):
    Ledger(database_url).close()
    operations = Operations(database_url)
    sink = LedgerSink(operations, .01, days=2)
    exposure = {"session": "one", "symbol": "BTC/USDT:USDT"}
    async def at(time, value):
        sink.take([sample("equity_quote", value, {"session": "one"}, time),
                   sample("exposure_quote", value, exposure, time),
                   sample("memory_ratio", .5, {}, time), sample("process_cpu_ratio", .1, {"session": "one"}, time),
                   sample("orders_total", 1., {"session": "one"}, time)])
        await sink.write()
    for time, value in ((NOW, 1.), (NOW + 1_000, 1.), (NOW + 2_000, 2.)): asyncio.run(at(time, value))
    first = [(time, name, value) for time, value in ((NOW, 1.), (NOW + 2_000, 2.))
             for name in ("equity_quote", 'exposure_quote{symbol="BTC/USDT:USDT"}')]
    assert sorted(kept(database_url, "one")) == sorted(first)
    assert kept(database_url, "") == [(NOW, "memory_ratio", .5)]
    asyncio.run(at(late := NOW + 48 * HOUR + 1_500, 3.))
    assert {row[0] for row in kept(database_url, "one")} == {NOW + 2_000, late}  # the older ones are two days old
    assert kept(database_url, "") == [(late, "memory_ratio", .5)]
    assert sink.trouble == ""
    operations.close()


def test_a_ledger_that_is_not_there_ends_nothing(tmp_path):
    async def life(sink):
        part = asyncio.create_task(sink.run())
        async with asyncio.timeout(20):
            while not sink.dropped:
                sink.take([sample("equity_quote", 1.)])
                await asyncio.sleep(.01)
            assert "there is no ledger at" in sink.trouble
            await asyncio.to_thread(lambda: Ledger(sink.url).close())
            while sink.trouble:
                sink.take([sample("equity_quote", 2., {}, NOW + AGAIN)])
                await asyncio.sleep(.01)
        part.cancel()
        await asyncio.gather(part, return_exceptions=True)
    sink = LedgerSink(Operations(url := f"sqlite:///{tmp_path}/tradelab.db"), .01)
    sink.url = url
    asyncio.run(life(sink))
    assert kept(url, "") == [(NOW + AGAIN, "equity_quote", 2.)]
    sink.operations.close()


def checked(name, *arguments, folder):
    "What a tool says of the files of a folder"
    ran = subprocess.run([program(name), *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    return ran.returncode, ran.stdout + ran.stderr


def test_the_tools_of_prometheus_and_alertmanager_accept_what_is_provisioned(tmp_path):
    provision(tmp_path, settings(metrics_token="a-token-of-metrics"), Places(webhook="http://127.0.0.1:9/hook"))
    code, said = checked("promtool", "check", "config", "prometheus.yml", folder=tmp_path)
    assert code == 0, said
    assert f"{len(RULES)} rules found" in said
    code, said = checked("amtool", "check-config", "alertmanager.yml", folder=tmp_path)
    assert code == 0, said


def test_each_rule_fires_beyond_its_limit_and_not_before(tmp_path):
    provision(tmp_path, settings())
    code, said = checked("promtool", "test", "rules", "rules_test.yml", folder=tmp_path)
    assert (code, said.split()[-1]) == (0, "SUCCESS"), said
    tests = yaml.safe_load((tmp_path / "rules_test.yml").read_text())
    for test in tests["tests"]: # each of them can fail
        for row in test["promql_expr_test"]:
            row["exp_samples"] = [] if row["exp_samples"] else [{"labels": "{}", "value": 1}]
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(tests))
    code, said = checked("promtool", "test", "rules", "rules_test.yml", folder=tmp_path)
    assert (code, said.count("expr:")) == (1, 3 * len(RULES)), said


def page(times):
    "Every metric of the table as `tradelab serve` shows it, its counters so many times increased"
    gatherer = Gatherer(settings())
    for metric in METRICS.values():
        each = sample(metric.name, float(times), dict.fromkeys(metric.labels, "one"))
        if metric.kind == "histogram":
            for _ in range(times): gatherer.observe(each)
        else: gatherer.latest[each.key] = each
    return text_of(gatherer)


def check_dashboards(found):
    "Each query of each panel names metrics of the table alone, and is answered with the labels of its legend"
    for title, panels in BOARDS.items():
        for panel in dashboard_of(title, panels)["panels"]:
            for asked in panel["targets"]:
                named = re.findall(r"tradelab_(\w+)", asked["expr"])
                assert all(name.removesuffix("_bucket") in METRICS for name in named)
                series = found(asked["expr"].replace("$session", ".*"))
                assert series, (panel["title"], asked["expr"])
                assert series[0]["value"][1] != "NaN", (panel["title"], asked["expr"])
                labels = set(re.findall(r"{{(\w+)}}", asked["legendFormat"]))
                assert labels <= set(series[0]["metric"]), (panel["title"], labels)


def scraped(trader, found):
    "Two scrapes, between which everything is counted up"
    until(lambda: found("tradelab_trades_total == 1"))
    trader.answer = page(2)
    until(lambda: found("tradelab_trades_total == 2"))


def answers_of(server): return lambda words: ask(f"{server.url}/api/v1/query", query=words)["data"]["result"]


def test_victoria_metrics_answers_the_dashboards_too(tmp_path):
    with webhook(answer=page(1)) as trader:
        provision(tmp_path, settings(metrics_port=trader.port, telemetry={"interval": .1}))
        with victoria_metrics(tmp_path / "prometheus.yml") as server:
            found = answers_of(server)
            scraped(trader, lambda words: written(server) or found(words))
            check_dashboards(found)


def test_each_query_of_the_dashboards_is_answered_and_an_alert_arrives(tmp_path):
    with webhook(answer=page(1)) as trader, webhook() as hook:
        here = settings(metrics_port=trader.port, metrics_token=TOKEN, telemetry={"interval": .1})
        provision(tmp_path, here, Places(webhook=f"{hook.url}/hook"))
        hurried = (tmp_path / "alertmanager.yml").read_text().replace("group_wait: 10s", "group_wait: 10ms")
        with alertmanager(hurried) as teller:
            provision(tmp_path, here, Places(alertmanager=f"127.0.0.1:{teller.port}"), replace=True)
            with prometheus(tmp_path / "prometheus.yml") as server:
                found = answers_of(server)
                scraped(trader, found)
                check_dashboards(found)
                assert found('tradelab_job_runs_total{job="one"}') # its own label, and not the name of the scrape
                (body, *_) = until(lambda: [body for body in hook.bodies() if "DrawdownDeep" in body])
                (alert, *_) = json.loads(body)["alerts"]
                assert alert["labels"]["session"] == "one"
                assert alert["annotations"]["summary"] == "session one is 100% below its peak"
                assert {headers["Authorization"] for _, headers, _ in trader.heard} == {f"Bearer {TOKEN}"}
                trader.status = 500
                until(lambda: found('up{job="tradelab"} == 0'))


def test_an_alert_that_is_posted_arrives_at_the_webhook(tmp_path):
    with webhook() as hook:
        provision(tmp_path, settings(), Places(webhook=f"{hook.url}/hook"))
        file = tmp_path / "alertmanager.yml"
        with alertmanager(file.read_text().replace("group_wait: 10s", "group_wait: 10ms")) as server:
            alert = {"labels": {"alertname": "Planted", "session": "one", "severity": "critical"},
                     "annotations": {"summary": "it is a test"}}
            get(f"{server.url}/api/v2/alerts", json.dumps([alert]).encode(), {"Content-Type": "application/json"})
            (body,) = until(hook.bodies)
            assert json.loads(body)["alerts"][0]["annotations"]["summary"] == "it is a test"
