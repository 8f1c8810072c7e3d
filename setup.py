"Packaging, driven by settings.ini"
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
extras = {name: shlex.split(settings[f"{name}_requirements"]) for name in ("learn", "ops", "yahoo", "keyring", "dev", "docs")}


class WithNotebooks(build_py):
    "The wheel carries the job notebooks, so that `tradelab run train` works where there is no checkout"

    def run(self):
        "What an earlier build left is no part of this one"
        if self.editable_mode: return super().run()
        package = Path(self.build_lib) / settings["lib_path"]
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        (package / "notebooks").mkdir(parents=True)
        for notebook in (ROOT / settings["nbs_path"]).glob("*.ipynb"):
            if notebook.name != settings["readme_nb"]: shutil.copy(notebook, package / "notebooks")


setuptools.setup(
    name=settings["lib_name"], version=settings["version"], description=settings["description"],
    author=settings["author"], license=settings["license"], url=settings["git_url"],
    packages=setuptools.find_packages(include=["tradelab", "tradelab.*"]),
    # every file beside the modules is there to be read by them; tests/test_export.py says which those are
    package_data={"": ["*", "assets/**/*"]}, cmdclass={"build_py": WithNotebooks},
    python_requires=">=" + settings["min_python"],
    install_requires=shlex.split(settings["requirements"]), extras_require=extras,
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    entry_points={"console_scripts": shlex.split(settings["console_scripts"]),
                  "papermill.engine": ["tradelab = tradelab.jobs:SignalEngine"]})
