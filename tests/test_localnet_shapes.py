"Every public reply and event of localnet has the fields and the JSON types of Binance's examples and schemas"
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tradelab.events import KNOWN
from tradelab.instruments import BITCOIN
from tradelab.localnet.market import ENDPOINTS, Close, Levels, Market, Prices, Rate, Tick
from tradelab.market.candles import frame

FIXTURES = Path(__file__).resolve().parents[2] / "shared/fixtures/binance"
pytestmark = pytest.mark.skipif(not FIXTURES.exists(), reason="the shared fixtures are not here")
HOUR, START = 3_600_000, 1_640_995_200_000
SYMBOL, KLINE = {"symbol": "BTCUSDT"}, {"symbol": "BTCUSDT", "interval": "1h"}
PAIR = {"pair": "BTCUSDT", "interval": "1h", "contractType": "PERPETUAL"}

# name of the example: what is asked, and the schema of one record of the reply
REST = {
    "check_server_time": ({}, "CheckServerTimeResponse"), "exchange_information": ({}, "ExchangeInformationResponse"),
    "order_book": (SYMBOL, "OrderBookResponse"), "rpi_order_book": (SYMBOL, "RpiOrderBookResponse"),
    "recent_trades_list": (SYMBOL, "RecentTradesListResponseInner"),
    "old_trades_lookup": (SYMBOL, "OldTradesLookupResponseInner"),
    "compressed_aggregate_trades_list": (SYMBOL, "CompressedAggregateTradesListResponseInner"),
    "kline_candlestick_data": (KLINE, None), "continuous_contract_kline_candlestick_data": (PAIR, None),
    "index_price_kline_candlestick_data": (PAIR, None), "mark_price_kline_candlestick_data": (KLINE, None),
    "premium_index_kline_data": (KLINE, None), "mark_price": (SYMBOL, "MarkPriceResponse1"),
    "get_funding_rate_history": ({}, "GetFundingRateHistoryResponseInner"),
    "get_funding_rate_info": ({}, "GetFundingRateInfoResponseInner"),
    "ticker24hr_price_change_statistics": (SYMBOL, "Ticker24hrPriceChangeStatisticsResponse1"),
    "symbol_price_ticker": (SYMBOL, "SymbolPriceTickerResponse1"),
    "symbol_price_ticker_v2": (SYMBOL, "SymbolPriceTickerV2Response1"),
    "symbol_order_book_ticker": (SYMBOL, "SymbolOrderBookTickerResponse1"),
    "open_interest": (SYMBOL, "OpenInterestResponse"),
    "query_index_price_constituents": (SYMBOL, "QueryIndexPriceConstituentsResponse"),
    "asset_index": ({"symbol": "USDTUSD"}, "AssetIndexResponse1"), "adl_risk": (SYMBOL, "AdlRiskResponse1"),
    "query_insurance_fund_balance_snapshot": (SYMBOL, "QueryInsuranceFundBalanceSnapshotResponse1"),
    "trading_schedule": ({}, "TradingScheduleResponse"),
    "composite_index_symbol_information": ({}, "CompositeIndexSymbolInformationResponseInner"),
    **dict.fromkeys(("basis", "long_short_ratio", "open_interest_statistics", "quarterly_contract_settlement_price",
                     "taker_buy_sell_volume", "top_trader_long_short_ratio_accounts",
                     "top_trader_long_short_ratio_positions"), ({}, None))}
# name of the example: the stream, and the schema
STREAMS = {
    "aggregate_trade_streams": ("btcusdt@aggTrade", "AggregateTradeStreamsResponse"),
    "all_book_tickers_stream": ("!bookTicker", "AllBookTickersStreamResponse"),
    "all_market_liquidation_order_streams": ("!forceOrder@arr", "AllMarketLiquidationOrderStreamsResponse"),
    "all_market_mini_tickers_stream": ("!miniTicker@arr", "AllMarketMiniTickersStreamResponseInner"),
    "all_market_tickers_streams": ("!ticker@arr", "AllMarketTickersStreamsResponseInner"),
    "continuous_contract_kline_candlestick_streams": ("btcusdt_perpetual@continuousKline_1h",
                                                      "ContinuousContractKlineCandlestickStreamsResponse"),
    "contract_info_stream": ("!contractInfo", "ContractInfoStreamResponse"),
    "diff_book_depth_streams": ("btcusdt@depth@100ms", "DiffBookDepthStreamsResponse"),
    "individual_symbol_book_ticker_streams": ("btcusdt@bookTicker", "IndividualSymbolBookTickerStreamsResponse"),
    "individual_symbol_mini_ticker_stream": ("btcusdt@miniTicker", "IndividualSymbolMiniTickerStreamResponse"),
    "individual_symbol_ticker_streams": ("btcusdt@ticker", "IndividualSymbolTickerStreamsResponse"),
    "kline_candlestick_streams": ("btcusdt@kline_1h", "KlineCandlestickStreamsResponse"),
    "liquidation_order_streams": ("btcusdt@forceOrder", "LiquidationOrderStreamsResponse"),
    "mark_price_stream": ("btcusdt@markPrice", "MarkPriceStreamResponse"),
    "mark_price_stream_for_all_market": ("!markPrice@arr", "MarkPriceStreamForAllMarketResponseInner"),
    "partial_book_depth_streams": ("btcusdt@depth5@500ms", "PartialBookDepthStreamsResponse")}
