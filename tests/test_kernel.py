"""The kernel on random orders and candles: money is conserved, forms agree, nothing fills where the market was not, the
exchange takes over where Binance says"""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.account import POSITION, maintenance_margin, mark, new_account
from tradelab.compiled import compiled
from tradelab.evaluation.difference import first_difference
from tradelab.evaluation.metrics import journal_round_trips
from tradelab.instruments import BITCOIN, BITCOIN_BRACKETS, bracket_amounts
from tradelab.journal import JOURNAL
from tradelab.market.synthetic import ar1, funding
from tradelab.orders import LIMIT, ORDER, STOP, TAKE_PROFIT, Kind
from tradelab.policies import Policy
from tradelab.risk.execution import DONE, TARGET
from tradelab.settings import NO_STOPS, CostModel, Execution, Limits, Reason, Stops
from tradelab.sim.backtest import backtest
from tradelab.sim.kernel import Simulation, market_arrays, steps, trading_rules
from tradelab.sim.margin import liquidation_share
from tradelab.sim.matching import new_state

HOUR = 3_600_000
WIDE = Limits(max_position=.5, max_leverage=1., max_daily_loss=None, max_drawdown=.9, stops=NO_STOPS,
              max_participation=None, max_orders=None, price_band=None)
ALL = CostModel.realistic(slippage=.0005, impact=2., participation=.3)


@compiled
def any_orders(parameters, memory, observation, prices, answer):
    "Orders of every kind from what is seen: a hash, not a thought"
    seed = np.int64(abs(observation.sum()) * 1e7) + np.int64(parameters[0])
    for n in range(answer.shape[0]):
        for k in range(answer.shape[1]):
            numbers = np.empty(8)
            for j in range(8):
                seed = (seed * 1103515245 + 12345) % 2147483648
                numbers[j] = seed / 2147483648.
            if numbers[0] < .5: continue
            row = answer[n, k]
            row["kind"] = 0 if numbers[1] < .1 else 1 + int(5. * numbers[1] * .999)
            row["exposure"] = 2. * numbers[2] - 1.
            side = 1. if row["exposure"] > 0. else -1.
            row["price"] = row["trigger"] = 0.
            if row["kind"] == LIMIT: row["price"] = prices[n] * (1. - side * .01 * (numbers[3] - .2))
            if row["kind"] == STOP: row["trigger"] = prices[n] * (1. + side * .01 * numbers[3])
            if row["kind"] == TAKE_PROFIT: row["trigger"] = prices[n] * (1. - side * .01 * numbers[3])
            if row["kind"] == STOP and numbers[4] < .3: row["price"] = row["trigger"] + side * .002 * prices[n]
            row["callback"] = .002 + .01 * numbers[4]
            row["in_force"] = int(4. * numbers[5] * .999)
            row["expires_in"] = np.floor(5. * numbers[6])
            row["reduce_only"] = 1 if numbers[7] < .3 else 0


@compiled
def waver(parameters, memory, observation, prices, targets):
    for n in range(len(targets)): targets[n] = np.sin(parameters[0] * observation[n, 0])


def wavering(seed=0, **more): return Policy("waver", waver, [300. + seed], ("return(1)",), **more)


def market(seed, symbols, length=400, volume=200.):
    names = [f"{base}/USDT:USDT" for base in ("BTC", "ETH", "SOL")[:symbols]]
    frames = {name: ar1(length, rho=0, volatility=.01, seed=seed + n) for n, name in enumerate(names)}
    for frame in frames.values(): frame["volume"] = volume * np.random.default_rng(seed).lognormal(0, 1, length)
    return frames, {name: funding(frames[name], seed=seed) for name in names}


