"""Whether what is installed is what was locked, and whether anybody knows a weakness of it: `make audit`.

The first question is answered here. The second one needs the internet: pip-audit asks PyPI about each package.
"""
import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / ".cache/pip-audit"


def name_of(text: str) -> str: return text.strip().lower().replace("_", "-").replace(".", "-")


def locked(path: Path = ROOT / "requirements.lock") -> dict[str, str]:
    "Version by name"
    lines = (line.partition("==") for line in path.read_text().splitlines() if "==" in line and line[0] != "#")
    return {name_of(name): version.split()[0] for name, _, version in lines}


def apart() -> list[str]:
    "What is installed otherwise than it was locked, a line each"
    lock = locked()
    here = {name_of(each.metadata["Name"]): each.version.partition("+")[0] for each in distributions()}
    return [f"{name} {here[name]} is installed, {version} is locked" for name, version in sorted(lock.items())
            if name in here and here[name] != version]


def advisories(wanted: Path) -> tuple[list[str], int]:
    "Weaknesses that are known, a line each, and how many packages PyPI was asked about; OSError if it cannot be"
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--target", TOOL]
    if not (TOOL / "pip_audit").exists(): _answered([*pip, "pip-audit~=2.9"])
    said = _answered([sys.executable, "-m", "pip_audit", "-f", "json", "--progress-spinner", "off", "--disable-pip",
                      "--no-deps", "-r", wanted])
    asked = [each for each in json.loads(said)["dependencies"] if "skip_reason" not in each]
    return [f"{each['name']} {each['version']}: {weak['id']}, mended in {', '.join(weak['fix_versions']) or 'none yet'}"
            for each in asked for weak in each["vulns"]], len(asked)


def _answered(command):
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(TOOL)}, capture_output=True, text=True)
    if ran.stdout or not ran.returncode: return ran.stdout
    raise OSError(ran.stderr.strip().splitlines()[-1][:200] if ran.stderr.strip() else "it said nothing")


def main(wanted: Path) -> int:
    for line in (wrong := apart()): print(line)
    try: weak, asked = advisories(wanted)
    except (OSError, ValueError): weak, asked = [], 0
    for line in weak: print(line)
    print(f"{asked} packages were asked for, {len(weak)} weaknesses are known" if asked else
          "no advisories: PyPI, which has them, cannot be asked from here; run `make audit` where it can")
    return bool(weak or wrong or not asked)


if __name__ == "__main__": sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "requirements.lock"))
