"""The notebooks run from top to bottom; their stored outputs come from such a run and contain no machine paths."""

import copy
import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 120
LARGEST_BYTES = 700_000
# A path must not follow a word: /home/ in https://host/home/ is no machine path.
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|tmp|var|opt|usr|mnt|work|private)/|[A-Z]:\\\\|site-packages")


def execute(notebook, folder, monkeypatch):
    """Run the notebook quickly in `folder` and return it. Raises CellExecutionError at the first cell that fails."""
    monkeypatch.setenv("JAXCL_NOTEBOOK_QUICK", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    # The kernel's history and connection file stay out of the user's home.
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(folder / name.lower()))
    options = dict(timeout=CELL_SECONDS, startup_timeout=CELL_SECONDS, kernel_name="python3")
    client = NotebookClient(copy.deepcopy(notebook), resources={"metadata": {"path": str(folder)}}, **options)
    return client.execute()


def kinds(cell):
    """The kinds of output of a cell: stream names, output types and "picture"."""
    found = set()
    for output in cell.outputs:
        if output.output_type == "stream":
            found.add(output.name)
        else:
            found |= {"picture" if "image/png" in output.get("data", {}) else output.output_type}
    return found


def complaints(notebook, text):
    """Problems of a stored notebook, as messages; `text` is the content of its file."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("cells were not run once each, from top to bottom")
    if not any("picture" in kinds(cell) for cell in cells):
        found.append("no picture is stored")
    if any({"error", "stderr"} & kinds(cell) for cell in cells):
        found.append("an error or a warning is stored")
    if match := MACHINE_PATH.search(text):
        found.append(f"a machine's path is stored: {match[0]}")
    if len(text.encode()) > LARGEST_BYTES:
        found.append(f"larger than {LARGEST_BYTES} bytes")
    return found


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request):
    return request.param


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_stored(path):
    assert complaints(nbformat.read(path, as_version=4), path.read_text()) == []


def test_runs(path, tmp_path, monkeypatch):
    stored = nbformat.read(path, as_version=4)
    ran = execute(stored, tmp_path, monkeypatch)
    for before, after in zip(stored.cells, ran.cells, strict=True):
        if after.cell_type == "code":
            # Warnings differ between machines.
            assert kinds(after) - {"stderr"} == kinds(before), (
                f"run the notebook again and store it: {before.source[:80]}"
            )
    left = {entry.name for entry in os.scandir(tmp_path)} - {"ipythondir", "jupyter_runtime_dir"}
    assert not left


def test_a_failing_cell_fails(tmp_path, monkeypatch):
    cell = nbformat.v4.new_code_cell("import os\nassert os.environ['JAXCL_NOTEBOOK_QUICK'] == '1'\n1 / 0")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda cell: cell.update(execution_count=None), "top to bottom"),
        (lambda cell: cell.update(outputs=[]), "no picture"),
        (lambda cell: cell.outputs.append(nbformat.v4.new_output("stream", name="stderr")), "warning"),
        (lambda cell: cell.update(source="open('/home/ann/data.npz')"), "/home/"),
        (lambda cell: cell.update(source="see C:\\data"), "path"),
        (lambda cell: cell.update(source="x" * LARGEST_BYTES), "larger"),
    ],
)
def test_complaints(spoil, complaint):
    picture = nbformat.v4.new_output("display_data", data={"image/png": "aGk="})
    cell = nbformat.v4.new_code_cell("1/2  # https://host/home/x", execution_count=1, outputs=[picture])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    assert complaints(notebook, nbformat.writes(notebook)) == []
    spoil(cell)
    (found,) = complaints(notebook, nbformat.writes(notebook))
    assert complaint in found
