"""The terminal: what to type next, examples that run, lines that fit, colours only where wanted."""

import io
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from tl_neuron_attr import cli, load_prompts
from tl_neuron_attr.cli import terminal
from tl_neuron_attr.cli.terminal import print_table, token_widths
from tl_neuron_attr.display import decimals

COMMANDS = [cli._name(command) for commands in cli.PANELS.values() for command in commands]
BEFORE = {
    "summary": ["run capital --out capitals"],
    "diff": [
        "run capital --out capitals",
        "run capital --out capitals-published --convention published",
    ],
}
"""What must have been run before a command's example."""
OLD_RUN = Path(__file__).parent / "data" / "run-v1"  # what upgrade is for
SLOW = {"paper"}  # the whole paper takes minutes; tests/test_paper_run.py runs it on a few prompts
QUICK = {"attribute", "query", "prompts"}  # all examples together take 15 seconds


def run(*arguments, width=100):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": str(width)})


def example_of(command):
    """The arguments of the example in a command's help, as it is printed."""
    shown = run(command, "--help", width=300).output
    *_, found = re.findall(r"Example: tl-neuron-attr (.*)", shown)
    return shlex.split(found)


# --- what to type next ------------------------------------------------------------------------


def test_without_a_command_it_says_what_to_type_and_what_there_is():
    shown = run()
    assert shown.exit_code == 0
    for line in (*cli.FIRST_STEPS, *cli.PANELS, *COMMANDS):
        assert line in shown.output, line


@pytest.mark.usefixtures("few_cards")
@pytest.mark.parametrize("line", cli.FIRST_STEPS)
def test_the_first_steps_work_as_they_stand(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(line)
    assert name == "tl-neuron-attr"
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    assert line in run(width=60).output  # never broken: to be copied


def test_every_command_stands_in_one_group():
    shown = run("--help").output
    assert sorted(COMMANDS) == sorted(set(COMMANDS))
    for panel, commands in cli.PANELS.items():
        assert f"─ {panel} ─" in shown
        for command in commands:
            assert re.search(rf"│ {cli._name(command)} ", shown)


def test_a_slip_of_the_finger_gets_a_suggestion():
    shown = run("atribute", "The capital of France is")
    assert shown.exit_code == 2 and "Did you mean 'attribute'?" in shown.output
    shown = run("attribute", "The capital of France is", "--tpo", "3")
    assert shown.exit_code == 2 and "--top" in shown.output


# --- examples, and lines that fit -------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert example_of(command)[0] == command


@pytest.mark.usefixtures("few_cards")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in COMMANDS
        if name not in SLOW
    ],
)
def test_the_example_runs_offline_and_fits_narrow_terminals(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = example_of(command)
    # thousands take seconds, and each of a report's takes one
    few = load_prompts("capital")[: 3 if command == "report" else 40]
    for module in ("cli.prompts", "cli.evaluate", "evaluate.run", "cli.report", "runs.asked"):
        monkeypatch.setattr(sys.modules[f"tl_neuron_attr.{module}"], "load_prompts", lambda _: few)
    if command == "upgrade":
        shutil.copytree(OLD_RUN, "capitals")
    for line in BEFORE.get(command, ()):
        assert run(*line.split()).exit_code == 0
    for width in (80, 60) if command in ("attribute", "compare") else (60,):
        shown = run(*arguments, width=width)
        assert shown.exit_code == 0, shown.output
        lines = shown.stdout.splitlines()  # lines of a log are as long as they are
        long = [line for line in lines if len(line) > width and "indices" not in line]
        assert not long, long
        # a number is never cut: an ellipsis ends words only
        assert not re.findall(r"[+-]\d*\.\d*…", shown.output)


def test_a_table_too_wide_is_printed_in_parts_and_loses_nothing():
    table = Table(box=None, pad_edge=False)
    cells = [f"+{number}.{number:06}" for number in range(12)]
    for number in range(12):
        table.add_column(f"column{number}", no_wrap=True)
    table.add_row(*cells)
    for width in (30, 44, 60, 200):
        with open(os.devnull, "w") as nowhere:
            console = Console(width=width, file=nowhere, record=True)
            print_table(console, table)
        shown = console.export_text()
        assert max(map(len, shown.splitlines())) <= width
        assert [shown.count(cell) for cell in cells[1:]] == [1] * 11
        parts = len(shown.splitlines()) // 2
        assert shown.count(cells[0]) == parts and (parts == 1) == (width == 200)


def test_a_header_gives_way_before_cells_are_cut():
    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    for name in ("kind", "largest score difference", "lowest", "mean overlap"):
        table.add_column(name, justify="right")
    table.add_row("gradient_activation", "attn", "0.5", "0.800", "0.800")
    printed = io.StringIO()
    print_table(Console(file=printed, width=60), table)
    cells = printed.getvalue().rstrip().splitlines()[-1].split()
    assert cells == ["gradient_activation", "attn", "0.5", "0.800", "0.800"]  # all in one part


def test_token_lists_give_way_before_numbers_do():
    assert token_widths(60) == {"raises": 28, "lowers": 28}
    assert token_widths(12) == {"raises": 10}
    assert token_widths(9) == token_widths(-20) == {}


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.5833, 3, "+0.583"),
        (-0.0005, 3, "-0.001"),
        (4.9e-4, 3, "+4.9e-4"),
        (-3.21e-5, 3, "-3.2e-5"),
        (3.21e-12, 3, "+3e-12"),
        (0.0, 3, "+0.000"),
        (0.004, 2, "+4.0e-3"),
        (float("nan"), 3, "+nan"),
        (12.3456, 2, "+12.35"),
    ],
)
def test_decimals_never_show_a_score_as_nothing(value, digits, shown):
    assert decimals(value, digits) == shown
    assert len(decimals(value)) <= 7


