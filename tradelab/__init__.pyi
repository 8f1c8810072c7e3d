"What editors and type checkers read instead of loading it: `tradelab/__init__.py` hands these out when first asked"
from tradelab.errors import TradelabError as TradelabError
from tradelab.features.observation import Observation as Observation
from tradelab.learn.agents import train as train
from tradelab.policies import Policy as Policy
from tradelab.runs.registry import load as load
from tradelab.runs.rule import rule as rule
from tradelab.settings import CostModel as CostModel
from tradelab.settings import Execution as Execution
from tradelab.settings import Limits as Limits
from tradelab.sim.backtest import backtest as backtest
from tradelab.sim.stress import stress as stress
from tradelab.sim.sweep import sweep as sweep
from tradelab.sources.history import history as history

__version__: str
FRONT_DOOR: dict[str, str]
