"Packaging, driven by settings.ini"
import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
extras = {name: shlex.split(settings[f"{name}_requirements"]) for name in ("learn", "ops", "yahoo", "dev")}

setuptools.setup(
    name=settings["lib_name"], version=settings["version"], description=settings["description"],
    author=settings["author"], license=settings["license"], url=settings["git_url"],
    packages=setuptools.find_packages(include=["tradelab", "tradelab.*"]),
    python_requires=">=" + settings["min_python"],
    install_requires=shlex.split(settings["requirements"]), extras_require=extras,
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    entry_points={"console_scripts": shlex.split(settings["console_scripts"]),
                  "papermill.engine": ["tradelab = tradelab.jobs:SignalEngine"]})
