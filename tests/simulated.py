"""A session and an exchange on one heap of events, in virtual time: the live session as it is, localnet's exchange as
it is, and between them a client that takes requests and frames over in place of sockets. The same seed, the same run"""
import asyncio
import contextlib
import itertools
import json
import re
import selectors
import sys
from collections import Counter, defaultdict
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest.mock import patch
from urllib.parse import urlencode

import numpy as np
from pydantic import SecretStr

from tradelab.config import VenueSettings
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.live import lease as leases
from tradelab.live import ledger as ledgers
from tradelab.live import session as sessions
from tradelab.live.ledger import MemoryLedger
from tradelab.live.recorder import MemoryRecorder
from tradelab.live.session import Session
from tradelab.live.venue import VenueError
from tradelab.localnet.faults import Faults
from tradelab.localnet.protocol import ApiKey, signature
from tradelab.localnet.server import ENDPOINTS, Terms, make_exchange
from tradelab.localnet.service import Service, advance, answer, answer_frame, greet, readers_on, tend
from tradelab.localnet.sources import Replay, Steps
from tradelab.localnet.streams import CommandError, Reader, open_at, read_address
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1, funding
from tradelab.orders import LIMIT, MARKET, NONE, STOP, TAKE_PROFIT, TRAILING
from tradelab.policies import Policy
from tradelab.risk.execution import OrderGate
from tradelab.settings import NO_STOPS, CostModel, Execution, Limits
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader
from tradelab.venues import binance_market
from tradelab.venues.binance import BinanceVenue
from tradelab.venues.binance_client import RECEIVE_WINDOW
from tradelab.venues.pacing import Allowance, check_allowed
from tradelab.venues.refusals import OUR_CLOCK, Reply, error_code

SYMBOLS = "BTC/USDT:USDT", "ETH/USDT:USDT"
KEY, SECRET = "simulated-key", "simulated-secret"
HISTORY = 12
INSTRUMENTS = tuple(replace(BITCOIN, symbol=symbol, min_notional=5.) for symbol in SYMBOLS)
TIMEOUT = 10.  # seconds that the client waits for a reply


# --- time

class _NoSelector(selectors.BaseSelector):
    "There are no sockets: to wait is to let the time pass"
    def __init__(self): self.passed, self.files = 0., {}
    def register(self, file, events, data=None): self.files[file] = selectors.SelectorKey(file, 0, events, data)
    def unregister(self, file): return self.files.pop(file)
    def get_map(self): return self.files
    def select(self, timeout=None):
        if timeout is None: raise RuntimeError("nothing will ever happen again, and somebody waits")
        self.passed += max(timeout, 0.)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    "asyncio's own heap of timers, with a clock that jumps from one to the next"
    def __init__(self, begin):
        self._virtual = _NoSelector()
        super().__init__(self._virtual)
        self.begin, self._clock_resolution = begin, 1e-6   # ms
    def time(self): return self._virtual.passed
    def now(self): return self.begin + round(1000 * self._virtual.passed)
    def add_signal_handler(self, number, *arguments): pass
    def remove_signal_handler(self, number): pass
    def _write_to_self(self): pass
    def run_in_executor(self, executor, function, *arguments):
        done = self.create_future()
        done.set_result(function(*arguments))
        return done


# --- the exchange

@cache
def market(seed, timeframe, length):
    candles = {symbol: ar1(length, volatility=.01, seed=seed + n, timeframe=timeframe)
               for n, symbol in enumerate(SYMBOLS)}
    rates = {symbol: funding(frame, seed=n) for n, (symbol, frame) in enumerate(candles.items())}
    return candles, rates


def trader(limits=Limits(stops=NO_STOPS), execution=Execution()):
    policy = Momentum(lookback=2, threshold=.001)
    return Trader(policy, Observation.from_policy(policy), OrderGate, limits, INSTRUMENTS, execution=execution)


