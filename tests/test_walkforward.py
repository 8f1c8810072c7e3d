"A walk-forward finds planted skill and no other, knows nothing of its test spans, and survives what fails in it"
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numba
import numpy as np
import pandas as pd
import pytest

from tradelab.features.observation import Observation
from tradelab.learn.folds import Study, folds_of, sharpe_of, try_fold
from tradelab.learn.splits import LeakError, check_split
from tradelab.learn.tasks import Failure, Task, run_tasks
from tradelab.learn.walkforward import candles_needed, chosen, walk_forward
from tradelab.market.synthetic import ar1, funding, random_walk
from tradelab.policies import buy_and_hold
from tradelab.runs.registry import trials
from tradelab.settings import NO_STOPS, CostModel, Limits
from tradelab.sim.backtest import backtest
from tradelab.strategies.example import Momentum, follow

pytestmark = pytest.mark.integration
LIMITS = Limits(stops=NO_STOPS)
PLAIN = dict(costs=CostModel(), limits=LIMITS, progress=False)
SYMBOL = "BTC/USDT:USDT"


@pytest.fixture(scope="module")
def skilled(): return ar1(3_600, rho=.3, seed=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory): return tmp_path_factory.mktemp("runs")


def study_of(candles, runs, **told):
    return Study({SYMBOL: candles}, Observation(["return(1)", "volatility(24)"]), limits=LIMITS,
                 training={"steps": 3_000, "net": (8,)}, runs=runs, **told)


def fitted_of(attempt): return attempt.fitted, attempt.inside, attempt.validation


@pytest.mark.parametrize("learner", ["PPO", "SAC", "linear", "boosted", Momentum(1, .005)],
                         ids=["PPO", "SAC", "linear", "boosted", "momentum"])
def test_nothing_fitted_or_chosen_knows_the_test_span(learner, skilled, runs):
    "Shuffled, or from another market: scaler, weights, scores and the chosen seed are the same bits"
    fold = folds_of(skilled.index, 3)[1]
    shuffled, other = skilled.copy(), skilled.copy()
    shuffled.iloc[fold.test[0]:] = skilled.iloc[fold.test[0]:].sample(frac=1, random_state=0).to_numpy()
    other.iloc[fold.test[0]:] = ar1(3_600, rho=-.5, volatility=.03, seed=9).iloc[fold.test[0]:].to_numpy()
    seeds = range(2 if isinstance(learner, str) else 1)
    found = [[try_fold(study_of(each, runs), fold, learner, seed) for seed in seeds]
             for each in (skilled, shuffled, other)]
    assert len({tuple(map(fitted_of, each)) for each in found}) == 1
    assert len({next(iter(chosen(each).values())).seed for each in found}) == 1


def test_the_leak_test_sees_a_leak(skilled, runs):
    "One candle earlier, and what was fitted is another"
    fold = folds_of(skilled.index, 3)[1]
    other = skilled.copy()
    other.iloc[fold.fitting[1] - 1:] = ar1(3_600, seed=9).iloc[fold.fitting[1] - 1:].to_numpy()
    here, there = (try_fold(study_of(each, runs), fold, "PPO", 0) for each in (skilled, other))
    assert here.fitted != there.fitted


@pytest.mark.parametrize("expanding", [False, True])
@pytest.mark.parametrize("embargo", [0., "1d"])
def test_spans_share_no_candle(skilled, expanding, embargo):
    "Neither do the candles that decide a reward: a backtest of a span looks one candle beyond its last decision"
    ends = pd.Series(skilled.index[1:], skilled.index[:-1])
    for fold in folds_of(skilled.index, 6, expanding=expanding, embargo=embargo):
        fitting, validation, test = (np.arange(*span) for span in (fold.fitting, fold.validation, fold.test))
        check_split(ends, fitting, validation)
        check_split(ends, np.concatenate([fitting, validation]), test)
        apart = 24 if embargo else 1
        assert fold.validation[0] - fold.fitting[1] >= apart
        assert fold.test[0] - fold.validation[1] >= apart
    folds = folds_of(skilled.index, 6, expanding=expanding, embargo=embargo)
    assert np.array_equal(np.concatenate([np.arange(*fold.test) for fold in folds]),
                          np.arange(folds[0].test[0], len(skilled) - 1))


def test_planted_skill_is_found_and_noise_is_not(runs):
    "The same agent on two markets, net of costs"
    told = dict(PLAIN, steps=16_000, folds=3, seeds=5, net=(16,), folder=runs)
    observation = Observation(["return(1)"])
    found = walk_forward(["PPO"], ar1(6_000, rho=.3, seed=1), observation, **told)
    noise = walk_forward(["PPO"], random_walk(6_000, seed=1), observation, **told)
    assert not found.failures + noise.failures
    assert sharpe_of(found.returns["PPO"]) > 5
    assert found.verdict.skill, str(found.verdict)
    assert noise.sentences[0].startswith("PPO: no evidence of skill: ")


