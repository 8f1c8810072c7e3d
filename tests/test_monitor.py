"Thresholds over a real session: set while it trades, judged by the monitor, told by the alert centre, acknowledged"
import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr
from servers import webhook
from test_watchdog import SESSION, address, child, messages

from tradelab.config import settings
from tradelab.database.operations import Operations
from tradelab.database.reading import reading
from tradelab.database.records import Threshold, clock
from tradelab.database.schema import ALERTS
from tradelab.errors import ConfigurationError
from tradelab.ops.channels import AlertCentre, apprise_channels
from tradelab.ops.feed import Feed
from tradelab.ops.monitor import Monitor, remove_threshold, set_threshold, thresholds_kept
from tradelab.ops.samples import Gatherer

pytestmark = pytest.mark.integration


async def served(here, deeds):
    "Gatherer, monitor and alert centre, while a generator of a test runs; it yields what it waits for"
    feed, gatherer = Feed(here, .3), Gatherer(here, .3)
    centre = AlertCentre(here, feed, apprise_channels(here.alert_url))
    tasks = [asyncio.create_task(each.run()) for each in (feed, gatherer, centre, Monitor(here, gatherer, centre))]
    try:
        for true in deeds(gatherer):
            async with asyncio.timeout(15):
                while not await asyncio.to_thread(true): await asyncio.sleep(.05)
    finally:
        for task in tasks: task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_a_threshold_set_while_a_session_trades_is_told_acknowledged_and_over():
    with child(SESSION) as process, webhook() as hook:
        database, sessions, name = process.stdout.readline().split()
        here = settings().model_copy(update={
            "database": database, "sessions": Path(sessions), "alert_url": SecretStr(address(hook)),
            "monitor": replace(settings().monitor, interval=.3), "alerts": replace(settings().alerts, level="warning")})
        limit = Threshold("equity_quote", "RISK", ">", 1., 1e9, "more than nothing", "ada", clock())
        def alerts():
            with reading(database) as look: rows = look.rows(ALERTS, session=name, subject="equity_quote")
            return rows
        def told(words): return lambda: any(words in message for message in messages(hook))

        def deeds(gatherer):
            yield lambda: f'equity_quote{{session="{name}"}}' in gatherer.latest
            assert alerts() == []
            set_threshold(database, limit)                           # nothing is started again
            yield told("equity_quote WARNING: ")
            alert, = alerts()
            assert (alert["kind"], alert["level"], alert["state"]) == ("condition", "warning", "open")
            Operations(database).acknowledge(alert["number"], "ada", clock())
            assert [(each["state"], each["acknowledged_by"]) for each in alerts()] == [("acknowledged", "ada")]
            remove_threshold(database, "equity_quote", "ada", clock())
            yield lambda: alerts()[0]["state"] == "resolved"
        asyncio.run(served(here, deeds))
        with pytest.raises(ConfigurationError, match="critical must be above warning"):
            set_threshold(database, replace(limit, critical=.1))
        assert thresholds_kept(database) == []
        shutil.rmtree(Path(sessions).parent)
