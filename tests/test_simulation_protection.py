"""Stops that stand at the exchange, in the simulation of `test_simulation_live`: whatever breaks, and wherever the
process dies, a position has its stop or the ladder says why; one is replaced without a moment between"""
import asyncio
import json
import os
from collections import defaultdict
from functools import partial
from unittest.mock import patch

import pytest
from simulated import PROCESS, SYMBOLS, simulate, trader, trader_of_orders
from test_emergency import wrong_in_emergency
from test_simulation_live import SHAPES, plan, wrong_in

from tradelab.database.records import EmergencyStep
from tradelab.live import session as sessions
from tradelab.live.order_states import STOPS
from tradelab.live.protection import unprotected
from tradelab.localnet.faults import SCENARIOS
from tradelab.settings import Execution, Limits, Stops

SEEDS = int(os.environ.get("TRADELAB_SIMULATED_SEEDS", 500)) // 2
LIMITS = Limits(stops=Stops(.004, .008, .006), max_drawdown=.9, max_daily_loss=None)


def protecting(): return trader(LIMITS, Execution(protect=True))


def of_stops(name):
    "The faults of a scenario about orders, for conditional orders"
    told = json.dumps(SCENARIOS[name].faults).replace("ORDER_TRADE_UPDATE", "ALGO_UPDATE")
    return json.loads(told.replace("v1/order", "v1/algoOrder").replace("v1/openOrder", "v1/openAlgoOrder"))


async def script(world, faults, shape):
    "As `test_simulation_live.script`; what is done to orders is done to stops, too"
    before, length, _ = shape
    for share, name in faults:
        await asyncio.sleep((before + share * length) * world.step / 1000 - world.loop.time())
        world.faults.arm(name)
        if "v1/order" in json.dumps(SCENARIOS[name].faults): world.faults.arm(of_stops(name))
    await asyncio.sleep((before + length) * world.step / 1000 - world.loop.time())
    world.faults.disarm()
    world.slow, world.kills = 0., set()


class Heard:
    "What the exchange says of stops, in its order, and the moments at which a position had none"

    def __init__(self, world):
        self.held, self.standing, self.naked = defaultdict(float), defaultdict(dict), []
        self.tell, world.exchange.emit = world.exchange.emit, self.hear

    def hear(self, account, event):
        self.tell(account, event)
        if event["e"] == "ACCOUNT_UPDATE":
            for row in event["a"]["P"]: self.held[row["s"]] = float(row["pa"])
        if event["e"] != "ALGO_UPDATE": return
        order = event["o"]
        slot = order["caid"].split("-")[-2]
        there = self.standing[order["s"], slot]
        if order["X"] == "NEW": there[order["caid"]] = order
        else: there.pop(order["caid"], None)
        closes = self.held[order["s"]] * (1 if order["S"] == "SELL" else -1) > 0
        if order["X"] == "CANCELED" and closes and not there: self.naked.append(order)


def unguarded_in(run, core):
    "Positions without their stop of which the ladder says nothing, and stops without a position; in sentences"
    world = run.world
    there = [each for each in world.exchange.conditional.of(world.account()).open.values()
             if int(each.client_id.split("-")[-2]) in STOPS]
    found = [f"{each.symbol}: {each.client_id} protects nothing" for each in there
             if world.positions()[SYMBOLS[each.n]] * each.sign >= 0.]
    for n, symbol in enumerate(SYMBOLS):
        stops = sum(each.quantity for each in there if each.n == n and each.kind.startswith("STOP"))
        if abs(world.positions()[symbol]) > stops + 1e-9 and ("no_stop", symbol) not in core.ladder.active:
            found.append(f"{symbol}: {world.positions()[symbol]} held, {stops} protected")
    if not unprotected(core) and any("held" in each for each in found): found.append("and nobody noticed")
    return found


