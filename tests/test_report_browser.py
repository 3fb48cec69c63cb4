"""Reports as readers open them: in Chromium, from disk, without a network.

Screenshots are kept in the directory that the environment variable ``SCREENSHOTS`` names, else in
pytest's temporary directory.
"""

import functools
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import bundled_model

from tl_neuron_attr import attribute
from tl_neuron_attr.report import prompt_set, read_saved, report_html, report_set

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,  # test_pages opens pages in a browser by default
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH; give its path as CHROMIUM"),
]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    attribute(bundled_model(), PROMPT, top=60).save(place, report=True)
    return place


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens a file, and in the end holds that it neither erred nor asked for anything else."""
    contexts, problems, requests = [], [], []

    def opened(path, **options):
        context = chromium.new_context(offline=True, **options)
        contexts.append(context)
        context.route(
            "**/*",
            lambda route: (
                route.continue_() if route.request.url.startswith("file://") else route.abort()
            ),
        )
        page = context.new_page()
        page.on("console", lambda said: problems.append((said.type, said.text)))
        page.on("pageerror", lambda error: problems.append(("error", str(error))))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == []


@pytest.fixture
def keep(tmp_path):
    """Keeps a screenshot."""
    place = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    place.mkdir(parents=True, exist_ok=True)
    return lambda page, name, **options: page.screenshot(path=place / f"{name}.png", **options)


def names(page, table):
    return page.locator(f"table[data-drawn={table}] .neuron").all_inner_texts()


def column(page, table, number):
    return page.locator(f"table[data-drawn={table}] tbody td:nth-child({number})").all_inner_texts()


def drawn(page, place):
    """Scrolls a figure into view and waits until it is there."""
    page.locator(f"#{place}").scroll_into_view_if_needed()
    page.wait_for_selector(f"#{place} .main-svg", state="attached")


def until(page, holds):
    """Waits; ``wait_for_function`` would evaluate text, which a page's policy forbids."""
    for _ in range(100):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not come about in five seconds")


def test_tables_sort_by_click_and_by_keyboard_and_are_searched(directory, open_page):
    page = open_page(directory / "report.html")
    heads = page.locator("table[data-drawn=ffn] thead th")
    first = names(page, "ffn")
    heads.nth(3).locator("button").click()  # score: the largest first, as they are
    assert heads.nth(3).get_attribute("aria-sort") == "descending"
    assert names(page, "ffn") == first
    page.keyboard.press("Enter")
    assert heads.nth(3).get_attribute("aria-sort") == "ascending"
    scores = [float(each.replace("−", "-")) for each in column(page, "ffn", 4)]
    assert scores == sorted(scores) and names(page, "ffn") != first
    page.keyboard.press("Enter")
    assert heads.nth(3).get_attribute("aria-sort") is None and names(page, "ffn") == first
    heads.nth(1).locator("button").click()  # by name, numbers in it as numbers
    found = [tuple(map(int, name[1:].split(".N"))) for name in names(page, "ffn")]
    assert found == sorted(found)
    box = page.locator("#ffn")
    assert "25 shown of 60 rows" in box.locator(".count").inner_text()
    box.locator("input").fill("paris")
    shown = box.locator("tbody tr")
    assert 0 < shown.count() < 25
    assert f"{shown.count()} of 60 rows" in box.locator(".count").inner_text()
    box.locator("input").fill("no such token anywhere")
    assert shown.count() == 0
    box.locator("input").fill("")
    box.locator(".more").click()
    assert shown.count() == 60 and not box.locator(".more").is_visible()


