"""How it looks: tables -> plotly figures, drawn from tables alone, never from a model.

Every function takes one table of ``tables.py`` (``sankey`` the two of a ``Graph``), fresh or read
back from disk, and returns a ``plotly.graph_objects.Figure`` that is neither shown nor tied to a
global theme. Layers run from left to right in all of them. Green raises log p(target) and purple
lowers it. They are readable from a width of 700 pixels, a notebook's, on.

``title`` is plain text, not HTML; by default it says what is drawn, and ``""`` leaves it out.
"""

from tl_neuron_attr.views.compared import compared_layer_bars, compared_neuron_scatter
from tl_neuron_attr.views.curves import effect_curves, mask_curves
from tl_neuron_attr.views.effects import effect_bars, effect_heatmap, predicted_scatter
from tl_neuron_attr.views.graph import sankey
from tl_neuron_attr.views.heads import head_heatmap, head_scan_heatmap
from tl_neuron_attr.views.layers import layer_bars
from tl_neuron_attr.views.neurons import neuron_histogram
from tl_neuron_attr.views.positions import position_bars

__all__ = [
    "compared_layer_bars",
    "compared_neuron_scatter",
    "effect_bars",
    "effect_curves",
    "effect_heatmap",
    "head_heatmap",
    "head_scan_heatmap",
    "layer_bars",
    "mask_curves",
    "neuron_histogram",
    "position_bars",
    "predicted_scatter",
    "sankey",
]
