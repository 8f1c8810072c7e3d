"The end of `make test`: what was skipped in all passes, and one line that adds them up as pytest would"
import json
import sys
from collections import Counter
from pathlib import Path

passes = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
skipped = sorted({tuple(one) for run in passes for one in run["skipped"]})
kinds = Counter((name.split("[")[0], reason) for name, reason in skipped)
print("\nskipped tests and cells:" if skipped else "\nno test and no cell was skipped")
for (name, reason), count in kinds.items():
    print(f"  {name}{f' ({count} times)' if count > 1 else ''}: {reason or 'no reason given'}")
counts = {kind: sum(run[kind] for run in passes) for kind in ("failed", "passed", "xfailed", "xpassed", "warnings",
                                                              "error")}
counts["skipped"] = len(skipped)
seconds = sum(run["seconds"] for run in passes)
line = ", ".join(f"{counts[kind]} {kind}" for kind in ("failed", "passed", "skipped", "xfailed", "xpassed", "warnings",
                                                       "error") if counts[kind])
print(f"{f' {line} in {seconds:.2f}s ':=^100}")
sys.exit(bool(counts["failed"] or counts["error"]))
