"""A secret appears nowhere: in the log of a real process that fails in every way that leaked before, in whatever a text
makes of it, in what a job leaves. And the log as it is read"""
import asyncio
import json
import logging
import signal
import subprocess
import sys
from base64 import b64encode
from html import escape
from urllib.parse import quote, quote_plus

import nbformat
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from markupsafe import escape as escape_in_page

from tradelab import log
from tradelab.config import settings
from tradelab.live.ledger import Ledger
from tradelab.live.order_states import decision_id
from tradelab.live.session import Session
from tradelab.live.trace import trace
from tradelab.log import HIDDEN, SharedFile, configure, formatter, redact, redact_split, register_secret, unfinished
from tradelab.log_lines import Wanted, lines
from tradelab.market.synthetic import ar1
from tradelab.runs.run import Run
from tradelab.sim.prepared import market_data
from tradelab.strategies.example import Momentum
from tradelab.venues.memory import MemoryVenue

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
    (project / "tradelab.toml").write_text('log_console = "human"')
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


def plant(*secrets):
    "Register these, and forget all others"
    log._registered.clear()
    for each in secrets or ["-" * 8]: register_secret(each)


@pytest.fixture(autouse=True)
def forgotten():
    "What a test registers is no secret of the next one"
    before = [*log._registered]
    yield
    plant(*before)


SIGNS = st.characters(min_codepoint=33, max_codepoint=0x2FF, categories=("L", "N", "P", "S"))
SECRETS = st.text(SIGNS, min_size=8, max_size=40).filter(lambda word: not set(word) <= set("[redacted]"))
WRITTEN = (str, repr, json.dumps, lambda word: json.dumps(word, ensure_ascii=False), lambda word: quote(word, safe=""),
           quote, quote_plus, escape, lambda word: str(escape_in_page(word)), lambda word: json.dumps(json.dumps(word)),
           lambda word: escape(json.dumps(word)), lambda word: b64encode(word.encode()).decode(),
           lambda word: word.encode().hex())
PLAIN = st.text("abc xyz.,;=/&<>\"'\n{}[]", max_size=30)


@effort(max_examples=150)
@given(st.lists(SECRETS, min_size=1, max_size=3, unique=True), PLAIN, PLAIN, st.sampled_from(WRITTEN))
def test_a_registered_secret_survives_in_no_spelling(secrets, before, behind, written):
    plant(*secrets)
    for each in secrets:
        said = redact(before + written(each) + behind)
        assert each not in said
        assert written(each) not in said
        assert written(each).strip("\"'") not in said


@effort(max_examples=100)
@given(SECRETS, st.data())
def test_a_secret_in_pieces_survives_in_no_order_of_prints(secret, data):
    plant(secret)
    places = sorted(data.draw(st.lists(st.integers(0, len(secret)), max_size=4)))
    pieces = [secret[begin:end] for begin, end in zip([0, *places], [*places, len(secret)])]
    breaks = data.draw(st.sampled_from(["", "\n"]))
    said = redact_split(["begin ", *(piece + breaks for piece in pieces), " end"])
    assert secret not in "".join(said).replace("\n", "")
    assert said[0].startswith("begin")
    assert said[-1].endswith("end")
    shown, held = "", ""
    for piece in ("begin ", *pieces, " end"):
        held += piece
        cut = len(held) - unfinished(held)
        shown, held = shown + redact(held[:cut]), held[cut:]
    assert secret not in shown + redact(held)


ORDINARY = st.lists(st.sampled_from(["equity 10,000.00", "BTC/USDT:USDT", "+0.012 at 43,210.5", "2026-11-30T12:00:00Z",
                                     "tl-0123456789abcd-lk3j2l3a-0-0", "drawdown 1.20%", "http://127.0.0.1:8000/metrics",
                                     "order filled", "max_position=0.02", "the key is kept", "\n", "12:30:45",
                                     "sqlite:///tradelab.db", "<td>price</td>", '{"price": 1.5}', "a@b.c",
                                     "postgresql://db:5432/tradelab"]), max_size=8)


@given(ORDINARY, SECRETS)
def test_ordinary_text_stays(words, secret):
    text = " ".join(words)
    plant(*[secret] * (secret not in text))
    assert redact(text) == text
    assert redact_split(words) == words


