"""News and macro series as features: as of their publication, the same bits everywhere, blind to their own future, and
refused when they are not what a run was trained with"""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from test_recording import ByHand
from test_sentence import network

from tradelab.config import settings as settings_of
from tradelab.errors import CandleError
from tradelab.evaluation.difference import first_difference, look_ahead
from tradelab.events import Candles, Series
from tradelab.features.grammar import parse
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.learn.agents import train
from tradelab.learn.env import MarketEnv
from tradelab.live.core import Terms
from tradelab.live.reconcile import StartRefusedError
from tradelab.live.replay import replay
from tradelab.live.session import Session
from tradelab.market.candles import matrix
from tradelab.market.synthetic import ar1
from tradelab.risk.execution import OrderGate
from tradelab.runs.registry import load
from tradelab.settings import SeriesDefinition
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import prepare
from tradelab.sources.exogenous import Exogenous, check_exogenous, load_series, publications, with_series
from tradelab.trader import Trader

HOUR, DAY = 3_600_000, 86_400_000
CANDLES = ar1(700, volatility=.01, seed=3)
START = CANDLES.index[0].value // 10**6
FEATURES = ("return(1)", "series(mood)", "series(mood).age", "series(mood)@4h[-1]", "sma(5).relative")


def figures(count=40, published_after=10 * HOUR + 1_800_000, definition=SeriesDefinition(), seed=0):
    "A figure a day, known half past ten, or when it is said"
    about = START - 2 * DAY + DAY * np.arange(count)
    table = pd.DataFrame({"reference_time": about, "publication_time": about + published_after,
                          "value": np.random.default_rng(seed).normal(size=count)})
    return Exogenous("mood", check_exogenous(table, "mood"), definition=definition)


def test_a_figure_enters_at_the_first_close_after_its_publication():
    mood = figures()
    frame = with_series(None, {"mood": figures()}, CANDLES)["series:mood"]
    known = np.stack([frame[name].to_numpy() for name in ("open", "high", "low", "close", "volume", "quote_volume")]
                     + [np.zeros((2, 700))[0], np.zeros(700), frame.funding_rate, frame.index_price,
                        START + HOUR * np.arange(700.)], axis=1)
    value = parse("series(mood)").array(known)
    age = parse("series(mood).age").array(known)
    for t in range(700):                                          # one by one, from the table
        close = START + (t + 1) * HOUR
        told = [row for row in mood.table.itertuples() if row.publication_time <= START + (t + 1) * HOUR]
        assert value[t] == told[-1].value
        assert age[t] == (close - told[-1].publication_time) / HOUR
    assert age.min() == .5
    assert age.max() == 23.5 # hours: published at half past ten


@settings(max_examples=8, derandomize=True)
@given(st.integers(0, 99), st.sampled_from([SeriesDefinition(), SeriesDefinition(stale="12h", when_stale="flat"),
                                            SeriesDefinition(stale="12h", when_stale="hold")]), st.integers(1, 3))
def test_array_event_and_environment_are_the_same(seed, definition, window):
    mood = figures(definition=definition, seed=seed)
    policy = network(seed, 1, window, FEATURES)
    array, event = (backtest(policy, CANDLES, series={"mood": mood}, engine=engine, keep_observations=True,
                             baselines=()) for engine in ("vectorised", "event"))
    assert first_difference(array, event) is None
    assert first_difference(array.observations, event.observations) is None
    env = MarketEnv(prepare(CANDLES, Observation.from_policy(policy), series={"mood": mood}))
    seen, _ = env.reset(seed=0)
    for t in range(200):
        assert_array_equal(seen.reshape(1, -1), array.observations[t])
        seen, *_, info = env.step(np.clip(policy.act(seen.reshape(1, -1)), -1, 1))
        assert np.array_equal(np.array(info["journal"]), array.rows[t])


@st.composite
def published(draw, name, rows):
    """Figures published at random: several between two closes, at the very close, a moment behind it, two at the same
    time, corrections of old ones, or none but the first"""
    times = draw(st.lists(st.builds(lambda hour, more: START + hour * HOUR + more, st.integers(-5, rows + 2),
                                    st.sampled_from([-1, 0, 0, 1, 1_200_000, 2_400_000])), max_size=25))
    delays = draw(st.lists(st.sampled_from([0, HOUR, DAY]), min_size=len(times), max_size=len(times)))
    table = pd.DataFrame({"publication_time": [START - DAY, *times], "delay": [0, *delays]}).drop_duplicates()
    table["reference_time"] = table["publication_time"] - table.pop("delay")
    table["value"] = np.random.default_rng(draw(st.integers(0, 99))).normal(size=len(table))
    what, age = draw(st.sampled_from(["hold", "flat"])), draw(st.sampled_from(["1h", "4h", "9d"]))
    return Exogenous(name, check_exogenous(table, name), definition=SeriesDefinition(stale=age, when_stale=what))


