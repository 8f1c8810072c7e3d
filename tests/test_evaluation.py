"Evaluation against second opinions: another arithmetic, brute force, a fresh process, real candles"
import math
import subprocess
import sys
from html.parser import HTMLParser
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.evaluation.difference import first_difference
from tradelab.evaluation.intervals import intervals
from tradelab.evaluation.metrics import LABELS, drawdowns, journal_round_trips, metrics
from tradelab.evaluation.tearsheet import TearSheet, costs, months, rolling_sharpe, thinned
from tradelab.journal import JOURNAL


def journal_of(price, held, fee=.0005, symbol="BTC/USDT:USDT", deposit=10_000., start="2023-01-01"):
    "The journal of holding `held` base units at each close, decided one close before"
    fills = np.append(np.diff(held), 0.)
    rows = np.zeros(len(price), JOURNAL)
    fees = fee * abs(fills) * price
    equity = deposit + np.append(0., np.cumsum(held[1:] * np.diff(price))) - np.append(0., np.cumsum(fees)[:-1])
    for name, values in dict(close=price, equity=equity, position=held, fill_quantity=fills, fill_price=price,
                             fee=fees).items():
        rows[name] = values
    times = pd.date_range(start, periods=len(price), freq="1h", tz="UTC", name="open_time")
    return pd.DataFrame(rows, times).drop(columns="open_time").assign(symbol=symbol)


def random_journal(seed, length=200, symbol="BTC/USDT:USDT"):
    random = np.random.default_rng(seed)
    held = np.append(0., random.integers(-1, 2, length - 1))
    return journal_of(100 * np.exp(np.cumsum(random.normal(0, .01, length))), held, symbol=symbol)


def test_metrics_against_the_textbook_written_another_way():
    journal = random_journal(1)
    equity = journal["equity"]
    found = metrics(journal["equity"], journal)
    returns = [b / a - 1 for a, b in zip(equity, equity[1:])]
    mean = sum(returns) / len(returns)
    deviation = (sum((value - mean) ** 2 for value in returns) / (len(returns) - 1)) ** .5
    downside = (sum(min(value, 0) ** 2 for value in returns) / len(returns)) ** .5
    assert found.sharpe == pytest.approx(mean / deviation * 8760 ** .5)
    assert found.sortino == pytest.approx(mean / downside * 8760 ** .5)
    assert found.annual_return == pytest.approx((equity.iloc[-1] / equity.iloc[0]) ** (8760 / 199) - 1)
    peak = equity.iloc[0]
    peak_at = equity.index[0]
    deepest = 0.
    longest = pd.Timedelta(0)
    for time, value in equity.items():
        if value >= peak: peak, peak_at = value, time
        deepest = max(deepest, 1 - value / peak)
        longest = max(longest, time - peak_at)
    assert found.max_drawdown == pytest.approx(deepest)
    assert found.drawdown_duration == longest
    assert found.calmar == pytest.approx(found.annual_return / deepest)
    assert found.omega == pytest.approx(sum(value for value in returns if value > 0) / -sum(value for value in returns
        if value < 0))
    ordered = sorted(returns)
    # empyrical's tail_ratio
    assert found.tail_ratio == pytest.approx(abs(np.percentile(returns, 95)) / abs(np.percentile(returns, 5)))
    assert found.value_at_risk == pytest.approx(-np.percentile(returns, 5))
    assert found.expected_shortfall == pytest.approx(-sum(ordered[:int((len(ordered) - 1) * .05) + 1])
                                                     / (int((len(ordered) - 1) * .05) + 1))
    moments = [sum((value - mean) ** k for value in returns) / len(returns) for k in (2, 3, 4)]
    assert found.skew == pytest.approx(moments[1] / moments[0] ** 1.5)
    assert found.kurtosis == pytest.approx(moments[2] / moments[0] ** 2)
    assert (found.best_return, found.worst_return) == (ordered[-1], ordered[0])
    assert found.recovery_factor == pytest.approx(found.total_return / deepest)
    falls = []
    pieces = [[]]
    top = 0.
    for value in equity:
        top = max(top, value)
        falls.append(1 - value / top)
        if falls[-1] > 0: pieces[-1].append(falls[-1])
        elif pieces[-1]: pieces.append([])
    assert found.ulcer_index == pytest.approx((sum(fall ** 2 for fall in falls) / len(falls)) ** .5)
    assert found.average_drawdown == pytest.approx(np.mean([max(piece) for piece in pieces if piece]))
    gross = [abs(row.position * row.close) / row.equity for row in journal.itertuples()]
    assert found.gross_exposure == pytest.approx(sum(gross) / len(gross))
    assert found.annual_turnover == pytest.approx(found.turnover * 8760 / 199)
    profits = journal_round_trips(journal)["profit"].tolist()
    won = sum(value for value in profits if value > 0)
    lost = -sum(value for value in profits if value < 0)
    spread = (sum((value - sum(profits) / len(profits)) ** 2 for value in profits) / (len(profits) - 1)) ** .5
    assert found.profit_factor == pytest.approx(won / lost)
    assert found.expectancy == pytest.approx(sum(profits) / len(profits))
    assert found.sqn == pytest.approx(len(profits) ** .5 * found.expectancy / spread)


