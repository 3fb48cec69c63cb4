"""What the documentation shows is so: every example runs, and every public name has its entry."""

import importlib
import inspect
import re
import shlex
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import BYTES, HookedTransformer
from typer.testing import CliRunner

import tl_neuron_attr
from tl_neuron_attr import cli, load_prompts, models
from tl_neuron_attr.cli import options
from tl_neuron_attr.evaluate import run as evaluate_run
from tl_neuron_attr.models import load_model
from tl_neuron_attr.paper import run as paper_run
from tl_neuron_attr.runs import asked
from tl_neuron_attr.tiny_facts import tiny_facts_dir

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
README = ROOT / "README.md"

# Names the pages load that no test can: the bundled model stands in for them.
STAND_INS = {
    "gpt2-large": "needs the network",
    "meta-llama/Llama-2-7b-hf": "needs the network and an access token",
}

# Python blocks that are compiled but not run: words in them -> why.
NOT_RUN = {
    "HookedTransformer.from_pretrained_no_processing": (
        "HookedTransformer left TransformerLens at 4.0, and loads by name from the network"
    ),
}

# What a reader does to the model of his own: edits, undone; weights folded in place.
_FOLDED = ("the weights", "requires_grad", "the gradients (.grad)", BYTES)
CHANGES = {
    "interventions": ("the weights",),
    "models": (*_FOLDED, "the flags of its configuration"),
    "recipes": (*_FOLDED, "the flags of its configuration"),
}

COMMAND = "tl-neuron-attr"

# Commands that ask thousands of prompts are run on every so manieth of them.
FEWER = 600


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    """Where its first line of code stands, from 1."""
    language: str
    code: str

    def __str__(self):
        return f"{self.page.name}:{self.line}"

    @property
    def reason_not_to_run(self):
        return next((reason for words, reason in NOT_RUN.items() if words in self.code), None)


def blocks_of(page, text=None):
    """The fenced blocks of a page, those inside lists included."""
    text = page.read_text(encoding="utf-8") if text is None else text
    fence = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)
    return [
        Block(page, text[: match.start(3)].count("\n") + 1, match[2], textwrap.dedent(match[3]))
        for match in fence.finditer(text)
    ]


def commands_of(block):
    """The block's commands of this package as arguments, and the file their output goes to."""
    lines = block.code.replace("\\\n", " ").splitlines()
    for words in (shlex.split(part, comments=True) for line in lines for part in line.split("&&")):
        words = words[1:] if words[:1] == ["$"] else words
        if words[:1] != [COMMAND]:
            continue
        assert "|" not in words, f"{block}: a test cannot run a pipe"
        cut = words.index(">") if ">" in words else len(words)
        yield words[1:cut], words[cut + 1] if cut < len(words) else None


def run_python(block, namespace):
    # blank lines in front, so that a traceback points into the page
    source = "\n" * (block.line - 1) + block.code
    code = compile(source, str(block.page), "exec")
    if block.reason_not_to_run is None:
        exec(code, namespace)


def run_commands(block):
    for arguments, output in commands_of(block):
        shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100"})
        assert shown.exit_code == 0, f"{block}: {arguments} ended with\n{shown.output}"
        if output is not None:
            Path(output).write_text(shown.stdout, encoding="utf-8")


def run_page(blocks):
    """All blocks in order, the Python ones in one namespace."""
    namespace = {"__name__": "page"}
    for block in blocks:
        if block.language == "python":
            run_python(block, namespace)
        elif block.language in ("bash", "console"):
            run_commands(block)


def fewer_prompts(source):
    prompts = load_prompts(source)
    return prompts[::FEWER] if source == "paper" else prompts


@pytest.fixture
def reader(tmp_path, monkeypatch, few_cards):
    """Where a reader stands: an empty directory, a model of their own in it, and the network."""
    shutil.copytree(tiny_facts_dir(), tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)

    loaded = {}

    source = models._source
    monkeypatch.setattr(
        models, "_source", lambda name: source("tiny-facts" if name in STAND_INS else name)
    )

    def load(name="tiny-facts", **options):
        if (name, *options.items()) not in loaded:
            loaded[name, *options.items()] = load_model(name, **options)
        return loaded[name, *options.items()]

    monkeypatch.setattr(tl_neuron_attr, "load_model", load)
    monkeypatch.setattr(options, "load_model", load)
    for run in (asked, evaluate_run, paper_run):
        monkeypatch.setattr(run, "load_prompts", fewer_prompts)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine many threads for tiny matrices wait, and wait
    with torch.random.fork_rng():  # loading a model draws random numbers
        yield
    torch.set_num_threads(threads)


# Pages that everybody starts with; the examples of the others take longer, all together.
QUICK = {"README", "index", "quickstart"}

