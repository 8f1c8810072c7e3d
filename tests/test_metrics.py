"The figures of a session that has really traded, beside what pandas and SQL make of its tables and ledger"
import asyncio
import sqlite3
import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from servers import ask, get, prometheus, until

from tradelab.config import ScheduledJob, VenueSettings
from tradelab.database.backup import backup
from tradelab.database.operations import Operations
from tradelab.database.records import JobRun, clock
from tradelab.evaluation.metrics import journal_round_trips
from tradelab.features.observation import Observation
from tradelab.inputs import venue_at
from tradelab.instruments import BITCOIN
from tradelab.live.ledger import Ledger
from tradelab.live.session import Session
from tradelab.localnet.server import Localnet
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1
from tradelab.ops.exposition import Exposition, text_of
from tradelab.ops.metrics import METRICS
from tradelab.ops.samples import Gatherer, told_now
from tradelab.policies import Policy, Scaler
from tradelab.risk.execution import OrderGate
from tradelab.settings import CostModel, Execution, Limits, Reason
from tradelab.sim.expected import ExpectedFills
from tradelab.strategies.example import Momentum
from tradelab.trader import Trader

CANDLES, SYMBOL = 200, BITCOIN.symbol
DEARER = CostModel(slippage=.0003) # than localnet, which takes .0001
RUNS = [JobRun("nightly", 1, 2, "done"), JobRun("nightly", 3, 4, "failed"), JobRun("nightly", 3, 5, "done", 2),
        JobRun("replay", 6), JobRun("replay", 4, 4, "missed")]
# of another part, of two symbols that are held, of 500 closes, or of requests that nobody has made yet
ELSEWHERE = {"events_dropped_total", "alerts_sent_total", "correlation_ratio", "api_request_seconds",
             "api_requests_total", "errors_ratio", "auth_failures_total", "clock_offset_seconds", "regime",
             "regime_accuracy_ratio"}


def sure(parameters, memory, observation, prices, answer):
    "Momentum, which is the surer the further the price has moved"
    Momentum(lookback=8, threshold=.004).function(parameters, memory, observation, prices, answer[:1])
    answer[1] = min(abs(float(observation[0, 0])) / .03, 1.)


def session_on(exchange, folder, policy, costs):
    "A session on localnet, which believes in these costs"
    venue = VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"), SecretStr("test"),
                          SecretStr("test"))
    trader = Trader(policy, Observation.from_policy(policy), OrderGate, Limits(max_position=.3), (BITCOIN,),
                    execution=Execution(protect=True))
    return Session(trader, venue_at(venue), Ledger(f"sqlite:///{folder}/tradelab.db"), folder / "sessions", id="demo",
                   timeframe="1h", waits={"heartbeat": 100}, expects=ExpectedFills(costs, (BITCOIN,)),
                   say=lambda line: None)


@pytest.fixture(scope="module")
def traded(tmp_path_factory):
    "A session that has traded: its gatherer while it lived, and another one afterwards"
    folder, market = tmp_path_factory.mktemp("traded"), ar1(700, rho=.1, volatility=.008, seed=4)
    rule = Momentum(lookback=8, threshold=.004)
    # with a scaler that changes nothing
    policy = replace(rule, function=sure, scaler=Scaler((0.,) * len(rule.features), (1.,) * len(rule.features)),
                     has_confidence=True)
    nightly = ScheduledJob("0 3 * * *", command="ledger backup", parameters={"folder": str(folder / "copies")})
    here = SimpleNamespace(database=f"sqlite:///{folder}/tradelab.db", sessions=folder / "sessions",
                           schedule={"nightly": nightly},
                           telemetry=SimpleNamespace(interval=15.), metrics_host="127.0.0.1", metrics_port=0,
                           metrics_token=None)
    with Localnet({SYMBOL: market}, instruments=[BITCOIN], api_key="test", api_secret="test",
                  start=int(times(market)[60])) as exchange:
        session, looked, go_on = session_on(exchange, folder, policy, DEARER), threading.Event(), threading.Event()

        def pause(statistics): # at a candle at which something is held, so that its risk can be told
            if statistics.candles > CANDLES - 15 and session.trader.positions["quantity"].any() and not looked.is_set():
                session.weighed = 0. # half a minute has passed
                looked.set()
                go_on.wait(60)
        session.progress = pause
        trading = threading.Thread(target=lambda: asyncio.run(session.run(CANDLES)))
        trading.start()
        gatherer = Gatherer(here)
        assert looked.wait(120)
        until(lambda: rows(here.database.removeprefix("sqlite:///"),
                           "select 1 from system_metrics where name like 'stream_age_seconds%'"))
        copied = backup(here.database, folder / "copies", clock() - 90_000)
        operations = Operations(here.database)
        operations.keep_runs(RUNS)
        gatherer.gather()
        alive = SimpleNamespace(latest=dict(gatherer.latest), histograms=dict(gatherer.histograms))
        go_on.set()
        trading.join()
        session.ledger.close()
    operations.keep_runs([replace(RUNS[3], ended=7, state="broken")])
    operations.close()
    gatherer.gather()
    yield SimpleNamespace(here=here, copied=copied, market=market,
                          alive=alive, gatherer=gatherer, folder=folder / "sessions" / "demo",
                          journal=pd.read_csv(folder / "sessions/demo/journal.csv"), ledger=folder / "tradelab.db",
                          equity=pd.read_csv(folder / "sessions/demo/equity.csv", index_col="open_time"))


