"""Live trading at length: `python benchmarks/live.py simulation 100000` runs so many seeds of the simulation in
`tests/simulated.py` and prints what went wrong in them and what was found; `kills 1000` kills real sessions over
sockets; `soak 10000` watches the memory of one; `latency 500` measures from a candle's arrival to its order;
`emergency 10` holds so many drills, measures from a halt to flat, and kills as many sessions inside an emergency"""
import asyncio
import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, perf_counter, process_time, sleep

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from pydantic import SecretStr
from test_emergency_live import DOORS, die, kill, told_wrong, wrong_in
from test_emergency_live import SYMBOLS as PROTECTED
from test_emergency_live import session as closing_session
from test_live import localnet
from test_simulation_live import check, plan, run_of

from tradelab.config import VenueSettings
from tradelab.drill import rehearse
from tradelab.features.observation import PORTFOLIO, Observation
from tradelab.instruments import BITCOIN
from tradelab.live.core import Core
from tradelab.live.ledger import Ledger
from tradelab.live.messages import Decided
from tradelab.live.order_states import State
from tradelab.live.replay import retell
from tradelab.live.session import Session
from tradelab.localnet.server import Localnet
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1
from tradelab.policies import Policy, mlp, pack
from tradelab.risk.execution import OrderGate
from tradelab.runs.registry import load, save
from tradelab.runs.run import Run
from tradelab.settings import Limits
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader
from tradelab.venues.binance import BinanceVenue

HISTORY, KEY = 1_500, "benchmark"


# --- seeds

def one_seed(seed):
    "What happened in a run, counted, and what was wrong"
    run = run_of(seed)
    timeframe, *_ = plan(seed)
    intents = [intent for name in run.names for intent in run.ledger.intents(name)]
    counts = Counter({"runs": 1, f"runs with {timeframe} candles": 1, "candles": run.world.service.steps - 1,
                      "doors gone through": run.world.happened, "kills": sum(each.dead for each in run.processes),
                      "starts": len(run.processes), "faults injected": run.world.faults.rules.injected,
                      "orders": len(intents), "fills": len(run.world.account().trades)})
    counts.update(f"fault: {hit.scenario}" for hit in run.world.faults.log)
    counts.update({f"told: {kind}": count for kind, count in run.notices.items()})
    counts.update(f"order: {intent.state}" for intent in intents if intent.state is not State.FILLED)
    return counts, check(seed, run)


def collect_rarely():
    "What is imported never becomes garbage: without a look at it a seed takes a fifth less"
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 20)


def simulation(seeds, first=0):
    counts, wrong, begin = Counter(), [], monotonic()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), collect_rarely) as pool:
        for each, lines in pool.imap_unordered(one_seed, range(first, first + seeds), chunksize=20):
            counts += each
            wrong += lines
            if lines: print(*lines, sep="\n", flush=True)
    took = monotonic() - begin
    for name, count in sorted(counts.items(), key=lambda pair: (":" in pair[0], pair[0])):
        print(f"{name:<40} {count:>12,}")
    failed = len({line.split()[1] for line in wrong})
    print(f"{failed} of {seeds:,} seeds with something wrong, {took:,.0f} s, {1000 * took / seeds:.0f} ms a seed")
    return failed


# --- real sessions over sockets

def symbols_of(count): return tuple(replace(BITCOIN, symbol=name) for name in (
    "BTC/USDT:USDT", "ETH/USDT:USDT", "BNB/USDT:USDT", "SOL/USDT:USDT", "XRP/USDT:USDT")[:count])


def trader(instruments):
    policy = Momentum(lookback=5, threshold=.005)
    return Trader(policy, Observation.from_policy(policy), OrderGate, instruments=instruments)


def market(candles, instruments, timeframe="1m"):
    return {each.symbol: ar1(candles + HISTORY + 2, volatility=.005, seed=3 + n, timeframe=timeframe)
            for n, each in enumerate(instruments)}


def session_on(url, folder, instruments, given=None, venue=BinanceVenue, timeframe="1m", **options):
    settings = VenueSettings("localnet", "a benchmark", url, url.replace("http", "ws"), SecretStr(KEY),
                             SecretStr(KEY))
    return Session(given or trader(instruments), venue(settings), Ledger(f"sqlite:///{folder}/tradelab.db"),
                   Path(folder) / "sessions", timeframe=timeframe, say=lambda line: None, **options)