# empyrical-reloaded 0.7.1 with annualization=8760, and scipy 1.17.1 (skew; kurtosis with fisher=False), on the equity
# of random_journal(1); losses with our sign
EMPYRICAL = dict(
    total_return=-0.002025330671709402, annual_return=-0.08537914550273873, annual_volatility=0.007173636174661812,
    sharpe=-12.437153008454393, sortino=-16.637928072464355,
    calmar=-39.91134360791676, omega=0.661773856421502, tail_ratio=0.7728113247722771,
    value_at_risk=0.00014458111514652482, expected_shortfall=0.0001753049519731209,
    max_drawdown=0.0021392200258024646, skew=0.44529576557868616, kurtosis=5.2546499484487335)


@pytest.mark.parametrize("name", EMPYRICAL)
def test_metrics_against_what_empyrical_said(name):
    assert getattr(metrics(random_journal(1)["equity"]), name) == pytest.approx(EMPYRICAL[name], rel=1e-9)


def equity_of(shape, sharpe, periods):
    "An equity curve whose returns have this shape and this annual Sharpe ratio"
    returns = .001 * ((shape - shape.mean()) / shape.std(ddof=1) + sharpe / periods ** .5)
    times = pd.date_range("2020-01-01", periods=len(shape) + 1, freq=pd.Timedelta(days=365) / periods, tz="UTC")
    return pd.Series(100 * np.append(1., np.cumprod(1 + returns)), times)


def bent_normal(skew, kurtosis, length):
    "A normal sample bent by a parabola and a cubic until its moments are these (Newton)"
    z = np.array([NormalDist().inv_cdf((i + .5) / length) for i in range(length)])
    def moments(parameters):
        x = z + parameters[0] * z ** 2 + parameters[1] * z ** 3
        return np.array([np.mean((x - x.mean()) ** k) / np.var(x) ** (k / 2) for k in (3, 4)])
    found = np.array([.1 * np.sign(skew), .05])
    for _ in range(100):
        slope = np.column_stack([(moments(found + step) - moments(found)) / 1e-6 for step in 1e-6 * np.eye(2)])
        found -= .5 * np.linalg.solve(slope, moments(found) - (skew, kurtosis))
    return z + found[0] * z ** 2 + found[1] * z ** 3


def probabilistic_sharpe(found, periods, length, least=0.):
    "Bailey and Lopez de Prado 2012, with the Sharpe ratio of one period and Pearson's kurtosis"
    ratio = found.sharpe / periods ** .5
    return NormalDist().cdf((ratio - least) * (length - 1) ** .5 / (1 - found.skew * ratio + (found.kurtosis - 1) / 4
        * ratio ** 2) ** .5)


