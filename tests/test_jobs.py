"Jobs as a person runs them: papermill, its exit codes, and what a signal does"
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from tradelab import jobs

pytestmark = pytest.mark.integration
PAPERMILL = [sys.executable, "-m", "papermill", "--engine", "tradelab", "--no-progress-bar"]

LOOP = """\
import asyncio, signal
from pathlib import Path
stop = asyncio.Event()
asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
Path("started").touch()
await stop.wait()
await asyncio.sleep(.2)
print("closed in order")
"""
CANCELLED = """\
import asyncio
from pathlib import Path
Path("started").touch()
try: await asyncio.sleep(600)
except asyncio.CancelledError: print("closed in order")
"""
DEAF = """\
import signal, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
Path("started").touch()
time.sleep(600)
"""


def write(path, *cells, parameters="policy:str = 'latest'\nsteps:int = 10\nshare:float = 0.5"):
    sources = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
               *map(nbformat.v4.new_code_cell, cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=sources, metadata=kernel), path)
    return path


def papermill(*arguments, **options):
    return subprocess.run([*PAPERMILL, *map(str, arguments)], capture_output=True, text=True, **options)


def test_a_job_begins_without_a_grammar_that_it_does_not_need():
    "jsonschema's grammar of addresses: three seconds of each start"
    asked = ("import sys, tradelab.jobs, papermill.execute; assert 'lark' not in sys.modules and 'rfc3987_syntax' not "
             "in sys.modules")
    subprocess.run([sys.executable, "-c", asked], check=True)


def stream_of(path):
    return "".join(output.text for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])
                   if output.output_type == "stream")


@pytest.mark.parametrize("arguments, sentence", [
    (["-p", "polcy", "x"], "there is no parameter polcy: did you mean policy? The notebook takes policy, steps, share"),
    (["-p", "steps", "many"], "parameter steps must be int, was 'many': give a value such as 10"),
    (["-p", "share", "half"], "parameter share must be float, was 'half'"),
    (["-y", "policy: [a]"], "parameter policy must be str, was ['a']")])
def test_papermill_refuses_a_bad_parameter_in_one_sentence_and_writes_nothing(project, arguments, sentence):
    ran = papermill(write(project / "nbs/live.ipynb", "print(policy)"), "out.ipynb", *arguments)
    assert ran.returncode == 1
    assert f"Error: {sentence}" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (project / "out.ipynb").exists()


def test_papermill_gives_the_parameters_to_the_notebook_and_shows_what_it_prints(project):
    ran = papermill(write(project / "nbs/live.ipynb", "print('I run', policy, steps, share)"), "out.ipynb", "-p",
                    "policy", "mine", "-p", "share", "1")
    assert ran.returncode == 0
    assert "I run mine 10 1" in ran.stdout
    assert "I run mine 10 1" in stream_of("out.ipynb")


def test_a_wrong_setting_stops_the_job_before_it_starts(project):
    (project / "tradelab.toml").write_text("[risk]\nmax_leverage = -1")
    ran = papermill(write(project / "nbs/live.ipynb", "print(policy)"), "out.ipynb")
    assert ran.returncode == 1
    assert ("Error: risk.max_leverage must be a finite number above 0, was -1.0: change it in tradelab.toml"
            in ran.stderr)
    assert not (project / "out.ipynb").exists()


def test_a_failing_cell_is_one_sentence_on_the_console_and_a_traceback_in_the_notebook(project):
    ran = papermill(write(project / "nbs/live.ipynb", "raise ValueError('there is no run nonsense: see runs/')",
                          "print('never')"), "out.ipynb")
    assert ran.returncode == 1
    assert "Error: there is no run nonsense: see runs/ (the traceback is in out.ipynb)" in ran.stderr
    assert "Traceback" not in ran.stderr
    text = Path("out.ipynb").read_text()
    assert "ValueError" in text
    assert "Traceback" in text
    assert not stream_of("out.ipynb")