# --- a real terminal, and none ----------------------------------------------------------------

SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
HEADS = ("heads", "The capital of France is")
THREE_TIMES = f"""
import os
from tl_neuron_attr.cli import app
for setting in ({{}}, {{"TERM": "dumb"}}, {{"NO_COLOR": "1"}}):
    os.environ.update(setting)
    app({list(HEADS)!r}, standalone_mode=False)
    print("=====")
    os.environ["TERM"] = "xterm-256color"
"""


def on_a_terminal(program, columns):
    """What a Python program shows on a terminal that has colours, and its exit code."""
    primary, secondary = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    env.pop("NO_COLOR", None)
    running = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env=env,
    )
    os.close(secondary)
    shown = b""
    while select.select([primary], [], [], 120)[0]:
        try:
            piece = os.read(primary, 65536)
        except OSError:  # the program has ended
            break
        if not piece:
            break
        shown += piece
    os.close(primary)
    return shown.decode(), running.wait(timeout=120)


@pytest.mark.slow
def test_colours_are_for_terminals_that_have_them_and_readers_who_want_them():
    shown, code = on_a_terminal(THREE_TIMES, columns=80)
    assert code == 0, shown
    coloured, dumb, plain, _ = shown.split("=====")
    assert SEQUENCE.search(coloured)
    assert max(len(SEQUENCE.sub("", line)) for line in coloured.splitlines()) <= 80
    assert not SEQUENCE.search(dumb)
    # bold and dim are no colours
    assert not [code for code in SEQUENCE.findall(plain) if re.search(r"\[(3|4|9)\d", code)]


@pytest.mark.slow
def test_a_closed_pipe_leaves_no_traceback_and_pipes_get_no_colours():
    command = shlex.join([sys.executable, "-m", "tl_neuron_attr.cli", *HEADS])
    piped = subprocess.run(
        ["bash", "-c", f"{command} | head -1"], capture_output=True, text=True, timeout=120
    )
    assert piped.stderr == "" and piped.stdout.startswith("tiny-facts")
    assert not SEQUENCE.search(piped.stdout)


FRANCE = "The capital of France is"
SHOTS = f"{FRANCE} Paris. The capital of Italy is Rome. {FRANCE}"
WARNED = {
    "answer": (f"{FRANCE} ", "--answer", " Paris and Rome", "--top", "1"),
    "card": ("L1.N137", f"{FRANCE} ", "--top", "1"),
    "compare": (f"{FRANCE} ", "--zero", "L0.H2", "--top", "1"),
    "graph": (f"{FRANCE} ", "--depth", "1"),
    "heads": (f"{FRANCE} ", "--top", "1"),
    "in-context": (f"{SHOTS} ", "--labels", " Paris", " Rome", "--no-scan", "--top", "1"),
    "query": (f"{FRANCE} ", "--top", "1"),
}


@pytest.mark.parametrize("command", WARNED)
def test_what_the_library_warns_of_and_what_was_written_stands_below_the_tables(command, tmp_path):
    at = [] if command == "heads" else ["--out", str(tmp_path / "out")]
    shown = run(command, *WARNED[command], *at, width=300)
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.output.split())
    assert "the prompt ends with a space, a token of its own" in said
    assert not at or f" to {tmp_path / 'out'}" in said


def test_memory_is_told_as_far_as_the_system_tells_it(monkeypatch):
    assert re.fullmatch(r"\d+ MiB", terminal.peak_memory())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert terminal.peak_memory().endswith(" MiB, 3 MiB on the GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(terminal.os, "name", "nt")
        assert terminal.peak_memory() == "unknown"


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["tl_neuron_attr.cli.heads"], "load", interrupted)
    shown = run(*HEADS)
    assert shown.exit_code == 130
    assert "Traceback" not in shown.output
