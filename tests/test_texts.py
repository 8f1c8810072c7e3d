"Text of others: what is shown on a page, in a picture, on a terminal and in a spreadsheet stays text"
import csv
import dataclasses
import importlib
import io
import logging
import pkgutil
import re
import unicodedata

import matplotlib.pyplot
import numpy as np
import openpyxl
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.cbook import is_math_text

import tradelab
from tradelab.account import POSITION
from tradelab.aftermath import SessionRecord
from tradelab.errors import CandleError
from tradelab.evaluation.data_snooping import data_snooping
from tradelab.evaluation.difference import LookAhead
from tradelab.evaluation.intervals import Intervals
from tradelab.evaluation.overfitting import overfitting
from tradelab.evaluation.risk_report import RiskReport
from tradelab.evaluation.stability import Degradation, Stability
from tradelab.evaluation.tearsheet import TearSheet
from tradelab.evaluation.value_at_risk import TailMeasures
from tradelab.evaluation.var_backtest import var_backtest
from tradelab.evaluation.verdict import verdict
from tradelab.export import TABLES, export
from tradelab.incident import Incident
from tradelab.instruments import BITCOIN, Instrument
from tradelab.inventory import Comparison
from tradelab.learn.folds import Attempt, Fold
from tradelab.learn.labels import forward_return
from tradelab.learn.plug_in import FittedForecast
from tradelab.learn.splits import WalkForward
from tradelab.learn.tasks import Failure
from tradelab.learn.walkforward import WalkForwardResult
from tradelab.live.doctor import Report
from tradelab.live.session import Statistics
from tradelab.live.start import Finding, Verdict
from tradelab.live.status import CommandNow, Status, Told, Waiting
from tradelab.live.venue import VenueError
from tradelab.log import formatter
from tradelab.market.candles import times
from tradelab.market.quality import check_quality
from tradelab.market.synthetic import ar1
from tradelab.notices import Notice
from tradelab.policies import Policy, buy_and_hold, flat
from tradelab.risk.breakers import BreakerEvent
from tradelab.risk.portfolio import PortfolioRisk
from tradelab.risk.trading_state import StateMachine
from tradelab.runs.forecast import LinearForecast
from tradelab.runs.run import Run
from tradelab.sections import Missing
from tradelab.settings import Limits
from tradelab.sim.backtest import backtest
from tradelab.sim.costs import Calibration
from tradelab.sim.stress import Stress
from tradelab.sim.sweep import Sweep
from tradelab.sources.tables import UnreachableError
from tradelab.sources.universe import Universe, check_listings
from tradelab.testnet_day import Day
from tradelab.texts import cell_text, figure_text, one_line, printable
from tradelab.venues.refusals import error_text

matplotlib.use("Agg")
EVIL = '<script>alert("1")</script><img src=x onerror=alert(1)> $x_$ \x1b[2J =1+1'
FORBIDDEN = re.compile(r"<\s*(script|img src=x|iframe)", re.I)


def classes():
    "Every class of the package that shows itself in a notebook"
    found = {}
    for module in pkgutil.walk_packages(tradelab.__path__, "tradelab."):
        if module.name.endswith("_modidx"): continue
        for each in vars(importlib.import_module(module.name)).values():
            if (isinstance(each, type) and each.__module__ == module.name and "_repr_html_" in vars(each)
                    and not getattr(each, "_is_protocol", False)):
                found[f"{module.name.removeprefix('tradelab.')}.{each.__name__}"] = each
    return found


@pytest.fixture(scope="module")
def run():
    "A backtest of a policy with an evil name, of two symbols with evil names, from an evil source, halted"
    frames = {f"{EVIL}{number}": ar1(300, rho=.1, seed=number) for number in (1, 2)}
    for frame in frames.values(): frame.attrs["source"] = f"synthetic {EVIL}"
    return backtest(Policy(EVIL, buy_and_hold().function), frames, limits=Limits(max_position=.5, max_drawdown=.01))


