"""The strip of tokens: what it says, as text, as HTML, and under a reader's mouse and keyboard."""

import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import bundled_model
from hypothesis import given
from hypothesis import strategies as st

from tl_neuron_attr import attribute, token_strip
from tl_neuron_attr.display import Grid, box, grid, tinted
from tl_neuron_attr.errors import InputError

HOSTILE = ["</form>", "<script>alert(1)</script>", "\u202eevil", "\n", "", " ", '"', "&lt;", "\x00"]
VOID = {"input", "rect", "line", "br"}


class Reader(HTMLParser):
    """Whether tags close in order, what the text is, and which elements there are."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def result():
    return attribute(bundled_model(), "The capital of France is")


def shown_facts(count):
    return {
        place: (Grid(header=("head", "score"), rows=((f"fact{place}", 0.5),), bars=frozenset({1})),)
        for place in range(count)
    }


# --- what it says -----------------------------------------------------------------------------


def test_values_are_the_heads_rises_summed_by_source(result):
    positions = result.positions()
    strip = result.token_strip()
    sums = positions.groupby("source_pos")["score"].sum().tolist()
    assert strip.values == pytest.approx(sums)
    means = positions.groupby("source_pos")["attention"].mean().tolist()
    assert result.token_strip(attention=True).values == pytest.approx(means)
    one = result.positions(3, 1)
    assert result.token_strip(3, 1).values == pytest.approx(one["score"].tolist())
    assert "L3.H1" in result.token_strip(3, 1).quantity
    assert strip.tokens == result.captured.prompt.token_texts
    assert strip.chosen == max(range(len(sums)), key=lambda place: abs(sums[place]))


def test_facts_are_the_best_heads_and_neurons_of_the_source(result):
    strip = result.token_strip(top=3)
    for place, (heads, *neurons) in strip.facts.items():
        positions = result.positions()
        here = positions[positions["source_pos"] == place].nlargest(3, "score")
        expected = [f"L{row.layer}.H{row.head}" for row in here.itertuples()]
        assert [row[0] for row in heads.rows] == expected
        ranked = [str(each) for each in result.attn_neurons.neurons()]
        expected = [label for label in ranked if label.endswith(f"@{place}")][:3]
        assert [row[0] for each in neurons for row in each.rows] == expected
    only = result.token_strip(3, 1)
    labels = [row[0] for _, *some in only.facts.values() for each in some for row in each.rows]
    assert labels and all(label.startswith("L3.H1.") for label in labels)


def test_a_strip_that_makes_no_sense_is_refused(result):
    for wrong in (
        {"tokens": []},
        {"tokens": ["a"], "read_pos": 1},
        {"tokens": ["a"], "values": [1.0, 2.0]},
        {"tokens": ["a"], "values": [float("nan")]},
        {"tokens": ["a"], "facts": {1: ()}},
        {"tokens": ["a"], "chosen": -1},
    ):
        with pytest.raises(InputError):
            token_strip(**wrong)
    with pytest.raises(InputError, match="top must be at least 1"):
        result.token_strip(top=0)
    with pytest.raises(InputError, match="out of range"):
        result.token_strip(99)


def test_as_text_every_token_stands_there_and_lines_fit(result):
    shown = str(result.token_strip())
    for place, token in enumerate(["<|endoftext|>", "The", "·capital", "·of", "·France", "·is"]):
        assert f"{place}:{token} (" in shown
    assert ">5:·is" in shown and "read at 5" in shown
    long = str(token_strip([" word"] * 200, values=[0.25] * 200))
    assert max(map(len, long.splitlines())) <= 100 and long.count("(+0.250)") == 200


@given(st.lists(st.text(max_size=6), min_size=1, max_size=5), st.data())
def test_whatever_the_tokens_are_nothing_of_them_is_markup(tokens, data):
    values = data.draw(st.lists(st.none() | st.floats(-9, 9), max_size=len(tokens)))
    strip = token_strip(tokens, 0, values, facts=shown_facts(len(tokens)))
    reader = read(strip._repr_html_())
    assert [tag for tag, _ in reader.tags if tag == "bdi"] == ["bdi"] * 2 * len(tokens)
    assert not {tag for tag, _ in reader.tags} & {"script", "img", "a", "link"}
    str(strip)


def test_hostile_tokens_are_shown_not_obeyed():
    html = token_strip(HOSTILE, facts=shown_facts(len(HOSTILE)))._repr_html_()
    reader = read(html)
    text = "".join(reader.text)
    assert "<script>alert(1)</script>" in text and "</form>" in text
    assert "\\u202eevil" in text and "⏎" in text and "\\x00" in text
    assert "\u202e" not in html and "\x00" not in html
    assert html.count("<form") == 1


def test_equal_strips_are_equal_bytes_and_have_no_ids(result):
    first, second = result.token_strip(), result.token_strip()
    assert first == second and first._repr_html_() == second._repr_html_()
    attributes = [names for _, names in read(first._repr_html_()).tags]
    assert not any("id" in names or "for" in names for names in attributes)
    assert "<script" not in first._repr_html_() and "http" not in first._repr_html_()


def test_tokens_follow_each_other_as_their_letters_are_read():
    assert 'dir="rtl"' in token_strip(["עיר", " הבירה"])._repr_html_()
    assert 'dir="rtl"' not in token_strip(["The", " capital", "א"])._repr_html_()


def test_of_a_long_prompt_the_ends_and_the_largest_values_are_drawn():
    values = [0.0] * 5000
    values[2500] = -1.0
    strip = token_strip([" t"] * 5000, values=values)
    html = strip._repr_html_()
    assert len(html) < 150_000 and "2500 −1.00" in html
    assert html.count("<bdi>") <= 400 and re.search(r"… [\d,]+ tokens …", html)
    assert (
        sum(int(n.replace(",", "")) for n in re.findall(r"… ([\d,]+) tokens", html))
        + html.count("<bdi>")
        == 5000
    )


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
def test_the_scale_is_centred_on_0(value, largest):
    alpha = [float(tinted(each, largest).split(",")[3][:-1]) for each in (value, -value)]
    assert alpha[0] == alpha[1] == pytest.approx(0.6 * min(1, value / largest), abs=0.006)
    assert tinted(0.0, largest).endswith("0.00)")


def luminance(colour):
    parts = [each / 255 for each in colour]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("paper", "ink"),
    [((255, 255, 255), (33, 33, 33)), ((17, 17, 17), (224, 224, 224)), ((56, 56, 56), (255,) * 3)],
)
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_tokens_can_be_read_on_light_and_on_dark(paper, ink, value):
    *colour, alpha = map(float, tinted(value, 1.0)[5:-1].split(","))
    mixed = [alpha * c + (1 - alpha) * p for c, p in zip(colour, paper, strict=True)]
    light, dark = sorted([luminance(mixed), luminance(ink)], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA


# --- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


NOTEBOOK = """<!doctype html><meta charset="utf-8"><style>
body {{ background: {paper}; color: {ink}; }}
.jp-RenderedHTMLCommon tbody tr:nth-child(odd) {{ background: red; }}
.jp-RenderedHTMLCommon td {{ text-align: right; padding: 40px; max-width: 5px; }}
</style><div class="jp-RenderedHTMLCommon">
<table><tbody><tr><td class="outside">x</td></tr></tbody></table>{cells}</div>"""


def opened(browser, cells, paper="#fff", ink="#222"):
    page = browser.new_page(viewport={"width": 700, "height": 900})
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.append(request.url))
    page.set_content(NOTEBOOK.format(cells="<hr>".join(cells), paper=paper, ink=ink))
    return page


def facts_in_sight(page):
    return [
        each.inner_text().split(":")[0]
        for each in page.query_selector_all(".at")
        if each.is_visible()
    ]


def test_a_click_or_an_arrow_key_chooses_a_token_and_strips_do_not_meet(browser, result):
    same = result.token_strip()._repr_html_()
    page = opened(browser, [same, same])
    start = str(result.token_strip().chosen)
    assert facts_in_sight(page) == [start, start]
    first, second = page.query_selector_all("form")
    first.query_selector_all("label")[2].click()
    assert facts_in_sight(page) == ["2", start]
    assert "L0.H2" in page.query_selector_all(".at")[2].inner_text()
    page.keyboard.press("ArrowRight")
    assert facts_in_sight(page) == ["3", start]
    page.keyboard.press("Enter")  # sends nothing, and leaves the reader on the page
    page.wait_for_timeout(300)
    assert page.url == "about:blank"
    assert facts_in_sight(page) == ["3", start]
    page.keyboard.press("Tab")  # to the other strip
    page.keyboard.press("ArrowLeft")
    assert facts_in_sight(page) == ["3", str(int(start) - 1)]
    assert page.problems == []
    page.close()


def test_its_style_touches_nothing_else_and_the_notebooks_does_not_touch_it(browser, result):
    page = opened(browser, [result.token_strip()._repr_html_(), result._repr_html_()])
    style = "each => { const s = getComputedStyle(each); return [s.textAlign, s.padding]; }"
    assert page.eval_on_selector(".outside", style) == ["right", "40px"]
    ours = page.eval_on_selector(".tlna td", style)
    assert ours[0] == "left" and "40px" not in ours[1]
    row = "each => getComputedStyle(each).backgroundColor"
    assert page.eval_on_selector(".tlna tbody tr", row) == "rgba(0, 0, 0, 0)"
    boxes = "boxes => boxes.every(each => each.scrollWidth <= each.clientWidth + 1)"
    assert page.eval_on_selector_all(".tlna", boxes)  # nothing sticks out at 700 pixels
    page.close()


def test_on_a_dark_page_the_ink_is_the_pages(browser, result, tmp_path):
    page = opened(browser, [result._repr_html_()], paper="#111", ink="#e0e0e0")
    ink = "each => getComputedStyle(each).color"
    for part in (".tlna .title", ".tlna .tok bdi", ".tlna td", ".tlna code", ".tlna dd"):
        assert page.eval_on_selector(part, ink) == "rgb(224, 224, 224)", part
    page.screenshot(path=str(tmp_path / "dark.png"))
    assert page.problems == []
    page.close()


def test_a_grid_of_hostile_cells_stays_one_table(browser):
    rows = tuple((text, (text, " x"), -1.5, None) for text in HOSTILE)
    html = box("<b>", grid(Grid(caption="<i>", header=("<u>", "b", "c", "d"), rows=rows)))
    read(html)
    page = opened(browser, [html])
    assert len(page.query_selector_all(".tlna table")) == 1
    assert len(page.query_selector_all(".tlna tbody tr")) == len(HOSTILE)
    assert page.problems == []
    page.close()
