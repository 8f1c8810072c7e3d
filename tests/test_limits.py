"""The order gate: no sequence of actions, prices and states makes it let a limit be exceeded, reducing is always
possible, and the order of the symbols does not matter"""
import json
import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.account import POSITION, apply_fill, mark, new_account
from tradelab.compiled import compiled
from tradelab.evaluation.difference import first_difference
from tradelab.events import KNOWN, Candles, Fill, TradingState
from tradelab.features.observation import PORTFOLIO, Observation
from tradelab.instruments import BITCOIN
from tradelab.journal import JOURNAL
from tradelab.learn.env import MarketEnv
from tradelab.market.candles import matrix
from tradelab.market.synthetic import correlated, realistic
from tradelab.orders import LIMIT, STOP, TAKE_PROFIT
from tradelab.policies import Policy
from tradelab.risk.limits import Gate
from tradelab.risk.trading_state import allowed, require_state
from tradelab.runs.run import make_trader
from tradelab.settings import (
    NO_STOPS,
    OPTIONAL,
    CostModel,
    Execution,
    Limits,
    Reason,
    Stops,
    example_lines,
    limits_rows,
)
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import prepare

HOUR, NAMES = 3_600_000, ("a", "b", "c")
ROOT = Path(__file__).parents[1]


@compiled
def _turning(parameters, memory, observation, prices, targets):
    "Targets from the last return, and a confidence behind them"
    count = len(observation)
    for n in range(count): targets[n] = np.sin(300. * observation[n, 0])
    if len(targets) > count:
        for n in range(count): targets[count + n] = abs(np.cos(200. * observation[n, 0]))


def turning(confident=False): return Policy("turning", _turning, np.zeros(0), ("return(1)",), has_confidence=confident)


@st.composite
def limits(draw, memory=False):
    most = draw(st.floats(.2, 3))
    none = lambda strategy: draw(st.none() | strategy)
    below = lambda: none(st.floats(.05, most))
    return Limits(max_position=draw(st.floats(.05, most)), max_leverage=most, leverage=5, min_trade=.001,
                  max_net=below(), max_sector=below(), sectors={"a": "one", "b": "one", "c": "two"},
                  max_order=none(st.floats(.01, 1)), max_participation=none(st.floats(.001, 1)),
                  max_daily_loss=none(st.floats(.01, .5)), drawdown_from=none(st.floats(.001, .1)),
                  min_margin_ratio=draw(st.floats(1, 50)),
                  max_orders=none(st.integers(1, 5)), capital=none(st.floats(1_000, 20_000)),
                  min_confidence=draw(st.floats(0, .5)),
                  stops=draw(st.sampled_from((NO_STOPS, Stops(), Stops(trailing_stop=.01, max_age=3)))),
                  max_group=below() if memory else None, max_var=none(st.floats(.001, .05)) if memory else None,
                  target_volatility=none(st.floats(.1, 2)) if memory else None)


def exposure(positions, prices, equity): return positions * prices / equity


def check(before, after, wanted, prices, equity, rules, rows, covariance, base):
    "Every limit holds, or what is above it was held already and was not added to"
    instruments = np.full(len(prices), .05)
    kept = np.where(np.sign(after) == np.sign(before), np.sign(before) * np.minimum(np.abs(after), np.abs(before)), 0.)
    now, still = after * prices, kept * prices
    slack = 1e-6 * equity + 1e-9
    def within(measure, limit):
        assert measure(now) <= max(limit, measure(still)) + slack, (measure(now), limit, measure(still),
            Reason(rows["reason"][0]))
    for n in range(len(prices)): within(lambda held, n=n: abs(held[n]), rules.max_position * base)
    within(lambda held: np.abs(held).sum(), rules.max_leverage * base)
    within(lambda held: (np.abs(held) * instruments).sum(), equity / rules.min_margin_ratio)
    if rules.max_net is not None: within(lambda held: abs(held.sum()), rules.max_net * base)
    if rules.max_sector is not None:
        for members in ([0, 1], [2]):
            within(lambda held, members=members: np.abs(held[members]).sum(), rules.max_sector * base)
    if rules.max_order is not None: assert (np.abs(after - kept) * prices <= rules.max_order * base + slack).all()
    if rules.max_participation is not None:
        assert (np.abs(after - kept) * prices <= rules.max_participation * rows["turnover"] + slack).all()
    if rules.max_group is not None:
        correlation = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
        for n in range(len(prices)):
            member = np.abs(correlation[n]) >= rules.group_correlation
            for side in (1, -1):
                within(lambda held, member=member, n=n, side=side: np.maximum(held * side * np.sign(correlation[n]),
                    0)[member].sum(), rules.max_group * base)
    if rules.max_var is not None:
        within(lambda held: 2.3263478740408408 * np.sqrt(max(held @ covariance @ held, 0) * 24), rules.max_var * base)


