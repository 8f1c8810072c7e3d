"Jobs at their hours: on a clock of the test's own, and as real processes"
import asyncio
import json
import os
import signal
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import nbformat
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from servers import until
from test_serve import served

from tradelab.command import main
from tradelab.config import settings
from tradelab.database.backup import backup, compact
from tradelab.database.operations import Operations
from tradelab.database.reading import reading
from tradelab.database.records import JobRun, Service, clock
from tradelab.database.rows import Database
from tradelab.database.schema import ALERTS
from tradelab.ops.schedule import RunBook, Schedule, Times, history, run_job
from tradelab.times import to_ms

ZONES = "UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "America/St_Johns"


def notebook(name, code, **parameters):
    "A job of the project"
    cells = [nbformat.v4.new_markdown_cell(f"# {name}")]
    cells.append(nbformat.v4.new_code_cell("\n".join(f"{key} = {value!r}" for key, value in parameters.items()),
                                           metadata={"tags": ["parameters"]}))
    cells.append(nbformat.v4.new_code_cell(code))
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    made = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(made, f"nbs/{name}.ipynb")


def write(*jobs):
    Path("tradelab.toml").write_text("stop_grace = 2.0\n" + "\n".join(jobs))


def typed(*words):
    found = CliRunner().invoke(main, words)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


@pytest.mark.parametrize("zone, skipped, doubled", [
    ("Europe/Berlin", "2026-03-29", "2026-10-25"), ("America/New_York", "2026-03-08", "2026-11-01")])
def test_an_hour_that_is_skipped_runs_once_after_and_a_doubled_one_once(zone, skipped, doubled):
    hour = 2 if zone.startswith("Europe") else 1
    for day, wall in ((skipped, 2), (doubled, hour)):
        times = Times(f"*/20 {wall} * * *", zone)
        at = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone))
        when, found = int(at.timestamp() * 1000), []
        while (when := times.after(when)) < int((at + timedelta(days=1)).timestamp() * 1000): found.append(when)
        walls = [datetime.fromtimestamp(each / 1000, ZoneInfo(zone)) for each in found]
        if day == skipped: assert [f"{each:%H:%M}" for each in walls] == ["03:00"]
        else:
            assert [f"{each:%H:%M}" for each in walls] == [f"0{wall}:00", f"0{wall}:20", f"0{wall}:40"]
            assert all(each.fold == 0 for each in walls)


@given(st.integers(to_ms("2025-01-01"), to_ms("2027-01-01")), st.sampled_from(ZONES),
       st.sampled_from(("30 2 * * *", "*/15 * * * *", "0 0 1 * 1", "15 1 * * 0", "59 23 31 12 *")))
@examples(max_examples=60, deadline=None)
def test_the_next_time_is_later_and_shows_on_the_wall(now, zone, cron):
    times = Times(cron, zone)
    found = times.after(now)
    assert found > now
    assert times.after(found - 1) == found
    wall = datetime.fromtimestamp(found / 1000, ZoneInfo(zone))
    before = datetime.fromtimestamp(found / 1000 - 1, ZoneInfo(zone))
    minute = cron.split()[0]
    assert wall.second == 0
    if minute.isdecimal(): assert wall.minute == int(minute) or wall.utcoffset() != before.utcoffset()


def run_on(hands, here, busy=""):
    "A schedule whose clock shows these, a look each; returns what was told, and which jobs began"
    class Over(Exception): pass
    left, heard, began = list(hands), [], []
    async def sleep(_):
        left.pop(0)
        if not left: raise Over
    schedule = Schedule(here, heard.append, lambda: left[0] if left else hands[-1], sleep)
    schedule.start = lambda name: began.append((name, left[0]))
    async def go():
        if busy: schedule.running[busy] = asyncio.create_task(asyncio.Event().wait())
        await schedule.run()
    with pytest.raises(Over): asyncio.run(go())
    return heard, began


def test_what_nobody_was_there_for_is_named_and_runs_once(project):
    here = settings(schedule={"nightly": {"cron": "0 3 * * *", "command": "ledger backup"}})
    monday, friday = to_ms("2026-07-06 12:00"), to_ms("2026-07-10 12:00")
    assert run_on([monday], here) == ([], [])
    heard, began = run_on([friday, friday + 5_000], here)
    assert [(each.kind, each.subject) for each in heard] == [("job missed", "nightly")]
    assert began == [("nightly", friday)]
    assert history(here.database)[-1].text.startswith("4 times, from 2026-07-07 03:00 UTC to 2026-07-10 03:00 UTC")
    assert run_on([friday + 10_000], here) == ([], [])
    assert run_on([monday], here) == ([], []) # a clock that was put back


def test_one_that_still_runs_is_not_begun_again(project):
    here = settings(schedule={"hourly": {"cron": "0 * * * *", "command": "ledger backup"}})
    noon = to_ms("2026-07-06 12:00")
    heard, began = run_on([noon - 1_000, noon + 1], here, busy="hourly")
    assert not began
    assert str(heard[0]) == "Job hourly was missed: 2026-07-06 12:00 UTC: the run before was under way"