LETTERS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
TOKENS = st.text(LETTERS, min_size=20, max_size=40).map(lambda word: "A7" + word)
FORMS = {"a bearer": "Authorization: Bearer {}", "a bearer in JSON": '{{"headers": {{"Authorization": "Bearer {}"}}}}',
         "a bearer alone": "sent with Bearer {} twice", "curl": "curl -H 'Authorization: Token {}' http://x",
         "the database": "cannot connect to postgresql://trader:{}@db.example:5432/tradelab?sslmode=require",
         "the database, odd": "postgresql+psycopg://trader:p@ss/{}@db/tradelab", "redis": "redis://:{}@127.0.0.1/0",
         "a bot": "https://api.telegram.org/bot123456789:{}/sendMessage", "a bot's token": "the bot 123456:{}.",
         "a bot, quoted": "tgram%3A%2F%2F123456789%3A{}%2F42", "apprise": "tgram://123456789:{}/42",
         "Slack": "https://hooks.slack.com/services/T024BE7LD/B024BE7LD/{}", "apprise of Slack": "slack://T1/B1/{}/#a",
         "Discord": "POST https://discord.com/api/webhooks/1234567890/{} 404", "Discord, old":
         "https://discordapp.com/api/v10/webhooks/1/{}", "Teams": "https://x.webhook.office.com/webhookb2/1@2/{}",
         "a hook": "https://example.com/hooks/{}", "JSON": '{{"bot_token": "{}"}}',
         "JSON in JSON": '{{\\"api_key\\": \\"{}\\"}}',
         "a dictionary": "{{'password': '{}', 'user': 'me'}}", "a call": "connect(user='me', password='{}')",
         "a variable": "api_token:str = '{}'", "a constant": 'SECRET_KEY = "{}"', "TOML": 'influx_token = "{}"',
         "YAML": 'influx_token: "{}"', "an environment": "TRADELAB_TESTNET_SECRET={} tradelab live",
         "os.environ": 'os.environ["API_TOKEN"] = "{}"', "a record": "Venue(secret=SecretStr('{}'))",
         "a page": "&quot;token&quot;: &quot;{}&quot;", "a table": "<tr><th>password</th><td>{}</td></tr>",
         "SVG": "<svg><text>listenKey={}</text></svg>", "a comment in SVG": "<!-- api_key: {} -->",
         "a cookie": "Set-Cookie: session={}; HttpOnly", "a query": "https://x/y?key={}&z=1",
         "colours": "\x1b[36mpassword\x1b[39m=\x1b[33m'{}'\x1b[39m", "in two lines of a traceback":
         "E   ValueError: {{'secret': '{}'}}\nE   again"}


@pytest.mark.parametrize("form", FORMS)
@effort(max_examples=10)
@given(token=TOKENS)
def test_a_secret_that_nobody_registered_is_known_by_its_form(form, token):
    said = redact(f"before {FORMS[form].format(token)}\nbehind")
    assert token not in said
    assert token[4:] not in said
    assert HIDDEN in said
    assert said.startswith("before ")
    assert said.endswith("behind")


PIECES = """
import sys
from IPython.display import HTML, JSON, SVG, display
word, other = open("word").read(), open("other").read()
print(word[:9], end="", flush=True); print(word[9:])
print(word[:5]); print(word[5:])
print(word[:7], file=sys.stderr, end="")
sys.stderr.flush()
print(word[7:], file=sys.stderr)
display(SVG(f"<svg xmlns='http://www.w3.org/2000/svg'><text>{word}</text></svg>"), HTML(f"<b>{word}</b>"))
display(JSON({word: 1, "deep": [{"bot_token": "A7" + other}]}))
print("postgresql://me:" + other + "@db/x")
print(word[:11], end="")
"""


def test_what_a_job_leaves_holds_no_secret(project):
    "Prints in pieces, pictures that are text, names of JSON, parameters, a traceback"
    word = "Zs9planted-secret/0123"
    (project / "word").write_text(word)
    (project / "other").write_text("nobody-registered")
    (project / ".env").write_text(f"TRADELAB_TESTNET_SECRET={word}\n")
    (project / ".env").chmod(0o600)
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": tags}) for source, tags in (
        ("api_token:str = ''\nwhere:str = ''", ["parameters"]), (PIECES, []), ("print(word[11:])", []),
        ("raise ValueError(f'refused for {word}, {where}')", []))]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), project / "job.ipynb")
    ran = subprocess.run([sys.executable, "-c", "from tradelab.command import main; main()", "run", "job.ipynb",
                          "-p", "api_token", "A7nobody-registered", "-p", "where",
                          "https://hooks.slack.com/services/T0/nobody-registered", "--output", "out.ipynb"],
                         capture_output=True, text=True, timeout=300)
    left = {path.name: path.read_text() for path in project.glob("out*")} | {"stdout": ran.stdout, "stderr": ran.stderr}
    assert {"out.ipynb", "out.html"} <= set(left)
    assert "refused for [redacted]" in ran.stderr
    for name, text in left.items():
        assert word not in text, name
        assert "nobody-registered" not in text, name
    printed = "".join(each.text for cell in nbformat.read(project / "out.ipynb", as_version=4).cells
                      for each in cell.get("outputs", ()) if each.output_type == "stream")
    assert word not in printed.replace("\n", "")
    assert printed.count(HIDDEN) >= 4


