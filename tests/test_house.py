"The never-rules: who may import what, who owns what, and what a job must not do"
import ast
import builtins
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
JOBS = [path for path in NOTEBOOKS if path.parent.name == "nbs" and path.stem != "index"]
MODULES = [path for path in sorted((ROOT / "tradelab").rglob("*.py")) if path.name not in ("__init__.py", "_modidx.py")]
OWNERS = {  # a library lives in one named place
    "ccxt": {"tradelab.sources.exchange", "tradelab.venues.binance_client"}, "yfinance": {"tradelab.sources.yahoo"},
    "curl_cffi": {"tradelab.sources.yahoo"},
    "torch": "tradelab.learn", "stable_baselines3": "tradelab.learn", "gymnasium": "tradelab.learn", "sklearn": set(),
    "lightgbm": {"tradelab.learn.plug_in"},
    "sqlalchemy": {"tradelab.database.schema", "tradelab.database.engine", "tradelab.database.rows",
                   "tradelab.database.reading", "tradelab.database.migrations", "tradelab.database.operations",
                   "tradelab.database.backup", "tradelab.live.ledger", "tradelab.live.audit"},
    "alembic": {"tradelab.database.migrations"}, "psycopg": {"tradelab.database.engine"},
    "aiohttp": {*(f"tradelab.localnet.{name}" for name in ("server", "sockets", "sources")),
                *(f"tradelab.ops.{name}" for name in ("exposition", "line_protocol", "health", "serve"))},
    "prometheus_client": {"tradelab.ops.exposition"}, "telegram": {"tradelab.ops.telegram"},
    "fastapi": {"tradelab.ops.routes"}, "starlette": {"tradelab.ops.routes", "tradelab.ops.dashboard"},
    "uvicorn": {"tradelab.ops.routes"}, "redis": {"tradelab.database.redis"},
    "jwt": {"tradelab.ops.people"}, "apscheduler": {"tradelab.ops.schedule"},
    "cryptography": {"tradelab.localnet.protocol", "tradelab.secrets"}, "keyring": {"tradelab.secrets"},
    "anywidget": {"tradelab.ops.dashboard"}, "papermill": {"tradelab.jobs"}, "apprise": {"tradelab.live.alerts"},
    "click": {"tradelab.jobs", "tradelab.command"},
    "dotenv": {"tradelab.config"}, "pydantic_settings": {"tradelab.config"}, "tomllib": {"tradelab.config"},
    "nbdev": set(), "fastcore": set(), "execnb": set()}


def cells(path):
    return [("".join(cell["source"]), cell.get("metadata", {}).get("tags", []))
            for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def number_of_modules():
    "(floor, chapter) of each chapter by the module that it exports"
    numbers = {}
    for path in NOTEBOOKS:
        exports = re.search(r"#\s*\|\s*default_exp\s+([\w.]+)", "\n".join(source for source, _ in cells(path)))
        if exports and exports[1] != "__init__":  # the front door imports nothing by itself
            numbers[f"tradelab.{exports[1]}"] = tuple(int(re.match(r"\d+", name)[0]) for name in (path.parent.name,
                path.name))
    return numbers


@pytest.fixture(scope="module")
def graph(): return grimp.build_graph("tradelab", include_external_packages=True, cache_dir=None)


def test_contracts():
    ran = subprocess.run([Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True,
                         text=True)
    assert ran.returncode == 0, ran.stdout


def test_no_chapter_imports_an_equal_or_higher_number(graph):
    numbers, climbing = number_of_modules(), []
    for module, number in numbers.items():
        climbing += [f"{module} ({number}) imports {other} ({numbers[other]})"
                     for other in graph.find_modules_directly_imported_by(module)
                     if numbers.get(other, (-1,)) >= number]
    assert not climbing


def test_chapters_count_from_1_on_each_floor():
    "`nbs/how_to` is no floor: its pages export nothing"
    for folder in sorted({path.parent for path in NOTEBOOKS if path.parent.name not in ("nbs", "how_to")}):
        numbers = [int(re.match(r"\d+", path.name)[0]) for path in sorted(folder.glob("*.ipynb"))]
        assert numbers == list(range(1, len(numbers) + 1)), folder.name


def test_git_keeps_every_module():
    "A room may have the name of a folder that is ignored"
    if not (ROOT / ".git").exists(): pytest.skip("not a git checkout")
    ran = subprocess.run(["git", "check-ignore", *map(str, MODULES)], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "" and ran.returncode == 1, ran.stdout + ran.stderr


def test_the_trader_imports_the_ground_only(graph):
    ours = {module for module in graph.find_upstream_modules("tradelab.trader") if module.startswith("tradelab.")}
    assert all(module.count(".") == 1 for module in ours), ours


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_lives_in_one_place(graph, library):
    if library not in graph.modules: return
    owner = OWNERS[library]
    strangers = {module for module in graph.find_modules_that_directly_import(library)
                 if not (module.startswith(owner + ".") if isinstance(owner, str) else module in owner)}
    assert not strangers


def test_errors_have_one_root_and_end_in_error():
    "`except TradelabError` catches whatever a room raises by a name of its own; private ones never leave their chapter"
    classes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    bases = {node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases] for node in classes}
    def ancestors(name): return {name}.union(*(ancestors(base) for base in bases.get(name, ()) if base != name))
    errors = {name for name in bases if any(hasattr(builtins, each) and issubclass(getattr(builtins, each), Exception)
              for each in ancestors(name) if isinstance(getattr(builtins, each, None), type))}
    assert len(errors) > 20
    assert not [name for name in errors if not name.endswith("Error")]
    assert not [name for name in errors if "TradelabError" not in ancestors(name)]


COMPILED = re.compile(r"compiled|inlined|outlined|njit|c_function")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def public_functions(tree):
    "Functions and methods that others call and that numba does not compile"
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for each in members:
            if (isinstance(each, FUNCTIONS) and not each.name.startswith("_")
                and not any(COMPILED.search(ast.unparse(decorator)) for decorator in each.decorator_list)):
                yield each


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT / "tradelab").as_posix())
def test_what_others_call_is_annotated(path):
    bare = [f"{each.name}({argument.arg})" for each in public_functions(ast.parse(path.read_text()))
            for argument in (*each.args.posonlyargs, *each.args.args, *each.args.kwonlyargs)
            if argument.annotation is None and argument.arg not in ("self", "cls")]
    assert bare == []
    assert [each.name for each in public_functions(ast.parse(path.read_text())) if each.returns is None] == []


