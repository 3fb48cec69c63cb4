"""Prompt files of four kinds: what is written is read, and what is wrong is one sentence."""

import csv
import io
import json
import sys
import warnings
from collections import Counter

import pytest
from conftest import SHARED
from hypothesis import example, given
from hypothesis import strategies as st

from tl_neuron_attr import InputError, knowledge_prompts, load_prompts, paper_prompts, save_prompts
from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES, load_trivia_qa, prompt_table
from tl_neuron_attr.knowledge.entries import UNTYPED

FULL = dict(
    text="Les Miserables was written in",
    answer="French",
    aliases=["Francais"],
    knowledge_type="language",
    relation="work_language",
    subject="Les Miserables",
    prompt_id="mine/1",
)
LRE = dict(
    name="country language",
    prompt_templates=["People in {} speak", "In {}, people speak"],
    prompt_templates_zs=["In {}, people speak", "{}, where people speak"],
    properties=dict(range_name="language"),
    samples=[dict(subject="Peru", object="Spanish"), dict(subject="Iran", object="Persian ")],
)
KNOWN = [
    dict(prompt="Beats Music is owned by", attribute="Apple", relation_id="P127", subject="Beats"),
    dict(prompt="Vinson Massif is in", attribute="Antarctica"),
]


@pytest.fixture
def write(tmp_path):
    def to(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return to


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- what comes with the package --------------------------------------------------------------


def test_a_type_all_and_paper_are_the_packages_own_prompts():
    assert load_prompts("color") == knowledge_prompts("color")
    assert load_prompts("paper") == paper_prompts()


def test_all_is_every_type(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "tl_neuron_attr.knowledge.sets.knowledge_prompts", lambda *a: asked.append(a) or ()
    )
    assert load_prompts("all") == () and asked == [()]


def test_the_table_counts_relations_facts_answers_and_prompts():
    table = prompt_table(paper_prompts()).set_index("knowledge_type")
    assert list(table.index) == [*KNOWLEDGE_TYPES, "all"]
    for column in ("relations", "facts", "prompts"):
        assert table.loc["all", column] == table[column].iloc[:-1].sum()
    assert (table["prompts"] == 2 * table["facts"]).all()


# --- JSON Lines -------------------------------------------------------------------------------


def test_a_line_gives_a_prompt_with_all_its_fields(write):
    (prompt,) = load_prompts(write("a.jsonl", lines(FULL)))
    assert (prompt.text, prompt.answer, prompt.prompt_id) == (
        "Les Miserables was written in",
        " French",
        "mine/1",
    )
    fact = prompt.fact
    assert (fact.knowledge_type, fact.relation, fact.subject) == (
        "language",
        "work_language",
        "Les Miserables",
    )
    assert fact.accepted == (" French", " Francais") and not fact.trained
    assert prompt.phrasing == "{subject} was written in" and not prompt.held_out


def test_what_is_left_out_has_a_default(write):
    path = write("a.jsonl", "\n" + lines(dict(prompt="Grass is", answer=" green", aliases=None)))
    (prompt,) = load_prompts(path)
    assert (prompt.answer, prompt.prompt_id, prompt.phrasing) == (" green", "a/2", "Grass is")
    assert (prompt.fact.knowledge_type, prompt.fact.relation) == (UNTYPED, UNTYPED)
    assert (prompt.fact.subject, prompt.fact.aliases) == ("", ())


def test_a_subject_that_begins_the_sentence_may_have_a_capital_there(write):
    row = dict(text="The Eiffel Tower is in", answer="France", subject="the Eiffel Tower")
    (prompt,) = load_prompts(write("a.jsonl", lines(row)))
    assert prompt.phrasing == "{subject} is in"


def test_a_byte_order_mark_windows_lines_and_unicode_separators_are_read(write):
    row = dict(text="One\u2028two\x85three is", answer="é")
    content = ("\ufeff" + lines(row, FULL)).replace("\n", "\r\n")
    first, second = load_prompts(write("a.jsonl", content))
    assert (first.text, first.answer) == (row["text"], " é") and second.prompt_id == "mine/1"


def test_saved_prompts_are_loaded_as_they_were(tmp_path):
    prompts = paper_prompts()[::20]
    save_prompts(prompts, tmp_path / "some.jsonl")
    for before, after in zip(prompts, load_prompts(tmp_path / "some.jsonl"), strict=True):
        assert (before.prompt_id, before.text, before.answer, before.phrasing) == (
            after.prompt_id,
            after.text,
            after.answer,
            after.phrasing,
        )
        for name in ("knowledge_type", "relation", "subject", "accepted"):
            assert getattr(before.fact, name) == getattr(after.fact, name)


def test_prompts_are_saved_as_jsonl_only(tmp_path):
    with pytest.raises(InputError, match="written to a .jsonl file, not to .*some.csv"):
        save_prompts(paper_prompts()[:1], tmp_path / "some.csv")


# --- CSV --------------------------------------------------------------------------------------


def test_a_csv_holds_the_same_as_the_lines(write):
    other = dict(text='In "Peru", people speak', answer="Spanish", aliases=["a", "b"])
    rows = [FULL, other]
    content = io.StringIO()
    writer = csv.DictWriter(content, FULL)
    writer.writeheader()
    writer.writerows({**row, "aliases": "|".join(row["aliases"])} for row in rows)
    content = content.getvalue().replace('\n"In', '\n\r\n , \r\n"In')  # two empty rows
    table = load_prompts(write("a.csv", "\ufeff" + content))
    listed = load_prompts(write("a.jsonl", lines(*rows)))
    assert table[0] == listed[0]
    assert (table[1].text, table[1].fact) == (listed[1].text, listed[1].fact)
    assert table[1].prompt_id == listed[1].prompt_id == "a/2"


# --- LRE and known_1000 -----------------------------------------------------------------------


def test_an_lre_relation_is_every_sample_in_every_template_once(write):
    prompts = load_prompts(write("country_language.json", LRE))
    assert [prompt.text for prompt in prompts] == [
        "People in Peru speak",
        "In Peru, people speak",
        "Peru, where people speak",
        "People in Iran speak",
        "In Iran, people speak",
        "Iran, where people speak",
    ]
    assert {(p.fact.knowledge_type, p.fact.relation) for p in prompts} == {
        ("language", "country_language")
    }
    assert prompts[4].prompt_id == "country_language/1/1" and prompts[4].answer == " Persian"
    assert prompts[4].phrasing == "In {subject}, people speak"


def test_a_folder_holds_the_relations_of_all_its_files(write, tmp_path):
    write("data/a/one.json", LRE)
    write("data/b/two.json", {**LRE, "samples": [dict(subject="Cuba", object="Spanish")]})
    prompts = load_prompts(tmp_path / "data")
    assert [p.fact.relation for p in prompts] == ["one"] * 6 + ["two"] * 3


def test_the_same_words_in_another_relation_are_another_question(write, tmp_path):
    old_or_young = {**LRE, "samples": [dict(subject="Peru", object="old")]}
    write("one.json", LRE)
    write("two.json", {**old_or_young, "properties": dict(range_name="age")})
    prompts = load_prompts(tmp_path)
    assert [
        (p.fact.relation, p.fact.accepted) for p in prompts if p.text == "People in Peru speak"
    ] == [
        ("one", (" Spanish",)),
        ("two", (" old",)),
    ]


def test_the_same_words_and_answer_in_another_relation_are_a_repeat(write, tmp_path):
    write("one.json", LRE)
    write("two.json", LRE)
    with pytest.warns(UserWarning, match="6 prompts occur again"):
        assert len(load_prompts(tmp_path)) == 6


def test_further_answers_of_a_published_text_are_aliases(write):
    more = [*LRE["samples"], *(dict(subject="Peru", object=o) for o in ("Quechua", "Spanish"))]
    path = write("a.json", {**LRE, "samples": more, "prompt_templates_zs": []})
    with pytest.warns(UserWarning) as caught:
        prompts = load_prompts(path)
    assert prompts[0].fact.accepted == (" Spanish", " Quechua") and len(prompts) == 4
    repeated, joined = (str(warning.message) for warning in caught)
    assert "2 prompts occur again and are taken once: 'People in Peru speak' (sample 3" in repeated
    assert "2 further answers to a text are taken as its aliases: ' Quechua' of 'Peo" in joined


def test_known_1000_has_a_type_for_each_relation(write):
    first, second = load_prompts(write("known.json", KNOWN))
    assert (first.prompt_id, first.answer, first.phrasing) == (
        "known/0",
        " Apple",
        "{subject} Music is owned by",
    )
    assert (first.fact.knowledge_type, second.fact.knowledge_type) == ("P127", UNTYPED)


@pytest.mark.skipif(not (SHARED / "data").exists(), reason=f"{SHARED / 'data'} is absent")
@pytest.mark.parametrize("folder", ["bias", "commonsense", "linguistic"])
def test_every_question_of_the_published_relations_is_in_one_prompt(folder):
    folder = SHARED / "data" / "relations_lre" / "data" / folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompts = load_prompts(folder)
    accepting = Counter((p.text, answer) for p in prompts for answer in p.fact.accepted)
    assert set(accepting.values()) == {1}
    wanted = set()
    for file in folder.glob("*.json"):
        given = json.loads(file.read_text(encoding="utf-8"))
        for template in (*given["prompt_templates"], *given["prompt_templates_zs"]):
            for sample in given["samples"]:
                text = template.replace("{}", sample["subject"].strip())
                wanted.add((text, f" {sample['object'].strip()}"))
    assert set(accepting) == wanted


@pytest.mark.skipif(not (SHARED / "data").exists(), reason=f"{SHARED / 'data'} is absent")
def test_known_1000_is_read_whole_but_for_one_prompt_that_occurs_twice():
    path = SHARED / "data" / "known_1000" / "known_1000.json"
    with pytest.warns(UserWarning, match="1 prompts occur again .* 'Windows Phone 8.1 is dev"):
        prompts = load_prompts(path)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert {(p.text, p.answer) for p in prompts} == {
        (row["prompt"], f" {row['attribute']}") for row in rows
    }
    assert len(prompts) == len(rows) - 1


# --- repeats ----------------------------------------------------------------------------------


def test_a_prompt_that_occurs_twice_is_taken_once_and_named(write):
    rows = [FULL, {**FULL, "prompt_id": "mine/2", "answer": " Francais", "aliases": []}]
    with pytest.warns(UserWarning, match="1 prompts occur again and are taken once: 'Les Mis"):
        (prompt,) = load_prompts(write("a.jsonl", lines(*rows)))
    assert prompt.prompt_id == "mine/1"


def test_a_text_with_two_answers_is_an_error_that_names_both_lines(write):
    rows = [FULL, {**FULL, "prompt_id": "mine/2", "answer": "Latin"}]
    with pytest.raises(InputError) as error:
        load_prompts(write("a.jsonl", lines(*rows)))
    for words in ("line 2 of", "is that of line 1 of", "' Latin' instead of ' French'", "alias"):
        assert words in str(error.value)


# --- bad input --------------------------------------------------------------------------------

GOOD = lines(FULL)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", GOOD + "{", "line 2 of .* is no JSON: Expecting property name"),
        ("a.jsonl", GOOD + "\n[1]", r"line 3 of .* must be an object with text and answer, got"),
        ("a.jsonl", '"The capital of France is"', "line 1 of .* must be an object"),
        ("a.jsonl", "[" * 100_000, "nested too deeply|is no JSON"),
        ("a.jsonl", lines(dict(text="Grass is")), "line 1 of .* lacks 'answer'"),
        ("a.jsonl", lines(dict(answer="green")), "line 1 of .* lacks 'text'"),
        ("a.jsonl", lines(dict(text="a", prompt="b", answer="c")), "both text and prompt"),
        ("a.jsonl", lines(dict(text="a", answer=7)), "answer must be text, in quotes; got 7"),
        ("a.jsonl", lines(dict(text="a", answer="b", aliases="c")), "aliases must be a list"),
        ("a.jsonl", lines(dict(text="a", answer="b", aliases=[1])), "aliases must be a list"),
        ("a.jsonl", lines({**FULL, "alias": "x"}), "unknown field 'alias'; known are text, ans"),
        ("a.jsonl", lines(dict(text="Grass is ", answer="green")), "ends in a space; answers are"),
        ("a.jsonl", lines(dict(text=" ", answer="green")), "line 1 of .*: the text is empty"),
        ("a.jsonl", lines(dict(text="a", answer="  b")), "the answer '  b' must be some text"),
        ("a.jsonl", lines(dict(text="a", answer="b ")), "the answer 'b ' must be some text"),
        ("a.jsonl", lines(dict(text="a", answer="")), "the answer '' must be some text"),
        ("a.jsonl", lines(dict(text="a", answer="b", aliases=[""])), "the answer '' must be"),
        ("a.jsonl", '{"text": "\\ud800", "answer": "b"}', "half a character"),
        (
            "a.jsonl",
            lines(FULL, {**FULL, "text": "Other words"}),
            "line 2 of .* prompt_id 'mine/1' is that of line 1",
        ),
        ("a.jsonl", GOOD.encode() + b"\xff", "it is not UTF-8 .byte .* is 0xff"),
        ("a.jsonl", "{}".encode("utf-16"), "it is not UTF-8 .byte 0 is 0xff"),
        ("a.jsonl", "", "there are no prompts in"),
        ("a.jsonl", "\ufeff\n\n", "there are no prompts in"),
        ("a.csv", "", "there are no prompts in"),
        ("a.csv", "text,answer\n", "there are no prompts in"),
        ("a.csv", "text,answer\nGrass is\n", "line 2 of .* has 1 cells and the header 2"),
        ("a.csv", "text,answer\na, b, c\n", "3 cells and the header 2; put quotes around"),
        ("a.csv", "text,answer\nGrass is,\n", "line 2 of .* lacks 'answer'"),
        ("a.csv", "text,color\nGrass is,green\n", "unknown field 'color'"),
        ("a.csv", "text,text\na,b\n", "line 1 of .*: a column's name occurs twice"),
        ("a.csv", 'text,answer\n"Grass is', "line 2 of .* is no CSV"),
        ("a.csv", f"text,answer\n{'x' * 200_000},b\n", "is no CSV: field larger"),
        ("a.json", "", "there are no prompts in"),
        ("a.json", "[]", "there are no prompts in"),
        ("a.json", "{", "is no JSON"),
        ("a.json", {"samples": []}, "is neither an LRE relation .* nor known_1000"),
        ("a.json", "7", "is neither an LRE relation"),
        ("a.json", [7], "entry 0 of .* must be an object with the texts prompt and attribute"),
        ("a.json", [{"prompt": "a"}], "entry 0 of .* prompt and attribute"),
        ("a.json", [{"prompt": "a ", "attribute": "b"}], "ends in a space"),
        ("a.json", {**LRE, "samples": [{}]}, "sample 0 of .* the texts subject and object"),
        ("a.json", {**LRE, "samples": 7}, "samples must be a list"),
        ("a.json", {**LRE, "prompt_templates": "a {}"}, "must be a list of texts"),
        ("a.json", {**LRE, "prompt_templates": ["no place"]}, r"one \{\} for the subject, got 'no"),
        ("a.json", {**LRE, "prompt_templates": ["in {} "]}, "ends in a space"),
        ("a.json", {**LRE, "prompt_templates": []}, None),
        ("a.txt", "a", "cannot tell what kind of file .*: its name must end in .jsonl, .csv"),
    ],
)
def test_bad_input_is_one_sentence_that_says_where_and_what(write, name, content, words):
    path = write(name, content)
    if words is None:
        assert len(load_prompts(path)) == 4
        return
    with pytest.raises(InputError, match=words) as error:
        load_prompts(path)
    assert path in str(error.value).replace("\\\\", "\\")
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_named_beside_the_sets_there_are(tmp_path):
    with pytest.raises(InputError, match="called 'colour': it is neither a file nor .* color, nu"):
        load_prompts("colour")
    with pytest.raises(InputError, match="called .*absent.jsonl': it is neither a file"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="is a folder without any .json file"):
        load_prompts(tmp_path)
    with pytest.raises(InputError, match="is no LRE relation, which all .json files of a folder"):
        (tmp_path / "a.json").write_text("[]")
        load_prompts(tmp_path)
    for name in ("a\0b.jsonl", "x" * 5000 + ".csv", ""):
        with pytest.raises(InputError):
            load_prompts(name)


