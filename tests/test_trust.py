"""Nothing that a file or a parameter names runs here unless it is vouched for, and what a foreign file holds is read or
refused"""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tradelab.features.grammar import FeatureError, parse
from tradelab.features.observation import PORTFOLIO
from tradelab.instruments import BITCOIN
from tradelab.policies import Policy, Scaler, mlp, network_fits, pack
from tradelab.runs.formats import CONFIG, MANIFEST, POLICY, SCALER, DamagedRunError, seal
from tradelab.runs.registry import TRIALS, load, read, save, trials
from tradelab.runs.rules import UnknownRunError
from tradelab.runs.run import Run
from tradelab.trust import NotTrustedError, check_id, locate

FEW = settings(max_examples=80, suppress_health_check=list(HealthCheck))
ID = "train_BTC_20240101_20240201_SAC_lr0.0003_bs256_ws1_seed7_20240301_000000"
CONFIGURATION = dict(agent="SAC", steps=1, interrupted=False, learning_rate=3e-4, batch_size=256, seed=7, threads=1,
                     source="", span=["2024-01-01", "2024-02-01"], data_hash="", created_time=0)


def network(inputs, outputs, seed=0):
    random = np.random.default_rng(seed)
    return pack([(random.normal(size=(8, inputs)), random.normal(size=8)),
                 (random.normal(size=(outputs, 8)), random.normal(size=outputs))], "relu", "tanh")


def make_run(folder, name=ID, features=("return(1)",)):
    count = len(features)
    policy = Policy("random", mlp, network(count + len(PORTFOLIO), 1), features,
                    scaler=Scaler((0.,) * count, (1.,) * count))
    return save(Run(name, policy, instruments=(BITCOIN,), timeframe="1h", config=CONFIGURATION), folder=folder)


@pytest.fixture
def path(project, monkeypatch):
    "An empty project that can be imported from; what a test imports is forgotten"
    monkeypatch.syspath_prepend(project)
    before = set(sys.modules)
    yield project
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or project).startswith(str(project)): del sys.modules[name]


def mark(project, name="evil.py", rest="def Rule(): open('ran', 'a')\nRULE = Rule\nclass Other: pass\n"):
    "A module that leaves a file where it runs"
    (project / name).parent.mkdir(parents=True, exist_ok=True)
    (project / name).write_text(f"open({str(project / 'ran')!r}, 'a').close()\nfrom tradelab.policies import Policy, "
                                f"flat\n{rest}")


@pytest.mark.parametrize("name", [
    "os:system('touch ran')", "subprocess:call(['touch', 'ran'])", "pathlib:Path('ran').touch",
    "builtins:exec(\"open('ran','w')\")", "shutil:rmtree('.')", "os:getcwd", "os.path:exists('x')",
    "posix:system('touch ran')",
    "runpy:run_path('evil.py')", "importlib:import_module('evil')", "tradelab.jobs:run('train')",
    "tradelab.config:settings", "tradelab.market.store:replace_files({})", "tradelab.learn.agents:train('SAC')",
    "tradelab.policies:Policy('x', None)", "tradelab.policies:pack([], 'relu', 'tanh')", "tradelab.policies:np",
    "tradelab.trust:import_module('evil')", "tradelab.compiled:Path('ran')", "evil:Rule", "evil:RULE", "evil:Other",
    "evil:nothing"])
def test_no_name_calls_what_is_no_rule(path, name):
    mark(path)
    with pytest.raises((NotTrustedError, UnknownRunError)): load(name)
    if "'" not in name:
        with pytest.raises(FeatureError): parse(name)
    assert not (path / "ran").exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("place", ["runs/train_x", "sessions/x", "data", "reports/live", "logs", "downloads/run",
                                   ".hidden", "venv/lib", "lib/site-packages"])
def test_a_run_folder_inside_the_project_is_foreign(path, monkeypatch, place):
    "However it got onto the path, and from whichever folder one works"
    mark(path, f"{place}/evil.py", "def Rule()->Policy: return flat()\n")
    if place == "downloads/run": (path / place / "MANIFEST.json").touch()
    if place == "venv/lib": (path / "venv/pyvenv.cfg").touch()
    monkeypatch.syspath_prepend(path / place)
    for folder in (path, path / place):
        monkeypatch.chdir(folder)
        with pytest.raises(NotTrustedError, match="is neither tradelab's nor in the folder of the project"):
            load("evil:Rule")
    assert not (path / "ran").exists()


