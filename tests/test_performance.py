"`pytest -m performance`: what the owner's table asks for, and what is measured here beside it; outside of `make test`"
from time import perf_counter

import numpy as np
import pytest

from tradelab.account import POSITION, new_account
from tradelab.events import Candles
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.market.candles import times
from tradelab.market.quality import QualityStream
from tradelab.market.store import Store
from tradelab.market.synthetic import realistic
from tradelab.policies import Policy, mlp, pack
from tradelab.risk.execution import OrderGate
from tradelab.risk.limits import Gate
from tradelab.settings import Limits
from tradelab.sources.tables import from_file
from tradelab.trader import Trader

pytestmark = pytest.mark.performance
HOUR = 3_600_000
FEATURES = ("return(1)", "return(24)", "rsi(14)", "macd(12,26,9).histogram", "atr(14).relative", "volatility(24)")


def calls(once, count):
    "Seconds of each of so many calls; the first ones, which compile, are not among them"
    for n in range(3): once(n)
    taken = []
    for n in range(3, count + 3):
        begin = perf_counter()
        once(n)
        taken.append(perf_counter() - begin)
    return np.array(taken)


def network(inputs):
    "Two layers of 64, as the agents have them, with random weights"
    random = np.random.default_rng(0)
    layers = [(random.normal(size=(b, a)) / np.sqrt(a), np.zeros(b)) for a, b in ((inputs, 64), (64, 64), (64, 1))]
    return Policy("network", mlp, pack(layers, "tanh", "tanh"), FEATURES, window=30)


@pytest.fixture(scope="module")
def market(): return realistic(20_000, seed=1)


MINUTES = 100_000 # a file of more than two months of them


def risk(market, _):
    "A wish through every limit, a call from Python each"
    rules = Gate(Limits(max_net=.5, max_var=.02, target_volatility=.8), [BITCOIN])
    candles = market.to_numpy()[:, None, :5]
    for t in range(300): rules.watch(t * HOUR, candles[t])
    account = new_account(10_000.)
    positions = np.zeros(1, POSITION)
    wishes = np.random.default_rng(0).uniform(-1, 1, (3_000, 1))
    return calls(lambda n: rules.decide((300 + n) * HOUR, candles[300], wishes[n % 3_000], account, positions), 2_000)


def decisions(market, _):
    "A closed candle through features, window, network and gate to its orders"
    policy = network(Observation(FEATURES, 30, timeframe="1h").width)
    trader = Trader(policy, Observation.from_policy(policy, "1h"), OrderGate, instruments=(BITCOIN,))
    stamps = times(market)
    candles = market.to_numpy()[:, None, :5]
    begin = trader.warm_up + 1
    candles = np.concatenate([candles, np.zeros((*candles.shape[:2], 3))], axis=2)
    trader.warm(stamps[:begin], candles[:begin])
    return calls(lambda n: trader.on(Candles(int(stamps[begin + n]), candles[begin + n])), 2_000)


def files(market, folder):
    "A CSV file read, checked, judged, kept in the store and read again: seconds a record"
    realistic(MINUTES, seed=1, volatility=2e-4, timeframe="1m").reset_index().to_csv(folder / "market.csv", index=False)
    def once(n):
        store = Store(folder / str(n))
        store.write("file", "BTC/USDT:USDT", "1m", from_file(folder / "market.csv", "1m"))
        assert len(store.read("file", "BTC/USDT:USDT", "1m")) == MINUTES
    return calls(once, 3) / MINUTES


def stream(market, _):
    "A candle of a stream, judged as it closes"
    judge = QualityStream("1h")
    stamps = times(market)
    rows = market.to_numpy()
    return calls(lambda n: judge.accept(int(stamps[n]), rows[n]), len(market) - 10)


@pytest.mark.parametrize("what, work, asked_rate, asked_ms",
                         [("risk [signals/s]", risk, 500, 50), ("data, files and store [records/s]", files, 10_000,
                                                                None), ("data, stream [records/s]", stream, 10_000,
    None),
                          ("inference [decisions/s]", decisions, 100, 200)],
                          ids=["risk", "files", "stream", "inference"])
def test_the_table(what, work, asked_rate, asked_ms, market, tmp_path, capsys):
    taken = work(market, tmp_path)
    rate = 1 / np.median(taken)
    slowest = 1e3 * np.quantile(taken, .99)
    with capsys.disabled():
        print(f"\n{what:36} asked {asked_rate:>7,}, here {rate:>11,.0f} ({rate / asked_rate:,.0f} times)", end="")
        if asked_ms: print(f"; asked at most {asked_ms} ms, here {slowest:.3f} ms (99 of 100)", end="")
    assert rate >= asked_rate
    assert (not asked_ms or slowest <= asked_ms)