def test_a_file_that_may_not_be_read_says_so(write, monkeypatch):
    path = write("a.jsonl", GOOD)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refused)
    with pytest.raises(InputError, match="cannot read prompts from .*a.jsonl': Permission denied"):
        load_prompts(path)


def only_input_errors(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            prompts = load_prompts(path)
        except InputError:
            return
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts) > 0
    for prompt in prompts:
        assert prompt.text == prompt.text.rstrip() and prompt.answer.startswith(" ")
        prompt.text.encode()


KINDS = st.sampled_from([".jsonl", ".csv", ".json"])


@given(kind=KINDS, content=st.binary(max_size=80))
@example(kind=".csv", content=b"text,answer\n\x00,\x00\n")
def test_of_any_bytes_only_input_errors_come(tmp_path_factory, kind, content):
    path = tmp_path_factory.mktemp("fuzz") / f"a{kind}"
    path.write_bytes(content)
    only_input_errors(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from([*FULL, *LRE, *KNOWN[0], "prompt", "object", "range_name"]), inner
        )
    ),
    max_leaves=8,
)


@given(
    kind=st.sampled_from([".jsonl", ".json"]),
    value=VALUES,
    row=st.sampled_from([LRE, KNOWN[0]]),
    in_list=st.booleans(),
)
def test_of_any_json_only_input_errors_come(tmp_path_factory, kind, value, row, in_list):
    path = tmp_path_factory.mktemp("fuzz") / f"a{kind}"
    if isinstance(value, dict):
        value = {**row, **value}
    path.write_text(json.dumps([value] if in_list else value))
    only_input_errors(path)


