"""Splits against every pair of samples: no training sample shares a candle with a test sample, and none is left out
that does not; what is fitted on a training span does not change with the test span"""
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tradelab.events import KNOWN
from tradelab.features.observation import Observation
from tradelab.learn.labels import Labels, forward_return
from tradelab.learn.splits import (
    CombinatorialPurgedCV,
    LeakError,
    PurgedKFold,
    Role,
    WalkForward,
    check_split,
    leaks,
    overlaps,
)
from tradelab.market.candles import matrix
from tradelab.market.synthetic import ar1, correlated

HOUR = pd.Timedelta("1h")
START = pd.Timestamp("2024-01-01", tz="UTC")


# --- the oracle: every pair, by the sentence "two samples overlap if they share a time"

def pairs_overlap(starts, ends, others, other_ends):
    return np.array([any(start <= other_end and other <= end for other, other_end in zip(others, other_ends))
                     for start, end in zip(starts, ends)], bool)


def expected(times, ends, test, candidates, behind=0, ahead=0):
    """What may be trained on: candidates outside the test that overlap no test sample, that begin neither within
    `behind` after the end of a test label, nor end within `ahead` before a test decision"""
    kept = []
    for i in candidates:
        clean = i not in test
        for j in test:
            clean &= not (times[i] <= ends[j] and times[j] <= ends[i])
            clean &= not ends[j] < times[i] <= ends[j] + behind
            clean &= not times[j] - ahead <= ends[i] < times[j]
        if clean: kept.append(i)
    return kept


@st.composite
def histories(draw):
    "End times of several symbols at irregular decision times, of random length; whole hours, so that many touch"
    steps = draw(st.lists(st.integers(1, 5), min_size=20, max_size=40))
    hours = np.cumsum(steps)
    symbols = draw(st.integers(1, 3))
    rows = [(hour, symbol) for hour in hours for symbol in range(symbols) if symbol == 0 or draw(st.booleans())]
    if draw(st.booleans()): rows.sort(key=lambda row: row[1])   # one symbol after the other
    lengths = draw(st.lists(st.integers(0, 6), min_size=len(rows), max_size=len(rows)))
    starts = START + pd.to_timedelta([hour for hour, _ in rows], "h")
    names = [f"S{symbol}" for _, symbol in rows]
    index = pd.DatetimeIndex(starts, name="open_time") if symbols == 1 else pd.MultiIndex.from_arrays(
        [starts, names], names=["open_time", "symbol"])
    return pd.Series(starts + pd.to_timedelta(lengths, "h"), index)


def whole_hours(end_times):
    times = end_times.index.get_level_values("open_time")
    return tuple(((each - START) / HOUR).to_numpy().astype(int) for each in (times, pd.DatetimeIndex(end_times)))


def examples(count):
    "Many of them are refused, because a fold is smaller than its embargo or a label: the others count"
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.filter_too_much,
                                                                              HealthCheck.too_slow])


def made(splitter, *arguments, **settings):
    "The splitter; an example that it refuses, because a fold is too small, is another example"
    try: return splitter(*arguments, **settings)
    except ValueError: assume(False)


@examples(150)
@given(histories(), st.integers(2, 5), st.integers(0, 8))
def test_k_fold_against_every_pair(end_times, n_splits, embargo):
    times, ends = whole_hours(end_times)
    tested = []
    for train, test in made(PurgedKFold, end_times, n_splits, embargo=HOUR * embargo).split():
        assert list(train) == expected(times, ends, set(test), range(len(times)), behind=embargo)
        assert set(times[train]).isdisjoint(times[test])
        tested.extend(test)
    assert sorted(tested) == list(range(len(times)))


@examples(100)
@given(histories(), st.integers(3, 6), st.data(), st.integers(0, 5))
def test_combinations_against_every_pair(end_times, n_groups, data, embargo):
    times, ends = whole_hours(end_times)
    n_test_groups = data.draw(st.integers(1, n_groups - 1))
    cv = made(CombinatorialPurgedCV, end_times, n_groups, n_test_groups, embargo=HOUR * embargo)
    splits = list(cv.split())
    assert len(splits) == cv.get_n_splits()
    for train, test in splits:
        assert list(train) == expected(times, ends, set(test), range(len(times)), behind=embargo)