def rows(file, words):
    with sqlite3.connect(file) as connection: return connection.execute(words).fetchall()


def value(traded, name, **labels):
    "The newest sample of a session"
    found = [each for each in traded.gatherer.latest.values()
             if each.name == name and labels.items() <= each.labels.items()]
    assert len(found) == 1, (name, labels, found)
    return found[0].value


def test_every_metric_of_the_table_has_a_sample_while_the_session_lives(traded):
    named = {each.name for each in traded.alive.latest.values()}
    assert set(METRICS) - named == ELSEWHERE


def test_each_sample_has_the_labels_of_its_metric(traded):
    for each in (*traded.alive.latest.values(), *traded.gatherer.latest.values()):
        assert set(each.labels) == set(METRICS[each.name].labels), each
        assert np.isfinite(each.value), each


def test_what_only_a_living_process_has_is_gone_with_it(traded):
    named = {each.name for each in traded.gatherer.latest.values()}
    assert not named & {"process_memory_bytes", "tasks", "threads", "stream_age_seconds", "uptime_seconds"}
    assert "up" not in named # it was stopped in order: nobody should be alarmed
    assert traded.alive.latest['up{session="demo"}'].value == 1.
    assert traded.alive.latest['process_memory_bytes{session="demo"}'].value > 50e6


def test_equity_and_its_ratios(traded):
    equity = traded.equity["equity"]
    returns, year = equity.pct_change().dropna(), 365 * 24
    assert len(equity) == CANDLES
    assert value(traded, "equity_quote") == equity.iloc[-1]
    assert value(traded, "drawdown_ratio") == traded.equity["drawdown"].iloc[-1]
    assert_allclose(value(traded, "return_ratio"), equity.iloc[-1] / equity.iloc[0] - 1)
    assert_allclose(value(traded, "max_drawdown_ratio"), (1 - equity / equity.cummax()).max())
    assert_allclose(value(traded, "volatility_ratio"), returns.std() * year ** .5)
    assert_allclose(value(traded, "sharpe_ratio"), returns.mean() / returns.std() * year ** .5)


def test_decisions_and_whether_they_were_right(traded):
    journal = traded.journal
    for reason, count in journal["reason"].value_counts().items():
        assert value(traded, "decisions_total", outcome=Reason(reason).name.lower()) == count
    wished = (np.sign(journal["target"]) * journal["close"].diff().shift(-1)).iloc[:-1]
    wished = wished[wished != 0]
    assert_allclose(value(traded, "prediction_accuracy_ratio"), (wished > 0).mean())


def test_orders_and_fills(traded):
    for state, count in rows(traded.ledger, "select state, count(*) from intents group by state"):
        if state not in ("intent", "sent", "unknown", "working"):
            assert value(traded, "orders_total", outcome=state) == count
    told = rows(traded.ledger, "select t.quantity, t.price, i.decision_price, i.kind, i.slot, t.fill_time "
                               "from trades t left join intents i using (session, order_id) order by sequence")
    fills = pd.DataFrame(told, columns=["quantity", "price", "decided", "kind", "slot", "time"]).astype(float)
    assert value(traded, "trades_total", symbol=SYMBOL) == len(fills)
    market = fills[(fills["kind"] == 1) & (fills["slot"] < 600)]
    slipped = (market["price"] / market["decided"] - 1) * np.sign(market["quantity"])
    buckets = traded.gatherer.histograms[f'slippage_ratio{{session="demo",symbol="{SYMBOL}"}}']
    assert sum(buckets.counts) == len(market) > 10
    assert_allclose(buckets.sum, slipped.sum())
    below = [(slipped <= bound).sum() for bound in METRICS["slippage_ratio"].bounds]
    assert list(np.cumsum(buckets.counts)[:-1]) == below
    hour = int(traded.equity.index[-1]) # of the last candle, an hour long
    assert_allclose(value(traded, "trade_frequency_per_minute"), (fills["time"] > hour).sum() / 60)


