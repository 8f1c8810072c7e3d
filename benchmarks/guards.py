"""What guards a position between two candles, and its stop, in one table: `python benchmarks/guards.py`. The first
three scenarios are told to a core, the others are sessions on localnet over sockets; prices are synthetic"""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_guards_live import BITCOIN, Live, Quote
from test_protection import FULL, HOLDING, STOP, WIDE, localnet, run, session, standing, through

from tradelab.live.messages import Tell
from tradelab.live.order_states import protects


def told_to_a_core(*prices, quantity=100., book=None, **limits):
    "What a core that holds a position bought at 100 did at these marks"
    live = Live(quantity, **limits)
    if book: live.hear(Quote(BITCOIN, *book, 1., 1., live.now))
    live.marked(*prices)
    told = [each.notice for each in live.done if isinstance(each, Tell)]
    moves = [notice.text for notice in told if notice.kind in ("ladder", "halt")]
    return moves, [f"everything is closed: {live.core.emergency}"] if live.core.emergency else []


def happened(live):
    "What a session said of its ladder, and what it did with its stops"
    said = live.ledger.notices(live.id)
    moves = list(said["text"][said["kind"] == "ladder"])
    stops = [each for each in live.ledger.intents(live.id) if protects(each.order)]
    return moves, [f"{each.order.kind.name} {each.order.quantity:+g}: {each.message or each.state}" for each in stops]


def orphaned(folder):
    with localnet(profile="book") as exchange:
        exchange.faults.arm("orphaned_stop", after=5)
        live = session(exchange, folder, policy=HOLDING, limits=WIDE)
        run(live, 12)
        moves, did = happened(live)
        return moves, [*did, f"{len(standing(exchange))} stops stand in the end"]


SCENARIOS = {
    "a flash crash between two candles": lambda folder: told_to_a_core(100., 99.9, 84.),
    "a liquidation price approached": lambda folder: told_to_a_core(100., 90.5, 90.4, quantity=1_000.,
                                                                     max_drawdown=.999),
    "a mark price that leaves the book": lambda folder: told_to_a_core(100., 84., book=(99.99, 100.01)),
    "a stop stuck in TRIGGERING": lambda folder: happened(through([{"at": "step", "do": "stick"}], folder, 200, 5,
                                                                  policy=HOLDING, limits=WIDE)[1]),
    "an orphaned stop": orphaned,
    "a stop rejected three times": lambda folder: happened(through([STOP | {"do": "reply", "commit": False, "times": 3}
                                                                    | FULL], folder, 200, 0, policy=HOLDING,
                                                                   limits=WIDE)[1]),
}


if __name__ == "__main__":
    for name, scenario in SCENARIOS.items():
        with TemporaryDirectory() as folder: moves, did = scenario(Path(folder))
        for what, text in (*(("ladder", each) for each in moves), *(("orders", each) for each in did)):
            print(f"{name:<36} {what:<8} {text}")
            name = ""