@examples(150)
@given(histories(), st.integers(1, 5), st.integers(0, 8), st.booleans(), st.integers(5, 40))
def test_walk_forward_against_every_pair(end_times, n_splits, embargo, rolling, length):
    times, ends = whole_hours(end_times)
    cv = made(WalkForward, end_times, n_splits=n_splits, train=HOUR * length, rolling=rolling, embargo=HOUR * embargo)
    tested = []
    for train, test in cv.split():
        start = times[test].min()
        before = [i for i in range(len(times)) if times[i] < start and (not rolling or times[i] >= start - length)]
        assert list(train) == expected(times, ends, set(test), before, ahead=embargo)
        assert ends[train].max() < start
        tested.extend(test)
    assert sorted(times[tested]) == sorted(times[times >= times.min() + length])


@examples(100)
@given(histories(), st.integers(6, 12), st.integers(10, 20))
def test_test_spans_of_one_length(end_times, test_length, length):
    times, _ = whole_hours(end_times)
    cv = made(WalkForward, end_times, test=HOUR * test_length, train=HOUR * length, rolling=True)
    last = times.max()
    for number, (train, test) in enumerate(reversed(list(cv.split()))):
        end = last - number * test_length
        assert sorted(times[test]) == sorted(times[(times > end - test_length) & (times <= end)])
        assert times[train].min() >= times[test].min() - length


@settings(max_examples=200, deadline=None)
@given(*[st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=25)] * 2)
def test_overlaps_against_every_pair(some, others):
    (starts, lengths), (other_starts, other_lengths) = (np.array(each).T for each in (some, others))
    intervals = starts, starts + lengths, other_starts, other_starts + other_lengths
    assert overlaps(*intervals).tolist() == pairs_overlap(*intervals).tolist()


def test_the_oracle_sees_what_others_leak():
    "scikit-learn's own folds, and ours with labels that are said to be shorter than they are"
    labels = forward_return(ar1(500, seed=0), 12, "cut")
    times, ends = whole_hours(labels.end_times)
    for train, test in KFold(4).split(times):
        assert list(train) != expected(times, ends, set(test), range(len(times)))
        assert set(leaks(labels.end_times, train, test)) == set(train) - set(expected(times, ends, set(test), train))
    short = labels.end_times - HOUR
    with pytest.raises(LeakError): [check_split(labels.end_times, *each) for each in PurgedKFold(short, 4).split()]


# --- paths

@pytest.mark.parametrize("n_groups, n_test_groups, n_paths", [(6, 2, 5), (10, 2, 9), (5, 1, 1), (5, 4, 4), (8, 4, 35)])
def test_paths(n_groups, n_test_groups, n_paths):
    "Lopez de Prado 2018, 12.4: each path tests each group once, each prediction is in one path"
    index = pd.date_range(START, periods=83, freq="h", name="open_time")
    cv = CombinatorialPurgedCV(index, n_groups, n_test_groups)
    assert cv.n_paths == n_paths == cv.get_n_splits() * n_test_groups / n_groups
    assert cv.paths.shape == (n_paths, n_groups)
    used = [(split, group) for path in cv.paths for group, split in enumerate(path)]
    assert sorted(used) == sorted((split, group) for split, tested in enumerate(combinations(range(n_groups),
        n_test_groups)) for group in tested)
    stitched = cv.stitch([split + test / 1_000 for split, (_, test) in enumerate(cv.split())])
    edges = np.cumsum([0, *map(len, np.array_split(np.arange(83), n_groups))])
    for path in range(n_paths):
        for group in range(n_groups):
            rows = np.arange(edges[group], edges[group + 1])
            assert np.array_equal(stitched.iloc[rows, path], cv.paths[path, group] + rows / 1_000)


# --- what others say, where they are right

def test_against_purgedcv():
    "Its intervals are half open: of labels one nanosecond longer it says what ours say of closed ones"
    Theirs = pytest.importorskip("purgedcv", reason="pip install purgedcv").CombinatorialPurgedCV
    labels = forward_return(ar1(700, seed=0), 9, "cut")
    start, end = labels.end_times.index, labels.end_times + pd.Timedelta(1)
    theirs = Theirs(6, 2, prediction_times=start, evaluation_times=end, embargo=12 * HOUR - pd.Timedelta(1))
    ours = CombinatorialPurgedCV(labels.end_times, 6, 2, embargo="12h")
    for (train, test), (their_train, their_test) in zip(ours.split(), theirs.split(labels.values), strict=True):
        assert np.array_equal(test, their_test)
        assert np.array_equal(train, their_train)


