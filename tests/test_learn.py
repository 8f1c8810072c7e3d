"Agents learn, what they learnt runs without torch, and a run is what was trained or it is refused"
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml

from tradelab.compiled import compiled
from tradelab.evaluation.difference import first_difference
from tradelab.features.observation import Observation
from tradelab.instruments import BITCOIN
from tradelab.market.synthetic import ar1
from tradelab.policies import Policy, mlp, pack
from tradelab.runs.formats import CONFIG, DamagedRunError, seal
from tradelab.runs.registry import load, read, save
from tradelab.runs.rules import UnknownRunError
from tradelab.runs.run import Run
from tradelab.settings import CostModel, Limits
from tradelab.sim.backtest import backtest

TRAINING = 16_000 # candles; the rest is out of sample
STEPS = {"SAC": 20_000, "PPO": 40_000} # SAC is asked to learn it in half of the steps: a step of it costs eight of PPO


@compiled
def proportional(parameters, memory, observation, prices, targets):
    for n in range(len(targets)): targets[n] = min(max(parameters[0] * np.log1p(observation[n, 0]), -1.), 1.)


def earned(policy, candles, start=None):
    "Sum of the rewards: change of log equity, net of costs"
    return float(np.log(backtest(policy, candles, start=start, costs=CostModel(), limits=Limits()).equity.iloc[-1]
                        / 10_000))


def best_rule(candles):
    "Position proportional to the forecast 0.3 * r, its scale the best on the training span"
    rules = [Policy("proportional", proportional, np.array([.3 * scale]), ("return(1)",)) for scale in np.geomspace(10,
        30_000, 25)]
    return max(rules, key=lambda rule: earned(rule, candles[:TRAINING]))


@pytest.fixture(scope="module")
def market(): return ar1(24_000, rho=.3, seed=0)


@pytest.fixture(scope="module", params=["SAC", "PPO"])
def run(request, market, tmp_path_factory):
    "An agent, trained for seconds"
    from tradelab.learn.agents import train
    return train(request.param, market[:TRAINING], Observation(["return(1)"]), steps=STEPS[request.param], seed=0,
                 costs=CostModel(), limits=Limits(), folder=tmp_path_factory.mktemp("runs"), progress=False)


@pytest.mark.integration
def test_agent_learns_the_forecast(run, market):
    "At least 80 % of the optimal reward, out of sample, with the default costs"
    agent = earned(run, market, market.index[TRAINING])
    best = earned(best_rule(market), market, market.index[TRAINING])
    print(f"{run.policy.name}: {agent:.3f} of {best:.3f}, {agent / best:.0%}")
    assert best > .4
    assert agent >= .8 * best


@pytest.mark.integration
def test_agent_earns_as_much_late_in_a_long_run(run, market):
    "What it sees of itself after 100,000 candles and a growth of e^7 is what it saw in episodes of 256 candles"
    long = ar1(120_000, rho=.3, seed=100)
    agent, best = (np.log(backtest(each, long, costs=CostModel(), limits=Limits(), baselines=()).equity.to_numpy())
                   for each in (run, best_rule(market)))
    late = (agent[-1] - agent[-20_001]) / (best[-1] - best[-20_001])
    print(f"{run.policy.name}: {late:.0%} of the optimum in the last 20,000 of {len(agent):,} candles")
    assert best[-1] - best[0] > 7
    assert late >= .75


@pytest.mark.integration
def test_compiled_policy_is_the_model(run, market):
    "On the observations that it meets, to 1e-5"
    from stable_baselines3 import PPO, SAC
    model = {"SAC": SAC, "PPO": PPO}[run.config["agent"]].load(run.folder / "model.zip", device="cpu")
    seen = backtest(run, market[:3_000], keep_observations=True).observations
    np.testing.assert_allclose([run.policy.act(each)[0] for each in seen],
                               model.predict(seen[:, 0], deterministic=True)[0][:, 0], atol=1e-5)


