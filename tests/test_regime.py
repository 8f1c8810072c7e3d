"Regimes: as good as the best filter, the same bits both ways, blind to the future"
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.events import CLOSE, COLUMNS
from tradelab.features.grammar import parse
from tradelab.features.observation import Observation
from tradelab.features.regime import ABSENT, PARAMETERS, REGIMES, Regimes, RegimeStream, regime
from tradelab.market.candles import frame, resample
from tradelab.market.synthetic import STATES, ar1, regimes

# name: (drift and volatility of each state, probability to stay, the regime that each state is)
MARKETS = {"four": (((15e-4, .006), (-2e-3, .009), (0., .02), (0., .003)), .99, REGIMES),
           "slow": (((6e-4, .006), (-8e-4, .009), (0., .02), (0., .003)), .995, REGIMES),
           "drift alone": (((4e-3, .008), (-4e-3, .008), (0., .016), (0., .008)), .99, REGIMES),
           "no volatile": (STATES, .995, ("bull", "bear", "sideways")),
           "calm and wild": (((0., .004), (0., .015)), .99, ("sideways", "volatile")),
           "bull and bear": (((2e-3, .01), (-2e-3, .01)), .995, ("bull", "bear"))}


def switching(name, length=16_000, seed=1):
    "Candles of a market by name, and the true regime of each"
    states, stay, names = MARKETS[name]
    generator = np.random.default_rng(seed)
    moves = np.where(generator.random(length) >= stay, generator.integers(1, max(len(states), 2), length), 0)
    state = moves.cumsum() % len(states)
    returns = np.array(states)[state, 0] + np.array(states)[state, 1] * generator.standard_normal(length)
    close = 20_000 * np.exp(np.cumsum(returns))
    return np.column_stack([close] * 4 + [np.ones(length)]), np.array(names)[state], state


def optimal(returns, states, stay):
    "The best that anybody can do who knows the true laws: Bayes, with a matrix"
    (drift, scale), n = np.array(states).T, len(states)
    moves = np.full((n, n), (1 - stay) / (n - 1))
    np.fill_diagonal(moves, stay)
    beliefs = np.full(n, 1 / n)
    result = np.empty((len(returns), n))
    for t, value in enumerate(returns):
        beliefs = beliefs @ moves * np.exp(-.5 * ((value - drift) / scale) ** 2) / scale
        beliefs /= beliefs.sum()
        result[t] = beliefs
    return result


def named(array): return np.array(REGIMES)[array[:, 0].astype(int)]


@pytest.mark.parametrize("name", MARKETS)
@pytest.mark.parametrize("seed", [1, 2])
def test_it_is_nearly_as_right_as_the_best_possible_filter(name, seed):
    states, stay, names = MARKETS[name]
    candles, truth, _ = switching(name, seed=seed)
    half = len(candles) // 2
    fitted = Regimes().fit(candles[:half])
    ours = (named(fitted.array(candles)[1:]) == truth[1:])[half:].mean()
    best = (np.array(names)[optimal(np.diff(np.log(candles[:, CLOSE])), states, stay).argmax(axis=1)]
            == truth[1:])[half:].mean()
    print(f"{name}, seed {seed}: right {ours:.1%}, best possible {best:.1%}, ratio {ours / best:.3f}, regimes found: "
          f"{', '.join(fitted.present)}")
    assert ours >= .9 * best


@pytest.mark.parametrize("seed", [1, 2])
def test_on_the_synthetic_chapters_own_market(seed):
    market, state = regimes(20_000, seed=seed)
    fitted = Regimes().fit(market[:10_000])
    best = (optimal(np.log(market.close / market.close.shift(1)).to_numpy()[1:], STATES, .995).argmax(axis=1)
            == state[1:])[10_000:].mean()
    ours = (fitted.read(market).regime.map({"bull": 0, "bear": 1, "sideways": 2}) == state)[10_000:].mean()
    assert ours >= .9 * best


def test_with_the_true_laws_it_is_the_textbooks_filter():
    states, stay, _ = MARKETS["four"]
    candles, _, _ = switching("four", 3_000)
    spell = -1 / np.log(stay)
    true = Regimes((15e-4, 2e-3, .006, .009, .02, .003, *[spell] * 4, *[1.] * 4, 1e9))
    np.testing.assert_allclose(true.array(candles)[1:, 2:], optimal(np.diff(np.log(candles[:, CLOSE])), states, stay),
                               atol=1e-6)


