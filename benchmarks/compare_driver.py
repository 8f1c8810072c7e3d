"""Does the scenarios of `compare.py` with the package that is first on PYTHONPATH, and writes a file per run.

`compare.py` takes this file from each of the two revisions: it speaks the package's language of its own revision, the
scenarios speak that of the first one. Whoever renames something in the package edits the imports and the functions
here in the same commit; a setting that has another name now is put into `NAMES`. What is written keeps its names as far
as it can, the rest is in the tables of `compare.py`.
"""
import asyncio
import json
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import tradelab
from tradelab.account import POSITION, mark, new_account
from tradelab.compiled import compiled
from tradelab.evaluation.intervals import intervals
from tradelab.evaluation.metrics import drawdowns, journal_round_trips, metrics
from tradelab.evaluation.value_at_risk import tail_history
from tradelab.evaluation.var_backtest import var_backtest
from tradelab.events import KNOWN, Fill, TradingState
from tradelab.features.observation import Observation, feature_columns
from tradelab.instruments import Instrument
from tradelab.journal import JOURNAL
from tradelab.market.candles import frames_of, holes_in, matrix, resample
from tradelab.orders import CLOSING, NONE, OPENING, ORDER, OWN, Kind, working_orders
from tradelab.policies import Policy, mlp, pack
from tradelab.risk.breakers import Breaker, Breakers, RangeWindow, RateWindow
from tradelab.risk.portfolio import PortfolioRisk, covariance_history, ledoit_wolf
from tradelab.risk.sizing import fixed_fraction, kelly, kelly_portfolio, shrunk_kelly, volatility_target
from tradelab.risk.stops import simulate
from tradelab.risk.trading_state import CAUSES, StateMachine, require_state
from tradelab.runs.run import make_trader
from tradelab.settings import CostModel, Execution, Limits, Reason, Stops
from tradelab.sim.backtest import backtest
from tradelab.sim.costs import calibrate
from tradelab.sim.kernel import Simulation, market_arrays, trading_rules
from tradelab.sim.matching import new_state
from tradelab.sim.prepared import SimulationSettings, funding_rates, prepare
from tradelab.sim.stress import stress
from tradelab.sim.sweep import sweep
from tradelab.strategies.example import FadeGap, Momentum, SmaCross

# settings of the scenarios that are called otherwise here: name there -> name here, of costs, limits, stops, execution
NAMES = {}
ENGINES = {"array": "vectorised", "event": "event"}


# --- settings -------------------------------------------------------------------------------------------------------
def named(values): return {NAMES.get(name, name): value for name, value in values.items()}


def costs_of(run):
    "CostModel of a scenario: nothing, a name of ours, or fields"
    values = run.get("costs")
    if values == "ideal": return CostModel.ideal()
    values = dict(values or {})
    if values.pop("realistic", False): return CostModel.realistic(**named(values))
    return CostModel(**named(values))


def limits_of(run):
    values = dict(run.get("limits") or {})
    stops = values.pop("stops", None)
    return Limits(**named(values), **({} if stops is None else {"stops": Stops(**named(stops))}))


def execution_of(run): return Execution(**named(run.get("execution") or {}))
def instruments_of(run): return tuple(Instrument(**named(each))
                                      for each in run["instruments"]) if "instruments" in run else None


# --- markets --------------------------------------------------------------------------------------------------------
class Market:
    "What `compare.py` has written: frames by symbol, funding by symbol"

    def __init__(self, path):
        with np.load(path) as stored: arrays = dict(stored)
        index = pd.DatetimeIndex(arrays["times"].astype("datetime64[ms]"), tz="UTC", name="open_time")
        columns = [str(name) for name in arrays["columns"]]
        self.symbols = [str(name) for name in arrays["symbols"]]
        self.frames = {name: pd.DataFrame(values, index, columns) for name,
                       values in zip(self.symbols, arrays["values"])}
        for name, frame in self.frames.items(): frame.attrs["symbol"] = name
        due = pd.DatetimeIndex(arrays["funding_times"].astype("datetime64[ms]"), tz="UTC")
        self.funding = {name: pd.Series(rates, due) for name, rates in zip(self.symbols, arrays["funding_rates"])}

    def traded(self, run):
        "Frames that are traded, frames that are only looked at, funding"
        count = run.get("traded", len(self.symbols))
        names, rest = self.symbols[:count], self.symbols[count:]
        funding = {name: self.funding[name] for name in names} if run.get("funding", True) else None
        return {name: self.frames[name] for name in names}, {name: self.frames[name] for name in rest} or None, funding


