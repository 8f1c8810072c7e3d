"""What `tradelab serve` costs a session that trades beside it, in one table: `python benchmarks/operations.py [TIMES]`.
The same session on localnet, by turns alone and beside a process that serves it with everything on: telemetry to
VictoriaMetrics and Prometheus, alerts to a webhook, Telegram, thresholds. At most 5 % more time per candle"""
import asyncio
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from servers import get, until, victoria_metrics, webhook
from telegram_double import TOKEN, telegram_double
from test_live import HISTORY, LISTED, session, times
from test_serve import served

from tradelab.database.operations import serving
from tradelab.database.records import clock
from tradelab.instruments import BITCOIN
from tradelab.localnet.server import Localnet
from tradelab.market.synthetic import ar1
from tradelab.settings import CostModel

CANDLES, MOST = 600, 1.05


def localnet():
    "A market in lockstep, long enough"
    candles = ar1(HISTORY + CANDLES + 10, seed=3)
    return Localnet({BITCOIN.symbol: candles}, {}, [LISTED], CostModel(), start=int(times(candles)[HISTORY]))


@contextmanager
def project():
    "An empty project"
    here = os.getcwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("tradelab.toml").write_text('[alerts]\nlevel = "info"\n[telegram]\nadmins = [7]\n')
        try: yield Path(folder)
        finally: os.chdir(here)


@contextmanager
def everything(folder):
    "A process that serves, once it is heard of"
    with ExitStack() as stack:
        figures, hook, telegram = (stack.enter_context(each) for each in (victoria_metrics(), webhook(),
                                                                         telegram_double()))
        process = stack.enter_context(served(
            influx_url=figures.url, alert_url=f"json://127.0.0.1:{hook.port}/", telegram_token=TOKEN,
            telegram_api=telegram.url))
        yield hook, telegram, process


def trade(beside):
    "Milliseconds of each candle, and how much of it people heard"
    with project() as folder, localnet() as exchange, ExitStack() as stack:
        live, times = session(exchange, folder, say=lambda line: None), []
        heard = stack.enter_context(everything(folder)) if beside else None
        if beside:
            until(lambda: serving(f"sqlite:///{folder}/tradelab.db", clock()))
            figures = f"http://127.0.0.1:{heard[2].port}/metrics"
            until(lambda: b"tradelab_ledger_up 1" in get(figures), 120.) # it has started, and compiled what it needs
        live.progress = lambda done: times.append(monotonic())
        asyncio.run(live.run(CANDLES))
        if beside: until(lambda: heard[0].heard and heard[1].sent)
        said = len(heard[0].heard) + len(heard[1].sent) if beside else 0
        return [1_000 * (after - before) for before, after in zip(times[20:], times[21:])], said


if __name__ == "__main__":
    alone, beside, said = [], [], 0
    trade(False)
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        alone.append(median(trade(False)[0]))
        took, more = trade(True)
        beside.append(median(took))
        said += more
    ratio = min(beside) / min(alone) # of the quietest turns: others use this machine, too
    for name, found in (("alone", alone), ("beside tradelab serve", beside)):
        print(f"{name:<24} quietest {min(found):7.2f} ms a candle   {'  '.join(f'{each:.2f}' for each in found)}")
    print(f"{'ratio':<24} {ratio:.3f}, at most {MOST}; people got {said} messages")
    sys.exit(ratio > MOST)