def test_the_shape_is_what_the_probabilistic_sharpe_ratio_wants():
    found = metrics(equity_of(bent_normal(-2.448, 10.164, 24), 1.585, 12))
    assert (found.sharpe, found.skew, found.kurtosis) == pytest.approx((1.585, -2.448, 10.164))
    # published: PSR(0) of 24 monthly returns
    assert probabilistic_sharpe(found, 12, 24) == pytest.approx(.913234, abs=2e-5)


def test_the_shape_is_what_the_deflated_sharpe_ratio_wants():
    """Bailey and Lopez de Prado 2014: skew -3 and kurtosis 10 are those of two values only, the bad one 105 days of
    1,250"""
    found = metrics(equity_of(np.append(-np.ones(105), np.zeros(1_145)), 2.5, 250))
    assert (found.sharpe, found.skew, found.kurtosis) == pytest.approx((2.5, -3, 10), abs=.005)
    normal, gamma = NormalDist(), 0.5772156649015329
    # of 100 trials without skill
    best = ((.5 / 250) ** .5 * ((1 - gamma) * normal.inv_cdf(1 - 1 / 100)
                                + gamma * normal.inv_cdf(1 - 1 / (100 * math.e))))
    # 0.9018 with excess kurtosis
    assert probabilistic_sharpe(found, 250, 1_250, best) == pytest.approx(.900397, abs=5e-5)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 8).map(float), min_size=2, max_size=40), st.integers(1, 4))
def test_the_deepest_spells_as_pyfolio_finds_them(values, n):
    """pyfolio's get_max_drawdown_underwater and gen_drawdown_table, restated: take the valley, walk to both sides, cut
    it out, again"""
    equity = pd.Series(values, pd.date_range("2024-01-01", periods=len(values), freq="1h", tz="UTC"))
    underwater, expected = 1 - equity / equity.cummax(), []
    while len(expected) < n and (underwater > 0).any():
        valley = underwater.idxmax()
        before, after = underwater[:valley], underwater[valley:]
        peak = before[before == 0].index[-1]
        end = after[after == 0].index[0] if (after == 0).any() else pd.NaT
        expected.append((peak, valley, end, underwater[valley]))
        underwater[underwater.index > peak if pd.isna(end) else (underwater.index > peak)
                   & (underwater.index < end)] = 0.
    found = drawdowns(equity, n)
    assert list(found[["start", "bottom", "end", "depth"]].itertuples(index=False, name=None)) == expected
    assert found["days"].tolist() == [((equity.index[-1] if pd.isna(end) else end) - start) / pd.Timedelta(days=1)
                                      for start, _, end, _ in expected]


def test_a_dead_curve_and_a_short_one_have_no_shape():
    still, short = (metrics(pd.Series(values, pd.date_range("2024-01-01", periods=len(values), freq="1h", tz="UTC")))
                    for values in ([100.] * 9, [100., 90.]))
    for found in (still, short):
        assert all(math.isnan(getattr(found, name)) for name in ("sharpe", "sortino", "omega", "skew", "kurtosis",
            "tail_ratio"))
    assert still.ulcer_index == still.average_drawdown == 0
    assert math.isnan(still.recovery_factor)
    assert short.average_drawdown == short.max_drawdown == pytest.approx(.1)
    # nan is one object: two records can be compared
    assert still == metrics(pd.Series(100., pd.date_range("2024-01-01", periods=9, freq="1h", tz="UTC")))


def test_round_trips_by_walking_fill_by_fill():
    journal = random_journal(2)
    profits = []
    held = 0.
    cash = 0.
    for row in journal.itertuples():
        remaining = row.fill_quantity
        if held and held * remaining < 0:
            closing = np.sign(remaining) * min(abs(held), abs(remaining))
            part = closing / remaining
            cash -= closing * row.fill_price + row.fee * part
            held += closing
            if held == 0:
                profits.append(cash)
                cash = 0.
            cash -= remaining * (1 - part) * row.fill_price + row.fee * (1 - part)
            held += remaining - closing
        else:
            cash -= remaining * row.fill_price + row.fee
            held += remaining
    trips = journal_round_trips(journal)
    assert len(profits) > 50
    assert np.allclose(trips["profit"], profits)
    assert (trips["entry_time"] < trips["exit_time"]).all()


