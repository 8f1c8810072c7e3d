"A secret appears nowhere: the log of a real process that fails in every way that leaked before"
import json
import subprocess
import sys

SECRET = 'top"secret/0123456789+abc'
SIGNATURE = "c8db56825ae71d6d79447849e617115f"
LISTEN_KEY = "pqia91ma19a5s61cv6a81va65sdf19v8"

PROGRAM = f"""
import logging
from pathlib import Path
from tradelab.log import configure, get_logger, register_secret
configure()
SECRET = Path("secret").read_text()
register_secret(SECRET)
log = get_logger("live.venue")
log.info("a message with " + SECRET)
log.info("in a dictionary", request={{"headers": {{"X-MBX-APIKEY": "{SIGNATURE}"}}, "deep": [SECRET]}},
         api_key="{SIGNATURE}")
log.info("in a URL", url="https://fapi.binance.com/fapi/v1/order?symbol=BTCUSDT&signature={SIGNATURE}",
         stream="wss://x/ws?listenKey={LISTEN_KEY}")
logging.getLogger("another.library").warning("retrying %s", "https://x/y?timestamp=1&signature={SIGNATURE}")
try:
    try: raise ConnectionError("GET /fapi/v3/account?signature={SIGNATURE} failed for " + SECRET)
    except ConnectionError as error: raise RuntimeError(f"gave up: {{error!r}}") from error
except RuntimeError: log.exception("request failed")
get_logger("x").info("the last line", symbol="BTC/USDT:USDT", order_id="keeps-its-key", number=3)
"""


def test_no_secret_in_file_or_console(project):
    (project / "secret").write_text(SECRET)
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=project, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    file = (project / "logs/tradelab.jsonl").read_text()
    for text in (file, ran.stderr, ran.stdout):
        for secret in (SECRET, SECRET.replace('"', '\\"'), "0123456789+abc", SIGNATURE, LISTEN_KEY):
            assert secret not in text
    lines = [json.loads(line) for line in file.splitlines()]
    assert len(lines) == 6
    assert "RuntimeError: gave up" in lines[4]["exception"]
    assert lines[3]["logger"] == "another.library"
    assert (lines[-1] | {"timestamp": ""} == {"event": "the last line", "symbol": "BTC/USDT:USDT",
                                              "order_id": "keeps-its-key", "number": 3, "level": "info",
                                              "logger": "tradelab.x", "timestamp": ""})
    assert "the last line" in ran.stderr
    assert "RuntimeError: gave up" in ran.stderr
