"Order books against what exchanges really sent: two captures of Binance, one of futures and one of spot"
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tradelab.events import Quote, Trade
from tradelab.sources.book import BookGap, BookUpdate, book_snapshot, follow_books, parse_line, read_capture

FUTURES = ("AKROUSDT", "CTKUSDT", "KEEPUSDT", "SUSHIUSDT")


@pytest.fixture
def capture(shared) -> Path:
    "Half a minute of four symbols of Binance USD-M futures, 2021-07-22"
    folder = shared / "fixtures" / "binance" / "cryptofeed_real_2021-07"
    if not folder.exists(): pytest.skip("the capture of 2021 is absent")
    return folder


@pytest.fixture
def spot(shared) -> Path:
    "Six minutes of Bitcoin on Binance's spot market, 2024-08-08"
    path = shared / "data" / "BTCUSDT-spot-l2-20240808.gz"
    if not path.exists(): pytest.skip("the capture of 2024 is absent")
    return path


def test_four_real_books_have_no_gap(capture):
    books = {}
    events = [each.message for each in follow_books(read_capture(capture), books)]
    assert not [event for event in events if isinstance(event, BookGap)]
    assert sorted(books) == sorted(FUTURES)
    assert all(book.complete and book.joined for book in books.values())
    snapshots = Counter(event.symbol for event in events if isinstance(event, BookUpdate) and event.whole)
    assert snapshots == dict.fromkeys(FUTURES, 1)
    for symbol, book in books.items():
        sent = [json.loads(line)["data"] for line in (capture / "ws.jsonl").read_text().splitlines()]
        assert book.last == [each["u"] for each in sent if each["e"] == "depthUpdate" and each["s"] == symbol][-1]


def test_the_same_from_the_files_as_they_were_recorded(capture, tmp_path):
    "A line each of the sockets and of REST, which names its symbol in the address"
    lines = [line for name in ("BINANCE_FUTURES.http.0.0", "BINANCE_FUTURES.ws.1.0")
             for line in (capture / name).read_text().splitlines() if parse_line(line)]
    lines.sort(key=lambda line: parse_line(line)[0])
    (tmp_path / "raw.jsonl").write_text("\n".join(lines))
    raw, split = {}, {}
    for path, books in ((tmp_path / "raw.jsonl", raw), (capture, split)):
        assert not [each for each in follow_books(read_capture(path), books) if isinstance(each.message, BookGap)]
    for symbol in FUTURES: assert raw[symbol].sides == split[symbol].sides


def crossed(book):
    bids, asks = book.bids(1), book.asks(1)
    return len(bids) and len(asks) and bids[0, 0] >= asks[0, 0]


def test_a_real_book_is_never_crossed(capture, spot):
    for path in (capture, spot):
        books = {}
        for each in follow_books(read_capture(path), books):
            if isinstance(each.message, BookUpdate) and each.message.last == books[each.message.symbol].last:
                assert not crossed(books[each.message.symbol])


def test_the_exchanges_own_best_prices_are_the_top_of_the_book(capture):
    "A bookTicker names the change after which it was the best price; the book at that very change has it on top"
    tops = {}
    for line in (capture / "ws.jsonl").read_text().splitlines():
        message = json.loads(line)["data"]
        if message["e"] == "bookTicker":
            tops.setdefault(message["s"], []).append((message["u"], *(float(message[each]) for each in "bBaA")))
    compared, books = 0, {}
    for each in follow_books(read_capture(capture), books):
        update = each.message
        if not isinstance(update, BookUpdate) or update.last != books[update.symbol].last: continue
        known = [top for top in tops[update.symbol] if top[0] <= update.last]
        # the newest quote speaks of this diff: the top has not changed since
        if not known or not update.first <= known[-1][0]: continue
        book = books[update.symbol]
        assert (*book.bids(1)[0], *book.asks(1)[0]) == known[-1][1:]
        compared += 1
    assert compared > 100


def test_a_lost_message_is_a_gap_and_a_snapshot_heals_it(capture):
    heard = list(read_capture(capture))
    changes = [each for each in heard if isinstance(each.message, BookUpdate) and each.message.symbol == "SUSHIUSDT"]
    books = {}
    told = [each.message for each in follow_books(changes[:100] + changes[101:], books)]
    assert [type(each) for each in told].count(BookGap) == 1
    assert not books["SUSHIUSDT"].complete
    truth = {}
    list(follow_books(changes[:150], truth))
    book = truth["SUSHIUSDT"]
    again = book_snapshot("SUSHIUSDT", {"lastUpdateId": book.last, "bids": book.bids(), "asks": book.asks()})
    healed = books["SUSHIUSDT"].take(again)
    assert [type(each) for each in healed] == [BookUpdate] * len(healed)
    list(follow_books(changes, truth := {}))
    assert books["SUSHIUSDT"].sides == truth["SUSHIUSDT"].sides


def test_spot_without_pu_has_no_gap_and_its_trades_are_all_there(spot):
    books, kinds, trades = {}, Counter(), 0.
    for each in follow_books(read_capture(spot), books):
        kinds[type(each.message).__name__] += 1
        if isinstance(each.message, Trade): trades += abs(each.message.quantity)
        if isinstance(each.message, Quote): assert each.message.bid < each.message.ask
    assert "BookGap" not in kinds
    assert kinds["Trade"] == 9757
    assert kinds["Quote"] == 28_040
    assert 3400 < kinds["BookUpdate"] <= 3452
    assert trades > 0
    assert books["BTCUSDT"].bids(1)[0, 0] == pytest.approx(61_800, rel=.02)


def test_order_does_not_matter_to_what_is_told_twice(capture):
    "Every diff twice, and the snapshot once more at the end: the same books"
    heard = list(read_capture(capture))
    once, twice = {}, {}
    list(follow_books(heard, once))
    again = [each for each in heard for _ in range(2)] + [each for each in heard if isinstance(each.message, BookUpdate)
                                                          and each.message.whole]
    assert not [each for each in follow_books(again, twice) if isinstance(each.message, BookGap)]
    assert all(np.array_equal(once[symbol].bids(), twice[symbol].bids()) for symbol in FUTURES)