def test_no_configured_secret_gets_into_the_executed_notebook(project):
    secret = "mainnet-secret-0123456789"
    (project / ".env").write_text(f"TRADELAB_MAINNET_SECRET={secret}")
    reveal = ("from pathlib import Path\nvalue = "
              "Path('.env').read_text().split('=')[1]\nprint(value)\nprint({'text': value})")
    ran = papermill(write(project / "nbs/live.ipynb", reveal, "value", "raise RuntimeError(f'refused: {value} "
                          "https://x/y?signature=0a1b2c')"), "out.ipynb")
    everything = Path("out.ipynb").read_text() + ran.stdout + ran.stderr
    assert ran.returncode == 1
    assert secret not in everything
    assert "0a1b2c" not in everything.replace("signature=0a1b2c')", "")
    assert "[redacted]" in everything


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("loop", [LOOP, CANCELLED], ids=["handler", "cancelled"])
def test_a_signal_closes_the_session_and_the_notebook_ends_complete(project, number, loop):
    write(project / "nbs/live.ipynb", loop, "print('the last cell')")
    process = start(project, *PAPERMILL, "nbs/live.ipynb", "out.ipynb")
    process.send_signal(number)
    assert process.wait() == 0
    assert "closed in order" in stream_of("out.ipynb")
    assert "the last cell" in stream_of("out.ipynb")


def test_a_third_signal_gives_up(project):
    (project / ".env").write_text("TRADELAB_STOP_GRACE=1e6")
    write(project / "nbs/live.ipynb", DEAF)
    process = start(project, *PAPERMILL, "nbs/live.ipynb", "out.ipynb")
    sent = 0
    while process.poll() is None: # two that come at once are one
        process.send_signal(signal.SIGTERM)
        sent += 1
        time.sleep(.1)
    assert process.returncode != 0
    assert sent >= 3


def test_a_close_that_takes_too_long_is_given_up(project):
    (project / ".env").write_text("TRADELAB_STOP_GRACE=1")
    write(project / "nbs/live.ipynb", DEAF)
    process = start(project, *PAPERMILL, "nbs/live.ipynb", "out.ipynb")
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0


def start(project, *command):
    "A job that has come to its long cell"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (project / "started").exists() and process.poll() is None: time.sleep(.05)
    assert process.poll() is None
    return process


def test_run_writes_a_dated_record_and_its_page(project, capfd):
    write(project / "nbs/train.ipynb", "print('trained', steps, 'steps')")
    output = jobs.run("train", {"steps": "7"}, text=True)
    assert output.parent == project / "reports/train"
    assert output.name.startswith("train-2")
    assert sorted(path.suffix for path in output.parent.iterdir()) == [".html", ".ipynb"]
    words = re.sub(r"<[^>]+>", "", output.with_suffix(".html").read_text())
    assert "trained 7 steps" in words
    assert "steps = 7" in words
    assert "print(" not in words
    assert "trained 7 steps" in capfd.readouterr().out


def test_run_refuses_before_it_writes(project):
    write(project / "nbs/train.ipynb", "print(steps)")
    for parameters in ({"stps": 7}, {"steps": 7.5}):
        with pytest.raises(jobs.ParameterError): jobs.run("train", parameters)
    assert not (project / "reports").exists()


def test_a_check_fails_before_there_is_a_kernel_and_nothing_is_written(project):
    path = write(project / "nbs/train.ipynb", "if steps > 10: raise LookupError(f'{steps} is more than 10')",
                 "print('never')")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].metadata["tags"] = ["check"]
    nbformat.write(notebook, path)
    script = ("import sys, tradelab.jobs as jobs\ntry: jobs.run('train', {'steps': 11})\nexcept jobs.ParameterError as "
              "error: print(error, 'papermill' in sys.modules)")
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "11 is more than 10 False"
    assert not (project / "reports").exists()
    assert jobs.run("train", {"steps": 10}).exists()


@pytest.mark.parametrize("cell, code",
                         [("print('told', steps)", 0), ("print('told', steps); raise ValueError('no')", 1)])
def test_papermill_writes_the_page_that_run_writes(project, cell, code):
    ran = papermill(write(project / "nbs/train.ipynb", cell), "out.ipynb", "-p", "steps", "7")
    assert ran.returncode == code
    assert sorted(path.name for path in project.glob("out*")) == ["out.html", "out.ipynb"]
    page = re.sub(r"<[^>]+>", "", (project / "out.html").read_text())
    assert "told 7" in page
    assert "steps = 7" in page
    assert "print(" not in page.replace("print('told', steps); raise", "")


def test_every_job_of_ours_says_what_its_parameters_are(root):
    for path in root.glob("nbs/*.ipynb"):
        if path.stem == "index": continue
        taken = jobs.parameters_of(nbformat.read(path, as_version=4))
        assert "settings" in taken and len(taken) <= 11 and all(each.comment for each in taken.values()), path
        assert all(f"  {name}" in jobs.help_of(path) for name in taken)


