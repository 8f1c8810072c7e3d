"The file of secrets under everything that happens to files: cut off, edited, written by several, killed while written"
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from pydantic import SecretStr

from tradelab import secrets
from tradelab.config import settings, venue_for
from tradelab.files import StorageError
from tradelab.secrets import (
    COSTS,
    DAY,
    RENEWED_AFTER,
    File,
    SecretsError,
    alone,
    change_passphrase,
    new_box,
    open_box,
    read_head,
    remove_secret,
    sealed_text,
    set_secret,
    with_keys,
    with_secret,
)

PASSPHRASE = "correct horse battery"
PLANTED = "planted-0123456789abcdef"
BOX = with_secret(new_box(PASSPHRASE, 0, COSTS[0]), "testnet_key", SecretStr(PLANTED), 0)
TEXT = sealed_text(BOX)


@pytest.fixture(autouse=True)
def cheap(monkeypatch): monkeypatch.setattr(secrets, "COST", COSTS[0])


@pytest.fixture
def here(project):
    (project / "word").write_text(PASSPHRASE + "\n")
    (project / "word").chmod(0o600)
    return settings(passphrase_file=Path("word"))


def refused(text, passphrase=PASSPHRASE):
    "The sentence that refuses a file; the file is what it was"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tradelab.secrets"
        path.write_bytes(text)
        with pytest.raises(SecretsError) as error: open_box(path, passphrase)
        assert path.read_bytes() == text
        assert PLANTED not in str(error.value) and passphrase not in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)


@given(st.integers(0, len(TEXT) - 2))
def test_a_file_that_was_cut_off_is_refused_wherever(length):
    assert "is not as tradelab wrote it (cut off or edited)" in refused(TEXT[:length].encode())


@given(st.integers(0, len(TEXT) - 2), st.binary(min_size=1, max_size=3))
def test_a_file_that_was_edited_is_refused_wherever(place, put):
    edited = TEXT[:place].encode() + put + TEXT[place + 1:].encode()
    if edited.strip() == TEXT.strip().encode(): return
    assert re.search("not as tradelab wrote it|cannot be read|is of format", refused(edited))


NAMES = st.sampled_from(["format", "cost", "salt", "made", "names", "wrapped", "content", "sha256"])


@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=9)))
def test_whatever_a_file_holds_only_its_own_error_comes(value):
    refused(json.dumps(value).encode())


@effort(max_examples=15)
@given(st.text(min_size=1, max_size=30).filter(lambda text: text != PASSPHRASE and "\n" not in text))
def test_another_passphrase_opens_nothing(passphrase):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tradelab.secrets"
        path.write_text(TEXT)
        with pytest.raises(SecretsError, match="the passphrase does not open .*: it is another one"):
            open_box(path, passphrase)
        assert path.read_text() == TEXT


def test_a_refusal_changes_nothing(here, project):
    file = File(here)
    file.put("testnet_key", SecretStr(PLANTED), 0)
    before = file.path.read_bytes()
    (project / "word").write_text("another passphrase")
    for ask in (lambda: file.put("testnet_secret", SecretStr("x"), 1), lambda: file.renew(1), lambda: file.get(1)):
        with pytest.raises(SecretsError, match="the passphrase does not open"): ask()
        assert file.path.read_bytes() == before
    assert [each.name for each in project.glob(".*.part")] == []


def test_a_rotated_key_opens_nothing_that_was_sealed_before(here):
    "Who has copied the old data key out of a process reads no later file with it"
    file = File(here)
    file.put("testnet_key", SecretStr(PLANTED), 0)
    old, head = open_box(file.path, PASSPHRASE), read_head(file.path)
    file.renew(1)
    new = open_box(file.path, PASSPHRASE)
    assert new.key != old.key
    assert new.values == old.values
    assert new.times == old.times
    assert all(read_head(file.path)[part] != head[part] for part in ("content", "wrapped"))
    with pytest.raises(secrets.InvalidTag):
        secrets.unseal(old.key, read_head(file.path)["content"], secrets._beside(read_head(file.path), *secrets._OPEN))


@given(st.lists(st.tuples(st.sampled_from(["put", "renew", "get"]), st.integers(0, 100)), max_size=8))
def test_the_data_key_is_never_used_for_longer_than_30_days(steps):
    "Whatever is done with the file, and whenever: by the next use its key is new, and nothing is lost"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(secrets, "COST", COSTS[0])
        Path("tradelab.toml").touch()
        Path("word").write_text(PASSPHRASE)
        file, now, kept = File(settings(passphrase_file=Path("word"))), 0, {}
        file.put("testnet_key", SecretStr(PLANTED), 0)
        for number, (what, days) in enumerate(steps):
            now += days * DAY
            if what == "renew": file.renew(now)
            if what == "get": file.get(now)
            if what == "put":
                kept[f"name_{number}"] = SecretStr(str(number))
                file.put(f"name_{number}", kept[f"name_{number}"], now)
            assert now - read_head(file.path)["made"] <= RENEWED_AFTER
        assert file.get(now) == kept | {"testnet_key": SecretStr(PLANTED)}