def test_a_ledger_that_is_away_delays_no_job_and_gets_its_history_later(project):
    here = settings(schedule={"hourly": {"cron": "0 * * * *", "command": "ledger backup"}})
    Database(here.database).close()
    away = os.path.abspath("away.db")
    def go(): os.rename("tradelab.db", away), os.mkdir("tradelab.db")
    def back(): os.rmdir("tradelab.db"), os.rename(away, "tradelab.db")
    async def walk():
        book = RunBook(here.database, 0)
        book.put(JobRun("hourly", 7))
        go()
        assert not await book.flush()
        book.put(JobRun("hourly", 7, 9, "done"))
        back()
        assert await book.flush()
        assert not book.waiting
        for number in range(1_100): book.put(JobRun("hourly", number))
        assert len(book.waiting) == 1_000
        book.close()
    asyncio.run(walk())
    assert [(run.state, run.ended) for run in history(here.database)] == [("done", 9)]


def test_a_run_that_was_killed_is_named_at_the_next_start(project):
    here = settings(schedule={"hourly": {"cron": "0 * * * *", "command": "ledger backup"}})
    Database(here.database).close()
    operations = Operations(here.database)
    operations.keep_runs([JobRun("hourly", 7), JobRun("of others", 7)])
    operations.close()
    heard, _ = run_on([9], here)
    assert str(heard[0]) == "Job hourly failed: its process was killed"
    assert [run.state for run in history(here.database)] == ["broken", "running"]


def run_here(name, **of_schedule):
    here = settings(schedule={name: {"cron": "0 3 * * *", **of_schedule}} if of_schedule else {})
    pauses = []
    async def sleep(seconds): pauses.append(seconds)
    async def walk():
        book = RunBook(here.database, 0)
        try: return await run_job(name, here, book, sleep)
        finally: book.close()
    return asyncio.run(walk()), pauses


@pytest.mark.integration
def test_a_notebook_runs_in_a_process_of_its_own_without_keys(project, monkeypatch):
    notebook("look", "import json, os\nopen('seen.json', 'w').write(json.dumps(dict(os.environ)))\n"
             "assert candles == 7\nprint('seen', os.getpid())", candles=1)
    monkeypatch.setenv("TRADELAB_TESTNET_SECRET", "planted-secret")
    run, _ = run_here("nightly", notebook="look", parameters={"candles": 7})
    assert run.state == "done", run.text
    assert "seen" in Path(run.output).read_text()
    assert Path(run.output).with_suffix(".html").exists()
    seen = json.loads(Path("seen.json").read_text())
    assert "TRADELAB_TESTNET_SECRET" not in seen
    assert seen["TRADELAB_PASSPHRASE_FILE"] == os.devnull
    assert oct(Path("logs/jobs/nightly.log").stat().st_mode)[-3:] == "600"


@pytest.mark.integration
def test_the_time_limit_ends_it_and_kills_it_and_what_it_started(project):
    notebook("hang", "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
             "open('kernel', 'w').write(str(os.getpid()))\nwhile True: time.sleep(.1)")
    Path("tradelab.toml").write_text("stop_grace = 0.5\n")
    for limit in (.1, .4, 1.6): # a slow machine has not begun to run it by then
        run, _ = run_here("stuck", notebook="hang", time_limit=limit)
        assert (run.state, run.text) == ("failed", f"its time limit of {limit:g} minutes is over")
        if Path("kernel").exists(): break
    def gone(): return not Path(f"/proc/{Path('kernel').read_text()}").exists()
    until(gone)


@pytest.mark.integration
def test_what_fails_is_tried_again_after_a_pause_and_says_why(project):
    run, pauses = run_here("nightly", notebook="replya", retry=1, pause=3)
    assert run.text.startswith("there is no job replya: did you mean replay?")
    assert (run.state, run.attempt, pauses) == ("failed", 2, [180.])
    assert [(each.attempt, each.state) for each in history(settings().database)] == [(1, "failed"), (2, "failed")]


@pytest.mark.integration
def test_serve_catches_up_and_if_it_is_killed_the_job_ends_and_the_next_start_says_so(project):
    notebook("hang", "import os, time\nopen('kernel', 'w').write(str(os.getpid()))\nwhile True: time.sleep(.1)")
    write("[schedule.stuck]", 'cron = "0 3 * * *"', 'notebook = "hang"')
    url = settings().database
    Database(url).close()
    operations = Operations(url)
    operations.take(Service("schedule", "elsewhere", 0, 0), (), {"stuck": clock() - 2 * 86_400_000})
    operations.close()
    with served() as process:
        until(lambda: Path("kernel").exists() and Path("kernel").read_text(), 60.)
        assert "jobs that are run: stuck" in process.said
        assert typed("schedule", "run", "stuck") == (1, f"Error: job stuck is running already, in process "
                                                     f"{process.process.pid}: stop it first, or start another one\n")
        process.end(signal.SIGKILL)
    until(lambda: not Path(f"/proc/{Path('kernel').read_text()}").exists(), 30.)
    assert [run.state for run in history(url)] == ["missed", "running"]
    Path("kernel").unlink()
    with served() as process:
        until(lambda: history(url)[-1].state == "broken")
        assert process.end() == 0
    code, said = typed("schedule", "history", "stuck")
    assert code == 0
    assert "nobody was there to start it" in said
    assert said.endswith("its process was killed\n")
    with reading(url) as look: kinds = [row["kind"] for row in look.rows(ALERTS)]
    assert {"job missed", "job failed"} <= {*kinds}