def test_confidence_is_honest():
    candles, truth, _ = switching("four", 40_000, seed=5)
    fitted = Regimes().fit(candles[:20_000])
    array = fitted.array(candles)[20_000:]
    right, said = named(array) == truth[20_000:], array[:, 1]
    for low in (.3, .5, .7, .9):
        these = (said >= low) & (said < low + .2)
        assert abs(right[these].mean() - said[these].mean()) < .06, (low, these.sum())


CANDLE = st.tuples(*[st.floats(1e-3, 1e6)] * 4, st.floats(0, 1e9))
NUMBERS = st.tuples(*[st.floats(1e-5, .1)] * 6, *[st.floats(1, 1e3)] * 4, *[st.floats(1e-3, 10)] * 4,
                    st.floats(2.1, 200))


@settings(max_examples=80)
@given(st.lists(CANDLE, min_size=1, max_size=40), NUMBERS, st.integers(0, 39))
def test_array_and_stream_are_the_same_bits_and_blind_to_the_future(rows, parameters, cut):
    candles, fitted = np.array(rows, float), Regimes(parameters)
    array, stream = fitted.array(candles), fitted.stream()
    for row, candle in zip(array, candles, strict=True):
        reading = stream.update(candle)
        assert np.array_equal([reading.confidence, *reading.probabilities.values()], row[1:], equal_nan=True)
        assert reading.regime == (None if np.isnan(row[0]) else REGIMES[int(row[0])])
    assert np.isnan(array[0]).all()
    assert np.isfinite(array[1:]).all()
    assert np.allclose(array[1:, 2:].sum(axis=1), 1)
    assert np.array_equal(fitted.array(candles[:cut + 1]), array[:cut + 1], equal_nan=True)
    for i, name in enumerate(regime.outputs):
        assert np.array_equal(fitted.feature(name).array(candles), array[:, i], equal_nan=True)


def test_no_future_changes_the_past():
    candles, _, _ = switching("four", 6_000)
    fitted = Regimes().fit(candles[:3_000])
    assert fitted == Regimes().fit(candles[:3_000].copy())                      # the span alone decides, every time
    before = fitted.array(candles)
    generator = np.random.default_rng(0)
    for cut in generator.integers(1, 6_000, 20):
        changed = candles.copy()
        changed[cut:, :4] *= generator.uniform(.5, 2)
        after = fitted.array(changed)
        assert np.array_equal(after[:cut], before[:cut], equal_nan=True)
        assert not np.array_equal(after[cut:], before[cut:])


@pytest.mark.parametrize("name", MARKETS)
def test_the_start_is_forgotten_to_the_last_bit(name):
    candles, _, _ = switching(name, 40_000)
    fitted = Regimes().fit(candles[:8_000])
    whole = fitted.array(candles)
    warm_up = fitted.feature().warm_up
    slowest = 0
    for start in range(37, 40_000 - warm_up, 1_499):
        late = fitted.array(candles[start:])
        differ = np.flatnonzero((late != whole[start:]).any(axis=1))
        slowest = max(slowest, differ.max(initial=0))
        assert np.array_equal(late[warm_up - 1:], whole[start + warm_up - 1:])
    print(f"{name}: forgotten after {slowest} candles, {slowest / max(fitted.parameters[6:10]):.1f} spells; the "
          f"warm-up is {warm_up}")


def test_a_fitted_regime_is_a_feature_like_any_other():
    market, _ = regimes(6_000, seed=1)
    fitted = Regimes().fit(market[:3_000])
    texts = [fitted.feature(name).text for name in ("bull", "volatile", "confidence")]
    candles = market[list(COLUMNS)].to_numpy()[:, None]
    observation = Observation(["return(1)", *texts])
    assert np.array_equal(observation.matrix(candles)[1:, 0, 1:], fitted.array(market)[1:, [2, 4, 1]].astype("float32"))
    assert all(parse(text).text == text for text in texts)
    assert observation.warm_up == fitted.feature().warm_up


def test_regimes_that_a_market_does_not_have_are_never_told():
    candles, _, _ = switching("calm and wild")
    fitted = Regimes().fit(candles[:8_000])
    assert fitted.present == ("volatile", "sideways")
    assert fitted.array(candles)[1:, 2:4].max() < 1e-6
    assert fitted.summary().index.tolist() == ["volatile", "sideways"]
    assert fitted.parameters[6] == ABSENT["spell"]