def test_a_link_does_not_move_a_run_folder_into_the_project(path):
    mark(path, "runs/x/evil.py", "def Rule()->Policy: return flat()\n")
    (path / "mine.py").symlink_to(path / "runs/x/evil.py")
    with pytest.raises(NotTrustedError): load("mine:Rule")
    assert not (path / "ran").exists()


def test_settings_of_a_run_folder_vouch_for_nothing(path, monkeypatch):
    mark(path, "download/evil.py", "def Rule()->Policy: return flat()\n")
    (path / "download" / "tradelab.toml").write_text("[trust]\nmodules = ['evil', 'os']")
    (path / "download" / MANIFEST).touch()
    monkeypatch.syspath_prepend(path / "download")
    monkeypatch.chdir(path / "download")
    for name in ("evil:Rule", "os:system('true')"):
        with pytest.raises(NotTrustedError): load(name)


def test_ones_own_rules_and_features(path, tmp_path_factory):
    "In the project's folder, in a package of it without __init__, and in a module that the settings list"
    (path / "mine.py").write_text("from tradelab.policies import Policy, flat\nfrom tradelab.strategies.example import "
                                  "Momentum as Quick\nimport tradelab.policies as p\n"
                                  "def One(n:int=1)->Policy: return flat()\ndef Two()->'p.Policy': return "
                                  "flat()\nthree = flat()\ndef four(): return flat()\nfive:Policy = four()\n")
    (path / "deep").mkdir()
    (path / "deep" / "rules.py").write_text("from mine import One\nfrom tradelab.features.indicator import "
                                            "Indicator\nfrom tradelab.strategies.example import _gap\n"
                                            "gap = Indicator(name='deep.rules:gap', update=_gap, state=lambda: "
                                            "{'close': 1}, warm_up=lambda: 2)\n")
    for name in ("mine:One", "mine:One(3)", "mine:Two", "mine:three", "mine:five", "mine:Quick(5, 0.01)",
                 "deep.rules:One"):
        assert isinstance(load(name).policy, Policy)
    assert parse("deep.rules:gap").warm_up == 2
    with pytest.raises(NotTrustedError, match="mine:four does not say that it makes a Policy, so it is not run"):
        load("mine:four")
    with pytest.raises(UnknownRunError, match=r"mine has no 'Tow': did you mean Two\? It has One, Two, three, five"):
        load("mine:Tow")
    with pytest.raises(UnknownRunError, match="cannot be made with"): load("mine:One(1, 2)")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "theirs.py").write_text("from tradelab.policies import Policy, flat\ndef Rule()->Policy: "
                                         "return flat()\n")
    sys.path.insert(0, str(elsewhere))
    try:
        with pytest.raises(NotTrustedError, match="add it to .trust. modules in tradelab.toml"): load("theirs:Rule")
        (path / "tradelab.toml").write_text("[trust]\nmodules = ['theirs']")
        assert load("theirs:Rule").policy.name == "flat"
    finally: sys.path.remove(str(elsewhere))


def test_a_rule_beside_the_settings_is_found_from_anywhere(project):
    "A command does not have the project on its path"
    (project / "nbs" / "deeper").mkdir(parents=True)
    (project / "my_rules.py").write_text("from tradelab.policies import Policy, flat\ndef Rule()->Policy: "
                                         "return flat()\n")
    code = ("import sys; sys.path = [each for each in sys.path if each]; from tradelab.runs.registry import load; "
            "print(load('my_rules:Rule').policy.name)")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project / "nbs" / "deeper")
    assert ran.stdout == "flat\n", ran.stderr


def test_looking_for_a_source_imports_no_parent(path):
    mark(path, "loud/__init__.py", "")
    (path / "loud" / "quiet.py").touch()
    assert locate("loud.quiet") == path / "loud/quiet.py"
    assert not (path / "ran").exists()
    assert "loud" not in sys.modules


def reseal(folder):
    (folder / MANIFEST).write_bytes(seal({file.name: file.read_bytes() for file in folder.iterdir()
                                          if file.name != MANIFEST}))


