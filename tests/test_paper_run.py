"""The paper in one command: whole, resumable, the same bytes; and a page that asks for nothing."""

import html
import json
import re
from functools import partial
from html.parser import HTMLParser

import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
from conftest import bundled_model
from typer.testing import CliRunner

from tl_neuron_attr import InputError, cli
from tl_neuron_attr.knowledge import load_prompts
from tl_neuron_attr.markup import Shown, number
from tl_neuron_attr.paper import Settings, run, write_paper
from tl_neuron_attr.report.page import Section, page

SETTINGS = Settings(batch_size=2, sample=1, seed=5)


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture(scope="module")
def prompts():
    """A knowledge set of its own: two types, and one prompt that no model knows."""
    some = [*load_prompts("capital")[:12:4], *load_prompts("number")[:12:4]]
    return (*some, *load_prompts("color")[:2])


@pytest.fixture(scope="module")
def whole(model, prompts, tmp_path_factory):
    lines = []
    found = write_paper(
        model,
        tmp_path_factory.mktemp("paper") / "whole",
        prompts=prompts,
        name="tiny-facts",
        settings=SETTINGS,
        announce=lines.append,
    )
    return found, lines


def bytes_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_every_table_and_figure_is_written_and_can_be_read_back(whole):
    found, _ = whole
    for name, table in found.tables.items():
        saved = pd.read_parquet(found.directory / "tables" / f"{name}.parquet")
        assert saved.shape == table.shape and len(table) > 0 or name == "dropped", name
        text = pd.read_csv(found.directory / "tables" / f"{name}.csv")
        assert text.columns.tolist() == table.columns.tolist(), name
    for name in found.figures:
        figure = plotly.io.read_json(found.directory / "figures" / f"{name}.json")
        assert isinstance(figure, go.Figure) and figure.data, name
    for wanted in ("methods", "drops", "heads", "value_layers", "layer_sums", "segment", "shares"):
        assert wanted in found.tables, wanted


def test_how_long_it_will_take_is_said_from_the_first_batch(whole):
    _, lines = whole
    assert re.search(r"\d+ of 8 prompts kept", lines[0])
    assert re.search(r"the first 2 prompts took [\d.]+ s, .*: about .* for the other \d", lines[1])


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_goes_on_and_ends_with_the_same_bytes(
    model, prompts, whole, tmp_path, monkeypatch
):
    found, _ = whole
    real, calls = run.zero_neurons, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run, "zero_neurons", stopping)
    again = {"prompts": prompts, "name": "tiny-facts", "settings": SETTINGS}
    with pytest.raises(KeyboardInterrupt):
        write_paper(model, tmp_path / "paper", **again)
    # as if the machine had died while a part was written
    parts = tmp_path / "paper" / "parts"
    (parts / "layers" / "01-0000.parquet").write_bytes(b"half")
    (parts / "records" / "01-0000.json").unlink(missing_ok=True)
    kept = (parts / "records" / "00-0000.json").stat().st_mtime_ns
    lines = []
    write_paper(model, tmp_path / "paper", announce=lines.append, **again)
    assert any(re.match(r"\d+ prompts are done already; going on with \d+", each) for each in lines)
    assert (parts / "records" / "00-0000.json").stat().st_mtime_ns == kept
    assert bytes_of(tmp_path / "paper") == bytes_of(found.directory)


