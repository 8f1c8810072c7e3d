"Holes in the candles: refused by name, or carried through by the clock; both forms, the environment and a replay alike"
import ast
import asyncio
import inspect
import json
from dataclasses import replace

import matplotlib.pyplot as pyplot
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from test_recording import ByHand

from tradelab.compiled import compiled
from tradelab.config import VenueSettings, one_section
from tradelab.errors import CandleError, FeedError
from tradelab.evaluation.difference import first_difference
from tradelab.events import KNOWN
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.live.core import Terms
from tradelab.live.ledger import Ledger
from tradelab.live.recorder import read, unpacked
from tradelab.live.replay import replay
from tradelab.live.session import Session
from tradelab.localnet.server import Localnet
from tradelab.localnet.sources import Replay
from tradelab.market.candles import frame, matrix, times
from tradelab.market.synthetic import ar1, correlated, funding
from tradelab.orders import LIMIT
from tradelab.policies import Policy
from tradelab.risk.market_state import market_history
from tradelab.runs.run import Run
from tradelab.settings import NO_STOPS, CostModel, Limits, Reason, Stops
from tradelab.sim.backtest import backtest
from tradelab.sim.costs import conditions, window_means
from tradelab.sim.prepared import funding_rates, prepare
from tradelab.sim.stress import stress
from tradelab.sim.sweep import sweep
from tradelab.times import TIMEFRAMES, format_time, milliseconds, next_opening, to_ms
from tradelab.venues.binance import BinanceVenue

HOUR, BTC = 3_600_000, "BTC/USDT:USDT"
OPEN_END = Limits(max_position=1., max_leverage=1., min_trade=0., max_drawdown=1., max_daily_loss=None,
                  max_participation=None, price_band=None, min_margin_ratio=0., leverage=1, stops=NO_STOPS)


@compiled
def waver(parameters, memory, observation, prices, targets):
    for n in range(len(targets)): targets[n] = np.sin(parameters[0] * observation[n, 0])


@compiled
def bids(parameters, memory, observation, prices, answer):
    "A limit order below, and one above that only reduces, wherever a number of the observation is odd"
    low = answer[0, 0]
    high = answer[0, 1]
    if observation[0, 0] * 1e4 % 2. < 1.:
        low["kind"] = LIMIT
        low["exposure"] = .5
        low["price"] = .995 * prices[0]
        low["expires_in"] = 5.
    high["kind"] = LIMIT
    high["exposure"] = -1.
    high["price"] = 1.01 * prices[0]
    high["reduce_only"] = 1


def holed(candles, seed, count=4, most=9, begin=20):
    "The candles without some stretches, never the first or the last"
    random = np.random.default_rng(seed)
    kept = np.ones(len(candles), bool)
    for at in random.integers(begin, len(candles) - most - 2, count): kept[at:at + random.integers(1, most)] = False
    return candles[kept]


def wavering(features=("return(1)",), window=1, seed=0): return Policy("waver", waver, [300. + seed], features, window)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(("1h", "15m", "4h", "1d")))
def test_funding_is_paid_at_its_own_time_by_who_held_then(seed, timeframe):
    "Against a walk through the payments: the position of that moment, the last close before it, the rate"
    whole = ar1(120, volatility=.01, seed=seed, timeframe=timeframe)
    candles = holed(whole, seed)
    rates = funding(whole, seed=seed)
    held = pd.Series(np.random.default_rng(seed).choice([-1., 0., 1.], len(candles)), candles.index)
    result = backtest(held, candles, start=candles.index[0], costs=CostModel(taker_fee=0., maker_fee=0., slippage=0.),
                      limits=OPEN_END,
                      instruments=(replace(BITCOIN, price_tick=.01, min_notional=0., max_quantity=1e9),), funding=rates,
                      gaps=True, baselines=())
    opens, step = times(candles), int(np.diff(times(whole))[0])
    expected = {}
    for due, rate in zip(times(rates), rates):
        rows = np.flatnonzero(opens < due)                               # candles that were open before
        if not len(rows) or due > opens[-1] + step or rows[-1] == len(opens) - 1: continue
        position = result.fills["quantity"][result.fills.index <= candles.index[rows[-1]]].sum()
        expected[rows[-1]] = expected.get(rows[-1], 0.) - position * candles["close"].iloc[rows[-1]] * rate
    paid = result.journal["funding"].to_numpy()
    np.testing.assert_allclose(paid, [expected.get(t, 0.) for t in range(len(paid))], atol=1e-7)


