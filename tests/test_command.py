"The command as a person types it"
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import nbformat
import pytest

from tradelab.live.ledger import Ledger
from tradelab.localnet.protocol import signature
from tradelab.localnet.server import Localnet
from tradelab.localnet.sources import WallClock

pytestmark = pytest.mark.integration
TRADELAB = Path(sys.executable).parent / "tradelab"


def tradelab(*words, **options):
    return subprocess.run([TRADELAB, *map(str, words)], capture_output=True, text=True, **options)


def write_job(path, *cells):
    sources = [nbformat.v4.new_code_cell("symbol:str = 'BTC/USDT:USDT'\nsteps:int = 10",
                                         metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nbformat.v4.new_notebook(cells=sources,
                                            metadata={"kernelspec": {"name": "python3", "display_name": "python3",
        "language": "python"}}), path)


def test_help_and_version():
    assert "run" in tradelab("--help").stdout
    assert tradelab("--version").stdout.startswith("tradelab, version ")


def test_run(project):
    write_job(project / "nbs/train.ipynb", "print('trained on', symbol, steps + 1)")
    ran = tradelab("run", "train", "-p", "symbol", "007", "-p", "steps", "5")
    assert ran.returncode == 0
    assert "trained on 007 6" in ran.stdout
    assert "train is done: reports/train/train-2" in ran.stdout


@pytest.mark.parametrize("words, sentence", [
    (["run", "trian"], "there is no job trian: did you mean train?"),
    (["run", "train", "-p", "stpes", "5"], "there is no parameter stpes: did you mean steps?"),
    (["run", "train", "-p", "steps", "5.5"], "parameter steps must be int, was 5.5"),
    (["run", "train", "--output", "page.html"], "the output must be a file .ipynb"),
    (["run", "train"], "train: there is no run nonsense (the traceback is in "),
    (["stop"], "no session is running")])
def test_bad_input_is_one_sentence_and_exit_code_1(project, words, sentence):
    write_job(project / "nbs/train.ipynb", "raise ValueError('there is no run nonsense')")
    ran = tradelab(*words)
    assert ran.returncode == 1
    assert f"Error: {sentence}" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert (project / "reports").exists() == (words == ["run", "train"])


def test_stop_closes_a_running_session(project, monkeypatch):
    "Through the ledger: the job, its kernel and the session in it hear no signal"
    monkeypatch.setenv("TRADELAB_STOP_GRACE", "1e6")
    with Localnet(source=WallClock(), profile="book", api_key="localnet", api_secret="localnet") as net:
        monkeypatch.setenv("TRADELAB_LOCALNET_PORT", net.url.rpartition(":")[2])
        words = ["live", *"-p venue localnet -p timeframe 1m -p candles 0 --output out.ipynb".split()]
        job = subprocess.Popen([TRADELAB, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not any(b"running" in path.read_bytes() for path in project.glob("sessions/*/session.json")):
            assert job.poll() is None, job.communicate()[0]
            time.sleep(.05)
        stopped = tradelab("stop", "--reason", "a new version")
        said = job.communicate()[0]
    name, = (path.name for path in (project / "sessions").iterdir())
    assert (stopped.returncode, stopped.stdout.splitlines()[1]) == (0, f"{name} has stopped"), stopped.stderr
    assert stopped.stdout.startswith(f"{name}: stopping in order, as ")
    assert job.returncode == 0, said
    assert "stopping in order, as " in said
    assert json.loads((project / "sessions" / name / "session.json").read_text())["state"] == "stopped"
    row, = Ledger(f"sqlite:///{project}/tradelab.db").commands.all()
    assert (row["name"], row["reason"]) == ("stop", "a new version")
    assert row["answer"].endswith(": a new version")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_localnet_serves_until_it_is_stopped(project):
    port = free_port()
    server = subprocess.Popen([TRADELAB, "localnet", "--port", str(port)], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
    try:
        assert f"localnet at http://127.0.0.1:{port}" in server.stdout.readline()
        taken = tradelab("localnet", "--port", port)
        assert taken.returncode == 1
        assert str(port) in taken.stderr
        assert "Traceback" not in taken.stderr
        server.send_signal(signal.SIGTERM)
        assert "localnet has stopped" in server.communicate()[0]
        assert server.returncode == 0
    finally: server.kill()


def test_ctrl_c_while_localnet_is_starting_is_one_line(project):
    "Only a terminal is told that it is starting"
    heard, terminal = pty.openpty()
    server = subprocess.Popen([TRADELAB, "localnet", "--port", "0"], stdout=subprocess.PIPE, stderr=terminal,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    os.close(terminal)
    try:
        assert b"localnet is starting" in os.read(heard, 1000)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130
        assert os.read(heard, 1000) == b"stopped\r\n"
        assert server.stdout.read() == b""
    finally:
        server.kill()
        os.close(heard)


def test_localnet_in_the_background_of_a_script_ends_with_it(project):
    "A shell without job control starts it with SIGINT ignored"
    script = (f"{TRADELAB} localnet --port 0 > said 2>&1 & until grep -q 'localnet at' said || ! kill -0 $!; do sleep "
              ".1; done; kill -INT $!; kill -TERM $!; wait $!; echo ended with $?")
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout == "ended with 0\n"
    assert "localnet has stopped" in (project / "said").read_text()


def test_localnet_with_a_state_file_goes_on_after_a_kill(project):
    def served():
        "A localnet on the wall clock, its URL and its control port"
        server = subprocess.Popen([TRADELAB, "localnet", "--port", "0", "--key", "k", "--secret", "s", "--state",
                                   "kept.jsonl"], stdout=subprocess.PIPE, text=True)
        url = server.stdout.readline().split()[2].strip(",")
        told = server.stdout.readline().split()
        return server, url, Request(told[told.index("at", 3) + 1] + "/state", headers={"X-Localnet-Token": told[-1]})
    server, url, control = served()
    try:
        asked = f"symbol=BTCUSDT&side=BUY&type=MARKET&quantity=0.01&timestamp={time.time_ns() // 1_000_000}"
        order = Request(f"{url}/fapi/v1/order?{asked}&signature={signature('s', asked)}", method="POST",
                        headers={"X-MBX-APIKEY": "k"})
        assert json.loads(urlopen(order).read())["orderId"] == 1
        before = json.loads(urlopen(control).read())
    finally: server.kill()
    server, url, control = served()
    try: after = json.loads(urlopen(control).read())
    finally: server.kill()
    assert (before["orders"], after["orders"]) == (1, 1)
    assert after["market_time"] >= before["market_time"]
