"What a person asks of a session from another process, over sockets: done once, or answered with why not"
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from test_live import BITCOIN, ETHER, LISTED, session

from tradelab.command import main
from tradelab.database.records import Asked, BreakerEvent
from tradelab.live.ledger import Commands, Ledger
from tradelab.live.order_states import PERSON
from tradelab.localnet.server import Localnet
from tradelab.market.candles import times
from tradelab.market.synthetic import ar1, funding
from tradelab.settings import NO_STOPS, CostModel, Limits, Reason
from tradelab.venues.binance import BinanceVenue

pytestmark = pytest.mark.integration
TURNED_AWAY = {"at": "request", "do": "reply", "times": 0, "commit": False, "lasts_ms": 600_000, "status": 503,
               "text": "<html><body>System maintenance</body></html>"}
REFUSED = {"at": "request", "do": "reply", "method": "POST", "path": "v1/order", "commit": False, "status": 400,
           "code": -4131, "msg": "The counterparty's best price does not meet the filter limit.", "times": 0}


def localnet(interval_ms=150):
    "A market that is long enough for slow machines"
    candles = ar1(3_000, seed=3)
    return Localnet({BITCOIN: candles}, {BITCOIN: funding(candles, seed=0)}, [replace(LISTED, symbol=BITCOIN)],
                    CostModel(), start=int(times(candles)[40]), interval_ms=interval_ms)


# --- the session, in a process of its own

def die(): os.kill(os.getpid(), signal.SIGKILL)


class Mortal(BinanceVenue):
    "Dies at an order that no decision wrote"
    death = ""

    async def place(self, order):
        theirs = order.slot >= PERSON.start
        if theirs and self.death == "before it is sent": die()
        answer = await super().place(order)
        if theirs and self.death == "behind it": die()
        return answer


def live(url, folder, resume, death):
    "Until it is stopped, or dies"
    Mortal.death, done = death, Commands.done

    def answered(commands, number, answer):
        done(commands, number, answer)
        if death == "before it is answered": die()
    Commands.done = answered
    waits = {"heartbeat": 20, "pause": 100, "quiet": 500, "absent_after": 1_000}
    return session(SimpleNamespace(url=url), Path(folder), Mortal, id="" if resume else "one",
                   resume="one" if resume else "", waits=waits, say=str,
                   limits=Limits(stops=NO_STOPS))


SCRIPT = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from test_words import live
asyncio.run(live({url!r}, {folder!r}, {resume!r}, {death!r}).run())
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    "A session that compiles while its market goes on begins behind it"
    with localnet(0) as exchange:
        asyncio.run(live(exchange.url, tmp_path_factory.mktemp("compiled"), False, "").run(2))


@contextmanager
def running(exchange, folder, resume=False, death=""):
    "A session that trades, in another process"
    script = SCRIPT.format(tests=str(Path(__file__).parent), url=exchange.url, folder=str(folder), resume=resume,
                           death=death)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    try: yield process
    finally:
        process.kill()
        process.communicate()