def test_funding_of_the_whole_is_that_of_the_holed():
    "No price moves: what is paid does not depend on which candles are there"
    whole = frame(1_700_006_400_000 // 86_400_000 * 86_400_000 + np.arange(60) * HOUR,
                  np.c_[np.full((60, 4), 100.), np.full(60, 1e9)])
    due = pd.date_range(whole.index[8], whole.index[-1], freq="8h")
    rates = pd.Series(1e-3 * np.arange(1, len(due) + 1), due)
    one = funding_rates(rates, times(whole), (BTC,)).sum(axis=(1, 2))
    two = funding_rates(rates, times(whole.drop(whole.index[20:33])), (BTC,)).sum(axis=(1, 2))
    assert one.sum() == pytest.approx(two.sum())
    assert two[19] == pytest.approx(one[[23, 31]].sum())
    assert one[23] == rates.iloc[2]


def refusals():
    candles = ar1(300, seed=1)
    bad = candles.drop(candles.index[250:253])
    observation = Observation(["return(1)"])
    from tradelab.learn.agents import train
    yield "backtest", lambda: backtest(wavering(), bad)
    yield "table", lambda: backtest(pd.Series(1., bad.index), bad)
    yield "two symbols", lambda: backtest(wavering(), {BTC: candles.loc[bad.index], "ETH/USDT:USDT": bad})
    yield "prepare", lambda: prepare(bad, observation.fit(candles))
    yield "fit", lambda: observation.fit(bad)
    yield "train", lambda: train("PPO", bad, observation, steps=10)
    yield ("sweep", lambda: sweep(lambda p, c: c[:, 0], bad, pd.DataFrame({"x": [1.]}), bad[["close"]] * 0,
                                  progress=False))
    yield "stress", lambda: stress(wavering(), bad)
    yield "localnet", lambda: Replay({BTC: bad})


def test_every_road_refuses_a_hole_and_names_its_first_time():
    for name, road in refusals():
        with pytest.raises(CandleError) as refused: road()
        assert "the first that is missing 2024-01-11 10:00 UTC" in str(refused.value), name


def test_candles_out_of_order_are_refused():
    candles = ar1(100, seed=1)
    for bad, words in ((candles[::-1], "follows"), (pd.concat([candles[:50], candles[49:]]), "follows")):
        for gaps in (False, True):
            with pytest.raises(CandleError, match=words): backtest(wavering(), bad, gaps=gaps)


FEATURES = ("return(1)", "rsi(5)", "return(1)@4h", "rsi(3)@2h[-1]", "time_of_day.cos")


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("features", [("return(1)",), FEATURES])
def test_both_forms_agree_to_the_bit_and_nobody_is_asked_until_the_window_is_whole(window, features):
    for seed in range(3):
        candles = holed(ar1(800, volatility=.01, seed=seed), seed, count=7, begin=450)
        policy = wavering(features, window, seed)
        rates = funding(candles, seed=seed)
        limits = Limits(max_position=.5, max_leverage=1., max_drawdown=.9, max_daily_loss=.05,
                        stops=Stops(stop_loss=.015, take_profit=0., stop_atr=2., atr_period=5, max_age=40),
                        target_volatility=2., decay=.2)
        one, two = (backtest(policy, candles, funding=rates, limits=limits, gaps=True, engine=engine,
                             keep_observations=True, baselines=()) for engine in ("vectorised", "event"))
        assert first_difference(one.journal, two.journal) is None
        assert first_difference(one.fills, two.fills) is None
        assert np.array_equal(one.observations, two.observations, equal_nan=True)
        opens, reasons = times(candles), one.rows["reason"][:, 0]
        since = 10**9
        row = {time: t for t, time in enumerate(one.rows["open_time"][:, 0])}
        asked = np.isfinite(one.observations).all(axis=(1, 2))
        for t in range(1, len(opens)):
            since = 1 if opens[t] - opens[t - 1] > HOUR else since + 1
            if opens[t] not in row: continue
            at = row[opens[t]]
            closed = Reason.STOP_LOSS <= reasons[at] <= Reason.TIME_STOP
            waits = since < window or not asked[at]
            assert (reasons[at] == Reason.NO_DECISION) == (waits and not closed)
            if waits and not closed: assert one.rows["order"][at, 0] == 0 and one.rows["fill_quantity"][at, 0] == 0
        assert (reasons == Reason.NO_DECISION).any() == (window > 1 or len(features) > 1)
        assert "holes in the candles carried through" in one.caption