@pytest.mark.parametrize("job, words", [
    ('cron = "0 0 30 2 *"\ncommand = "data refresh"', "schedule.x: cron '0 0 30 2 *' never fires: no such day comes"),
    ('cron = "0 3 * *"\ncommand = "data refresh"', "it has not five fields"),
    ('cron = "0 3 * * *"\ncommand = "rm"', "schedule.x.command must be"),
    ('cron = "0 3 * * *"', "schedule.x must have a notebook, or a command, and not both"),
    ('command = "data refresh"', "schedule.x must have a cron such as"),
    ('cron = "0 3 * * *"\nnotebook = "/tmp/x.ipynb"', "must be the name of a job such as replay, not a path"),
    ('cron = "0 3 * * *"\nnotebook = "reply"', "schedule.x: there is no job reply: did you mean replay?"),
    ('cron = "0 3 * * *"\nnotebook = "replay"\nparameters = { sesion = "x" }', "there is no parameter sesion"),
    ('cron = "0 3 * * *"\ncommand = "ledger backup"\nparameters = { keep = 0 }', "keep: 0 is not in the range"),
    ('cron = "0 3 * * *"\ncommand = "ledger backup"\nparameters = { kep = 7 }', "has no option kep: it takes folder"),
    ('cron = "0 3 * * *"\ncommand = "data refresh"\ntimezone = "Mars"', "must be a time zone such as UTC"),
    ('cron = "0 3 * * *"\ncommand = "data refresh"\ntime_limit = 0', "schedule.x.time_limit"),
    ('cron = "0 3 * * *"\ncommand = "data refresh"\nretries = 3', "did you mean schedule.x.retry?"),
])
def test_what_cannot_be_is_one_sentence_and_nothing_starts(project, job, words):
    write("[schedule.x]", job)
    for command in (("schedule", "list"), ("serve",)):
        code, said = typed(*command)
        assert code == 1
        assert said.startswith("Error: ")
        assert said.count("\n") == 1
        assert words in said
    assert not Path("tradelab.db").exists()


def test_the_schedule_at_the_command_line(project):
    write('[schedule]', 'timezone = "Europe/Berlin"', "[schedule.copies]", 'cron = "0 3 * * 1-5"',
          'command = "ledger backup"', "parameters = { keep = 2 }")
    assert "there is no job copy in the schedule: did you mean copies?" in typed("schedule", "run", "copy")[1]
    assert typed("schedule", "history")[1].startswith("Error: there is no ledger")
    code, said = typed("schedule", "list")
    assert code == 0
    assert "ledger backup 0 3 * * 1-5 Europe/Berlin" in " ".join(said.split())
    assert len(typed("schedule", "next", "--count", "3")[1].splitlines()) == 3


def test_the_ledger_is_maintained_and_copied_while_a_writer_is_at_work(project):
    url = settings().database
    assert typed("ledger", "backup")[1].startswith("Error: there is no ledger")
    assert typed("ledger", "maintain")[1].startswith("Error: there is no ledger")
    database = Database(url)
    operations = Operations(url)
    operations.keep_runs([JobRun("old", 7), JobRun("new", clock())])
    assert typed("ledger", "backup", "--keep", "1")[0] == 0
    assert typed("ledger", "backup", "--keep", "1")[0] == 0
    copies = [*Path("backups").glob("ledger-*.db")]
    assert len(copies) == 1
    code, said = typed("ledger", "maintain")
    assert code == 0
    assert said.startswith("deleted: 1 job_runs\nthe file had ")
    assert [run.job for run in history(url)] == ["new"]
    with database.transaction() as connection: # somebody writes, for long
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        operations_, before = backup(url, Path("backups"), 0, 9), sorted(Path("backups").iterdir())
    assert operations_ in before
    Path("backups", ".ledger-x.db.part").touch() # of one that was killed
    backup(url, Path("backups"), 1, 9)
    assert not [*Path("backups").glob(".*.part")]
    operations.close()
    database.close()


@pytest.mark.integration
def test_a_ledger_at_a_server_is_copied_and_cleaned_up(project, postgres):
    Database(postgres).close()
    made = backup(postgres, Path("backups"), 0)
    assert made.suffix == ".dump"
    assert made.stat().st_size > 10_000
    assert compact(postgres, 0) == "the server has cleaned up the ledger's tables"