@given(
    kind=KINDS,
    place=st.integers(0, 250),
    byte=st.binary(max_size=2),
    cut=st.integers(0, 3),
)
def test_of_a_damaged_file_only_input_errors_come(tmp_path_factory, kind, place, byte, cut):
    good = {
        ".jsonl": GOOD * 2,
        ".csv": 'text,answer,aliases\nGrass is,green,a|b\n"Sky, blue is",blue,\n',
        ".json": json.dumps(LRE),
    }[kind].encode()
    path = tmp_path_factory.mktemp("fuzz") / f"a{kind}"
    path.write_bytes(good[:place] + byte + good[place + cut :])
    only_input_errors(path)


# --- TriviaQA ---------------------------------------------------------------------------------

QUESTIONS = [
    ("tc_1", "What is the capital of France?", "Paris", ["Paris", "City of Light"]),
    ("tc_2", "Who wrote Babbitt?", "Sinclair Lewis", ["Sinclair Lewis"]),
    ("tc_3", "How many legs has a spider? ", "EIGHT", ["8", "eight"]),
    ("tc_4", "What do most people in Iran speak?", "Farsi", ["Persian", "Farsi"]),
]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder of the form of TriviaQA, which ``datasets`` loads without a network."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def make(rows):
        folder = tmp_path / "trivia"
        folder.mkdir()
        parquet.write_table(pa.Table.from_pylist(rows), folder / "validation.parquet")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: rc.nocontext\n  data_files:\n"
            "  - split: validation\n    path: validation.parquet\n---\n"
        )
        return str(folder)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield make
    datasets.enable_progress_bars()