def test_only_config_reads_the_environment():
    names = {"environ", "getenv", "environb"}
    readers = {path.stem for path in MODULES for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.Attribute) and node.attr in names or isinstance(node, ast.ImportFrom)
               and names & {alias.name for alias in node.names}}
    assert readers == {"config"}


PARSERS = {"json.load", "yaml.safe_load", "yaml.load", "tomllib.load", "np.load", "pd.read_csv", "pd.read_json",
           "pd.read_parquet", "pd.read_excel", "pd.read_pickle", "pq.read_table", "pq.ParquetFile", "ZipFile",
           "zipfile.ZipFile", "gzip.open", "pickle.load", "pickle.loads", "torch.load"}
READERS = {  # who reads files in another way, and why
    "tradelab/compiled.py": "sources of the package, before there is a door",
    "tradelab/live/recorder.py": "frame by frame, each of bounded size and proven",
    "tradelab/runs/registry.py": "the last byte of a log that it appends to",
    "tradelab/database/backup.py": "the copy of a ledger, block by block, for its digest",
    "tradelab/live/lease.py": "what the system says of a process",
    "tradelab/log.py": "the log, which it appends to",
    "tradelab/log_lines.py": "the log, line by line, while others write it",
    "tradelab/incident.py": "the same, of one hour",
    "tradelab/localnet/memory.py": "the first line of a file, of bounded length",
    "tradelab/localnet/server.py": "the answer of a localnet on this machine"}


def read_past_the_door(path):
    "Calls that read a file by its name, other than those of `tradelab.files`"
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call): continue
        name = ast.unparse(node.func)
        first = ast.unparse(node.args[0]) if node.args else ""
        mode = [each.value for each in (*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode"))
                if isinstance(each, ast.Constant)]
        if name == "open" and (not mode or set("r+") & set(mode[0])): yield f"{node.lineno}: {name}({first})"
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "read_bytes") and not node.args:
            yield f"{node.lineno}: {name}()"
        if name in PARSERS and not re.match(r"(io\.)?BytesIO\(|content$|pa\.BufferReader\(", first):
            yield f"{node.lineno}: {name}({first})"


def test_files_are_read_through_one_door():
    "Plain files of bounded size and depth only: `tradelab.files` opens them, parsers are given their bytes"
    found = {path.relative_to(ROOT).as_posix(): list(read_past_the_door(path)) for path in MODULES}
    found.pop("tradelab/files.py")
    assert {name for name, calls in found.items() if calls} == set(READERS), found


