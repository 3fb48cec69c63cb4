"""The report of one prompt and of a set: what is on the page is what is in the tables."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
from conftest import bundled_model
from typer.testing import CliRunner

from tl_neuron_attr import Distribution, Prompt, attribute, projection_index
from tl_neuron_attr.cli import app
from tl_neuron_attr.errors import InputError, OutputError
from tl_neuron_attr.report import (
    CARDS,
    read_saved,
    redraw_report,
    report_html,
    report_set,
)
from tl_neuron_attr.report.attribution import command_of
from tl_neuron_attr.tables import records

PROMPT = "The capital of France is"
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--",
    "<img src=x onerror=alert(1)>",
    "\u202e\u200f",
    "\x00\x07\x1b[31m",
    "\ud800",
    "\u2028\u2029",
    "&amp;'\"",
    "x" * 20_000,
    "",
)


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture(scope="module")
def result(model, tmp_path_factory):
    index = projection_index(model, tmp_path_factory.mktemp("index"))
    return attribute(model, PROMPT, top=40, index=index)


@pytest.fixture(scope="module")
def directory(result, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "france"
    result.save(place, report=True)
    return place


class Page(HTMLParser):
    """What a browser would find on a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.data, self.text, self.here = [], [], {}, [], {}
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.here = {"tag": tag, **dict(attributes)}
        self.tags.append(tag)
        self.scripts += tag == "script"
        self.links += [value for name, value in attributes if name in ("src", "href")]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        self.here = {}

    def handle_data(self, text):
        if self.here.get("type") == "application/json":
            name = self.here.get("data-name") or self.here["data-for"]
            self.data[name] = json.loads(text)
        elif self.here.get("tag") not in ("script", "style"):
            self.text.append(text)


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


# --- one file ---------------------------------------------------------------------------------


def test_the_report_is_one_file_below_6_mb_that_asks_no_host_for_anything(model, tmp_path):
    place = attribute(model, PROMPT).report(tmp_path / "france.html")  # 300 neurons, the default
    assert place.stat().st_size < 6_000_000
    text = place.read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith(("#", "data:,")) for link in page.links)
    assert not {"img", "iframe", "link"} & {*page.tags} - {"link"}
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    assert policy.startswith("default-src &#x27;none&#x27;") and "connect-src" not in policy
    assert sorted(each.name for each in tmp_path.iterdir()) == ["france.html"]


def test_the_report_drawn_again_from_its_directory_has_the_same_bytes(directory, tmp_path):
    again = redraw_report(directory, tmp_path / "again.html")
    assert again.read_bytes() == (directory / "report.html").read_bytes()


def test_without_a_report_the_files_of_an_earlier_one_go(result, directory, tmp_path):
    place = tmp_path / "france"
    shutil.copytree(directory, place)
    assert (place / "cards.json").exists()
    result.save(place)
    assert not {"cards.json", "report.html"} & {each.name for each in place.iterdir()}


def test_a_directory_without_cards_is_drawn_without_them(directory, tmp_path):
    place = tmp_path / "france"
    shutil.copytree(directory, place)
    (place / "cards.json").unlink()
    found = page_of(redraw_report(place)).data["report"]
    assert found["cards"] == {} and found["lists"]["ffn"]


def test_if_writing_fails_nothing_has_changed(result, directory, tmp_path, monkeypatch):
    place = tmp_path / "france"
    shutil.copytree(directory, place)
    before = {each.name: each.read_bytes() for each in place.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OutputError, match="No space left"):
        result.save(place, report=True)
    assert {each.name: each.read_bytes() for each in place.iterdir()} == before


# --- what is on it ----------------------------------------------------------------------------


