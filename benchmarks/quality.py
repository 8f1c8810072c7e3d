"""What judging candles costs, as a table: `python benchmarks/quality.py`. CPU time of this process, compilation
excluded. Nothing here is a test."""
import time

from tradelab.market.candles import times
from tradelab.market.defects import with_defect
from tradelab.market.quality import QualityStream, check_quality
from tradelab.market.synthetic import realistic, traded


def cpu(call, repeat:int=3)->float:
    "The least CPU seconds of several calls"
    def once():
        begin = time.process_time()
        call()
        return time.process_time() - begin
    return min(once() for _ in range(repeat))


check_quality(realistic(500), "1h")
print(f"{'what':44} {'CPU':>10}   remark")
million = realistic(1_000_000, volatility=2e-4, timeframe="1m")
for name, market, remark in (("1,000,000 realistic candles", million, "goal 1 s"),
                             ("1,000,000 thin candles", traded(1_000_000, trades=3, volatility=2e-4, timeframe="1m"),
                              "many stand still"),
                             ("1,000,000 candles, open and high exchanged",
                              million.rename(columns={"open": "high", "high": "open"}), "every row contradicts itself"),
                             ("20,000 candles with a spike", with_defect(realistic(20_000), "spike")[0],
                              "what a fresh download takes")):
    seconds = cpu(lambda market=market: check_quality(market, "1m" if len(market) > 100_000 else "1h"))
    print(f"{name:44} {seconds * 1000:7.0f} ms   {remark}", flush=True)

rows, stamps = million.to_numpy()[:50_000], times(million)[:50_000]


def streamed():
    stream = QualityStream("1m")
    for stamp, candle in zip(stamps, rows): stream.accept(stamp, candle)


print(f"{'stream, one candle':44} {cpu(streamed) / len(rows) * 1e6:7.1f} us   mean of 50,000")