def identity(result, deposit=10_000.):
    "Equity from the fills and funding alone, as cash and what is held: a second bookkeeping"
    fills = result.fills
    last = {symbol: frame["close"].iloc[-1] for symbol, frame in result.candles.items()}
    cash = deposit - (fills["quantity"] * fills["price"]).sum() - fills["fee"].sum() + result.journal["funding"].sum()
    return cash + sum(group["quantity"].sum() * last[symbol] for symbol, group in fills.groupby("symbol"))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 3),
       st.sampled_from([CostModel(), ALL, CostModel.ideal(), CostModel(latency=2)]),
       st.sampled_from([Execution(), Execution(protect=True)]))
def test_money_is_conserved_with_any_orders(seed, symbols, costs, execution):
    frames, payments = market(seed, symbols)
    limits = (WIDE if not execution.protect
              else Limits(**{**{name: getattr(WIDE, name) for name in WIDE.__dataclass_fields__},
                             "stops": Stops(stop_loss=.01, take_profit=.02, trailing_stop=.015)}))
    result = backtest(Policy("any", any_orders, [float(seed)], ("return(1)",), order_slots=4), frames, funding=payments,
                      costs=costs, limits=limits, execution=execution, baselines=())
    assert len(result.fills) > 20
    assert np.isclose(result.equity.iloc[-1], identity(result), rtol=1e-9,
                      atol=1e-9 * result.fills.eval("abs(quantity * price)").sum())
    rows = result.journal.groupby("symbol")
    assert np.isclose(result.journal["cash"].sum(), -(result.fills["quantity"] * result.fills["price"]).sum())
    assert np.isclose(result.journal["traded"].sum(), (result.fills["quantity"] * result.fills["price"]).abs().sum())
    assert np.isclose(result.journal["fee"].sum(), result.fills["fee"].sum(), atol=1e-6)
    for symbol, group in rows:
        assert np.isclose(group["position"].iloc[-1] + group["fill_quantity"].iloc[-1],
                          result.fills.loc[result.fills["symbol"] == symbol, "quantity"].sum(), atol=1e-9)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([CostModel.ideal(), ALL]))
def test_every_fill_was_possible(seed, costs):
    """Where the market was; no limit order worse than its price; makers at theirs; never more than the share of the
    volume; on the tick and the step"""
    frames, _ = market(seed, 2)
    result = backtest(Policy("any", any_orders, [float(seed)], ("return(1)",), order_slots=4), frames, costs=costs,
                      limits=WIDE, instruments=[replace(BITCOIN, symbol=symbol) for symbol in frames], baselines=())
    for symbol, fills in result.fills.groupby("symbol"):
        whole = result.candles[symbol]
        candles = whole.loc[fills.index]
        before = frames[symbol]["close"].shift(1).loc[fills.index]
        low = np.fmin(candles["low"], before)
        # who stood in the book when the open fell through is served at his own price
        high = np.fmax(candles["high"], before)
        inside = ((fills["market_price"] <= np.where(fills["maker"], high, candles["high"]) + .1)
                  & (fills["market_price"] >= np.where(fills["maker"], low, candles["low"]) - .1))
        # the rest of an order that did not find enough volume stands where it stood
        assert inside.all() or costs.participation and inside[~fills["maker"]].all()
        assert np.allclose(fills["price"] * 10, np.round(fills["price"] * 10))
        assert np.allclose(fills["quantity"] * 1_000, np.round(fills["quantity"] * 1_000))
        side = np.sign(fills["quantity"])
        through = side * (fills["price"] - np.where(side > 0, candles["low"], candles["high"])) > 0
        # a touch serves nobody who stands in the book
        assert (through | (candles["open"] == fills["price"]) | ~fills["maker"]).all() or costs.participation
        takers = ~fills["maker"]
        assert (np.sign(fills["quantity"]) * (fills["price"] - fills["market_price"]) * (1 if costs.impact == 0 else 0)
                >= -1e-9)[takers].all()
        assert (fills["price"] == fills["market_price"])[~takers].all()
        if costs.participation:
            assert (fills["quantity"].abs().groupby(level=0).sum() <= costs.participation
                    * result.candles[symbol]["volume"].loc[fills.index.unique()] + 1e-9).all()
    kinds = set(result.fills["kind"])
    assert {"market", "limit", "stop", "take profit", "trailing"} <= kinds, kinds