def test_one_worker_and_two_find_the_same(skilled, runs):
    told = dict(PLAIN, steps=3_000, folds=2, seeds=2, net=(8,), folder=runs)
    one, two = (walk_forward(["PPO", Momentum(1, .005)], skilled, Observation(["return(1)"]), workers=workers, **told)
                for workers in (1, 2))
    assert [each.fitted for each in one.attempts] == [each.fitted for each in two.attempts]
    assert one.all_returns.equals(two.all_returns)
    assert one.table().equals(two.table())


def test_every_training_is_counted_and_none_is_kept(skilled, tmp_path):
    result = walk_forward(["PPO"], skilled, Observation(["return(1)"]), steps=200, folds=2, seeds=3, folder=tmp_path,
                          **PLAIN)
    assert result.trials == len(trials(tmp_path)) == 6
    assert not list(tmp_path.glob("train_*"))


def test_a_rule_in_folds_is_the_rule_over_the_span(skilled, runs):
    "An outside way to the same returns: one backtest over all, apart from the candles at the borders"
    result = walk_forward([Momentum(1, .005)], skilled, Observation(["return(1)"]), folds=3, folder=runs, **PLAIN)
    first = result.folds[0].test[0]
    whole = backtest(Momentum(1, .005), skilled, skilled.index[first], costs=CostModel(), limits=LIMITS, baselines=())
    alone = whole.equity.pct_change().iloc[1:]
    folds = np.concatenate([each.returns["costs x1"] for each in result.attempts])
    apart = np.abs(folds - alone.to_numpy())
    assert len(folds) == len(alone)
    assert np.median(apart) < 1e-6
    assert apart.max() < .0006 * LIMITS.max_position * 2 + .001


def test_several_symbols_with_funding(runs):
    candles = {SYMBOL: ar1(3_000, rho=.3, seed=1), "ETH/USDT:USDT": ar1(3_000, rho=.3, seed=2)}
    rates = {symbol: funding(frame, seed=1) for symbol, frame in candles.items()}
    result = walk_forward(["PPO", follow], candles, Observation(["return(1)"]), steps=1_000, folds=2, seeds=1,
                          funding=rates, folder=runs, **PLAIN)
    assert not result.failures
    assert "net of costs" in result.caption
    assert result.returns.notna().all().all() # pieces and folds have the same days
    assert sum(each["funding"] for each in result.baseline_facts["always short"]) != 0