def change(folder, **values):
    config = yaml.safe_load((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(yaml.safe_dump(config | values))
    reseal(folder)


@pytest.mark.filterwarnings("ignore:run .* was trained with another version")
def test_a_run_folder_that_names_foreign_code(path):
    mark(path, "runs/evil.py", "def Rule()->Policy: return flat()\n")
    run = make_run(path / "runs")
    sys.path.insert(0, str(path / "runs"))
    try:
        change(run.folder, sources={"evil": "0", "os": "0", "evil.deeper": "0", "..": "0"})
        with pytest.warns(UserWarning, match="trained with another version of evil"): read(run.folder)
        for feature in ("evil:Rule(3)", "os:system(3)", "tradelab.jobs:run(3)"):
            (run.folder / SCALER).write_text("null")
            change(run.folder, features=[feature], sources={})
            with pytest.raises(DamagedRunError, match="so nothing of it is run|so it is not run"): read(run.folder)
    finally: sys.path.remove(str(path / "runs"))
    assert not (path / "ran").exists()
    assert "evil" not in sys.modules


def test_latest_is_what_was_made_here(tmp_path, tmp_path_factory):
    first = make_run(tmp_path)
    second = make_run(tmp_path, ID.replace("seed7", "seed8"))
    theirs = make_run(tmp_path_factory.mktemp("theirs"), ID.replace("20240301", "20990101"))
    foreign = shutil.copytree(theirs.folder, tmp_path / theirs.id)
    assert load("latest", tmp_path).id == second.id
    assert load(foreign.name, tmp_path).id == foreign.name
    shutil.rmtree(second.folder)
    assert load("latest", tmp_path).id == first.id
    assert [trial["run"] for trial in trials(tmp_path)] == [first.id, second.id]
    shutil.rmtree(first.folder)
    shutil.copytree(foreign, first.folder)
    change(first.folder, seed=8) # another run under the name of one that was made here
    with pytest.raises(DamagedRunError, match="is not the one that was made here"): load("latest", tmp_path)
    (tmp_path / TRIALS).unlink()
    with pytest.raises(UnknownRunError, match="the runs in .* were not made here"): load("latest", tmp_path)


@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/b", "", "x" * 121, "a\0b", "a b", "train\n"])
def test_no_name_leaves_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name of a session"): check_id(name)
    with pytest.raises(UnknownRunError): load(name, tmp_path)
    with pytest.raises(ValueError, match="cannot be the name of a run"):
        save(Run(name, Policy("random", mlp, network(7, 1)), instruments=(BITCOIN,), config=CONFIGURATION),
             folder=tmp_path / "runs")


# what a file may hold

WIDTH = st.one_of(st.integers(-3, 12),
                  st.sampled_from([.5, np.nan, np.inf, -np.inf, 1e300, 2. ** 31, 2. ** 62, 65_537.]))


def truth(parameters, observation, outputs):
    "What `mlp` should answer, in plain numpy; None where the parameters are no network for it"
    numbers = [float(number) for number in parameters]
    if len(numbers) < 5 or numbers[0] not in range(1, 33) or any(code not in range(4) for code in numbers[1:3]):
        return None
    layers = int(numbers[0])
    widths = numbers[3:4 + layers]
    if len(widths) != layers + 1 or any(width not in range(1, 65_537) for width in widths): return None
    widths = list(map(int, widths))
    if (len(numbers) != 4 + layers + sum((a + 1) * b for a, b in zip(widths, widths[1:]))
        or widths[0] != observation.size or widths[-1] < outputs):
        return None
    values = observation.ravel().astype(float)
    at = 4 + layers
    shapes = (lambda x: x, np.tanh, lambda x: np.maximum(x, 0), lambda x: np.clip(x, -1, 1))
    for layer, (inputs, wide) in enumerate(zip(widths, widths[1:])):
        weights = parameters[at:at + inputs * wide].reshape(inputs, wide)
        bias = parameters[at + inputs * wide:at + (inputs + 1) * wide]
        values = shapes[int(numbers[2 if layer == layers - 1 else 1])](values @ weights + bias)
        at = at + (inputs + 1) * wide
    return values[:outputs]


@given(head=st.lists(WIDTH, max_size=3), widths=st.lists(WIDTH, max_size=6), right=st.booleans(),
       more=st.integers(-3, 3), seen=st.integers(0, 12), outputs=st.integers(0, 12), seed=st.integers(0, 9))
@settings(max_examples=500)
def test_a_network_cannot_leave_its_arrays(head, widths, right, more, seen, outputs, seed):
    "Any header before any number of weights: the answer of numpy, or NaN and nothing touched"
    if right: # a header that is true for small whole widths, so that some networks run
        widths = [abs(int(width)) % 12 + 1 for width in widths if np.isfinite(width)]
        head = [len(widths) - 1, 1, 3]
        seen = widths[0] if widths else seen
        outputs = min(outputs, widths[-1]) if widths else outputs
    size = sum((a + 1) * b for a, b in zip(widths, widths[1:])) if right else 40
    parameters = np.array([*head, *widths,
                           *np.random.default_rng(seed).normal(size=max(0,
        size + (0 if right and more > 0 else more)))], float)
    observation = np.random.default_rng(seed).normal(size=(1, seen)).astype(np.float32)
    around = np.full(outputs + 8, 7.)
    mlp(parameters, np.zeros(0), observation, np.zeros(0), around[4:4 + outputs])
    expected = truth(parameters, observation, outputs)
    assert (around[:4] == 7).all()
    assert (around[4 + outputs:] == 7).all()
    assert network_fits(parameters, seen, outputs) == (expected is not None)
    np.testing.assert_allclose(around[4:4 + outputs], np.full(outputs, np.nan) if expected is None else expected,
                               rtol=1e-9, atol=1e-12)
    if expected is None and parameters.size:
        try: policy = Policy("x", mlp, parameters)
        except ValueError: return
        assert network_fits(policy.parameters, int(policy.parameters[3]), 1) # a true network, for another observation


@pytest.mark.parametrize("widths", [[11, 50, -2, 60, 1], [5, 0, 1], [5, 1e9, 1], [5, 8.5, 1], [5, float("nan"), 1],
                                    [8, 8, 1]])
def test_a_model_file_with_impossible_widths(tmp_path, widths):
    import safetensors.numpy
    run = make_run(tmp_path)
    parameters = np.concatenate([[len(widths) - 1, 2, 1, *widths], np.zeros(500)])
    facts = {"function": "mlp", "name": "x", "widths": json.dumps(widths), "hidden": "relu", "last": "tanh"}
    (run.folder / POLICY).write_bytes(safetensors.numpy.save({"parameters": parameters}, facts))
    reseal(run.folder)
    with pytest.raises(DamagedRunError): read(run.folder)


LITERAL = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-10**30, 10**30), st.floats(),
                                 st.text(max_size=8),
                                 st.sampled_from(["return(1)", "1h", "2024-01-01", "os:system", 10**400, -1, 0])),
                       lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner,
    max_size=3)), max_leaves=6)