HTML = re.compile(r"</?(p|b|br|td|th|tr|table|div|span|section|h[1-6]|small|title|style|body|img|svg)\b[^<]*>")


def unescaped(path):
    "What stands in f-strings of HTML without a function of `tradelab.texts`, or one of ours that makes HTML, around it"
    tree = ast.parse(path.read_text())
    made = {target.id for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets
            if isinstance(target, ast.Name)
            and isinstance(node.value, (ast.Call, ast.JoinedStr, ast.IfExp, ast.Constant))}
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr): continue
        if not HTML.search("".join(each.value for each in node.values if isinstance(each, ast.Constant))): continue
        for each in (each for each in node.values if isinstance(each, ast.FormattedValue)):
            spec = "".join(str(each.value) for each in each.format_spec.values if isinstance(each, ast.Constant)
                           ) if each.format_spec else ""
            value = each.value
            safe = (isinstance(value, ast.Call) or spec[-1:] in tuple("dfg%e,") or isinstance(value, ast.Name)
                    and (value.id in made or value.id.isupper()) or isinstance(value, ast.IfExp))
            if not safe: yield f"{node.lineno}: {ast.unparse(value)}"


def test_foreign_text_goes_through_one_door():
    "Only `tradelab.texts` escapes for HTML and cleans for a terminal; a page takes nothing that did not pass it"
    escape = re.compile(r"from html import|import html\b|unicodedata")
    escapers = {path.stem for path in MODULES if escape.search(path.read_text())}
    assert escapers == {"texts"}
    assert {path.name: bad for path in MODULES if path.stem != "texts" and (bad := list(unescaped(path)))} == {}


def test_what_a_session_tells_has_a_kind_and_a_level():
    from tradelab.notices import NOTICES
    told = {node.args[0].value for room in ("live", "venues") for path in (ROOT / "tradelab" / room).glob("*.py")
            for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args
            and ast.unparse(node.func).rpartition(".")[2] in ("Notice", "note", "_note")
            and isinstance(node.args[0], ast.Constant)}
    assert told == set(NOTICES)


def test_only_account_changes_a_position():
    change = re.compile(r"(positions?(\[\w+\])?\[\"(quantity|entry_price)\"\])(\[\w+\])?\s*[-+*/]?=(?!=)")
    assert {path.stem for path in MODULES if change.search(path.read_text())} <= {"account"}


STATE = {"trading_state", "required_state", "halted", "day_stopped"} # what is allowed, and the three reasons why


def written(path):
    "Fields of arrays that a module or a notebook's cells write, by name"
    text = (path.read_text() if path.suffix == ".py" else "\n".join(re.sub(r"^[%!].*$", "", source, flags=re.M)
        for source, _ in cells(path)))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
            yield node.slice.value


def test_only_trading_state_changes_what_is_allowed():
    "Everybody else reads one field of the account; who wants it changed calls `require_state` or `resume`"
    owner = ROOT / "tradelab/risk/trading_state.py"
    page = ROOT / "nbs/30_risk/04_trading_state.ipynb"
    assert set(written(owner)) >= STATE
    assert {path.name: set(written(path)) & STATE for path in (*MODULES, *NOTEBOOKS) if path not in (owner, page)
            and set(written(path)) & STATE} == {}
    readers = {path.name for path in MODULES if path != owner
               and re.search(r"\[\"(required_state|halted|day_stopped)\"\]", path.read_text())}
    # for the sentence that says why, never for what is allowed
    assert readers <= {"order_limits.py", "core.py", "agreement.py", "emergency.py", "steps.py"}


def test_no_process_is_signalled_by_its_number():
    "A number may be another process by now. What a session is told is in the ledger; a job's kernel is a child; 0 asks"
    sends = re.compile(r"\b(os\.kill(?!\(.*, 0\))|killpg|pidfd_send_signal|pthread_kill|raise_signal|send_signal)\b")
    assert [path.stem for path in MODULES for _ in sends.findall(path.read_text())] == ["jobs"]


def test_nothing_waits_in_a_way_that_may_lose_a_cancellation():
    "On Python 3.11 `asyncio.wait_for` returns a result that comes in the moment of a cancellation, and nothing else"
    assert [path.stem for path in MODULES if "asyncio.wait_for(" in path.read_text()] == []


