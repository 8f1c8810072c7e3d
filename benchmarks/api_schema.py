"""Whether any request of the documented kinds meets a 500 or an answer that is not documented, by schemathesis:
`pip install 'schemathesis~=4.32' -c requirements.lock` in an environment of its own (its plugin would be loaded by
every run of pytest), then `python benchmarks/api_schema.py [EXAMPLES]`, of each route"""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance
from test_api import world

from tradelab.database.rows import Database

CHECKS = [not_a_server_error, status_code_conformance]


def seen(here, operation, examples):
    "The statuses that a route answers"
    found = set()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case):
        headers = {"Authorization": f"Bearer {here.token('ada')}"}
        response = case.call(base_url=f"http://127.0.0.1:{here.api.port}", headers=headers)
        found.add(response.status_code)
        case.validate_response(response, checks=CHECKS)
    check()
    return sorted(found)


def main(examples=25):
    with TemporaryDirectory() as folder:
        Database(url := f"sqlite:///{folder}/tradelab.db").close()
        with world(url, Path(folder) / "sessions") as here:
            schema = schemathesis.openapi.from_dict(here.ask("GET", "/openapi.json", "vera")[1])
            for each in schema.get_all_operations():
                operation = each.ok()
                if operation.path.endswith("/events"): continue # it never ends
                print(f"{operation.label:<50}{' '.join(map(str, seen(here, operation, examples)))}", flush=True)


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