def test_against_skfolio():
    "It counts samples and knows no end times: right where all labels are as long, decided at each hour"
    Theirs = pytest.importorskip("skfolio.model_selection", reason="pip install skfolio").CombinatorialPurgedCV
    labels = forward_return(ar1(609, seed=0), 9, "cut")
    ours = CombinatorialPurgedCV(labels.end_times, 6, 2, embargo="12h")
    theirs = Theirs(6, 2, purged_size=9, embargo_size=12)
    both = zip(ours.split(), theirs.split(labels.values.to_frame()), strict=True)
    for (train, test), (their_train, their_tests) in both:
        assert np.array_equal(test, np.concatenate(their_tests))
        assert np.array_equal(train, their_train)
    assert theirs.n_test_paths == ours.n_paths


# --- scikit-learn

def test_splitters_are_arguments_of_scikit_learn():
    labels = forward_return(ar1(1_500, seed=3), 3, "cut")
    X = pd.DataFrame({"last": labels.values.shift(4).fillna(0.), "two": 1.}).set_axis(labels.values.index)
    cv = PurgedKFold(labels.end_times, 4)
    assert len(cross_val_score(Ridge(), X, labels.values, cv=cv)) == 4
    assert len(cross_val_predict(Ridge(), X, labels.values, cv=cv)) == len(X)
    assert len(cross_val_score(Ridge(), X.to_numpy(), labels.values.to_numpy(), cv=cv)) == 4
    search = GridSearchCV(Ridge(), {"alpha": [1., 10.]}, cv=CombinatorialPurgedCV(labels.end_times, 5, 2))
    assert search.fit(X, labels.values).n_splits_ == 10
    walk = WalkForward(labels.end_times, test="10d", train="20d", rolling=True)
    inside = GridSearchCV(Ridge(), {"alpha": [1., 10.]}, cv=PurgedKFold(labels.end_times, 3))
    assert len(cross_val_score(inside, X, labels.values, cv=walk, error_score="raise")) == walk.get_n_splits()


def test_a_splitter_splits_a_part_of_its_history():
    "As a new one of that part would"
    both = forward_return(correlated(300, seed=1), 5, "cut").end_times
    part = both.iloc[100:400]
    inner = list(PurgedKFold(both, 3, embargo="4h").split(pd.DataFrame({"x": 0.}, part.index)))
    for (train, test), (fresh_train, fresh_test) in zip(inner, PurgedKFold(part, 3, embargo="4h").split(), strict=True):
        assert np.array_equal(train, fresh_train)
        assert np.array_equal(test, fresh_test)


# --- leak: what is fitted on training does not know the test span

OBSERVATION = Observation(["return(1)", "rsi(14)", "return(1)@4h"], window=8, timeframe="1h")
MEMORY = f"{OBSERVATION.warm_up}h" # beyond it, not one bit of an observation depends on a candle
HORIZON = 6


def samples_of(candles):
    "Windows of features, labels and end times of all decisions that have both"
    labels = forward_return(candles, HORIZON, "cut")
    seen = OBSERVATION.matrix(matrix(candles, KNOWN)[1])[:, 0]
    windows = np.lib.stride_tricks.sliding_window_view(seen, OBSERVATION.window, axis=0)
    X = pd.DataFrame(windows.reshape(len(windows), -1), candles.index[OBSERVATION.window - 1:])
    rows = slice(OBSERVATION.warm_up, len(labels.values))
    index = labels.values.index[rows]
    return X.loc[index], labels.values.loc[index], labels.end_times.loc[index]


def shuffled(candles, rows):
    "The candles with those of some rows in another order"
    values = candles.to_numpy(copy=True)
    values[rows] = np.random.default_rng(0).permutation(values[rows])
    return pd.DataFrame(values, candles.index, candles.columns)


def replaced(candles, rows):
    "The candles with others in some rows"
    other = ar1(len(candles), rho=-.5, volatility=.02, seed=99)
    values = candles.to_numpy(copy=True)
    values[rows] = other.to_numpy()[rows]
    return pd.DataFrame(values, candles.index, candles.columns)


def fitted(X, y):
    "All numbers that a scaler and a ridge keep"
    model = make_pipeline(StandardScaler(), Ridge()).fit(X, y)
    return np.concatenate([model[0].mean_, model[0].scale_, model[1].coef_, [model[1].intercept_]])


def folds_that_know_the_test(candles, splitter, change):
    "How many folds fit something else if all candles that test samples look at, or that come after, are changed"
    X, y, end_times = samples_of(candles)
    found = 0
    for train, test in splitter(end_times).split(X):
        times, ends = end_times.index, end_times.array
        rows = np.zeros(len(candles), bool)
        for block in np.split(test, np.flatnonzero(np.diff(test) > 1) + 1):
            rows |= (candles.index >= times[block[0]]) & (candles.index <= ends[block].max())
        if train[-1] < test[0]: rows |= candles.index >= times[test[0]]
        other_X, other_y, _ = samples_of(change(candles, np.flatnonzero(rows)))
        assert not other_X.iloc[test].equals(X.iloc[test])
        before, after = fitted(X.iloc[train], y.iloc[train]), fitted(other_X.iloc[train], other_y.iloc[train])
        found += not np.array_equal(before, after)
    return found