def test_trips_of_two_symbols_are_those_of_each():
    one = random_journal(3)
    two = random_journal(4, symbol="ETH/USDT:USDT")
    both = pd.concat([one, two]).sort_index(kind="stable")
    assert journal_round_trips(both)["profit"].sum() == pytest.approx(journal_round_trips(one)["profit"].sum()
                                                              + journal_round_trips(two)["profit"].sum())
    found = metrics(one["equity"], both)
    assert found.gross_exposure == pytest.approx(((one["position"].abs() * one["close"] + two["position"].abs()
                                                   * two["close"]) / one["equity"]).mean())
    assert found.fills == (both["fill_quantity"] != 0).sum()
    assert found.time_in_market == ((one["position"] != 0) | (two["position"] != 0)).mean()


@settings(max_examples=60)
@given(st.sets(st.integers(0, 19)), st.sets(st.integers(0, 19)),
       st.dictionaries(st.tuples(st.integers(0, 19), st.sampled_from("xyz")), st.floats(1, 2), max_size=4),
       st.booleans())
def test_the_first_difference_by_brute_force(without_a, without_b, changes, two_symbols):
    times = pd.date_range("2023-01-01", periods=20, freq="1h", tz="UTC")
    whole = pd.DataFrame(np.random.default_rng(0).random((20, 3)), times, columns=list("xyz"))
    other = whole.copy()
    for (row, column), value in changes.items(): other.loc[times[row], column] = value
    a = whole.drop(times[list(without_a)])
    b = other.drop(times[list(without_b)])
    expected = None
    for row, time in enumerate(times):
        if (row in without_a) != (row in without_b): expected = (time, None)
        elif row not in without_a:
            expected = next(((time, name) for name in "xyz" if whole.loc[time, name] != other.loc[time, name]), None)
        if expected: break
    if two_symbols: a, b = (pd.concat([frame.assign(symbol=name) for name in ("BTC", "ETH")]) for frame in (a, b))
    found = first_difference(a, b.iloc[::-1])
    assert (found and (found.bar, found.column)) == expected
    if two_symbols and found: assert found.symbol == "BTC"


def test_times_are_joined_whatever_their_resolution():
    journal = random_journal(5)
    other = journal.set_axis(journal.index.as_unit("ms"))
    assert first_difference(journal, other) is None
    assert metrics(other["equity"], journal) == metrics(journal["equity"], other)


def test_a_journal_written_as_text_comes_back_with_its_bits(tmp_path):
    journal = random_journal(6)
    journal.to_csv(tmp_path / "journal.csv")
    read = pd.read_csv(tmp_path / "journal.csv", index_col="open_time", parse_dates=True)
    assert first_difference(journal, read) is None
    read.iloc[100, read.columns.get_loc("equity")] = np.nextafter(read["equity"].iloc[100], 0)
    found = first_difference(SimpleNamespace(journal=journal), SimpleNamespace(journal=read))
    assert (found.bar, found.column) == (journal.index[100], "equity")
    assert str(found.a) != str(found.b)


def test_windows_of_observations_name_row_symbol_and_feature():
    seen = np.zeros((5, 2, 3), np.float32)
    other = seen.copy()
    other[3, 1, 0] = np.nan
    assert (str(first_difference(seen, other,
                                columns=["rsi(14)", "atr(14)",
                                         "position"])) == "first difference at row 3, column '1, rsi(14)': 0.0 "
                                         "against nan")


def test_a_sheet_of_a_ruined_account_and_of_one_step():
    price = np.array([100., 90., 80., 10., 10.])
    ruined = journal_of(price, np.array([0., 120., 120., 120., 120.]))
    flat = journal_of(price, np.zeros(5))
    assert ruined["equity"].iloc[-1] < 0
    sheet = TearSheet({name: SimpleNamespace(journal=journal, equity=journal["equity"]) for name,
                       journal in (("ruined", ruined), ("flat", flat))})
    assert sheet.table().loc["Total return [%]", "ruined"] < -100
    assert sheet.metrics["ruined"].annual_return == -1
    assert "<img" in sheet._repr_html_()
    alone = TearSheet({"alone": SimpleNamespace(journal=flat.iloc[:1], equity=flat["equity"].iloc[:1])})
    assert alone.written().loc["Annual return [%]", "alone"] == "-"
    assert "<img" in alone._repr_html_()
    assert "1 step." in alone.full_caption