@pytest.fixture(scope="module")
def kept(tmp_path_factory): return make_run(tmp_path_factory.mktemp("runs"), features=("return(1)", "rsi(14)")).folder


@pytest.fixture(scope="module")
def copy(kept, tmp_path_factory): return shutil.copytree(kept, tmp_path_factory.mktemp("copy") / kept.name)


def refused_or_read(copy, kept, files):
    "A run whose files were changed and sealed again is read, or refused as damaged"
    for file in kept.iterdir(): shutil.copy(file, copy)
    for name, content in files.items(): (copy / name).write_bytes(content)
    if MANIFEST not in files: reseal(copy)
    try: return read(copy)
    except DamagedRunError as error: assert str(error)


@given(data=st.data())
@FEW
@pytest.mark.filterwarnings("ignore:run .* was trained with another version")
def test_any_value_in_a_configuration_is_read_or_refused(copy, kept, data):
    config = yaml.safe_load((kept / CONFIG).read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    inner = [config, *[config[key] for key in ("costs", "limits") if data.draw(st.booleans())], *config["instruments"]]
    place = data.draw(st.sampled_from(inner))
    if place is not config: key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(LITERAL)
    run = refused_or_read(copy, kept, {CONFIG: yaml.safe_dump(config).encode()})
    if run is not None:
        str(run), run._repr_html_(), run.limits.row(), [each.row() for each in run.instruments], run.costs.row()


@given(name=st.sampled_from([CONFIG, SCALER, MANIFEST, POLICY]), value=LITERAL)
@FEW
@pytest.mark.filterwarnings("ignore:run .* was trained with another version")
def test_any_file_in_the_place_of_another_is_refused(copy, kept, name, value):
    for content in (json.dumps(value).encode(), repr(value).encode(errors="replace")):
        assert name == SCALER or refused_or_read(copy, kept, {name: content}) is None
    refused_or_read(copy, kept,
                    {SCALER: json.dumps({"features": ["return(1)", "rsi(14)"], "centre": value, "scale": [1, 1],
                                         "kind": "standard"}).encode()})


@given(name=st.sampled_from([CONFIG, SCALER, MANIFEST, POLICY]), place=st.floats(0, 1, exclude_max=True),
       byte=st.integers(0, 255), cut=st.booleans())
@FEW
@pytest.mark.filterwarnings("ignore:run .* was trained with another version")
def test_any_byte_of_a_run_is_read_or_refused(copy, kept, name, place, byte, cut):
    content = bytearray((kept / name).read_bytes())
    content[int(place * len(content))] = byte
    refused_or_read(copy, kept, {name: bytes(content[:int(place * len(content))] if cut else content)})


@pytest.mark.parametrize("name", [CONFIG, SCALER, MANIFEST])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"{\"a\":" * 100_000, b"\xff\xfe\0", b"\0", b"- " * 100_000,
                                     b"1e999", b"!!python/object/apply:os.system ['touch ran']", b"9" * 5_000,
                                     b"2024-99-99"])