@settings(max_examples=15)
@given(st.integers(0, 1_000), st.sampled_from([Execution(), Execution("post_only", patience=2),
                                               Execution("slices", slices=3), Execution(protect=True)]),
       st.sampled_from([CostModel(), ALL, CostModel(latency=1)]))
def test_no_fill_of_a_target_goes_from_long_to_short(seed, execution, costs):
    "A flip is two orders: what closes fills before what opens, and each is what an exchange takes"
    frames, payments = market(seed, 1, 300)
    result = backtest(wavering(seed), frames, funding=payments, costs=costs, execution=execution, baselines=(),
                      limits=replace(WIDE, stops=Stops(stop_loss=.01, take_profit=.02)), instruments=(BITCOIN,))
    held = 0.
    for quantity, price in result.fills[["quantity", "price"]].to_numpy():
        after = round(held + quantity, 8)
        assert held * after >= 0.
        if held == 0. and costs.participation is None: assert abs(quantity) * price >= .9 * BITCOIN.min_notional
        held = after
    turned = result.journal["position"].to_numpy()
    flips = (turned[1:] * turned[:-1] < 0.).sum()
    assert flips > 0 or execution.style != "market"


@pytest.mark.parametrize("execution", [Execution(), Execution("post_only", patience=2), Execution("slices", slices=3),
                                       Execution(protect=True)],
                                       ids=lambda each: each.style + " protected" * each.protect)
@pytest.mark.parametrize("costs", [CostModel(), ALL, CostModel(latency=1)], ids=["usual", "realistic", "late"])
def test_both_forms_agree_in_every_style(execution, costs):
    frames, payments = market(5, 2, 700)
    limits = Limits(max_position=.4, max_daily_loss=None, max_drawdown=.9, stops=Stops(stop_loss=.01, take_profit=.02,
        stop_atr=0.))
    one, two = (backtest(wavering(), frames, funding=payments, costs=costs, limits=limits, execution=execution,
                         engine=engine, baselines=(), keep_observations=True) for engine in ("vectorised", "event"))
    assert first_difference(one, two) is None
    assert first_difference(one.fills, two.fills) is None
    assert one.equity.equals(two.equity)
    assert first_difference(one.observations, two.observations) is None
    assert len(one.fills) > 100
    if execution.protect: assert {"stop", "take profit"} <= set(one.fills["kind"])
    if execution.style == "post_only": assert one.fills["maker"].mean() > .2


@pytest.mark.parametrize("costs", [CostModel(), ALL, CostModel(latency=1)], ids=["usual", "realistic", "late"])
def test_both_forms_agree_on_orders_of_the_policy(costs):
    frames, payments = market(7, 2, 700)
    limits = Limits(max_position=.4, max_daily_loss=None, max_drawdown=.9, max_orders=None,
                    stops=Stops(stop_loss=.03, take_profit=.05))
    one, two = (backtest(Policy("any", any_orders, [7.], ("return(1)",), order_slots=3), frames, funding=payments,
                         costs=costs, limits=limits, engine=engine, baselines=(), keep_observations=True)
                         for engine in ("vectorised", "event"))
    assert first_difference(one, two) is None
    assert first_difference(one.fills, two.fills) is None
    assert one.equity.equals(two.equity)
    assert first_difference(one.observations, two.observations) is None
    assert len(one.fills) > 300
    assert {"market", "limit", "stop", "take profit"} <= set(one.fills["kind"])
    stopped = one.rows[one.rows["reason"] == Reason.STOP_LOSS]
    assert len(stopped) > 3
    assert (stopped["order"] == -stopped["position"]).all() # what a stop sends stands in the journal


@compiled
def once(parameters, memory, observation, prices, answer):
    "A limit order at the first close, left alone from then on"
    if memory[0] == 0.:
        memory[0] = 1.
        answer[0, 0]["kind"] = LIMIT
        answer[0, 0]["exposure"] = .5
        answer[0, 0]["price"] = .98 * prices[0]


