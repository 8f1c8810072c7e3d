"Pages, tables and pictures: the answer first, halts and stops said, nothing drawn over something else"
import itertools
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tradelab.evaluation.round_trips import round_trips_summary, written_round_trips
from tradelab.evaluation.tearsheet import TearSheet, rolling_sharpe, while_traded
from tradelab.jobs import write_page
from tradelab.market.synthetic import ar1
from tradelab.policies import buy_and_hold
from tradelab.risk.answers import STOPS_DECIDED, answered_text, halted_text, halts, in_words, stops_text
from tradelab.settings import NO_STOPS, CostModel, Limits, Reason
from tradelab.sim.backtest import SIZED, backtest
from tradelab.sim.stress import stress
from tradelab.strategies.example import Momentum

ROOT = Path(__file__).parents[1]


def journal_of(reasons, symbols=1):
    "A journal whose rules answered so"
    times = pd.date_range("2024-01-01", periods=len(reasons) // symbols, freq="1h", tz="UTC",
                          name="open_time").repeat(symbols)
    count = len(times)
    return pd.DataFrame({"symbol": [f"S{n % symbols}" for n in range(count)], "reason": reasons[:count], "value": .2,
                         "limit": .1, "drawdown": .2, "close": 1.}, times)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0, int(Reason.HALTED), int(Reason.STATE), int(Reason.STOPPED_OUT),
                                 int(Reason.STOP_LOSS)]), min_size=1, max_size=60), st.integers(1, 3))
def test_halts_cover_the_closes_that_were_halted(reasons, symbols):
    reasons = reasons * symbols
    journal = journal_of(reasons, symbols)
    found, times = halts(journal), journal.index.unique()
    for reason in (Reason.HALTED, Reason.STATE):
        closes = journal.index[journal["reason"] == reason].unique()
        spells = found[found["why"].str.startswith("halted") == (reason == Reason.HALTED)]
        covered = [time for _, row in spells.iterrows()
                   for time in times[(times >= row["from"]) & ((times < row["until"]) | pd.isna(row["until"]))]]
        assert sorted(covered) == sorted(closes)
        assert spells["share"].sum() == pytest.approx(len(closes) / len(times))
    assert halted_text(journal).startswith("never halted") == found.empty
    count = int(journal["reason"].isin(STOPS_DECIDED).sum())
    assert (stops_text(journal) == "" if not count else stops_text(journal).startswith(f"stops decided {count:,} of "
        f"{len(journal):,} "))


def test_a_journal_in_words_keeps_its_codes():
    journal = journal_of([int(reason) for reason in Reason])
    shown = in_words(journal)
    assert shown["reason"].tolist() == [reason.name.lower().replace("_", " ") for reason in Reason]
    assert journal["reason"].tolist() == [int(reason) for reason in Reason]
    assert shown["why"].iloc[0] == ""
    assert all(shown["why"].iloc[1:].str.len() > 0)


@pytest.fixture(scope="module")
def results():
    "Backtests of 300 and of 20 steps, of one symbol and of twenty, with and without a halt"
    made = {}
    for steps, symbols in itertools.product((300, 20), (1, 20)):
        frames = {f"VERYLONGNAME{n}/USDT:USDT": ar1(steps + 22, rho=.1, seed=n) for n in range(symbols)}
        made[steps, symbols] = backtest(Momentum(), frames if symbols > 1 else frames["VERYLONGNAME0/USDT:USDT"],
                                        limits=Limits(max_position=1. / symbols, max_drawdown=.01))
    return made