@settings(max_examples=300)
@given(limits(), st.integers(0, 10**6), st.data())
def test_no_sequence_exceeds_a_limit(rules, seed, data):
    walk(rules, seed, data.draw(st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, 3]), min_size=12, max_size=12)), 0)


@settings(max_examples=300)
@given(limits(memory=True), st.integers(0, 10**6))
def test_nor_one_that_looks_at_the_market(rules, seed): walk(rules, seed, [0] * 8, 40)


def walk(rules, seed, states, warm):
    random = np.random.default_rng(seed)
    gate = Gate(rules, [replace(BITCOIN, symbol=name, max_quantity=60., brackets=((1e12, 20, .05),)) for name in NAMES])
    account = new_account(10_000.)
    positions = np.zeros(3, POSITION)
    prices = random.uniform(20, 500, 3)
    common = random.standard_normal((warm + len(states), 1))
    moves = .02 * (common * random.choice([-1., 1.], 3) + .5 * random.standard_normal((warm + len(states), 3)))
    for t in range(warm + len(states)):
        prices = prices * np.exp(moves[t])
        candle = np.stack([prices, prices * 1.01, prices * .99, prices, random.uniform(1, 5_000, 3)], axis=1)
        gate.watch(1_700_000_000_000 // HOUR * HOUR + t * HOUR, candle)
        if t < warm: continue
        mark(account, positions, prices)
        require_state(account, states[t - warm])
        equity = float(account["equity"][0])
        before = positions["quantity"].copy()
        if equity <= 100: return
        answer = np.append(random.uniform(-1, 1, 3).round(2), random.uniform(0, 1, 3))
        rows = gate.decide(1_700_000_000_000 // HOUR * HOUR + t * HOUR, candle, answer, account, positions).copy()
        base = min(equity, rules.capital or np.inf)
        if rules.drawdown_from is not None:
            base *= min(1., max(0., (.15 - account["drawdown"][0]) / (.15 - rules.drawdown_from)))
        after = before + rows["quantity"]
        check(before, after, answer, prices, equity, rules, rows, gate.covariance, base)
        state = (TradingState.HALT if account["halted"][0] else max(states[t - warm], TradingState.REDUCE_ONLY
            if account["day_stopped"][0] else 0))
        assert account["trading_state"][0] == state
        for n in range(3):
            grows = abs(after[n]) > abs(before[n]) + 1e-9 or after[n] * before[n] < -1e-12
            if grows:
                assert allowed(state, "entry" if before[n] * after[n] <= 0 else "increase")
                assert rows["confidence"][n] >= rules.min_confidence
            if state >= TradingState.FLATTEN:
                assert rows["quantity"][n] == -np.sign(before[n]) * min(abs(before[n]), 60.)
        if rules.max_orders is not None and (np.abs(after) > np.abs(before) + 1e-9).any():
            assert (rows["quantity"] != 0).sum() <= rules.max_orders
        for n in range(3):
            if rows["quantity"][n] != 0: apply_fill(account, positions, n, rows["quantity"][n], prices[n], 0.)


@settings(max_examples=300)
@given(limits(memory=True), st.integers(0, 10**6), st.sampled_from(list(TradingState)), st.floats(.3, 1))
def test_reducing_is_always_possible_and_order_does_not_matter(rules, seed, state, peak):
    "Whatever the state, the limits and the market: a target of zero closes, and permuted symbols get permuted answers"
    random = np.random.default_rng(seed)
    prices = random.uniform(20, 500, 3)
    held = (random.uniform(-20, 20, 3)).round(3)
    covariance = np.cov(random.standard_normal((3, 30))) * 1e-4
    rules = replace(rules, max_orders=None)
    targets = random.uniform(-1, 1, 3).round(2)

    def ordered(order, targets):
        gate = Gate(rules, [replace(BITCOIN, symbol=NAMES[n]) for n in order])
        account = new_account(10_000.)
        positions = np.zeros(3, POSITION)
        gate.covariance[:], gate.market["step"] = covariance[np.ix_(order, order)], HOUR
        positions["quantity"], positions["entry_price"], account["peak"] = held[order], prices[order], 10_000 / peak
        require_state(account, state)
        mark(account, positions, prices[order])
        candle = np.stack([prices[order]] * 4 + [np.full(3, 1e4)], axis=1)
        return gate.decide(10**12, candle, targets[order], account, positions).copy()
    same = np.arange(3)
    assert np.array_equal(ordered(same, 0 * targets)["quantity"], -held)
    answer, order = ordered(same, targets), random.permutation(3)
    mirrored = ordered(order, targets)
    assert np.array_equal(mirrored["quantity"], answer["quantity"][order])
    assert np.array_equal(mirrored["reason"], answer["reason"][order])


@settings(max_examples=300)
@given(limits(memory=True), st.integers(1, 5), st.integers(0, 10**6))
def test_no_more_symbols_are_held_than_allowed(rules, most, seed):
    """Random targets at the gate: none is opened beyond the limit, the larger targets come first, what is held may
    shrink, flip and close as without the limit"""
    random = np.random.default_rng(seed)
    names = "abcdef"
    count = 6
    rules = replace(rules, max_positions=most, max_orders=None, max_sector=None, max_var=None, max_group=None,
                    target_volatility=None, stops=NO_STOPS, min_margin_ratio=0., min_confidence=0.)
    prices = random.uniform(20, 500, count)
    gates = [Gate(each, [replace(BITCOIN, symbol=name) for name in names])
             for each in (rules, replace(rules, max_positions=None))]
    account = new_account(10_000.)
    positions = np.zeros(count, POSITION)
    working = np.zeros(count, bool)
    for t in range(12):
        mark(account, positions, prices)
        candle = np.stack([prices] * 4 + [np.full(count, 1e9)], axis=1)
        targets = random.choice([-1., -.5, 0., .3, .5, .8, 1.], count)
        rows, free = (gate.decide(10**12 + t * HOUR, candle, targets, account.copy(), positions.copy(), None,
                                  working).copy() for gate in gates)
        held = positions["quantity"] != 0
        after = positions["quantity"] + rows["quantity"]
        before = held | working
        opened = (after != 0) & ~before
        denied = rows["reason"] == Reason.MAX_POSITIONS
        assert opened.sum() <= max(0, most - before.sum())
        assert ((after != 0) | working).sum() <= max(most, before.sum())
        assert not (denied & before).any()
        assert not rows["quantity"][denied].any()
        if opened.any() and denied.any(): assert np.abs(targets[opened]).min() >= np.abs(targets[denied]).max()
        for size in np.unique(np.abs(targets[opened | denied])): # of equal targets, the symbol that comes first
            asked = (opened | denied) & (np.abs(targets) == size)
            if opened[asked].any() and denied[asked].any():
                assert np.flatnonzero(asked & opened).max() < np.flatnonzero(asked & denied).min()
        reducing = held & (targets == 0)
        assert np.array_equal(rows["quantity"][reducing], free["quantity"][reducing])
        for n in np.flatnonzero(rows["quantity"]): apply_fill(account, positions, n, rows["quantity"][n], prices[n], 0.)
        prices = prices * np.exp(.002 * random.standard_normal(count))
        working = random.random(count) < .15


SIX = "abcdef"
STYLES = (Execution(), Execution("post_only", patience=2), Execution("slices", slices=3), Execution(protect=True))


@compiled
def _noise(parameters, memory, observation, prices, answer):
    "Random targets from the last returns"
    for i in range(len(answer)):
        seed = abs(observation[i % len(observation), 0]) * 9973.37 * (i + 1.) + parameters[0]
        v = 7919. * seed - np.floor(7919. * seed)
        answer[i] = 0. if seed - np.floor(seed) < .35 else 2. * v - 1.


@compiled
def _noisy_orders(parameters, memory, observation, prices, answer):
    "Random orders of every kind from the last returns"
    for n in range(answer.shape[0]):
        for k in range(answer.shape[1]):
            seed = abs(observation[n, 0]) * 9973.37 * (n * answer.shape[1] + k + 1.) + parameters[0]
            u = seed - np.floor(seed)
            v = 7919. * seed - np.floor(7919. * seed)
            w = 104729. * seed - np.floor(104729. * seed)
            if u <= .5: continue
            row = answer[n, k]
            side = 1. if w * 10. % 1. > .5 else -1.
            row["kind"] = 0 if w > .9 else int(1. + 5. * v)
            row["exposure"] = side * (.2 + .8 * w)
            row["reduce_only"] = 0
            row["expires_in"] = np.floor(5. * v)
            row["price"] = prices[n] * (1. - side * .01 * v) if row["kind"] == LIMIT else 0.
            row["trigger"] = 0.
            if row["kind"] == STOP: row["trigger"] = prices[n] * (1. + side * .01 * v)
            if row["kind"] == TAKE_PROFIT: row["trigger"] = prices[n] * (1. - side * .01 * v)
            row["callback"] = .003 + .01 * v


def noise(number, orders=0):
    return Policy("noise", _noisy_orders if orders else _noise, np.array([number]), ("return(1)",), order_slots=orders)


def most_held(result):
    "How many symbols were held at once, fill by fill"
    held, most = dict.fromkeys(SIX, 0.), 0
    for symbol, quantity in zip(result.fills["symbol"], result.fills["quantity"]):
        held[symbol] = round(held[symbol] + quantity, 8)
        most = max(most, sum(quantity != 0 for quantity in held.values()))
    return most


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(0, 10**6), st.sampled_from(STYLES), st.integers(0, 3),
       st.sampled_from([None, .0002]), st.sampled_from([0, 0, 2]))
def test_no_more_symbols_are_held_in_any_driver(most, seed, execution, latency, participation, orders):
    """Array, event engine and environment, with orders that are late, rest and fill in parts: the limit holds after
    every fill, and they decide the same"""
    candles = correlated(160, SIX, correlation=.3, seed=seed % 1000)
    limits = Limits(max_position=.15, max_positions=most, max_daily_loss=None, max_drawdown=.95, min_trade=.001,
                    stops=Stops(stop_loss=.01, take_profit=.01))
    given = dict(costs=CostModel(latency=latency,
                                 **({} if participation is None else {"participation": participation})), limits=limits,
                                 execution=execution)
    if orders: given["execution"] = replace(execution, style="market")
    array, event = (backtest(noise(seed % 97, orders), candles, engine=engine, baselines=(), **given)
                    for engine in ("vectorised", "event"))
    assert most_held(array) <= most
    assert first_difference(array, event) is None
    if orders: return
    environment = MarketEnv(prepare(candles, Observation(["return(1)"]), **given))
    random = np.random.default_rng(seed)
    environment.reset(seed=0)
    done = False
    while not done:
        *_, ended, truncated, info = environment.step(random.choice([-1., -.4, 0., 0., .7, 1.], 6))
        done = ended or truncated
        assert (environment.batch.positions[0]["quantity"] != 0).sum() <= most


@settings(max_examples=15)
@given(st.lists(st.sampled_from(list(TradingState)), min_size=30, max_size=30), st.integers(0, 10**6))
def test_the_state_that_is_required_is_the_state_of_every_driver(states, seed):
    """`require_state` at an environment and at a trader: seen at once, obeyed at the next close, kept by a snapshot,
    taken back by NORMAL"""
    candles = correlated(80, NAMES[:2], seed=seed % 1000)
    random = np.random.default_rng(seed)
    limits = Limits(max_position=.4, max_daily_loss=None, max_drawdown=.95, max_participation=None, stops=NO_STOPS)
    environment = MarketEnv(prepare(candles, Observation(["return(1)"]), limits=limits))
    environment.reset(seed=0)
    batch = environment.batch
    times = environment.batch.market.arrays.times
    account = batch.accounts[0]
    positions = batch.positions[0]
    trader = make_trader(turning(), limits, tuple(replace(BITCOIN, symbol=name) for name in NAMES[:2]))
    values = matrix(candles, KNOWN)[1]
    trader.warm(times[:batch.at[0]], values[:batch.at[0]])
    column = PORTFOLIO.index("risk_state") - len(PORTFOLIO)
    for state in states:
        t, held = int(batch.at[0]), positions["quantity"].copy()
        for each in (account, trader.account): require_state(each, state)
        again = make_trader(turning(), limits, trader.instruments)
        again.restore(json.loads(json.dumps(trader.snapshot())))
        assert again.account["trading_state"] == account["trading_state"] == state
        had = trader.positions["quantity"].copy()
        decision = trader.on(Candles(int(times[t]), values[t]))
        assert (decision.observation[:, column] == np.float32(state / TradingState.HALT)).all()
        environment.step(random.uniform(-1, 1, 2))
        for before, after in ((held, positions["quantity"]), (had, had + decision.quantities)):
            entered = (after != 0) & (before * after <= 0)
            increased = (before * after > 0) & (np.abs(after) > np.abs(before) + 1e-9)
            assert allowed(state, "entry") or not entered.any()
            assert allowed(state, "increase") or not increased.any()
            assert state < TradingState.FLATTEN or not after.any()
        for n, quantity in enumerate(decision.quantities):
            if quantity:
                trader.on(Fill(NAMES[n], float(quantity), float(values[t + 1, n, 0]), 0., int(times[t + 1])))


def test_each_limit_is_one_entry():
    """Field, default, number in the row of compiled code, line of tradelab.toml.example and row of the table come from
    the entry; no limit is without one"""
    text = (ROOT / "tradelab.toml.example").read_text()
    for kind, section in ((Limits, "[risk]"), (Stops, "[risk.stops]")):
        lines = re.search(rf"^{re.escape(section)}.*\n((?:.+\n)+)", text, re.M)[1].splitlines()
        assert example_lines(kind) == lines
        assert [row[0] for row in limits_rows(kind)] == [field.name for field in fields(kind) if field.name != "stops"]
        for field in fields(kind):
            if field.name in ("sectors", "stops"): continue
            example = field.default if field.default is not None else field.metadata["example"]
            given = {field.name: example} if kind is Limits else {"stops": {field.name: example}}
            assert Limits(sectors={"a": "b"}, **given).row()[field.name] == example, field.name
            if kind is Limits: assert (field.name in OPTIONAL) == ("None" in str(field.type)), field.name


def test_the_example_file_says_the_defaults():
    text = (ROOT / "tradelab.toml.example").read_text()
    assert Limits(**tomllib.loads(text)["risk"]) == Limits()


def test_codes_of_reasons_never_change():
    "Journals store them: a number that is given keeps its meaning, a new reason takes the next"
    names = """ACCEPTED TOO_SMALL LEVERAGE BALANCE MAX_QUANTITY HALTED STATE DAILY_LOSS CONFIDENCE PRICE_BAND
        ORDER_SIZE PARTICIPATION SECTOR GROUP NET VALUE_AT_RISK MARGIN_RATIO ORDER_RATE UNKNOWN VOLATILITY DRAWDOWN
        STOP_LOSS TAKE_PROFIT TRAILING_STOP TIME_STOP STOPPED_OUT BRACKET NO_DECISION MAX_POSITIONS BY_HAND""".split()
    assert [Reason(code).name for code in range(len(names))] == names
    assert sorted(Reason) == list(range(len(Reason)))


def test_each_limit_that_denies_has_a_sentence_that_names_it():
    named = {name for reason in Reason for name in re.findall(r"[a-z_]+", reason.sentence(1., 1.))}
    limits = {field.name for field in fields(Limits) if field.name.startswith(("max_", "min_"))} | {"target_volatility"}
    # what a target of 1 comes to, and one sentence for all that is too small
    assert limits - named == {"max_position", "min_trade"}


WATCHFUL = Limits(max_position=.4, max_leverage=.7, max_group=.5, max_net=.6, max_var=.02, target_volatility=.6,
                  drawdown_from=.02, decay=.2, min_confidence=.2,
                  stops=Stops(stop_loss=0., stop_atr=2., trailing_atr=3., atr_period=5, max_age=6))


def test_every_driver_knows_the_same_of_the_market():
    """Array, event and environment, with limits and stops that remember: the same bits; and a start in the middle
    forgets its beginning"""
    pair = correlated(1_100, NAMES[:2], seed=5)
    face = dict(limits=WATCHFUL, keep_observations=True, baselines=())
    array, event = (backtest(turning(True), pair, engine=engine, **face) for engine in ("vectorised", "event"))
    assert first_difference(array, event) is None
    assert first_difference(array.observations, event.observations) is None
    reasons = set(np.unique(array.rows["reason"]).tolist())
    assert {Reason.CONFIDENCE, Reason.VOLATILITY, Reason.TIME_STOP, Reason.STOP_LOSS, Reason.TRAILING_STOP,
            Reason.STOPPED_OUT, Reason.DRAWDOWN} <= reasons
    assert reasons & {Reason.GROUP, Reason.LEVERAGE, Reason.VALUE_AT_RISK}
    start = next(iter(pair.values())).index[700]
    late, early = (backtest(turning(True), {name: frame[cut:] for name, frame in pair.items()}, start=start, **face)
                   for cut in (300, 0))
    assert first_difference(late, early) is None
    plain = backtest(turning(), pair, **face | {"limits": replace(WATCHFUL, min_confidence=0.)})
    market = prepare(pair, Observation(["return(1)"]), limits=replace(WATCHFUL, min_confidence=0.))
    environment = MarketEnv(market)
    rows = []
    done = False
    seen, _ = environment.reset(seed=0)
    while not done:
        seen, *_, ended, truncated, info = environment.step(turning().act(seen.reshape(2, -1)))
        rows.append(info["journal"])
        done = ended or truncated
    assert np.array_equal(np.array(rows, JOURNAL), plain.rows)


def test_too_little_history_for_a_limit_is_refused():
    frame = realistic(300, seed=1)
    with pytest.raises(ValueError, match="leaves 100 candles of warm-up, features and limits need 1667 to warm up|300 "
                       "candles are too few, features and limits need 1667"):
        backtest(turning(), frame, start=frame.index[100], limits=Limits(max_var=.02))
    with pytest.raises(ValueError, match="300 candles are too few: features, limits and costs need 1667"):
        prepare(frame, Observation(["return(1)"]), limits=Limits(max_var=.02))


def test_stops_close_at_the_close_and_stay_out():
    """A stop is a market order of the next candle; the side it closed is entered again only after the policy has asked
    for something else"""
    result = backtest(turning(), realistic(2_000, seed=3), limits=Limits(stops=Stops(stop_loss=.01, take_profit=.02)))
    rows, frame = result.rows[:, 0], result.journal
    stopped = np.isin(rows["reason"], (Reason.STOP_LOSS, Reason.TAKE_PROFIT))
    assert stopped.sum() > 20
    assert (rows["order"][stopped] == -rows["position"][stopped]).all()
    for t in np.flatnonzero(stopped)[:-1]:
        side = np.sign(rows["position"][t])
        # candles until the policy asks for something else
        out = np.argmax(np.append(rows["target"][t + 1:] * side <= 0, True))
        assert not (rows["order"][t + 1:t + 1 + out] * side > 0).any()
    last = frame[stopped].iloc[-1]
    assert f"{last['limit']:g}" in Reason(int(last["reason"])).sentence(last["value"], last["limit"])


def test_a_price_off_the_mark_and_a_mark_that_is_unknown_are_denied():
    gate = Gate(Limits(), [BITCOIN])
    candle = np.array([[100., 100, 100, 100, 1e6]])
    decide = lambda marks: gate.decide(10**12, candle, np.ones(1), new_account(10_000.), np.zeros(1, POSITION),
                                       marks)[0].copy()
    assert decide(None)["quantity"] > 0
    assert decide(np.array([94.]))["reason"] == Reason.PRICE_BAND
    assert decide(np.array([np.nan]))["reason"] == Reason.UNKNOWN


def test_the_day_ends_at_midnight():
    "What the day has lost keeps it closed, whatever the price does, until the next one"
    gate = Gate(Limits(max_position=1., stops=NO_STOPS), [BITCOIN])
    account = new_account(10_000.)
    positions = np.zeros(1, POSITION)
    day = 1_700_006_400_000 // 86_400_000 * 86_400_000
    reasons = []
    for hour, price in enumerate((100., 100., 93., 99., *[99.] * 22)):
        if hour == 1: apply_fill(account, positions, 0, 80., 100., 0.)
        mark(account, positions, np.array([price]))
        answer = gate.decide(day + hour * HOUR, np.array([[price, price, price, price, 1e6]]), np.ones(1), account,
                             positions)
        reasons.append(Reason(answer["reason"][0]))
    assert reasons[2:24] == [Reason.DAILY_LOSS] * 22
    assert reasons[1] is Reason.ACCEPTED
    assert reasons[24] is not Reason.DAILY_LOSS