def test_fills_are_dearer_or_cheaper_than_the_cost_model_of_the_session_says(traded):
    told = rows(traded.ledger, "select t.quantity, t.price, i.decision_price from trades t join intents i using "
                               "(session, order_id) where i.kind = 1 and i.slot < 600")
    quantity, price, decided = np.array(told, float).T
    tick = np.where(quantity > 0, np.ceil(decided * 1.0003 / .1 - 1e-6), np.floor(decided * .9997 / .1 + 1e-6))
    errors = np.sign(quantity) * (price - .1 * tick) / decided
    buckets = traded.gatherer.histograms[f'slippage_model_error_ratio{{session="demo",symbol="{SYMBOL}"}}']
    assert sum(buckets.counts) == len(errors) > 10
    assert_allclose(buckets.sum, errors.sum(), rtol=1e-6)
    assert_allclose(buckets.sum / len(errors), -.0002, atol=1e-5) # localnet takes two basis points less
    assert buckets.counts[METRICS["slippage_model_error_ratio"].bounds.index(-.0001)] == len(errors)


def test_a_fill_is_expected_to_the_last_bit_where_the_exchange_has_the_same_costs(tmp_path):
    def follow(parameters, memory, observation, prices, answer): answer[0] = np.sign(observation[0, 1])
    policy, market = Policy("follow", follow, features=("return(240)", "return(1)")), ar1(400, rho=.1, seed=4)
    costs = CostModel.realistic(impact=20.)
    with Localnet({SYMBOL: market}, instruments=[BITCOIN], api_key="test", api_secret="test", costs=costs,
                  start=int(times(market)[300])) as exchange:
        session = session_on(exchange, tmp_path, policy, costs)
        asyncio.run(session.run(60))
        session.ledger.close()
    told = rows(tmp_path / "tradelab.db", "select name, value from system_metrics where name like 'slippage_model%'")
    assert len(told) > 20
    assert {name for name, _ in told} == {f'slippage_model_error_ratio{{symbol="{SYMBOL}"}}'}
    assert {float(error) for _, error in told} == {0.}


def test_confidence_is_that_of_decisions(traded):
    closes = traded.market["close"]
    moved = pd.Series((closes / closes.shift(8) - 1.).to_numpy(), times(traded.market))
    decided = moved.abs().div(.03).clip(upper=1.)[traded.journal["open_time"]]
    told = rows(traded.ledger, "select value from system_metrics where name like 'confidence%' order by number")
    kept = [float(each) for each, in told]
    assert len(set(kept)) > 1
    assert all(np.isclose(decided, each, rtol=1e-5).any() for each in kept)
    assert value(traded, "confidence_ratio", symbol=SYMBOL) == kept[-1]


def test_runs_of_jobs_and_the_newest_copy(traded):
    counted = {(each.labels["job"], each.labels["outcome"]): each.value for each in traded.gatherer.latest.values()
               if each.name == "job_runs_total"}
    for job, state, count in rows(traded.ledger, "select job, state, count(*) from job_runs group by job, state"):
        assert counted.pop((job, state)) == count
    assert counted == {("replay", "done"): 0., ("replay", "failed"): 0.}
    age = next(each for each in traded.alive.latest.values() if each.name == "backup_age_seconds")
    begun = pd.to_datetime(traded.copied.stem, format="ledger-%Y%m%dT%H%M%S.%fZ", utc=True)
    assert_allclose(age.value, (pd.Timestamp(age.time, unit="ms", tz="UTC") - begun).total_seconds())
    assert 90 < age.value < 600


def test_round_trips_are_those_of_the_journal(traded):
    trips = journal_round_trips(traded.journal.assign(time=pd.to_datetime(traded.journal["open_time"], unit="ms",
                                                                         utc=True)).set_index("time"))
    buckets = traded.gatherer.histograms[f'trade_pnl_quote{{session="demo",symbol="{SYMBOL}"}}']
    assert sum(buckets.counts) == len(trips) > 5
    assert_allclose(buckets.sum, trips["profit"].sum())
    assert_allclose(value(traded, "win_ratio"), (trips["profit"] > 0).mean())
    won, lost = trips["profit"].clip(lower=0).sum(), -trips["profit"].clip(upper=0).sum()
    assert_allclose(value(traded, "profit_factor"), won / lost)