class Page(HTMLParser):
    "Open elements are closed in order, and what is asked of elsewhere is collected"
    def __init__(self, text):
        super().__init__()
        self.open = []
        self.sources = []
        self.rows = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "poster",
            "action")]
        self.rows += tag == "tr"
        if tag not in ("meta", "img", "br"): self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag


def sheet_of(**journals):
    return TearSheet({name: SimpleNamespace(journal=journal, equity=journal["equity"]) for name,
                      journal in journals.items()}, source="synthetic walk")


def test_a_page_stands_alone_whatever_it_shows():
    price = np.array([100., 90., 80., 10., 10.])
    ruined = journal_of(price, np.array([0., 120., 120., 120., 120.]))
    flat = journal_of(price, np.zeros(5))
    for sheet in (sheet_of(a=random_journal(1), b=random_journal(2)), sheet_of(long=random_journal(7, 3_000)),
                  sheet_of(ruined=ruined, flat=flat), sheet_of(alone=flat.iloc[:1]), sheet_of(flat=flat)):
        text = sheet.html()
        page = Page(text)
        assert not page.open
        assert len(page.sources) == 2
        assert all(source.startswith("data:image/png;base64,") for source in page.sources)
        assert "url(" not in text
        assert "@import" not in text
        assert "<mark>SYNTHETIC prices</mark>: synthetic walk" in text
        assert "Net of costs" in text
        assert "In or out of sample: not said" in text
        assert page.rows > len(LABELS)
    assert (len(sheet.details().axes), len(sheet.plot().axes)) == (4, 3)


def test_annual_figures_of_a_short_span_stay_off_the_page():
    short = sheet_of(week=random_journal(1))
    long = sheet_of(year=random_journal(1, 8_760))
    assert short.details().axes[0].texts[0].get_text() == "a rolling Sharpe ratio needs 60 days"
    assert long.details().axes[0].get_ylabel() == "Sharpe, 180 days [annual]"
    for name in ("annual_return", "sharpe", "sortino", "calmar", "annual_turnover"):
        label = LABELS[name][0]
        assert short.written().loc[label, "week"] == "-" != long.written().loc[label, "year"]
        assert f"<th>{label}</th>\n      <td>-</td>" in short.html()


def test_rolling_sharpe_is_the_sharpe_of_each_window():
    equity = random_journal(8, 2_000)["equity"]
    rolled = rolling_sharpe(equity, 10, "1h")
    assert rolled.notna().sum() == 2_000 - 240
    for row in (240, 777, 1_999):
        assert rolled.iloc[row] == pytest.approx(metrics(equity[row - 240:row + 1]).sharpe, rel=1e-6)


def test_months_multiply_to_years_and_years_to_the_whole():
    equity = random_journal(9, 20_000)["equity"]
    table = months(equity)
    assert table.index.tolist() == [2023, 2024, 2025]
    assert np.allclose((1 + table.iloc[:, :12]).prod(axis=1), 1 + table["Year"])
    assert (1 + table["Year"]).prod() == pytest.approx(equity.iloc[-1] / equity.iloc[0])
    march = equity["2024-02-29 23:00":"2024-03-31 23:00"]
    assert table.loc[2024, "Mar"] == pytest.approx(march.iloc[-1] / march.iloc[0] - 1)