def test_both_forms_agree_for_a_policy_of_orders():
    for seed in range(3):
        candles = holed(ar1(600, volatility=.01, seed=seed), seed, count=7, begin=100)
        policy = Policy("bids", bids, [0.], ("return(1)",), 3, order_slots=2)
        one, two = (backtest(policy, candles, limits=OPEN_END, gaps=True, engine=engine, baselines=())
                    for engine in ("vectorised", "event"))
        assert first_difference(one.journal, two.journal) is None
        assert len(one.fills) > 20
        assert (one.rows["reason"] == Reason.NO_DECISION).sum() >= 2


def test_two_symbols_have_the_candles_that_both_have():
    frames = correlated(400, seed=1)
    one, two = frames
    frames = {one: frames[one].drop(frames[one].index[100:104]), two: frames[two].drop(frames[two].index[200:202])}
    results = [backtest(wavering(window=2), frames, gaps=True, engine=engine, baselines=()) for engine in ("vectorised",
        "event")]
    assert first_difference(results[0].journal, results[1].journal) is None
    assert len(results[0].candles[one]) == len(results[0].candles[two])
    assert "2 holes in the candles carried through, 6 candles missing" in results[0].caption


def test_replay_decides_what_the_backtest_decided():
    "A session told by hand, whose candles have a hole"
    candles = holed(ar1(500, volatility=.01, seed=4), 4, begin=200)
    policy = wavering(FEATURES, 2)
    opens, known, _ = matrix(candles, KNOWN)
    result = backtest(policy, candles, gaps=True, engine="event", baselines=(), keep_observations=True)
    first = int(np.searchsorted(opens, result.rows["open_time"][0, 0]))
    def trader(): return Run("holes", policy, timeframe="1h").trader(instruments=result.instruments)
    exchange = ByHand(opens, known)
    exchange.trade(trader(), Terms("holes", "1h", gaps=True), range(first, first + 150))
    recorded, recomputed = replay(exchange.recorder.lines, trader())
    assert first_difference(recorded, recomputed) is None
    assert (recorded["reason"] == Reason.NO_DECISION).any()
    seen = np.array([unpacked(line["observation"]) for line in exchange.recorder.lines if line["kind"] == "decision"])
    assert len(seen) == 150
    assert np.array_equal(seen[:, :, :2 * len(FEATURES)], result.observations[:150, :, :2 * len(FEATURES)],
                          equal_nan=True)


