"""Markets with a computable optimum: the share of the best expected reward that is reached, out of sample. `python
benchmarks/known_answers.py [samples]`

Synthetic markets, each trained on 30,000 candles and judged on 200,000 fresh ones, median of five seeds. What is held
and what trading cost come from the backtest; what holding is worth is the true expectation of the next return, which
these markets know, so that luck is no part of the figure. Limits are wide and there are no stops, unless it says so.
Quadratic costs are no costs of ours: on the market of Garleanu and Pedersen the same policy decides, and its reward is
what is held times the expectation, less half of RISK times its square, less half of COST times the square of the trade.

Stops of two percent are no friend of a market that reverts by five: the position is closed before it earns, and not
opened again before the policy has changed its mind. The last table says how much that is.
"""
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import process_time

import numpy as np

from tradelab.compiled import compiled
from tradelab.features.observation import Observation
from tradelab.instruments import Instrument
from tradelab.learn.plug_in import aim_portfolio, fit_forecast, fit_plug_in
from tradelab.market.synthetic import ar1, garleanu_pedersen, mean_reverting
from tradelab.runs.forecast import plug_in, plug_in_numbers
from tradelab.settings import NO_STOPS, CostModel, Limits
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import prepare
from tradelab.sources.exogenous import market_series

HOUR = 3_600_000
SEEDS = range(5)
TRAINED, JUDGED, PATHS = 30_000, 10_000, 20 # candles to learn from; candles of each of the paths to be judged on
DEPOSIT = 1e6 # quote: one step of quantity is little, and what it grows to meets no bracket of the exchange
WIDE = Limits(max_participation=None, price_band=None, max_daily_loss=None, max_drawdown=1., max_orders=None,
              min_margin_ratio=0., stops=NO_STOPS)
RISK, COST = .25, 4. # of the quadratic reward, in standard deviations of a return


@dataclass(frozen=True)
class Market:
    "Candles with a known truth"
    draw:Callable        # (candles, seed) -> frame, series by name, expectation of the next return at each close
    features:tuple[str, ...]
    costs:CostModel
    best:Callable        # (expectations, cost) -> what the best controller holds, one number per candle


@compiled
def switched(expected, threshold):
    "Held by who turns long above the threshold and short below its negative"
    held, now = np.zeros(len(expected)), 0.
    for t in range(len(expected)):
        if expected[t] > threshold: now = 1.
        elif expected[t] < -threshold: now = -1.
        held[t] = now
    return held


def sign(expected, cost): return np.sign(expected)


