"The front door: what its verbs return shows itself in the same three words; rules trade on every road"
import ast
import dataclasses
import inspect
import math
import re
import types
import typing

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tradelab
from tradelab.evaluation.difference import first_difference
from tradelab.evaluation.risk_report import RiskReport
from tradelab.evaluation.tearsheet import TearSheet
from tradelab.evaluation.value_at_risk import TailRisk
from tradelab.evaluation.var_backtest import var_backtest
from tradelab.market.quality import check_quality
from tradelab.market.synthetic import ar1
from tradelab.policies import buy_and_hold
from tradelab.risk.portfolio import PortfolioRisk
from tradelab.runs.registry import load
from tradelab.runs.rule import Rule, rule
from tradelab.runs.run import Run, Tradable, make_trader
from tradelab.sections import Displayable, cached
from tradelab.sim.backtest import backtest
from tradelab.sim.stress import late_orders, stress
from tradelab.sim.sweep import Sweep, sweep


@rule(change="return(24)", noise="volatility(24)")
def follow(change, noise, threshold=1., size=.7):
    "The sign of the day, where it is larger than its noise; the formula has bits to lose"
    if abs(change) < threshold * noise * math.sqrt(24.) / 3.: return 0.
    return size * math.tanh(change / noise)


@rule(change="return(1)", window=5)
def turns(change, back=2): return 1. if change[-1] > np.mean(change) and change[-back] < 0. else -1.


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
    function = function.fget if isinstance(function, property) else getattr(function, "method", function)
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
                   and isinstance(each, (types.FunctionType, property, cached))]
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
         "Regimes": "fitted, and drawn over candles that it is given", "Status": "read again as things happen",
         "Report": "a list of what is wrong", "Track": "the picture of a session, beside its status",
         "Incident": "a list of what happened, beside its picture", "Day": "the same of a day",
         "SessionRecord": "beside the picture and the result of its session"}


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
    swept = sweep(targets, candles, pd.DataFrame({"size": [.5, 1.]}), candles[["close"]] / candles["close"].max(),
                  start=candles.index[60], progress=False)
    returns = candles["close"].pct_change().dropna()
    tested = var_backtest(returns, returns * 0 + .012, returns * 0 + .014)
    return {"result": result, "tear sheet": result.tearsheet, "metrics": result.summary(), "risk": result.risk,
            "sweep": swept, "stress": stress(buy_and_hold(), candles, scenarios={"late": late_orders}),
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


CANDLES = ar1(1_200, rho=.2, volatility=.006, seed=8)


@pytest.mark.parametrize("written", [follow, turns], ids=["scalars", "a window"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_rule_decides_the_same_on_every_road(written, compiled):
    made = Rule(written.written, written.features, written.window, compiled)
    kept = dict(baselines=(), keep_observations=True)
    array, event = (backtest(made, CANDLES, engine=engine, **kept) for engine in ("vectorised", "event"))
    assert first_difference(array, event) is None
    assert np.unique(array.rows["target"]).size > 1
    one = array.observations[500]
    assert made.policy.act(one)[0] == array.rows["target"][500, 0]                    # one call by itself
    seen = one[0, :len(made.features) * made.window].astype(float).reshape(made.window, -1).T
    asked = seen if made.window > 1 else seen[:, 0]
    wanted = made.written(*asked, *made.parameters.values())
    assert made.policy.act(one)[0] == (pytest.approx(wanted, rel=1e-14) if compiled else wanted)


def test_a_sweep_over_a_rule_is_its_backtests():
    values = {"threshold": [.5, 1., 1.5], "size": [.3, 1.]}
    swept = sweep(follow, CANDLES, values, progress=False).table()
    assert swept.index.names == ["threshold", "size"]
    for (threshold, size), row in swept.iterrows():
        alone = backtest(follow(threshold=threshold, size=size), CANDLES, baselines=())
        assert row["fills"] == len(alone.fills)
        assert row["total_return"] == pytest.approx(alone.equity.iloc[-1] / 10_000 - 1, rel=1e-12)


MODULE = """from tradelab import rule

@rule(change="return(24)")
def follow(change, threshold=.01):
    return 1. if change > threshold else 0.

@rule(change="return(24)", compiled=True)
def fast(change, threshold=.01):
    return 1. if change > threshold else 0.

def loose(change, threshold=.01): return 1.
"""


def test_a_rule_is_loaded_by_its_import_name(project, monkeypatch):
    monkeypatch.syspath_prepend(project)
    (project / "door_rules.py").write_text(MODULE)
    run = load("door_rules:follow(threshold=.02)")
    assert isinstance(run, Tradable)
    assert run.policy.name == "follow(threshold=0.02)"
    assert run.config["form"] == "plain"
    assert len(run.config["source_sha256"]) == 64
    assert load("door_rules:fast(.02)").config["form"] == "compiled"
    assert load("door_rules:follow").policy.parameters.tolist() == [.01]
    with pytest.raises(ValueError, match=r"rule follow: parameter 'threshold' is a finite number, was 'much'"):
        load("door_rules:follow('much')")
    with pytest.raises(LookupError, match=r"follow\(threshold=0.01\) cannot be made with \(most=1\): .*'most'"):
        load("door_rules:follow(most=1)")
    with pytest.raises(ValueError, match="door_rules:loose does not say that it makes a Policy"):
        load("door_rules:loose")
    trader = make_trader(run.policy, instruments=backtest(run, CANDLES[:100], baselines=()).instruments)
    assert trader.policy.name == run.name


def test_what_a_rule_must_not_answer_is_one_sentence():
    loud = rule(change="return(24)")(lambda change: 2.)
    blank = rule(change="return(24)")(lambda change: float("nan"))
    mute = rule(change="return(24)")(lambda change: None)
    for made, said in ((loud, r"answered \[2.0\] at the candle of .*: a target is a number in \[-1, 1\]"),
                       (blank, r"answered \[nan\] at the candle of .*: a target is a number in \[-1, 1\]"),
                       (mute, "at the candle of .*returned nothing: a rule returns its target, a number in")):
        with pytest.raises(ValueError, match=said): backtest(made, CANDLES, baselines=())
    with pytest.raises(TypeError, match=r"cannot trade <function .*: write @rule\(...\) above the function"):
        backtest(lambda change: 1., CANDLES)


DOOR = [name for name in tradelab.FRONT_DOOR if name != "TradelabError"]


def sections_of(text):
    "The sections of a docstring in numpy's style: text by title"
    parts = re.split(r"^(\w+)\n-+$", inspect.cleandoc(text), flags=re.M)
    return dict(zip(["Summary", *parts[1::2]], [parts[0].strip(), *map(str.strip, parts[2::2])], strict=True))


@pytest.mark.parametrize("name", DOOR)
def test_what_the_door_hands_out_says_what_it_takes_returns_and_raises(name):
    handed = getattr(tradelab, name)
    said = sections_of(handed.__doc__)
    assert set(said) == {"Summary", "Parameters", "Raises", "Examples"} | ({"Returns"} if inspect.isfunction(handed)
                                                                           else set())
    assert said["Summary"].endswith(".") and "\n" not in said["Summary"]
    named = re.findall(r"^(\w[^:\n]*?)(?: :|$)", said["Parameters"], re.M)
    words = sorted(word for line in named for word in re.split(r", ", line))
    assert words == sorted(inspect.signature(handed).parameters)
    assert "None" not in [line.strip() for line in said["Parameters"].splitlines()]
    assert said["Examples"].startswith(">>> ")
    compile("\n".join(line[4:] for line in said["Examples"].splitlines()), name, "exec")


def test_an_editor_finds_what_the_door_hands_out(root):
    tree = ast.parse((root / "tradelab/__init__.pyi").read_text())
    lines = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    found = {alias.asname: node.module for node in lines for alias in node.names}
    assert {name: f"tradelab.{room}" for name, room in tradelab.FRONT_DOOR.items()} == found