@pytest.mark.integration
def test_agent_in_both_forms(run, market):
    "The compiled loop and a Trader, candle by candle: the same bits"
    array, event = (backtest(run, market[-600:], engine=engine, keep_observations=True) for engine in ("vectorised",
        "event"))
    assert first_difference(array, event) is None
    assert first_difference(array.observations, event.observations) is None
    assert (array.rows["order"] != 0).sum() > 100


@pytest.mark.integration
def test_load_and_trade_without_torch(run, market):
    """A fresh process loads the newest run, trades it, and has imported no torch; its decisions are those of this
    process"""
    code = """
import sys
from tradelab.runs.registry import load
from tradelab.market.synthetic import ar1
from tradelab.sim.backtest import backtest
run = load("latest", sys.argv[1])
print(run.id, backtest(run, ar1(24_000, rho=.3, seed=0)[-600:]).rows.tobytes().hex())
assert not {"torch", "stable_baselines3", "gymnasium", "ccxt"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(run.folder.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, rows = done.stdout.split()
    assert name == run.id
    assert bytes.fromhex(rows) == backtest(run, market[-600:]).rows.tobytes()


@pytest.mark.integration
def test_run_is_complete(run, market):
    config = yaml.safe_load((run.folder / CONFIG).read_text())
    assert config == run.config
    assert config["threads"] == 1
    assert config["steps"] >= STEPS[config["agent"]]
    assert not config["interrupted"]
    assert {"tradelab", "numpy", "numba", "torch", "stable-baselines3", "python"} <= config["versions"].keys()
    assert not {"/", ":"} & set(run.id)
    assert run.id.startswith("train_BTC-USDT-USDT_20240101_")
    axes = run.plot().axes[0]
    assert axes.get_xlabel() == "training step [candles]"
    assert axes.get_title("left").startswith("SYNTHETIC prices: synthetic ar1")


@pytest.mark.integration
@pytest.mark.parametrize("agent", ["SAC", "PPO"])
def test_same_seed_same_weights(agent, market, tmp_path):
    from tradelab.learn.agents import train
    few = [train(agent, market[:1_000], Observation(["return(1)", "rsi(14)"]), steps=1_500, seed=seed,
                 folder=tmp_path / str(k), progress=False) for k, seed in enumerate((1, 1, 2))]
    bits = [run.policy.parameters.tobytes() for run in few]
    assert bits[0] == bits[1] != bits[2]


@pytest.mark.integration
def test_several_symbols(tmp_path):
    from tradelab.learn.agents import train
    candles = {"BTC/USDT:USDT": ar1(500, seed=1), "ETH/USDT:USDT": ar1(500, seed=2)}
    run = train("SAC", candles, Observation(["return(1)"]), steps=300, folder=tmp_path, progress=False)
    assert run.symbols == tuple(candles)
    assert "_BTC-USDT-USDT-and-1-more_" in run.id
    assert set(backtest(run, candles).journal.symbol) == set(candles)


@pytest.mark.integration
def test_interrupted_training_is_kept(tmp_path):
    "Ctrl-C in the middle: what is learnt so far is a whole run, and says so"
    code = """