def protected_run(seed, **changes):
    timeframe, faults, kills, slow = plan(seed)
    shape, heard = SHAPES[timeframe], []

    async def listening(world):
        heard.append(Heard(world))
        await script(world, faults, shape)

    cores, make = [], sessions.make_core
    with patch.object(sessions, "make_core", lambda *given: cores.append(make(*given)) or cores[-1]):
        run = simulate(seed, make_trader=protecting, timeframe=timeframe, candles=sum(shape), market_seed=seed % 5,
                       kills=kills, slow=slow, script=listening, **changes)
    wrong = [*wrong_in(run), *unguarded_in(run, cores[-1]), *(f"naked: {each['caid']}" for each in heard[0].naked)]
    return [f"seed {seed} ({timeframe}, {faults}, kills {kills}, slow {slow}): {each}" for each in wrong]


CHUNK = 25


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_a_position_has_its_stop_or_the_ladder_says_why(first):
    wrong = [line for seed in range(first, first + CHUNK) for line in protected_run(seed)]
    assert not wrong, "\n".join(wrong)


HALTING = Limits(stops=LIMITS.stops, max_drawdown=.0006, max_daily_loss=None)


def closed_run(seed):
    "What was wrong in a run whose drawdown limit is reached while its stops stand, and whether it was"
    timeframe, faults, kills, slow = plan(seed)
    shape = SHAPES[timeframe]
    run = simulate(seed, make_trader=lambda: trader(HALTING, Execution(protect=True)), timeframe=timeframe,
                   candles=sum(shape) + 2, market_seed=seed % 5, kills=kills, slow=slow,
                   script=lambda world: script(world, faults, shape))
    halted = any(each.step == "halted" for name in run.names for each in run.ledger.measured(name, EmergencyStep))
    wrong = wrong_in_emergency(run) if halted else wrong_in(run)
    if halted:
        wrong += [f"{each.client_id} stands, and nothing is held"
                  for each in run.world.exchange.conditional.of(run.world.account()).open.values()]
    return halted, [f"seed {seed} ({timeframe}, {faults}, kills {kills}, slow {slow}): {each}" for each in wrong]


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_an_emergency_closes_what_stops_protect_and_takes_them_back(first):
    runs = [closed_run(seed) for seed in range(first, first + CHUNK)]
    assert sum(halted for halted, _ in runs) > CHUNK / 2
    wrong = [line for _, lines in runs for line in lines]
    assert not wrong, "\n".join(wrong)


OUTAGE = 12 # candles, fewer than those after which all is closed


async def nothing_arrives(world):
    "Neither requests nor frames, for some candles; then all of them, in their order"
    step, latency = world.step / 1_000, world.latency
    await asyncio.sleep(4.3 * step)
    until = world.loop.time() + OUTAGE * step
    world.latency = lambda: latency() + max(until - world.loop.time(), 0.)
    await asyncio.sleep(OUTAGE * step)
    world.latency, world.ended = latency, world.loop.now()


@pytest.mark.parametrize("make_trader, profile", [(lambda seed: protecting(), "backtest"), (trader_of_orders, "book")],
                         ids=["stops", "orders"])
def test_behind_an_outage_no_step_waits_for_a_fill_of_a_later_candle(make_trader, profile):
    """Stops and orders that rest are filled meanwhile, in candles that are still to be decided on: each of these steps
    waited for that with all its patience, minutes together"""
    ahead = 0
    for seed in range(10):
        done = {} # time of each step
        with patch.object(sessions, "show_step", lambda session, step, done=done: done.setdefault(
                step.open_time, PROCESS.get().world.loop.now())):
            run = simulate(seed, make_trader=partial(make_trader, seed), profile=profile, timeframe="1m", candles=22,
                           market_seed=seed % 5, script=nothing_arrives)
        ended, step = run.world.ended, run.world.step
        missed = {open_time: at for open_time, at in done.items() if at >= ended >= open_time + step}
        assert len(missed) >= OUTAGE - 1
        assert max(missed.values()) < ended + 2_000, f"seed {seed}"
        assert "unsettled" not in run.notices
        assert wrong_in(run) == []
        ahead += sum(min(missed) + step <= entry.fill_time < ended for _, entry in run.ledger.booked(run.names[0]))
    assert ahead
