"""The pages that commands write beside their tables: what is in the tables, safe, drawn anew."""

import json
import os
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import bundled_model
from typer.testing import CliRunner

from tl_neuron_attr import attribute, load_evaluation, neuron_card, value_query_graph
from tl_neuron_attr.cli import app
from tl_neuron_attr.errors import InputError, OutputError
from tl_neuron_attr.knowledge import load_prompts, save_prompts
from tl_neuron_attr.prompts import visible
from tl_neuron_attr.report import page as page_module
from tl_neuron_attr.report.again import OF_RUNS, draw_again, has_page, page_of
from tl_neuron_attr.report.card import TABLES, card_page
from tl_neuron_attr.report.evaluation import evaluation_page
from tl_neuron_attr.report.graph import graph_page
from tl_neuron_attr.report.prompts import prompts_page
from tl_neuron_attr.tables import Saved

PROMPT = "The capital of France is"
FEW_SHOT = "The capital of France is Paris. The capital of Spain is Madrid. The capital of Peru is"
COMMANDS = {
    "query": ["query", PROMPT, "--kind", "both", "--top", "12"],
    "graph": ["graph", PROMPT, "--depth", "2", "--opposing"],
    "card": ["card", "L3.H2.D17@2", PROMPT],
    "compare": ["compare", PROMPT, "--zero", "L0.H2", "--top", "12", "--lowest"],
    "heads": ["heads", PROMPT],
    "in-context": ["in-context", FEW_SHOT, "--labels", " Paris", " Madrid", "--top", "3"],
    "evaluate": ["evaluate", "--methods", "a,b", "--top", "2,5", "--unfiltered", "--prompts"],
    "known.jsonl": ["prompts", "--model", "tiny-facts"],
    "all.jsonl": ["prompts"],
}
HOSTILE = (
    "</script><script>alert(1)</script><!--<img src=//x.example/y onerror=alert(1)>\u202e\x1b\x00"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with what every command writes, by name."""
    place = tmp_path_factory.mktemp("pages")
    some = place / "some.jsonl"
    save_prompts([*load_prompts("capital")[:3], *load_prompts("language")[:3]], some)
    for name, arguments in COMMANDS.items():
        takes_prompts = arguments[0] in ("evaluate", "prompts")
        more = [str(some)] if takes_prompts else []
        shown = CliRunner().invoke(app, [*arguments, *more, "--out", str(place / name)])
        assert shown.exit_code == 0, shown.output
        assert f"open {report_of(place / name)}" in shown.output
    return place


def report_of(place):
    return place.with_suffix(".report.html") if place.suffix else place / "report.html"


class Page(HTMLParser):
    """What a browser finds on a page: tags, cells and what they are sorted by, text."""

    VOID = ("meta", "link", "input", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.exact, self.words, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, "elements that are not closed"

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [given[name] for name in ("src", "href") if name in given]
        assert not [name for name in given if name.startswith("on")]
        if "data-v" in given:
            self.exact.append(given["data-v"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_is_html_of_its_own_that_asks_for_nothing_else(written, name):
    text = report_of(written / name).read_text(encoding="utf-8")
    assert len(text.encode()) < 6_000_000
    found = Page(text)
    assert all(link.startswith(("#", "data:")) for link in found.links), found.links
    words = "".join(found.words)
    assert "default-src &#x27;none&#x27;" in text
    for said in ("To make it again: tl-neuron-attr", "Where this comes from"):
        assert said in words
    if name != "all.jsonl":
        assert "How to read this" in words and "tiny-facts" in words


@pytest.mark.parametrize("name", COMMANDS)
def test_drawn_from_the_files_a_page_has_the_same_bytes(written, name):
    assert page_of(written / name) == report_of(written / name).read_text(encoding="utf-8")


NUMBERS = {
    "query": {"query_layers": ["score"], "query_neurons": ["score"], "query_values": ["total"]},
    "graph": {"nodes": ["score", "handed_down", "explained"], "edges": ["weight"]},
    "card": {"ends": ["logit"], "sources": ["v", "score"], "heads": ["readability"]},
    "compare": {
        "layers": ["difference"],
        "heads": ["score", "other_score"],
        "neurons": ["difference", "score", "coefficient"],
        "lowest": ["difference", "other_score"],
    },
    "heads": {"heads": ["change", "score"]},
    "in-context": {
        "heads": ["score", "zeroed", "contrast_1"],
        "label_positions": ["log_prob_difference"],
        "inputs": ["share", "value_share"],
    },
    "evaluate": {"summary": ["after", "change_low"], "areas": ["area"], "comparisons": ["p"]},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_page_shows_every_number_of_its_tables(written, name):
    exact = set(Page(report_of(written / name).read_text(encoding="utf-8")).exact)
    for table, columns in NUMBERS[name].items():
        rows = pd.read_parquet(written / name / f"{table}.parquet")
        if table == "nodes":
            rows = rows[rows["role"] != "answer"]
        for column in columns:
            values = np.asarray(rows[column], dtype=float)
            wanted = {f"{value:.9g}" for value in values if np.isfinite(value) and value % 1}
            assert wanted and wanted <= exact, f"{table}.{column}"


def test_findings_are_those_of_the_tables(written):
    pages = {name: report_of(written / name).read_text(encoding="utf-8") for name in COMMANDS}
    words = {name: " ".join(Page(text).words) for name, text in pages.items()}
    heads = pd.read_parquet(written / "heads" / "heads.parquet")
    worst = heads.loc[heads["change"].idxmin()]
    assert f"Without L{worst['layer']:.0f}.H{worst['head']:.0f} alone" in words["heads"]
    assert f"{worst['change']:+.3f}".replace("-", "−") in words["heads"]
    edges = pd.read_parquet(written / "graph" / "edges.parquet")
    into = edges.loc[edges["target"] == "answer", "weight"]
    assert f"{len(into)} value neurons are drawn" in words["graph"]
    assert f"by {into.sum():+.3f} nats" in words["graph"]
    layers = pd.read_parquet(written / "query" / "query_layers.parquet")
    assert f"bring {layers['score'].sum():+.3f} nats" in words["query"]
    summary = pd.read_parquet(written / "evaluate" / "summary.parquet").query(
        "knowledge_type == 'all' and metric == 'prob' and top == 5 and "
        "method in ['log_prob_increase', 'log_prob']"
    )
    assert f"mean probability is {summary['after'].min():.3f} [" in words["evaluate"]
    kept = len((written / "known.jsonl").read_text(encoding="utf-8").splitlines())
    assert f"knows {kept} of 6 prompts" in words["known.jsonl"]


# --- hostile words ----------------------------------------------------------------------------


def poisoned(value: Any, name: str = "") -> Any:
    """The same facts with every word of the model or the user replaced by a hostile one."""
    if isinstance(value, dict):
        return {key: poisoned(each, key) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [poisoned(each, name) for each in value]
    words = ("text", "prompt", "token", "token_texts", "tokens", "raises", "lowers", "warnings")
    words += ("name", "label", "again", "what", "source_token", "source", "answer", "detail")
    words += ("target", "notes", "reason")
    return HOSTILE if isinstance(value, str) and name in words else value


def poisoned_table(table):
    """The same of a table; what tells rows apart stays."""
    changed = {}
    for name in ("token", "source_token", "other_source_token", "text", "reason"):
        if name in table:
            changed[name] = [HOSTILE] * len(table)
    if "label" in table:  # of a graph's nodes: made visible where it is made
        changed["label"] = [visible(HOSTILE)] * len(table)
    for name in ("raises", "lowers"):
        if name in table:
            changed[name] = [[HOSTILE] * 3] * len(table)
    return table.assign(**changed)


def hostile_page(place, name):
    read = {path.stem: pd.read_parquet(path) for path in place.glob("*.parquet")}
    tables = {key: poisoned_table(table) for key, table in read.items()}
    if name in OF_RUNS:
        facts = poisoned(json.loads((place / "run.json").read_text()))
        return OF_RUNS[name][1](Saved(tables=tables, facts=facts))
    if name == "graph":
        facts = poisoned(json.loads((place / "graph.json").read_text())["graph"])
        return graph_page(Saved(tables=tables, facts=facts))
    if name == "card":
        return card_page(poisoned(json.loads((place / "card.json").read_text())))
    if place.suffix:
        return prompts_page(poisoned(json.loads(place.with_suffix(".run.json").read_text())))
    found = load_evaluation(place)
    names = {"method": HOSTILE, "prompt_id": HOSTILE, "reason": HOSTILE}
    skipped = pd.DataFrame([names], dtype="string")
    correlations = found.predicted.rename(columns={"predicted": "spearman"})
    columns = ["prompt_id", "knowledge_type", "method", "kind", "spearman"]
    rows = pd.DataFrame(correlations, columns=columns)
    return evaluation_page(
        replace(
            found,
            facts=poisoned(dict(found.facts)),
            skipped=skipped,
            correlations=rows.drop_duplicates(["prompt_id", "method"]),
        )
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_tokens_are_text_on_every_page(written, name):
    plain = Page(report_of(written / name).read_text(encoding="utf-8"))
    text = hostile_page(written / name, name)
    found = Page(text)
    assert found.tags.count("script") == plain.tags.count("script")
    assert "img" not in found.tags and found.links.count("//x.example/y") == 0
    assert "alert(1)" in "".join(found.words)
    library = page_module.get_plotlyjs()
    for char in "\u202e\x1b\x00":
        assert char not in text.replace(library, "").split("<script>")[0]


# --- files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return attribute(bundled_model(), PROMPT, top=20)


def test_a_page_is_replaced_with_its_tables_or_not_at_all(written, tmp_path, monkeypatch):
    place = tmp_path / "heads"
    shutil.copytree(written / "heads", place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OutputError, match="disk full"):
        draw_again(place)
    shown = CliRunner().invoke(app, ["heads", "The capital of Spain is", "--out", str(place)])
    assert shown.exit_code == 2 and "disk full" in shown.output.replace("\n", " ")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


@pytest.mark.parametrize("kind", ["graph", "card", "evaluate"])
def test_saved_without_a_page_an_old_one_does_not_stay(result, written, kind, tmp_path):
    made = {
        "graph": lambda: value_query_graph(result),
        "card": lambda: neuron_card(result, "L1.N137"),
        "evaluate": lambda: load_evaluation(written / "evaluate"),
    }[kind]()
    made.save(tmp_path)
    assert not (tmp_path / "report.html").exists()
    made.save(tmp_path, report=True)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page_of(tmp_path)
    assert not list(tmp_path.glob(".*"))
    made.save(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_report_command_draws_every_page_again(written, tmp_path):
    for name in COMMANDS:
        page = report_of(written / name)
        before = page.read_bytes()
        page.write_text("an older page")
        shown = CliRunner().invoke(app, ["report", str(written / name)])
        assert shown.exit_code == 0, shown.output
        assert page.read_bytes() == before
    elsewhere = tmp_path / "heads.html"
    CliRunner().invoke(app, ["report", str(written / "heads"), "--out", str(elsewhere)])
    assert elsewhere.read_bytes() == report_of(written / "heads").read_bytes()


def test_a_damaged_directory_is_one_sentence(written, tmp_path):
    place = tmp_path / "heads"
    shutil.copytree(written / "heads", place)
    (place / "heads.parquet").write_bytes(b"no table")
    assert has_page(place)
    with pytest.raises(InputError, match="cannot draw the report of .* write it again"):
        draw_again(place)
    shown = CliRunner().invoke(app, ["report", str(place)])
    assert shown.exit_code == 2 and shown.stderr.startswith("Error: cannot draw the report")
    assert not has_page(tmp_path / "nothing")


def test_a_card_with_every_table_empty_has_a_page(written):
    facts = json.loads((written / "card" / "card.json").read_text())
    assert set(TABLES) <= facts.keys()
    text = card_page({**facts, **{name: [] for name in TABLES if name != "ends"}})
    assert "<h2>What it says</h2>" in text and "<h2>What set it off</h2>" not in text


# --- a browser --------------------------------------------------------------------------------


def chromium():
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = [
        path
        for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
        if path
    ]
    if not found:
        pytest.skip("no Chromium is installed")
    return found[0]


@pytest.mark.slow
def test_every_page_opens_in_a_browser_without_a_network(written):
    place = chromium()
    from playwright.sync_api import sync_playwright

    problems, asked = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=place, args=["--no-sandbox", "--disable-gpu"]
        )
        context = browser.new_context(viewport={"width": 400, "height": 900}, offline=True)
        for name in COMMANDS:
            tab = context.new_page()
            tab.on("console", lambda said: problems.append(said.text))
            tab.on("pageerror", lambda error: problems.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(Path(report_of(written / name)).as_uri())
            figures = tab.locator(".plot").count()
            assert (figures == 0) == name.endswith(".jsonl")
            tab.evaluate("dispatchEvent(new Event('beforeprint'))")  # draws those not yet in view
            tab.wait_for_function(
                f"document.querySelectorAll('.plot.js-plotly-plot').length === {figures}"
            )
            wide = tab.evaluate("document.documentElement.scrollWidth")
            assert wide <= 400, f"the page of {name} is wider than a phone: {wide}"
            assert tab.locator("th .sort").count() > 0
            tab.close()
        browser.close()
    assert not problems
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
