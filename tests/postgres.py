"A real PostgreSQL for tests: the one at POSTGRES_FOR_TESTS, or one that is started from the machine's binaries"
import os
import re
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from socket import socket

import psycopg
import pytest
import sqlalchemy as sql

GIVEN = os.environ.get("POSTGRES_FOR_TESTS", "") # such as postgresql://postgres@127.0.0.1:15432/postgres


def binaries():
    "The folder of the newest server on this machine, or None"
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[-3]))
    path = found[-1] if found else shutil.which("pg_ctl")
    return Path(path).parent if path else None


def as_its_user(*command):
    "It refuses root"
    if os.geteuid() == 0: command = ("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", *command)
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.run(list(map(str, command)), check=True, cwd="/", timeout=60, **nowhere)


class Server:
    "A server of one's own, in a folder of /tmp"
    def __init__(self):
        self.bin, self.folder = binaries(), Path(tempfile.mkdtemp(prefix="tradelab-postgres-"))
        if os.geteuid() == 0: shutil.chown(self.folder, "postgres")
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        as_its_user(self.bin / "initdb", "-D", self.folder / "data", "-A", "trust", "-U", "postgres", "--no-sync", "-E",
                    "UTF8", "--locale=C.UTF-8")
        self.start()

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        as_its_user(self.bin / "pg_ctl", "-D", self.folder / "data", "-w", "-l", self.folder / "log", "-o",
                    f"{options} -c fsync=off", "start")

    def stop(self, mode="immediate"):
        as_its_user(self.bin / "pg_ctl", "-D", self.folder / "data", "-w", "-m", mode, "stop")

    def close(self):
        self.stop()
        shutil.rmtree(self.folder)


@pytest.fixture(scope="session")
def own_server():
    "One that a test may stop"
    if not binaries(): pytest.skip("no PostgreSQL on this machine: apt-get install postgresql")
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def server_url(request): return GIVEN or request.getfixturevalue("own_server").url


@contextmanager
def database_at(url, name):
    "An empty database of a server; its URL"
    engine = sql.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT",
                               poolclass=sql.pool.NullPool)
    name = re.sub(r"\W", "_", name.lower())[:40] + f"_{os.getpid()}"
    with engine.connect() as connection:
        connection.execute(sql.text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
        connection.execute(sql.text(f'CREATE DATABASE "{name}"'))
    try: yield url.rpartition("/")[0] + f"/{name}"
    finally:
        with engine.connect() as connection: connection.execute(sql.text(f'DROP DATABASE "{name}" WITH (FORCE)'))
        engine.dispose()


@pytest.fixture
def postgres(server_url, request):
    "The URL of an empty database"
    with database_at(server_url, request.node.name) as url: yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    "Of an empty ledger, in each database"
    if request.param == "sqlite": return f"sqlite:///{tmp_path}/tradelab.db"
    return request.getfixturevalue("postgres")


def pause(process): os.kill(process, signal.SIGSTOP)
def go_on(process): os.kill(process, signal.SIGCONT)


@contextmanager
def asked(url):
    "A person at the server, on a connection that nothing here ends"
    with psycopg.connect(url, autocommit=True) as connection: yield connection


def others(connection):
    "The server's processes that work for somebody else in this database"
    found = connection.execute("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND "
                               "backend_type = 'client backend' AND pid <> pg_backend_pid()")
    return [row[0] for row in found]


def terminate(connection):
    for process in others(connection): connection.execute("SELECT pg_terminate_backend(%s, 5000)", (process,))


def doubled(ledger, name):
    "What was learned of an order twice running; an amendment and its proof are written alike"
    last, amended, found = {}, set(), []
    for row in ledger.order_events(name):
        event = {key: value for key, value in row.items() if key not in ("number", "time")}
        order, before = row["order_id"], last.get(row["order_id"])
        if before == event and order not in amended: found.append(row)
        amended.discard(order)
        if before and before["revision"] != event["revision"]: amended.add(order)
        last[order] = event
    return found