def test_an_environment_lives_through_a_hole_and_is_not_asked_in_it():
    from tradelab.learn.env import MarketEnv
    candles = holed(ar1(500, volatility=.01, seed=5), 5, begin=200)
    window = 3
    observation = Observation(FEATURES, window, timeframe="1h", symbols=(BTC,))
    env = MarketEnv(prepare(candles, observation, limits=OPEN_END, gaps=True))
    policy = wavering(FEATURES, window)
    rewards = 0.
    asked = 0
    done = False
    seen, _ = env.reset(seed=0)
    while not done:
        assert np.isfinite(seen).all()
        targets = policy.act(seen.reshape(1, -1))
        seen, reward, ended, stopped, _ = env.step(targets)
        rewards = rewards + reward
        asked = asked + 1
        done = ended or stopped
    first = candles.index[env.batch.market.first_row]
    result = backtest(policy, candles, first, limits=OPEN_END, gaps=True, baselines=())
    assert result.equity.iloc[-1] == env.batch.accounts["equity"][0, 0]
    assert rewards == pytest.approx(np.log(result.equity.iloc[-1] / 10_000))
    assert asked == (result.rows["reason"] != Reason.NO_DECISION).sum()


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 120))
def test_means_over_candles_with_holes_do_not_know_where_the_history_began(seed, cut):
    random = np.random.default_rng(seed)
    numbers = np.flatnonzero(random.random(400) > .03).astype(np.int64) + 1_000
    values = random.random(len(numbers))
    whole = window_means(values, numbers, 24)
    late = window_means(values[cut:], numbers[cut:], 24)
    assert np.array_equal(whole[cut + 23:], late[23:])
    np.testing.assert_allclose(whole[23:], np.lib.stride_tricks.sliding_window_view(values, 24).mean(axis=1))


def test_costs_and_limits_know_the_length_of_a_candle_behind_a_hole():
    candles = ar1(900, volatility=.01, seed=1)
    bad = candles.drop(candles.index[600:640])
    costs = CostModel.realistic()
    opens, values, _ = matrix(bad)
    known = conditions(opens, np.ascontiguousarray(values), costs)["spread"][:, 0]
    late = conditions(opens[300:], np.ascontiguousarray(values[300:]), costs)["spread"][:, 0]
    assert np.array_equal(known[300 + 241:], late[241:])
    market, _ = market_history(opens, values, Limits(target_volatility=.5, decay=.2))
    assert (market["step"][1:] == HOUR).all()                               # and not 41 hours behind the hole


def test_a_sweep_counts_years_and_not_rows():
    candles = ar1(2_000, seed=2)
    bad = candles.drop(candles.index[1:1_000])                             # the first step is the long one
    table = sweep(lambda p, c: np.full(len(c), p[0]), bad, pd.DataFrame({"x": [.5, 1.]}), bad[["close"]],
                  limits=OPEN_END, costs=CostModel.ideal(), gaps=True, progress=False).table()
    span = (bad.index[-1] - bad.index[0]) / pd.Timedelta(days=365)
    np.testing.assert_allclose((1 + table["annual_return"]) ** span - 1, table["total_return"], rtol=1e-9)
    for x, row in table.iterrows():
        alone = backtest(pd.Series(x, bad.index), bad, limits=OPEN_END, costs=CostModel.ideal(), gaps=True,
                         baselines=()).summary()
        np.testing.assert_allclose(row["sharpe"], alone.sharpe, rtol=1e-9)
        np.testing.assert_allclose(row["total_return"], alone.total_return, rtol=1e-9)


# ---- in jobs, whose cells are run here one by one

def asked(code, here):
    "A cell's value; it may wait for something"
    value = eval(code, here)
    return asyncio.run(value) if code.co_flags & inspect.CO_COROUTINE else value


def run_job(root, name, **parameters):
    "A job's cells in this process, each result shown as a page shows it; the texts that were shown"
    told = []
    cells = json.loads((root / f"nbs/{name}.ipynb").read_text())["cells"]
    def show(*values):
        told.extend(hasattr(value, "_repr_html_") and value._repr_html_() or str(value) for value in values)
    here = {"display": show, "__name__": "job"}
    with one_section():
        for cell in cells:
            if cell["cell_type"] != "code": continue
            tree = ast.parse("".join(cell["source"]))
            last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            asked(compile(tree, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), here)
            if last: show(asked(compile(last, name, "eval", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), here))
            if "parameters" in cell["metadata"].get("tags", ()):
                assert set(parameters) <= set(here)
                here.update(parameters)
    pyplot.close("all")
    return told


def span_of(timeframe, warm=150, count=300):
    step = milliseconds(timeframe)
    begin = next_opening(to_ms("2020-01-01"), step) + warm * step
    return f"{format_time(begin)[:16]}/{format_time(begin + count * step)[:16]}"