TWO = ("return(1)", "series(mood)", "series(mood).age", "series(fear)@2h", "series(fear).age")


@settings(max_examples=40, derandomize=True, deadline=None)
@given(published("mood", 60), published("fear", 60), st.integers(0, 2))
def test_figures_told_as_they_are_published_give_the_bits_of_the_array_form(mood, fear, seed):
    policy = network(seed, 1, 1, TWO)
    array, event = (backtest(policy, CANDLES[:60], series={"mood": mood, "fear": fear}, engine=engine,
                             keep_observations=True, baselines=()) for engine in ("vectorised", "event"))
    assert first_difference(array, event) is None
    assert first_difference(array.observations, event.observations) is None


def reader(policy, series):
    return Trader(policy, Observation.from_policy(policy, "1h"), OrderGate, instruments=(BITCOIN,),
                  series={name: each.definition for name, each in series.items()})


def decided(trader, times, rows, told, ahead=0):
    "The decisions of a trader that is told each figure right before its close, or so many ms earlier"
    decisions = []
    for time, row in zip(times, rows):
        while told and told[0].publication_time <= time + HOUR + ahead: trader.on(told.pop(0))
        decisions.append(trader.on(Candles(time, row)))
    return decisions


@settings(max_examples=25, derandomize=True, deadline=None)
@given(published("mood", 40), published("fear", 40), st.integers(5, 39), st.sampled_from([0, 1, 7 * HOUR]))
def test_a_figure_told_early_waits_and_a_restart_forgets_none(mood, fear, stop, ahead):
    series = {"mood": mood, "fear": fear}
    policy, told = network(1, 1, 1, TWO), publications(series)
    times, rows, _ = matrix(CANDLES[:40])
    start = 3                                     # a feature looks at candles of two hours
    before = [each for each in told if each.publication_time <= times[start - 1] + HOUR]
    whole, broken = reader(policy, series), reader(policy, series)
    for trader in (whole, broken): trader.warm(times[:start], rows[:start], before)
    truth = decided(whole, times[start:].tolist(), rows[start:], told[len(before):])
    waiting = told[len(before):]
    heard = decided(broken, times[start:stop].tolist(), rows[start:stop], waiting, ahead)
    again = reader(policy, series)
    again.restore(json.loads(json.dumps(broken.snapshot())))
    known = [each for each in told if each.publication_time <= times[stop - 1] + HOUR]
    again.warm(times[:stop], rows[:stop], known[:-1]) # the source may not have the newest yet; the snapshot has it
    heard += decided(again, times[stop:].tolist(), rows[stop:], waiting, ahead)
    for one, other in zip(truth, heard, strict=True):
        assert_array_equal(one.observation, other.observation)
        assert_array_equal(one.targets, other.targets)


@pytest.mark.parametrize("wrong, message", [
    (Series("mod", 1.5, START), "series 'mod' with the value 1.5: no feature reads it, only mood"),
    (Series("mood", float("inf"), START + 9 * HOUR), "series mood: the value inf published at .* is not a finite"),
    (Series("mood", "1.5", START + 9 * HOUR), "series mood: the value '1.5' published at .* is not a finite"),
    (Series("mood", 1.5, START + 9.5 * HOUR), "series mood: the value 1.5 has the publication_time 17.*: give ms"),
    (Series("mood", 1.5, START + 2 * HOUR - 1), "series mood: the value 1.5 published at .* comes behind one of"),
    (Series("mood", 1.5, START + 3 * HOUR), "series mood: the value 1.5 published at .* comes behind the close at")])
def test_a_figure_that_cannot_be_taken_in_changes_nothing(wrong, message):
    trader = reader(network(1, 1, 1, ("series(mood)",)), {"mood": figures()})
    trader.on(Series("mood", .5, START + 2 * HOUR))
    trader.on(Candles(START + 2 * HOUR, np.full((1, 5), 100.)))
    before = json.dumps(trader.snapshot())
    with pytest.raises(ValueError, match=message): trader.on(wrong)
    assert json.dumps(trader.snapshot()) == before
    trader.on(Series("mood", 1.5, START + 3 * HOUR + 1))