def _orders(parameters, memory, observation, prices, answer):
    "Orders of every kind that come, move, shrink and go, as a seed and the number of the decision say"
    memory[0] += 1.
    random = Random(f"{parameters[0]} {memory[0]}")
    for n, k in itertools.product(range(len(prices)), range(answer.shape[1])):
        row, side, chance = answer[n, k], random.choice((-1., 1.)), random.random()
        if row["kind"] != NONE and chance < .4:
            if chance < .15: row["kind"] = NONE
            elif chance < .3 and row["price"] > 0.: row["price"] *= random.uniform(.997, 1.003)
            else: row["exposure"] *= .6
        elif row["kind"] == NONE and chance < .5:
            kind = random.choice((MARKET, LIMIT, LIMIT, STOP, STOP, TAKE_PROFIT, TRAILING))
            away = (1. if kind == STOP else -1.) * side * random.uniform(0., .01)
            row["kind"], row["exposure"] = kind, side * random.uniform(.02, .08)
            row["price"] = prices[n] * random.uniform(.99, 1.01) if kind == LIMIT else 0.
            row["trigger"] = prices[n] * (1. + away) if kind in (STOP, TAKE_PROFIT) else 0.
            row["callback"] = random.uniform(.002, .01) if kind == TRAILING else 0.


def trader_of_orders(seed=0):
    policy = Policy("orders", _orders, np.array([float(seed)]), order_slots=2, memory=1)
    limits = Limits(max_position=.3, max_drawdown=.9, max_daily_loss=None, price_band=None, stops=NO_STOPS)
    return Trader(policy, Observation.from_policy(policy), OrderGate, limits, INSTRUMENTS)


class World:
    "The exchange, the time, and what goes wrong"

    def __init__(self, seed, timeframe="1m", candles=20, market_seed=0, slow=0., kills=(), profile="backtest",
                 records=False):
        frames, rates = market(market_seed, timeframe, HISTORY + candles + 2)
        self.source = Replay(frames, rates, int(times(frames[SYMBOLS[0]])[HISTORY]), instruments=INSTRUMENTS)
        self.timeframe, self.step, self.candles = timeframe, self.source.step, candles
        self.loop = VirtualLoop(self.source.now)
        self.random, self.profile = Random(f"world {seed}"), profile
        self.slow = slow                     # share of requests that take seconds
        self.faults = Faults(seed=seed)
        self.begin()
        self.advance()
        self.happened = 0                    # doors that somebody went through
        self.kills = set(kills)              # at which of them the process dies
        self.process, self.numbers = None, itertools.count(1)
        self.alive = set()                   # owners of leases
        self.records = records               # whether what the core hears and answers is kept, for a replay
        self.trace = []
        self.over = False                    # nobody starts a session any more

    def begin(self, made=0):
        "An exchange without orders, after so many moves of its market"
        self.exchange = make_exchange(self.source, Terms(CostModel(), profile=self.profile))
        self.steps = Steps(self.source.steps())
        self.exchange.step(self.steps.take(made))
        self.exchange.take_events()
        self.exchange.market.take_events()
        self.service = Service(self.exchange, ENDPOINTS, [ApiKey(KEY, SECRET)], faults=self.faults,
                               clock=self.loop.now)
        self.service.made = made

    def advance(self):
        "A candle closes"
        moves = next(self.steps, None)
        if moves is not None: advance(self.service, moves)

    async def play(self):
        "Let candles close at their times; what faults put off is looked after between them"
        for n in range(1, self.candles + 1):
            for part in range(1, 13):
                at = (n - 1 + part / 12) * self.step / 1000
                await asyncio.sleep(at - self.loop.time())
                self.tend()
            self.advance()
            self.tend()

    def tend(self):
        for command in tend(self.service): self.restart(command.loss)
        for at, _ in self.service.late: self.loop.call_later((at - self.loop.now()) / 1000, self.tend)

    def restart(self, loss):
        "The server is begun again; with loss it has forgotten everything but the market"
        for reader in readers_on(self.service, "*"): reader.close(1006)
        self.service.streams.keys.forget()
        if loss: self.begin(self.service.made)

    def latency(self):
        "Seconds for one way"
        if self.random.random() < self.slow: return self.random.uniform(1., 9.)
        return self.random.uniform(.005, .1)

    def door(self, process, what):
        "Somebody goes through a door, or dies in it; whether he is alive behind it"
        if process.dead: return False
        self.happened += 1
        self.trace.append((self.loop.now(), what))
        if self.happened in self.kills: process.kill()
        return not process.dead

    def doors(self, begin, end):
        "The numbers of those that were gone through from this time to that one (ms)"
        gone = [time for time, what in self.trace if not what.startswith("arrives ")]
        return [n for n, time in enumerate(gone, 1) if begin <= time <= end]

    def account(self): return self.exchange.accounts["main"]

    def positions(self):
        return {symbol: self.account().held(n, "BOTH") for n, symbol in enumerate(SYMBOLS)}

    def executed(self):
        "Signed base units by the name of the order"
        found = defaultdict(float)
        for order in self.account().orders.values():
            found[order.client_id] += order.executed if order.side == "BUY" else -order.executed
        return dict(found)