@pytest.mark.parametrize("engine", ["vectorised", "event"])
def test_an_order_that_is_left_alone_goes_on_working(engine):
    candles = ar1(300, rho=0, volatility=.01, seed=3)
    policy = Policy("once", once, (), ("return(1)",), order_slots=1, memory=1)
    result = backtest(policy, candles, limits=WIDE, engine=engine, baselines=())
    fills = result.fills
    assert fills["maker"].tolist() == [True]
    assert fills["price"].iloc[0] == pytest.approx(.98 * result.rows["close"][0, 0], rel=1e-4)
    assert fills.index[0] > result.journal.index[1] # closes went by at which it was left alone


def brackets(shared, symbol):
    rows = json.loads((shared / "fixtures/binance/brackets/leverage_brackets.json").read_text())[symbol]
    return rows, tuple((float(row["notionalCap"]), row["initialLeverage"], row["maintMarginRatio"]) for row in rows)


def test_maintenance_margin_is_the_exchanges(shared):
    "Every tier of twelve symbols, its amount and the margin inside it"
    for symbol in json.loads((shared / "fixtures/binance/brackets/leverage_brackets.json").read_text()):
        rows, table = brackets(shared, symbol)
        row = replace(BITCOIN, symbol=symbol, brackets=table).row()[()]
        for each, amount in zip(rows, bracket_amounts(table)):
            middle = .5 * (each["notionalFloor"] + each["notionalCap"])
            assert np.isclose(amount, each["cum"], atol=.01)
            assert np.isclose(maintenance_margin(middle, row), middle * each["maintMarginRatio"] - each["cum"],
                              atol=.01)
            assert replace(BITCOIN, symbol=symbol,
                           brackets=table).max_notional(each["initialLeverage"]) >= each["notionalCap"]
    assert brackets(shared, "BTCUSDT")[1] == BITCOIN_BRACKETS


@settings(max_examples=200)
@given(st.floats(1_000, 1e8), st.floats(1.5, 80), st.sampled_from([1., -1.]), st.floats(100, 50_000))
def test_liquidation_is_where_binance_says(deposit, leverage, side, entry):
    "The formula of Binance's support page, iterated over the brackets, against the kernel's search"
    instrument = replace(BITCOIN, brackets=BITCOIN_BRACKETS)
    quantity = side * deposit * leverage / entry
    row = instrument.row()[()]
    account = new_account(deposit)
    positions = np.zeros(1, POSITION)
    positions["quantity"], positions["entry_price"] = quantity, entry
    rules = trading_rules(CostModel(), Limits(), [instrument], Execution())
    if deposit <= maintenance_margin(abs(quantity) * entry, row): return
    expected = entry
    for _ in range(100):
        tier = min(int(np.searchsorted(row["caps"], abs(quantity) * expected)), 11)
        expected = (deposit + row["amounts"][tier] - quantity * entry) / (abs(quantity) * row["rates"][tier] - quantity)
    prices = np.array([[entry, 4. * entry, .001 * entry, entry, 1.]])
    share = liquidation_share(new_state(account, positions, rules.execution), rules, prices)
    worst = .001 * entry if side > 0 else 4. * entry
    reached = side * (expected - worst) > 0
    assert (share <= 1.) == reached
    if reached: assert np.isclose(entry + share * (worst - entry), expected, rtol=1e-8)


