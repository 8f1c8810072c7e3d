"What all tests share"
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared()->Path:
    "The folder of real data beside the repository; what needs it is skipped where it is absent"
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data").exists(): pytest.skip(f"real data is absent: {folder / 'data'}")
    return folder