@pytest.mark.parametrize("timeframe", TIMEFRAMES)
def test_every_timeframe_goes_through_the_backtest_job(project, root, timeframe):
    told = run_job(root, "backtest", timeframe=timeframe, span=span_of(timeframe))
    assert any("Risk of" in each for each in told)
    assert not any("not shown" in each for each in told)


def test_every_long_timeframe_goes_through_train_and_report(project, root):
    for timeframe in ("12h", "1d", "3d", "1w"):
        run_job(root, "train", timeframe=timeframe, span=span_of(timeframe), features="return(1) volatility(5)",
                steps=64)
        run_job(root, "report", policy="latest", timeframe=timeframe, span=span_of(timeframe, 300, 200))


def test_a_month_has_no_fixed_length(project, root):
    with pytest.raises(ValueError, match=r"a month \(1M\) has no fixed length"):
        run_job(root, "backtest", timeframe="1M")


def test_a_job_of_a_few_candles_says_what_it_cannot_compute(project, root):
    told = run_job(root, "backtest", span="2022-07-01/2022-07-02")
    assert any("not shown: 2" in each and "returns are too few for an interval" in each for each in told)


def test_real_spot_candles_with_outages_enter_a_job(project, root, shared):
    "The 33 hours of February 2018"
    given = dict(source=str(shared / "data/BTCUSDT-1h.parquet"), span="2018-02-05/2018-03-01")
    with pytest.raises(CandleError, match="the first that is missing 2018-02-08 01:00 UTC"):
        run_job(root, "backtest", **given)
    (project / "tradelab.toml").write_text("[settings.outages]\ngaps = true\n")
    told = run_job(root, "backtest", **given, settings="outages")
    assert any("1 hole in the candles carried through, 33 candles missing" in each for each in told)
    run_job(root, "train", **given, features="return(1) volatility(5)", steps=64, settings="outages")
    told = run_job(root, "report", policy="latest", **given, settings="outages")
    assert any("1 hole in the candles carried through" in each for each in told)


def test_a_warm_up_is_found_before_an_outage(project, root, shared):
    "The first decision right behind the 33 hours: the candles before them are the warm-up"
    (project / "tradelab.toml").write_text("gaps = true\n")
    told = run_job(root, "backtest", source=str(shared / "data/BTCUSDT-1h.parquet"), span="2018-02-09 12:00/2018-02-20")
    assert any("carried through" in each for each in told)


# ---- live, on a localnet that was away as the exchange was

def live(folder, policy, candles, payments, start, parts, watched=None, gaps=True, timeframe="1h"):
    "Sessions over real sockets, stopped and resumed between the parts; the journal, and the lines of the recording"
    folder.mkdir(exist_ok=True)
    run = Run("holes", policy, timeframe=timeframe)
    ledger = Ledger(f"sqlite:///{folder}/tradelab.db")
    async def session(exchange, count, name):
        venue = VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"), SecretStr("key"),
                      SecretStr("secret"))
        return await Session(run.trader(instruments=(BITCOIN,)), BinanceVenue(venue), ledger, folder, origin="holes",
                             gaps=gaps, say=lambda line: None, **name).run(count)
    with Localnet({BTC: candles} | (watched or {}), {BTC: payments}, start=start, gaps=True, instruments=(BITCOIN,
                  ) if not watched else (), api_key="key", api_secret="secret") as exchange:
        for number, count in enumerate(parts):
            asyncio.run(session(exchange, count, {"resume": "holes"} if number else {"id": "holes"}))
    return ledger, list(read(folder / "holes/recording.zst"))


def entries(events):
    "What was told of entries, asked for or not"
    for event in events:
        if event["type"] != "Fetched": yield event
        elif isinstance(event["content"], list): yield from (each for each in event["content"] if "type" in each)


@pytest.mark.integration
@pytest.mark.parametrize("features, window, timeframe", [(("return(1)",), 1, "1h"), (FEATURES, 3, "1h"),
                                                         (("return(1)",), 1, "12h"), (("return(1)",), 1, "1d")])
