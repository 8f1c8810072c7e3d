"""What the web API of `tradelab serve` carries: `python benchmarks/api.py [SECONDS]`. One process, with everything that
it does beside; each request has a token and a role. Demanded of the routes that are asked most, which are answered from
what the process has seen last: 1,000 requests a second, 99 of 100 in 100 ms, 512 MB; the exit code is 1 if that is not
so. The other routes of its schema read the ledger, the log or files for each request: they are listed without a demand.
Signing in is left out: a password takes long by design. Who asks needs a core of its own"""
import asyncio
import json
import os
import sys
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from dataclasses import replace

import numpy as np
import psutil
from servers import get, until
from test_api import ACCOUNTS, PEOPLE, SECRET
from test_serve import free_port, served

from tradelab.database.accounts import Accounts
from tradelab.database.records import clock
from tradelab.ops.people import Token, issue
from tradelab.watching import example_session

CONNECTIONS = 16
ROUTES = ("/system/status", "/sessions", "/positions", "/risk/mode", "/risk/limits")
SIGNAL = {"symbol": "BTCUSDT", "action": "buy", "position_size": .05, "confidence": .8}
RATE, LATE, MEMORY = 1_000., 100., 512. # requests a second, ms, MB


def token_of(name):
    now = clock()
    return issue(Token(name, "access", f"of {name}", f"login {name}", now, now + 3_600_000), SECRET, 0)


def requests_of(path, port, body=None):
    "The same request of everybody who may ask it"
    sent = json.dumps(body).encode() if body else b""
    method = "POST" if body else "GET"
    names = ["ada"] if path == "/audit" else PEOPLE
    return [(f"{method} /api/v1{path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token_of(name)}\r\n"
             f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n").encode() + sent
            for name in names]


async def ask(port, asked, until, took):
    "One connection that asks as soon as it is answered"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (began := monotonic()) < until:
        writer.write(asked)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        assert head.startswith(b"HTTP/1.1 200"), head + body[:300]
        took.append(monotonic() - began)
    writer.close()


async def load(port, asked, seconds):
    "How many were answered, how many a second, and how long half and 99 of 100 of them took [ms]"
    took: list[float] = []
    began = monotonic()
    await asyncio.gather(*(ask(port, each, began + seconds, took) for each, _ in zip(cycle(asked), range(CONNECTIONS))))
    return len(took), len(took) / (monotonic() - began), np.quantile(took, [.5, .99]) * 1_000.


def worked(process):
    "Processor time of a process, seconds"
    times = process.cpu_times()
    return times.user + times.system


def most_memory(process):
    "The most that a process has needed at once, MB"
    said = Path(f"/proc/{process.pid}/status").read_text()
    return int(said.split("VmHWM:")[1].split()[0]) / 1024.


def others(port, session):
    "The routes of the schema that read, but for those that are asked most: their paths, as they can be asked"
    headers = {"Authorization": f"Bearer {token_of('ada')}"}
    def read(path): return json.loads(get(f"http://127.0.0.1:{port}/api/v1{path}", headers=headers))
    order = read("/orders?state=all&limit=1")["items"][0]["order_id"]
    known = {"session": session, "symbol": "BTCUSDT", "id": order, "what": "trades"}
    for path, methods in read("/openapi.json")["paths"].items():
        there = path.removeprefix("/api/v1")
        if "get" not in methods or there in ROUTES or path.startswith("/health") or there == "/events": continue
        if "{number}" not in there: yield there.format(**known)


def measured(port, process, path, seconds, body=None):
    "Print what a route carries; requests a second, and how long 99 of 100 take [ms]"
    before = worked(process)
    count, rate, (median, late) = asyncio.run(load(port, requests_of(path, port, body), seconds))
    cost = 1_000. * (worked(process) - before) / count
    shown = path if len(path) < 34 else f"{path[:31]}..."
    print(f"{shown:<34}{rate:>12,.0f}{median:>13.1f}{late:>11.1f}{cost:>10.2f}")
    return rate, late


def main(seconds=5.):
    here, port = os.getcwd(), free_port()
    with TemporaryDirectory() as folder, example_session(finished=True) as place:
        os.chdir(folder)
        Path("tradelab.toml").write_text(f'database = "{place.database}"\nsessions = "{place.sessions}"\n[api]\n'
                                         f"port = {port}\nrate = 1e9\nburst = 1000000\n")
        accounts = Accounts(place.database)
        for name, role in PEOPLE.items(): accounts.put(replace(ACCOUNTS[role], name=name))
        accounts.close()
        with served(api_secret=SECRET) as process:
            headers = {"Authorization": f"Bearer {token_of('vera')}"}
            until(lambda: get(f"http://127.0.0.1:{port}/api/v1/sessions", headers=headers) != b"[]")
            until(lambda: b"tradelab_ledger_up 1" in get(f"http://127.0.0.1:{process.port}/metrics"), 120.)
            asyncio.run(load(port, requests_of(ROUTES[0], port), 1.))
            print(f"{'route':<34}{'requests/s':>12}{'median [ms]':>13}{'99 % [ms]':>11}{'CPU [ms]':>10}")
            server = psutil.Process(process.process.pid)
            found = [measured(port, server, path, seconds) for path in ROUTES]
            found.append(measured(port, server, "/risk/validate-signal", seconds, SIGNAL))
            rate, late, memory = min(each for each, _ in found), max(each for _, each in found), most_memory(server)
            print(f"of these at least {rate:,.0f} a second, 99 % in at most {late:.1f} ms; the process has needed "
                  f"{memory:,.0f} MB at most")
            for path in others(port, place.session): measured(port, server, path, min(seconds, 1.))
            print(f"after all routes {most_memory(server):,.0f} MB at most")
            good = rate >= RATE and late <= LATE and most_memory(server) <= MEMORY
        os.chdir(here)
    print(f"demanded are {RATE:,.0f} a second, {LATE:.0f} ms and {MEMORY:.0f} MB: {'so it is' if good else 'NOT MET'}")
    return 0 if good else 1


if __name__ == "__main__": sys.exit(main(*map(float, sys.argv[1:])))