def test_deep_and_strange_files_are_refused(copy, kept, name, content):
    assert refused_or_read(copy, kept, {name: content}) is None


WORDS = st.lists(st.sampled_from(["rsi", "return", "macd", "os", "system", "tradelab.jobs", "tradelab.policies", "flat",
                                  "Momentum", "tradelab.strategies.example", ":", ".", "(", ")", "[", "]", "@", "4h",
                                  "-1", "ETH/USDT:USDT", ",", "14", "1e400", "nan",
                                  "0", "9" * 400, "'", "*", "=", "x", " ", "\0", "é", "²", "histogram", "{", "}",
                                  "__class__"]), max_size=9).map("".join)


@given(text=st.one_of(st.text(max_size=40), WORDS))
@FEW
def test_any_text_is_a_feature_or_a_bad_one(text):
    try: feature = parse(text)
    except FeatureError as error: assert str(error)
    else: assert parse(feature.text) == feature


@given(text=st.one_of(st.text(max_size=40), WORDS,
                      WORDS.map(lambda words: f"tradelab.strategies.example:Momentum({words})")))
@FEW
def test_any_text_is_a_rule_or_unknown(text, tmp_path_factory):
    try: run = load(text, Path("/nonexistent"))
    except (UnknownRunError, NotTrustedError, ValueError) as error: assert str(error)
    else: assert isinstance(run.policy, Policy)


@pytest.mark.integration
def test_a_job_refuses_before_anything_runs(project):
    code = ("import sys; from tradelab.runs.registry import load\ntry: load(sys.argv[1])\nexcept ValueError as error: "
            "print(error)")
    ran = subprocess.run([sys.executable, "-c", code, "os:system('touch ran; echo RAN')"], capture_output=True,
                         text=True, cwd=project)
    assert "is neither tradelab's nor in the folder of the project" in ran.stdout
    assert "RAN" not in ran.stdout
    assert not (project / "ran").exists()


KINDS = ("str", "int", "float", "bool", "list", "dict", "str|None", "int|float", "anything", "list[int]")


@given(text=st.one_of(st.text(max_size=30), WORDS,
                      st.sampled_from(["float()", "float('x')", "+-nan", "inf-", "{[]: 1}", "(" * 500,
                                       "-" * 5_000 + "1", "9" * 5_000, "\0", "1j", "f''", "*a", "a := 1", "lambda: 0",
                                       "{", "'''", "if 1:\n  a\n b"])), kind=st.sampled_from(KINDS))
@FEW
def test_any_text_is_a_value_of_its_parameter_or_refused(text, kind):
    import nbformat

    from tradelab.jobs import ParameterError, check_parameters
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"given:{kind} = None",
        metadata={"tags": ["parameters"]})])
    try: value = check_parameters(notebook, {"given": text}, text=True)["given"]
    except ParameterError as error: assert str(error)
    else:
        assert (kind == "anything" or type(value).__name__.replace("NoneType", "None").replace("tuple", "list") in kind
                or kind == "float")
    try: check_parameters(notebook, {text: 1})
    except ParameterError as error: assert str(error)
    try:
        check_parameters(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text,
            metadata={"tags": ["parameters"]})]), {"given": text}, text=True)
    except ParameterError as error: assert str(error)


@given(content=st.one_of(st.binary(max_size=60), LITERAL.map(lambda value: json.dumps(value).encode()),
                         st.just(b"[" * 100_000)))
@FEW
def test_any_file_is_a_notebook_or_refused(content, tmp_path_factory):
    from tradelab.jobs import ParameterError, check_parameters
    file = tmp_path_factory.getbasetemp() / "any.ipynb"
    file.write_bytes(content)
    with pytest.raises(ParameterError): check_parameters(file, {"given": 1})