def test_every_number_and_token_in_the_lists_is_that_of_the_tables(directory):
    found = page_of(directory / "report.html").data["report"]
    saved, _ = read_saved(directory)
    neurons = saved.tables["neurons"]
    lowest = saved.tables["suppressing"]
    wanted = {
        "ffn": neurons.query("role == 'value' and kind == 'ffn'"),
        "attn": neurons.query("role == 'value' and kind == 'attn'"),
        "query": neurons.query("role == 'query'"),
        "suppressing-ffn": lowest.query("kind == 'ffn'"),
        "suppressing-attn": lowest.query("kind == 'attn'"),
    }
    assert [*found["lists"]] == sorted(wanted)
    for name, table in wanted.items():
        rows = records(table)
        assert len(rows) == len(found["lists"][name]) > 0
        for row, shown in zip(rows, found["lists"][name], strict=True):
            rank, label, source, coefficient, score, raises, lowers = shown
            assert rank == row["rank"] and label.startswith(f"L{row['layer']}.")
            assert coefficient == pytest.approx(row["coefficient"], rel=1e-6, abs=1e-30)
            assert score == pytest.approx(row["score"], rel=1e-6, abs=1e-30)
            assert source == (row.get("position") if name == "query" else row["source_pos"])
            words = [found["words"][at] for at in raises + lowers]
            tokens = [*row["raises"], *row["lowers"]]
            assert [word.replace("·", " ") for word in words] == [
                token if token.isprintable() else token.encode("unicode_escape").decode()
                for token in tokens
            ]


def test_positions_and_figures_are_those_of_the_tables(directory):
    page = page_of(directory / "report.html")
    saved, _ = read_saved(directory)
    found = page.data["report"]["positions"]
    table = saved.tables["positions"].set_index(["layer", "head", "source_pos"])
    for (layer, head), scores, attention in zip(
        found["heads"], found["scores"], found["attention"], strict=True
    ):
        rows = table.loc[(layer, head)]
        assert scores == pytest.approx(rows["score"].tolist(), rel=1e-4)
        assert attention == pytest.approx(rows["attention"].tolist(), rel=1e-4)
    assert len(found["heads"]) == len(saved.tables["heads"]) and found["left_out"] == 0
    bars = {trace["name"]: trace["y"] for trace in page.data["f-layers"]["data"]}
    layers = saved.tables["layers"]
    assert bars["FFN"] == pytest.approx(layers[layers["kind"] == "ffn"]["score"].tolist())


def test_cards_are_those_of_the_best_of_each_list(result, directory):
    found = page_of(directory / "report.html").data["report"]
    saved, cards = read_saved(directory)
    assert len(found["cards"]) == len(cards) == 3 * CARDS
    for name, role in (("ffn", "value"), ("attn", "value"), ("query", "query")):
        for row in found["lists"][name][:CARDS]:
            card = found["cards"][f"{role} {row[1]}"]
            assert card["coefficient"] == pytest.approx(row[3], rel=1e-4)
            if role == "value":
                assert card["score"] == pytest.approx(row[4], rel=1e-4)
                assert card["rank"] == row[0]
                raised = [found["words"][at] for at, _ in card["raises"]]
                assert set(raised) == {found["words"][at] for at in row[5]}
    assert "Where it comes from" in {each["title"] for each in card["tables"]} | {
        each["title"] for each in found["cards"]["value " + found["lists"]["attn"][0][1]]["tables"]
    }


def test_words_say_the_certificate_and_the_command_that_makes_it_again(result, directory):
    text = " ".join(page_of(directory / "report.html").text)
    assert f"of {result.ffn_neurons.certificate.total:,}" in text
    assert result.facts()["model"]["sha256"] in text
    command = re.search(r"tl-neuron-attr attribute '.*?--out OUT", text)
    assert command and PROMPT in command[0] and f"--target-id {result.target.id}" in command[0]