UNSERVED = {"asset_index", "composite_index_symbol_information_streams", "trading_session_stream",
            "rpi_diff_book_depth_streams"} # streams of multi-assets mode, composite indices, stocks and RPI orders
KINDS = {"str": str, "int": int, "bool": bool, "List": list}


def read(name): return json.loads((FIXTURES / name).read_text())
def example(group, name): return read(f"binance_sdk_examples/{group}/{name}.json")
def schemas(group): return read("schemas/binance_sdk_18.0.1_fields.json")[group]


def lived():
    "An exchange whose market has seen every kind of move, and all its events"
    prices = np.full(40, 20_000.)
    candles = frame(START + np.arange(40) * HOUR, np.stack([prices, prices + 10, prices - 10, prices, prices / 100], 1))
    market = Market({"BTC/USDT:USDT": candles}, [BITCOIN],
                    {"BTC/USDT:USDT": pd.Series([.0001], pd.to_datetime([START + 8 * HOUR], unit="ms", utc=True))})
    market.wants = lambda name: True
    told = np.full((1, len(KNOWN)), np.nan)
    told[0, :5] = 20_000., 20_010., 20_000., 20_010., 2.
    begin = market.open_time
    for move in (Tick(begin, 0, 20_000., .5, True), Tick(begin + 60_000, 0, 20_010., 1.5, False),
                 Close(begin + HOUR, begin, told), Rate(begin + HOUR, 0, .0002),
                 Prices(begin + HOUR + 1, 0, 20_009., 20_008.),
                 Levels(begin + HOUR + 500, 0, [(20_009., 1.)], [(20_011., 2.)])): market.apply(move)
    market.set_status(0, "TRADING")
    market.force_order(0, -.5, 19_900., 19_905.5)
    return SimpleNamespace(market=market, clock=lambda: START, accounts={}), market.take_events()


EXCHANGE, EVENTS = lived()


def faults(said, shown, place=""):
    "Where a reply lacks a field of an example, or has another JSON type"
    if isinstance(shown, dict):
        if not isinstance(said, dict): return [f"{place}: {said!r} is no object"]
        missing = [f"{place}.{name} is missing" for name in shown if name not in said]
        return missing + [fault for name in shown if name in said
                          for fault in faults(said[name], shown[name], f"{place}.{name}")]
    if isinstance(shown, list):
        if not isinstance(said, list): return [f"{place}: {said!r} is no list"]
        return [fault for each in said for pattern in shown[:1] for fault in faults(each, pattern, f"{place}[]")]
    return [] if type(said) is type(shown) else [f"{place}: {said!r}, but an example has {shown!r}"]


def breaches(said, schema, models, place=""):
    "Where a reply lacks a field of a schema, or has another type"
    found = []
    for name, (kind, _) in models[schema].items():
        if name == "additional_properties": continue
        inner = kind.removeprefix("List[").removesuffix("]") if kind.startswith("List[") else kind
        if name not in said: found.append(f"{place}.{name} is missing")
        elif inner in models:
            for each in said[name] if inner != kind else [said[name]]:
                found += breaches(each, inner, models, f"{place}.{name}")
        elif (wanted := KINDS.get(kind.partition("[")[0])) and type(said[name]) is not wanted:
            found.append(f"{place}.{name}: {said[name]!r} is no {kind}")
    return found


def numbers(said):
    "All texts and numbers of a reply"
    if isinstance(said, dict): yield from (each for value in said.values() for each in numbers(value))
    elif isinstance(said, list): yield from (each for value in said for each in numbers(value))
    else: yield said


def path_of(name):
    rows = [line.split("\t") for line in (FIXTURES / "binance_sdk_examples/INDEX.tsv").read_text().splitlines()]
    method, path = next((row[2], row[3]) for row in rows if row[:2] == ["rest_api", name])
    return method, path.removeprefix("/fapi/")


