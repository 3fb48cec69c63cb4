"""How it looks: tables -> plotly figures, drawn from tables alone, never from a model.

Every function takes one table of ``tables.py`` (``sankey`` the two of a ``Graph``), fresh or read
back from disk, and returns a ``plotly.graph_objects.Figure`` that is neither shown nor tied to a
global theme. Layers run from left to right in all of them. Green raises log p(target) and purple
lowers it. They are readable from a width of 700 pixels, a notebook's, on.

``title`` is plain text, not HTML; by default it says what is drawn, and ``""`` leaves it out.
"""

from tl_neuron_attr.views.compared import (
    compared_head_heatmap,
    compared_layer_bars,
    compared_neuron_scatter,
)
from tl_neuron_attr.views.curves import effect_curves, mask_curves
from tl_neuron_attr.views.effects import effect_bars, effect_heatmap, predicted_scatter
from tl_neuron_attr.views.graph import sankey
from tl_neuron_attr.views.heads import head_heatmap, head_scan_heatmap
from tl_neuron_attr.views.knowledge import type_layer_heatmap
from tl_neuron_attr.views.layers import layer_bars
from tl_neuron_attr.views.methods import method_histogram
from tl_neuron_attr.views.neurons import neuron_histogram, neuron_scatter
from tl_neuron_attr.views.overlap import neuron_overlap
from tl_neuron_attr.views.positions import log_prob_heatmap, position_bars
from tl_neuron_attr.views.shares import cumulative_share

__all__ = [
    "compared_head_heatmap",
    "compared_layer_bars",
    "compared_neuron_scatter",
    "cumulative_share",
    "effect_bars",
    "effect_curves",
    "effect_heatmap",
    "head_heatmap",
    "head_scan_heatmap",
    "layer_bars",
    "log_prob_heatmap",
    "mask_curves",
    "method_histogram",
    "neuron_histogram",
    "neuron_overlap",
    "neuron_scatter",
    "position_bars",
    "predicted_scatter",
    "sankey",
    "type_layer_heatmap",
]