def test_no_clock_where_it_decides():
    clock = re.compile(r"\b(time\.time|time\.monotonic|datetime\.now|Timestamp\.now|Timestamp\.utcnow|perf_counter)\(")
    rooms = ("features", "risk", "evaluation", "sim")
    assert not [path for path in MODULES if (path.parent.name in rooms or path.stem in ("account", "policies", "trader",
        "times", "instruments", "settings", "orders", "events", "journal")) and clock.search(path.read_text())]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_wiring_only(path):
    parts = cells(path)
    trees = [ast.parse("\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))))
             for source, _ in parts]
    assert not [node for tree in trees for node in ast.walk(tree)
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    tagged = [tree for tree, (_, tags) in zip(trees, parts, strict=True) if "parameters" in tags]
    assert len(tagged) == 1
    assert 1 <= len(tagged[0].body) <= 11
    for line in tagged[0].body: ast.literal_eval(line.value)
    assert "default_exp" not in "".join(source for source, _ in parts)


def test_what_a_notebook_shows_as_a_table_is_printed_as_one():
    "A dataclass of arrays says nothing where it is printed in a script"
    classes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.ClassDef)]
    methods = {node.name: {each.name for each in node.body if isinstance(each, ast.FunctionDef)} for node in classes}
    shown = {name for name, has in methods.items() if has & {"_repr_html_", "table"}}
    assert len(shown) > 10
    assert not [name for name in shown if not methods[name] & {"__str__", "__repr__"}]


NAMED = [path for room in ("risk", "evaluation", "runs", "sim", "learn")
         for path in sorted((ROOT / "tradelab" / room).glob("*.py"))]
FOREIGN = {"step", "step_wait", # what gymnasium and stable-baselines3 want back
           "reached"}           # the words of one mask


@pytest.mark.parametrize("path", NAMED, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_what_travels_together_has_names(path):
    "Four values or more are a record: a tuple that is unpacked by position changes its meaning without a word"
    functions = [each for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.FunctionDef)
                 and each.name not in FOREIGN]
    returned = [(each.name, part.value.elts) for each in functions for part in ast.walk(each)
                if isinstance(part, ast.Return) and isinstance(part.value, ast.Tuple)]
    assert not [name for name, values in returned if len(values) > 3
                or any(isinstance(value, ast.Starred) for value in values)]


def test_nothing_imports_a_job():
    loads = re.compile(r"^\s*%run\b|^\s*(from|import)\s+nbs\b|import_?notebook", re.M)
    assert not [path for path in MODULES if loads.search(path.read_text())]
    assert not [path for path in NOTEBOOKS for source, _ in cells(path) if loads.search(source)]


def imports_of(job):
    "The import lines of a job notebook"
    lines = "\n".join(source for source, _ in cells(ROOT / "nbs" / f"{job}.ipynb")).splitlines()
    return "\n".join(line for line in lines if re.match(r"(from|import) ", line))


TRAINING = {"torch", "stable_baselines3", "gymnasium", "tradelab.learn", "tradelab.sim.backtest"}
ALIVE = f"{imports_of('live')}\nload('tradelab.strategies.example:SmaCross')" # up to the start of a session


@pytest.mark.integration
@pytest.mark.parametrize("code, heavy",
                         [("import tradelab.sim.backtest", {"torch", "ccxt", "sqlalchemy", "matplotlib.pyplot",
                                                            "papermill", "tradelab.learn"}),
                          (ALIVE, TRAINING), ("import tradelab.command", {"numba", "pandas", "papermill"})],
                          ids=["backtest", "live", "command"])
def test_an_import_loads_no_more_than_it_needs(code, heavy):
    probe = f"import sys\n{code}\nprint(*({heavy!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and ran.stdout.strip() == "", ran.stdout + ran.stderr


def test_nobody_is_told_to_install_a_stranger():
    "The name on the public index is somebody else's package"
    texts = [*MODULES, *NOTEBOOKS, ROOT / "README.md", ROOT / "tradelab.toml.example", ROOT / "settings.ini",
             ROOT / "setup.py", ROOT / "Makefile"]
    assert not [path for path in texts if re.search(r"pip install [^.\n]*\btradelab\b(?! *in the folder)",
                                                    path.read_text().replace("\\", "").replace("'.[", ".["))]


def test_what_the_benchmarks_import_is_there():
    "Nobody runs them with every change, so a renamed word would be missed until somebody measures"
    missing = []
    for file in sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / ".ci").rglob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "tradelab": continue
            module = importlib.import_module(node.module)
            rooms = [each.stem for each in (ROOT / node.module.replace(".", "/")).glob("*.py")]
            missing += [f"{file.name}: {node.module}.{each.name}" for each in node.names
                        if not hasattr(module, each.name) and each.name not in rooms]
    assert not missing