def test_a_trader_says_which_figures_it_lacks():
    policy = network(1, 1, 1, ("series(mood)",))
    trader = reader(policy, {"mood": figures()})
    trader.on(Series("mood", .5, START + 2 * HOUR))
    with pytest.raises(ValueError, match=f"series mood: nothing was published until the close at {START + HOUR}"):
        trader.on(Candles(START, np.full((1, 5), 100.)))
    assert trader.open_time == -1
    other = reader(network(1, 1, 1, ("return(1)",)), {})
    with pytest.raises(ValueError, match="series 'mood' with the value 0.5: no feature reads it, only candles"):
        other.on(Series("mood", .5, START))
    with pytest.raises(ValueError, match="series 'mood' with the value 0.5: no feature reads it, only candles"):
        other.restore(trader.snapshot())
    frame = with_series(None, {"mood": figures()}, CANDLES)
    with pytest.raises(ValueError, match="the series 'mood' was given as candles, but a trader is told figures one by"):
        backtest(policy, CANDLES, extra=frame, engine="event", baselines=())


def test_a_recording_holds_the_figures_and_replay_hears_them():
    policy = network(1, 1, 1, ("series(mood)", "series(mood).age"))
    series = {"mood": figures(definition=SeriesDefinition(stale="12h", when_stale="flat"))}
    times, rows, _ = matrix(CANDLES[:30])
    told = publications(series)
    exchange = ByHand(times, rows)
    exchange.start(reader(policy, series), Terms("mood", "1h"), times[5], [told.pop(0), told.pop(0)])
    for t in range(5, 30):
        while told[0].publication_time <= times[t] + HOUR: exchange.tell(told[0].publication_time, [told.pop(0)])
        exchange.close(t)
    recorded, recomputed = replay(exchange.recorder.lines, reader(policy, series))
    assert len(recorded) == 25
    assert recorded["series(mood)"].nunique() == 2
    assert (recorded["target"] == 0.).sum() == 5 + 8 # older than twelve hours at these closes
    assert first_difference(recorded, recomputed) is None


def test_a_stale_figure_is_held_or_empties_the_position_or_is_refused():
    def run(**definition):
        return backtest(network(3, 1, 1, FEATURES), CANDLES,
                        series={"mood": figures(definition=SeriesDefinition(**definition))}, baselines=())
    held = run(stale="12h")
    flat = run(stale="12h", when_stale="flat")
    hour = (held.journal.index.get_level_values(0).hour if isinstance(held.journal.index, pd.MultiIndex)
            else held.journal.index.hour)
    stale = (hour >= 22) | (hour < 10) # of candles whose close is more than twelve hours after half past ten
    assert (flat.journal["target"][stale] == 0).all()
    assert (held.journal["target"][stale] != 0).any()
    assert (flat.journal["target"][~stale] != 0).any()
    assert first_difference(held, run()) is None
    with pytest.raises(CandleError, match="series mood: at .* the newest figure is 14.5 hours old, stale is 12h: "
                       "fetch it again"):
        run(stale="12h", when_stale="refuse")
    assert first_difference(held, run(stale="24h", when_stale="refuse")) is None


def altered(mood, after, table=None):
    "The same until a moment of publication, another one from then on"
    table = mood.table if table is None else table
    return replace(mood, table=table.assign(value=np.where(table["publication_time"] > after, 7. - table["value"],
                                                           table["value"])))


@pytest.mark.parametrize("row", [150, 333, 501])
def test_another_future_of_the_series_does_not_move_the_past(row):
    policy = network(5, 1, 1, FEATURES)
    mood = figures()
    now = START + (row + 1) * HOUR
    one, other = (backtest(policy, CANDLES, series={"mood": each}, baselines=()).journal
                  for each in (mood, altered(mood, now)))
    before = one["open_time"] <= now - HOUR if "open_time" in one else one.index <= CANDLES.index[row]
    assert one[before].equals(other[before])
    assert not one.equals(other)