def serve(candles, count, timeframe, key, ready, done):
    "A localnet in a process of its own"
    instruments = symbols_of(count)
    frames = market(candles, instruments, timeframe)
    first = int(times(frames[instruments[0].symbol])[HISTORY])
    with Localnet(frames, instruments=instruments, start=first, api_key=key, api_secret=key) as exchange:
        ready.put(exchange.url)
        done.get()
        account = exchange.exchange.accounts["main"]
        ready.put((Counter(order.client_id for order in account.orders.values()),
                   {each.symbol: account.held(n, "BOTH") for n, each in enumerate(instruments)}))


class Served:
    "The address of a localnet; afterwards `orders` and `positions` of its account"
    def __init__(self, candles, count=1, timeframe="1m", key=KEY):
        context = multiprocessing.get_context("spawn")
        self.ready, self.done = context.Queue(), context.Queue()
        self.process = context.Process(target=serve, args=(candles, count, timeframe, key, self.ready, self.done))

    def __enter__(self):
        self.process.start()
        self.url = self.ready.get()
        return self

    def end(self):
        self.done.put("")
        self.orders, self.positions = self.ready.get()

    def __exit__(self, *_):
        self.process.join(20)
        self.process.kill()


def child(url, folder, candles, resumed, traded):
    "A session in a process of its own, which may be killed; it says when it has traded"
    name = {"resume": "killed"} if resumed else {"id": "killed"}
    quick = {"patience": 1., "waits": {"absent_after": 500}} # or the next kill comes before an order is proven absent
    live = session_on(url, folder, symbols_of(2), **name, **quick, progress=lambda statistics: traded.set())
    asyncio.run(live.run(candles))


def kill_sessions(count):
    "A session is killed so often, at any moment, and resumed; the server that forks it has compiled and imported all"
    context, chance, begin, done = multiprocessing.get_context("forkserver"), random.Random(1), monotonic(), 0
    with TemporaryDirectory() as folder, Served(100 * count, 2) as exchange:
        while True:
            resumed, traded = (Path(folder) / "sessions" / "killed").exists(), context.Event()
            process = context.Process(target=child, args=(exchange.url, folder, 10 if done == count else None, resumed,
                                                          traded))
            process.start()
            if done == count: break
            if not done or chance.random() < .8: traded.wait(60) # else it may die while it starts
            process.join(chance.uniform(0., 1.))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            done += 1
            print(f"\r{done} of {count} kills, {monotonic() - begin:,.0f} s", end="", flush=True)
        process.join()
        exchange.end()
        return verdict(f"{done} kills in {monotonic() - begin:,.0f} s", Ledger(f"sqlite:///{folder}/tradelab.db"),
                       "killed", exchange)


def verdict(done, ledger, name, exchange):
    "Print what ledger and exchange say of each other; whether anything is wrong"
    held = Counter()
    for _, entry in ledger.booked(name):
        if hasattr(entry, "quantity"): held[entry.symbol] += entry.quantity
    known = {intent.order.order_id for intent in ledger.intents(name)}
    steps = len(ledger.journal(name)) // len(exchange.positions)
    agree = all(abs(held[symbol] - there) < 1e-9 for symbol, there in exchange.positions.items())
    unknown, most = len(exchange.orders.keys() - known), max(exchange.orders.values())
    print(f"\r{done}: {steps:,} candles, {len(exchange.orders):,} orders, most under one name {most}, unknown to the "
          f"ledger {unknown}, positions "
          + ("agree" if agree else f"differ: {dict(held)} and {exchange.positions}"))
    return not agree or unknown or most > 1


