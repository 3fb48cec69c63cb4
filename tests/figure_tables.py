"""Small tables written by hand, one call of each view on them, and what it drew: golden_figures/.

``python tests/figure_tables.py`` writes the golden files anew; look at the difference.
"""

import json
from pathlib import Path

import pandas as pd

from tl_neuron_attr import views
from tl_neuron_attr.graph import EDGE_COLUMNS, NODE_COLUMNS
from tl_neuron_attr.tables import (
    COMPARED_HEAD_COLUMNS,
    COMPARED_LAYER_COLUMNS,
    COMPARED_NEURON_COLUMNS,
    CURVE_COLUMNS,
    HEAD_COLUMNS,
    HEAD_SCAN_COLUMNS,
    LAYER_COLUMNS,
    LOG_PROB_COLUMNS,
    NEURON_COLUMNS,
    POSITION_COLUMNS,
    SHARE_COLUMNS,
)

GOLDEN = Path(__file__).parent / "golden_figures"


def frame(columns, rows, **types):
    return pd.DataFrame(rows, columns=list(columns)).astype(types)


LAYERS = frame(
    LAYER_COLUMNS,
    [(0, "attn", 0.5), (0, "ffn", 1.25), (1, "attn", -0.25), (1, "ffn", 2.0)],
)
HEADS = frame(HEAD_COLUMNS, [(0, 0, 0.5), (0, 1, -0.25), (1, 0, 0.0)])
HEAD_SCAN = frame(HEAD_SCAN_COLUMNS, [(0, 0, -2.5), (0, 1, 0.5), (1, 0, 0.0), (1, 1, 0.25)])
POSITIONS = frame(
    POSITION_COLUMNS,
    [(1, 2, 0, "<s>", 0.25, -0.5), (1, 2, 1, " France", 0.5, 1.5), (1, 2, 2, "\n", 0.25, 0.0)],
)
LOG_PROBS = frame(
    LOG_PROB_COLUMNS,
    [
        (layer, position, token, -8.0 + 2 * step - position)
        for step, layer in enumerate([None, 0, 1])
        for position, token in enumerate(["<s>", " France", "\n"])
    ],
    layer="Int64",
    token="string",
)
LOG_PROB_DIFFERENCES = LOG_PROBS.assign(log_prob=LOG_PROBS["log_prob"] + 6)
NEURONS = frame(
    NEURON_COLUMNS,
    [
        ("0", "value", "ffn", 0, None, 7, None, -1.5, 1.0, 1),
        ("0", "value", "ffn", 1, None, 3, None, 0.5, 0.25, 2),
        ("0", "value", "ffn", 1, None, 4, None, 0.5, -0.125, 3),
        ("0", "value", "attn", 1, 0, 5, 1, 2.0, 0.5, 1),
        ("0", "value", "attn", 0, 2, 1, 2, -0.25, 0.5, 2),
    ],
    head="Int64",
    source_pos="Int64",
)
SPOKEN = NEURONS.assign(
    source_token=pd.array([None, None, None, " France", "\n"], dtype="string"),
    raises=[[" Paris", "<b>"], [" Rome"], [" a"], [" Paris", "$x$"], ["\u202e"]],
    lowers=[[" the"], [" of"], [" b"], ["%{x}"], [" x"]],
)
SHARES = frame(SHARE_COLUMNS, [("ffn", 3, 1.5, 2.5, 0.5, 0.8333), ("attn", 2, 1.0, 1.25, 0.8, 1.0)])
NODES = frame(
    NODE_COLUMNS,
    [
        {
            **dict.fromkeys(NODE_COLUMNS),
            "id": name,
            "label": label,
            "kind": kind,
            "role": role,
            "score": score,
            "handed_down": score,
            "explained": score / 2,
            "left_out": False,
        }
        for name, label, kind, role, score in (
            ("answer", " Paris", "answer", "answer", 2.0),
            ("L1.N3@2", "L1.N3", "ffn", "value", 1.5),
            ("L0.H1.D2@1", "L0.H1.D2 <b>", "attn", "value", -0.5),
            ("token@1", "@1 France", "token", "token", 1.0),
        )
    ],
)
EDGES = frame(
    EDGE_COLUMNS,
    [
        {**dict.fromkeys(EDGE_COLUMNS), "source": source, "target": target, "weight": weight}
        for source, target, weight in (
            ("L1.N3@2", "answer", 1.5),
            ("L0.H1.D2@1", "answer", -0.5),
            ("token@1", "L1.N3@2", 1.0),
        )
    ],
)
COMPARED_LAYERS = frame(
    COMPARED_LAYER_COLUMNS,
    [(0, "attn", 1.0, 0.5, 0.5), (0, "ffn", -2.0, 1.0, -3.0), (1, "attn", 3.0, 3.0, 0.0)],
)
COMPARED_HEADS = frame(COMPARED_HEAD_COLUMNS, [(0, 0, 1.0, 0.5, 0.5), (1, 1, -1.0, 1.0, -2.0)])
COMPARED_NEURONS = frame(
    COMPARED_NEURON_COLUMNS,
    [
        ("0", "ffn", 1, None, 7, None, 1.0, 0.5, 0.5, 0.25, 0.25, 1),
        ("0", "attn", 0, 2, 5, 4, 1.0, 0.5, -0.25, 0.25, -0.5, 1),
    ],
    head="Int64",
    source_pos="Int64",
)
MASKED = frame(
    CURVE_COLUMNS,
    [
        (prompt_id, "ffn", keep, top, top, -float(start + top), 0.5, 1, True)
        for start, prompt_id in enumerate("abc")
        for keep in (False, True)
        for top in (0, 1, 3)
    ],
)
CURVES = frame(
    ("knowledge_type", "method", "kind", "metric", "top", "mean", "low", "high"),
    [
        ("all", method, "ffn", "prob", top, 0.5 - place / 8 - top / 8, 0.25 - top / 8, 0.75)
        for place, method in enumerate(["increase", "norm", "random"])
        for top in (0, 1)
    ],
)
SUMMARY = frame(
    ("knowledge_type", "method", "kind", "top", "metric", "prompts")
    + ("before", "after", "after_low", "after_high"),
    [
        (name, method, "ffn", 10, "prob", 4, 0.75, 0.5 - place / 8, 0.25, 0.625)
        for name in ("all", "color")
        for place, method in enumerate(["increase", "norm", "random"])
    ],
)
PREDICTED = frame(
    ("prompt_id", "method", "kind", "top", "predicted", "measured"),
    [("<b>a", "increase", "ffn", 10, -1.0, -0.5), ("b", "increase", "ffn", 10, -2.0, -3.0)],
)
RANKINGS = frame(
    ("prompt_id", "method", "kind", "rank", "layer"),
    [
        (prompt_id, method, "ffn", rank, layer)
        for prompt_id, method, layers in (
            ("a", "increase", (0, 0, 2)),
            ("b", "increase", (0, 1, 2)),
            ("a", "norm", (1, 1, 1)),
        )
        for rank, layer in enumerate(layers, start=1)
    ],
)
BY_TYPE = frame(
    ("knowledge_type", "layer", "kind", "score", "rank", "best"),
    [
        ("color", None, "embed", 0.25, 3, True),
        ("color", 0, "attn", -0.5, 4, False),
        ("color", 0, "ffn", 1.0, 1, True),
        ("color", None, "bias", 9.0, None, False),
        ("number", 0, "attn", 0.5, 2, True),
        ("number", 0, "ffn", 0.75, 1, True),
    ],
    layer="Int64",
    rank="Int64",
)
OVERLAP = frame(
    ("by", "kind", "first", "second", "pairs", "shared", "jaccard"),
    [
        ("knowledge_type", kind, first, second, 4, 2.0, 0.5 if first == second else 0.125)
        for kind in ("ffn", "attn")
        for first in ("color", "number")
        for second in ("color", "number")
    ],
)
OVERLAP_OF_PROMPTS = OVERLAP.assign(by="prompt_id", pairs=1)