# --- between the two

class ClientConnectorError(OSError): "No connection was made"


def frames_of(data):
    while data:
        size, start = data[1] & 127, 2
        if size == 126: size, start = int.from_bytes(data[2:4]), 4
        elif size == 127: size, start = int.from_bytes(data[2:10]), 10
        yield json.loads(data[start:start + size])
        data = data[start + size:]


class Socket:
    "Both ends of one, and the wire between them"

    def __init__(self, client, url):
        self.client, self.url, self.world = client, url, client.world
        self.reader = Reader(self.put, self.cut, opened=self.world.loop.now())
        self.lost = self.world.loop.create_future()
        self.lost.add_done_callback(lambda lost: lost.cancelled() or lost.exception()) # whether or not anybody waits
        self.arrives = 0.
        self.silent = False                 # the wire is cut, and nobody was told

    def _later(self, do, *arguments):
        "In order: nothing overtakes"
        if self.silent: return
        self.arrives = max(self.arrives + 1e-6, self.world.loop.time() + self.world.latency())
        self.world.loop.call_at(self.arrives, do, *arguments)

    def put(self, data):
        for frame in frames_of(data): self._later(self._deliver, frame)

    def cut(self, code):
        self.forget()
        self._later(self.fail, ConnectionError(f"closed with {code}"))

    def forget(self):
        self.world.service.sockets.discard(self.reader)
        self.world.service.streams.forget(self.reader)
        self.world.service.barrier.leave(self.reader)

    def _deliver(self, frame):
        if self.lost.done() or not self.world.door(self.client.process, f"frame {frame.get('e', frame.get('id'))}"):
            return
        self.client.heard(self.url, frame)

    def fail(self, error):
        self.client.clients.pop(self.url, None)
        if not self.lost.done(): self.lost.set_exception(error)

    async def send(self, frame): answer_frame(self.world.service, self.reader, json.dumps(frame))
    def reset(self, error):
        self.forget()
        self.fail(error)
    async def close(self): self.reset(ConnectionError("closed here"))