def test_a_planted_look_ahead_is_caught():
    "Joined by the day that it is about, a figure is read ten hours early"
    policy, truth = network(5, 1, 1, FEATURES), figures()
    early = figures(published_after=0)
    moved = []
    for row in range(150, 500, 7):
        now = START + (row + 1) * HOUR
        unknown = truth.table["publication_time"].to_numpy() > now
        changed = replace(early,
                          table=early.table.assign(value=np.where(unknown, 7. - early.table["value"],
            early.table["value"])))
        one, other = (backtest(policy, CANDLES, series={"mood": each}, baselines=()).rows[["target", "open_time"]]
                      for each in (early, changed))
        moved.append((one["target"] != other["target"])[one["open_time"] <= now - HOUR].any())
    assert any(moved)


def test_look_ahead_perturbs_the_series_too():
    policy, mood = network(5, 1, 1, FEATURES), figures()
    def run(candles, told): return backtest(policy, candles, series={"mood": told["mood"]}, baselines=())
    def reads_ahead(candles, told):
        return run(candles,
                   {"mood": replace(told["mood"],
                                    table=told["mood"].table.assign(value=told["mood"].table["value"].shift(-1).fillna(
            0.)))})
    assert look_ahead(run, CANDLES, 2, series={"mood": mood}).clean
    # planted: each day the figure of tomorrow
    assert not look_ahead(reads_ahead, CANDLES, 2, series={"mood": mood}).clean


def test_a_run_keeps_its_series_and_refuses_another(tmp_path):
    mood = figures(definition=SeriesDefinition(file="mood.csv", lag="1d", stale="40d"))
    observation = Observation(("return(1)", "series(mood)", "series(mood).age"))
    run = train("PPO", CANDLES[:500], observation, steps=200, folder=tmp_path, series={"mood": mood}, progress=False)
    again = load(run.id, tmp_path)
    assert again.config["series"]["mood"]["lag"] == "1d"
    assert len(again.config["series"]["mood"]["sha256"]) == 64
    assert again.observation.series == ("mood",)
    assert again.observation.extra == ()
    assert first_difference(*(backtest(each, CANDLES, series={"mood": mood}, baselines=())
                              for each in (run, again))) is None
    moved = replace(mood, definition=replace(mood.definition, file="elsewhere/mood.csv"))
    backtest(again, CANDLES, series={"mood": moved}, baselines=())                                     # a file may move
    for changed, message in ((replace(mood, definition=replace(mood.definition, lag="0d")), "lag was '1d', is '0d'"),
                             (altered(mood, START + 5 * DAY), "were changed")):
        with pytest.raises(CandleError, match=f"series mood is not what the run was trained with: .*{message}.*"):
            backtest(again, CANDLES, series={"mood": changed}, baselines=())
    for absent in (None, {}):
        with pytest.raises(CandleError, match="the run was trained with the series mood, which is not given"):
            backtest(again, CANDLES, series=absent, baselines=())
    with pytest.raises(ValueError, match="a feature reads the series 'mood', which is missing: pass series="):
        train("PPO", CANDLES[:500], observation, steps=200, folder=tmp_path, progress=False)


def test_a_live_session_refuses_to_start():
    trader = type("Trader", (), {"observation": Observation(("series(mood)",)),
                                 "policy": network(1, 1, 1, ("series(mood)",))})
    with pytest.raises(StartRefusedError, match="reads the series mood, and a live session cannot ask for news and "
                       "macro figures anew yet"):
        Session(trader, None, None, "x", id="one")


def test_the_settings_name_files_columns_and_lag(project):
    days = pd.date_range("2022-01-01", periods=5, tz="UTC")
    (project / "news").mkdir()
    pd.DataFrame({"day": days.strftime("%Y-%m-%dT%H:%M:%SZ"), "mood": range(5), "count": range(10, 15)}).to_csv(project
        / "news/mood.csv", index=False)
    (project / "tradelab.toml").write_text('[series.mood]\nfile = "news/mood.csv"\ncolumns = ["mood", '
                                           '"count"]\nreference = "day"\nlag = "2h"\n')
    series = load_series(Observation(("series(mood)", "series(mood.count).age")).series, settings_of().series)
    assert list(series) == ["mood", "mood.count"]
    assert series["mood.count"].table["value"].tolist() == [10, 11, 12, 13, 14]
    assert (series["mood"].table["publication_time"] - series["mood"].table["reference_time"]).eq(2 * HOUR).all()
    assert json.dumps(series["mood"].definition.columns) == '["mood", "count"]'
    with pytest.raises(CandleError, match="has no column 'mod', only mood, count"):
        load_series(["mood.mod"], settings_of().series)
    with pytest.raises(CandleError, match="a feature reads the series 'news', but the settings define mood"):
        load_series(["news"], settings_of().series)