# what is stored -> the view, its tables, its options
CASES = {
    "layer_bars": ("layer_bars", [LAYERS], {}),
    "head_heatmap": ("head_heatmap", [HEADS], {}),
    "head_scan_heatmap": ("head_scan_heatmap", [HEAD_SCAN], {}),
    "position_bars": ("position_bars", [POSITIONS], {}),
    "log_prob_heatmap": ("log_prob_heatmap", [LOG_PROBS], {}),
    "log_prob_heatmap_contrast": ("log_prob_heatmap", [LOG_PROB_DIFFERENCES], {}),
    "neuron_histogram": ("neuron_histogram", [NEURONS], {"top": 2, "n_layers": 3}),
    "neuron_scatter": ("neuron_scatter", [SPOKEN], {"n_layers": 3}),
    "neuron_scatter_old": ("neuron_scatter", [NEURONS], {}),
    "cumulative_share": ("cumulative_share", [NEURONS], {}),
    "cumulative_share_bands": ("cumulative_share", [NEURONS, SHARES], {}),
    "sankey": ("sankey", [NODES, EDGES], {}),
    "compared_layer_bars": ("compared_layer_bars", [COMPARED_LAYERS], {}),
    "compared_head_heatmap": ("compared_head_heatmap", [COMPARED_HEADS], {}),
    "compared_neuron_scatter": ("compared_neuron_scatter", [COMPARED_NEURONS], {}),
    "mask_curves": ("mask_curves", [MASKED], {}),
    "effect_curves": ("effect_curves", [CURVES], {}),
    "effect_bars": ("effect_bars", [SUMMARY], {}),
    "effect_heatmap": ("effect_heatmap", [SUMMARY], {}),
    "predicted_scatter": ("predicted_scatter", [PREDICTED], {}),
    "method_histogram": ("method_histogram", [RANKINGS], {"n_layers": 4}),
    "type_layer_heatmap": ("type_layer_heatmap", [BY_TYPE], {}),
    "neuron_overlap": ("neuron_overlap", [OVERLAP], {}),
    "neuron_overlap_prompts": ("neuron_overlap", [OVERLAP_OF_PROMPTS], {"measure": "shared"}),
}


def draw(name, tables=None):
    view, own, options = CASES[name]
    return getattr(views, view)(*(own if tables is None else tables), **options)


def essence(figure):
    """The data as a browser gets it, and what says in words what it is."""
    whole = json.loads(figure.to_json())
    layout = {name: value for name, value in whole["layout"].items() if name != "template"}
    axes = {name: value for name, value in layout.items() if name[1:5] == "axis"}
    return {
        "data": whole["data"],
        "title": layout["title"]["text"],
        "axes": {name: axis["title"]["text"] for name, axis in axes.items() if axis.get("title")},
        "ticks": {name: axis["ticktext"] for name, axis in axes.items() if axis.get("ticktext")},
        "colours": layout.get("coloraxis", {}),
        "annotations": [each["text"] for each in layout.get("annotations", [])],
        "height": layout["height"],
    }


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        text = json.dumps(essence(draw(case)), indent=1, ensure_ascii=False)
        (GOLDEN / f"{case}.json").write_text(text + "\n", encoding="utf-8")
