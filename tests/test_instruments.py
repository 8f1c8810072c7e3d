"""Nobody trades on bitcoin's instrument but bitcoin: what is listed or derived, and that a taker is filled where the
market is, on every road"""
import json
import warnings
from dataclasses import asdict, replace
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN, Instrument, grid
from tradelab.journal import JOURNAL
from tradelab.learn.env import MarketEnv
from tradelab.live.reconcile import StartRefusedError
from tradelab.live.start import coarse_ticks
from tradelab.localnet.server import ENDPOINTS, Localnet, Terms, make_exchange
from tradelab.localnet.sources import Replay
from tradelab.market.candles import UNNAMED, frame
from tradelab.market.filters import derived, instruments_for, keep_instrument, listed_instrument, on_grid
from tradelab.policies import buy_and_hold
from tradelab.settings import NO_STOPS, CostModel, Limits
from tradelab.sim.backtest import backtest
from tradelab.sim.prepared import prepare
from tradelab.sim.stress import stress
from tradelab.sim.sweep import sweep
from tradelab.sources.history import history
from tradelab.venues.binance_market import instrument_of
from tradelab.venues.binance_orders import format_quantity

HOUR, COSTS = 3_600_000, CostModel()
NAMES = ("XRP/USDT:USDT", "1000PEPE/USDT:USDT", "BTC/USDT:USDT", "BTC/USDC:USDC", "1000000MOG/USDC:USDC", UNNAMED)
OPEN = Limits(max_position=.5, max_leverage=2., max_drawdown=.99, max_daily_loss=None, stops=NO_STOPS)


def walk(price, seed, length=60, tick=None, step=None, spread=.01):
    "Candles around a price; on a tick and a step, or with all digits that a float has"
    random = np.random.default_rng(seed)
    closes = price * np.exp(np.cumsum(random.normal(0., spread, length)))
    opens = np.r_[price, closes[:-1]]
    prices = np.c_[opens, np.maximum(opens, closes) * 1.001, np.minimum(opens, closes) * .999, closes]
    volumes = random.uniform(1e5, 1e6, length) / price
    if tick: prices = np.maximum(np.rint(prices / tick), 1.) * grid(tick)[0] / grid(tick)[1]
    if step: volumes = np.maximum(np.rint(volumes / step), 1.) * grid(step)[0] / grid(step)[1]
    return frame(1_600_000_000_000 // HOUR * HOUR + HOUR * np.arange(length), np.c_[prices, volumes])


@st.composite
def markets(draw, length=60):
    "A symbol and its candles: a price from 1e-8 to 1e6, on a grid of three to six digits or on none"
    price = 10. ** draw(st.floats(-8., 6.))
    digits = draw(st.sampled_from((None, 3, 4, 5, 6)))
    tick = (digits and float(Decimal(draw(st.sampled_from(("1", "2.5", "5")))).scaleb(Decimal(repr(price)).adjusted()
        - digits)))
    candles = walk(price, draw(st.integers(0, 10_000)), length, tick, draw(st.sampled_from((None, 1., .001))))
    symbol = draw(st.sampled_from(NAMES))
    if symbol != UNNAMED: candles.attrs["symbol"] = symbol
    return symbol, candles


def quiet(function, *arguments, **options):
    "A coarse tick that all prices keep is warned of, which is not what these tests ask"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*arguments, **options)


def turning(index): return pd.Series(np.where(np.arange(len(index)) % 2, -1., 1.), index)


def check_taker(price, met, side, instrument):
    "A fill is where the market is, against the taker, within the spread and one tick"
    assert instrument.price_tick <= .005 * met
    assert -1e-9 * met <= side * (price - met) <= COSTS.slippage * met + instrument.price_tick * (1 + 1e-6) + 1e-9 * met
    whole = Decimal(repr(float(price))) / Decimal(repr(instrument.price_tick))
    assert abs(whole - round(whole)) < 1e-3


@settings(max_examples=60)
@given(markets(), st.sampled_from(("vectorised", "event")))
def test_a_backtest_fills_where_the_market_is(market, engine):
    symbol, candles = market
    result = quiet(backtest, turning(candles.index) if engine == "vectorised" else buy_and_hold(), candles, limits=OPEN,
                   engine=engine, baselines=())
    (instrument,), fills = result.instruments, result.fills
    assert instrument.symbol == symbol
    assert len(fills) >= (10 if engine == "vectorised" else 1)
    for quantity, price, met in fills[["quantity", "price", "market_price"]].to_numpy(float):
        check_taker(price, met, np.sign(quantity), instrument)


