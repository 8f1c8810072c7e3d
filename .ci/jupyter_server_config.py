"""JupyterLab as `make lab` starts it: a job notebook is saved without what running it has added

A job's outputs are kept by its reports; the notebook itself stays as git has it, so that `git status` is clean after
Run All.
`index.ipynb` and the chapters keep theirs: they are pages."""
from fastcore.xtras import dict2obj, obj2dict
from nbdev.clean import clean_nb


def strip(model, path, **_):
    "Before a notebook in the folder itself is saved: no outputs, counts or metadata of the Lab"
    jobs = model["type"] == "notebook" and "/" not in path.strip("/") and path.strip("/") != "index.ipynb"
    if not jobs: return
    notebook = dict2obj(model["content"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = []
    clean_nb(notebook, allowed_cell_metadata_keys=["tags"])
    model["content"].clear()
    model["content"].update(obj2dict(notebook))


if "c" in globals(): c.FileContentsManager.pre_save_hook = strip  # noqa: F821
