"""What the page on security promises: nothing unpickled, no path outside, no code, no network."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tl_neuron_attr import InputError, OutputError, Prompt, attribute_all, cli, load_model
from tl_neuron_attr.files import write_files
from tl_neuron_attr.markup import escaped
from tl_neuron_attr.report.page import POLICY
from tl_neuron_attr.tiny_facts import tiny_facts_dir

ROOT = Path(__file__).parents[1]
FRANCE, ITALY = "The capital of France is", "The capital of Italy is"

# --- a lint forbids what runs the words of a file ---------------------------------------------

FORBIDDEN = {
    "import pickle": "TID251",
    "from pickle import loads": "TID251",
    "import dill": "TID251",
    "import joblib": "TID251",
    "import shelve": "TID251",
    "import yaml": "TID251",
    "import torch\n\ntorch.load('x')": "TID251",
    "from torch import load\n\nload('x')": "TID251",
    "import torch\n\ntorch.save({}, 'x')": "TID251",
    "import numpy as np\n\nnp.load('x', allow_pickle=True)": "TID251",
    "import pandas as pd\n\npd.read_pickle('x')": "TID251",
    "import os\n\nos.system('x')": "TID251",
    "eval('1')": "S307",
    "exec('1')": "S102",
}

needs_ruff = pytest.mark.skipif(
    importlib.util.find_spec("ruff") is None, reason="ruff is in the extra dev"
)


@needs_ruff
def test_the_lint_forbids_each_of_them_in_the_package():
    for code, rule in FORBIDDEN.items():
        ran = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--output-format", "json", "-"]
            + ["--stdin-filename", "tl_neuron_attr/some.py"],
            input=code + "\n",
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert ran.returncode == 1, code
        assert rule in {found["code"] for found in json.loads(ran.stdout)}, code


@needs_ruff
def test_the_lint_finds_nothing_in_the_package_and_no_line_is_excepted():
    ran = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--ignore-noqa", "--select", "S102,S307,TID251"]
        + ["tl_neuron_attr"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stdout


# --- code of a model's own --------------------------------------------------------------------


def test_a_models_own_code_is_not_run(tmp_path):
    mine, ran = tmp_path / "mine", tmp_path / "ran"
    mine.mkdir()
    for file in tiny_facts_dir().iterdir():
        if file.is_file():
            (mine / file.name).write_bytes(file.read_bytes())
    config = json.loads((mine / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config |= {"model_type": "evil", "architectures": ["Model"], "auto_map": code}
    (mine / "config.json").write_text(json.dumps(config))
    (mine / "evil.py").write_text(f"open({str(ran)!r}, 'w').write('ran')\nConfig = Model = object")
    with pytest.raises(InputError, match="if you trust that code"):
        load_model(mine)
    assert not ran.exists()


# --- paths stay in the output directory -------------------------------------------------------

EVIL = [
    "../../evil",
    "/tmp/tl-neuron-attr-evil",
    "..",
    "a/b",
    "..\\evil",
    "evil\x00.html",
    "~/evil",
]


def written_in(directory):
    return {path.relative_to(directory).parts[0] for path in directory.rglob("*")}


@pytest.mark.parametrize("name", [*EVIL, "", "."])
def test_a_file_whose_name_leads_elsewhere_is_not_written(name, tmp_path):
    def write(path):
        path.write_text("evil")

    out = tmp_path / "out"
    with pytest.raises(OutputError, match="it is no file's name"):
        write_files(out, {"whole.txt": write, name: write})
    with pytest.raises(OutputError, match="it is no file's name"):
        write_files(out, {"whole.txt": write}, stale=[name])
    assert written_in(tmp_path) == set()


@pytest.mark.usefixtures("few_cards")
@pytest.mark.parametrize("command", ["run", "report", "attribute"])
def test_no_word_of_a_prompt_chooses_where_a_file_goes(command, tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    asked.mkdir()
    monkeypatch.chdir(asked)
    lines = [
        {"text": "The capital of France is", "prompt_id": name, "knowledge_type": name}
        | ({"answer": " Paris"} if command == "run" else {})
        for name in EVIL
    ]
    if command != "run":
        lines = [{key: line[key] for key in ("text", "prompt_id")} for line in lines]
    Path("prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    if command == "run":
        arguments = ["run", "prompts.jsonl", "--out", "out", "--top", "3"]
        ran = CliRunner().invoke(cli.app, arguments)
        assert ran.exit_code in (0, 2), ran.output
    else:
        prompts = [Prompt(text=line["text"], prompt_id=line["prompt_id"]) for line in lines]
        results = attribute_all(load_model(), prompts, top=3)
        if command == "attribute":
            for number, result in enumerate(results[:3]):
                result.save(Path("out") / str(number), report=number == 0)
        else:
            from tl_neuron_attr.report import report_set

            places = []
            for number, result in enumerate(results[:3]):
                places.append(Path("out") / str(number))
                result.save(places[-1])
            report_set(places, "out/report")
    assert written_in(tmp_path) == {"asked"}
    assert written_in(asked) == {"prompts.jsonl", "out"}
    assert not Path("/tmp/tl-neuron-attr-evil").exists()
    assert not [path for path in (asked / "out").rglob("*") if "evil" in path.name]


# --- pages load nothing -----------------------------------------------------------------------


def test_every_page_that_graph_writes_has_the_policy_in_its_head(tmp_path):
    ran = CliRunner().invoke(cli.app, ["graph", FRANCE, "--values", "2", "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert sorted(pages) == ["graph.html", "report.html"]
    for name, text in pages.items():
        head = text.partition("</head>")[0]
        assert f'http-equiv="Content-Security-Policy" content="{escaped(POLICY)}"' in head, name
        assert not re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?!data:)", text)


# --- no network -------------------------------------------------------------------------------

OFFLINE = """
import json, os, random, socket, sys
os.environ.pop("HF_HUB_OFFLINE", None)  # nothing but the wall below keeps it from asking the hub
asked = []