import signal, sys
from tradelab.features.observation import Observation
from tradelab.learn.agents import train
from tradelab.market.synthetic import ar1
signal.signal(signal.SIGINT, signal.default_int_handler) # the tests may have been started where it is ignored
print(train("PPO", ar1(2_000), Observation(["return(1)"]), steps=1_000_000, folder=sys.argv[1]).id)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        seen = ""
        while "bp a candle" not in seen and (character := process.stderr.read(1)): seen += character
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 0, seen + err
    run = load("latest", tmp_path)
    assert f"interrupted after {run.config['steps']:,} steps: what was learnt until then is kept" in err
    assert run.id == out.strip()
    assert run.config["interrupted"]
    assert 0 < run.config["steps"] < 1_000_000
    assert "interrupted" in str(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == [run.id, "trials.jsonl"]


@pytest.fixture
def kept(tmp_path):
    "A run that nobody trained: random weights, one feature of the user's own"
    random = np.random.default_rng(0)
    policy = Policy("random", mlp,
                    pack([(random.normal(size=(8, 5)), random.normal(size=8)),
                          (random.normal(size=(1, 8)), random.normal(size=1))], "relu", "tanh"),
                          ("tradelab.strategies.example:gap",))
    config = dict(agent="SAC", steps=1, interrupted=False, learning_rate=3e-4, batch_size=256, seed=7, threads=1,
                  source="", span=["2024-01-01", "2024-02-01"], data_hash="", created_time=0)
    return save(Run("train_BTC_20240101_20240201_SAC_lr0.0003_bs256_ws1_seed7_20240301_000000", policy,
                    instruments=(BITCOIN,), timeframe="1h", config=config), {"model.zip": b"model"}, tmp_path)


@pytest.mark.parametrize("name", ["config_metadata.yaml", "scaler_train.json", "policy.safetensors", "model.zip",
                                  "MANIFEST.json"])
@pytest.mark.parametrize("change", ["changed", "missing"])
def test_damage_is_refused(kept, name, change):
    "One flipped bit in any file, or a file that is gone"
    file = kept.folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if change == "changed": file.write_bytes(content)
    else: file.unlink()
    with pytest.raises(DamagedRunError, match="train again"): load(kept.id, kept.folder.parent)


def test_extra_file_is_refused(kept):
    (kept.folder / "deeper").mkdir()
    (kept.folder / "deeper" / "notes.txt").touch()
    with pytest.raises(DamagedRunError, match=r"deeper/notes.txt was not part of the training: remove it"):
        read(kept.folder)


def test_changed_feature_is_said(kept):
    config = yaml.safe_load((kept.folder / CONFIG).read_text())
    config["sources"]["tradelab.strategies.example"] = "0" * 64
    (kept.folder / CONFIG).write_text(yaml.safe_dump(config))
    (kept.folder / "MANIFEST.json").write_bytes(seal({path.name: path.read_bytes() for path in kept.folder.iterdir()
                                                      if path.name != "MANIFEST.json"}))
    with pytest.warns(UserWarning, match="trained with another version of tradelab.strategies.example"):
        read(kept.folder)


def test_weights_return_bit_for_bit(kept):
    "Also denormal, huge and negative zero"
    odd = kept.policy.parameters.copy()
    odd[-4:] = -0., 5e-324, 1e308, np.nextafter(1, 2)
    again = save(Run(kept.id + "9", Policy("odd", mlp, odd, kept.policy.features), instruments=kept.instruments,
                     config=kept.config), folder=kept.folder.parent)
    assert again.policy.parameters.tobytes() == odd.tobytes()


def test_full_disk_leaves_nothing(kept, tmp_path):
    "The system refuses to write on, as a full disk does"
    code = ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000)); import signal; "
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" \
           "from pathlib import Path; from tradelab.runs.registry import read, save, Run\nrun = "
           f"read(Path({str(kept.folder)!r}))\n" \
           f"save(Run(run.id + '1', run.policy, instruments=run.instruments, config=run.config), {{'model.zip': "
           f"bytes(100_000)}}, run.folder.parent)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode != 0
    assert "no file was left half-written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [kept.id, "trials.jsonl"]


def test_rules_by_name(project):
    run = load("tradelab.strategies.example:Momentum(10, threshold=0.01)")
    assert run.policy.features == ("return(10)",)
    assert run.policy.parameters[0] == .01
    assert run.limits == Limits()
    assert json.dumps(run.config)
    for name, message in {"tradelab.strategies.example:Momentun": "did you mean Momentum",
                          "tradelab.strategies.exampl:Momentum": "did you mean tradelab.strategies.example",
                          "Momentum": "name a rule such as tradelab.strategies.example:Momentum",
                          "latest": "there is no latest run", "": "there is no run ''"}.items():
        with pytest.raises(UnknownRunError, match=message): load(name)


def test_settings_rule_the_rules(project):
    (project / "tradelab.toml").write_text("[risk]\nmax_position = 0.1\n[costs]\ntaker_fee = 0.001\n")
    run = load("tradelab.strategies.example:SmaCross")
    assert run.limits.max_position == .1
    assert run.costs.taker_fee == .001