def threshold_of(persistence, spread, cost, nodes=401):
    """Relative value iteration over (forecast, position in -1, 0, 1), written for this file alone: the forecast from
    which on it is best to turn from short to long"""
    grid = np.linspace(-5, 5, nodes) * spread
    points, weights = np.polynomial.hermite_e.hermegauss(15)
    after = persistence * grid[:, None] + spread * np.sqrt(1 - persistence ** 2) * points
    weights, positions, value = weights / weights.sum(), np.array([-1., 0., 1.]), np.zeros((nodes, 3))
    paid = cost * np.abs(positions[:, None] - positions)
    for _ in range(20_000):
        ahead = np.column_stack([np.interp(after, grid, value[:, k]) @ weights for k in range(3)])
        options = (grid[:, None] * positions + ahead)[:, None, :] - paid
        new = options.max(axis=2)
        new -= new[nodes // 2, 1]
        if np.abs(new - value).max() < 1e-7 * cost: break
        value = new
    gain = options[:, 0, 2] - options[:, 0, 0]
    return float(np.interp(0., gain, grid))


def reverting(speed=.02, volatility=.01):
    "An Ornstein-Uhlenbeck process at the costs of the settings"
    def draw(count, seed):
        candles = mean_reverting(count, speed, volatility, seed)
        level = np.log(candles.close / 20_000).rename("level")
        expected = np.expm1(-speed * level.to_numpy() + volatility ** 2 / 2)
        return candles, {"level": market_series(level, HOUR)}, expected
    spread = speed * volatility / np.sqrt(1 - (1 - speed) ** 2)
    return Market(draw, ("series(level)",), CostModel(),
                  lambda expected, cost: switched(expected, threshold_of(1 - speed, spread, cost)))


def autoregression(rho, volatility=.001):
    "Returns that follow the last one, without costs"
    def draw(count, seed):
        candles = ar1(count, rho, volatility, seed)
        last = np.log(candles.close).diff().fillna(0.).to_numpy()
        return candles, {}, np.expm1(rho * last + volatility ** 2 * (1 - rho ** 2) / 2)
    return Market(draw, ("return(1)",), CostModel.ideal(), sign)


def noise(costs):
    def draw(count, seed): return ar1(count, 0., .001, seed), {}, np.zeros(count)
    return Market(draw, ("return(1)",), costs, sign)


def predicted(strength=.1, decay=.05, volatility=.001):
    "A decaying signal"
    def draw(count, seed):
        candles, signal = garleanu_pedersen(count, strength, decay, volatility, seed)
        return candles, {"signal": market_series(signal, HOUR)}, strength * volatility * signal.to_numpy()
    return Market(draw, ("series(signal)",), CostModel.ideal(), sign)


MARKETS = {"mean reverting, proportional cost": reverting(), "AR(1) 0.3": autoregression(.3),
           "AR(1) 0.1": autoregression(.1), "AR(1) 0.05": autoregression(.05)}


def prepared(market, count, seed, limits=WIDE):
    "A market to learn from, as `train` makes it"
    candles, series, expected = market.draw(count, seed)
    frames = {"BTC/USDT:USDT": candles}
    from tradelab.sources.exogenous import with_series
    known = {**frames, **(with_series(None, series, candles) or {})}
    observation = Observation(market.features).for_symbols(tuple(frames), "1h").fit(known)
    return prepare(frames, observation, costs=market.costs, limits=limits, series=series, deposit=DEPOSIT,
                   instruments=Instrument("BTC/USDT:USDT", .1, .001)), expected


def earned(policy, market, seed, limits=WIDE):
    "Expected reward a candle, that of the best, and the mean size of what is held"
    candles, series, expected = market.draw(JUDGED, seed)
    result = backtest(policy, {"BTC/USDT:USDT": candles}, series=series, costs=market.costs, limits=limits,
                      deposit=DEPOSIT, baselines=(), keep_observations=True,
                      instruments=Instrument("BTC/USDT:USDT", .1, .001))
    held = result.observations[1:, 0, -4].astype(float)
    expected = expected[-len(held) - 2:-2]
    cost = market.costs.taker_fee + market.costs.slippage
    traded = result.fills["quantity"].abs() * result.fills["price"]
    equity = result.equity.reindex(traded.index, method="nearest")
    paid = cost * float((traded / equity.to_numpy()).sum()) / limits.max_position if len(traded) else 0.
    best = market.best(expected, cost)
    ideal = (best * expected).sum() - cost * np.abs(np.diff(best, prepend=0.)).sum()
    return (held * expected).sum() - paid, ideal, np.abs(held).mean()


def share_reached(market, model, seed, trained=TRAINED, limits=WIDE):
    "The share of the best expected reward; the mean size of what is held"
    policy = fit_plug_in(prepared(market, trained, 100 + seed, limits)[0], model, seed=seed)
    made, ideal, size = zip(*(earned(policy, market, 10_000 + 100 * seed + k, limits) for k in range(PATHS)))
    return sum(made) / sum(ideal) if sum(ideal) else np.nan, float(np.mean(size))


@compiled
def lived(parameters, observation, signal, expected, risk, cost):
    "The quadratic reward of a plug-in policy a candle, and of the path that it holds"
    held, total, targets = 0., 0., np.zeros(1)
    memory, prices = np.zeros(0), np.zeros(1)
    for t in range(len(signal)):
        observation[0, 0] = signal[t]
        observation[0, 1] = held
        plug_in(parameters, memory, observation, prices, targets)
        total += targets[0] * expected[t] - .5 * risk * targets[0] ** 2 - .5 * cost * (targets[0] - held) ** 2
        held = targets[0]
    return total / len(signal)


def quadratic_share(market, model, seed, strength=.1, decay=.05, volatility=.001, trained=TRAINED):
    "The share of the best quadratic reward that the fitted forecast with its aim reaches"
    train, _ = prepared(market, trained, 100 + seed)
    fitted = fit_forecast(train, model, seed)
    risk, cost = RISK * volatility * strength, COST * volatility * strength
    ours = plug_in_numbers(fitted.forecast, aim_portfolio(fitted.persistence, risk, cost))
    scale, centre = train.observation.scaler.scale[0], train.observation.scaler.centre[0]
    a = (np.sqrt(risk ** 2 + 4 * risk * cost) - risk) / 2                # the paper's, with Lambda = lambda Sigma
    best_rate, best_aim = a / cost, 1 / (risk + decay * a)
    totals = np.zeros(2)
    for k in range(PATHS):
        _, signal = garleanu_pedersen(JUDGED, strength, decay, volatility, 10_000 + 100 * seed + k)
        expected = strength * volatility * signal.to_numpy()
        seen = ((signal.to_numpy() - centre) / scale).astype(np.float32)
        totals[0] += lived(ours, np.zeros((1, 5), np.float32), seen, expected, risk, cost)
        held = np.zeros(len(expected))
        for t in range(len(expected)):
            before = held[t - 1] if t else 0.
            held[t] = min(max(before + best_rate * (best_aim * expected[t] - before), -1.), 1.)
        totals[1] += (held * expected - .5 * risk * held ** 2 - .5 * cost * np.diff(held, prepend=0.) ** 2).mean()
    return totals[0] / totals[1]


def row(name, found, seconds):
    spread = " ".join(f"{value:.3f}" for value in sorted(found))
    print(f"{name:<48} {np.median(found):>8.3f}   {spread}   {seconds:5.1f} s", flush=True)


def main(trained=TRAINED):
    print(f"Share of the best expected reward, out of sample, fitted on {trained:,} synthetic candles (median; five "
          "seeds; CPU of one)")
    for model in ("linear", "boosted"):
        for name, market in MARKETS.items():
            begin = process_time()
            found = [share_reached(market, model, seed, trained)[0] for seed in SEEDS]
            row(f"{model}: {name}", found, (process_time() - begin) / len(SEEDS))
        begin = process_time()
        found = [quadratic_share(predicted(), model, seed, trained=trained) for seed in SEEDS]
        row(f"{model}: Garleanu-Pedersen, quadratic cost", found, (process_time() - begin) / len(SEEDS))
    print("\nMean size of what is held on pure noise, of what is allowed")
    for model in ("linear", "boosted"):
        for name, costs in (("no cost", CostModel.ideal()), ("cost", CostModel())):
            begin = process_time()
            row(f"{model}: noise, {name}", [share_reached(noise(costs), model, seed, trained)[1] for seed in SEEDS],
                (process_time() - begin) / len(SEEDS))
    for told, limits in (("limits of the settings, without their stops", Limits(stops=NO_STOPS)),
                         ("limits and stops of the settings", Limits())):
        print(f"\nUnder the {told}; what they forbid counts as missed")
        for name, market in MARKETS.items():
            begin = process_time()
            found = [share_reached(market, "linear", seed, trained, limits)[0] for seed in SEEDS]
            row(f"linear: {name}", found, (process_time() - begin) / len(SEEDS))


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else TRAINED)