def test_a_file_that_cannot_be_renewed_still_opens(here, monkeypatch, caplog):
    file = File(here)
    file.put("testnet_key", SecretStr(PLANTED), 0)
    file.path.with_name(file.path.name + ".lock").unlink()
    file.path.with_name(file.path.name + ".lock").mkdir() # as on a disk that is only read
    assert file.get(RENEWED_AFTER + 1)["testnet_key"] == SecretStr(PLANTED)
    assert "is due for a new data key, which cannot be written" in caplog.text
    assert read_head(file.path)["made"] == 0


NEW = "another horse, another battery"


def test_a_new_passphrase_opens_all_and_the_old_one_nothing_that_is_written_now(here, project):
    set_secret(here, "testnet_key", PLANTED, now=0)
    before = open_box(here.secrets_file, PASSPHRASE)
    assert "has a new passphrase and a new data key; word holds it" in change_passphrase(here, NEW, now=1)
    assert (project / "word").read_text() == NEW + "\n"
    assert oct((project / "word").stat().st_mode)[-3:] == "600"
    after = open_box(here.secrets_file, NEW)
    assert (after.values, after.times) == (before.values, before.times)
    assert after.salt != before.salt and after.key != before.key and after.made == 1
    with pytest.raises(SecretsError, match="does not open"): open_box(here.secrets_file, PASSPHRASE)


def whole(project): return {each.name: each.read_bytes() for each in filter(Path.is_file, project.iterdir())}


@pytest.mark.parametrize("change", [lambda here: change_passphrase(here, NEW),
                                    lambda here: remove_secret(here, "testnet_key")])
def test_a_wrong_passphrase_or_a_disk_that_fails_changes_nothing(here, project, change, monkeypatch):
    set_secret(here, "testnet_key", PLANTED, now=0)
    (project / "word").write_text("a wrong passphrase\n")
    before = whole(project)
    with pytest.raises(SecretsError, match="the passphrase does not open"): change(here)
    assert whole(project) == before
    (project / "word").write_text(PASSPHRASE + "\n")
    before = whole(project)
    for name in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            def fail(*words): raise OSError(28, "No space left on device")
            patch.setattr(os, name, fail)
            if name == "write": patch.setattr("tradelab.files._write_to_disk", fail)
            with pytest.raises(StorageError, match="No space left on device"): change(here)
        assert whole(project) == before


def test_a_passphrase_file_that_cannot_be_written_leaves_the_secrets_as_they_were(here, project):
    set_secret(here, "testnet_key", PLANTED, now=0)
    (project / "fixed").mkdir()
    (project / "fixed" / "word").write_text(PASSPHRASE)
    here = settings(passphrase_file=Path("fixed/word"))
    (project / "fixed" / f".word.{os.getpid()}.part").mkdir() # as in a folder that nobody may write
    before = here.secrets_file.read_bytes()
    with pytest.raises(OSError): change_passphrase(here, NEW)
    assert here.secrets_file.read_bytes() == before
    assert (project / "fixed" / "word").read_text() == PASSPHRASE


CHANGER = """
import sys
from pathlib import Path
from tradelab import secrets
from tradelab.config import settings
secrets.COST = secrets.COSTS[0]
here = settings(passphrase_file=Path("word"))
print("ready", flush=True)
for number in range(10_000):
    secrets.change_passphrase(here, f"a passphrase of number {number}", number)
    secrets.set_secret(here, "testnet_secret", f"value-{number}", number)
    secrets.remove_secret(here, "testnet_secret")
"""


@pytest.mark.integration
def test_killed_while_the_passphrase_changes_one_of_the_two_opens_it(here, project):
    "Two files cannot be replaced at once: in between, the new passphrase is the one that a person has typed"
    set_secret(here, "testnet_key", PLANTED, now=0)
    for pause in (.05, .15, .3, .55):
        changer = subprocess.Popen([sys.executable, "-c", CHANGER], stdout=subprocess.PIPE, text=True)
        assert changer.stdout.readline() == "ready\n"
        time.sleep(pause)
        changer.kill()
        changer.wait()
        said = (project / "word").read_text().strip()
        number = int(said.rpartition(" ")[2]) if "number" in said else -1
        opened = [word for word in (said, f"a passphrase of number {number + 1}") if opens(here, word)]
        assert len(opened) == 1
        assert open_box(here.secrets_file, opened[0]).values["testnet_key"] == SecretStr(PLANTED)
        (project / "word").write_text(opened[0])


