"What was researched is what trades: a live session over real sockets, and its backtest, bit for bit"
import asyncio
import json

import numpy as np
import pytest
from pydantic import SecretStr
from test_sentence import network

from tradelab.config import VenueSettings
from tradelab.evaluation.difference import first_difference
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.live.ledger import Ledger
from tradelab.live.recorder import read, unpacked
from tradelab.live.replay import replay
from tradelab.live.session import Session
from tradelab.localnet.server import Localnet
from tradelab.market.candles import with_funding
from tradelab.market.synthetic import ar1, funding
from tradelab.runs.run import Run
from tradelab.sim.backtest import backtest
from tradelab.strategies.example import Momentum
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration
HISTORY, LIVE = 1_000, 240
FEATURES = ("return(1)", "rsi(14)", "atr(14).relative", "return(1)@4h", "rsi(5)@2h[-1]", "taker_share(3)",
            "quote_volume(8)", "time_of_day.cos", "return(1)[ETH/USDT:USDT]", "funding_rate", "basis")
WINDOW = 3
BTC, ETH = "BTC/USDT:USDT", "ETH/USDT:USDT"


@pytest.fixture(scope="module")
def market():
    candles = ar1(HISTORY + LIVE + 60, volatility=.01, seed=11)
    # a gap between two candles: the next open is not this close
    candles["open"] = (candles["open"] * (1 + .001 * np.random.default_rng(11).normal(size=len(candles)))).round(1)
    candles["high"], candles["low"] = candles[["open", "high"]].max(axis=1), candles[["open", "low"]].min(axis=1)
    candles["taker_buy_volume"] = (candles["volume"] * np.random.default_rng(12).random(len(candles))).round(3)
    candles["trades"], candles["quote_volume"] = 7., (candles["close"] * candles["volume"]).round(4)
    candles["index_price"] = (candles["close"]
                              * (1 + .001 * np.random.default_rng(13).normal(size=len(candles)))).round(2)
    watched = ar1(len(candles), volatility=.01, seed=12)
    return candles, funding(candles, seed=11), watched.assign(index_price=watched["close"])


def trade(folder, policy, candles, payments, watched, parts=(100, LIVE - 100)):
    "A live session on localnet, stopped and resumed between the parts; every input comes through a socket"
    run = Run("parity", policy, timeframe="1h")
    ledger = Ledger(f"sqlite:///{folder}/tradelab.db")
    async def session(exchange, count, first):
        venue = VenueSettings("localnet", "a test", exchange.url, exchange.url.replace("http", "ws"), SecretStr("key"),
                      SecretStr("secret"))
        name = {"id": "parity"} if first else {"resume": "parity"}
        return await Session(run.trader(instruments=(BITCOIN,)), BinanceVenue(venue), ledger, folder, origin="parity",
                             say=lambda line: None, **name).run(count)
    start = candles.index[HISTORY].value // 10**6
    with Localnet({BTC: candles, ETH: watched}, {BTC: payments}, start=start, api_key="key",
                  api_secret="secret") as exchange:
        for number, count in enumerate(parts): asyncio.run(session(exchange, count, number == 0))
    return ledger.journal("parity"), list(read(folder / "parity/recording.zst"))


def observations(lines):
    return np.array([unpacked(line["observation"]) for line in lines if line["kind"] == "decision"])


@pytest.fixture(scope="module", params=["agent", "rule"])
def session(request, market, tmp_path_factory):
    training = with_funding(market[0], market[1])[:HISTORY]
    scaler = Observation(FEATURES, WINDOW, symbols=(BTC,)).fit({BTC: training, ETH: market[2][:HISTORY]}).scaler
    policy = (network(4, features=FEATURES, window=WINDOW, scaler=scaler) if request.param == "agent"
              else Momentum(5, .005))
    folder = tmp_path_factory.mktemp(request.param)
    journal, lines = trade(folder, policy, *market)
    return policy, folder, journal, lines


def test_live_is_the_backtest(session, market):
    policy, _, journal, lines = session
    candles, payments, watched = market
    expected = backtest(policy, candles, candles.index[HISTORY], funding=payments, extra={ETH: watched},
                        keep_observations=True)
    assert len(journal) == LIVE
    assert (journal["order"] > 0).sum() >= 25
    assert (journal["order"] < 0).sum() >= 25
    assert (journal["funding"] != 0).sum() >= 10
    assert first_difference(expected.journal[:LIVE], journal) is None
    assert np.array_equal(expected.observations[:LIVE].view(np.uint32), observations(lines).view(np.uint32))


def test_replay_finds_nothing_and_finds_what_was_planted(session):
    policy, folder, _, lines = session
    assert first_difference(*replay(lines, Run("parity", policy, timeframe="1h").trader(instruments=(BITCOIN,
        )))) is None
    altered = json.loads(json.dumps(lines))
    candle = [event for line in altered if line["kind"] == "received" for event in line["events"]
              if event["type"] == "Candle" and event["symbol"] == BTC and event["values"][1] > event["values"][3]][150]
    candle["values"][3] = float(np.nextafter(candle["values"][3], np.inf))
    difference = first_difference(*replay(altered, Run("parity", policy, timeframe="1h").trader(instruments=(BITCOIN,
        ))))
    assert difference.bar.value // 10**6 == candle["open_time"]
    assert difference.column == "close"
    assert difference.b == candle["values"][3]


def test_one_altered_bit_breaks_parity(session, market, tmp_path):
    "The exchange sends a candle whose close is one bit higher than the backtest's"
    policy, _, _, _ = session
    candles, payments, watched = market
    bar, altered = candles.index[HISTORY + 30], candles.copy()
    altered.loc[bar, "close"] = np.nextafter(altered.loc[bar, "close"], 0)
    journal, _ = trade(tmp_path, policy, altered, payments, watched, parts=(40,))
    expected = backtest(policy, candles, candles.index[HISTORY], funding=payments, extra={ETH: watched})
    difference = first_difference(expected.journal[:40], journal)
    assert difference.bar == bar
    assert difference.column == "close"
    assert difference.a == candles.loc[bar, "close"]
    assert difference.b == altered.loc[bar, "close"]


def test_every_fill_is_in_the_position(session):
    _, _, journal, _ = session
    held = journal["position"].iloc[-1] + journal["fill_quantity"].iloc[-1]
    assert np.isclose(journal["fill_quantity"].sum(), held)