class Client:
    "What the adapter sees of ccxt: implicit methods, sockets, and a clock"
    TABLE = {(method, path.replace("/", "").lower()): path for method, path in
             (*ENDPOINTS, *((method, "v1/listenKey") for method in ("POST", "PUT", "DELETE")))}

    def __init__(self, process):
        self.process, self.world = process, process.world
        self.markets, self.options, self.clients = {}, {"timeDifference": 0}, {}
        self.allowance = Allowance()
        self.heard = lambda url, frame: None
        self.opened = lambda url: None
        self.numbers = itertools.count()

    def milliseconds(self): return self.world.loop.now()
    def nonce(self): return self.milliseconds() - self.options["timeDifference"]

    def __getattr__(self, name):
        found = re.fullmatch(r"fapi(Public|Private)(V2|V3)?(Get|Post|Put|Delete)(\w+)", name)
        if not found: raise AttributeError(name)
        security, version, method, path = found.groups()
        target = self.TABLE[method.upper(), (version or "v1").lower() + path.lower()]
        return lambda parameters={}: self.fetch(method.upper(), target, parameters, security == "Private")

    async def fetch(self, method, path, parameters, private):
        "As the adapter's own client does it"
        url = f"/fapi/{path}?{urlencode(parameters)}"
        check_allowed(self.allowance, method, url, "", self.nonce())
        try: return await self.request(method, path, parameters, private)
        except Exception as error:
            if error_code(error) == OUR_CLOCK:
                with contextlib.suppress(OSError, RuntimeError): await self.load_time_difference()
            raise

    async def request(self, method, path, parameters, private):
        if private: parameters = parameters | {"timestamp": self.nonce(), "recvWindow": RECEIVE_WINDOW}
        query = urlencode(parameters)
        if private: query += f"&signature={signature(SECRET, query)}"
        reply = await self.process.send(method, path, query)
        if isinstance(reply.content, str):
            body = reply.content
            try: content = json.loads(body)
            except ValueError: content = body
        else: content, body = reply.content, ""
        self.allowance.hear(reply.status, reply.headers, content, self.nonce())
        code = content.get("code", 200) if isinstance(content, dict) else 200
        if reply.status < 400 and code in (0, 200, "200"): return content
        error = RuntimeError(f"binanceusdm {reply.status}")
        error.reply = Reply(reply.status, reply.headers, body or json.dumps(content))
        raise error

    async def load_time_difference(self):
        told = await self.fetch("GET", "v1/time", {}, False)
        self.options["timeDifference"] = self.milliseconds() - told["serverTime"]
        return self.options["timeDifference"]

    async def load_markets(self, reload=False):
        told = await self.fetch("GET", "v1/exchangeInfo", {}, False)
        for entry in told["symbols"]:
            symbol = f"{entry['baseAsset']}/{entry['quoteAsset']}:{entry['marginAsset']}"
            rules = {each["filterType"]: each for each in entry["filters"]}
            self.markets[symbol] = {"id": entry["symbol"], "symbol": symbol, "settle": entry["marginAsset"],
                                    "info": entry, "precision": {"amount": rules["LOT_SIZE"]["stepSize"],
                                                                 "price": rules["PRICE_FILTER"]["tickSize"]}}
        return self.markets

    async def close(self):
        for socket in list(self.clients.values()): await socket.close()

    async def dial(self, url, path, query=""):
        "A socket that is open"
        await asyncio.sleep(self.world.latency())
        self.process.reach()
        socket, service = Socket(self, url), self.world.service
        if self.world.faults.wire("GET", path, self.world.loop.now()):   # it reads too slowly, and is cut off
            self.world.loop.call_later(20., socket.cut, 1006)
        service.sockets.add(socket.reader)
        try: names = open_at(service.streams, socket.reader, read_address(path, query))
        except CommandError as error: raise ConnectionError(str(error)) from None
        greet(service, socket.reader, names)
        self.clients[url] = socket
        return socket

    async def watch_ohlcv_for_symbols(self, pairs):
        "Until the socket is lost"
        socket = await self.dial(f"ws://simulated/market/ws/{next(self.numbers)}", "/market/ws")
        names = [f"{self.markets[symbol]['id'].lower()}@kline_{timeframe}" for symbol, timeframe in pairs]
        await socket.send({"method": "SUBSCRIBE", "params": names, "id": 1})
        await socket.lost

    async def watch_orders(self):
        key = (await self.fapiPrivatePostListenKey())["listenKey"]
        socket = await self.dial(f"ws://simulated/private/ws?listenKey={key}", "/private/ws", f"listenKey={key}")
        self.opened(socket.url)
        try:
            while True:
                done, _ = await asyncio.wait([socket.lost], timeout=1200)
                if done: return done.pop().result()
                await self.fapiPrivatePutListenKey({"listenKey": key})
        except asyncio.CancelledError: raise
        except Exception as error:
            socket.reset(error)
            raise


