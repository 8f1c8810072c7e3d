"""What the web API of `tradelab serve` carries: `python benchmarks/api.py [SECONDS]`. One process, with everything that
it does beside; each request has a token and a role. Demanded: 1,000 requests a second, 99 of 100 in 100 ms, 512 MB"""
import asyncio
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from dataclasses import replace

import numpy as np
import psutil
from test_api import ACCOUNTS, PEOPLE, SECRET
from test_serve import free_port, served

from tradelab.database.accounts import Accounts
from tradelab.database.records import clock
from tradelab.ops.people import Token, issue
from tradelab.watching import example_session

CONNECTIONS = 16
ROUTES = ("/system/status", "/positions", "/risk/mode", "/orders")


def request_of(path, port, token):
    return (f"GET /api/v1{path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n\r\n").encode()


async def ask(port, asked, until, took):
    "One connection that asks as soon as it is answered"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (began := monotonic()) < until:
        writer.write(asked)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        took.append(monotonic() - began)
    writer.close()


async def load(port, path, token, seconds):
    took: list[float] = []
    began = monotonic()
    await asyncio.gather(*(ask(port, request_of(path, port, token), began + seconds, took) for _ in range(CONNECTIONS)))
    return len(took), len(took) / (monotonic() - began), np.quantile(took, [.5, .99]) * 1_000.


def worked(process):
    "Processor time of a process, seconds"
    times = process.cpu_times()
    return times.user + times.system


def main(seconds=5.):
    here, port = os.getcwd(), free_port()
    with TemporaryDirectory() as folder, example_session(finished=True) as place:
        os.chdir(folder)
        Path("tradelab.toml").write_text(f'database = "{place.database}"\nsessions = "{place.sessions}"\n[api]\n'
                                         f"port = {port}\nrate = 1e9\nburst = 1000000\n")
        accounts = Accounts(place.database)
        for name, role in PEOPLE.items(): accounts.put(replace(ACCOUNTS[role], name=name))
        accounts.close()
        now = clock()
        token = issue(Token("vera", "access", "one", "login", now, now + 3_600_000), SECRET, 0)
        with served(api_secret=SECRET) as process:
            asyncio.run(asyncio.sleep(3.))
            asyncio.run(load(port, ROUTES[0], token, 1.))
            print(f"{'route':<18}{'requests/s':>12}{'median [ms]':>13}{'99 % [ms]':>11}{'CPU [ms]':>10}")
            server = psutil.Process(process.process.pid)
            for path in ROUTES:
                before = worked(server)
                count, rate, (median, late) = asyncio.run(load(port, path, token, seconds))
                cost = 1_000. * (worked(server) - before) / count
                print(f"{path:<18}{rate:>12,.0f}{median:>13.1f}{late:>11.1f}{cost:>10.2f}")
            print(f"memory {server.memory_info().rss / 2**20:,.0f} MB")
        os.chdir(here)


if __name__ == "__main__": main(*map(float, sys.argv[1:]))