def job(folder, url, *parameters):
    "papermill and the kernel in which live.ipynb trades"
    words = [word for pair in (("venue", "localnet"), ("timeframe", "1m"), ("symbol", "BTC/USDT:USDT"),
                               ("policy", "tradelab.strategies.example:Momentum"), *parameters)
             for word in ("-p", *pair)]
    return subprocess.Popen([sys.executable, "-m", "papermill", "--engine", "tradelab", "--no-progress-bar",
                             str(Path(__file__).parents[1] / "nbs/live.ipynb"), "out.ipynb", *words], cwd=folder,
                            env=os.environ | {"TRADELAB_LOCALNET_PORT": url.rpartition(":")[2]},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_jobs(count):
    "The same with papermill and its kernel, by turns: whoever is killed, nobody trades on"
    chance, begin, done, resume = random.Random(2), monotonic(), 0, ()
    with TemporaryDirectory() as folder, Served(400 * count + 1_000, 1, key="localnet") as exchange:
        (Path(folder) / "tradelab.toml").touch()
        while True:
            process = job(folder, exchange.url, ("candles", "10" if done == count else "0"), *resume)
            if done == count: break
            pid = 0
            while process.poll() is None and not pid: # until it has decided once
                sleep(.1)
                for path in Path(folder).glob("sessions/*/session.json"):
                    told = json.loads(path.read_text())
                    if told["state"] == "running" and alive(told["pid"]):
                        pid, resume = told["pid"], (("resume", path.parent.name),)
            sleep(chance.uniform(0., 2.))
            os.kill(process.pid if done % 2 else pid, signal.SIGKILL)
            process.wait()
            while alive(pid): sleep(.05)
            done += 1
            print(f"\r{done} of {count} kills of jobs, {monotonic() - begin:,.0f} s", end="", flush=True)
        ended = process.wait()
        exchange.end()
        wrong = verdict(f"{done} kills of papermill and kernel in {monotonic() - begin:,.0f} s",
                        Ledger(f"sqlite:///{folder}/tradelab.db"), resume[0][1], exchange)
        return ended or wrong


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def kills(count):
    "Sessions are killed so often, and the jobs that hold them once for fifty of those; nothing is repeated or lost"
    return bool(kill_sessions(count)) | bool(kill_jobs(max(count // 50, 2)))


def memory(): return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(candles, symbols=5):
    "A session of many candles: its memory, files and tasks do not grow"
    rows = []

    def look(statistics):
        if statistics.candles % max(candles // 20, 1): return
        gc.collect()
        rows.append((statistics.candles, memory(), len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())))
        print("{:>8,} candles  {:8.1f} MiB  {:4} files  {:4} tasks".format(*rows[-1]), flush=True)

    with TemporaryDirectory() as folder, Served(candles, symbols) as exchange:
        live = session_on(exchange.url, folder, symbols_of(symbols), id="soak", progress=look)
        asyncio.run(live.run(candles))
        exchange.end()
    warm = rows[len(rows) // 4]
    growth = rows[-1][1] / warm[1] - 1
    print(f"memory {growth:+.1%} since candle {warm[0]:,}, files {rows[-1][2] - warm[2]:+}, "
          f"tasks {rows[-1][3] - warm[3]:+}")
    return growth > .05 or rows[-1][2] > warm[2] or rows[-1][3] > warm[3]


NETWORK = "train_BTC_20240101_20240201_SAC_lr0.0003_bs256_ws30_seed7_20240301_000000"
FEATURES = ("return(1)", "return(2)", "return(4)", "return(8)", "return(24)", "rsi(5)", "rsi(14)", "rsi(28)",
            "macd(12,26,9).histogram", "atr(14).relative", "bollinger(20,2)", "volatility(20)", "volatility(60)",
            "taker_share(3)", "time_of_day.cos")
TRAINED = dict(agent="SAC", steps=1, interrupted=False, learning_rate=3e-4, batch_size=256, seed=7, threads=1,
               source="", span=["2020-01-01", "2020-02-01"], data_hash="", created_time=0)


def keep_network(folder, instruments, window=30, width=256):
    "A run folder with an actor of two hidden layers"
    random = np.random.default_rng(7)
    sizes = [len(instruments) * (window * len(FEATURES) + len(PORTFOLIO)), width, width, len(instruments)]
    layers = [(random.normal(size=(out, into)) / np.sqrt(into), np.zeros(out)) for into, out in zip(sizes, sizes[1:])]
    names = Observation(FEATURES, window, timeframe="1m").columns * len(instruments)
    layers[0][0][:, [name.startswith("return(1)") for name in names]] *= 1e5 # it changes its mind, often on all symbols
    policy = Policy("network", mlp, pack(layers, "relu", "tanh"), FEATURES, window)
    save(Run(NETWORK, policy, Limits(max_drawdown=.9, max_daily_loss=None, max_orders=None), instruments=instruments,
             timeframe="1m", config=TRAINED), folder=folder)


class Watched(BinanceVenue):
    "Notes when each order was handed to the client"
    def __init__(self, settings):
        super().__init__(settings)
        self.placed = []

    async def place(self, order):
        self.placed.append((order.open_time, order.symbol, monotonic()))
        return await super().place(order)


def decide(url, folder, candles, born, told):
    "A session of a stored run in a process of its own; tells what it took, in ms"
    through, on, first = [], Core.on, []

    def timed(core, received):
        begin = perf_counter()
        actions = on(core, received)
        if any(isinstance(action, Decided) for action in actions): through.append(1_000 * (perf_counter() - begin))
        return actions

    Core.on = timed
    trader = load(NETWORK, Path(folder) / "runs").trader(instruments=symbols_of(2))
    live = session_on(url, folder, symbols_of(2), trader, Watched, id="latency",
                      progress=lambda statistics: first or first.append(monotonic()))
    begin = process_time()
    statistics = asyncio.run(live.run(candles))
    spent = process_time() - begin
    sent = {}
    for open_time, symbol, at in live.venue.placed: sent.setdefault(open_time, {}).setdefault(symbol, at)
    met, again, recording = [*through], [], live.folder / "recording.zst"
    for _ in range(5):
        through.clear()
        deque(retell(recording, trader), maxlen=0)
        again.append([*through])
    apart = [1_000 * (max(times.values()) - min(times.values())) for times in sent.values() if len(times) > 1]
    told.put((str(statistics), {"start to first decision [s]": [first[0] - born], "processor a candle [ms]":
              [1_000 * spent / candles], "candle to order [ms]": statistics.to_order, "intents to disk [ms]":
              statistics.to_disk, "two symbols apart [ms]": apart, "a candle through the core [ms]": met,
              "the same, told again [ms]": np.min(again, axis=0),
              "torch was imported": [float("torch" in sys.modules)]}))


def latency(candles):
    """From a candle's arrival to the request, over sockets and SQLite, of a network of 256 x 256 in a process without
    torch; the commit of the intents, which comes before the request, beside it. What the core takes is measured twice:
    as it went, behind all else that a session does, and with its own recording told again"""
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder, Served(candles, 2) as exchange:
        (Path(folder) / "runs").mkdir()
        keep_network(Path(folder) / "runs", symbols_of(2))
        told = context.Queue()
        process = context.Process(target=decide, args=(exchange.url, folder, candles, monotonic(), told))
        process.start()
        said, took = told.get(timeout=600)
        process.join()
        exchange.end()
    print(said)
    for name, values in took.items():
        print(f"{name:<32} median {np.median(values):8.3f}   p99 {np.percentile(values, 99):8.3f}   of {len(values)}")
    close = took["candle to order [ms]"]
    return bool(np.median(close) > 2. or np.percentile(close, 99) > 10. or took["torch was imported"][0])


def kill_emergencies(count):
    "A session dies so often inside an emergency, some of them again when they are resumed; whether any did not get out"
    context, chance, begin = multiprocessing.get_context("forkserver"), random.Random(3), monotonic()
    kills, wrong = 0, []
    for number in range(count):
        with TemporaryDirectory() as name, localnet(PROTECTED, deposit=20_000.) as exchange:
            folder = Path(name)
            before = kill(exchange, folder, context, *chance.choice(DOORS))
            kills += 1 + sum(die(exchange, folder, context, *chance.choice(DOORS), resume=True)
                             for _ in range(chance.choice((0, 0, 1, 2))))
            again = closing_session(exchange.url, folder, id="", resume="out")
            asyncio.run(again.run(3))
            found = *wrong_in(exchange, again, before), *told_wrong(again)
            wrong += [f"emergency {number}: {each}" for each in found]
    print(*wrong, f"{kills} kills in {count} emergencies, {monotonic() - begin:,.0f} s: {len(wrong)} things wrong",
          sep="\n")
    return bool(wrong)


def drill(times):
    "From a person's `halt` to the exchange's word that five positions are flat, over sockets and SQLite, so often"
    drills = []
    for _ in range(times):
        gc.collect()    # what the drills before have left would be collected in the midst of one, for a second
        drills.append(asyncio.run(rehearse([each.symbol for each in symbols_of(5)])))
    sent = [drill.steps.query("step == 'closing'")["after [ms]"].max() for drill in drills]
    for name, values in (("halt to the last order [ms]", sent), ("halt to flat [ms]", [each.took for each in drills])):
        print(f"{name:<32} median {np.median(values):8.0f}   most {max(values):8.0f}   of {times}")
    return not all(drill.flat and drill.took < 2_000 for drill in drills)


def emergency(times):
    "So many drills, and as many emergencies whose process is killed"
    return drill(times) | kill_emergencies(times)


if __name__ == "__main__":
    what, count = (*sys.argv[1:], "simulation", "1000")[:2] if len(sys.argv) > 2 else (
        sys.argv[1] if len(sys.argv) > 1 else "simulation", {"kills": "20", "soak": "1000", "latency": "300",
                                                                        "emergency": "10"}.get(
            sys.argv[1] if len(sys.argv) > 1 else "", "1000"))
    sys.exit(bool({"simulation": simulation, "kills": kills, "soak": soak, "latency": latency,
                   "emergency": emergency}[what](int(count))))