def test_a_token_chooses_the_source_position_and_a_second_click_clears_it(directory, open_page):
    page = open_page(directory / "report.html")
    drawn(page, "f-heads")
    z = "JSON.stringify(document.getElementById('f-heads').data[0].z)"
    before, everywhere = page.evaluate(z), names(page, "attn")
    token = page.locator("#strip button").nth(4)
    token.click()
    assert token.get_attribute("aria-pressed") == "true"
    assert "4: ·France" in page.locator("#chosen").inner_text()
    assert {*column(page, "positions", 2)} == {"4: ·France"}
    assert all(name.endswith("@4") for name in names(page, "attn"))
    assert "from 4: ·France" in page.locator("#f-heads-says").inner_text()
    assert page.evaluate(z) != before
    token.press("Enter")
    assert token.get_attribute("aria-pressed") == "false"
    assert names(page, "attn") == everywhere and page.evaluate(z) == before


def test_a_card_opens_by_click_and_by_keyboard_and_the_arrows_turn_it(directory, open_page, keep):
    page = open_page(directory / "report.html")
    first, second = names(page, "attn")[:2]
    page.locator("table[data-drawn=attn] tbody tr").first.click()
    card, name = page.locator("dialog"), page.locator("#card-name")
    assert card.is_visible() and first in name.inner_text()
    assert "What set it off" in card.inner_text() and "What it sets off" in card.inner_text()
    keep(page, "card")
    page.keyboard.press("ArrowRight")
    assert second in name.inner_text()
    page.keyboard.press("Escape")
    assert not card.is_visible()
    assert page.evaluate("document.activeElement.textContent") == second
    page.keyboard.press("Enter")
    assert card.is_visible() and second in name.inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    last = page.locator("table[data-drawn=ffn] .neuron").nth(20)
    last.press("Enter")  # one without a whole card says how to get it
    assert f"tl-neuron-attr card {last.inner_text()} " in card.inner_text()
    assert PROMPT in card.inner_text()


def test_figures_are_drawn_when_seen_and_follow_light_and_dark(directory, open_page, keep):
    page = open_page(directory / "report.html", color_scheme="light")
    page.wait_for_selector("#f-layers .main-svg", state="attached")
    assert page.locator("#f-shares .main-svg").count() == 0
    drawn(page, "f-positions")
    page.locator("#head").select_option(index=1)
    said = page.locator("#f-positions-says").inner_text()
    assert page.locator("#head option").nth(1).inner_text() in said
    for place in ("f-log-probs", "f-neurons", "f-shares"):
        drawn(page, place)
    buttons = page.locator(".modebar-btn").evaluate_all("all => all.map(b => b.dataset.title)")
    assert buttons and not [each for each in buttons if "cloud" in each.lower()]
    ink = "getComputedStyle(document.querySelector('#f-layers .xtick text')).fill"
    light = page.evaluate(ink)
    page.evaluate("scrollTo(0, 0)")
    keep(page, "report-light")
    page.emulate_media(color_scheme="dark")
    until(page, lambda: page.evaluate(ink) != light)
    keep(page, "report-dark")


def test_on_a_narrow_screen_only_tables_scroll_sideways(directory, open_page, keep):
    page = open_page(directory / "report.html", viewport={"width": 400, "height": 800})
    for place in ("f-layers", "f-log-probs", "f-positions"):
        drawn(page, place)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.querySelector('#attn .wide').scrollWidth > innerWidth")
    page.evaluate("scrollTo(0, 0)")
    keep(page, "report-narrow", full_page=True)


def test_the_index_of_a_set_opens_a_prompts_page_when_asked(open_page, keep, tmp_path, monkeypatch):
    attribute(bundled_model(), PROMPT, top=5).save(tmp_path / "small")
    # eleven times the same prompt, drawn once
    monkeypatch.setattr(prompt_set, "_page", functools.cache(prompt_set._page))
    page = open_page(report_set([tmp_path / "small"] * 11, tmp_path / "set"))
    assert page.locator("iframe").count() == 0
    rows = page.locator("#prompts-table tbody tr")
    assert rows.count() == 11
    page.locator("#prompts input").fill("germany")
    assert rows.count() == 0
    page.locator("#prompts input").fill("france")
    rows.nth(2).locator("button").press("Enter")
    inside = page.frame_locator("iframe")
    inside.locator("#f-layers .main-svg").first.wait_for(state="attached")
    assert "·Paris" in inside.locator("h1").inner_text()
    inside.locator("table[data-drawn=ffn] .neuron").first.click()
    assert inside.locator("dialog").is_visible()
    keep(page, "index", full_page=True)
    page.locator("#opened button").click()
    assert page.locator("iframe").count() == 0