def test_risk_is_that_of_what_is_held(traded):
    latest = {key.partition("{")[0]: each.value for key, each in traded.alive.latest.items()}
    equity, exposed = latest["equity_quote"], latest["exposure_quote"]
    assert exposed
    assert_allclose(latest["leverage_ratio"], abs(exposed) / equity)
    assert latest["positions"] == latest["concentration_ratio"] == 1.
    assert latest["margin_ratio"] > 50 # 5 % of three tenths, at most
    returns = traded.journal["close"].pct_change().dropna()
    assert 0 < latest["value_at_risk_95_ratio"] < latest["expected_shortfall_95_ratio"] < 5 * returns.std()
    assert_allclose(latest["value_at_risk_95_ratio"], 1.645 * returns.std() * latest["leverage_ratio"], rtol=.4)


def test_times_are_those_that_the_session_measured(traded):
    for name in ("candle_to_order_seconds", "order_ack_seconds", "inference_seconds", "venue_latency_seconds"):
        kept = [float(each) for each, in rows(traded.ledger, f"select value from system_metrics where name = '{name}'")]
        found = [each for each in told_now(traded.gatherer) if each["name"] == name]
        assert [each["count"] for each in found] == [len(kept)]
        assert_allclose(found[0]["value"], np.mean(kept))
        assert 0 < found[0]["value"] < 5


def test_a_gatherer_that_begins_later_counts_the_same(traded):
    later = Gatherer(traded.here)
    later.gather()
    for key, each in traded.gatherer.latest.items():
        if METRICS[each.name].kind == "counter": assert later.latest[key].value == each.value, key
    for key, each in traded.gatherer.histograms.items():
        assert later.histograms[key].counts == each.counts, key
        assert_allclose(later.histograms[key].sum, each.sum)


def test_the_text_says_what_was_gathered(traded):
    families = list(text_string_to_metric_families(text_of(traded.gatherer).decode()))
    said = {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}
    for each in traded.gatherer.latest.values():
        if METRICS[each.name].kind == "histogram": continue
        assert said["tradelab_" + each.name, frozenset(each.labels.items())] == each.value
    for each in traded.gatherer.histograms.values():
        assert said[f"tradelab_{each.metric}_count", frozenset(each.labels.items())] == sum(each.counts)


@contextmanager
def served(here, gatherer):
    "The server of figures, on a thread of its own"
    exposition, loop = Exposition(here, gatherer), asyncio.new_event_loop()
    task = loop.create_task(exposition.run())

    def serve():
        asyncio.set_event_loop(loop)
        try: loop.run_until_complete(task)
        except asyncio.CancelledError: pass
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert exposition.ready.wait(10)
        yield exposition
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def test_prometheus_scrapes_it_with_its_token(traded, tmp_path):
    here = SimpleNamespace(**vars(traded.here) | {"metrics_token": SecretStr("a token of its own")})
    with served(here, traded.gatherer) as exposition:
        config = f"""scrape_configs:
- job_name: tradelab
  scrape_interval: 200ms
  authorization: {{credentials: a token of its own}}
  static_configs: [{{targets: ["127.0.0.1:{exposition.port}"]}}]
"""
        with prometheus(config) as server:
            def query(words): return ask(f"{server.url}/api/v1/query", query=words)["data"]["result"]
            found = until(lambda: query("tradelab_equity_quote"))
            assert found[0]["metric"].items() >= {"session": "demo", "job": "tradelab"}.items()
            assert float(found[0]["value"][1]) == value(traded, "equity_quote")
            named = {each["metric"]["__name__"] for each in query('{__name__=~"tradelab_.+"}')}
            bare = {each.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for each in named}
            assert bare == {"tradelab_" + each.name for each in traded.gatherer.latest.values()}
            p99 = query("histogram_quantile(0.99, tradelab_candle_to_order_seconds_bucket)")
            assert 0 < float(p99[0]["value"][1]) <= 30
    assert exposition.requests.samples()[-1].value == 0.    # nobody came without it


def test_nobody_reads_it_without_the_token(traded):
    here = SimpleNamespace(**vars(traded.here) | {"metrics_token": SecretStr("a token of its own")})
    with served(here, traded.gatherer) as exposition:
        with pytest.raises(OSError, match="401"): get(f"http://127.0.0.1:{exposition.port}/metrics")
        assert exposition.requests.samples()[-1].value == 1.
