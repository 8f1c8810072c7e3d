"""What the regime filter costs and how right it is: `python benchmarks/regime.py [picture.png]`. Nothing here is a
test.

Accuracy is out of the training span, beside the filter that was told the true laws. With ../shared/data it is drawn
over real Bitcoin.
"""
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from tradelab.events import COLUMNS
from tradelab.features.regime import Regimes
from tradelab.market.candles import frame, resample
from tradelab.market.synthetic import STATES, regimes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from test_regime import optimal  # noqa: E402

print("synthetic market of three states, 20,000 candles, the first half for training")
for seed in range(5):
    market, state = regimes(20_000, seed=seed)
    begin = time.perf_counter()
    fitted = Regimes().fit(market[:10_000])
    seconds = time.perf_counter() - begin
    best = (optimal(np.log(market.close / market.close.shift(1)).to_numpy()[1:], STATES, .995).argmax(axis=1)
            == state[1:])[10_000:].mean()
    ours = (fitted.read(market).regime.map({"bull": 0, "bear": 1, "sideways": 2}) == state)[10_000:].mean()
    print(f"  seed {seed}: right {ours:.1%}, best possible {best:.1%}, ratio {ours / best:.3f} (goal 0.9); fit "
          f"{seconds:.1f} s; {', '.join(fitted.present)}", flush=True)

candles, stream = np.tile(market[list(COLUMNS)].to_numpy(), (50, 1)), fitted.stream()
begin = time.process_time()
fitted.array(candles)
print(f"array form: {(time.process_time() - begin) / len(candles) * 1e9:.0f} ns a candle")
begin = time.process_time()
for candle in candles[:20_000]: stream.update(candle)
print(f"stream: {(time.process_time() - begin) / 20_000 * 1e6:.1f} us a candle")

file = ROOT.parent / "shared" / "data" / "BTCUSDT-1h.parquet"
if not file.exists(): sys.exit(f"no real data at {file}: no picture")
table = pd.read_parquet(file)
days = resample(frame(table.timestamp, table[list(COLUMNS)]), "1d")
for names in (None, ("bull", "bear", "volatile", "sideways")):
    fitted = Regimes().fit(days[:"2020-06"], shortest=10, names=names)
    print(f"\nBitcoin, daily, fitted on {fitted.fitted_on} days until June 2020", fitted.summary().to_string(),
          fitted.read(days).regime.value_counts(normalize=True).round(2).to_dict(), sep="\n")
if len(sys.argv) > 1:
    figure = fitted.plot(days)
    figure.axes[0].set_title("Bitcoin, daily: regimes as the filter tells them (fitted until June 2020)")
    figure.savefig(sys.argv[1], dpi=120)