# --- policies -------------------------------------------------------------------------------------------------------
@compiled
def _noise(seen, number):
    "A number in [0, 1) that depends on a float and a whole number alone"
    value = abs(seen) * 9973.37 * (1. + number) + .618034 * number
    return value - np.floor(value)


@compiled
def _noisy(parameters, memory, observation, prices, answer):
    for n in range(len(answer)):
        seen = observation[n % len(observation), 0]
        u = _noise(seen, n)
        answer[n] = 0. if u < parameters[0] else 2. * _noise(seen, n + 50) - 1. if n < len(observation) else u


@compiled
def _orders(parameters, memory, observation, prices, answer):
    for n in range(len(observation)):
        for k in range(answer.shape[1]):
            seen = observation[n, 0]
            u = _noise(seen, 11 * k + n)
            if u < parameters[1]: continue
            row = answer[n, k]
            kind = 0 if u > .93 else int(np.floor(1. + 5. * _noise(seen, 11 * k + n + 1)))
            side = 1. if _noise(seen, 11 * k + n + 2) > .5 else -1.
            row["exposure"] = side * _noise(seen, 11 * k + n + 3)
            row["kind"] = kind
            row["price"] = row["trigger"] = row["callback"] = 0.
            away = .02 * _noise(seen, 11 * k + n + 4)
            if kind == 2 or (kind > 2 and _noise(seen, 11 * k + n + 5) > .6):
                row["price"] = prices[n] * (1. - side * away)
            if kind == 3 or kind == 4: row["trigger"] = prices[n] * (1. + (side if kind == 3 else -side) * .5 * away)
            if kind == 5: row["callback"] = .003 + away
            row["in_force"] = int(np.floor(4. * _noise(seen, 11 * k + n + 6)))
            row["expires_in"] = np.floor(6. * _noise(seen, 11 * k + n + 7))
            row["reduce_only"] = 1 if _noise(seen, 11 * k + n + 8) > .7 else 0


def _python(parameters, memory, observation, prices, targets):
    for n in range(len(targets)): targets[n] = 1. if observation[n, 0] > parameters[0] else -.5


def network(seed, symbols, features, window, scaler):
    "An actor with random weights for what it sees of the market, and none for its portfolio, which may change"
    random, market = np.random.default_rng(seed), window * len(features)
    weights = np.zeros((8, symbols, Observation(features, window).width))
    weights[:, :, :market] = random.normal(size=(8, symbols, market)) / 4
    layers = [(weights.reshape(8, -1), random.normal(size=8)),
              (random.normal(size=(symbols, 8)), random.normal(size=symbols))]
    return Policy("network", mlp, pack(layers, "relu", "tanh"), tuple(features), window, scaler)