def test_a_directory_of_another_run_is_refused_before_anything_is_written(
    model, prompts, whole, tmp_path
):
    found, _ = whole
    before = bytes_of(found.directory)
    with pytest.raises(
        InputError, match="another run of the paper's .*settings.seed is 5, this one's 6"
    ):
        write_paper(
            model, found.directory, prompts=prompts, name="tiny-facts", settings=Settings(seed=6)
        )
    with pytest.raises(InputError, match="another run of .*: its prompts"):
        write_paper(
            model, found.directory, prompts=prompts[1:], name="tiny-facts", settings=SETTINGS
        )
    assert bytes_of(found.directory) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        write_paper(model, tmp_path, prompts=prompts)
    assert bytes_of(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"convention": "recomputed"}, "exact' or 'published"),
        ({"example": " "}, "example's prompt is empty"),
        ({"settings": {"batch_size": 0}}, "batch_size must be at least 1"),
        ({"settings": {"seed": -1}}, "the seed must be at least 0, got -1"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(model, tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        if "settings" in wrong:
            wrong = {"settings": Settings(**wrong["settings"])}
        write_paper(model, tmp_path / "out", prompts=[], **wrong)
    assert not (tmp_path / "out").exists()


# --- the page ---------------------------------------------------------------------------------


class Found(HTMLParser):
    """What a browser would find: links, and the text of scripts apart from that of the page."""

    def __init__(self):
        super().__init__()
        self.links, self.tags, self.scripts, self.text = [], [], [], []
        self.here = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.here = tag
        self.links += [
            (name, value)
            for name, value in attributes
            if name in ("src", "href", "srcset", "action", "data", "poster")
        ]

    def handle_endtag(self, tag):
        self.here = ""

    def handle_data(self, data):
        (self.scripts if self.here in ("script", "style") else self.text).append(data)


def parsed(text):
    found = Found()
    found.feed(text)
    return found


def test_the_page_is_one_file_that_asks_no_host_for_anything(whole):
    found, _ = whole
    seen = parsed(found.page.read_text(encoding="utf-8"))
    assert all(value.startswith(("#", "data:,")) for _, value in seen.links), seen.links
    assert not {"iframe", "img", "object", "embed"} & {*seen.tags}
    plotly_js = max(seen.scripts, key=len)
    for script in seen.scripts:  # plotly.js has addresses of maps that no figure here asks for
        assert script is plotly_js or "//" not in re.sub(r"(?m)//.*$", "", script)
    assert "http" not in " ".join(seen.text)
    assert sum(len(script) > 10**6 for script in seen.scripts) == 1
    for script in seen.scripts:
        for trace in json.loads(script).get("data", []) if script.startswith("{") else []:
            assert trace["type"] in ("bar", "heatmap", "scatter")


def test_published_numbers_stand_beside_ours_and_what_cannot_be_compared_is_said(whole):
    found, _ = whole
    text = found.page.read_text(encoding="utf-8")
    for words in ("0.361", "0.201", "96.3", "44.5", "5.60", "L28.N29", "never released"):
        assert words in text, words
    assert "tiny-facts" in text and "The capital of France is" in text


def test_hostile_text_is_shown_and_never_run():
    evil = "</script><script>alert(1)</script><b>&amp;\u202e\n"
    table = pd.DataFrame({"token": [[evil, "<!--"]], "label": [evil], "value": [-1.23456]})
    figure = go.Figure(go.Bar(x=[evil], y=[1.0]))
    shown = Shown(caption=evil, table=table, columns={"token": evil, "label": "x", "value": "v"})
    text = page(evil, [evil], [Section(title=evil, text=[evil], items=[shown, figure])])
    seen = parsed(text)
    tame = parsed(page("x", ["x"], [Section(title="x", text=["x"], items=[shown, figure])]))
    assert seen.tags.count("script") == tame.tags.count("script")
    assert "b" not in seen.tags
    assert "alert(1)" in " ".join(seen.text)
    data = next(script for script in seen.scripts if script.startswith("{"))
    assert json.loads(data)["data"][0]["x"] == [evil]
    assert '<td class="num" data-v="-1.23456">−1.23</td>' in text
    assert "\u202e" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.0, "12.0"), (0.1234, "0.123"), (98.765, "98.8"), (-4.5e-9, "−4.5e−09")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


# --- the command ------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["paper", *arguments], env={"COLUMNS": "110"})


def test_the_command_says_what_it_wrote(tmp_path, monkeypatch, whole):
    asked = {}

    def fake(model, out, **options):
        asked.update(options, out=out)
        options["announce"]("13 of 8 prompts kept")
        return whole[0]

    monkeypatch.setattr(cli.paper, "write_paper", fake)
    shown = invoke("--out", str(tmp_path / "o"), "--limit", "13", "--seed", "2")
    assert shown.exit_code == 0, shown.output
    assert asked["settings"] == Settings(limit=13, seed=2)
    assert "index.html" in shown.output.replace("\n", "") and "0.361" in shown.output
    assert "never released" in shown.output


def test_a_narrow_terminal_leaves_names_and_digits_whole(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(cli.paper, "write_paper", lambda *_, **__: whole[0])
    for columns in ("50", "80", "200"):
        arguments = ["paper", "--out", str(tmp_path / "o")]
        shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": columns})
        # in parts, where it is too wide for one
        assert re.search(r"(?m)^log prob increase .* 0\.201\b", shown.output), shown.output
        assert re.search(r"(?m)^log prob increase .* 9\.200$", shown.output), shown.output
        assert "…" not in shown.output


def test_ctrl_c_says_that_the_same_command_goes_on_from_there(tmp_path, monkeypatch):
    out = tmp_path / "o"

    def stopped(model, out, *, done, **_):
        if done:
            out.mkdir()
        raise KeyboardInterrupt

    for done, said in ((False, "nothing was done"), (True, f"what is done is kept in {out};")):
        monkeypatch.setattr(cli.paper, "write_paper", partial(stopped, done=done))
        shown = invoke("--out", str(out))
        assert shown.exit_code == 130
        assert shown.stderr.splitlines()[-1].startswith(f"Stopped: {said}"), shown.stderr
        assert ("the same command goes on from there" in shown.stderr) == done
        assert shown.stdout == ""


@pytest.mark.slow
def test_what_is_wrong_with_a_file_of_prompts_is_said_and_kept_on_the_page(tmp_path):
    rows = [
        {"text": text, "answer": answer, "relation": "capitals", "subject": subject}
        for text, answer, subject in (
            ("The capital of France is", " Paris", "France"),
            ("The capital of France is", " Paris", "France"),
            ("The capital of Italy is", " Rome", "Italy"),
        )
    ]
    path, out = tmp_path / "mine.jsonl", tmp_path / "o"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = invoke("--out", str(out), "--prompts", str(path), "--sample", "1")
    assert shown.exit_code == 0, shown.output
    (line,) = [each for each in shown.stderr.splitlines() if "The capital of France is" in each]
    assert line.startswith("Warning: ")
    text = html.unescape((out / "index.html").read_text(encoding="utf-8"))
    assert f"<p>{line}</p>" in text
    with pytest.warns(UserWarning, match=re.escape(line.removeprefix("Warning: "))):
        again = run._loaded(path)
    assert again[1] == (line.removeprefix("Warning: "),)


def test_a_bad_seed_is_refused_before_any_work(tmp_path):
    shown = invoke("--out", str(tmp_path / "o"), "--seed", "-1")
    assert shown.exit_code == 2 and "the seed must be at least 0, got -1" in shown.stderr


def test_the_command_needs_a_directory_and_check_needs_none():
    shown = invoke()
    assert shown.exit_code == 2 and "--out DIR" in shown.output
    shown = invoke("check")
    assert shown.exit_code == 0, shown.output
    assert "0 agree, 0 differ, 2 models skipped" in shown.output
    assert "HF_HUB_OFFLINE" in shown.output


def test_check_exits_with_1_where_something_differs(monkeypatch):
    rows = {
        "model": ["gpt2-large"] * 2,
        "what": ["heads", "layers"],
        "entries": [20, 72],
        "largest_difference": [0.5, 0.0],
        "tolerance": [0.001, 0.001],
        "out_of_place": [3, 0],
        "verdict": ["differs", "agrees"],
        "note": ["", ""],
    }
    monkeypatch.setattr(cli.paper, "check_published", lambda *_, **__: pd.DataFrame(rows))
    shown = invoke("check")
    assert shown.exit_code == 1
    assert "1 agree, 1 differ, 0 models skipped" in shown.output
