"""Every notebook runs on the bundled model, shows what it promises, says nothing of it that is not
so, and is stored bare."""

import ast
import json
import os
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.util import run_sync
from notebook_claims import CLAIMS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURE = "application/vnd.plotly.v1+json"
SECONDS_A_CELL = 300
LINES_A_CELL = 15

# Functions may stand in a cell only where writing them is what the notebook is about.
FUNCTIONS = {
    "your_own_method": ["above_rivals", "loudest"],  # methods
    "extending_transformerlens": ["keep", "halve"],  # hooks
}

# Cells whose point is that nothing comes.
SILENT = {"check_method(above_rivals)"}

# Run after the last cell, in the same kernel: which claims are true there.
JUDGE = """
import json as _json

_found = {{}}
for _words, _claim in {claims!r}.items():
    try:
        _found[_words] = bool(eval(_claim))
    except Exception as _error:
        _found[_words] = repr(_error)
print(_json.dumps(_found))
"""


@dataclass(frozen=True)
class Executed:
    """A notebook with its outputs, and what became of the claims made in its text."""

    notebook: nbformat.NotebookNode
    claims: dict[str, bool | str]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def shown(cell):
    """What the last expression of a cell displayed: a mapping from MIME type to content."""
    return [output.data for output in cell.outputs if "data" in output]


def figures_of(notebook):
    return [data[FIGURE] for cell in code_cells(notebook) for data in shown(cell) if FIGURE in data]


def tables_of(notebook):
    return [
        data["text/plain"]
        for cell in code_cells(notebook)
        for data in shown(cell)
        if "<table" in data.get("text/html", "")
    ]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel of this very Python, offline, for all notebooks: to start one takes seconds."""
    directory = tmp_path_factory.mktemp("kernel")
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", search_path)
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("PLOTLY_RENDERER", "plotly_mimetype")  # wherever the tests run
        environment.setenv("IPYTHONDIR", str(directory / "ipython"))  # no start-up files
        environment.setenv("JUPYTER_RUNTIME_DIR", str(directory / "runtime"))
        environment.setenv("OMP_NUM_THREADS", "1")  # beside another worker, a second one costs
        client = NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3")
        manager = client.create_kernel_manager()
        client.start_new_kernel(cwd=str(directory))
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


# Before a notebook: nothing of the one before has a name, and it stands where it was put.
ALONE = """
import os as _os
_os.chdir({directory!r})
get_ipython().run_line_magic("reset", "-f")
"""


def execute(path, directory, manager):
    """The notebook, run by the kernel, which has forgotten the others."""
    notebook = nbformat.read(path, as_version=4)
    alone = nbformat.v4.new_code_cell(ALONE.format(directory=str(directory)))
    judge = nbformat.v4.new_code_cell(JUDGE.format(claims=CLAIMS[path.stem]))
    notebook.cells = [alone, *notebook.cells, judge]
    client = NotebookClient(notebook, km=manager, timeout=SECONDS_A_CELL)
    try:
        client.execute()  # raises CellExecutionError, with the traceback, at the first failure
    finally:
        client.kc.stop_channels()
    assert notebook.cells.pop(0).outputs == []
    (told,) = notebook.cells.pop().outputs
    return Executed(notebook=notebook, claims=json.loads(told.text))


def test_every_notebook_has_claims_that_are_checked():
    assert [path.stem for path in NOTEBOOKS] == sorted(CLAIMS)


@pytest.mark.parametrize("page", ["README.md", "docs/pages/notebooks.md"])
def test_every_notebook_is_named_where_readers_look(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if path.name not in text] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebooks_have_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == [], f"clear the outputs of {path.name} before storing it"
        assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_name_their_model_at_the_top_and_define_no_functions_but_their_subject(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert 'MODEL = "tiny-facts"' in cells[0].source.splitlines()
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    defined = [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert defined == FUNCTIONS.get(path.stem, []), (
        "what is worth a name belongs in a module, with a test"
    )
    assert not [node for node in nodes if isinstance(node, ast.Lambda)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_enough_to_be_read(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        code = [line for line in cell.source.splitlines() if line and not line.startswith("    ")]
        imports = sum(line.startswith(("import", "from", ")")) for line in code)
        assert len(code) - imports <= LINES_A_CELL, f"the package lacks something:\n{cell.source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_the_text_claims_is_in_the_text(path):
    text = prose(nbformat.read(path, as_version=4))
    assert [words for words in CLAIMS[path.stem] if words not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_show_tables_and_figures_and_tell_the_truth(path, tmp_path, kernel):
    executed = execute(path, tmp_path, kernel)
    notebook = executed.notebook
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", f"this is printed as an error:\n{output.text}"
        if isinstance(ast.parse(cell.source).body[-1], ast.Expr) and cell.source not in SILENT:
            assert shown(cell), f"nothing is shown by:\n{cell.source}"
    assert tables_of(notebook)
    assert figures_of(notebook)
    assert all(figure["data"] for figure in figures_of(notebook))
    assert {words: found for words, found in executed.claims.items() if found is not True} == {}