# --- the session

PROCESS = ContextVar("process", default=None)


class _Table:
    whole = True
    def write(self, lines): pass
    def close(self): pass


class _Files(sessions.Files):
    "Recording, journal and equity in memory"
    def __init__(self, process): self.recorder, self.journal, self.equity = process.recorder, _Table(), _Table()


class _Recorder(MemoryRecorder):
    "The lines of a recording in memory, where somebody wants them"
    mended = ""
    def __init__(self, wanted):
        super().__init__()
        self.wanted, self.tape = wanted, SimpleNamespace()
    def received(self, received):
        if self.wanted: super().received(received)
    def answered(self, actions):
        if self.wanted: super().answered(actions)
    def frame(self, socket, frame): pass
    def sync(self): pass
    def close(self): pass


IDLE = 15. # seconds between two looks of a writer that has nothing to write


class _Writer:
    "The ledger's writer with a disk that takes milliseconds, and commits batch by batch, in order"
    closed = False

    def __init__(self, process, keep, failed, back, idle):
        self.process, self.keep, self.failed, self.back, self.idle = process, keep, failed, back, idle
        self.waiting, self.down, self.busy, self.lost = [], False, False, 0
        if idle: process.world.loop.call_later(IDLE, self._idle)

    def _idle(self):
        "An empty batch: the lease is beaten, commands are looked for"
        if self.closed or self.process.dead: return
        if not self.waiting: self.put([])
        self.process.world.loop.call_later(IDLE, self._idle)

    def put(self, records):
        kept = _Kept()
        if self.down: kept.answer(False)
        self.waiting.append((list(records), kept))
        if not self.busy: self._soon()
        return kept.future

    def _soon(self, delay=None):
        self.busy = True
        world = self.process.world
        world.loop.call_later(world.random.uniform(.001, .008) if delay is None else delay, self._write)

    def _write(self):
        self.busy = False
        if not self.waiting or not self.process.alive("commit"): return
        records, kept = self.waiting[0]
        try:
            self.process.disk()
            self.keep(records)
        except OSError as error:
            if not self.down: self.failed(error)
            self.down = True
            for _, each in self.waiting: each.answer(False)
            return self._soon(1.)
        except Exception as error:
            kept.raise_(error)
            self.failed(error)
        self.waiting.pop(0)
        kept.answer(True)
        if self.down and not self.waiting:
            self.down = False
            self.back("nothing is lost")
        if self.waiting: self._soon()

    def close(self):
        self.closed = True
        while self.waiting and not self.process.dead and not self.down: self._write()
        return sum(len(records) for records, _ in self.waiting)


class _Kept:
    "What whoever waits for a batch is answered, once"
    def __init__(self):
        self.future = Future()
        self.future.set_running_or_notify_cancel()
    def answer(self, value):
        if not self.future.done(): self.future.set_result(value)
    def raise_(self, error):
        if not self.future.done(): self.future.set_exception(error)


class _Quiet:
    "Logs nothing: what was told is in the ledger"
    def __getattr__(self, name): return lambda *words, **more: None


class _Doors:
    "A ledger that a dead process cannot write into any more"
    def __init__(self, process, ledger): self._process, self._ledger = process, ledger
    def __getattr__(self, name):
        if self._process.dead: raise OSError("killed")
        return getattr(self._ledger, name)