@pytest.mark.slow
def test_the_command_on_the_page_gives_the_same_numbers(directory, tmp_path):
    text = " ".join(page_of(directory / "report.html").text)
    command = re.search(r"tl-neuron-attr (attribute '(.*?)'.*?) --out OUT", text)
    rest = command[1].replace(f"'{command[2]}'", "TEXT").split()
    words = [command[2] if word == "TEXT" else word for word in rest]
    out = tmp_path / "again"
    done = CliRunner().invoke(app, [*words, "--top", "40", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert (out / "report.html").exists()
    again = read_saved(out)[0].tables["neurons"]
    first = read_saved(directory)[0].tables["neurons"]
    pd.testing.assert_frame_equal(again.drop(columns="prompt_id"), first.drop(columns="prompt_id"))


@pytest.mark.parametrize(
    ("asked", "convention", "words"),
    [
        ({"position": 3}, "exact", "--position 3"),
        ({"prepend_bos": False}, "exact", "--no-bos"),
        ({"target": Distribution()}, "published", "--distribution --convention published"),
        ({"text": "-5 degrees is"}, "exact", "--tokens"),  # it would be taken for an option
        ({"target": {7, 9}}, "published", "--target-id 7 --target-id 9"),
    ],
)
def test_the_command_of_whatever_was_asked_gives_the_same_numbers(model, asked, convention, words):
    prompt = Prompt(**{"text": PROMPT, **asked})
    facts = attribute(model, prompt, top=2, convention=convention).facts()
    command = command_of(facts)
    assert words in command
    program, *arguments = shlex.split(command.removesuffix(" --out OUT"))
    done = CliRunner().invoke(app, [*arguments, "--top", "2", "--json"])
    assert done.exit_code == 0, done.output
    again = json.loads(done.stdout)
    assert [token["id"] for token in again["tokens"]] == facts["tokens"]
    assert again["target"].items() <= facts["target"].items()
    assert [again[name] for name in ("read_pos", "convention")] == [
        facts[name] for name in ("read_pos", "convention")
    ]


def test_warnings_stand_at_the_top(directory):
    saved, cards = read_saved(directory)
    facts = {**saved.facts, "warnings": ["the norm is <b>odd</b>"]}
    text = report_html(replace(saved, facts=facts), cards)
    assert "the norm is &lt;b&gt;odd" in text
    assert text.index("the norm is") < text.index('id="strip"')


def test_a_contrast_has_a_report(model, tmp_path):
    result = attribute(model, PROMPT, target=" Paris", against=" Rome", top=3)
    result.save(tmp_path, report=True)
    text = " ".join(page_of(tmp_path / "report.html").text)
    assert "rather than" in text and "a contrast is linear" in text and "--against-id" in text


def test_a_prompt_of_ids_and_one_token_has_a_report(tiny_model, tmp_path):
    result = attribute(tiny_model, [3], top=2)
    result.save(tmp_path, report=True)
    assert redraw_report(tmp_path).stat().st_size < 6_000_000
    assert "--tokens 3" in " ".join(page_of(tmp_path / "report.html").text)


# --- hostile tokens ---------------------------------------------------------------------------


def test_hostile_tokens_are_shown_and_never_run(directory):
    saved, cards = read_saved(directory)
    texts = [*HOSTILE, *saved.facts["token_texts"]]
    evil = list(HOSTILE)
    facts = {
        **saved.facts,
        "prompt": "".join(HOSTILE),
        "token_texts": evil[:6],
        "target": {**saved.facts["target"], "text": HOSTILE[0]},
        "predictions": [{**each, "token": HOSTILE[5]} for each in saved.facts["predictions"]],
        "warnings": evil,
    }
    neurons = saved.tables["neurons"].copy()
    neurons["raises"] = [evil] * len(neurons)
    positions = saved.tables["positions"].copy()
    positions["token"] = pd.Series(evil[:6] * (len(positions) // 6), dtype=object)
    tables = {**saved.tables, "neurons": neurons, "positions": positions}
    for card in cards:
        for row in card["ends"]:
            row["token"] = HOSTILE[0]
    text = report_html(replace(saved, tables=tables, facts=facts), cards)
    plain = report_html(saved)
    page = Page(text)
    assert page.scripts == Page(plain).scripts and page.tags.count("img") == 0
    assert "alert(1)" in " ".join(page.text)
    outside = re.sub(r"(?s)<script.*?</script>", "", text)
    for char in "\u202e\u200f\x00\x07\x1b\u2028\u2029\ud800":
        assert char not in outside
    text.encode("utf-8")  # nothing in it that a file cannot hold
    assert max(map(len, page.data["report"]["words"])) <= 60
    assert len(text) < len(plain) + 1_000_000, len(texts)


# --- what cannot be drawn ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: (place / "run.json").unlink(), "no run.json"),
        (lambda place: (place / "run.json").write_text("{"), "cannot read run.json"),
        (lambda place: (place / "run.json").write_text("[]"), "another command or an older"),
        (lambda place: (place / "heads.parquet").unlink(), "no heads.parquet"),
        (lambda place: (place / "neurons.parquet").write_bytes(b"PAR1"), "cannot read neurons"),
        (lambda place: older(place / "neurons.parquet"), "lacks source_token, raises, lowers"),
        (
            lambda place: alien(place / "positions.parquet"),
            "positions.parquet .* is not of the run",
        ),
        (lambda place: (place / "cards.json").write_text('{"cards": 3}'), "holds no cards"),
        (lambda place: (place / "cards.json").write_text('{"cards": [{}]}'), "cannot be drawn"),
    ],
)
def test_a_directory_that_cannot_be_drawn_is_refused_in_one_sentence(
    spoil, message, directory, tmp_path
):
    place = tmp_path / "france"
    shutil.copytree(directory, place)
    spoil(place)
    before = (place / "report.html").read_bytes()
    with pytest.raises(InputError, match=message):
        redraw_report(place)
    assert (place / "report.html").read_bytes() == before


def older(path):
    pd.read_parquet(path).drop(columns=["source_token", "raises", "lowers"]).to_parquet(path)


def alien(path):
    pd.read_parquet(path).assign(token="x").to_parquet(path)


# --- sets -------------------------------------------------------------------------------------


def test_a_set_has_an_index_and_a_page_for_each_prompt_with_plotly_once(model, directory, tmp_path):
    out = tmp_path / "set"
    given = (attribute(model, text, top=5) for text in [PROMPT, "The color of snow is"])
    index = report_set((*given, directory), out, cards=1)
    assert index == out / "index.html"
    pages = sorted((out / "prompts").iterdir())
    assert [each.name for each in pages] == ["00001.html", "00002.html", "00003.html"]
    assert sum(each.stat().st_size for each in pages) < 3 * 400_000
    page = page_of(index)
    assert "plotly.min.js" in page.links and not [a for a in page.links if "//" in a]
    assert "../plotly.min.js" in page_of(pages[0]).links
    text = " ".join(page.text)
    assert "3 prompts, tiny-facts" in text and "The color of snow is" in text
    report_set([directory], out)
    assert [each.name for each in (out / "prompts").iterdir()] == ["00001.html"]


def test_the_index_counts_neurons_and_averages_layers_over_prompts(model, tmp_path):
    results = [attribute(model, text, top=30) for text in [PROMPT, "The capital of Spain is"]]
    page = page_of(report_set(results, tmp_path, cards=1))
    layers = sum(each.layers()["score"] for each in results) / 2
    bars = {trace["name"]: trace["y"] for trace in page.data["f-layers"]["data"]}
    assert bars["attention"] == pytest.approx(layers[::2].tolist())
    both = set.intersection(*({str(n) for n in each.ffn_neurons.neurons()} for each in results))
    text = (tmp_path / "index.html").read_text()
    twice = re.findall(r'<td>(L\d+\.N\d+)</td><td>FFN</td><td class="num">2</td>', text)
    assert both and set(twice) == both


@pytest.mark.slow
def test_results_of_a_set_are_not_kept(model, tmp_path):
    import gc
    import weakref

    alive = []

    def each():
        for text in [PROMPT, "The capital of Spain is", "The capital of Italy is"]:
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1  # the loop's own, not yet replaced
            result = attribute(model, text, top=2)
            alive.append(weakref.ref(result))
            yield result
            del result

    report_set(each(), tmp_path, cards=1)
    assert len(alive) == 3


def test_an_empty_set_and_models_of_other_depth_are_refused(directory, tiny_gpt2, tmp_path):
    with pytest.raises(InputError, match="no results"):
        report_set([], tmp_path / "a")
    other = attribute(tiny_gpt2, [1, 2], top=2)
    with pytest.raises(InputError, match="an index is of one model"):
        report_set([directory, other], tmp_path / "b")
    assert not (tmp_path / "b" / "index.html").exists()


# --- the command ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_draws_a_directory_again_and_makes_indices(directory, tmp_path):
    run = CliRunner().invoke
    done = run(app, ["report", str(directory), "--out", str(tmp_path / "a.html")])
    assert done.exit_code == 0 and "a.html" in done.output
    done = run(app, ["report", str(directory.parent), "--out", str(tmp_path / "index")])
    assert done.exit_code == 0 and (tmp_path / "index" / "index.html").exists(), done.output
    arguments = ["--model", "tiny-facts", "--limit", "2", "--top", "5", "--json"]
    done = run(app, ["report", "capital", *arguments, "--out", str(tmp_path / "set")])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["written"].endswith("index.html")
    assert len([*(tmp_path / "set" / "prompts").iterdir()]) + len(said["left_out"]) == 2


def test_prompts_of_a_file_that_cannot_be_attributed_are_named_and_left_out(tmp_path):
    """One without an answer is asked about the model's own."""
    rows = [
        "The capital of France is",
        {"text": "The", "target": " no one token", "prompt_id": "b"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", "tiny-facts", "--top", "2", "--out", str(tmp_path / "set")]
    done = CliRunner().invoke(app, ["report", str(tmp_path / "p.jsonl"), *arguments])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "Left out: b: target ' no one token' is 7 tokens" in said and "index.html" in said
    assert len([*(tmp_path / "set" / "prompts").iterdir()]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nothing-here"], "is no directory that attribute --out wrote"),
        (["report", "capital", "--model", "tiny-facts"], "give --out DIR"),
        (["report", "nothing", "--model", "tiny-facts", "--out", "o"], "nothing"),
        (["report", "capital", "--model", "x", "--top", "0", "--out", "o"], "--top must be at lea"),
        (["report", "capital", "--model", "x", "--limit", "0", "--out", "o"], "--limit must be"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and message in done.stderr


def test_log_probs_of_another_run_are_refused(tmp_path):
    result = attribute(bundled_model(), "The capital of France is", top=3)
    result.save(tmp_path)
    place = tmp_path / "log_probs.parquet"
    pd.read_parquet(place).assign(token="zzz").to_parquet(place, index=False)
    with pytest.raises(InputError, match="log_probs.parquet in .* is not of the run"):
        redraw_report(tmp_path)


def test_a_card_that_cannot_be_made_leaves_the_others(tmp_path, monkeypatch):
    import tl_neuron_attr.report.cards as cards_module

    result = attribute(bundled_model(), "The capital of France is", top=3)
    saved = result.saved()
    whole = cards_module.best_cards(result, saved, 2)
    real = cards_module.neuron_card

    def failing(result, neuron, **given):
        if str(neuron) == whole[0]["neuron"]:
            raise InputError("no")
        return real(result, neuron, **given)

    monkeypatch.setattr(cards_module, "neuron_card", failing)
    assert cards_module.best_cards(result, saved, 2) == whole[1:]