def test_bad_input():
    market = ar1(1_000, seed=1)
    for wrong, message in ((market[:499], "499 candles are too few to fit regimes: give at least 500, better 5,000"),
                           (market.assign(close=20_000.), "the price is 20000.0 in all 1000 candles: there is "
                            "nothing to fit"),
                           (market.assign(close=market.close.where(market.index != market.index[7])),
                            "candle 7 is not usable"), (np.ones((600, 4)), r"candles must have the shape \(T, 5\)")):
        with pytest.raises(ValueError, match=message): Regimes().fit(wrong)
    with pytest.raises(ValueError, match="shortest must be a number of candles above 0, was -1"):
        Regimes().fit(market, shortest=-1)
    for names in (("bull",), (), ("bull", "crab")):
        with pytest.raises(ValueError, match="names must be two or more of bull, bear, volatile, sideways, was"):
            Regimes().fit(market, names=names)
    with pytest.raises(ValueError, match="rise must be a number above 0, was 0"):
        Regimes((0., *list(PARAMETERS.values())[1:])).feature()
    with pytest.raises(ValueError, match="has no output 'crab': choose one of number, confidence, bull"):
        Regimes().feature("crab")
    with pytest.raises(ValueError, match="candle 0 is not usable"):
        RegimeStream(regime().parameters).update((1, 1, 1, np.inf, 1))


def test_a_gap_in_price_does_not_break_it():
    candles = np.ones((3_000, 5)) * 20_000 * np.exp(np.random.default_rng(1).normal(0, .004, 3_000).cumsum())[:, None]
    candles[1_500:, :4] *= 1e-3 # a redenomination: a thousand deviations
    array = Regimes().array(candles)
    assert np.isfinite(array[1:]).all()
    assert named(array[1_500:1_501])[0] == "volatile"


@pytest.mark.parametrize("timeframe, shortest", [("1d", 10), ("4h", 60)])
@pytest.mark.parametrize("symbol", ("BTC", "ETH", "LTC", "ADA", "BNB"))
def test_the_four_words_by_name_on_real_markets(shared, symbol, timeframe, shortest):
    table = pd.read_parquet(shared / "data" / f"{symbol}USDT-1h.parquet")
    market = resample(frame(table.timestamp, table[list(COLUMNS)]), timeframe)
    fitted = Regimes().fit(market[:"2020-06"], shortest=shortest, names=REGIMES)
    read = fitted.read(market)
    moves = np.log(market.close).diff()
    # in the training span and after it, a bear has fallen and a bull has risen
    for span in (slice(None, "2020-06"), slice("2020-07", None)):
        mean = moves[span].groupby(read.regime[span]).mean()
        assert mean["bear"] < 0 < mean["bull"]
        assert set(read.regime[span].dropna()) >= {"bull", "bear", "sideways"}
    if (symbol, timeframe) == ("BTC", "1d"):
        fall = read["2021-11-15":"2022-01-24"].regime.value_counts(normalize=True)
        assert fall["bear"] > .5
        # 42 % down in ten weeks, a year and a half after the training span
        assert set(read.regime.dropna()) == set(REGIMES)


def test_mirrored_names_are_as_right_where_the_market_is_a_mirror():
    states, stay, names = MARKETS["drift alone"]
    candles, truth, _ = switching("drift alone", seed=4)
    fitted = Regimes().fit(candles[:8_000], names=REGIMES)
    best = (np.array(names)[optimal(np.diff(np.log(candles[:, CLOSE])), states, stay).argmax(axis=1)]
            == truth[1:])[8_000:].mean()
    assert (named(fitted.array(candles)[1:]) == truth[1:])[8_000:].mean() >= .9 * best
    assert fitted.parameters[0] == fitted.parameters[1]
    assert fitted.parameters[2] == fitted.parameters[3] >= fitted.parameters[5]


def test_real_bitcoin(shared, tmp_path):
    table = pd.read_parquet(shared / "data" / "BTCUSDT-1h.parquet")
    days = resample(frame(table.timestamp, table[list(COLUMNS)]), "1d")
    fitted = Regimes().fit(days[:"2020-06"], shortest=10)
    read = fitted.read(days)
    print(fitted.summary().to_string(), read.regime.value_counts(normalize=True).round(3).to_dict(), sep="\n")
    figure = fitted.plot(days)
    figure.savefig(tmp_path / "btc.png")
    assert (tmp_path / "btc.png").stat().st_size > 20_000
    assert read.regime.isna().sum() == 1
    assert (read.groupby("regime").confidence.mean() > .5).all()
    wild = np.log(days.close).diff().groupby(read.regime).std()
    assert "volatile" not in wild or wild["volatile"] == wild.max()
