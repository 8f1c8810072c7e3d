"Which happenings reach people, by any history: against a model that has no rows, and across restarts"
from collections import defaultdict
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tradelab.config import AlertSettings
from tradelab.database.records import Alert
from tradelab.ops.happenings import Happening
from tradelab.ops.incidents import MINUTE, MOST_ESCALATIONS, Change, Escalate, Incidents, Raise, in_batch, quiet_until

START = 1_774_738_800_000 # 2026-03-28 23:00 UTC: Madrid's clock jumps two hours later
EVERY, AFTER = 15 * MINUTE, 10 * MINUTE
KINDS = ("halt", "rejected", "venue disconnected", "breaker open", "position opened", "withheld")
ENDS = {"venue disconnected": "venue connected", "breaker open": "breaker closed"}
ASKED = AlertSettings("warning", 15., "23:00-02:30", "Europe/Madrid", 10.)


class Ledger:
    "The rows of alerts, as a database keeps them"

    def __init__(self): self.rows = {}

    def write(self, acts):
        "Returns the numbers of those that are new, by alert"
        for act in in_batch(acts):
            if isinstance(act, Raise):
                number = len(self.rows) + 1
                self.rows[number] = replace(act.alert, number=number)
                yield act.alert, number
            else: self.change(act.alert.number, act.columns)

    def change(self, number, columns):
        self.rows[number] = Alert(**{**vars(self.rows[number]), **columns})

    def answer(self, number, state, person, now):
        "As Operations does: a row that is resolved stays so"
        if self.rows[number].state == "open" or state == "resolved" != self.rows[number].state:
            self.change(number, {"state": state, f"{state}_by": person, state: now})
            return True
        return False


class Histories(RuleBasedStateMachine):
    "Happenings, answers, restarts and time in any order"

    @initialize(hours=st.sampled_from((0, 4)))
    def begin(self, hours):
        self.now, self.ledger, self.machine = START + 60 * hours * MINUTE, Ledger(), Incidents(ASKED)
        self.told = defaultdict(list)     # (time, act) by key
        self.news = {}                    # since when something is not told, by key
        self.answered = {}                # number: when, by a person
        self.last_tick = []

    def beat(self):
        "What a service does every second"
        self.machine.heard(self.ledger.rows.values(), self.now)
        self.last_tick = self.machine.tick(self.now)
        for act in self.last_tick:
            assert act.alert.number
            self.ledger.change(act.alert.number, act.columns)
            self.told[self.key(act.alert)].append((self.now, act))
            self.news.pop(self.key(act.alert), None)

    @staticmethod
    def key(alert): return alert.kind, alert.session, alert.subject

    def take(self, *happened):
        acts = [act for each in happened for act in self.machine.take(each, self.now)]
        for alert, number in self.ledger.write(acts): self.machine.numbered(alert, number)

    @rule(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), subject=st.sampled_from(("a", "b")))
    def happen(self, kinds, subject):
        for kind in kinds: self.happens(kind, subject)
        self.beat()

    def happens(self, kind, subject):
        self.now += 1 # ms: the ledger keeps what happens twice at one time once
        event = Happening(kind, session="s", subject=subject, arguments={"text": "x"}, time=self.now)
        before = self.machine.alerts.get(event.key)
        self.take(event)
        quiet = before is not None and before.state == "acknowledged"
        again = before is not None and before.state == "open" and kind == "venue disconnected" and (
            before.last_time >= self.now)
        if not quiet and not again and event.level != "info": self.news.setdefault(event.key, self.now)

    @rule(kind=st.sampled_from(sorted(ENDS)), subject=st.sampled_from(("a", "b")))
    def ends(self, kind, subject):
        self.take(Happening(ENDS[kind], session="s", subject=subject, time=self.now))
        alert = self.machine.alerts.get((kind, "s", subject))
        assert alert is None or alert.state == "resolved"
        self.beat()

    @rule(minutes=st.sampled_from((.1, 1, 4, 9, 17, 61)))
    def passes(self, minutes):
        until = self.now + int(minutes * MINUTE)
        while self.now < until:
            self.now = min(self.now + MINUTE, until)
            self.beat()

    @precondition(lambda self: self.ledger.rows)
    @rule(data=st.data(), state=st.sampled_from(("acknowledged", "resolved")))
    def answers(self, data, state):
        number = data.draw(st.sampled_from(sorted(self.ledger.rows)))
        self.now += 1
        if self.ledger.answer(number, state, "Ann", self.now):
            self.answered[number] = self.now
            self.news.pop(self.key(self.ledger.rows[number]), None)
        self.beat()

    @rule()
    def begins_again(self):
        "The process is killed; the next one has the rows"
        self.machine = Incidents(ASKED)
        self.beat()

    @rule()
    def compares(self):
        "Who begins from the rows now tells the same from now on as who knows it all"
        other = Incidents(ASKED)
        other.heard(self.ledger.rows.values(), self.now)
        one = Incidents(ASKED)
        one.alerts = dict(self.machine.alerts)
        for minutes in (5, 20, 60, 300, 900):
            later = self.now + minutes * MINUTE
            assert [*map(str, one.tick(later))] == [*map(str, other.tick(later))]

    @invariant()
    def rows_are_what_the_machine_knows(self):
        for alert in self.machine.alerts.values(): assert self.ledger.rows[alert.number] == alert

    @invariant()
    def one_open_row_for_each_key(self):
        rows = [self.key(row) for row in self.ledger.rows.values() if row.state != "resolved"]
        assert len(rows) == len(set(rows))

    @invariant()
    def nobody_is_woken(self):
        if not quiet_until(ASKED.quiet, ASKED.timezone, self.now): return
        assert all(act.alert.level == "critical" for act in self.last_tick)

    @invariant()
    def the_worst_comes_first(self):
        levels = [("critical", "error", "warning", "info").index(act.level) for act in self.last_tick]
        assert levels == sorted(levels)

    @invariant()
    def what_is_alike_waits(self):
        "Between two tellings of one alert lie fifteen minutes, escalations and ends aside"
        for told in self.told.values():
            for (first, a), (second, b) in zip(told, told[1:]):
                same = a.alert.number == b.alert.number
                if same and not isinstance(b, Escalate) and not b.over: assert second - first >= EVERY

    @invariant()
    def escalations_grow_and_end(self):
        by_number = defaultdict(list)
        for told in self.told.values():
            for time, act in told:
                if isinstance(act, Escalate): by_number[act.alert.number].append((time, act.alert.escalations))
        for found in by_number.values():
            assert [n for _, n in found] == list(range(1, len(found) + 1))
            assert len(found) <= MOST_ESCALATIONS
            for (first, n), (second, _) in zip(found, found[1:]):
                assert second - first >= min(AFTER * 2 ** n, 240 * MINUTE)

    @invariant()
    def who_has_answered_hears_only_the_end(self):
        for act in self.last_tick:
            if (when := self.answered.get(act.alert.number)) and act.alert.acknowledged == when: assert act.over

    @invariant()
    def nothing_is_forgotten(self):
        "What is news is told when fifteen minutes and the quiet hours are over, or with the next escalation"
        for key, since in self.news.items():
            alert = self.machine.alerts.get(key)
            waits = max(since, alert.told + EVERY if alert else 0)
            if alert and alert.escalations: waits = max(waits, alert.told + 240 * MINUTE)
            quiet = alert and alert.level != "critical" and quiet_until(ASKED.quiet, ASKED.timezone, self.now)
            assert quiet or self.now <= waits + MINUTE, key


