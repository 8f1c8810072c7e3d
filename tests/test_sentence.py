"The sentence on real candles: the forms agree bit for bit, the past does not know the future, money is conserved."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.account import POSITION, new_account
from tradelab.compiled import compiled
from tradelab.evaluation.difference import first_difference
from tradelab.events import Candles
from tradelab.features.observation import PORTFOLIO
from tradelab.instruments import BITCOIN
from tradelab.journal import JOURNAL
from tradelab.market.candles import matrix
from tradelab.market.synthetic import ar1, funding
from tradelab.native import UNCOMPILED
from tradelab.policies import Policy, mlp, pack
from tradelab.risk.limits import Gate
from tradelab.runs.run import make_trader
from tradelab.settings import NO_STOPS, CostModel, Limits, Reason
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import prepare
from tradelab.sources.funding import funding_history
from tradelab.sources.history import history
from tradelab.strategies.example import Momentum, SmaCross

FEATURES = ("return(1)", "rsi(14)", "macd(12,26,9).histogram", "atr(14).relative", "bollinger(20,2)", "volatility(20)")


def network(seed=1, symbols=1, window=4, features=FEATURES, scaler=None):
    "An untrained actor: any function of what it sees will do"
    random = np.random.default_rng(seed)
    width = symbols * (window * len(features) + len(PORTFOLIO))
    layers = [(random.normal(size=(16, width)) / 4, random.normal(size=16)),
              (random.normal(size=(symbols, 16)), random.normal(size=symbols))]
    return Policy("network", mlp, pack(layers, "relu", "tanh"), features, window, scaler)


def same(a, b):
    return (first_difference(a, b) is None and first_difference(a.observations, b.observations) is None
            and a.equity.equals(b.equity))


@pytest.fixture(scope="module")
def bitcoin(shared):
    candles = history("BTC/USDT:USDT", "1h", "2022-06-01", "2022-09-01",
                      source=str(shared / "data/BTCUSDT-perp-1h.parquet"))
    return (candles, funding_history("BTC/USDT:USDT", "2022-06-01", "2022-09-01",
                                     source=str(shared / "data/BTCUSDT-perp-funding-8h.parquet")))


@pytest.mark.parametrize("policy", [network(), Momentum(), SmaCross()], ids=lambda policy: policy.name)
def test_both_forms_agree_on_real_candles(bitcoin, policy):
    candles, payments = bitcoin
    array, event = (backtest(policy, candles, funding=payments, engine=engine, keep_observations=True)
                    for engine in ("vectorised", "event"))
    assert same(array, event)
    assert (array.rows["order"] != 0).sum() > 20
    assert (array.rows["funding"] != 0).any()


def test_several_symbols_are_one_account(shared):
    names = {"BTC/USDT:USDT": "BTCUSDT", "ETH/USDT:USDT": "ETHUSDT"}
    candles = {symbol: history(symbol, "1h", "2022-06-01", "2022-08-01",
                               source=str(shared / f"data/{name}-perp-1h.parquet")) for symbol, name in names.items()}
    payments = {symbol: funding_history(symbol, "2022-06-01", "2022-08-01",
                                        source=str(shared / f"data/{name}-perp-funding-8h.parquet")) for symbol,
                                        name in names.items()}
    array, event = (backtest(network(symbols=2), candles, funding=payments, engine=engine, keep_observations=True)
                    for engine in ("vectorised", "event"))
    assert same(array, event)
    assert all((array.rows["order"][:, n] != 0).any() for n in range(2))


def test_one_altered_bit_is_found(bitcoin):
    candles, payments = bitcoin
    altered = candles.copy()
    altered.iloc[1_500, altered.columns.get_loc("close")] = np.nextafter(altered["close"].iloc[1_500], np.inf)
    difference = first_difference(backtest(Momentum(), candles, funding=payments),
                                  backtest(Momentum(), altered, funding=payments))
    assert difference.bar == candles.index[1_500]
    assert difference.column == "close"