def policy_of(run, market):
    "The policy of a scenario, or its table of targets"
    asked, count = run["policy"], run.get("traded", len(market.symbols))
    kind, features, window = asked["kind"], tuple(asked.get("features", ("return(1)",))), asked.get("window", 1)
    scaler = None
    if "scaler" in asked:
        known = {name: market.frames[name].iloc[:asked["fit"]] for name in market.symbols}
        fitted = Observation(features, window, symbols=tuple(market.symbols[:count])).fit(known, asked["scaler"],
                gaps=run.get("gaps", False))
        scaler = fitted.scaler
    match kind:
        case "momentum": return Momentum(*asked["numbers"])
        case "cross": return SmaCross(*asked["numbers"])
        case "fade": return FadeGap()
        case "network": return network(asked["seed"], count, features, window, scaler)
        case "noisy": return Policy("noisy", _noisy, asked["numbers"], features, window, scaler,
                                    asked.get("confident", False))
        case "python": return Policy("python", _python, asked["numbers"], features, window)
        case "orders": return Policy("orders", _orders, asked["numbers"], features, window,
                                     order_slots=int(asked["numbers"][0]))
    random, frames = np.random.default_rng(asked["seed"]), list(market.frames.values())
    steps = np.arange(len(frames[0])) // asked["every"]
    table = random.uniform(-1, 1, (steps[-1] + 1, count)) * (random.random((steps[-1] + 1, count)) > asked["idle"])
    return pd.DataFrame(table[steps], frames[0].index, market.symbols[:count])


# --- what comes out -------------------------------------------------------------------------------------------------
def number(value):
    "Times and durations as whole numbers, the rest as it is"
    if isinstance(value, (pd.Timestamp, pd.Timedelta)): return np.int64(value.value)
    return np.nan if value is None else value


def structured(prefix, rows):
    "The fields of a structured array, codes in words"
    found = {f"{prefix}.{name}": np.ascontiguousarray(rows[name]) for name in rows.dtype.names}
    for name, words in (("reason", Reason), ("kind", Kind)):
        if name not in rows.dtype.names: continue
        table = np.array([word.name.lower() for word in sorted(words)])
        found[f"{prefix}.{name}"] = table[found[f"{prefix}.{name}"]]
    return found


def table(prefix, frame):
    "The columns of a DataFrame, and its index"
    found = {f"{prefix}.{name}": frame[name] for name in frame}
    if not isinstance(frame.index, pd.RangeIndex): found[f"{prefix}.index"] = frame.index
    return {name: column(values) for name, values in found.items()}


def column(values):
    if isinstance(values.dtype, pd.DatetimeTZDtype) or getattr(values.dtype, "kind", "") in "mM":
        return np.array([number(value) if not pd.isna(value) else -1 for value in values], np.int64)
    return values.to_numpy(str) if values.dtype == object else values.to_numpy()


def plain(columns):
    "Arrays that need no pickle: what is no number is text"
    return {name: values.astype(str) if values.dtype == object else values for name, values in columns.items()}


def record(prefix, value):
    "The fields of a dataclass of numbers"
    return {f"{prefix}.{each.name}": np.array([number(getattr(value, each.name))]) for each in fields(value)}


def result(found, whole=True):
    "All that a Result says"
    out = structured("journal", found.rows.ravel()) | structured("fills", found.fill_rows)
    out |= {"equity.value": found.equity.to_numpy(), "equity.index": column(found.equity.index)}
    out |= record("summary", found.summary())
    if not whole: return out
    out |= table("trips", found.round_trips) | table("journal trips", journal_round_trips(found.journal))
    out |= table("drawdowns", drawdowns(found.equity)) | record("equity alone", metrics(found.equity))
    if len(found.fill_rows): out |= table("execution", found.execution)
    if found.observations is not None: out["seen.observations"] = found.observations
    for number, each in enumerate(found.baselines.values()):
        out |= {f"beside {number}.equity": each.equity.to_numpy()} | structured(f"beside {number}.fills",
                each.fill_rows)
    return out


# --- kinds of runs --------------------------------------------------------------------------------------------------
def run_backtest(run, market):
    frames, watch, funding = market.traded(run)
    policy, times = policy_of(run, market), next(iter(frames.values())).index
    found = backtest(policy, frames, times[run["start"]] if "start" in run else None, costs=costs_of(run),
                     limits=limits_of(run), instruments=instruments_of(run), execution=execution_of(run),
                     funding=funding, extra=watch, deposit=run.get("deposit", 10_000.),
                     engine=ENGINES[run.get("form", "array")],
                     keep_observations=not isinstance(policy, pd.DataFrame) and len(frames) < 4,
                     gaps=run.get("gaps", False), **({} if run.get("beside") else {"baselines": ()}))
    out = result(found)
    if run.get("intervals"): out |= table("intervals", intervals(found.equity, draws=100, seed=1).table())
    return out