def judged():
    "What judges results, of candidates, folds and symbols with evil names"
    random = np.random.default_rng(0)
    days = pd.DataFrame(random.normal(0, .01, (300, 3)), pd.date_range("2024", periods=300, tz="UTC"),
                        [EVIL, f"{EVIL} 2", "c"])
    candles = ar1(400, seed=1)
    rows = candles.index[200:]
    fold = Fold(1, (0, 150), (150, 199), (200, 399))
    attempt = Attempt(EVIL, 1, 0, EVIL, 1., 1., 1., pd.DataFrame({"costs x1": random.normal(0, .01, 200)}, rows),
                      dict.fromkeys(("fills", "fees", "funding", "halted_share"), 0.))
    forecast = FittedForecast(LinearForecast(0., np.zeros(1)), 1., 0, .5, .1, .5, .9, .001, .01)
    return {"evaluation.data_snooping.DataSnooping": data_snooping(days, f"{EVIL} 2", draws=100),
            "evaluation.overfitting.Overfitting": overfitting(days, 4, draws=2),
            "evaluation.stability.Stability": Stability(pd.Series([1., 2.], [EVIL, "b"]), 1., 1., 1., 1., EVIL),
            "evaluation.stability.Degradation": Degradation(1., 1., 2, pd.DataFrame({
                "in_sample": [1., 2.], "out_of_sample": [0., 1.]}, [EVIL, "b"])),
            "evaluation.verdict.Verdict": verdict(days, EVIL, trials=3, baselines=(f"{EVIL} 2",), draws=100),
            "learn.labels.Labels": forward_return({EVIL: candles}, 3, "cut"), "learn.plug_in.FittedForecast": forecast,
            "learn.splits._Splitter": WalkForward(candles.index, n_splits=3),
            "learn.walkforward.WalkForwardResult": WalkForwardResult(
                (EVIL,), (), (fold,), times(candles), (attempt,), (Failure(EVIL, EVIL, EVIL),),
                pd.DataFrame({f"{EVIL} 2": 0.}, rows), {}, pd.Series(EVIL, rows), 1, EVIL, EVIL)}


