"""Real servers for tests, each on a free port of this machine and in a folder of its own: Prometheus, Alertmanager,
InfluxDB, VictoriaMetrics, Redis; and what no real one does on demand: to refuse, to hang, to be slow, to tell all"""
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

import pytest

# the program, and the package of Debian that brings it
PACKAGES = {"prometheus": "prometheus", "promtool": "prometheus", "prometheus-alertmanager": "prometheus-alertmanager",
            "amtool": "prometheus-alertmanager", "influxd": "influxdb", "victoria-metrics": "victoria-metrics",
            "redis-server": "redis-server"}
NOT_SCRAPING = "scrape_configs: []\n"
NOT_TELLING = "route: {receiver: nobody}\nreceivers: [{name: nobody}]\n"
INFLUX = """
reporting-disabled = true
bind-address = "127.0.0.1:{inner}"
[meta]
  dir = "{folder}/meta"
[data]
  dir = "{folder}/data"
  wal-dir = "{folder}/wal"
[http]
  bind-address = "127.0.0.1:{port}"
"""


def program(name):
    "Where a program is; a test that needs it is skipped where it is not installed"
    path = shutil.which(name)
    if not path: pytest.skip(f"{name} is not installed: apt-get install {PACKAGES[name]}")
    return path


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def get(url, data=None, headers=None, limit=5):
    "The body of an answer; HTTPError if it is not a good one"
    asked = urllib.request.Request(url, data, headers or {})
    with urllib.request.urlopen(asked, timeout=limit) as answer: return answer.read()


def ask(url, **parameters): return json.loads(get(f"{url}?{urlencode(parameters)}"))


def until(true, seconds=20., every=.05):
    "What `true` answers as soon as that is something; it is asked often, and may fail meanwhile"
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if found := true(): return found
        except (OSError, ValueError, KeyError, IndexError) as error: last = error
        time.sleep(every)
    raise AssertionError(f"nothing within {seconds:g} s: {last!r}")


class Process:
    "A server that a test may kill, hang and bring back, at the same address and with what it has kept"

    def __init__(self, command, port, ready, scheme="http"):
        self.command, self.ready, self.port = [str(each) for each in command], ready, port
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile()
        self.process = None

    def start(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        until(self._answers)
        return self

    def _answers(self):
        if self.process.poll() is not None: raise AssertionError(f"{self.command[0]} ended:\n{self.words()}")
        return self.ready(self)

    def words(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def hang(self): self.process.send_signal(signal.SIGSTOP)  # connections are accepted, by the kernel, and wait

    def go_on(self): self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def close(self):
        if self.process and self.process.poll() is None:
            self.go_on()
            self.process.terminate()
            try: self.process.wait(5)
            except subprocess.TimeoutExpired: self.kill()
        self.log.close()


@contextmanager
def running(make):
    "A server made by `make(folder, port)`, while the block runs"
    with tempfile.TemporaryDirectory(prefix="tradelab-server-", ignore_cleanup_errors=True) as folder:
        server = make(Path(folder), free_port())
        try: yield server.start()
        finally: server.close()


def at(route):
    "Ready as soon as that route answers well"
    return lambda server: get(server.url + route, limit=1) is not None


def prometheus(config=NOT_SCRAPING):
    "It reads the text of a configuration, or the file at a path, which may name rules beside it"
    found = program("prometheus")
    def make(folder, port):
        file = config if isinstance(config, Path) else folder / "prometheus.yml"
        if not isinstance(config, Path): file.write_text(config)
        return Process((found, f"--config.file={file}", f"--storage.tsdb.path={folder}/data", "--web.enable-lifecycle",
                        f"--web.listen-address=127.0.0.1:{port}"), port, at("/-/ready"))
    return running(make)


def alertmanager(config=NOT_TELLING):
    found = program("prometheus-alertmanager")
    def make(folder, port):
        file = config if isinstance(config, Path) else folder / "alertmanager.yml"
        if not isinstance(config, Path): file.write_text(config)
        return Process((found, f"--config.file={file}", f"--storage.path={folder}/data", "--cluster.listen-address=",
                        f"--web.listen-address=127.0.0.1:{port}"), port, at("/-/ready"))
    return running(make)


def influxdb():
    "InfluxDB 1.6, which knows no /api/v2/write; databases are made by `influx_query(server, 'CREATE DATABASE x')`"
    found = program("influxd")
    def make(folder, port):
        (folder / "influxdb.conf").write_text(INFLUX.format(folder=folder, port=port, inner=free_port()))
        return Process((found, "-config", folder / "influxdb.conf"), port, at("/ping"))
    return running(make)


def influx_query(server, words, database=""):
    "The series that InfluxQL finds"
    found = json.loads(get(f"{server.url}/query", urlencode({"q": words, "db": database}).encode()))
    return found["results"][0].get("series", [])


def victoria_metrics(config=None):
    """Takes line protocol at /write and at /api/v2/write, scrapes what the file at a path tells Prometheus to, and
    answers PromQL at /api/v1/query"""
    found = program("victoria-metrics")
    scraping = (f"-promscrape.config={config}", "-promscrape.config.strictParse=false") if config else ()
    def make(folder, port):
        return Process((found, f"-storageDataPath={folder}", f"-httpListenAddr=127.0.0.1:{port}", "-retentionPeriod=1",
                        "-search.latencyOffset=0s", *scraping), port, at("/health"))
    return running(make)


def written(server):
    "VictoriaMetrics makes what it has taken ready for queries, at once rather than within ten seconds"
    get(f"{server.url}/internal/force_flush")


def pong(server):
    with socket.create_connection(("127.0.0.1", server.port), 1) as line:
        line.sendall(b"PING\r\n")
        return line.recv(16).startswith((b"+PONG", b"-NOAUTH"))


def redis(*options):
    found = program("redis-server")
    def make(folder, port):
        return Process((found, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
                        "--dir", folder, *options), port, pong, "redis")
    return running(make)


@contextmanager
def refusing():
    "A port of 127.0.0.1 where nobody listens, and nobody else will"
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextmanager
def hanging(port=0):
    "A port that accepts and never answers"
    with socket.create_server(("127.0.0.1", port), backlog=100) as server:
        yield server.getsockname()[1]


class Webhook(ThreadingHTTPServer):
    "Takes whatever is sent to it: `.heard` are (path, headers, body); it answers with `.status` and `.answer`"
    daemon_threads = True

    def __init__(self, status=200, answer=b"{}", delay=0., port=0):
        super().__init__(("127.0.0.1", port), Taking)
        self.status, self.answer, self.delay, self.heard = status, answer, delay, []
        self.headers, self.over = {}, threading.Event()  # of its answers; set when it closes
        self.port = self.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def bodies(self): return [body.decode() for _, _, body in self.heard]


class Taking(BaseHTTPRequestHandler):
    def take(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.heard.append((self.path, dict(self.headers), body))
        if self.server.delay: self.server.over.wait(self.server.delay)
        self.send_response(self.server.status)
        for name, value in self.server.headers.items(): self.send_header(name, value)
        empty = self.server.status in (204, 304)
        if not empty: self.send_header("Content-Length", str(len(self.server.answer)))
        self.end_headers()
        if not empty: self.wfile.write(self.server.answer)

    do_GET = do_POST = do_PUT = take

    def log_message(self, *_): pass


@contextmanager
def webhook(status=200, answer=b"{}", delay=0., port=0):
    server = Webhook(status, answer, delay, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .05}, daemon=True)
    thread.start()
    try: yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def slow(delay=1., status=200): return webhook(status, delay=delay)