def refuse(kind):
    def refused(*arguments, **options):
        asked.append(f"{kind} {arguments[1:3]!r}")
        raise OSError("no network here")
    return refused

real = socket.socket.connect
def connect(self, address):
    ours = self.family == socket.AF_UNIX
    return real(self, address) if ours else refuse("connect")(self, address)
socket.socket.connect = connect
socket.socket.connect_ex = refuse("connect_ex")
socket.getaddrinfo = refuse("getaddrinfo")
socket.create_connection = refuse("create_connection")

from typer.testing import CliRunner
from tl_neuron_attr import cli
codes, before = {}, random.getstate()
for line in json.loads(sys.argv[1]):
    shown = CliRunner().invoke(cli.app, line)
    codes[" ".join(line)] = (shown.exit_code, shown.output[-500:] if shown.exit_code else "")
print("\\n" + json.dumps([codes, asked, random.getstate() == before]))
"""
COMMANDS = [
    ["attribute", FRANCE, "--out", "france"],
    ["query", FRANCE],
    ["card", "L1.N137", FRANCE],
    ["run", "prompts.jsonl", "--out", "many", "--top", "5"],
    ["summary", "many"],
    ["report", "france"],
    ["doctor", "--copy-gib", "0"],
]


@pytest.mark.slow
def test_the_commands_ask_nobody_on_the_network_and_draw_no_random_number(tmp_path):
    lines = [json.dumps({"text": text, "answer": " Paris"}) for text in (FRANCE, ITALY)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OFFLINE, json.dumps(COMMANDS)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    codes, asked, drawn_from_none = json.loads(ran.stdout.splitlines()[-1])
    assert {line: code for line, (code, _) in codes.items() if code} == {}, codes
    assert asked == []
    # Python's own random numbers; where tests run, beartype draws from them
    assert drawn_from_none
