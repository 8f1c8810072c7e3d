"Evaluation against second opinions: another arithmetic, brute force, a fresh process, real candles"
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from tradelab.evaluation.difference import first_difference
from tradelab.evaluation.metrics import metrics, round_trips
from tradelab.evaluation.tearsheet import TearSheet
from tradelab.records import JOURNAL


def journal_of(price, held, fee=.0005, symbol="BTC/USDT:USDT", deposit=10_000., start="2023-01-01"):
    "The journal of holding `held` base units at each close, decided one close before"
    fills = np.append(np.diff(held), 0.)
    rows = np.zeros(len(price), JOURNAL)
    fees = fee * abs(fills) * price
    equity = deposit + np.append(0., np.cumsum(held[1:] * np.diff(price))) - np.append(0., np.cumsum(fees)[:-1])
    for name, values in dict(close=price, equity=equity, position=held, fill_quantity=fills, fill_price=price, fee=fees).items(): rows[name] = values
    times = pd.date_range(start, periods=len(price), freq="1h", tz="UTC", name="open_time")
    return pd.DataFrame(rows, times).drop(columns="open_time").assign(symbol=symbol)


def random_journal(seed, length=200, symbol="BTC/USDT:USDT"):
    random = np.random.default_rng(seed)
    held = np.append(0., random.integers(-1, 2, length - 1))
    return journal_of(100 * np.exp(np.cumsum(random.normal(0, .01, length))), held, symbol=symbol)


def test_metrics_against_the_textbook_written_another_way():
    journal = random_journal(1)
    equity, found = journal["equity"], metrics(journal["equity"], journal)
    returns = [b / a - 1 for a, b in zip(equity, equity[1:])]
    mean = sum(returns) / len(returns)
    deviation = (sum((value - mean) ** 2 for value in returns) / (len(returns) - 1)) ** .5
    downside = (sum(min(value, 0) ** 2 for value in returns) / len(returns)) ** .5
    assert found.sharpe == pytest.approx(mean / deviation * 8760 ** .5) and found.sortino == pytest.approx(mean / downside * 8760 ** .5)
    assert found.annual_return == pytest.approx((equity.iloc[-1] / equity.iloc[0]) ** (8760 / 199) - 1)
    peak, peak_at, deepest, longest = equity.iloc[0], equity.index[0], 0., pd.Timedelta(0)
    for time, value in equity.items():
        if value >= peak: peak, peak_at = value, time
        deepest, longest = max(deepest, 1 - value / peak), max(longest, time - peak_at)
    assert found.max_drawdown == pytest.approx(deepest) and found.drawdown_duration == longest
    assert found.calmar == pytest.approx(found.annual_return / deepest)
    assert found.omega == pytest.approx(sum(value for value in returns if value > 0) / -sum(value for value in returns if value < 0))
    ordered = sorted(returns)
    assert found.tail_ratio == pytest.approx(abs(np.percentile(returns, 95)) / abs(np.percentile(returns, 5)))    # empyrical's tail_ratio
    assert found.value_at_risk == pytest.approx(-np.percentile(returns, 5)) and found.expected_shortfall == pytest.approx(-sum(ordered[:int((len(ordered) - 1) * .05) + 1]) / (int((len(ordered) - 1) * .05) + 1))
    profits = round_trips(journal)["profit"].tolist()
    won, lost = sum(value for value in profits if value > 0), -sum(value for value in profits if value < 0)
    spread = (sum((value - sum(profits) / len(profits)) ** 2 for value in profits) / (len(profits) - 1)) ** .5
    assert found.profit_factor == pytest.approx(won / lost) and found.expectancy == pytest.approx(sum(profits) / len(profits)) and found.sqn == pytest.approx(len(profits) ** .5 * found.expectancy / spread)


def test_round_trips_by_walking_fill_by_fill():
    journal = random_journal(2)
    profits, held, cash = [], 0., 0.
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
    trips = round_trips(journal)
    assert len(profits) > 50 and np.allclose(trips["profit"], profits)
    assert (trips["entry_time"] < trips["exit_time"]).all()


def test_trips_of_two_symbols_are_those_of_each():
    one, two = random_journal(3), random_journal(4, symbol="ETH/USDT:USDT")
    both = pd.concat([one, two]).sort_index(kind="stable")
    assert round_trips(both)["profit"].sum() == pytest.approx(round_trips(one)["profit"].sum() + round_trips(two)["profit"].sum())
    found = metrics(one["equity"], both)
    assert found.fills == (both["fill_quantity"] != 0).sum() and found.time_in_market == ((one["position"] != 0) | (two["position"] != 0)).mean()


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 19)), st.sets(st.integers(0, 19)),
       st.dictionaries(st.tuples(st.integers(0, 19), st.sampled_from("xyz")), st.floats(1, 2), max_size=4), st.booleans())