def levered(candles, target, leverage, costs=CostModel(slippage=0., taker_fee=0.), deposit=10_000., stops=NO_STOPS,
            execution=Execution()):
    limits = Limits(max_position=leverage, max_leverage=leverage, leverage=max(20, leverage), min_margin_ratio=0.,
                    max_participation=None, max_daily_loss=None, max_drawdown=1., stops=stops, price_band=None)
    candles = np.asarray(candles, float)[:, None, :]
    account = new_account(deposit)
    positions = np.zeros(1, POSITION)
    tape = market_arrays(np.arange(len(candles)) * HOUR, candles, np.zeros((len(candles), 1)), costs, limits)
    rules = trading_rules(costs, limits, [BITCOIN], execution)
    world = Simulation(tape, new_state(account, positions, rules.execution, 50), rules)
    rows = np.zeros((len(candles) - 1, 1), JOURNAL)
    mark(account, positions, candles[0, :, 3].copy())
    for t in range(len(candles) - 1): world.step(t, np.array([target]), rows[t])
    return world.state, rows


@pytest.mark.parametrize("side, fall", [(1, (100, 100.5, 80, 81)), (-1, (100, 120, 99.5, 119))])
def test_liquidation_leaves_nothing_and_owes_nothing(side, fall):
    state, _ = levered([(100, 100, 100, 100, 1e6), (100, 100.5, 99.5, 100, 1e6), (*fall, 1e6)], side * 1., 10)
    assert state.positions["quantity"][0] == 0
    assert state.fills[state.count[0] - 1]["kind"] == Kind.LIQUIDATION
    assert 0 <= state.account["equity"][0] < .01 * 10_000
    assert state.account["equity"][0] == pytest.approx(10_000 + state.account["realised"][0] - state.account["fees"][0])


def test_a_gap_beyond_bankruptcy_is_stated_and_ends_everything():
    state, rows = levered([(100, 100, 100, 100, 1e6), (100, 100.5, 99.5, 100, 1e6), (60, 61, 59, 60, 1e6),
                           (60, 90, 60, 90, 1e6), (90, 95, 90, 95, 1e6)], 1., 10)
    assert state.account["equity"][0] < 0
    assert state.positions["quantity"][0] == 0
    assert state.count[0] == 2 # bought once, closed by the exchange at the open; nothing after it
    assert rows["equity"][-1, 0] < 0
    assert rows["order"][2:].sum() == 0


def test_a_stop_at_the_exchange_comes_before_the_liquidation():
    state, _ = levered([(100, 100, 100, 100, 1e6), (100, 100.5, 99.5, 100, 1e6), (100, 100.5, 80, 81, 1e6)], 1., 10,
                       stops=Stops(stop_loss=.02, take_profit=0.), execution=Execution(protect=True))
    assert [Kind(each["kind"]).name for each in state.fills[:state.count[0]]] == ["MARKET", "STOP"]
    assert state.account["equity"][0] == pytest.approx(10_000 * .8, rel=.01)


@pytest.mark.parametrize("side, candle", [(1, (100, 105, 95, 104)), (-1, (100, 105, 95, 96))])
def test_a_stop_comes_before_a_target_that_the_same_candle_reaches(side, candle):
    state, _ = levered([(100, 100, 100, 100, 1e6), (100, 100.5, 99.5, 100, 1e6), (*candle, 1e6)], side * 1., 1,
                       stops=Stops(stop_loss=.02, take_profit=.02), execution=Execution(protect=True))
    assert [Kind(each["kind"]).name for each in state.fills[:state.count[0]]] == ["MARKET", "STOP"]
    assert state.account["equity"][0] < 10_000


def test_more_than_the_bracket_allows_is_reduced():
    limits = Limits(max_position=50., max_leverage=50., leverage=50, min_margin_ratio=0., max_participation=None,
                    max_daily_loss=None, max_drawdown=1., stops=NO_STOPS)
    candles = ar1(60, rho=0, volatility=1e-4, seed=1)
    result = backtest(Policy("all", waver, [1e9], ("return(1)",)), candles, limits=limits, deposit=1e6,
                      instruments=(replace(BITCOIN, max_quantity=1e9),), baselines=())
    assert (result.rows["reason"] == Reason.BRACKET).any()
    assert (np.abs(result.rows["position"] * result.rows["close"]) <= 12.1e6).all()
    with pytest.raises(ValueError, match="leverage 200 is above the 150 that the exchange allows for BTC/USDT:USDT: "
                       "lower risk.leverage"):
        backtest(wavering(), candles, limits=Limits(leverage=200))