def without_filters(models):
    "Each filter of exchangeInfo has only its own fields, although one schema lists them all"
    return {name: fields for name, fields in models.items()
            if name != "ExchangeInformationResponseSymbolsInnerFiltersInner"}


@pytest.mark.parametrize("name", REST)
def test_a_reply_has_every_field_of_the_official_example_and_schema(name):
    asked, schema = REST[name]
    reply = ENDPOINTS[path_of(name)].reply(EXCHANGE, None, asked)
    shown = [] if "kline" in name else example("rest_api", name)   # its rows are cut to one value
    if name == "exchange_information":
        filters = {key for each in reply["symbols"][0]["filters"] for key in each}
        assert filters >= set(shown["symbols"][0]["filters"][0])
        shown["symbols"][0]["filters"] = [{"filterType": "x"}]
    assert faults(reply, shown) == []
    if schema:
        for record in reply if isinstance(reply, list) else [reply]:
            assert breaches(record, schema, without_filters(schemas("rest_api"))) == []
    assert not any(text in ("nan", "inf", "-inf") or "e" in text for text in map(str, numbers(reply))
                   if text[:1] in "-0123456789ni" and text[-1:].isdigit())


def test_klines_have_twelve_values_of_the_documented_types():
    for path, asked in (("v1/klines", KLINE), ("v1/continuousKlines", PAIR), ("v1/markPriceKlines", KLINE),
                        ("v1/indexPriceKlines", PAIR), ("v1/premiumIndexKlines", KLINE)):
        rows = ENDPOINTS["GET", path].reply(EXCHANGE, None, asked)
        assert rows
        for row in rows: assert [type(value) for value in row] == [int, *[str] * 5, int, str, int, str, str, str]


def test_lists_of_all_symbols_have_the_same_records():
    for path in ("v1/premiumIndex", "v1/ticker/24hr", "v1/ticker/price", "v2/ticker/price", "v1/ticker/bookTicker",
                 "v1/symbolAdlRisk"):
        answer = ENDPOINTS["GET", path].reply
        assert answer(EXCHANGE, None, {}) == [answer(EXCHANGE, None, SYMBOL)]


@pytest.mark.parametrize("name", STREAMS)
def test_an_event_has_every_field_of_the_official_example_and_schema(name):
    stream, schema = STREAMS[name]
    sent = [event for heard, event in EVENTS if heard == stream]
    assert sent
    shown = example("websocket_streams", name)
    for event in sent:
        assert faults(event, shown) == []
        for record in event if isinstance(event, list) else [event]:
            assert breaches(record, schema, schemas("websocket_streams")) == []


def test_every_example_of_a_market_stream_is_served_or_named():
    names = {file.stem for file in (FIXTURES / "binance_sdk_examples/websocket_streams").glob("*.json")}
    assert names == set(STREAMS) | UNSERVED


def test_events_have_every_field_that_real_events_had_in_2021():
    real = {}
    for line in (FIXTURES / "cryptofeed_real_2021-07/ws.jsonl").read_text().splitlines():
        record = json.loads(line)
        real.setdefault(record["data"]["e"], record["data"])
    ours = {event["e"]: event for _, event in EVENTS if isinstance(event, dict)}
    assert set(real) <= set(ours)
    for kind, event in real.items(): assert faults(ours[kind], event) == []


def test_exchange_info_has_every_field_that_the_real_one_had_in_2021():
    real = read("cryptofeed_real_2021-07/exchangeInfo.json")
    ours = ENDPOINTS["GET", "v1/exchangeInfo"].reply(EXCHANGE, None, {})
    assert set(real) <= set(ours)
    assert faults(ours["rateLimits"], real["rateLimits"]) == []
    assert faults(ours["symbols"][0], {**real["symbols"][0], "filters": [{"filterType": "x"}]}) == []
    by_kind = {each["filterType"]: each for each in ours["symbols"][0]["filters"]}
    for each in real["symbols"][0]["filters"]:
        if each["filterType"] != "MAX_NUM_ALGO_ORDERS": assert faults(by_kind[each["filterType"]], each) == []


def test_ccxt_reads_the_exchange_info():
    ccxt = pytest.importorskip("ccxt")
    client = ccxt.binanceusdm()
    reply = ENDPOINTS["GET", "v1/exchangeInfo"].reply(EXCHANGE, None, {})
    client.fapiPublicGetExchangeInfo = lambda params=None: reply
    client.options["fetchCurrencies"] = False
    market = client.load_markets()["BTC/USDT:USDT"]
    assert market["precision"] == {"amount": .001, "price": .1, "base": 1e-8, "quote": 1e-8}
    assert market["limits"]["cost"]["min"] == BITCOIN.min_notional
    assert market["limits"]["amount"] == {"min": .001, "max": 1000.}
    assert market["active"]