def test_hostile_tokens_run_nothing(directory, open_page, tmp_path):
    saved, cards = read_saved(directory)
    evil = ["</script><script>window.run=1</script>", "<img src=x onerror='run=1'>", "<!--"]
    evil += ["\u202eabc", "\x00\x1b", "\u2028"]
    facts = {**saved.facts, "token_texts": evil, "warnings": evil}
    neurons = saved.tables["neurons"].copy()
    neurons["raises"] = [evil] * len(neurons)
    tables = {**saved.tables, "neurons": neurons}
    place = tmp_path / "evil.html"
    place.write_text(report_html(replace(saved, tables=tables, facts=facts)))
    page = open_page(place)
    for figure in ("f-positions", "f-neurons"):
        drawn(page, figure)
    page.locator("#strip button").first.click()
    page.locator("table[data-drawn=ffn] .neuron").first.click()
    assert page.evaluate("window.run") is None
    assert evil[0].replace(" ", "·") in page.locator("dialog").inner_text()


def large(saved, neurons, tokens):
    """The same report with so many neurons of each kind and so long a prompt."""
    texts = [f" token{place}" for place in range(tokens)]
    heads = saved.tables["heads"]
    positions = pd.DataFrame(
        [
            (layer, head, place, texts[place], 1 / tokens, score * ((place % 7) - 3) / 7)
            for layer, head, score in heads.itertuples(index=False)
            for place in range(tokens)
        ],
        columns=["layer", "head", "source_pos", "token", "attention", "score"],
    )
    rows = []
    for _, some in saved.tables["neurons"].groupby(["role", "kind"], sort=False):
        many = pd.concat([some] * -(-neurons // len(some)), ignore_index=True).head(neurons)
        rows.append(many.assign(rank=range(1, neurons + 1), index=range(neurons)))
    log_probs = pd.concat(
        [
            some.assign(position=place, token=texts[place])
            for place in range(tokens)
            for some in [saved.tables["log_probs"].query("position == 0")]
        ],
        ignore_index=True,
    )
    tables = {
        **saved.tables,
        "positions": positions,
        "neurons": pd.concat(rows, ignore_index=True),
        "log_probs": log_probs,
    }
    facts = {
        **saved.facts,
        "token_texts": texts,
        "tokens": [*range(tokens)],
        "read_pos": tokens - 1,
    }
    return replace(saved, tables=tables, facts=facts)


@pytest.mark.slow
def test_two_thousand_neurons_and_three_hundred_tokens_are_ready_soon(
    directory, open_page, keep, tmp_path
):
    saved, cards = read_saved(directory)
    place = tmp_path / "large.html"
    place.write_text(report_html(large(saved, 2000, 300), cards))
    started = time.perf_counter()
    page = open_page(place)
    tables = page.evaluate("Number(document.documentElement.dataset.ready)") / 1000
    page.wait_for_selector("#f-layers .main-svg", state="attached")
    whole = time.perf_counter() - started
    print(
        f"\n{place.stat().st_size / 1e6:.2f} MB: tables and cards ready after {tables:.2f} s, "
        f"the first figure drawn after {whole:.2f} s"
    )
    assert page.locator("#strip button").count() == 300
    page.locator("#strip button").nth(250).click()
    assert all(text.startswith("250:") for text in column(page, "positions", 2))
    page.locator("#ffn input").fill("n1999")
    assert names(page, "ffn") == [next(n for n in names(page, "ffn") if n.endswith("N1999"))]
    keep(page, "large")