@pytest.mark.parametrize("wrong, message",
                         [((1.5,), r"waver answered \[1.5\] at the candle of \d{4}-\d\d-\d\d \d\d:\d\d.*a target is a "
                           r"number in \[-1, 1\]"), ((np.nan,), "waver answered .nan. at the candle")])
def test_what_is_no_target_is_named_with_its_bar(wrong, message):
    @compiled
    def bad(parameters, memory, observation, prices, targets): targets[0] = parameters[0]
    candles = ar1(50, seed=1)
    with pytest.raises(ValueError, match=message):
        backtest(Policy("waver", bad, np.array(wrong), ("return(1)",)), candles)
    with pytest.raises(ValueError, match=r"waver at the candle of \d{4}-\d\d-\d\d \d\d:\d\d.*: a policy answered with "
                       r"the targets .*: a target is a number in \[-1, 1\]"):
        backtest(Policy("waver", bad, np.array(wrong), ("return(1)",)), candles, engine="event")


def wanted(**fields):
    "An answer of one order"
    answer = np.zeros((1, 1), ORDER)
    for name, value in ({"kind": LIMIT, "exposure": .5, "price": 99.} | fields).items(): answer[name] = value
    return answer


@pytest.mark.parametrize("slots, answer, message", [
    (0, np.array([2.]), "a target is a number in .-1, 1."), (0, np.array([np.nan]), "a target is a number in"),
    (0, np.ones(3), "an answer is a target per symbol"), (1, np.ones(7), "answer must be one piece of .1, 1."),
    (1, wanted(price=0.), "slot 0: a limit order needs a price; was kind 2, .*price 0.0"),
    (1, wanted(kind=STOP), "a conditional order needs a trigger"),
    (1, wanted(kind=Kind.TRAILING, callback=1.), "the callback of a trailing stop is .001 to .2"),
    (1, wanted(exposure=2.), "its exposure in .-1, 1."),
    (1, wanted(exposure=np.inf), "the numbers of an order are finite"),
    (1, wanted(kind=7), "the kind of an order is one of 0 to 5"), (1, wanted(in_force=4), "its time in force one of 0"),
    (1, wanted(expires_in=-1.), "its expiry is not below 0")])
def test_a_wrong_answer_changes_nothing(slots, answer, message):
    candles = np.full((3, 1, 5), 100.)
    rules = trading_rules(CostModel(), Limits(), [BITCOIN], Execution(), slots)
    world = Simulation(market_arrays(np.arange(3) * HOUR, candles, np.zeros((3, 1)), CostModel(), Limits()),
                  new_state(new_account(1e4), np.zeros(1, POSITION), rules.execution, 50), rules)
    row = np.zeros(1, JOURNAL)
    kept = lambda: b"".join(array.tobytes() for array in (*world.state, row, world.proposals))
    before = kept()
    with pytest.raises(ValueError, match=message): world.step(0, answer, row)
    assert kept() == before
    for other in (candles.astype(np.float32), np.ones((3, 1, 11)), np.ones((3, 2, 5))[:, :1]):
        with pytest.raises(ValueError, match=r"candles must be one piece of .3, 1, 5. float64, was "):
            Simulation(world.arrays._replace(candles=other), world.state, rules)
    with pytest.raises(ValueError, match="a step goes from candle 0 to 1 of these 3 to the next, was 2"):
        world.step(2, np.zeros(0), row)
    with pytest.raises(ValueError, match="journal must be one piece of .1,. "):
        world.step(0, np.zeros(0), np.zeros(2, JOURNAL))
    with pytest.raises(ValueError, match="answer must be one piece of .* was .1,. float32"):
        world.step(0, np.ones(1, np.float32), row)


@pytest.mark.parametrize("symbols", [1, 3])
@pytest.mark.parametrize("execution", [Execution(), Execution("slices", slices=3), Execution("post_only"),
                                       Execution(protect=True)], ids=["market", "slices", "post_only", "protect"])
