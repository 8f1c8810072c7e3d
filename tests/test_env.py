"The environment cannot be hacked: whatever an agent does, its reward is what an independent ledger says"
from dataclasses import replace

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.compiled import compiled
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.journal import JOURNAL
from tradelab.learn.env import RUIN, BatchedEnv, DomainRandomisation, MarketEnv, MarketVecEnv, Reward
from tradelab.market.synthetic import ar1, correlated, funding
from tradelab.policies import Policy
from tradelab.settings import NO_STOPS, CostModel, Execution, Limits, Stops
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import prepare

LIMITS = Limits(max_position=.5, max_daily_loss=None, max_drawdown=.95, max_participation=None, price_band=None,
                stops=NO_STOPS)


def episode(market, act, reward=Reward(), domain=DomainRandomisation(), length=None, seed=0):
    "Rewards, journal rows and observations of one policy that may look at everything"
    environment = MarketEnv(market, length, reward, domain)
    seen, _ = environment.reset(seed=seed)
    rewards = []
    rows = []
    done = False
    while not done:
        seen, paid, terminated, truncated, info = environment.step(np.atleast_1d(act(seen, environment)))
        rewards.append(paid)
        rows.append(info["journal"])
        done = terminated or truncated
    return np.array(rewards), np.array(rows, JOURNAL), environment, terminated


def ledger(rows, market, first, deposit=10_000.):
    "Log equity growth from the cash flows of the journal alone"
    last = market.arrays.candles[first + len(rows), :, 3]
    held = rows["position"][-1] + rows["fill_quantity"][-1]
    cash = deposit + rows["cash"].sum() - rows["fee"].sum() + rows["funding"].sum()
    return np.log((cash + (held * last).sum()) / deposit)


def oracle(seen, environment):
    "Knows the next candle"
    batch = environment.batch
    candles = environment.batch.market.arrays.candles
    return np.sign(candles[batch.at[0] + 1, :, 3] - candles[batch.at[0] + 1, :, 0])


def loser(seen, environment):
    "Adds to what loses, never to what wins"
    position = environment.batch.positions[0]
    return np.where(position["quantity"] * (position["mark_price"] - position["entry_price"]) <= 0, 1., .3)


HACKS = {"constant": lambda seen, environment: 1., "short": lambda seen, environment: -1., "churning": lambda seen,
         environment: (-1.) ** environment.batch.at[0], "holding the loser": loser, "oracle": oracle,
         "tiny": lambda seen, environment: 1e-9, "boundary": lambda seen, environment: 1.
         if environment.batch.at[0] % 8 == 7 else 0.}


@pytest.mark.parametrize("name", HACKS)
@pytest.mark.parametrize("costs", [CostModel(), CostModel.realistic(impact=3.), CostModel(latency=1)],
                         ids=["usual", "realistic", "late"])
def test_a_hack_scores_what_the_ledger_says(name, costs):
    candles = ar1(900, rho=0, volatility=.005, seed=7)
    market = prepare(candles, Observation(["return(1)"]), limits=LIMITS, costs=costs, funding=funding(candles, seed=7))
    rewards, rows, environment, _ = episode(market, HACKS[name])
    assert np.isclose(rewards.sum(), ledger(rows, market, market.first_row), rtol=1e-9, atol=1e-12)
    # knowing the future pays, so there is nothing wrong with paying
    if name == "oracle" and costs == CostModel(): assert rewards.sum() > .3
    if name == "churning": assert rewards.sum() < 0 and rows["fee"].sum() > 100
    if name == "tiny": assert rewards.sum() == 0 and not rows["order"].any()


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 3),
       st.sampled_from([Execution(), Execution("post_only"), Execution("slices"), Execution(protect=True)]))
def test_random_actions_score_what_the_ledger_says(seed, symbols, execution):
    names = ["BTC/USDT:USDT", "ETH/USDT:USDT", "SOL/USDT:USDT"][:symbols]
    candles = {name: ar1(400, rho=0, volatility=.01, seed=seed + n) for n, name in enumerate(names)}
    market = prepare(candles, Observation(["return(1)"]), limits=Limits(max_position=.3, max_daily_loss=None,
        max_drawdown=.9, stops=Stops(stop_loss=.01, take_profit=.02)), execution=execution, costs=CostModel.realistic())
    random = np.random.default_rng(seed)
    rewards, rows, _, _ = episode(market, lambda seen, environment: random.uniform(-1, 1, symbols))
    assert np.isclose(rewards.sum(), ledger(rows, market, market.first_row), rtol=1e-9, atol=1e-12)


@compiled
def wave(parameters, memory, observation, prices, targets):
    for n in range(len(targets)): targets[n] = np.sin(300. * observation[n, 0])


@pytest.mark.parametrize("execution", [Execution(), Execution("post_only", patience=2), Execution("slices"),
                                       Execution(protect=True)],
                                       ids=lambda each: each.style + " protected" * each.protect)