@pytest.fixture
def logged(project):
    "The log of this project, which ends with the test"
    here = settings()
    configure(here, console=False)
    yield here
    log._install([])
    logging.getLogger("tradelab").setLevel("NOTSET")


def test_one_grep_follows_a_decision_from_candle_to_fill(logged):
    data = market_data(ar1(80, volatility=.01, seed=3))
    trader = Run("memory", Momentum(2, .001), timeframe="1h").trader(instruments=data.instruments)
    live = Session(trader, MemoryVenue(data, start=int(data.times[20])), Ledger(logged.database), logged.sessions,
                   id="demo", say=lambda line: None)
    done = asyncio.run(live.run(40))
    fills = [each for _, each in live.ledger.booked("demo") if hasattr(each, "order_id")]
    assert done.fills == len(fills) > 5
    journal = pd.read_csv(logged.sessions / "demo" / "journal.csv")
    said = [each for each in lines(logged.logs) if each.module == "live.session"]
    orders = {each.order.order_id: each.order for each in live.ledger.intents("demo")}
    for event in ("order sent", "order answered", "order filled"):
        assert {each.named["id"] for each in said if each.text == event} == set(orders), event
    for fill in fills:
        order = orders[fill.order_id]
        name = decision_id("demo", order.symbol, order.open_time)
        assert journal.open_time[journal.decision == name].tolist() == [order.open_time]
        found = trace(logged.database, logged.logs, Wanted(id=name))
        told = [each.source for each in found]
        assert {"decision", "order", "state", "fill", "log"} <= set(told)
        assert told.count("decision") == 1
        assert told.count("fill") == sum(each.order_id.startswith(f"{name}-") for each in fills)
        assert sum("order" in each.text for each in found if each.source == "log") >= 3
        assert any(name in each.raw and "equity" in each.text for each in said), "the line of the candle"


TRADELAB = sys.executable, "-c", "from tradelab.command import main; main()"


def write_line(file, number):
    record = logging.LogRecord("tradelab.example", logging.INFO, "", 1, f"line {number}", (), None)
    file.emit(record)


def test_a_reader_follows_over_rotations_until_ctrl_c(project):
    (project / "logs").mkdir()
    files = [SharedFile(project / "logs" / log.LOG, maxBytes=1_000, backupCount=50) for _ in range(2)]
    for each in files: each.setFormatter(formatter(readable=False))
    write_line(files[0], -1)
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # the tests may have been started where it is ignored
    reader = subprocess.Popen([*TRADELAB, "logs", "--follow", "--json", "--since", "1h"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, bufsize=1, preexec_fn=heard)
    seen = [json.loads(reader.stdout.readline())["event"]]
    for number in range(60):
        write_line(files[number % 2], number)
        if number % 20 == 7: files[0].stream.write('{"torn\nno JSON\n')
    while len(seen) < 61: seen.append(json.loads(reader.stdout.readline())["event"])
    reader.send_signal(signal.SIGINT)
    assert reader.wait(60) == 0
    assert reader.stderr.read() == ""
    assert seen == [f"line {n}" for n in range(-1, 60)]
    assert len([*(project / "logs").iterdir()]) > 5
    for each in files: each.close()


@pytest.mark.parametrize("look, stdout, stderr", [("json", "{", ""), ("human", "", "begun"), ("off", "", "")])
def test_the_console_gets_what_the_setting_says(project, look, stdout, stderr):
    (project / "tradelab.toml").write_text(f'log_console = "{look}"')
    program = "from tradelab.log import configure, get_logger; configure({}); get_logger('x').info('begun')"
    ran = subprocess.run([sys.executable, "-c", program.format("")], capture_output=True, text=True)
    assert ran.stdout[:1] == stdout
    assert (stderr in ran.stderr) if stderr else ran.stderr == ""
    assert [each.text for each in lines(project / "logs")] == ["begun"]
    program = program.format("console='job'")
    runner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}], stdout=subprocess.DEVNULL)"
    for name, seen in (("papermill", stdout), ("server", "")): # the stdout of others is for themselves
        (project / name).write_text(runner)
        ran = subprocess.run([sys.executable, name], capture_output=True, text=True)
        assert ran.stdout[:1] == seen
        assert ran.stderr == ""