def test_the_future_does_not_move_the_past(bitcoin):
    candles, payments = bitcoin
    future = candles.copy()
    future.iloc[1_000:, :4] *= 1.05
    before, after = (backtest(network(), frame, funding=payments, keep_observations=True)
                     for frame in (candles, future))
    kept = before.journal.index < candles.index[1_000]
    columns = ["close", "equity", "position", "target", "order"]
    assert first_difference(before.journal.loc[kept, columns], after.journal.loc[kept, columns]) is None
    assert first_difference(before.observations[kept], after.observations[kept]) is None


def test_a_planted_look_ahead_is_caught(bitcoin):
    "A feature that peeks two candles ahead: rerun on a truncated history, and the last decisions change"
    candles, _ = bitcoin
    def peeking(frame):
        values = frame.copy()
        # the change to come, smuggled in as volume
        values["volume"] = (frame["close"].shift(-2) / frame["close"]).fillna(1.).clip(lower=.5)
        return values
    policy = network(features=("volume_ratio(2)",), window=1)
    whole = backtest(policy, peeking(candles))
    cut = backtest(policy, peeking(candles[:1_200]))
    common = whole.journal[:len(cut.journal)]
    assert first_difference(common[["target"]], cut.journal[["target"]]) is not None


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(.05, 1), st.floats(0, .002))
def test_money_is_conserved(seed, size, slippage):
    "Equity is the deposit plus what every fill and funding payment moved; recomputed from the journal alone"
    candles = ar1(400, seed=seed)
    limits = Limits(max_position=size, max_drawdown=.05)
    result = backtest(network(seed, features=("return(1)",), window=2), candles, funding=funding(candles, seed=seed),
                      costs=CostModel(slippage=slippage), limits=limits)
    rows = result.rows[:, 0]
    cash = 10_000 - (rows["fill_quantity"] * rows["fill_price"]).sum() - rows["fee"].sum() + rows["funding"].sum()
    assert np.isclose(result.equity.iloc[-1], cash + rows["fill_quantity"].sum() * candles["close"].iloc[-1], rtol=1e-9)


def test_a_drawdown_halts_for_good():
    "After the halt everything is closed once, and nothing is opened again"
    candles = ar1(3_000, rho=0, volatility=.02, seed=2)
    result = backtest(network(features=("return(1)",), window=1), candles,
                      limits=Limits(max_position=1., max_drawdown=.1, max_daily_loss=None, stops=NO_STOPS))
    halted = result.rows["reason"][:, 0] == Reason.HALTED
    first = int(np.argmax(halted))
    assert halted.any()
    assert result.rows["drawdown"][first, 0] >= .1
    assert (result.rows["order"][first + 1:, 0] == 0).all()
    assert (result.rows["position"][first + 1:, 0] == 0).all()


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-.9, .9), st.floats(10, 1e5)), min_size=1, max_size=4))
def test_the_gate_keeps_its_limits(rows):
    limits = Limits(max_position=.6, max_leverage=1., max_participation=None)
    targets, held, prices = (np.array(column, float) for column in zip(*rows))
    held = np.round(held * 6_000 / prices / len(rows), 3)

    def ordered(which):
        positions = np.zeros(len(rows), POSITION)
        candle = np.repeat(prices[which][:, None], 5, axis=1)
        positions["quantity"], positions["entry_price"] = held[which], prices[which]
        return Gate(limits, [BITCOIN] * len(rows)).decide(0, candle, targets[which], new_account(10_000.),
                                                          positions)["quantity"].copy()
    quantities = ordered(np.arange(len(rows)))
    before = np.abs(held * prices)
    after = np.abs((held + quantities) * prices)
    grown = after > before
    assert (after[grown] <= 6_000 + 1e-6).all()
    assert (not grown.any() or after[grown].sum() <= 10_000 + 1e-6)
    assert np.array_equal(ordered(np.arange(len(rows))[::-1])[::-1], quantities)