@pytest.fixture(scope="module")
def shown(run, tmp_path_factory):
    "An object of each of these classes, with evil in every text that somebody else may have written"
    learnt = tmp_path_factory.mktemp("run")
    (learnt / "learning_curve.csv").write_text("step,reward\n1,0.0\n2,0.001\n")
    machine = StateMachine()
    machine.trip("person", 0, EVIL, symbol=EVIL, who=EVIL)
    returns = pd.Series(np.random.default_rng(0).normal(0, .01, 300), pd.date_range("2024", periods=300, freq="1h",
        tz="UTC"))
    candles = ar1(200, seed=1)
    candles.iloc[100, 1] = candles.iloc[100, 0] / 2
    evil = pd.DataFrame({"A": [EVIL], "B": [EVIL]}, [EVIL])
    known = dict.fromkeys(("venue", "policy", "timeframe", "origin"), EVIL) | {"symbols": [EVIL]}
    status = Status(EVIL, 0, "died", known, notices=(Told(0, "error", EVIL, EVIL),),
                    commands=(CommandNow(1, EVIL, EVIL, EVIL, EVIL, EVIL, 0, 0, EVIL),),
                    foreign=(Waiting(EVIL, 1., 1., EVIL, 0),), statistics=((EVIL, EVIL),))
    return judged() | {
            "evaluation.metrics.Metrics": run.summary(),
            "evaluation.difference.LookAhead": LookAhead(pd.DataFrame({
                "rerun": [EVIL], "cut": [returns.index[9]], "difference": [EVIL]})),
            "evaluation.intervals.Intervals": Intervals(pd.DataFrame({
                "estimate": [1.], "low": [0.], "high": [2.], "level": [.95], "unit": [EVIL]}, [EVIL]), 10, 2.),
            "inventory.Comparison": Comparison((EVIL, EVIL), evil, evil, {"A": run.equity}, EVIL),
            "sim.costs.Calibration": Calibration(.1, .01, .5, .1, 3., .9),
            "evaluation.tearsheet.TearSheet": TearSheet({EVIL: run, f"{EVIL} 2": run}, EVIL, EVIL),
            "evaluation.result.Result": run,
            "evaluation.risk_report.RiskReport": RiskReport(EVIL, run.journal, run.equity,
                                                        (BreakerEvent(0, EVIL, EVIL, EVIL, EVIL, "open", EVIL),),
                                                        machine, {symbol: EVIL for symbol in run.symbols}),
                                                        "risk.trading_state.StateMachine": machine,
            "evaluation.var_backtest.VarBacktest": var_backtest(returns, returns * 0 + .02, returns * 0 + .03),
            "evaluation.value_at_risk.TailMeasures": TailMeasures(np.zeros((5, 2, 2)), 10.),
            "risk.portfolio.PortfolioMeasures": PortfolioRisk(run.symbols, np.array([BITCOIN.row()] * 2)).measures(1e4,
        np.zeros(2, POSITION)), "sim.stress.Stress": Stress({EVIL: run}, EVIL),
        "sim.sweep.Sweep": Sweep(pd.DataFrame({"sharpe": [1., 2.]}, pd.Index([EVIL, "b"], name=EVIL)), EVIL),
            "runs.run.Run": Run(EVIL, Policy(EVIL, flat().function, features=(EVIL,)),
                                instruments=(Instrument(EVIL, .1, .001),), timeframe=EVIL,
                                folder=learnt),
            "sources.universe.Universe": Universe(check_listings(pd.DataFrame({"listed": [0], "delisted": [10**12]},
                                                                              [EVIL]), EVIL), EVIL),
            "live.status.Status": status, "aftermath.SessionRecord": SessionRecord(status, EVIL, EVIL, EVIL, EVIL,
                                                                                   (EVIL, EVIL), *4 * [evil]),
            "incident.Incident": Incident(0, 1, (EVIL,), {EVIL: EVIL}, {EVIL: EVIL}, pd.DataFrame({
                "time": [0], "source": ["notice"], "session": [EVIL], "level": ["error"], "text": [EVIL]}), evil),
            "testnet_day.Day": Day(status, 0, 1, EVIL, EVIL, [(EVIL, 0, 1, EVIL)], pd.DataFrame({
                "what": [EVIL], "begin": [0], "seconds": [1.], "why": [EVIL]}), pd.DataFrame({
                "fills": [1], "mean": [0.], "median": [0.], "worst": [0.], "modelled": [0.]}, [EVIL]), evil),
            "live.doctor.Report": Report(0, EVIL, (Finding(EVIL, Verdict.WRONG, EVIL),)),
            "live.session.Statistics": Statistics(), "sections.Missing": Missing(EVIL),
                                "market.quality.QualityReport": check_quality(candles, "1h", EVIL)}


def test_no_class_is_left_out(shown): assert set(classes()) == set(shown)


def planted(thing):
    "The same thing with evil in every field that is a text"
    texts = ([field.name for field in dataclasses.fields(thing) if isinstance(getattr(thing, field.name), str)]
             if dataclasses.is_dataclass(thing) else [])
    return dataclasses.replace(thing, **dict.fromkeys(set(texts) - {"timeframe"}, EVIL)) if texts else thing


@pytest.mark.parametrize("name", classes())
def test_what_a_notebook_shows_is_text(shown, name):
    for thing in (shown[name], planted(shown[name])):
        html = thing._repr_html_()
        assert not FORBIDDEN.search(html)
        if name not in ("evaluation.metrics.Metrics", "evaluation.value_at_risk.TailMeasures",
                        "risk.portfolio.PortfolioMeasures", "live.session.Statistics", "sim.costs.Calibration",
                        "evaluation.var_backtest.VarBacktest", "evaluation.overfitting.Overfitting",
                        "learn.plug_in.FittedForecast", "learn.splits._Splitter"):
            assert "&lt;script&gt;" in html


def test_the_page_of_a_tear_sheet_is_text(shown):
    assert not FORBIDDEN.search(shown["evaluation.tearsheet.TearSheet"].html())


@pytest.mark.parametrize("name", [name for name, each in classes().items() if hasattr(each, "plot")])
def test_a_name_with_dollars_breaks_no_picture(shown, name):
    try: figure = planted(shown[name]).plot()
    finally: matplotlib.pyplot.close("all")
    figure.savefig(io.BytesIO())


