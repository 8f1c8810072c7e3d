"The servers that other tests use: real ones answer, hang and come back; those of our own do what they are for"
import socket
import urllib.error

import pytest
from servers import (
    alertmanager,
    ask,
    get,
    hanging,
    influx_query,
    influxdb,
    prometheus,
    redis,
    refusing,
    slow,
    until,
    victoria_metrics,
    webhook,
    written,
)

pytestmark = pytest.mark.integration


def test_prometheus_answers():
    with prometheus() as server: assert ask(f"{server.url}/api/v1/query", query="1 + 1")["data"]["result"][1] == "2"
    with pytest.raises(urllib.error.URLError): get(server.url)


def test_alertmanager_answers():
    with alertmanager() as server: assert ask(f"{server.url}/api/v2/status")["cluster"]["status"] == "disabled"


def test_influxdb_takes_lines_hangs_and_comes_back():
    with influxdb() as server:
        influx_query(server, "CREATE DATABASE here")
        get(f"{server.url}/write?db=here", b"one value=1.5 1700000000000000000")
        server.hang()
        with pytest.raises(TimeoutError): get(f"{server.url}/ping", limit=.2)
        server.go_on()
        assert influx_query(server, "SELECT value FROM one", "here")[0]["values"][0][1] == 1.5
        server.kill()
        with pytest.raises(urllib.error.URLError): get(f"{server.url}/ping")
        server.start()
        assert influx_query(server, "SELECT value FROM one", "here")[0]["values"][0][1] == 1.5


def test_victoria_metrics_takes_lines():
    with victoria_metrics() as server:
        get(f"{server.url}/api/v2/write", b"one value=2.5")
        written(server)
        found = until(lambda: ask(f"{server.url}/api/v1/query", query="one_value")["data"]["result"])
        assert found[0]["value"][1] == "2.5"


def test_redis_answers():
    with redis() as server: assert server.url.startswith("redis://127.0.0.1:")


def test_refusing_hanging_and_slow():
    with refusing() as port, pytest.raises(ConnectionRefusedError): socket.create_connection(("127.0.0.1", port), 1)
    with hanging() as port, pytest.raises(TimeoutError): get(f"http://127.0.0.1:{port}", limit=.2)
    with slow(30.) as server, pytest.raises(TimeoutError): get(server.url, limit=.2)  # and is closed at once


def test_a_webhook_hears():
    with webhook(204) as server:
        get(f"{server.url}/here", b"words", {"Authorization": "Bearer x"})
        (path, headers, _), = server.heard
        assert (path, headers["Authorization"], server.bodies()) == ("/here", "Bearer x", ["words"])
        server.status = 429
        with pytest.raises(urllib.error.HTTPError, match="429"): get(server.url)