def test_a_live_session_over_holes_is_its_backtest(features, window, timeframe, tmp_path):
    """Bit for bit, in candles and payments, also those that fall due inside a candle, and where it is stopped before a
    hole and behind one; and it replays"""
    whole = ar1(560, volatility=.01, seed=7, timeframe=timeframe)
    candles = holed(whole, 7, count=9, begin=420)
    payments = funding(whole, seed=7)
    policy, first = wavering(features, window), 400
    # the last candles before the holes
    behind = [t for t, wide in enumerate(np.diff(times(candles)) > milliseconds(timeframe)) if wide and t > first]
    # stopped when a hole is next, and right behind one
    cuts = [behind[0] - first + 1, behind[1] - first + 2, len(candles) - 2 - first]
    ledger, lines = live(tmp_path, policy, candles, payments, times(candles)[first], np.diff([0, *cuts]).tolist(),
                         timeframe=timeframe)
    journal = ledger.journal("holes")
    expected = backtest(policy, candles, candles.index[first], instruments=(BITCOIN,), funding=payments, gaps=True,
                        keep_observations=True, baselines=())
    assert first_difference(expected.journal[:len(journal)], journal) is None
    assert len(journal) == cuts[-1]
    seen = np.array([unpacked(line["observation"]) for line in lines if line["kind"] == "decision"])
    assert np.array_equal(expected.observations[:len(seen)].view(np.uint32), seen.view(np.uint32))
    assert first_difference(*replay(lines, Run("holes", policy, timeframe=timeframe).trader(instruments=(BITCOIN,
        )))) is None
    events = ledger.notices("holes")
    assert (events["kind"] == "hole").sum() == len(behind)
    assert not set(events["kind"]) - {"hole", "kept"}
    assert (journal["reason"] == Reason.NO_DECISION).any() == (window > 1)
    assert (journal["order"] != 0).sum() > 20
    paid = (journal["funding"] != 0).sum()
    assert paid > 5
    told = {(event["symbol"], event["funding_time"]) for line in lines if line["kind"] == "received"
            for event in entries(line["events"]) if event["type"] == "Funding"}
    assert len(told) >= paid + (window == 1) # two of them fall due in one hole


@pytest.mark.integration
def test_a_live_session_that_was_not_told_of_holes_does_not_begin_on_one(tmp_path):
    "One that meets it on its way goes on behind it: tests/test_outages.py"
    candles = ar1(120, seed=1)
    candles = candles.drop(candles.index[70:73])
    with pytest.raises(FeedError, match="a hole, the first that is missing 2024-01-03 22:00 UTC"):
        live(tmp_path / "later", wavering(("return(1)", "rsi(14)")), candles, funding(candles), times(candles)[75], [5],
             gaps=False)


@pytest.mark.integration
def test_a_live_job_trades_through_a_real_outage_and_replays(project, root, shared):
    "The 33 hours of February 2018: two payments and more fall due in them, and what is held is held"
    given = dict(policy="tradelab.strategies.example:SmaCross", source=str(shared / "data/BTCUSDT-1h.parquet"),
                 span="2018-02-07/2018-02-12", candles=50)
    with pytest.raises(CandleError, match="the first that is missing 2018-02-08 01:00 UTC"):
        run_job(root, "live", **given)
    (project / "tradelab.toml").write_text("[settings.outages]\ngaps = true\n")
    told = run_job(root, "live", **given, settings="outages")
    assert any("live" in each for each in told)
    ledger = Ledger(f"sqlite:///{project}/tradelab.db")
    [name] = ledger.sessions()
    journal = ledger.journal(name)
    assert len(journal) == 50
    assert journal.index[24:26].strftime("%d %H").tolist() == ["08 00", "09 10"]
    assert ledger.notices(name)["text"].str.contains("33 candles from 2018-02-08 01:00 UTC on are missing").sum() == 1
    run_job(root, "replay", session=name, settings="outages")