@settings(max_examples=30)
@given(markets())
def test_sweep_and_environment_fill_as_the_backtest_does(market):
    symbol, candles = market
    given = np.asarray(turning(candles.index))
    limits = replace(OPEN, max_participation=None, price_band=None)
    alone = quiet(backtest, pd.Series(given, candles.index), candles, limits=limits, baselines=())
    swept = quiet(sweep, lambda _, columns: columns[:, 0].copy(), candles, pd.DataFrame({"n": [1.]}),
                  pd.DataFrame({"x": given}, candles.index), limits=limits, progress=False)
    assert np.isclose(swept.runs["total_return"].iloc[0], alone.equity.iloc[-1] / 10_000 - 1, rtol=1e-9, atol=1e-12)
    market = quiet(prepare, candles, Observation(["return(1)"]), limits=limits)
    environment, ended = MarketEnv(market), False
    environment.reset(seed=0)
    while not ended:
        *_, terminated, truncated, info = environment.step(np.array([given[environment.batch.at[0]]]))
        row = np.array(info["journal"], JOURNAL)[0]
        ended = terminated or truncated
        if row["fill_quantity"]:
            met = market.arrays.candles[environment.batch.at[0], 0, 0]
            check_taker(row["fill_price"], met, np.sign(row["fill_quantity"]), alone.instruments[0])