def _one_of_a_target(orders):
    "Slots as they were when a target was one order: what opens, or else what closes"
    opens = orders[:, OPENING, None]["kind"] != NONE
    return np.hstack([np.where(opens, orders[:, OPENING, None], orders[:, CLOSING, None]), orders[:, OWN:]])


def _each_step(world, start, answers):
    "Account, positions, orders at work and what styles remember after every step; answers, or what writes orders"
    kept, state = {}, world.state
    journal = np.zeros((len(answers), len(world.proposals)), JOURNAL)
    for t, answer in enumerate(answers):
        if t == 0: mark(state.account, state.positions, world.arrays.candles[start, :, 3].copy())
        if callable(answer):
            write = answer
            answer = np.zeros((len(world.proposals), state.orders.shape[1] - OWN), ORDER)
            working_orders(state.orders, answer)
            write(world.arrays.candles[start + t, :, 3].copy(), answer)
        world.step(start + t, np.ascontiguousarray(answer), journal[t])
        for name in ("account", "positions", "execution_state"):
            kept.setdefault(name, []).append(getattr(world.state, name).copy())
        kept.setdefault("orders", []).append(_one_of_a_target(world.state.orders))
    out = structured("journal", journal.ravel()) | structured("fills", world.state.fills[:world.state.count[0]])
    for name, rows in kept.items(): out |= structured(name, np.array(rows).ravel())
    return out


def run_kernel(run, market):
    "The kernel alone, step by step, under random answers"
    frames, _, funding = market.traded(run)
    costs, limits, execution = costs_of(run), limits_of(run), execution_of(run)
    times, values, names = matrix(frames_of(frames, None, funding)[0])
    instruments, orders, random = instruments_of(run), run.get("orders", 0), np.random.default_rng(run["seed"])
    rules = trading_rules(costs, limits, instruments, execution, orders)
    tape = market_arrays(times, np.ascontiguousarray(values), funding_rates(funding, times, list(names)), costs, limits)
    state = new_state(new_account(run.get("deposit", 10_000.)), np.zeros(len(names), POSITION), rules.execution, 20_000)
    count, start, length = len(names), run["start"], len(times) - 1 - run["start"]
    if orders:
        seen = np.abs(random.normal(0, .01, (length, count, 1))).astype(np.float32)
        answers = [partial(_orders, np.array([orders, .5]), np.zeros(0), row) for row in seen]
    else:
        steps = np.arange(length) // run["every"]
        drawn = random.uniform(-1, 1, (steps[-1] + 1, count)) * (random.random((steps[-1] + 1, count)) > .2)
        answers = drawn[steps]
        if run.get("confident"): answers = np.hstack([answers, random.random((length, count))])
    return _each_step(Simulation(tape, state, rules), start, answers)


