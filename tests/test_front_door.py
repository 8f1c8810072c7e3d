"The front door: what its verbs return shows itself, in the same three words"
import ast
import dataclasses
import inspect
import types
import typing

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tradelab
from tradelab.evaluation.risk_report import RiskReport
from tradelab.evaluation.tearsheet import TearSheet
from tradelab.evaluation.value_at_risk import TailRisk
from tradelab.evaluation.var_backtest import var_backtest
from tradelab.market.quality import check_quality
from tradelab.market.synthetic import ar1
from tradelab.policies import buy_and_hold
from tradelab.risk.portfolio import PortfolioRisk
from tradelab.runs.run import Run
from tradelab.sections import Displayable
from tradelab.sim.backtest import backtest
from tradelab.sim.stress import late, stress
from tradelab.sim.sweep import Sweep, sweep

WORDS = ("table", "plot", "_repr_html_")
DRAWN = {"Figure": Figure, "Axes": Axes} # annotations of what is imported only where something is drawn
VERBS = [each for each in (getattr(tradelab, name) for name in tradelab.FRONT_DOOR) if inspect.isfunction(each)]
VERBS += [stress, check_quality, var_backtest, TailRisk.measures, PortfolioRisk.measures]


def classes_of(annotation):
    "The classes of the package that an annotation names"
    if inspect.isclass(annotation) and annotation.__module__.startswith("tradelab"): yield annotation
    for part in typing.get_args(annotation): yield from classes_of(part)


def returned(function):
    "The classes of the package that a function returns"
    if isinstance(function, property): function = function.fget
    hints = typing.get_type_hints(inspect.unwrap(function), localns=DRAWN) if function else {}
    return set(classes_of(hints.get("return")))


def reached():
    "Every record that verbs return, and what those hold and return in turn"
    waiting = set().union(*map(returned, VERBS))
    found = set()
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        members = [each for name, each in vars(kind).items() if not name.startswith("_")
                   and isinstance(each, (types.FunctionType, property))]
        fields = typing.get_type_hints(kind, localns=DRAWN).values() if dataclasses.is_dataclass(kind) else ()
        waiting |= set().union(*map(returned, members), *(set(classes_of(each)) for each in fields)) - found
    return found


def test_whatever_a_verb_returns_shows_itself_in_the_same_words():
    shown = {kind for kind in reached() if any(hasattr(kind, word) for word in WORDS)}
    assert {each.__name__ for each in shown} >= {"Result", "TearSheet", "Metrics", "RiskReport", "VarBacktest", "Sweep",
        "Stress", "Run", "QualityReport", "TailMeasures", "PortfolioMeasures", "StateMachine"}
    assert not [kind.__name__ for kind in shown if not all(hasattr(kind, word) for word in WORDS)]
    for kind in shown:
        hints = {word: typing.get_type_hints(inspect.unwrap(getattr(kind, word)), localns=DRAWN).get("return")
                 for word in WORDS}
        assert hints == {"table": pd.DataFrame, "plot": Figure, "_repr_html_": str}, kind
        assert isinstance(vars(kind).get("__str__", vars(kind).get("__repr__")), types.FunctionType), kind


PARTS = {"Missing": "a part of a page", "Statistics": "printed while a session runs", # and why it needs no picture
         "Regimes": "fitted, and drawn over candles that it is given"}


def test_no_other_class_shows_itself_in_part(root):
    classes = [node for path in (root / "tradelab").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.ClassDef) and node.name not in {*PARTS, "Displayable"}]
    methods = {node.name: {each.name for each in node.body if isinstance(each, ast.FunctionDef)} for node in classes}
    assert not {name for name, has in methods.items() if has & {"plot", "_repr_html_"} and not has >= set(WORDS)}


@pytest.fixture(scope="module")
def results():
    "One of each, of a few candles"
    candles = ar1(400, rho=.1, volatility=.005, seed=4)
    result = backtest(buy_and_hold(), candles, start=candles.index[60])
    targets = lambda parameters, columns: columns[:, 0] * parameters[0]
    swept = sweep(targets, candles[["close"]] / candles["close"].max(), pd.DataFrame({"size": [.5, 1.]}), candles,
                  start=candles.index[60], progress=False)
    returns = candles["close"].pct_change().dropna()
    tested = var_backtest(returns, returns * 0 + .012, returns * 0 + .014)
    return {"result": result, "tear sheet": result.tearsheet, "metrics": result.summary(), "risk": result.risk,
            "sweep": swept, "stress": stress(buy_and_hold(), candles, scenarios={"late": late}),
            "quality": check_quality(candles, "1h"), "value at risk, tested": tested}


@pytest.mark.parametrize("name", ["result", "tear sheet", "metrics", "risk", "sweep", "stress", "quality",
                                  "value at risk, tested"])
def test_a_result_is_a_table_a_figure_and_a_view(results, name):
    result = results[name]
    assert isinstance(result, Displayable)
    table = result.table()
    assert isinstance(table, pd.DataFrame)
    figure = result.plot()
    assert isinstance(figure, Figure)
    assert not plt.fignum_exists(figure.number)      # a notebook would show it twice
    assert "<table" in result._repr_html_()
    assert str(result)
    table.loc[:, :] = table.iloc[::-1].to_numpy()    # a user's own, from here on
    table["mine"] = 1
    assert "mine" not in result.table()
    assert not result.table().equals(table.drop(columns="mine")) or len(table) < 2


def test_what_follows_from_a_frozen_result_is_computed_once(results, monkeypatch):
    import tradelab.evaluation.risk_report as page
    result = results["result"]
    assert result.tearsheet is result.tearsheet
    assert result.risk is result.risk
    assert result.summary() is result.summary()
    assert result._repr_html_() is result._repr_html_()
    asked = []
    whole = page.tail_history
    monkeypatch.setattr(page, "tail_history", lambda *given: asked.append(given) or whole(*given))
    report = RiskReport(result.name, result.journal, result.equity)
    for _ in range(2): str(report), report.plot(), report._repr_html_(), report.value_at_risk("ewma", .95)
    assert len(asked) == 1


def test_a_copy_with_another_field_computes_anew(results):
    sheet = results["tear sheet"]
    said = dataclasses.replace(sheet, caption="in sample: for the test").answer
    assert "in sample: for the test" in said and said != sheet.answer
    assert isinstance(sheet, TearSheet) and dataclasses.replace(sheet) == sheet
    assert isinstance(results["sweep"], Sweep) and not issubclass(Run, Sweep)