def test_a_failed_fold_is_a_value_and_said_on_the_page(skilled, runs):
    study = study_of(skilled, runs)
    tasks = [Task("good", try_fold, dict(study=study, fold=folds_of(skilled.index, 2)[0], learner=Momentum(1), seed=0)),
             Task("bad", try_fold, dict(study=study, fold=folds_of(skilled.index, 2)[1], learner="PPPO", seed=0))]
    good, bad = run_tasks(tasks, progress=False)
    assert isinstance(bad, Failure)
    assert "there is no agent 'PPPO'" in str(bad)
    result = walk_forward([Momentum(1)], skilled, Observation(["return(1)"]), folds=2, seeds=1, folder=runs, **PLAIN)
    broken = replace(result, attempts=(good,), failures=(bad,))
    for page in (str(broken), broken._repr_html_()): assert "FAILED bad: ValueError: there is no agent" in page
    second = broken.index >= skilled.index[broken.folds[1].test[0] + 1]
    assert not broken.returns["momentum(1,0.02)"][-int(second.sum() // 24):].any()


def test_if_every_task_fails_it_is_said(skilled, runs):
    with pytest.raises(ValueError, match="none of 4 tasks succeeded: PPO, fold 1, seed 0: ValueError: an episode has"):
        walk_forward(["PPO"], skilled, Observation(["return(1)"]), folds=2, seeds=2, folder=runs, steps=100,
                     episode=1_000_000, **PLAIN)


@pytest.mark.parametrize("told, sentence", [
    ({"folds": 1}, "at least 2 folds, was 1"), ({"folds": 0}, "at least 2 folds, was 0"),
    ({"seeds": 0}, "seeds must be at least 1, was 0"), ({"steps": 0}, "steps must be at least 1, was 0"),
    ({"embargo": "60d"}, "long, the embargo is 60 days"),
    ({"folds": 1_000, "embargo": "12h"}, "long, the embargo is 0 days 12"),
    ({"fitted_share": 1.}, "fitted_share must be between 0 and 1, was 1"),
    ({"validation_share": 0.}, "validation_share must be between 0 and 1, was 0"),
    ({"workers": 0}, "workers must be at least 1"),
    ({"observation": Observation(["ema(500)"])}, "of which window and warm-up take"),
    ({"observation": Observation(["return(1)"], 3_000)}, "of which window and warm-up take"),
    ({"candles": ar1(3_600, seed=1).assign(open=7., high=7., low=7., close=7.)}, "the price is 7 in all .* of fold 1"),
    ({"candles": ar1(900, seed=1), "learners": ["linear"]}, "linear is fitted on at least 500 candles"),
    ({"n_env": 3, "learners": ["PPO", follow]}, "no setting 'n_env': did you mean n_envs"),
    ({"learners": ["PPO", buy_and_hold()]}, "'buy and hold' is a learner and a baseline"),
    ({"keep": True}, "no setting 'keep'"), ({"gamma": 5.}, "gamma must be at least 0 and below 1, was 5"),
    ({"batch_size": 0}, "batch_size must be"), ({"scaler": "standart"}, "scaler must be standard or robust"),
    ({"net": (0,)}, "net must be whole numbers"), ({"learning_rate": float("nan")}, "learning_rate must be"),
    ({"learners": []}, "learners must be a list"), ({"learners": ["PPOO"]}, "did you mean PPO"),
    ({"learners": ["PPO", "PPO"]}, "'PPO' is there twice"), ({"learners": [3]}, "cannot trade 3")])
def test_bad_input_is_refused_before_anything_is_fitted(skilled, tmp_path, told, sentence):
    given = dict(PLAIN, learners=["PPO"], candles=skilled, observation=Observation(["return(1)"]), folder=tmp_path)
    began = time.monotonic()
    with pytest.raises((ValueError, TypeError), match=sentence): walk_forward(**given | told)
    assert not trials(tmp_path)
    assert time.monotonic() - began < 60


def test_what_has_seen_a_test_span_is_refused(skilled, tmp_path):
    from tradelab.learn.agents import train
    run = train("PPO", skilled, Observation(["return(1)"]), steps=200, folder=tmp_path, progress=False)
    told = dict(PLAIN, folder=tmp_path)
    with pytest.raises(LeakError, match=f"{run.id} was fitted on candles until .*: name its agent"):
        walk_forward([run], skilled, Observation(["return(1)"]), **told)
    with pytest.raises(LeakError, match="the observation has been fitted already"):
        walk_forward(["PPO"], skilled, Observation(["return(1)"]).fit(skilled), **told)


def test_features_that_need_more_than_a_fold_has_are_counted_with_the_rules(skilled, runs):
    assert candles_needed(study_of(skilled, runs), ["PPO"]) < candles_needed(study_of(skilled, runs), [Momentum(700)])


INTERRUPTED = """
import os, signal, threading, time
from tradelab.learn.tasks import Task, run_tasks
def wait(seconds, file):
    open(file, "w").close()
    time.sleep(seconds)
    return seconds
if __name__ == "__main__":
    def press():
        while not os.path.exists("second"): time.sleep(.02)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=press, daemon=True).start()
    found = run_tasks([Task("quick", wait, dict(seconds=0, file="first")),
                       Task("slow", wait, dict(seconds=600, file="second")),
                       Task("never", wait, dict(seconds=600, file="third"))], workers=1, progress=False)
    print(*map(str, found), sep="|")
"""


def test_ctrl_c_ends_all_and_loses_nothing_that_was_finished(tmp_path):
    (tmp_path / "job.py").write_text(INTERRUPTED)
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # the tests may have been started where it is ignored
    ran = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, preexec_fn=heard)
    assert ran.stdout.strip() == "0|slow: interrupted|never: interrupted", ran.stderr
    assert "interrupted: 1 of 3 tasks were finished, and are kept" in ran.stderr
    assert not (tmp_path / "third").exists()


def test_processes_end_with_the_one_that_started_them(tmp_path):
    "Killed with -9, in the middle of a task"
    code = ("import os, time\nfrom tradelab.learn.tasks import Task, run_tasks\n"
            "def told():\n    open('pid', 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
            "run_tasks([Task('long', told)], progress=False)")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        until = time.monotonic() + 60
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < until:
            time.sleep(.05)
        child = int((tmp_path / "pid").read_text())
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until = time.monotonic() + 30
    while time.monotonic() < until and not ended(child): time.sleep(.05)
    assert ended(child)


def ended(number):
    try: return open(f"/proc/{number}/stat").read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError: return True


def test_a_killed_process_costs_one_task():
    def lost(): os.kill(os.getpid(), signal.SIGKILL)
    squares = [Task(str(n), pow, dict(base=n, exp=2)) for n in range(4)]
    found = run_tasks([Task("one", abs, {}), Task("lost", lost), *squares], workers=2, progress=False)
    assert "TypeError" in str(found[0])
    assert "its process ended with -9" in str(found[1])
    assert found[2:] == [0, 1, 4, 9]


def test_tasks_compute_with_one_thread():
    def threads():
        import torch
        return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]
    assert run_tasks([Task("threads", threads)], progress=False) == [(1, "1")]


def test_two_threads_send_the_same_compiled_function_at_once():
    "numba gives a function its name when it is first pickled, and refuses to do so twice"
    rules = [Momentum(1, .01) for _ in range(4)]
    fresh = numba.njit(lambda x: x + 1.)
    tasks = [Task(str(n), lambda rule, function: function(rule.parameters[0]), dict(rule=rule, function=fresh))
             for n, rule in enumerate(rules)]
    assert run_tasks(tasks, workers=4, progress=False) == [1.01] * 4