def test_the_first_difference_by_brute_force(without_a, without_b, changes, two_symbols):
    times = pd.date_range("2023-01-01", periods=20, freq="1h", tz="UTC")
    whole = pd.DataFrame(np.random.default_rng(0).random((20, 3)), times, columns=list("xyz"))
    other = whole.copy()
    for (row, column), value in changes.items(): other.loc[times[row], column] = value
    a, b = whole.drop(times[list(without_a)]), other.drop(times[list(without_b)])
    expected = None
    for row, time in enumerate(times):
        if (row in without_a) != (row in without_b): expected = (time, None)
        elif row not in without_a: expected = next(((time, name) for name in "xyz" if whole.loc[time, name] != other.loc[time, name]), None)
        if expected: break
    if two_symbols: a, b = (pd.concat([frame.assign(symbol=name) for name in ("BTC", "ETH")]) for frame in (a, b))
    found = first_difference(a, b.iloc[::-1])
    assert (found and (found.bar, found.column)) == expected
    if two_symbols and found: assert found.symbol == "BTC"


def test_times_are_joined_whatever_their_resolution():
    journal = random_journal(5)
    other = journal.set_axis(journal.index.as_unit("ms"))
    assert first_difference(journal, other) is None and metrics(other["equity"], journal) == metrics(journal["equity"], other)


def test_a_journal_written_as_text_comes_back_with_its_bits(tmp_path):
    journal = random_journal(6)
    journal.to_csv(tmp_path / "journal.csv")
    read = pd.read_csv(tmp_path / "journal.csv", index_col="open_time", parse_dates=True)
    assert first_difference(journal, read) is None
    read.iloc[100, read.columns.get_loc("equity")] = np.nextafter(read["equity"].iloc[100], 0)
    found = first_difference(SimpleNamespace(journal=journal), SimpleNamespace(journal=read))
    assert (found.bar, found.column) == (journal.index[100], "equity") and str(found.a) != str(found.b)


def test_windows_of_observations_name_row_symbol_and_feature():
    seen = np.zeros((5, 2, 3), np.float32)
    other = seen.copy()
    other[3, 1, 0] = np.nan
    assert str(first_difference(seen, other, columns=["rsi(14)", "atr(14)", "position"])) == "first difference at row 3, column '1, rsi(14)': 0.0 against nan"


def test_a_sheet_of_a_ruined_account_and_of_one_step():
    price = np.array([100., 90., 80., 10., 10.])
    ruined = journal_of(price, np.array([0., 120., 120., 120., 120.]))
    flat = journal_of(price, np.zeros(5))
    assert ruined["equity"].iloc[-1] < 0
    sheet = TearSheet({name: SimpleNamespace(journal=journal, equity=journal["equity"]) for name, journal in (("ruined", ruined), ("flat", flat))})
    assert sheet.table().loc["Total return [%]", "ruined"] < -100 and sheet.metrics["ruined"].annual_return == -1
    assert "<img" in sheet._repr_html_()
    alone = TearSheet({"alone": SimpleNamespace(journal=flat.iloc[:1], equity=flat["equity"].iloc[:1])})
    assert alone.written().loc["Annual return [%]", "alone"] == "-" and "<img" in alone._repr_html_() and "1 step." in alone.face


def test_importing_evaluation_brings_no_plotting():
    code = "import sys, tradelab.evaluation.tearsheet; print([name for name in ('matplotlib', 'ccxt', 'torch', 'sqlalchemy', 'aiohttp') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.integration
def test_buy_and_hold_of_real_bitcoin(shared):
    candles = pd.read_parquet(shared / "data" / "BTCUSDT-perp-1h.parquet").set_index("timestamp")
    price = candles["close"].set_axis(pd.to_datetime(candles.index, unit="ms", utc=True))["2021":"2022"]
    journal = journal_of(price.to_numpy(), np.append(0., np.full(len(price) - 1, .1)), start="2021-01-01")
    found = metrics(journal["equity"], journal, "1h")
    assert len(price) == 2 * 8760 and found.round_trips == 0 and found.fills == 1
    assert found.total_return == pytest.approx((price.iloc[-1] - price.iloc[0] * 1.0005) / 100_000, rel=1e-9)
    assert found.annual_return == pytest.approx((1 + found.total_return) ** (8760 / (2 * 8760 - 1)) - 1)