def overlaps(figure):
    "Pairs of texts that lie over each other, and texts that leave the figure"
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, texts = canvas.get_renderer(), []
    drawn, labels = set(), set()
    for axis in [each for axes in figure.axes for each in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            labels |= {id(tick.label1), id(tick.label2)}
            if low - 1e-9 <= tick.get_loc() <= high + 1e-9: drawn |= {id(tick.label1), id(tick.label2)}
    for text in figure.findobj(plt.Text):
        if not text.get_visible() or not text.get_text().strip() or id(text) in labels - drawn: continue
        box = text.get_window_extent(renderer)
        if box.width > 0: texts.append((text.get_text(), box))
    width, height = canvas.get_width_height()
    outside = [name for name, box in texts if box.x0 < -2 or box.y0 < -2 or box.x1 > width + 2 or box.y1 > height + 2]
    over = [(one, other) for (one, a), (other, b) in itertools.combinations(texts, 2) if min(a.x1, b.x1) - max(a.x0,
        b.x0) > 1.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1.5]
    return over, outside


@pytest.mark.parametrize("size", [(300, 1), (20, 1), (300, 20), (20, 20)], ids=str)
@pytest.mark.parametrize("picture", [lambda result: result.plot(), lambda result: result.tearsheet.details(),
                                     lambda result: result.prices()], ids=["sheet", "details", "prices"])
def test_nothing_is_written_over_something_else(results, size, picture):
    assert overlaps(picture(results[size])) == ([], [])


def test_overlaps_are_seen():
    figure, axis = plt.subplots()
    axis.text(.5, .5, "one")
    axis.text(.5, .5, "two")
    assert overlaps(figure)[0] == [("one", "two")]
    plt.close(figure)


@pytest.mark.parametrize("size", [(300, 1), (20, 20)], ids=str)
def test_the_answer_comes_first(results, size):
    result = results[size]
    for page in (result._repr_html_(), result.tearsheet.html()):
        places = [page.index(words)
                  for words in ("where buying and holding "
                                f"{'made' if result.baselines['buy and hold'].summary().total_return >= 0 else 'lost'}",
                                "<img", "<table", "Total return")]
        assert places == sorted(places)
        assert page.count("<mark>SYNTHETIC prices</mark>") == 1
        assert "WITHOUT funding" in page
    made = result.summary().total_return
    assert f"{'Made' if made >= 0 else 'Lost'} {abs(100 * made):,.2f} %" in str(result).splitlines()[1]
    assert "nothing was fitted" in str(result).splitlines()[1]


def test_every_halt_is_on_every_page(results):
    result = results[300, 1]
    halted = {name: halts(each.journal) for name, each in result.tearsheet.results.items()}
    assert len(halted[SIZED])
    assert not len(halted["buy and hold"])
    assert not len(halted["flat"])
    for page in (result._repr_html_(), result.tearsheet.html(), str(result)):
        for name, rows in halted.items():
            for row in rows.itertuples():
                for word in (f"{row[1]:%Y-%m-%d %H:%M}", row.why, f"{100 * row.drawdown:.2f}"):
                    assert word in page, name
    labels = [text.get_text() for text in result.plot().legends[0].get_texts()]
    assert f"{SIZED}, halted {halted[SIZED]['from'][0]:%Y-%m-%d}" in labels


def test_a_result_without_baselines_is_held_against_the_market(results):
    alone = TearSheet({"live": SimpleNamespace(equity=results[300, 1].equity, journal=results[300, 1].journal)},
                      "session x")
    closes = results[300, 1].journal["close"]
    assert (f"the market {'made' if closes.iloc[-1] >= closes.iloc[0] else 'lost'} "
            f"{abs(100 * (closes.iloc[-1] / closes.iloc[0] - 1)):.2f} % before costs; session x;" in alone.answer)


def test_ruin_is_in_the_answer():
    candles = ar1(300, rho=.1, seed=1)
    candles.iloc[150:, :4] *= .2
    result = backtest(buy_and_hold(), candles, limits=Limits(max_position=5., max_leverage=5., leverage=20,
                                                             min_margin_ratio=0., max_daily_loss=None, max_drawdown=1.),
                                                             baselines=())
    assert (result.equity <= 0).any() == ("RUINED" in result.tearsheet.answer)


def test_several_symbols_say_their_sources_and_their_funding():
    frames = {f"{name}/USDT:USDT": ar1(100, rho=.1, seed=n) for n, name in enumerate("ABCDE")}
    rates = pd.Series(.0001, pd.date_range("2024-01-01", periods=10, freq="8h", tz="UTC"))
    frames["A/USDT:USDT"].attrs["source"] = "file a.csv"
    some = backtest(Momentum(), frames, funding={"A/USDT:USDT": rates}).tearsheet.full_caption
    assert "SYNTHETIC prices: synthetic" in some
    assert "; and 2 more." in some
    assert "WITHOUT funding: no rates were given for B/USDT:USDT and 3 more." in some
    assert "Net of costs." in backtest(Momentum(), frames, funding=dict.fromkeys(frames, rates)).tearsheet.full_caption
    assert "Net of costs." in backtest(Momentum(), {"A/USDT": frames["B/USDT:USDT"]}).tearsheet.full_caption
    assert "WITHOUT funding: the costs say so" in backtest(Momentum(), frames, funding=dict.fromkeys(frames, rates),
                                                           costs=CostModel(funding=False)).tearsheet.full_caption
    assert "SYNTHETIC prices" in stress(Momentum(), frames, scenarios={}).caption
    assert "WITHOUT funding" in stress(Momentum(), frames, scenarios={}).caption


def test_a_page_ends_with_its_parameters_and_wraps_its_cells(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# Job"), nbformat.v4.new_code_cell("policy = 'asked'",
        metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("policy = 'given'",
        metadata={"tags": ["injected-parameters"]}),
             nbformat.v4.new_code_cell("hidden_code()", outputs=[nbformat.v4.new_output("stream", text="the answer")])]
    cells.append(nbformat.v4.new_code_cell("result", metadata={"tags": ["answer"]},
                                           outputs=[nbformat.v4.new_output("stream", text="made or lost")]))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "job.ipynb")
    page = write_page(tmp_path / "job.ipynb").read_text()
    body = page[page.index("<main"):] if "<main" in page else page[page.index("<body"):]
    words = re.sub(r"<[^>]+>", "", body)
    assert words.index("Job") < words.index("made or lost") < words.index("the answer") < words.index(
        "Parameters") < words.index("asked") < words.index("given")
    assert "hidden_code" not in words
    assert "overflow-wrap" in page
    assert [cell.source for cell in nbformat.read(tmp_path / "job.ipynb", 4).cells] == [cell.source for cell in cells]