@settings(max_examples=40)
@given(markets(), st.floats(300., 5_000.))
def test_localnet_fills_where_the_market_is_and_takes_what_a_session_rounds(market, notional):
    symbol, candles = market
    if symbol == UNNAMED: symbol = "XRP/USDT:USDT"
    source = quiet(Replay, {symbol: candles}, start=int(candles.index[10].value // 1_000_000))
    exchange = make_exchange(source, Terms(order_reply="classic"))
    exchange.step(next(source.steps()))
    (instrument,), opened = source.instruments, exchange.market.opening(0)[0]
    sent = format_quantity(notional / opened, instrument.quantity_step) # the live session's rounding
    assert float(sent) <= notional / opened * (1 + 1e-9)
    assert notional / opened - float(sent) <= instrument.quantity_step * (1 + 1e-6)
    for side in ("BUY", "SELL"):
        asked = {"symbol": exchange.market.ids[0], "side": side, "type": "MARKET", "quantity": sent}
        ENDPOINTS["POST", "v1/order"].reply(exchange, exchange.accounts["main"], asked)
        check_taker(exchange.accounts["main"].trades[-1].price, opened, 1 if side == "BUY" else -1, instrument)
    assert exchange.accounts["main"].held(0) == 0.


@settings(max_examples=80)
@given(st.integers(-12, 3), st.sampled_from(("1", "2", "2.5", "5")), st.integers(0, 10_000),
       st.sampled_from((1e-8, .001, .1, 1., 10., 1000.)))
def test_a_grid_that_is_kept_is_found(exponent, digits, seed, step):
    """The tick of four thousand prices, the step of a thousand volumes: found to the last digit, unless they are
    coarser than can be believed"""
    tick = float(Decimal(digits).scaleb(exponent))
    random = np.random.default_rng(seed)
    whole = np.sort(random.integers(3_000, 90_000, (1_000, 4)), axis=1)[:, [1, 3, 0, 2]]
    lots = random.integers(1, 10 ** 9, 1_000)
    candles = frame(HOUR * np.arange(1_000), np.c_[whole * grid(tick)[0] / grid(tick)[1],
                                                   lots * grid(step)[0] / grid(step)[1]])
    found = derived(candles, "X/USDT:USDT")
    assert found.price_tick == tick
    if step * candles["close"][:100].median() <= 150.: assert found.quantity_step == step
    else: assert found.quantity_step * candles["close"][:100].median() <= .05 or found.quantity_step == 1e-8
    assert found.max_quantity * candles["close"].min() >= 1e7
    assert found.min_notional == 5.
    assert found.origin == "derived"


def test_odd_prices_sums_and_changed_ticks():
    candles = walk(.5, 1, 5_000, .0001, .1, .001)
    odd = candles.copy()
    summed = candles.copy()
    changed = candles.copy()
    odd.iloc[7, 3] = float("0.4983271") # an averaged price among the four hundred that are looked at
    summed["volume"] = candles["volume"].rolling(24, min_periods=1).sum()                    # .1 + .2 is not .3
    changed.iloc[:1_000, :4] = np.rint(changed.iloc[:1_000, :4] * 100_000) / 100_000 + .00001
    assert [derived(each, "X").price_tick for each in (candles, summed, changed)] == [.0001, .0001, .00001]
    assert derived(odd, "X").price_tick <= .0001
    assert derived(summed, "X").quantity_step == .1
    assert derived(candles[:3], "X").price_tick <= .0005 * candles["close"][:3].min() # three candles prove nothing
    assert derived(candles.assign(volume=0.), "X").quantity_step * .5 <= .05                 # nothing was traded


@settings(max_examples=30)
@given(markets(300), st.integers(100, 290), st.floats(.5, 2.))
def test_another_future_changes_no_instrument_and_no_fill_before_it(market, at, factor):
    symbol, candles = market
    other = keep_instrument(candles, symbol).copy()                                          # as `history` does
    other.iloc[at:, :4] *= factor
    assume(candles["low"].min() / 2 > 200 * derived(candles, "X").price_tick) # beside an absurd tick all candles count
    first, second = (quiet(backtest, turning(candles.index), each, limits=OPEN, baselines=())
                     for each in (candles, other))
    assert first.instruments == second.instruments
    before = [result.fills[result.fills.index < candles.index[at]] for result in (first, second)]
    pd.testing.assert_frame_equal(*before)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(-8., 6.), st.integers(100, 290), st.floats(.5, 2.))
def test_where_no_tick_is_kept_another_future_changes_no_instrument_of_a_bare_frame(seed, exponent, at, factor):
    candles = walk(10. ** exponent, seed, 300)
    other = candles.copy()
    other.iloc[at:, :4] *= factor
    assert derived(other, "X") == derived(candles, "X")


@settings(max_examples=60)
@given(st.integers(-12, 3), st.sampled_from(("1", "2", "2.5", "5")), st.integers(0, 10_000), st.integers(1, 900),
       st.sampled_from((10, 100)))
def test_all_prices_and_volumes_keep_what_is_derived_though_a_finer_grid_came_late(exponent, digits, seed, late, finer):
    tick = float(Decimal(digits).scaleb(exponent))
    random = np.random.default_rng(seed)
    fine = float(Decimal(repr(tick)) / finer)
    whole = np.sort(random.integers(3_000, 90_000, (1_000, 4)), axis=1)[:, [1, 3, 0, 2]] * finer
    lots = random.integers(1, 10 ** 6, 1_000) * finer
    whole[-late:] += random.integers(1, finer, (late, 1))
    lots[-late:] += 1
    step = max(1e-8, 1e-4 / (tick * 30_000))
    step = float(Decimal(1).scaleb(Decimal(repr(step)).adjusted()))
    on = lambda values, size: values * grid(size)[0] / grid(size)[1]
    candles = frame(HOUR * np.arange(1_000), np.c_[on(whole, fine), on(lots, step)])
    found = derived(candles, "X/USDT:USDT")
    assert on_grid(candles.iloc[:, :4].to_numpy().ravel(), found.price_tick).all()
    assert found.price_tick >= fine
    if step > 1e-8: assert on_grid(candles["volume"].to_numpy(), found.quantity_step).all()
    kept = keep_instrument(candles, "X/USDT:USDT")
    # one instrument, wherever a part of them goes
    for part in (kept[:150], kept[500:], kept * 1.1): assert instruments_for({"X/USDT:USDT": part})[0] == found


def listed_live(candles, instrument):
    "A session's own look at the candles it warms up on"
    for notice in coarse_ticks((instrument,), candles.iloc[:, :5].to_numpy()[:, None]):
        warnings.warn(notice.text, stacklevel=1)


ROADS = {"backtest": lambda candles, one: backtest(buy_and_hold(), candles, instruments=(one,), baselines=(),
                                                   limits=OPEN), "environment": lambda candles,
                                                   one: prepare(candles, Observation(["return(1)"]), instruments=(one,
                                                                )),
         "localnet": lambda candles, one: Replay({one.symbol: candles}, instruments=(one,)), "stress": lambda candles,
         one: stress(buy_and_hold(), candles, instruments=(one,), limits=OPEN, scenarios={}),
         "sweep": lambda candles, one: sweep(lambda parameters, columns: columns[:, 0] * 0., candles,
                                             pd.DataFrame({"n": [1.]}), candles[["close"]], instruments=one,
                                             progress=False),
                                             "live": listed_live}


@pytest.mark.parametrize("road", ROADS)
@settings(max_examples=12)
@given(st.floats(-8., 6.), st.sampled_from((1e-5, 4e-4, 4.9e-4, 5.2e-4, 1e-3, 4.9e-3, 5.1e-3, .4)),
       st.sampled_from(("given", "settings", "derived", "binanceusdm", "testnet")))
def test_a_tick_above_5_basis_points_is_said_and_above_50_refused_unless_listed_on_every_road(road, exponent, share,
        origin):
    candles = walk(10. ** exponent, 5, 40)
    candles.attrs["symbol"] = "XRP/USDT:USDT"
    one = Instrument("XRP/USDT:USDT", share * float(candles["close"].min()), max(1e-4 / 10. ** exponent, 1e-8),
                     origin=origin)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try: ROADS[road](candles, one)
        except (ValueError, StartRefusedError) as error:
            assert "of the lowest price" in str(error)
            assert share > .005
            assert origin not in ("binanceusdm", "testnet")
        else: assert share <= .005 or origin in ("binanceusdm", "testnet")
    told = any("a taker pays up to that much more" in str(each.message) for each in said)
    assert told == (share > .0005 and (share <= .005 or origin in ("binanceusdm", "testnet")))


@pytest.mark.parametrize("coin", ["XRP", "BNB", "ETH", "BTC"])
def test_the_tick_and_step_of_real_perpetuals_are_those_that_binance_listed(shared, coin):
    "exchangeInfo of July 2021 beside the candles of 2021"
    listed = next(each
                  for each
                  in json.loads((shared / "fixtures/binance/cryptofeed_real_2021-07/exchangeInfo.json").read_text())[
        "symbols"] if each["symbol"] == f"{coin}USDT")
    candles = history(f"{coin}/USDT:USDT", "1h", "2021-01-01", "2021-07-22",
                      source=str(shared / f"data/{coin}USDT-perp-1h.parquet"))
    symbol = f"{coin}/USDT:USDT"
    truth = listed_instrument({"symbol": symbol, "id": f"{coin}USDT", "info": listed}, "binanceusdm")
    found = quiet(derived, candles, symbol)
    assert found.quantity_step == truth.quantity_step
    assert found.min_notional == truth.min_notional
    # its tick became coarser that spring: all prices keep the finer one
    assert found.price_tick == truth.price_tick or coin == "BNB"
    assert found.price_tick <= truth.price_tick
    assert found.max_quantity >= truth.max_quantity
    candles.attrs["symbol"] = symbol
    result = quiet(backtest, turning(candles.index[:300]), candles[:300], limits=OPEN, baselines=())
    assert len(result.fills) > 200
    assert (result.instruments[0] is BITCOIN if coin == "BTC" else result.instruments[0].price_tick == found.price_tick)
    away = (result.fills["price"] / result.fills["market_price"] - 1).abs()
    assert (away <= COSTS.slippage + result.instruments[0].price_tick / result.fills["market_price"] + 1e-12).all()


def test_a_portfolio_of_five_trades_each_symbol(shared):
    names = {"BTC/USDT:USDT": .1, "ETH/USDT:USDT": .01, "BNB/USDT:USDT": .001, "XRP/USDT:USDT": .0001,
             "1000PEPE/USDT:USDT": None}
    frames = {name: history(name, "1h", "2021-03-01", "2021-04-01",
                            source=str(shared / f"data/{name[:3]}USDT-perp-1h.parquet")) for name in list(names)[:4]}
    frames["1000PEPE/USDT:USDT"] = frames["XRP/USDT:USDT"].assign(**{column: frames["XRP/USDT:USDT"][column] / 7e6
        for column in ("open", "high", "low", "close")}, volume=frames["XRP/USDT:USDT"]["volume"] * 7e6)
    targets = pd.DataFrame({name: 1. for name in frames}, frames["BTC/USDT:USDT"].index)
    result = backtest(targets, frames, limits=replace(OPEN, max_position=.15), baselines=())
    bought = (result.fills["quantity"] * result.fills["price"]).groupby(result.fills["symbol"]).first()
    assert bought.between(1_350., 1_502.).all()
    assert set(bought.index) == set(frames) # bitcoin's minimum and largest quantity left PEPE with 0.0002 of it
    assert [each.price_tick for each in result.instruments[:4]] == list(names.values())[:4]
    assert result.instruments[0] is BITCOIN


def test_what_is_given_listed_and_set_comes_before_what_is_derived():
    cheap = walk(.227, 3)
    cheap.attrs |= {"symbol": "XRP/USDT:USDT",
                    "instrument":
                    json.loads(json.dumps(asdict(Instrument("XRP/USDT:USDT", .0001, .1, origin="binanceusdm"))))}
    assert instruments_for(cheap)[0] == Instrument("XRP/USDT:USDT", .0001, .1)
    assert instruments_for(cheap)[0].origin == "binanceusdm"
    assert instruments_for(cheap[10:50].copy())[0].price_tick == .0001 # a part of the candles knows it still
    assert instruments_for(cheap, settings={"min_notional": 20.})[0].min_notional == 20.
    mine = Instrument("XRP/USDT:USDT", .00001, 1.)
    assert backtest(buy_and_hold(), cheap, instruments=(mine,), baselines=()).instruments == (mine,)
    run = replace(mine, symbol="ETH/USDT:USDT")
    assert instruments_for(cheap, known=(run,))[0].price_tick == .0001 # a run of another symbol lends nothing


@pytest.mark.parametrize("use", [lambda candles, mine: backtest(buy_and_hold(), candles, instruments=mine),
                                 lambda candles, mine: prepare(candles, Observation(["return(1)"]), instruments=mine),
                                 lambda candles, mine: Localnet({"XRP/USDT:USDT": candles}, instruments=mine),
                                 lambda candles, mine: stress(buy_and_hold(), candles, instruments=mine),
                                 lambda candles, mine: sweep(lambda parameters, columns: columns[:, 0],
                                                             candles, pd.DataFrame({"n": [1.]}), candles[["close"]],
                                                             instruments=mine[0])],
                         ids=["backtest", "environment", "localnet", "stress", "sweep"])
def test_an_absurd_tick_is_refused_on_every_road(use):
    candles = walk(.227, 3, 300)
    candles.attrs["symbol"] = "XRP/USDT:USDT"
    with pytest.raises(ValueError, match="XRP/USDT:USDT .given.: the tick 0.1 is .*% of the lowest price 0.*: give "
                       "this symbol's own tick, or no instrument at all"):
        use(candles, (Instrument("XRP/USDT:USDT", .1, .1),))


def test_a_coarse_tick_is_said():
    candles = walk(.227, 3, 300)
    with pytest.warns(UserWarning, match="BTC/USDT:USDT .given.: the tick 0.0005 is 0.*% of the lowest price"):
        backtest(buy_and_hold(), candles, instruments=(Instrument("X", .0005, 1.),), baselines=())


def test_a_delivery_contract_is_refused():
    candles = walk(40_000., 3)
    candles.attrs["symbol"] = "BTC/USDT:USDT-261225"
    sentence = ("BTC/USDT:USDT-261225 is a delivery contract, which expires; only perpetuals are traded, such as "
                "BTC/USDT:USDT")
    with pytest.raises(ValueError, match=sentence): backtest(buy_and_hold(), candles)
    with pytest.raises(ValueError, match=sentence): prepare(candles, Observation(["return(1)"]))
    with pytest.raises(ValueError, match=sentence): Localnet({"BTC/USDT:USDT-261225": candles})
    filters = [{"filterType": "PRICE_FILTER", "tickSize": "0.1"}, {"filterType": "LOT_SIZE", "stepSize": "0.001",
        "minQty": "0.001", "maxQty": "500"}]
    with pytest.raises(ValueError, match=sentence):
        instrument_of({"id": "BTCUSDT_261225", "symbol": "BTC/USDT:USDT-261225", "info": {"filters": filters}})


def test_a_gap_in_stress_changes_no_tick():
    candles = walk(.5, 1, 400, .0001, .1)
    shown = quiet(stress, turning(candles.index), candles, limits=OPEN)
    assert len({result.instruments for result in shown.results.values()}) == 1


@pytest.mark.parametrize("symbol", ["BTCUSDT", "XRPUSDT", "DOGEUSDT"])
def test_margin_brackets_are_the_exchanges_own(shared, symbol):
    rows = json.loads((shared / "fixtures/binance/brackets/leverage_brackets.json").read_text())[symbol]
    filters = [{"filterType": "PRICE_FILTER", "tickSize": "0.1"}, {"filterType": "LOT_SIZE", "stepSize": "0.001",
        "minQty": "0.001", "maxQty": "500"}]
    found = instrument_of({"id": symbol, "symbol": f"{symbol[:-4]}/USDT:USDT", "info": {"filters": filters}},
                          [{"symbol": symbol, "brackets": rows}], "testnet")
    assert [cap for cap, _, _ in found.brackets] == [row["notionalCap"] for row in rows]
    assert found.origin == "testnet"
    if symbol == "BTCUSDT": assert found.brackets == BITCOIN.brackets
