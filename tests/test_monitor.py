"Thresholds over a real session: set while it trades, judged by the monitor, told by the alert centre, acknowledged"
import asyncio
import json
from dataclasses import replace

import pytest
from pydantic import SecretStr
from servers import webhook

from tradelab.config import settings
from tradelab.database.operations import Operations
from tradelab.database.reading import reading
from tradelab.database.records import Threshold, clock
from tradelab.database.schema import ALERTS
from tradelab.errors import ConfigurationError
from tradelab.ops.channels import AlertCentre, apprise_channels
from tradelab.ops.feed import Feed
from tradelab.ops.metrics import Sample
from tradelab.ops.monitor import Monitor, remove_threshold, set_threshold, thresholds_kept
from tradelab.ops.samples import Gatherer
from tradelab.watching import example_session

pytestmark = pytest.mark.integration


async def served(here, deeds):
    "Gatherer, monitor and alert centre, while a generator of a test runs; it yields what it waits for"
    feed, gatherer = Feed(here, .05), Gatherer(here, .05)
    centre = AlertCentre(here, feed, apprise_channels(here.alert_url))
    tasks = [asyncio.create_task(each.run()) for each in (feed, gatherer, centre, Monitor(here, gatherer, centre))]
    try:
        for true in deeds(gatherer):
            async with asyncio.timeout(20):
                while not await asyncio.to_thread(true): await asyncio.sleep(.05)
    finally:
        for task in tasks: task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_a_threshold_set_while_a_session_trades_is_told_acknowledged_and_over():
    with example_session(200, .05) as place, webhook() as hook:
        url = f"json://127.0.0.1:{hook.port}/"
        here = settings().model_copy(update={"database": place.database, "sessions": place.sessions,
                                             "alert_url": SecretStr(url), "monitor": replace(settings().monitor, interval=.05),
                                             "alerts": replace(settings().alerts, level="warning")})
        limit = Threshold('tasks', "RISK", ">", .5, 10_000., "of its process", "ada", clock())
        def alerts():
            with reading(place.database) as look: rows = look.rows(ALERTS, session=place.session, subject="tasks")
            return rows
        def told(words): return lambda: any(words in json.loads(body)["message"] for body in hook.bodies())

        def deeds(gatherer):
            yield lambda: f'equity_quote{{session="{place.session}"}}' in gatherer.latest
            assert alerts() == []
            gatherer.add(lambda: [Sample("tasks", 7., {"session": place.session}, clock())])
            set_threshold(place.database, limit)                           # nothing is started again
            yield told("tasks WARNING: 7 > 0.5 tasks")
            alert, = alerts()
            assert (alert["kind"], alert["level"], alert["state"]) == ("condition", "warning", "open")
            Operations(place.database).acknowledge(alert["number"], "ada", clock())
            assert [(each["state"], each["acknowledged_by"]) for each in alerts()] == [("acknowledged", "ada")]
            remove_threshold(place.database, "tasks", "ada", clock())
            yield lambda: alerts()[0]["state"] == "resolved"
        asyncio.run(served(here, deeds))
        with pytest.raises(ConfigurationError, match="critical must be above warning"):
            set_threshold(place.database, replace(limit, critical=.1))
        assert thresholds_kept(place.database) == []