def opens(here, passphrase):
    try: return bool(open_box(here.secrets_file, passphrase))
    except SecretsError: return False


PLANS = st.lists(st.lists(st.sampled_from(["put", "renew", "get"]), min_size=1, max_size=4), min_size=2, max_size=4)


@effort(max_examples=12)
@given(PLANS)
def test_of_several_writers_none_is_lost(plans):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(secrets, "COST", COSTS[0])
        Path("tradelab.toml").touch()
        Path("word").write_text(PASSPHRASE)
        file, failed = File(settings(passphrase_file=Path("word"))), []
        file.put("testnet_key", SecretStr(PLANTED), 0)
        def work(who, plan):
            try:
                for number, what in enumerate(plan):
                    if what == "put": file.put(f"name_{who}", SecretStr(f"{who}.{number}"), number)
                    if what == "renew": file.renew(number)
                    if what == "get": assert file.get(0)["testnet_key"] == SecretStr(PLANTED)
            except BaseException as error: failed.append(error)
        threads = [threading.Thread(target=work, args=each) for each in enumerate(plans)]
        for each in threads: each.start()
        for each in threads: each.join()
        assert failed == []
        last = {f"name_{who}": SecretStr(f"{who}.{max(n for n, what in enumerate(plan) if what == 'put')}")
                for who, plan in enumerate(plans) if "put" in plan}
        assert file.get(0) == last | {"testnet_key": SecretStr(PLANTED)}


WRITER = """
import sys
from pathlib import Path
from pydantic import SecretStr
from tradelab import secrets
from tradelab.config import settings
secrets.COST = secrets.COSTS[0]
file = secrets.File(settings(passphrase_file=Path("word")))
print("ready", flush=True)
for number in range(int(sys.argv[2])):
    file.put(sys.argv[1], SecretStr(f"{sys.argv[1]}-planted-{number}"), number)
    file.renew(number)
"""


