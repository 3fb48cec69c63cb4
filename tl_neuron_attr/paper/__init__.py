"""The paper in one call: its tables and figures for any model, and its notebooks' numbers checked.

``write_paper`` (``run.py``) makes every table and figure of Yu & Ananiadou (2024) for one model;
``check_published`` (``check.py``) holds the numbers saved in the published notebooks against what
this package computes, where the weights are at hand.
"""

from tl_neuron_attr.paper.check import check_published
from tl_neuron_attr.paper.published import published_example, published_numbers
from tl_neuron_attr.paper.run import Paper, write_paper
from tl_neuron_attr.paper.settings import Settings

__all__ = [
    "Paper",
    "Settings",
    "check_published",
    "published_example",
    "published_numbers",
    "write_paper",
]