@pytest.mark.parametrize("job, wrong", [("train", {"agent": "SACC"}), ("train", {"source": "none.parquet"}),
                                        ("train", {"symbol": "BTC"}), ("train", {"steps": 0}),
                                        ("train", {"settings": "nobody"}), ("train", {"timeframe": "7h"}),
                                        ("backtest", {"policy": "train_nobody"}),
                                        ("backtest", {"policy": "tradelab.strategies.example:Nobody"}),
                                        ("backtest", {"funding": "none.csv"}), ("backtest", {"span": "2022"}),
                                        ("report", {"session": "nobody"}),
                                        ("report", {"symbol": "BTC/USDT:USDT-241227"}), ("live", {"venue": "moon"}),
                                        ("live", {"resume": "nobody"}), ("replay", {"session": "nobody"}),
                                        ("drill", {"venue": "mainnet"}), ("drill", {"venue": "testnet"}),
                                        ("drill", {"symbol": "BTC"}), ("watch", {"session": "nobody"}),
                                        ("watch", {"minutes": -1}), ("watch", {"settings": "nobody"}),
                                        ("dashboard", {"minutes": -1}), ("dashboard", {"settings": "nobody"}),
                                        ("session_report", {"session": "nobody"}),
                                        ("session_report", {"replayed": -1}),
                                        ("incident", {"since": "soon"}), ("incident", {"minutes": 0}),
                                        ("testnet_day", {"hours": -1}), ("testnet_day", {"candles": 0}),
                                        ("testnet_day", {"session": "nobody"}),
                                        ("walkforward", {"agents": "PPO SACC"}), ("walkforward", {"agents": ""}),
                                        ("walkforward", {"folds": 1}), ("walkforward", {"seeds": 0}),
                                        ("walkforward", {"steps": 0}), ("walkforward", {"source": "none.csv"})])
def test_our_jobs_refuse_what_is_wrong_before_a_kernel_starts(project, root, job, wrong, monkeypatch):
    def started(*_, **__): raise AssertionError("a kernel was started")
    monkeypatch.setattr("papermill.execute.execute_notebook", started)
    with pytest.raises(jobs.ParameterError): jobs.run(str(root / f"nbs/{job}.ipynb"), wrong)
    assert not (project / "reports").exists()


def test_the_repository_jobs_run_on_the_kernel_that_every_environment_has(root):
    for path in (root / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts:
            assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3", path


def shy(project, before):
    "A kernel that does something before it starts; a letter in `count` for each time"
    spec = project / "jupyter/kernels/shy"
    count = project / "count"
    spec.mkdir(parents=True)
    code = (f"import os, pathlib, sys, time; file = open({str(count)!r}, 'a'); file.write('x'); file.close(); n = "
            f"pathlib.Path(file.name).stat().st_size; {before}; os.execv(sys.executable, [sys.executable, '-m', "
            "'ipykernel_launcher', *sys.argv[1:]])")
    (spec / "kernel.json").write_text(json.dumps({"argv": [sys.executable, "-c", code, "-f", "{connection_file}"],
                                                  "display_name": "shy", "language": "python"}))
    return ([write(project / "nbs/shy.ipynb", "print('done')"), "out.ipynb", "-k", "shy"],
            {**os.environ, "JUPYTER_PATH": str(project / "jupyter")}, count)


@pytest.mark.parametrize("deaths, starts, code", [(1, 2, 0), (9, 3, 1)])
def test_a_kernel_that_dies_before_it_answers_is_started_again(project, deaths, starts, code):
    "Two jobs that begin at once may be given the same port: one of their kernels dies before anything was executed"
    arguments, environment, count = shy(project, f"n <= {deaths} and sys.exit(1)")
    ended = papermill(*arguments, env=environment)
    assert ended.returncode == code and count.read_text() == starts * "x", ended.stderr


def test_a_job_that_is_stopped_while_its_kernel_starts_stays_down(project):
    arguments, environment, count = shy(project, "time.sleep(600)")
    process = subprocess.Popen([*PAPERMILL, *map(str, arguments)], env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not (count.exists() and count.read_text()) and process.poll() is None: time.sleep(.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    assert count.read_text() == "x"