def test_names_are_text_in_the_other_pictures_too(run, shown):
    shown["evaluation.tearsheet.TearSheet"].details().savefig(io.BytesIO())
    assert "<script>" not in run.chart(run.symbols[0]).to_json()
    assert "&lt;script&gt;" in run.chart(run.symbols[0]).layout.title.text


def test_exported_cells_are_no_formulas(run, tmp_path):
    names = ("=HYPERLINK(1)", "@SUM(A1)")
    evil = dataclasses.replace(run, symbols=names, candles=dict(zip(names, run.candles.values())))
    for table in TABLES:
        with open(export(evil, tmp_path / f"{table}.csv", table), newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if cell[:1] in ("=", "@", "+", "\t", "\r")
                    or (cell[:1] == "-" and not re.fullmatch(r"-[\d.e+-]+", cell))]
    assert "'=HYPERLINK(1)" in pd.read_csv(tmp_path / "journal.csv")["symbol"].unique()
    written = pd.read_csv(tmp_path / "journal.csv")
    for name in ("close", "equity", "fee", "order"):
        assert written[name].dtype.kind in "fi"
        assert np.allclose(written[name], evil.journal[name])
    book = openpyxl.load_workbook(export(evil, tmp_path / "all.xlsx"))
    cells = [cell for sheet in book for row in sheet for cell in row]
    assert not [cell for cell in cells if cell.data_type == "f"]
    assert any(cell.value == "'=HYPERLINK(1)" for cell in cells)
    assert any(cell.data_type == "n" and (cell.value or 0) < 0 for cell in cells)


@given(st.text())
def test_a_printable_text_commands_nothing(text):
    for shown in (printable(text), one_line(text)):
        assert not [sign for sign in shown if unicodedata.category(sign) in ("Cc", "Cf", "Co", "Cs")
                    and sign not in "\n\t"]
    assert printable(printable(text)) == printable(text)
    assert "\n" not in one_line(text)


@given(st.from_regex(r"\A[a-z ]{0,9}(\x1b\[[0-9;?]{0,6}[A-Za-z]|\x1b\][0-9];[a-z:/]{0,9}(\x07|\x1b\\)|\x1b[78c=>]|"
                     r"\x9b[0-9]{0,3}[mJ]){1,4}[a-z ]{0,9}\Z"))
def test_a_sequence_goes_whole(text): assert re.fullmatch("[a-z ]*", printable(text))


@given(st.sampled_from("=+-@\t\r\n ") | st.sampled_from(["  =", "\n@", "\x00="]), st.text())
def test_no_text_is_computed_by_a_spreadsheet(start, text):
    cell = cell_text(start + text)
    assert cell.lstrip()[:1] not in tuple("=+-@") or is_number(cell)


@given(st.floats() | st.integers() | st.none() | st.booleans() | st.floats().map(repr))
def test_a_number_in_a_cell_stays_as_it_is(value): assert cell_text(value) is value or cell_text(value) == value


def is_number(text):
    try: return float(text) is not None
    except ValueError: return False


@given(st.text())
def test_a_name_is_never_a_formula_of_matplotlib(text):
    assert not is_math_text(figure_text(text))
    assert not figure_text(text).startswith("_")


def test_an_exchange_commands_no_terminal():
    said = 'binance {"code":-1102,"msg":"\x1b[2J\x1b]0;owned\x07mandatory\x1b[31m parameter"}'
    errors = (VenueError(said), UnreachableError(said), CandleError(said), error_text(Exception(said)),
              Notice("margin call", said).text)
    assert not [text for text in map(str, errors) if "\x1b" in text or "\x07" in text]
    assert error_text(Exception(said)) == "-1102 mandatory parameter"
    record = logging.LogRecord("tradelab.live", logging.WARNING, "x.py", 1, said, (),
                               (ValueError, ValueError(said), None))
    assert not [readable for readable in (True, False) if "\x1b" in formatter(readable).format(record)
                or "u001b" in formatter(readable).format(record)]
