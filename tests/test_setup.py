"A project that is set up by a person, or by options: both files or neither"
import os
import pty
import select
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from tradelab.command import main
from tradelab.config import settings
from tradelab.secrets import open_box, with_keys

COMMAND = "from tradelab.command import main; main()"


@pytest.fixture
def empty(project, monkeypatch):
    "A folder with nothing in it, and a passphrase elsewhere"
    (project / "tradelab.toml").unlink()
    Path("passphrase").write_text("twelve and more")
    monkeypatch.setenv("TRADELAB_PASSPHRASE_FILE", str(project / "passphrase"))
    return project


def typed(*words, **given):
    found = CliRunner().invoke(main, words, **given)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


def files(): return sorted(each for each in os.listdir() if each not in ("nbs", "passphrase"))


@pytest.mark.parametrize("environment", ["development", "staging", "production"])
def test_each_template_is_in_order_and_private(empty, environment):
    code, said = typed("config", "init", "--yes", "--environment", environment)
    assert (code, files()) == (0, ["tradelab.toml"]), said
    assert stat.S_IMODE(os.stat("tradelab.toml").st_mode) == 0o600
    assert typed("config", "check", "tradelab.toml") == (0, "tradelab.toml is in order\n")
    assert settings().environment == environment
    code, said = typed("config", "check")
    assert code == 0
    assert f'environment = "{environment}"' in said
    before = Path("tradelab.toml").read_bytes()
    assert typed("config", "init", "--yes") == (1, "Error: tradelab.toml is there already: nothing was written; "
                                                "--force replaces it\n")
    assert Path("tradelab.toml").read_bytes() == before
    assert typed("config", "init", "--yes", "--force", "--symbols", "ETH/USDT:USDT")[0] == 0
    assert settings().symbol == "ETH/USDT:USDT"


def test_answers_make_both_files_and_show_no_secret(empty):
    answers = "staging\ntestnet\nBTCUSDT,ETHUSDT\n15m\n500\nthe-key\nthe-secret\njson://127.0.0.1/the-hook\n123456:ABCdef\n77\n"
    code, said = typed("config", "init", input=answers)
    assert code == 0, said
    assert files() == ["tradelab.secrets", "tradelab.secrets.lock", "tradelab.toml"] or files() == [
        "tradelab.secrets", "tradelab.toml"]
    box = open_box(Path("tradelab.secrets"), "twelve and more")
    assert {name: value.get_secret_value() for name, value in box.values.items()} == {
        "testnet_key": "the-key", "testnet_secret": "the-secret", "alert_url": "json://127.0.0.1/the-hook",
        "telegram_token": "123456:ABCdef"}
    written = Path("tradelab.toml").read_text() + said
    assert not [each for each in ("the-key", "the-secret", "the-hook", "ABCdef") if each in written]
    here = with_keys(settings())
    assert (here.venue, here.timeframe, here.telegram.admins) == ("testnet", "15m", (77,))
    assert here.testnet_secret.get_secret_value() == "the-secret"


@pytest.mark.parametrize("words, said", [
    (("--symbols", "???"), "Error: "), (("--timeframe", "soon"), "Error: "), (("--deposit", "0"), "Invalid value"),
    (("--venue", "binance"), "Invalid value"), (("--secrets-from", "-"), "did you mean testnet_key?"),
    (("--secrets-from", "passphrase"), "")])
def test_what_cannot_be_leaves_nothing(empty, words, said):
    Path("passphrase").write_text("short")
    given = {"input": "tesnet_key=x\n"} if words[-1] == "-" else {}
    if words[-1] == "passphrase": Path("passphrase").write_text("alert_url=nonsense://x\n")
    code, told = typed("config", "init", "--yes", *words, **given)
    assert code != 0
    assert said in told
    assert files() == []


def test_a_passphrase_that_is_too_short_leaves_nothing(empty):
    Path("passphrase").write_text("short")
    code, said = typed("config", "init", "--yes", "--secrets-from", "-", input="testnet_key=x\n")
    assert (code, files()) == (1, [])
    assert "at least 12 characters" in said


def test_ctrl_c_in_the_middle_leaves_nothing(empty):
    here, there = pty.openpty()
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # the tests may have been started where it is ignored
    process = subprocess.Popen([sys.executable, "-c", COMMAND, "config", "init"], stdin=there, stdout=there,
                               stderr=there, start_new_session=True, preexec_fn=heard)
    os.close(there)
    said, asked = b"", [b"Environment", b"Venue", b"Symbols"]
    while asked[0] not in said or len(asked) > 1:
        if asked[0] in said:
            os.write(here, b"\n")
            del asked[0]
        assert select.select([here], [], [], 30.)[0], said
        said += os.read(here, 1_000)
    with suppress(OSError): # at the end of the process
        for _ in range(100): # readline misses a Ctrl-C that comes between its prompt and its wait: press it again
            process.send_signal(signal.SIGINT)
            while select.select([here], [], [], .5)[0]: os.read(here, 1_000)
    assert process.wait(30) in (1, 130)
    os.close(here)
    assert files() == []


@pytest.mark.parametrize("text, words", [
    ("deposit = -1", "deposit must be greater than 0, was -1"), ("deposit = ", "tradelab.toml cannot be read"),
    ("depozit = 1", "did you mean deposit?"), ("format = 9", "is of format 9"),
    ("[production]\nvenue = 'x'", "venue must be"), ("[settings.a]\ndeposit = 0", "deposit must be greater than 0"),
    ("[alerts]\ntemplates = { stop = '{unknown}' }", "unknown"),
    ('[schedule.x]\ncron = "0 0 30 2 *"\ncommand = "data refresh"', "never fires"),
    ('[schedule.x]\ncron = "0 0 1 2 *"\nnotebook = "reply"', "there is no job reply: did you mean replay?")])
def test_what_is_wrong_with_a_file_is_a_sentence(project, text, words, monkeypatch):
    monkeypatch.setenv("TRADELAB_DEPOSIT", "7") # of this shell, and not of the file
    Path("other.toml").write_text(text)
    code, said = typed("config", "check", "other.toml")
    assert code == 1
    assert words in said
    assert all(line.startswith("Error: ") for line in said.splitlines())
    assert os.environ["TRADELAB_DEPOSIT"] == "7"
