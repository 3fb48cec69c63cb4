"""The walls: data flows one way, and each foreign thing has one place."""

import ast
import subprocess
import sys
from pathlib import Path

import tl_neuron_attr

PACKAGE = Path(tl_neuron_attr.__file__).parent

# Data goes down this list, imports go up it.
ORDER = (
    "errors",
    "files",
    "parts",
    "neurons",
    "prompts",
    "display",
    "strip",
    "tiny_facts",
    "state",
    "precision",
    "pieces",
    "experts",
    "architecture",
    "host",
    "hook_points",
    "targets",
    "ids",
    "models",
    "norms",
    "captured",
    "forward",
    "capture",
    "baselines",
    "rivals",
    "readout",
    "projection",
    "lens",
    "decompose",
    "index",
    "identities",
    "interventions",
    "scores",
    "topk",
    "intervals",
    "differences",
    "sums",
    "reading",
    "chosen",
    "query",
    "inputs",
    "tables",
    "across",
    "markup",
    "styled",
    "glance",
    "attribution",
    "attribute",
    "answers",
    "cards",
    "in_context",
    "graph",
    "compare",
    "curves",
    "methods",
    "shapes",
    "plan",
    "doctor",
    "knowledge",
    "evaluate",
    "runs",
    "views",
    "report",
    "paper",
    "cli",
)


# A result writes its own report, for that is what a reader asks of it; the report is drawn from the
# saved tables alone, and is imported where it is asked for, inside the methods that save.
UPWARD = {
    name: {"report"} for name in ("attribution", "answers", "cards", "graph", "compare", "evaluate")
}


def sources_of(name):
    place = PACKAGE / name
    if place.is_dir():
        # what trains and measures the bundled model is a program beside the pipeline, not in it
        return [place / "__init__.py"] if name == "tiny_facts" else sorted(place.glob("*.py"))
    return [PACKAGE / f"{name}.py"]


def imports_of(path):
    """Top-level packages that a module imports, and the stages of this package it imports."""
    packages, stages = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            packages.add(package)
            if package == "tl_neuron_attr" and rest:
                stages.add(rest[0])
    return packages, stages


def test_every_module_has_its_place_in_the_order():
    found = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert found - {"__init__"} == set(ORDER)


def test_modules_import_only_from_earlier_stages():
    for place, name in enumerate(ORDER):
        for path in sources_of(name):
            late = imports_of(path)[1] - set(ORDER[:place]) - {name} - UPWARD.get(name, set())
            assert not late, f"{path.name} imports {sorted(late)}, which come after it"


def test_each_foreign_library_stays_behind_its_wall():
    walls = {
        "plotly": {"views", "report/page", "paper/figures", "paper/contents"},
        "pandas": {
            "tables",
            "across",
            "markup",
            "styled",
            "glance",
            "attribution",
            "attribute",
            "answers",
            "cards",
            "in_context",
            "graph",
            "compare",
            "curves",
            "knowledge",
            "evaluate",
            "runs/saved",
            "runs/summary",
            "runs/summed",
            "runs/differences",
            "views",
            "report",
            "paper",
            "cli",
        },
        "transformer_lens": {"models"},
        "transformers": {"models", "cli"},
        "datasets": {"knowledge"},
        "ray": {"runs/ray_actors"},
        "typer": {"cli"},
        "rich": {"cli"},
    }
    for name in ORDER:
        for path in sources_of(name):
            imported = imports_of(path)[0]
            for package, allowed in walls.items():
                if package in imported:
                    # a wall may name one module of a folder
                    assert {name, f"{name}/{path.stem}"} & allowed, f"{path.name} imports {package}"


def test_hook_names_and_the_softmax_have_one_home():
    for name in ORDER:
        for path in sources_of(name):
            text = path.read_text(encoding="utf-8")
            if name not in ("hook_points", "ids"):  # ids reads what others write
                code = "\n".join(
                    node.value
                    for node in ast.walk(ast.parse(text))
                    if isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and node.value.startswith("blocks.")
                )
                assert not code, f"{path.name} names a hook: {code}"
            # experts has that of a router over its experts; rivals, over a few bins, and baselines,
            # over accepted answers, have those of what a read-out gave
            of_few = ("experts", "rivals", "baselines")
            if name not in ("readout", "captured", "identities", *of_few):
                assert "softmax(" not in text and "logsumexp(" not in text, path.name


def test_import_is_silent_and_leaves_no_trace():
    program = """
import sys, torch, warnings
warnings.simplefilter("error")
before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
import socket
socket.socket = None  # any use of the network raises
import tl_neuron_attr
after = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
for heavy in ("plotly", "transformer_lens", "transformers", "datasets", "ray", "typer"):
    assert heavy not in sys.modules, heavy
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_readme_names_every_module():
    # beside the tests, not beside the package: that may be installed elsewhere
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name in ORDER:
        assert f"{name}.py" in readme or f"{name}/" in readme, name
