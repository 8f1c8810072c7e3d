"Pace, restarts and sockets of localnet, over real sockets: one server for all"
import asyncio

import aiohttp
import pytest

from tradelab.localnet.server import TOKEN, Localnet
from tradelab.market.synthetic import ar1

pytestmark = pytest.mark.integration
STREAM = "btcusdt@kline_1h"


async def control(http, net, path, **asked):
    async with http.post(net.control_url + path, json=asked, headers={TOKEN: net.token}) as answer:
        return answer.status, await answer.json()


async def until(ready):
    async with asyncio.timeout(20):
        while not ready(): await asyncio.sleep(.001)


async def check_commands(http, net):
    async with http.ws_connect("/ws") as socket:
        for _ in range(2):
            await socket.send_json({"method": "SUBSCRIBE", "params": [STREAM], "id": "x"})
            while "id" not in (reply := await socket.receive_json()): pass
            assert reply == {"result": None, "id": "x"}


async def check_pace(http, net):
    "In lockstep nothing passes that nobody named; a change counts in the middle of a step, and loses none of it"
    for _ in range(2): assert (await control(http, net, "/speed", speed=0))[1]["steps"] == net.hall.played
    before = net.hall.played
    await control(http, net, "/speed", speed=1)
    await until(lambda: net.steps.played == before + 1)
    assert net.hall.played == before
    assert (await control(http, net, "/restart"))[0] == 200
    await control(http, net, "/speed", speed=0)
    await until(lambda: net.hall.played == before + 1)
    assert net.exchange.market.now == net.service.barrier.step + net.exchange.market.step


async def check_restart(http, net):
    "A restart cuts every socket, also those that hear nothing"
    sockets = [await http.ws_connect(path) for path in ("/ws", "/market/ws/0", f"/ws/{STREAM}", "/ws-fapi/v1")]
    await until(lambda: len(net.service.sockets) == len(sockets))
    assert (await control(http, net, "/restart", loss=True))[0] == 200
    for socket in sockets:
        while (await socket.receive(timeout=20)).type is aiohttp.WSMsgType.TEXT: pass
        assert socket.closed
    assert not net.service.sockets


def test_commands_pace_and_restarts():
    async def run():
        candles = {"BTC/USDT:USDT": ar1(60, seed=1, timeframe="1h")}
        async with (Localnet(candles, start=int(candles["BTC/USDT:USDT"].index[9].timestamp() * 1000)) as net,
                    aiohttp.ClientSession(net.url) as http):
            for check in (check_commands, check_pace, check_restart): await check(http, net)
    asyncio.run(run())