Histories.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase


def test_acts_of_a_batch_are_few():
    machine, event = Incidents(ASKED), Happening("rejected", arguments={"text": "x"}, time=START)
    acts = [act for _ in range(100) for act in machine.take(event, START)]
    [raised] = in_batch(acts)
    assert raised.alert.count == 100
    assert all(isinstance(act, Change) for act in acts[1:])


def test_escalations_come_at_growing_pauses_and_end():
    machine, told = Incidents(AlertSettings(escalate_after=10.)), []
    for act in machine.take(Happening("halt", arguments={"text": "x"}, time=MINUTE), MINUTE): assert act.alert.told == 0
    for minute in range(1, 3 * 24 * 60):
        told += [(minute, type(act).__name__) for act in machine.tick(minute * MINUTE)]
    pauses = (10, 20, 40, 80, 160, 240, 240, 240)
    assert told == [(1, "Tell"), *((1 + sum(pauses[:n + 1]), "Escalate") for n in range(MOST_ESCALATIONS))]


def test_an_acknowledged_alert_that_gets_worse_is_open_again():
    machine, event = Incidents(ASKED), Happening("condition", "warning", subject="cpu", time=START)
    for alert in [act.alert for act in machine.take(event, START)]: machine.numbered(alert, 1)
    [told] = machine.tick(START + 240 * MINUTE)
    assert told.level == "warning"
    row = replace(told.alert, state="acknowledged", acknowledged=START + 241 * MINUTE, acknowledged_by="Ann")
    machine.heard([row], START + 242 * MINUTE)
    machine.take(replace(event, time=0), START + 243 * MINUTE)
    assert machine.tick(START + 243 * MINUTE) == []
    machine.take(replace(event, level="critical", time=0), START + 244 * MINUTE)
    machine.heard([row], START + 244 * MINUTE)  # which has not reached the ledger yet
    [worse] = machine.tick(START + 244 * MINUTE)
    assert (worse.level, worse.alert.state) == ("critical", "open")


def test_what_happens_in_the_millisecond_of_its_telling_is_news():
    machine, event = Incidents(ASKED), Happening("halt", arguments={"text": "x"}, time=START)
    for _ in range(2):
        machine.take(event, START)
        said = machine.tick(START)
    assert said == []
    assert [act.alert.count for act in machine.tick(START + EVERY)] == [2]