class Process:
    "One process that runs a session, until it ends or is killed"

    def __init__(self, world, ledger, name, resume, make_trader, options):
        self.world, self.ledger, self.name, self.resume = world, ledger, name, resume
        self.dead, self.tasks, self.said, self.end = False, set(), [], None
        self.owner = f"simulated process {next(world.numbers)}"
        world.alive.add(self.owner)
        self.recorder = _Recorder(world.records)
        self.make_trader, self.options = make_trader, options

    def alive(self, what): return self.world.door(self, what)

    def kill(self):
        "From here on nothing it does has an effect"
        self.dead = True
        self.world.alive.discard(self.owner)
        self.world.loop.call_soon(self._bury)

    def _bury(self):
        for task in list(self.tasks): task.cancel()
        if any(not task.done() for task in self.tasks): self.world.loop.call_soon(self._bury)

    def disk(self):
        "OSError if it takes nothing"
        for point in ("disk", "database"):
            if failed := self.world.faults.session(point, self.world.loop.now()): raise OSError(failed)

    def reach(self):
        "ClientConnectorError if the name of the exchange is not resolved"
        if self.world.faults.session("dns", self.world.loop.now()): raise ClientConnectorError("no such host")

    async def send(self, method, path, query):
        "The reply to a request; whatever becomes of this process, what was sent arrives"
        world, loop = self.world, self.world.loop
        order = path == "v1/order" and method == "POST"
        if order and world.faults.session("order/before_send", loop.now()): self.kill()
        if not self.alive(f"send {method} {path}"): await loop.create_future()
        self.reach()
        back = loop.create_future()
        wire = world.faults.wire(method, path, loop.now())
        if not wire or wire.do not in ("drop", "reset") or wire.commit:
            held = wire.ms / 1000 if wire and wire.do == "delay" else 0.
            loop.call_later(world.latency() + held, self._arrives, method, path, query, wire, back)
        elif wire.do == "reset": loop.call_later(world.latency(), self._returns, back, ConnectionResetError("reset"))
        if order and world.faults.session("order/after_send", loop.now()): self.kill()
        try: reply = await asyncio.wait_for(back, TIMEOUT)
        except TimeoutError: raise TimeoutError(f"no reply to {method} {path}") from None
        if order and world.faults.session("order/after_reply", loop.now()): self.kill()
        if not self.alive(f"reply {method} {path}"): await loop.create_future()
        return reply

    def _arrives(self, method, path, query, wire, back):
        world = self.world
        if self.world.trace is not None: world.trace.append((world.loop.now(), f"arrives {method} {path}"))
        reply = answer(world.service, method, f"/fapi/{path}?{query}", "", {"X-MBX-APIKEY": KEY})
        world.tend()
        late = world.latency() + reply.delay
        if reply.drop or wire and wire.do in ("drop", "reset"):
            return world.loop.call_later(late, self._returns, back, ConnectionError("closed by remote server"))
        if wire and wire.do == "half_open": return
        if wire and wire.do == "html": reply = replace(reply, content="<html>Bad gateway</html>", status=502)
        if wire and wire.do == "cut":
            text = json.dumps(reply.content)
            reply = replace(reply, content=text[:len(text) // 2])
        world.loop.call_later(late, self._returns, back, reply)

    def _returns(self, back, reply):
        if back.done() or self.dead: return
        back.set_exception(reply) if isinstance(reply, Exception) else back.set_result(reply)

    async def run(self):
        "Returns what it ended with: an exception, or nothing"
        PROCESS.set(self)
        settings = VenueSettings("simulated", "a simulation", "https://simulated", "wss://simulated", SecretStr(KEY),
                                 SecretStr(SECRET))
        self.client = Client(self)
        with patch.object(binance_market, "exchange_for", lambda *arguments: self.client):
            venue = BinanceVenue(settings)
        given = {"resume": self.name} if self.resume else {"id": self.name}
        self.session = Session(self.make_trader(), venue, _Doors(self, self.ledger), Path("/nowhere"), **given,
                               timeframe=self.world.timeframe, say=self.said.append, **self.options)
        try: await self.session.run()
        except (Exception, asyncio.CancelledError) as error: self.end = error
        finally: self.world.alive.discard(self.owner)


def _patches(world):
    "What of a session is not of this world: its clock, its thread, its files"
    def files(folder, *arguments): return _Files(PROCESS.get())
    def writer(keep, failed=print, back=print, *arguments, idle=None, **settings):
        return _Writer(PROCESS.get(), keep, failed, back, idle)
    found = contextlib.ExitStack()
    for module in [module for name, module in sys.modules.items() if name.startswith("tradelab.")]:
        if getattr(module, "clock", None) is ledgers_clock:
            found.enter_context(patch.object(module, "clock", world.loop.now))
    for name, stand_in in (("logger", _Quiet()), ("Files", files), ("Writer", writer), ("hold", lambda session: None),
                           ("weigh", lambda session: None),
                           ("write_status", lambda path, **status: None), ("rebuild", lambda *arguments: None),
                           ("monotonic", world.loop.time), ("this_process", lambda: PROCESS.get().owner)):
        if hasattr(sessions, name): found.enter_context(patch.object(sessions, name, stand_in))
    found.enter_context(patch.object(leases, "is_dead", lambda owner: owner not in world.alive))
    return found


ledgers_clock = ledgers.clock


@dataclass
class Run:
    "What is left of one"
    world:World
    ledger:MemoryLedger
    processes:list = field(default_factory=list)
    names:list = field(default_factory=list)
    error:str = ""
    broken:list = field(default_factory=list)   # exceptions that nobody caught

    @property
    def said(self): return [line for process in self.processes for line in process.said]

    @property
    def notices(self): return Counter(kind for name in self.names for kind in self.ledger.notices(name)["kind"])

    @property
    def trader(self): return self.processes[-1].session.trader


def task_of(loop, coroutine, **named):
    process = PROCESS.get()
    task = asyncio.Task(coroutine, loop=loop, **named)
    if process: process.tasks.add(task)
    return task


async def _live(run, make_trader, options, downtime):
    "A session that is started again whenever it was killed"
    world, name, resume = run.world, "simulated-0", False
    while True:
        process = Process(world, run.ledger, name, resume, make_trader, options)
        run.processes.append(process)
        if name not in run.names: run.names.append(name)
        world.process = process
        task = asyncio.ensure_future(process.run())
        process.tasks.add(task)
        await asyncio.wait([task])
        unreachable = isinstance(process.end, VenueError) or any(
            words in str(process.end) for words in ("no answer on", "set the clock"))
        if not (process.dead or unreachable) or world.over: return
        await asyncio.sleep(downtime())
        resume = bool(run.ledger.snapshot(name))
        if not resume: name = f"simulated-{len(run.names)}"


async def _play(run, make_trader, options, downtime, script):
    world = run.world
    living = asyncio.ensure_future(_live(run, make_trader, options, downtime))
    scripted = asyncio.ensure_future(script(world)) if script else None
    await world.play()
    if scripted: await scripted
    await asyncio.sleep(world.step / 2000)
    world.over = True
    if not living.done(): world.process.session.stop()
    await asyncio.wait([living], timeout=120)
    if not living.done(): run.error = "it does not stop"
    living.cancel()
    for process in run.processes:
        if run.error: process.kill()


def simulate(seed=0, make_trader=trader, downtime=None, script=None, ledger=None, options=None, **settings):
    "One run to its end"
    world = World(seed, **settings)
    run = Run(world, ledger or MemoryLedger())
    random = Random(f"downtime {seed}")
    seldom = {"waits": {name: max(60_000, world.step // 5) for name in ("clock_every", "heartbeat")}} # or it costs more
    world.loop.set_task_factory(task_of)
    world.loop.set_exception_handler(lambda loop, told: run.broken.append(repr(told.get("exception", told["message"]))))
    asyncio.set_event_loop(world.loop)
    try:
        with _patches(world):
            world.loop.run_until_complete(_play(run, make_trader, seldom | (options or {}),
                                                downtime or (lambda: random.uniform(.1, 20.)), script))
    finally:
        asyncio.set_event_loop(None)
        world.loop.close()
    return run