def as_rows(questions):
    return [
        dict(question=question, question_id=name, answer=dict(value=value, aliases=aliases))
        for name, question, value, aliases in questions
    ]


def test_trivia_questions_with_an_answer_of_a_type_become_prompts(stand_in):
    prompts = load_trivia_qa(name=stand_in(as_rows(QUESTIONS)))
    assert [(p.prompt_id, p.fact.knowledge_type, p.fact.accepted) for p in prompts] == [
        ("trivia_qa/tc_1", "capital", (" Paris",)),
        ("trivia_qa/tc_3", "number", (" eight", " 8")),
        ("trivia_qa/tc_4", "language", (" Farsi", " Persian")),
    ]
    assert prompts[1].text == "Question: How many legs has a spider?\nAnswer:"


def test_a_trivia_question_can_be_put_in_other_words(stand_in):
    name = stand_in(as_rows(QUESTIONS[:1]))
    (prompt,) = load_trivia_qa(name=name, split="validation[:1]", template="Q: {question} A:")
    assert prompt.text == "Q: What is the capital of France? A:"


def test_what_is_wrong_with_a_trivia_set_is_said(stand_in):
    name = stand_in(as_rows(QUESTIONS[1:2]))
    for options, words in (
        ({}, "no question of .* has an answer of one of the six knowledge types"),
        ({"split": "dev"}, 'cannot load .*:dev: Unknown split "dev"'),
        ({"config": "web"}, "cannot load .*: BuilderConfig 'web' not found"),
        ({"template": "Answer: "}, "template must hold {question} once and not end in a space"),
        ({"name": "nobody/nothing"}, "cannot load nobody/nothing:validation: "),
    ):
        with pytest.raises(InputError, match=words):
            load_trivia_qa(**{"name": name, **options})


def test_a_data_set_of_another_form_is_named(stand_in):
    name = stand_in([dict(question="Who?", answers=["me"])])
    with pytest.raises(InputError, match="row 0 of .* is not as in TriviaQA: it needs question"):
        load_trivia_qa(name=name)


def test_load_prompts_passes_the_split_on(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "tl_neuron_attr.knowledge.sets.load_trivia_qa", lambda split: asked.append(split) or ()
    )
    assert load_prompts("triviaqa:validation[:9]") == () and asked == ["validation[:9]"]


def test_without_the_package_datasets_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        InputError, match=r"not installed; pip install 'tl_neuron_attr\[datasets\]'"
    ):
        load_trivia_qa()