PAGES_TO_RUN = [
    pytest.param(
        page,
        marks=[
            pytest.mark.changes(*CHANGES.get(page.stem, ())),
            *([] if page.stem in QUICK else [pytest.mark.slow]),
        ],
        id=page.stem,
    )
    for page in (README, *PAGES)
]


@pytest.mark.parametrize("page", PAGES_TO_RUN)
def test_every_example_of_a_page_runs(page, reader):
    run_page(blocks_of(page))


def test_the_pages_have_examples_and_each_exception_is_still_needed():
    blocks = [block for page in (README, *PAGES) for block in blocks_of(page)]
    text = "\n".join(block.code for block in blocks)
    python = [block for block in blocks if block.language == "python"]
    assert sum(block.reason_not_to_run is None for block in python) >= 30
    assert sum(len(list(commands_of(block))) for block in blocks if block.language == "bash") >= 6
    for words in (*STAND_INS, *NOT_RUN):
        assert words in text, f"{words} is on no page: remove its exception"


def test_no_fence_escapes_the_test():
    """Every fence opens with a language that is run or known to be no code, and is closed."""
    for page in (README, *PAGES):
        found = blocks_of(page)
        known = {"python", "bash", "console", "text", "math"}
        assert {block.language for block in found} <= known, page
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(found), f"{page.name} has a fence without language or end"


@pytest.mark.parametrize(
    ("language", "code", "error"),
    [
        ("python", "import tl_neuron_attr\ntl_neuron_attr.absent", AttributeError),
        ("python", "1 +", SyntaxError),
        ("bash", f"{COMMAND} attribute 'a' --absent", AssertionError),
        ("bash", f"pip list\n{COMMAND} attribute ''", AssertionError),
        ("bash", f"pip list && {COMMAND} attribute ''", AssertionError),
    ],
)
def test_a_broken_block_fails_its_page(language, code, error, tmp_path):
    page = tmp_path / "page.md"
    text = f"# Page\n\n```python\nx = 1\n```\n\n- in a list:\n\n    ```{language}\n"
    text += textwrap.indent(code, "    ") + "\n    ```\n"
    blocks = blocks_of(page, text)
    assert [block.line for block in blocks] == [4, 10]
    with pytest.raises(error):
        run_page(blocks)


@pytest.mark.skipif(HookedTransformer is None, reason="removed in TransformerLens 4")
def test_the_block_for_hooked_transformer_names_what_exists():
    assert callable(HookedTransformer.from_pretrained_no_processing)


def api_entries():
    text = next(page for page in PAGES if page.stem == "api").read_text(encoding="utf-8")
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_waits_for_its_figures(page):
    """A word in capitals alone on its line, or a comment, is where a measured table was to come."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    assert not re.findall(r"^[A-Z]{4,}$|<!--|\bTODO\b|\bTBD\b", text, flags=re.M)


def test_every_entry_of_the_api_page_exists():
    for entry in api_entries():
        if entry == "tl_neuron_attr.errors":
            continue
        module, name = entry.rsplit(".", 1)
        value = getattr(importlib.import_module(module), name)
        # what is said of a constant stands beside it in the source
        constant = not (inspect.isclass(value) or inspect.isroutine(value))
        assert value.__doc__ or constant, entry


def test_every_public_name_is_on_the_api_page():
    documented = set()
    for entry in api_entries():
        if entry == "tl_neuron_attr.errors":  # all of the module
            documented |= {id(value) for value in vars(importlib.import_module(entry)).values()}
        else:
            module, name = entry.rsplit(".", 1)
            documented.add(id(getattr(importlib.import_module(module), name)))
    missing = [
        name
        for name in tl_neuron_attr.__all__
        if id(getattr(tl_neuron_attr, name)) not in documented
    ]
    assert missing == []


def test_links_to_api_entries_are_entries():
    entries = set(api_entries())
    for page in PAGES:
        for anchor in re.findall(r"\(api\.md#([^)]+)\)", page.read_text(encoding="utf-8")):
            assert anchor in entries, f"{page.name}: api.md#{anchor}"


def test_the_contributing_page_names_every_module():
    text = next(page for page in PAGES if page.stem == "contributing").read_text(encoding="utf-8")
    package = Path(tl_neuron_attr.__file__).parent
    modules = [path.name for path in package.glob("*.py") if path.stem != "__init__"]
    modules += [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert [name for name in modules if f"── {name}" not in text] == []


def test_the_self_checks_tolerances_are_those_of_the_page():
    from tl_neuron_attr.identities import _TOLERANCE

    text = next(page for page in PAGES if page.stem == "models").read_text(encoding="utf-8")
    header, _, row = re.search(r"(\| float64 .*)\n(.*)\n(.*)", text).groups()
    columns = zip(header.strip("| ").split("|"), row.strip("| ").split("|"), strict=True)
    shown = {name.strip(): float(value) for name, value in columns}
    assert shown == {str(dtype).removeprefix("torch."): t for dtype, t in _TOLERANCE.items()}