def until(fact, process):
    "What becomes true, while the session lives"
    late = time.monotonic() + 300.
    while not (found := fact()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < late, "it has not become true in five minutes"
        time.sleep(.02)
    return found


class Person:
    "Somebody in this process, which is not the session's"

    def __init__(self, exchange, folder):
        self.exchange, self.folder = exchange, folder
        self.ledger = Ledger(f"sqlite:///{folder}/tradelab.db")

    def says(self, *words):
        "What the command answers; every word has a reason"
        where = {"TRADELAB_SESSIONS": str(self.folder / "sessions"), "TRADELAB_STOP_GRACE": "600",
                 "TRADELAB_DATABASE": f"sqlite:///{self.folder}/tradelab.db"}
        return CliRunner().invoke(main, [*words, "--reason", "a test"], env=where).output.strip()

    def asks(self, name, symbol="", id="", **arguments):
        "The number of a command that nobody waits for"
        return self.ledger.commands.ask(Asked(name, "a test", "Ada", session="one", symbol=symbol, id=id,
                                              arguments=json.dumps(arguments)))

    def answer(self, number): return self.ledger.commands.find(number=number)[0]["answer"]
    def candles(self): return len(self.ledger.rows("one"))
    def held(self): return self.exchange.exchange.accounts["main"].held(0, "BOTH")

    def slots(self):
        "Of all orders at the exchange, oldest first"
        orders = self.exchange.exchange.accounts["main"].orders.values()
        return [int(order.client_id.split("-")[3]) for order in orders]

    def phase(self):
        moves = [each.state for each in self.ledger.measured("one", BreakerEvent) if each.name == "phase"]
        return moves[-1] if moves else ""

    def causes(self):
        "What restricts the session, with its symbols, by the ledger"
        ladder = next((row["ladder"] for row in self.ledger.trading_states.all()), "") or '{"active": []}'
        return [(cause, symbol) for cause, symbol, *_ in json.loads(ladder)["active"]]

    def theirs(self): return [symbol for cause, symbol in self.causes() if cause == "by_hand"]

    def ready(self):
        "Whether the session trades, and nothing restricts it"
        started = "one" in self.ledger.sessions() and self.candles() > 5
        return started and self.phase() == "trading" and not self.causes()


def hand_orders(person): return sum(slot in PERSON for slot in person.slots())


def test_words_are_done_once_while_the_session_trades(tmp_path):
    with localnet() as exchange, running(exchange, tmp_path) as process:
        person = Person(exchange, tmp_path)
        until(lambda: person.ready() and person.held(), process)
        assert f"{BITCOIN}: flat; no decision trades it until a release" in person.says("close", BITCOIN)
        sent, began = len(person.slots()), person.candles()
        until(lambda: person.candles() > began + 12, process)
        assert len(person.slots()) == sent # nothing was traded back
        assert person.held() == 0
        assert Reason.BY_HAND in set(person.ledger.journal("one")["reason"].iloc[began:])

        bought = person.says("order", BITCOIN, "buy", "0.01", "--id", "mine")
        assert "buy 0.01 BTC/USDT:USDT is filled, 0.01 is filled" in bought
        assert person.says("order", BITCOIN, "buy", "0.01", "--id", "mine") == bought
        assert hand_orders(person) == 1
        other = person.says("order", BITCOIN, "buy", "0.02", "--id", "mine")
        assert "another order: give what is new an id of its own" in other
        resting = person.says("order", BITCOIN, "buy", "0.01", "--price", "15000")
        assert "works, 0 is filled" in resting
        assert "is canceled, 0 is filled" in person.says("cancel", resting.split()[1].strip(","))
        assert person.held() == pytest.approx(.01), person.held()

        assert "reducing: nothing is opened" in person.says("state", "REDUCING")
        assert "refused: nothing is opened now: REDUCE_ONLY by person" in person.says("order", BITCOIN, "buy", "0.01")
        assert "resumed: nothing restricts it" in person.says("resume")
        assert "max_position 0.04, was 0.05" in person.says("limits", "max_position=0.04")
        assert "refused: max_position 0.05 is looser than the 0.04" in person.says("limits", "max_position=0.05")
        assert "max_position 0.045, was 0.04" in person.says("limits", "max_position=0.045", "--looser")
        assert "0.01 BTC/USDT:USDT is the policy's from its next decision on" in person.says("release", BITCOIN)
        sent = len(person.slots())
        until(lambda: len(person.slots()) > sent, process)
        assert "one has stopped" in person.says("stop")
        assert process.wait() == 0
        assert hand_orders(person) == 2
        assert all(row["answered"] for row in person.ledger.commands.all())


def test_what_cannot_be_done_is_refused_and_changes_nothing(tmp_path):
    with localnet() as exchange, running(exchange, tmp_path) as process:
        person = Person(exchange, tmp_path)
        until(person.ready, process)
        assert f"Error: {ETHER} is not traded by one, only {BITCOIN}" in person.says("close", ETHER)
        assert "no session onw is running: did you mean one?" in person.says("close", BITCOIN, "onw")
        assert "is not one of 'buy', 'sell'" in person.says("order", BITCOIN, "long", "1")
        assert "must be a number above 0, was 0.0" in person.says("order", BITCOIN, "buy", "0")
        assert not person.ledger.commands.all()
        for words, why in ((("order", BITCOIN, "buy", "0.00015"), "the quantity 0.00015 is no multiple of 0.001"),
                           (("order", BITCOIN, "buy", "0.01", "--price", "15000.03"), "the price 15000 is no multiple"),
                           (("order", BITCOIN, "buy", "9"), "the position would be "),
                           (("order", BITCOIN, "buy", "0.01", "--kind", "stop"), "a STOP needs a trigger above 0"),
                           (("cancel", "tl-none"), "no order tl-none works here"),
                           (("release", BITCOIN), f"{BITCOIN} is the policy's already"),
                           (("resume",), "no person has restricted it, there is nothing to take back"),
                           (("adopt",), "nothing waits for a person in any symbol"),
                           (("breaker-reset", "--name", "latency"), "no breaker latency is open in any symbol"),
                           (("limits", "leverage=1"), "there is no limit 'leverage' to change")):
            said = person.says(*words)
            assert "one: refused: " in said and why in said, said
        direct = [person.asks("close", ETHER), person.asks("sell"), person.asks("halt", reason="no")]
        until(lambda: all(map(person.answer, direct)), process)
        assert all(person.answer(number).startswith("refused: ") for number in direct)
        assert hand_orders(person) == 0
        assert person.theirs() == []


@pytest.mark.parametrize("death", ["before it is sent", "behind it", "before it is answered"])
def test_killed_in_the_midst_of_an_order_it_is_not_sent_again(death, tmp_path):
    with localnet() as exchange:
        person = Person(exchange, tmp_path)
        with running(exchange, tmp_path, death=death) as process:
            until(lambda: person.ready() and not person.held(), process)
            number = person.asks("order", BITCOIN, "mine", side="buy", quantity=.01)
            assert process.wait() == -signal.SIGKILL
        assert not person.answer(number)
        with running(exchange, tmp_path, resume=True) as process:
            until(lambda: person.answer(number), process)
            assert person.asks("order", BITCOIN, "mine", side="buy", quantity=.01) == number
            began = person.candles()
            until(lambda: person.candles() > began + 8, process)
        assert hand_orders(person) == (death != "before it is sent")
        if death != "before it is sent":
            assert "0.01 is filled" in person.answer(number)
            assert person.held() == .01 # and no decision has traded it back
        assert person.theirs() == [BITCOIN]


def test_killed_in_the_midst_of_a_close_it_is_not_traded_back(tmp_path):
    with localnet() as exchange:
        person = Person(exchange, tmp_path)
        with running(exchange, tmp_path, death="behind it") as process:
            until(lambda: person.ready() and person.held(), process)
            number = person.asks("close", BITCOIN)
            assert process.wait() == -signal.SIGKILL
        with running(exchange, tmp_path, resume=True) as process:
            until(lambda: person.answer(number), process)
            began = person.candles()
            until(lambda: person.candles() > began + 8, process)
        assert person.answer(number).startswith("refused: close was asked for under epoch 1 of the lease, session one ")
        assert (person.held(), person.theirs()) == (0, [BITCOIN])


def test_starting_guarded_closing_halted_and_dead_it_answers(tmp_path):
    with localnet() as exchange:
        person = Person(exchange, tmp_path)
        with running(exchange, tmp_path) as process:
            until(lambda: person.ledger.leases.of(f"localnet {exchange.url}", "main"), process) # it starts
            early = [person.asks(name, symbol) for name, symbol in (("flatten", ""), ("close", BITCOIN),
                                                                    ("release", BITCOIN), ("release", BITCOIN))]
            until(lambda: all(map(person.answer, early)), process)
            assert [person.answer(number).split()[0] for number in early] == [
                f"{BITCOIN}:", f"{BITCOIN}:", "released:", "refused:"]
            until(lambda: person.held(), process)

            exchange.faults.arm([TURNED_AWAY])
            until(lambda: person.phase() == "guarded", process)
            guarded = person.asks("order", BITCOIN, side="buy", quantity=.01)
            until(lambda: person.answer(guarded), process)
            assert "refused: the session is guarded (" in person.answer(guarded)
            exchange.faults.disarm()
            until(lambda: person.phase() == "trading", process)

            exchange.faults.arm([REFUSED])
            halt = person.asks("halt", id="enough")
            until(lambda: person.phase() == "flattening", process)
            late = [person.asks("order", BITCOIN, side="buy", quantity=.01), person.asks("limits", max_order=.01)]
            exchange.faults.disarm()
            until(lambda: all(map(person.answer, late)), process)
            assert person.answer(halt).startswith("halted: everything is closed now")
            assert person.answer(late[0]).startswith("refused: ")
            assert person.answer(late[1]).startswith("from the next decision on")
            assert (person.held(), person.phase()) == (0, "halted")
            assert "resumed: nothing restricts it" in person.says("resume")
            until(lambda: person.held(), process)
            assert "one has stopped" in person.says("stop")
        asked = len(person.ledger.commands.all())
        assert "no session is running" in person.says("close", BITCOIN)
        assert len(person.ledger.commands.all()) == asked
        for _ in range(2): assert "halted: its next session opens nothing" in person.says("halt", "--id", "night")
        assert len(person.ledger.commands.all()) == asked + 1
        assert hand_orders(person) == 0