def test_many_steps_in_one_call_are_the_steps_one_by_one(symbols, execution):
    random, length = np.random.default_rng(symbols), 400
    candles = np.ascontiguousarray(np.stack([ar1(length, rho=0, volatility=.01, seed=n)[["open", "high", "low", "close",
        "volume"]].to_numpy() for n in range(symbols)], axis=1))
    targets = (np.repeat(random.uniform(-1, 1, (length // 8, symbols)), 8, axis=0)
               * (random.random((length, symbols)) < .9))
    rates = np.where(np.arange(length) % 8 == 7, 1e-4, 0.)[:, None] * np.ones(symbols)
    tape = market_arrays(np.arange(length) * HOUR, candles, rates, ALL, WIDE)
    rules = trading_rules(ALL, WIDE, [replace(BITCOIN, symbol=str(n)) for n in range(symbols)], execution)
    worlds = [Simulation(tape, new_state(new_account(1e5), np.zeros(symbols, POSITION), rules.execution, 9_000), rules)
              for _ in range(2)]
    curve = np.zeros(length - 300)
    single = np.zeros(length - 300)
    nobody = np.zeros(0, JOURNAL)
    for world in worlds: mark(world.state.account, world.state.positions, candles[299, :, 3].copy())
    assert steps(299, worlds[0].row, targets[299:-1], curve) == DONE
    for t in range(299, length - 1):
        worlds[1].step(t, targets[t], nobody)
        single[t - 299] = worlds[1].state.account["equity"][0]
    assert len(np.unique(curve)) > 90
    assert curve.tobytes() == single.tobytes()
    assert worlds[0].state.count[0] > 20
    for one, other in zip(worlds[0].state, worlds[1].state): assert one.tobytes() == other.tobytes()


def test_the_steps_before_a_wrong_answer_are_made():
    candles = np.full((9, 1, 5), 100.)
    rules = trading_rules(CostModel(), Limits(), [BITCOIN], Execution())
    targets = np.full((8, 1), .5)
    world = Simulation(market_arrays(np.arange(9) * HOUR, candles, np.zeros((9, 1)), CostModel(), Limits()),
                  new_state(new_account(1e4), np.zeros(1, POSITION), rules.execution, 50), rules)
    equity = np.zeros(8)
    mark(world.state.account, world.state.positions, candles[0, :, 3].copy())
    targets[5] = np.nan
    assert steps(0, world.row, targets, equity) == TARGET == world.row["code"][0]
    assert (equity[:5] > 9_000).all()
    assert (equity[5:] == 0).all()
    assert world.state.positions["age"][0] == 5


def test_an_order_in_slices_begins_anew_after_a_pause():
    candles = np.tile([100., 100., 100., 100., 1e6], (4, 1))[:, None, :]
    limits = replace(WIDE, max_position=.4)
    execution = Execution("slices", slices=4)
    tape = market_arrays(np.arange(4) * HOUR, candles, np.zeros((4, 1)), CostModel.ideal(), limits)
    rules = trading_rules(CostModel.ideal(), limits, [BITCOIN], execution)
    world = Simulation(tape, new_state(new_account(1e4), np.zeros(1, POSITION), rules.execution, 50), rules)
    for t, target in enumerate((1., .25, 1.)): world.step(t, np.array([target]), np.zeros(0, JOURNAL))
    # a quarter of 40; nothing to do; a quarter of the 30 that are missing
    assert world.state.fills[:world.state.count[0]]["quantity"].tolist() == [10., 7.5]


def test_a_policy_that_raises_is_named_with_its_bar():
    def broken(parameters, memory, observation, prices, targets): raise ZeroDivisionError("thought too hard")
    candles = ar1(50, seed=1)
    with pytest.raises(ZeroDivisionError, match=r"broken at the candle of .*: thought too hard"):
        backtest(Policy("broken", broken, (), ("return(1)",)), candles, baselines=())


def test_costs_that_look_at_the_market_need_history_and_ideal_needs_none():
    candles = ar1(400, seed=1)
    assert len(backtest(wavering(), candles, costs=CostModel.realistic(), baselines=()).rows) == 400 - 241 - 1
    assert len(backtest(wavering(), candles, costs=CostModel.ideal(), baselines=()).rows) > 390
    with pytest.raises(ValueError, match="need 241"):
        backtest(wavering(), candles, start=candles.index[100], costs=CostModel.realistic())


def test_the_past_does_not_know_the_future_of_costs():
    frames, payments = market(3, 1, 600)
    name, candles = next(iter(frames.items()))
    other = candles.copy()
    other.iloc[500:, :4] *= 1.1
    other.iloc[500:, 4] *= 5
    one, two = (backtest(wavering(), each, costs=ALL, limits=WIDE, baselines=()) for each in (candles, other))
    kept = one.fills.index < candles.index[500]
    assert first_difference(one.fills[kept], two.fills[:kept.sum()]) is None
    assert kept.sum() > 50


def test_round_trips_within_a_candle_count():
    "A journal knows the sum of a candle, the fills each trip: where a candle has one trip at most, they are the same"
    candles = ar1(3_000, rho=0, volatility=.02, seed=1)
    limits = Limits(max_position=.5, max_leverage=1., max_daily_loss=None, max_drawdown=.99,
                    stops=Stops(stop_loss=.01, take_profit=0.))
    target = pd.Series(np.where(np.arange(3_000) % 5 == 0, 1., 0.), candles.index)
    result = backtest(target, candles, limits=limits, execution=Execution(protect=True), baselines=())
    ours, theirs = journal_round_trips(result.journal), result.round_trips
    assert (theirs["entry_time"] == theirs["exit_time"]).sum() > 200
    assert len(ours) == len(theirs) > 300
    np.testing.assert_allclose(ours["profit"], theirs["profit"], atol=1e-6)
    assert ours["side"].tolist() == theirs["side"].tolist()
    assert result.summary().hit_rate == pytest.approx((theirs["profit"] > 0).mean())


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans())
def test_summary_trips_and_fills_walked_one_by_one_agree(seed, places, paying):
    "Orders of every kind, several trips in a candle: one source of truth, beside a second bookkeeping"
    candles = ar1(300, rho=0, volatility=.02, seed=seed)
    policy = Policy("any", any_orders, [float(seed % 1000)], ("return(1)",), order_slots=places)
    result = backtest(policy, candles, limits=WIDE, costs=CostModel(), funding=funding(candles, seed=seed) if paying
                      else None, baselines=())
    paid = result.journal["funding"]
    profits = []
    held = 0.
    cash = 0.
    events = sorted([(time, 0, row) for time, row in result.fills.iterrows()] + [(time, 1, amount) for time,
        amount in paid[paid != 0].items()], key=lambda each: each[:2])
    for _, kind, what in events:                                          # a candle is met first, then its close pays
        if kind:
            cash += what
            continue
        quantity, left = what["quantity"], what["quantity"]
        while left:
            part = -held if held * left < 0 and abs(left) > abs(held) else left
            held, left = round(held + part, 8), round(left - part, 8)
            cash -= part * what["price"] + what["fee"] * abs(part / quantity)
            if held == 0.:
                profits.append(cash)
                cash = 0.
    summary, trips = result.summary(), result.round_trips
    assert summary.round_trips == len(trips) == len(profits)
    np.testing.assert_allclose(sorted(trips["profit"]), sorted(profits), atol=1e-6)
    if not profits: return
    assert summary.hit_rate == pytest.approx((trips["profit"] > 0).mean())
    assert summary.expectancy == pytest.approx(trips["profit"].mean())
    open_part = cash + held * candles["close"].iloc[-1]
    assert trips["profit"].sum() + open_part == pytest.approx(result.equity.iloc[-1] - 10_000, abs=1e-5)