def test_the_journal_has_the_fields_of_the_environment():
    from tradelab.features.observation import Observation
    from tradelab.learn.env import MarketEnv
    candles = ar1(300, seed=1)
    environment = MarketEnv(prepare(candles, Observation(["return(1)"]).fit(matrix(candles)[1])))
    environment.reset(seed=0)
    *_, info = environment.step(np.array([.5]))
    assert info["journal"][0].dtype.names == JOURNAL.names
    assert set(backtest(Momentum(), candles).journal.columns) == {*JOURNAL.names, "symbol"} - {"open_time"}
    assert isinstance(backtest(Momentum(), candles).journal.index, pd.DatetimeIndex)


@pytest.mark.parametrize("rule, message", [(lambda parameters, memory, seen, prices, targets: 1., "nobody reads that"),
                                           (lambda parameters, memory, seen, prices, targets: np.ones(1),
                                            "nobody reads that"),
                                           (lambda parameters, memory, seen, prices, targets: None,
                                            "nan is one that was not written")])
@pytest.mark.parametrize("compile", [compiled, lambda rule: rule], ids=["compiled", "python"])
def test_a_rule_that_writes_no_target_is_never_silently_flat(rule, message, compile):
    "The trader as a live session drives it, and the compiled loop"
    policy = Policy("mine", compile(rule))
    with pytest.raises(ValueError, match=message):
        make_trader(policy, instruments=(BITCOIN,)).on(Candles(0, np.array([[1., 1., 1., 1., 1.]])))
    with pytest.raises(ValueError, match=message): backtest(policy, ar1(10), baselines=())


@compiled
def a_target_too_many(parameters, memory, observation, prices, targets):
    for n in range(len(targets) + 1): targets[n] = 0.


@compiled
def a_memory_too_many(parameters, memory, observation, prices, targets):
    memory[len(memory)] = 1.
    targets[:] = 0.


@compiled
def an_order_too_many(parameters, memory, observation, prices, orders):
    for n in range(len(orders)):
        for k in range(orders.shape[1] + 1): orders[n, k]["exposure"] = .5


@compiled
def rarely(parameters, memory, observation, prices, targets):
    targets[:] = 0.
    if 1e6 < prices[0] < 1e9: targets[len(targets)] = 0. # never at the prices that a policy is tried on


PLAIN = "reaches beyond what it is given .index [0-9] is out of bounds"
OUTSIDE = ((a_target_too_many, {}, r"wild writes targets\[1\], and there are 1 targets"),
           (a_memory_too_many, {"memory": 2}, r"wild writes memory\[2\], and its memory has 2 numbers: ask for more"),
           (an_order_too_many, {"order_slots": 1}, "wild writes row 1 of its orders, and they are 1, 1 for each of 1"))


@pytest.mark.parametrize("engine", ["vectorised", "event"])
@pytest.mark.parametrize("plain", [False, True], ids=["compiled", "plain"])
@pytest.mark.parametrize("function, how, sentence", OUTSIDE)
def test_a_policy_that_writes_outside_its_slots_is_refused(function, how, sentence, plain, engine):
    message = f"wild at the candle of .* the rule {PLAIN}" if plain or UNCOMPILED else sentence
    policy = Policy("wild", getattr(function, "py_func", function) if plain else function, **how)
    with pytest.raises(ValueError, match=message): backtest(policy, ar1(60, seed=1), engine=engine, baselines=())


@pytest.mark.skipif(UNCOMPILED, reason="numpy refuses the index itself")
def test_what_a_policy_writes_outside_rarely_is_found_when_the_loop_ends():
    policy = Policy("wild", rarely)
    backtest(policy, ar1(60, seed=1), baselines=())
    candles = ar1(60, seed=1)
    candles[["open", "high", "low", "close"]] *= 1e7 / candles["close"].iloc[0]
    with pytest.raises(ValueError, match=r"wild writes targets\[1\], and there are 1 targets, one per symbol"):
        backtest(policy, candles, baselines=())