def less(end_times): return end_times - HOUR # labels said to be one candle shorter than they are


@pytest.fixture(scope="module")
def candles(): return ar1(8_000, seed=5)


@pytest.mark.parametrize("change", [shuffled, replaced])
@pytest.mark.parametrize("splitter", [
    lambda ends: WalkForward(ends, n_splits=4), lambda ends: WalkForward(ends, test="40d", train="50d", rolling=True),
    lambda ends: PurgedKFold(ends, 4, embargo=MEMORY), lambda ends: CombinatorialPurgedCV(ends, 5, 2, embargo=MEMORY)],
    ids=["expanding", "rolling", "k-fold", "combinatorial"])
def test_nothing_fitted_knows_the_test_span(candles, splitter, change):
    assert folds_that_know_the_test(candles, splitter, change) == 0


@pytest.mark.parametrize("splitter, leaking", [
    (lambda ends: WalkForward(less(ends), n_splits=4), 4), (lambda ends: PurgedKFold(less(ends), 4, embargo=MEMORY), 3),
    (lambda ends: PurgedKFold(ends, 4), 3), (lambda ends: KFold(4), 4)],
    ids=["walk-forward, short labels", "k-fold, short labels", "no embargo", "scikit-learn"])
def test_the_leak_test_finds_leaks(candles, splitter, leaking):
    assert folds_that_know_the_test(candles, splitter, replaced) == leaking


# --- bad input, refused before anything is fitted

HOURS = pd.date_range(START, periods=240, freq="h", name="open_time")
DAY = pd.Series(HOURS + 24 * HOUR, HOURS)


@pytest.mark.parametrize("make, message", [
    (lambda: forward_return(ar1(50, seed=0), 8), "8 labels reach beyond the data, which end at"),
    (lambda: Labels(pd.Series(0., HOURS), DAY.where(DAY < DAY.max()), ""), "has no end time: it reaches beyond"),
    (lambda: PurgedKFold(DAY, 11), "test span 0 is 0 days 22:00:00 long, a label lasts 1 days"),
    (lambda: PurgedKFold(DAY, 5, embargo="3d"), "test span 0 is 2 days 00:00:00 long, the embargo is 3 days"),
    (lambda: CombinatorialPurgedCV(DAY, 6, 3, embargo=.5), "test span 0 is 1 days 16:00:00 long, the embargo is 4"),
    (lambda: WalkForward(DAY, n_splits=4, warm_up=30), "fold 0 has 24 times to train on, of which .* take 30"),
    (lambda: WalkForward(DAY, test="2d", train="1d", rolling=True), "fold 0 has 0 times to train on"),
    (lambda: PurgedKFold(DAY, 3, embargo=30), "embargo must be a length of time such as '12h', or a share"),
    (lambda: PurgedKFold(DAY, 3, embargo="a day"), "'a day' is not a duration"),
    (lambda: PurgedKFold(DAY[::-1], 3), "follows .*: sort the rows by time"),
    (lambda: PurgedKFold(pd.concat([DAY, DAY[-1:]]), 3), "give each decision once, several symbols"),
    (lambda: PurgedKFold(DAY.to_numpy(), 3), "end_times is a ndarray"),
    (lambda: PurgedKFold(DAY, 3).split(np.zeros((3, 240))), "X has 3 rows, end_times 240: .* wrong way round"),
    (lambda: PurgedKFold(DAY, 3).split(np.zeros((239, 3))), "X has 239 rows, end_times 240: give a row for each"),
    (lambda: PurgedKFold(DAY, 3).split(pd.DataFrame({"x": 0.}, HOURS + HOUR)), "which has no label end"),
    (lambda: check_split(DAY, np.arange(200), np.arange(150, 240)), "50 samples are in training and in the test span"),
    (lambda: check_split(DAY, np.arange(140), np.arange(150, 240)), "14 training samples share a candle with"),
    ], ids=lambda each: each if isinstance(each, str) else "")
def test_bad_input_is_refused_before_the_first_fold(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_roles_are_said_in_order_of_what_they_override():
    assert list(Role) == sorted(Role) and Role.TEST > Role.PURGED > Role.EMBARGOED > Role.TRAIN > Role.UNUSED