def test_costs_are_those_of_the_journal_and_of_the_fills_where_there_are_any():
    journal = random_journal(10).assign(funding=.25)
    result = SimpleNamespace(journal=journal, equity=journal["equity"])
    assert costs(result).to_dict() == {"fees": journal["fee"].sum(), "funding": -50.}
    for fills in (None, pd.DataFrame(), pd.DataFrame(dict(spread=[], impact=[])), pd.DataFrame(dict(price=[1.]))):
        assert costs(SimpleNamespace(**vars(result), fills=fills)).index.tolist() == ["fees", "funding"]
    more = costs(SimpleNamespace(**vars(result), fills=pd.DataFrame(dict(impact=[1., 2.], spread=[.5, np.nan]))))
    assert more[["spread", "impact"]].tolist() == [.5, 3.]


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300), st.integers(1, 20))
def test_a_thinned_curve_keeps_its_extremes_and_its_ends(values, columns):
    series = pd.Series(values)
    kept = thinned(series, columns)
    assert len(kept) <= 4 * columns + 2
    assert kept.index.is_monotonic_increasing
    assert series[kept.index].equals(kept)
    assert kept.index[0] == 0
    assert kept.index[-1] == len(values) - 1
    if not series.isna().any(): assert (kept.min(), kept.max()) == (series.min(), series.max())


def test_importing_evaluation_brings_no_plotting():
    code = ("import sys, tradelab.evaluation.tearsheet; print([name for name in ('matplotlib', 'ccxt', 'torch', "
            "'sqlalchemy', 'aiohttp') if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"


@pytest.mark.integration
def test_buy_and_hold_of_real_bitcoin(shared):
    candles = pd.read_parquet(shared / "data" / "BTCUSDT-perp-1h.parquet").set_index("timestamp")
    price = candles["close"].set_axis(pd.to_datetime(candles.index, unit="ms", utc=True))["2021":"2022"]
    journal = journal_of(price.to_numpy(), np.append(0., np.full(len(price) - 1, .1)), start="2021-01-01")
    found = metrics(journal["equity"], journal, "1h")
    assert len(price) == 2 * 8760
    assert found.round_trips == 0
    assert found.fills == 1
    assert found.total_return == pytest.approx((price.iloc[-1] - price.iloc[0] * 1.0005) / 100_000, rel=1e-9)
    assert found.annual_return == pytest.approx((1 + found.total_return) ** (8760 / (2 * 8760 - 1)) - 1)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(-.004, .004), st.sampled_from((.5, .9, .95, .99)), st.sampled_from((1., .05)))
def test_an_interval_holds_its_estimate_and_stays_where_the_measure_can_be(seed, drift, level, noise):
    "Also where blocks cannot show what was: a steady fall, one crash, a curve that hardly moves"
    random = np.random.default_rng(seed)
    returns = drift + noise * random.standard_t(3, 300) * .004
    if seed % 3 == 0: returns[150] = -.3
    equity = pd.Series(1e4 * np.cumprod(np.append(1., 1 + np.maximum(returns, -.9))),
                       pd.date_range("2023-01-01", periods=301, freq="1h", tz="UTC"))
    table = intervals(equity, level, 100, seed).table()
    assert (table["low"] <= table["estimate"]).all()
    assert (table["estimate"] <= table["high"]).all()
    assert (table["level"] == level).all()
    assert (table["unit"] != "").all()
    assert 0 <= table.loc["max_drawdown", "low"]
    assert table.loc["max_drawdown", "high"] <= 1
    assert table.loc["total_return", "low"] >= -1


def test_a_ruined_run_has_intervals_until_its_ruin():
    equity = pd.Series(np.r_[np.linspace(1e4, 100., 200), -50., -50., -50.], pd.date_range("2023-01-01", periods=203,
        freq="1h", tz="UTC"))
    table = intervals(equity, draws=50).table()
    assert (table["low"] <= table["estimate"]).all()
    assert (table["estimate"] <= table["high"]).all()
    assert np.isfinite(table["estimate"]).all()


@settings(max_examples=60)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30))
def test_turnover_is_never_below_zero(moves):
    journal = random_journal(1, len(moves) + 1)
    equity = pd.Series(1000. + np.append(0., 1000 * np.cumsum(moves)), journal.index)
    found = metrics(equity, journal)
    assert found.turnover >= 0
    assert not found.annual_turnover < 0