def test_written_trades_are_the_last_ones(results):
    trips = results[300, 20].round_trips
    shown = written_round_trips(trips, 5)
    assert len(shown) == 5
    assert shown.attrs["of"] == len(trips)
    assert shown["Profit [quote]"].tolist() == [f"{value:,.2f}" for value in trips["profit"].tail(5)]
    assert np.isin(shown["Side"], ("long", "short")).all()
    assert answered_text(results[300, 20].journal)


def test_a_stress_says_who_was_halted():
    made = stress(Momentum(), ar1(300, rho=.1, seed=0), limits=Limits(max_position=1., max_drawdown=.01), scenarios={})
    first = made.results["as it was"]
    assert len(halts(first.journal)) == 1
    for page in (made._repr_html_(), str(made)): assert f"as it was: {halted_text(first.journal)}" in page
    assert made.plot().axes[0].get_legend().get_texts()[0].get_text() == "as it was, halted"


@pytest.mark.parametrize("job", ["backtest", "report", "live", "drill", "watch", "dashboard", "session_report",
                                 "incident", "testnet_day", "walkforward"])
def test_a_job_says_which_cell_is_its_answer(root, job):
    assert sum("answer" in cell.metadata.get("tags", []) for cell in nbformat.read(root / f"nbs/{job}.ipynb",
        4).cells) == 1


@pytest.mark.parametrize("job", ("train", "backtest", "live", "replay", "report", "drill", "watch",
                                 "dashboard", "session_report", "walkforward"))
def test_the_lab_saves_a_job_as_it_is_kept(job):
    "What Run All has added is left out, so that git sees no change"
    strip = runpy.run_path(str(ROOT / ".ci/jupyter_server_config.py"))["strip"]
    path = ROOT / "nbs" / f"{job}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for count, cell in enumerate(each for each in notebook.cells if each.cell_type == "code"):
        cell.outputs = [nbformat.v4.new_output("stream", text="done")]
        cell.execution_count = count + 1
        cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7"}
    model = {"type": "notebook", "content": notebook}
    strip(model, path.name)
    assert nbformat.writes(nbformat.from_dict(model["content"]), nbformat.NO_CONVERT) + "\n" == path.read_text()
    page = {"type": "notebook", "content": {"cells": [{"cell_type": "code", "outputs": [1]}]}}
    strip(page, "index.ipynb"), strip(page, "00_ground/01_compiled.ipynb")
    assert page["content"]["cells"][0]["outputs"] == [1]                        # a page keeps what it shows


def test_a_trade_that_a_rule_closed_says_which():
    candles = ar1(600, rho=.1, volatility=.02, seed=4)
    result = backtest(buy_and_hold(), candles, limits=Limits(max_position=.9, max_leverage=1., max_drawdown=.99),
                      baselines=())
    decided = {reason.name.lower().replace("_", " ") for reason in STOPS_DECIDED}
    by_rule = result.round_trips[result.round_trips["left_by"].isin(decided)]
    rows = result.journal[(result.journal["order"] != 0) & (result.journal["reason"] != Reason.STOPPED_OUT)]
    assert len(by_rule)
    assert "market" not in set(result.round_trips["left_by"]) # who holds for ever leaves by a rule only
    for trip in by_rule.itertuples():
        assert rows[rows.index < trip.exit_time]["reason"].iloc[-1] == Reason[trip.left_by.upper().replace(" ", "_")]
    named = round_trips_summary(result.round_trips).partition("left by ")[2].split()[0]
    assert named in {word.split()[0] for word in decided}


def test_a_rolling_ratio_ends_where_trading_was_halted():
    candles = ar1(2_400, volatility=.006, seed=11)
    result = backtest(buy_and_hold(), candles, limits=Limits(max_position=.9, max_leverage=1., max_drawdown=.2,
                                                             stops=NO_STOPS), baselines=())
    halted = halts(result.journal)
    ratio = while_traded(rolling_sharpe(result.equity, 5), halted)
    assert len(halted) == 1
    assert pd.isna(halted["until"][0])
    assert ratio[:halted["from"][0]].notna().sum() > 24
    assert ratio[halted["from"][0]:].iloc[1:].isna().all()
    figure = result.tearsheet.details()
    line, cross = (next(each for each in figure.axes[0].lines if (each.get_marker() == "X") == crossed)
                   for crossed in (False, True))
    assert len(cross.get_xdata()) == 1
    assert line.get_label().endswith(f", halted {halted['from'][0]:%Y-%m-%d}")
    assert np.isfinite(line.get_ydata()).any()
    assert pd.Series(line.get_xdata())[np.isfinite(line.get_ydata())].iloc[-1] <= cross.get_xdata()[0]


def test_a_ratio_is_none_while_nothing_moves():
    equity = ar1(2_400, seed=1)["close"].rename("x")
    equity.iloc[1_000:] = equity.iloc[999]
    rolled = rolling_sharpe(equity, 5, "1h")
    assert rolled.iloc[1_000 + 121:].isna().all()
    assert rolled.iloc[200:1_000].notna().all()