def writer(name, times):
    started = subprocess.Popen([sys.executable, "-c", WRITER, name, str(times)], stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "ready\n"
    return started


@pytest.mark.integration
def test_of_several_processes_none_is_lost_and_a_killed_one_breaks_nothing(here, project):
    file = File(here)
    file.put("testnet_key", SecretStr(PLANTED), 0)
    victim, others = writer("victim", 10_000), [writer(f"writer_{n}", 4) for n in range(2)]
    deadline, seen = time.monotonic() + 60, 0
    while any(each.poll() is None for each in others) and time.monotonic() < deadline:
        assert file.get(0)["testnet_key"] == SecretStr(PLANTED)
        if (seen := seen + 1) % 2 == 0:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            victim = writer("victim", 10_000)
    victim.kill()
    victim.wait()
    assert [each.wait() for each in others] == [0, 0]
    assert seen > 1
    assert {file.get(0)[f"writer_{n}"].get_secret_value() for n in range(2)} == {f"writer_{n}-planted-3"
                                                                                 for n in range(2)}
    for each in filter(Path.is_file, project.iterdir()): # also what a killed one left behind
        assert b"planted" not in each.read_bytes(), each
        if each.name.startswith("."): assert each.stat().st_mode & 0o77 == 0


def test_a_lock_that_is_a_link_is_not_followed(here, project):
    (project / "tradelab.secrets.lock").symlink_to(project / "elsewhere")
    with pytest.raises(SecretsError, match="cannot be written"):
        with alone(here.secrets_file): pass
    assert not (project / "elsewhere").exists()


def test_keys_of_the_file_lead_to_the_testnet_and_those_of_the_environment_count_more(here, monkeypatch):
    file = File(here)
    for name in ("testnet_key", "testnet_secret"): file.put(name, SecretStr(f"{PLANTED}-{name}"), 0)
    assert venue_for(with_keys(here)).key.get_secret_value() == f"{PLANTED}-testnet_key"
    monkeypatch.setenv("TRADELAB_TESTNET_KEY", "from the environment")
    found = venue_for(with_keys(settings(passphrase_file=Path("word"))))
    assert (found.name, found.key.get_secret_value()) == ("testnet", "from the environment")
    assert found.secret.get_secret_value() == f"{PLANTED}-testnet_secret"


class Terminal:
    "A person at a terminal: types when asked, and sees everything that is shown"

    def __init__(self, *words):
        program = "from tradelab import command, secrets; secrets.COST = secrets.COSTS[0]; command.main()"
        pid, self.master = pty.fork()
        if not pid: os.execv(sys.executable, [sys.executable, "-c", program, *words])
        self.pid, self.shown = pid, ""

    def until(self, words):
        deadline = time.monotonic() + 120
        while words not in self.shown and time.monotonic() < deadline:
            if not select.select([self.master], [], [], 1)[0]: continue
            try: self.shown += os.read(self.master, 4096).decode()
            except OSError: break
        assert words in self.shown, self.shown

    def answer(self, question, words):
        self.until(question)
        os.write(self.master, (words + "\n").encode())

    def end(self):
        while True:
            try:
                if not (more := os.read(self.master, 4096)): break
            except OSError: break
            self.shown += more.decode()
        os.close(self.master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.integration
def test_what_a_person_types_is_not_seen(project):
    typing = Terminal("secrets", "set", "testnet_key")
    typing.answer("testnet_key: ", PLANTED)
    typing.answer("New passphrase of tradelab.secrets: ", PASSPHRASE)
    typing.answer("Again: ", PASSPHRASE)
    assert typing.end() == 0, typing.shown
    assert "testnet_key is kept in tradelab.secrets" in typing.shown
    assert PLANTED not in typing.shown and PASSPHRASE not in typing.shown
    assert open_box(project / "tradelab.secrets", PASSPHRASE).values["testnet_key"] == SecretStr(PLANTED)
    typing = Terminal("secrets", "set", "testnet_secret")
    typing.answer("testnet_secret: ", PLANTED)
    typing.answer("Passphrase of tradelab.secrets: ", "another passphrase")
    assert typing.end() == 1
    assert "the passphrase does not open" in typing.shown
    assert "Traceback" not in typing.shown


@pytest.mark.integration
def test_a_job_that_a_person_starts_asks_once(project):
    "Before it starts; its kernel, which nobody sits at, reads the passphrase from the memory of the process that asked"
    (project / "tradelab.secrets").write_text(sealed_text(with_secret(BOX, "testnet_secret", SecretStr(PLANTED), 0)))
    check = "from tradelab.checks import check_job\ncheck_job(venue='testnet')"
    code = ("from tradelab.config import settings\nfrom tradelab.secrets import with_keys\nkey = "
            "with_keys(settings(venue='testnet')).testnet_key.get_secret_value()\nprint(len(key), 'letters:', key)")
    cells = [nbformat.v4.new_code_cell("steps:int = 1", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(check, metadata={"tags": ["check"]}), nbformat.v4.new_code_cell(code)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), project / "job.ipynb")
    typing = Terminal("run", "job.ipynb", "--output", "out.ipynb")
    typing.answer("Passphrase of tradelab.secrets: ", PASSPHRASE)
    assert typing.end() == 0, typing.shown
    assert f"{len(PLANTED)} letters: [redacted]" in typing.shown
    for shown in (typing.shown, *(path.read_text() for path in project.glob("out.*"))):
        assert PLANTED not in shown and PASSPHRASE not in shown


def test_an_old_key_is_reminded_of_when_it_is_used(here, caplog):
    file = File(here)
    for name in ("testnet_key", "testnet_secret"): file.put(name, SecretStr(f"{PLANTED}-{name}"), 0)
    with_keys(here, now=secrets.REMINDED_AFTER - 1)
    assert "days old" not in caplog.text
    with_keys(here, now=secrets.REMINDED_AFTER)
    assert "testnet_secret is 90 days old: make a new one at the exchange, then tradelab secrets set" in caplog.text
    assert PLANTED not in caplog.text


@pytest.mark.integration
def test_nobody_is_asked_where_nobody_sits(project):
    (project / "tradelab.secrets").write_text(TEXT)
    ran = subprocess.run([sys.executable, "-c", "from tradelab.command import main; main()", "secrets", "rotate"],
                         stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True)
    assert ran.returncode == 1
    assert "nobody can be asked here: let TRADELAB_PASSPHRASE_FILE name a file" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert (project / "tradelab.secrets").read_text() == TEXT


@pytest.mark.integration
def test_a_person_changes_the_passphrase_and_is_seen_by_nobody(project):
    (project / "tradelab.secrets").write_text(TEXT)
    typing = Terminal("secrets", "passphrase")
    typing.answer("Passphrase of tradelab.secrets: ", PASSPHRASE)
    typing.answer("New passphrase of tradelab.secrets: ", NEW)
    typing.answer("Again: ", NEW)
    assert typing.end() == 0, typing.shown
    assert "tradelab.secrets has a new passphrase" in typing.shown
    assert PASSPHRASE not in typing.shown and NEW not in typing.shown
    assert open_box(project / "tradelab.secrets", NEW).values["testnet_key"] == SecretStr(PLANTED)