def run_trader(run, market):
    "A trader whose orders fill at the next open, while the trading state is moved by hand"
    frames, _, _ = market.traded(run)
    times, values, names = matrix(frames_of(frames)[0], KNOWN)
    trader = make_trader(policy_of(run, market), limits_of(run), instruments_of(run), timeframe=run["timeframe"])
    if hasattr(trader, "on"):
        from tradelab.events import Candles
        on_candle = lambda *parts: trader.on(Candles(*parts))
        told = trader.on
    else: on_candle, told = trader.on_candle, trader.on_fill
    first = max(trader.warm_up, run["start"])
    trader.warm(times[:first], values[:first])
    kept = {name: [] for name in ("account", "positions", "rows")}
    decisions, random = [], np.random.default_rng(run["seed"])
    states = [int(TradingState[name]) for name in run["states"]]
    for t in range(first, len(times) - 1):
        require_state(trader.account, states[(t - first) // run["every"] % len(states)])
        marks = values[t, :, 3] * (1 + run["off"] * random.normal(size=len(names))) if run.get("off") else None
        decision = on_candle(int(times[t]), values[t], *(() if marks is None else (marks,)))
        decisions.append(decision)
        for name, quantity, price in zip(names, decision.quantities.tolist(), values[t + 1, :, 0].tolist()):
            if quantity: told(Fill(name, quantity, price, abs(quantity) * price * .0005, int(times[t + 1])))
        for name, rows in kept.items(): rows.append(getattr(trader, name).copy())
    out = {"decisions.observation": np.array([each.observation for each in decisions]),
           "decisions.quantity": np.array([each.quantities for each in decisions])}
    for name, rows in kept.items(): out |= structured({"rows": "journal"}.get(name, name), np.array(rows).ravel())
    return out


@compiled
def _cross_rule(parameters, columns):
    fast, slow, targets = int(parameters[0]), int(parameters[1]), np.empty(len(columns))
    for t in range(len(columns)): targets[t] = 1. if columns[t, fast] > columns[t, slow] else -.5
    return targets


def _numpy_rule(parameters, columns): return np.clip(parameters[0] * (columns[:, 0] / columns[:, 1] - 1.), -1., 1.)


def run_sweep(run, market):
    frames, _, funding = market.traded(run)
    (symbol, frame), = frames.items()
    columns = pd.DataFrame({width: frame["close"].rolling(width).mean() for width in run["widths"]})
    rule = {"cross": _cross_rule, "numpy": _numpy_rule}[run["rule"]]
    known = {"limits": limits_of(run)} if "limits" in run else {}
    warm_up = SimulationSettings(costs_of(run), **known).warm_up
    parameters = pd.DataFrame(run["table"], columns=run["parameters"])
    found = sweep(rule=rule, columns=columns, parameters=parameters, candles=frame,
                  start=frame.index[max(run["start"], warm_up)], costs=costs_of(run),
                  execution=execution_of(run), exact=run.get("exact", False),
                  funding=funding and funding[symbol], progress=False,
                  **known)
    return table("sweep", (found.table if isinstance(found.table, pd.DataFrame) else found.table()).reset_index())


def run_stress(run, market):
    frames, _, funding = market.traded(run)
    found = stress(policy_of(run, market), frames, costs=costs_of(run), funding=funding, limits=limits_of(run))
    out = table("stress", found.table())
    for number, each in enumerate(found.results.values()):
        out |= {f"scene {number} {name}": values for name, values in result(each, False).items()}
    return out


def run_environment(run, market):
    from tradelab.learn.env import DomainRandomisation, MarketEnv, MarketVecEnv, Reward
    frames, watch, funding = market.traded(run)
    observation = Observation(tuple(run["features"]), run["window"], symbols=tuple(frames))
    if "scaler" in run: observation = observation.fit(frames, run["scaler"], gaps=run.get("gaps", False))
    of = prepare(frames, observation, costs=costs_of(run), limits=limits_of(run), instruments=instruments_of(run),
                     execution=execution_of(run), funding=funding, extra=watch, gaps=run.get("gaps", False))
    asked = dict(reward=Reward(**run.get("reward", {})),
                 domain=DomainRandomisation(**{k: tuple(v) for k, v in run.get("domain", {}).items()}))
    random, out = np.random.default_rng(run["seed"]), {}
    if run.get("single"):
        one, steps = MarketEnv(of, run["length"], **asked), []
        seen = [one.reset(seed=run["seed"])[0]]
        for _ in range(run["steps"]):
            *step, info = one.step(random.uniform(-1, 1, len(frames)))
            seen.append(step[0]), steps.append((*map(float, step[1:]),
                                                *(float(row["equity"]) for row in info["journal"])))
            if step[2] or step[3]: seen.append(one.reset()[0])
        return {"environment.seen": np.array(seen), "environment.steps": np.array(steps)}
    many = MarketVecEnv(of, run["n"], run["length"], run["seed"], **asked)
    seen, rewards, ended, last = [many.reset()], [], [], []
    for _ in range(run["steps"]):
        observed, reward, done, infos = many.step(random.uniform(-1, 1, (run["n"], len(frames))))
        seen.append(observed), rewards.append(reward), ended.append(done)
        last += [info["terminal_observation"] for info in infos if info]
    out = {"environment.seen": np.array(seen), "environment.rewards": np.array(rewards),
           "environment.ended": np.array(ended),
           "environment.last": np.array(last)}
    population = many.batch if hasattr(many, "batch") else many.population # its former name
    return out | structured("accounts", population.accounts.ravel()) | structured("positions",
            population.positions.ravel())


def run_indicators(run, market):
    "Features over a history, and candle by candle"
    frames, watch, funding = market.traded(run)
    symbols = tuple(frames)
    observation = Observation(tuple(run["features"]), 1, symbols=symbols, timeframe=run["timeframe"])
    known = matrix(frames_of(frames, watch, funding, run.get("gaps", False))[0], KNOWN)[1][:, :len(observation.rows)]
    seen, which = observation.seen(len(symbols))
    columns = list(feature_columns(seen, known))
    out = {f"history.{text}": columns[which[0, n]] for n, text in enumerate(run["features"])}
    if not run.get("stream"): return out
    stream, rows = observation.stream(), []
    for candle in known[:run["stream"]]:
        stream.push(candle)
        rows.append(stream.window.copy())
    return out | {"stream.window": np.array(rows), "history.matrix": observation.matrix(known)}


def run_scaler(run, market):
    frames, watch, _ = market.traded(run)
    observation = Observation(tuple(run["features"]), 2, symbols=tuple(frames)).fit({**frames, **(watch or {})},
            run["how"], gaps=run.get("gaps", False))
    return {"scaler.centre": np.array(observation.scaler.centre), "scaler.scale": np.array(observation.scaler.scale)}


def run_risk(run, market):
    "Stops alone, tail risk, covariances, sizes, calibration"
    frames, _, _ = market.traded(run)
    times, values, names = matrix(frames_of(frames)[0])
    closes, random = np.ascontiguousarray(values[:, :, 3]), np.random.default_rng(run["seed"])
    entries = np.where(random.random(len(times)) < .2, random.choice([-1., 1.], len(times)), 0.)
    entries[:50] = 0.
    prices, codes, trail = simulate(np.ascontiguousarray(values[:, 0]), entries, limits_of(run).row())
    out = {"stops.price": prices, "stops.code": codes, "stops.trail": trail}
    weights = random.uniform(-1, 1, closes.shape)
    tails = tail_history(closes, weights, run["timeframe"], run["days"])
    returns = np.log(closes[1:] / closes[:-1])
    out |= {"tail.values": tails, "covariance.ewma": covariance_history(closes, .06),
            "covariance.shrunk": ledoit_wolf(returns)[0]}
    index = pd.RangeIndex(len(returns))
    held = pd.Series((weights[:-1] * returns).sum(axis=1), index)
    judged = var_backtest(held, *(pd.Series(tails[:-1, 4, 1, which], index) for which in (0, 1)))
    out |= {"judged.kupiec": np.array(judged.kupiec), "judged.exceptions": np.array([judged.exceptions]),
            "judged.christoffersen": np.array([number for each in judged.christoffersen.values() for number in each]),
            "judged.depth": np.array(judged.depth)}
    mean, variance = returns.mean(axis=0), returns.var(axis=0)
    out["sizes.all"] = np.array([(kelly(m, v, .5, 2.), shrunk_kelly(m, v, len(returns), .5, 2.),
                                  fixed_fraction(1., .01, v ** .5, 2.),
                                  volatility_target(1., .2, v ** .5 * 90., 3.)) for m, v in zip(mean, variance)])
    out["sizes.portfolio"] = kelly_portfolio(mean, np.atleast_2d(ledoit_wolf(returns)[0]))
    quantity, met = random.normal(size=80), closes[100:180, 0]
    price = met * (1 + np.sign(quantity) * (.0002 + .0001 * np.abs(random.normal(size=80))))
    found = calibrate(quantity, met, price, np.arange(80), np.full(80, .01), np.full(80, 1e3))
    return out | {"calibrated.all": np.array(list(asdict(found).values()))} | _portfolio(run, times, closes, names,
            random)


def _portfolio(run, times, closes, names, random):
    "Measures of random positions at each close"
    from tradelab.settings import instrument_rows
    risk, positions, rows = PortfolioRisk(names, instrument_rows(instruments_of(run), Limits())), np.zeros(len(names),
            POSITION), []
    for t in range(200):
        equity = 10_000. * (1 + .01 * random.normal())
        risk.update(int(times[t]), closes[t], equity)
        positions["quantity"], positions["mark_price"] = random.normal(size=len(names)), closes[t]
        found = risk.measures(equity, positions)
        rows.append([getattr(found, each.name) for each in fields(found)
                     if isinstance(getattr(found, each.name), float)])
    return {"portfolio.measures": np.array(rows)}


def run_breakers(run, _):
    "Breakers and the trading state under a random walk of measurements"
    random, kinds = np.random.default_rng(run["seed"]), run["breakers"]
    breakers = Breakers([Breaker(**{name: value for name, value in each.items() if name != "asks"},
                                 requires=TradingState[each.get("asks", "NO_ENTRY")]) for each in kinds])
    machine = StateMachine()
    rate, span, clock = RateWindow(60_000, 5), RangeWindow(120_000), 1_700_000_000_000
    states, causes, rows = [], list(CAUSES), []
    for number in range(run["steps"]):
        clock += int(random.integers(1_000, 40_000))
        for each in kinds:
            value = np.nan if random.random() < .01 else each["threshold"] * random.uniform(.5, 1.6)
            breakers.observe(each["kind"], value, clock, "venue", "ABC"[int(random.integers(3))])
        cause = causes[int(random.integers(len(causes)))]
        if cause != "person" and random.random() < .2: machine.trip(cause, clock, "seen")
        elif random.random() < .4: machine.clear(cause, clock) if (cause, "") in machine.active else machine.step(clock)
        elif (cause, "") in machine.active and not CAUSES[cause].restarts: machine.reset(cause, "somebody", "looked",
                clock)
        if number % 50 == 49: machine = StateMachine.load(json.loads(json.dumps(machine.save())))
        if number % 70 == 69: breakers = Breakers.load(json.loads(json.dumps(breakers.save())))
        states.append((int(machine.state()), *(int(breakers.requires("venue", symbol)) for symbol in "ABC")))
        rows.append((rate.add(clock, random.random() < .3), *span.add(clock, 100. + random.normal())))
    return {"states.all": np.array(states), "windows.all": np.array(rows),
            "moves.text": np.array([str(move) for move in machine.history])}


def run_candles(run, market):
    "Longer candles, holes, what is wrong with candles and how it is put right"
    from tradelab.market.defects import with_defect
    from tradelab.market.quality import check_quality
    from tradelab.market.repair import repair
    out = {}
    for name, frame in market.frames.items():
        for timeframe in run["timeframes"]: out |= table(f"{name} {timeframe}",
                                                         resample(frame, timeframe, partial=True))
        out[f"{name} holes"] = np.array(holes_in(frame.index.as_unit("ms").asi8))
    frame = market.frames[market.symbols[0]]
    for defect in run["defects"]:
        spoiled = with_defect(frame[["open", "high", "low", "close", "volume"]], defect, seed=run["seed"])
        spoiled = spoiled[0] if isinstance(spoiled, tuple) else spoiled
        report = check_quality(spoiled, run["timeframe"])
        found = pd.DataFrame([asdict(each) for each in report.findings]).drop(columns=["evidence", "action"],
                errors="ignore")
        out |= table(f"{defect} findings", found) | table(f"{defect} repaired",
                                                          repair(spoiled, report.findings, run["timeframe"])[0])
    return out


def run_synthetic(run, _):
    "Candles that we make ourselves"
    import tradelab.market.synthetic as synthetic
    made, out = getattr(synthetic, run["maker"])(run["length"], seed=run["seed"], **run.get("settings", {})), {}
    for number, each in enumerate(made if isinstance(made, tuple) else (made,)):
        if isinstance(each, dict): each = pd.concat(each, axis=1)
        if isinstance(each, pd.Series): each = each.to_frame("value")
        out |= table(f"made {number}", each) if isinstance(each, pd.DataFrame) else {f"made {number}": np.asarray(each)}
    return out


def run_session(run, market):
    "A live session on localnet, stopped and resumed, and its replay"
    from pydantic import SecretStr

    from tradelab.config import VenueSettings
    from tradelab.live.ledger import Ledger
    from tradelab.live.recorder import read, unpacked
    from tradelab.live.replay import replay
    from tradelab.live.session import Session
    from tradelab.localnet.server import Localnet
    from tradelab.runs.run import Run
    from tradelab.venues.binance import BinanceVenue
    frames, watch, funding = market.traded(run)
    instruments, start = instruments_of(run), next(iter(frames.values())).index[run["start"]].value // 10**6
    made = Run("compare", policy_of(run, market), limits_of(run), timeframe=run["timeframe"])
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(f"sqlite:///{folder}/tradelab.db")
        async def session(url, count, first):
            venue = VenueSettings("localnet", "a comparison", url, url.replace("http", "ws"), SecretStr("key"),
                          SecretStr("secret"))
            which = {"id": "compare"} if first else {"resume": "compare"}
            trader = made.trader(instruments=instruments)
            return await Session(trader, BinanceVenue(venue), ledger, Path(folder), timeframe=run["timeframe"],
                                 origin="compare", say=lambda _: None, **which).run(count)
        with Localnet({**frames, **(watch or {})}, funding or {}, instruments, costs_of(run), start=start,
                      api_key="key", api_secret="secret") as exchange:
            for number, count in enumerate(run["parts"]): asyncio.run(session(exchange.url, count, number == 0))
        lines = list(read(Path(folder) / "compare/recording.zst"))
        recorded, again = replay(lines, made.trader(instruments=instruments))
        booked = [asdict(entry) for _, entry in ledger.booked("compare")]
        out = table("journal", ledger.journal("compare")) | table("recorded", recorded) | table("replayed", again)
        out["decisions.observation"] = np.array([unpacked(line["observation"]) for line in lines
                                                 if line["kind"] == "decision"])
        out |= table("booked", pd.DataFrame(booked))
        ledger.close()
    return out


KINDS = {name.removeprefix("run_"): function for name, function in list(globals().items()) if name.startswith("run_")}


def main(scenarios, markets, out):
    read, done = {}, {"package": str(Path(tradelab.__file__).parent), "seconds": {}, "failed": {}, "unknown": []}
    for number, run in enumerate(json.loads(Path(scenarios).read_text())):
        kind, name = run["kind"], run.get("market", "")
        if kind not in KINDS:
            done["unknown"].append(run["name"])
            continue
        begin = time.process_time()
        if name and name not in read: read[name] = Market(Path(markets) / f"{name}.npz")
        try: np.savez(Path(out) / f"{number}.npz", **plain(KINDS[kind](run, read.get(name))))
        except Exception: done["failed"][run["name"]] = traceback.format_exc(limit=-3)
        done["seconds"][kind] = done["seconds"].get(kind, 0.) + time.process_time() - begin
    (Path(out) / "done.json").write_text(json.dumps(done))


if __name__ == "__main__": main(*sys.argv[1:])
