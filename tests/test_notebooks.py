"""Every notebook runs on the bundled model, shows what it promises, and is stored bare."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURE = "application/vnd.plotly.v1+json"
SECONDS_A_CELL = 300


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


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


def execute(path, directory):
    """The notebook with its outputs, run by a kernel of this very Python, offline."""
    notebook = nbformat.read(path, as_version=4)
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", search_path)
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("PLOTLY_RENDERER", "plotly_mimetype")  # wherever the tests run
        environment.setenv("IPYTHONDIR", str(directory / "ipython"))  # no start-up files
        environment.setenv("JUPYTER_RUNTIME_DIR", str(directory / "runtime"))
        client = NotebookClient(
            notebook,
            timeout=SECONDS_A_CELL,
            kernel_name="python3",
            resources={"metadata": {"path": str(directory)}},
        )
        client.execute()  # raises CellExecutionError, with the traceback, at the first failure
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Runs a notebook the first time it is asked for."""
    done = {}

    def run(path):
        if path not in done:
            done[path] = execute(path, tmp_path_factory.mktemp(path.stem))
        return done[path]

    return run


def test_there_is_a_quickstart():
    assert ROOT / "notebooks" / "quickstart.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebooks_have_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == [], f"clear the outputs of {path.name} before storing it"
        assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_name_their_model_at_the_top_and_define_no_functions(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert 'MODEL = "tiny-facts"' in cells[0].source.splitlines()
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    defined = [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert defined == [], "what is worth a name belongs in a module, with a test"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_show_tables_and_figures(path, executed):
    notebook = executed(path)
    for cell in code_cells(notebook):
        assert not [output for output in cell.outputs if output.output_type == "error"]
        if isinstance(ast.parse(cell.source).body[-1], ast.Expr):
            assert shown(cell), f"nothing is shown by:\n{cell.source}"
    assert tables_of(notebook)
    assert figures_of(notebook)
    assert all(figure["data"] for figure in figures_of(notebook))


def test_the_quickstart_tells_its_story(executed):
    notebook = executed(ROOT / "notebooks" / "quickstart.ipynb")
    predictions, ffn, attention, zeroed = tables_of(notebook)
    assert "Paris" in predictions.splitlines()[1]
    assert "raises" in ffn and "raises" in attention and "source_token" in attention
    assert [figure["data"][0]["type"] for figure in figures_of(notebook)] == [
        "bar",
        "heatmap",
        "bar",
        "bar",
    ]
    rows = [[float(number) for number in line.split()[1:]] for line in zeroed.splitlines()[1:]]
    (_, untouched, same), *_, (count, best, random) = rows
    assert untouched == same
    assert count == 100
    assert best < 0.5 * untouched, "zeroing the best neurons should cost the answer"
    assert random > 0.8 * untouched, "zeroing random neurons should not"