def test_environment_is_the_backtest_in_every_style(execution):
    candles = correlated(700, correlation=.5, seed=3)
    policy = Policy("wave", wave, (), ("return(1)",))
    costs = CostModel.realistic()
    limits = Limits(max_position=.4, max_daily_loss=None, max_drawdown=.9, stops=Stops(stop_loss=.01))
    result = backtest(policy, candles, costs=costs, limits=limits, execution=execution, keep_observations=True)
    market = prepare(candles, Observation.from_policy(policy), costs=costs, limits=limits, execution=execution)
    rewards, rows, _, _ = episode(market, lambda seen, environment: policy.act(seen.reshape(len(candles), -1)))
    assert np.array_equal(rows, result.rows)
    assert len(result.fills) > 50
    assert np.isclose(rewards.sum(), np.log(result.equity.iloc[-1] / 10_000), rtol=1e-9)


def test_the_checker_and_the_seed():
    candles = ar1(600, seed=1)
    market = prepare(candles, Observation(["return(1)"]))
    with pytest.warns(UserWarning): check_env(MarketEnv(market, 50), skip_render_check=True)
    def first(seed):
        environment = MarketEnv(market, 50)
        seen, _ = environment.reset(seed=seed)
        return environment.batch.at[0], seen.tolist()
    assert first(3) == first(3)
    assert len({first(seed)[0] for seed in range(20)}) > 10
    one, two = (MarketVecEnv(market, 8, 40, seed=5) for _ in range(2))
    one.reset(), two.reset()
    random = np.random.default_rng(0)
    for _ in range(100):                                                       # over the ends of episodes, too
        actions = random.uniform(-1, 1, (8, 1))
        a, b = one.step(actions), two.step(actions)
        assert np.array_equal(a[0], b[0])
        assert np.array_equal(a[1], b[1])


def test_the_end_of_the_data_is_truncated_and_only_ruin_is_terminated():
    candles = ar1(300, seed=1)
    *_, terminated = episode(prepare(candles, Observation(["return(1)"])), lambda seen, environment: 0., length=50)
    assert not terminated
    falling = candles.copy()
    falling.iloc[100:, :4] *= .05
    limits = Limits(max_position=2., max_leverage=2., leverage=20, min_margin_ratio=0., max_drawdown=1.,
                    max_daily_loss=None, max_participation=None, price_band=None, stops=NO_STOPS)
    market = prepare(falling, Observation(["return(1)"]), limits=limits,
                     instruments=[replace(BITCOIN, max_quantity=1e9)])
    rewards, rows, environment, terminated = episode(market, lambda seen, environment: 1.)
    assert terminated
    assert environment.batch.accounts[0, 0]["equity"] < RUIN * 10_000
    assert rewards[-1] < -3


def test_actions_that_are_none_are_refused_and_change_nothing():
    market = prepare(ar1(300, seed=1), Observation(["return(1)"]))
    environment = MarketEnv(market)
    environment.reset(seed=0)
    before = environment.batch.accounts.copy(), int(environment.batch.at[0])
    for action in (1.5, np.nan, -np.inf):
        with pytest.raises(ValueError, match=r"environment 0 was given the action .* at the candle of "
                           r"\d{4}-\d\d-\d\d.*: an action is a number in \[-1, 1\] per symbol"):
            environment.step(np.array([action]))
    assert np.array_equal(environment.batch.accounts, before[0])
    assert environment.batch.at[0] == before[1]


def test_an_episode_has_its_own_costs():
    candles = ar1(900, rho=0, volatility=.005, seed=7)
    market = prepare(candles, Observation(["return(1)"]), limits=LIMITS)
    batch = BatchedEnv(market, 64, 100, domain=DomainRandomisation(fees=(.5, 2.), spread=(.5, 4.)))
    batch.reset(range(64), np.random.default_rng(0))
    assert len(set(batch.simulations["costs"]["taker_fee"])) == 64
    assert batch.simulations["costs"]["spread_scale"].max() > 2
    assert (batch.simulations["costs"]["taker_fee"] / batch.simulations["costs"]["maker_fee"]).std() < 1e-12
    dear, cheap = (episode(market, HACKS["churning"], domain=DomainRandomisation(fees=(factor, factor)),
                           length=200)[1]["fee"].sum() for factor in (2., 1.))
    assert 1.5 < dear / cheap <= 2.001


def test_rewards_of_other_kinds_lead_to_the_same_account():
    candles = ar1(500, seed=2)
    market = prepare(candles, Observation(["return(1)"]), limits=LIMITS)
    plain, sharpe, careful = (episode(market, HACKS["churning"], reward)
                              for reward in (Reward(), Reward(differential_sharpe=.01), Reward(drawdown=1.)))
    assert np.array_equal(plain[1], sharpe[1])
    assert np.array_equal(plain[1], careful[1])
    drawdowns = np.append(plain[1]["drawdown"][:, 0], plain[2].batch.accounts[0, 0]["drawdown"])
    assert np.allclose(plain[0] - careful[0], np.maximum(np.diff(drawdowns), 0))
    assert np.isfinite(sharpe[0]).all()
    assert not np.allclose(sharpe[0], plain[0])
