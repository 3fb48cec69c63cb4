"""What prompts share: by sets and loops, and by what overlap must be."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_neuron_attr import InputError, layers_by_type, overlap_table
from tl_neuron_attr.across import OVERLAP_COLUMNS
from tl_neuron_attr.tables import NEURON_COLUMNS


def table_of(prompts, role="value"):
    """``prompts`` are of a type each, and have FFN and attention neurons, best first."""
    rows = []
    for number, (name, ffn, attn) in enumerate(prompts):
        for rank, index in enumerate(ffn, start=1):
            rows.append((f"p{number}", role, "ffn", 0, None, index, None, 1.0, 1.0, rank, name))
        for rank, (index, source) in enumerate(attn, start=1):
            rows.append((f"p{number}", role, "attn", 1, 0, index, source, 1.0, 1.0, rank, name))
    table = pd.DataFrame(rows, columns=[*NEURON_COLUMNS, "knowledge_type"])
    return table.astype({"head": "Int64", "source_pos": "Int64"})


def by_hand(prompts, kind, first, second, top):
    sets = []
    for _, ffn, attn in (first, second):
        chosen = ffn if kind == "ffn" else attn
        chosen = chosen[:top]
        sets.append({each if kind == "ffn" else each[0] for each in chosen})
    both, either = len(sets[0] & sets[1]), len(sets[0] | sets[1])
    return both, both / either if either else 0.0


FFN = st.lists(st.integers(0, 8), min_size=1, max_size=6, unique=True)
ATTN = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=6, unique=True
)
PROMPTS = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), FFN, ATTN), min_size=1, max_size=5)


@given(PROMPTS, st.sampled_from([None, 2]))
def test_overlap_of_prompts_is_that_of_sets(prompts, top):
    found = overlap_table(table_of(prompts), top)
    assert list(found.columns) == list(OVERLAP_COLUMNS)
    assert len(found) == 2 * len(prompts) ** 2
    for row in found.to_dict("records"):
        first, second = (prompts[int(row[name][1:])] for name in ("first", "second"))
        shared, jaccard = by_hand(prompts, row["kind"], first, second, top)
        assert (row["shared"], row["pairs"]) == (shared, 1)
        assert row["jaccard"] == pytest.approx(jaccard)


@given(PROMPTS)
def test_overlap_of_types_is_the_mean_over_pairs_of_different_prompts(prompts):
    found = overlap_table(table_of(prompts), by="knowledge_type")
    for row in found.to_dict("records"):
        pairs = [
            by_hand(prompts, row["kind"], one, other, None)
            for i, one in enumerate(prompts)
            for j, other in enumerate(prompts)
            if one[0] == row["first"]
            and other[0] == row["second"]
            and (i < j if row["first"] == row["second"] else i != j)
        ]
        assert row["pairs"] == len(pairs)
        if not pairs:
            assert pd.isna(row["shared"]) and pd.isna(row["jaccard"])
            continue
        for place, name in enumerate(("shared", "jaccard")):
            assert row[name] == pytest.approx(sum(pair[place] for pair in pairs) / len(pairs))


def test_prompts_stand_by_type_and_an_attention_neuron_counts_once():
    prompts = [("a", [1], [(0, 0), (0, 1)]), ("b", [1], [(0, 2)]), ("a", [2], [(3, 0)])]
    found = overlap_table(table_of(prompts))
    assert list(dict.fromkeys(found["first"])) == ["p0", "p2", "p1"]
    cell = found.set_index(["kind", "first", "second"]).loc[("attn", "p0", "p1")]
    assert cell["shared"] == 1 and cell["jaccard"] == 1


def test_what_is_no_table_of_one_role_is_refused():
    table = table_of([("a", [1], [])])
    query = table_of([("a", [1], [])], role="query")
    for wrong, options, message in (
        (pd.concat([table, query]), {}, "one role, got query, value"),
        (table.iloc[:0], {}, "no neurons"),
        (table.drop(columns="knowledge_type"), {"by": "knowledge_type"}, "lacks knowledge_type"),
        (table, {"top": 0}, "top must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            overlap_table(wrong, **options)
    with pytest.raises(InputError, match="layers tables of many prompts .* lacks knowledge_type"):
        layers_by_type(pd.DataFrame({"layer": [0], "kind": ["ffn"], "score": [1.0]}))
