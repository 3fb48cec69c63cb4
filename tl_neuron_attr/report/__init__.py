"""One HTML file: figures + tables -> a page.

``page.py`` makes any page of sections; ``attribution.py`` the report of one prompt, drawn from what
is saved of it (``saved.py``, ``cards.py``); ``prompt_set.py`` an index with a page a prompt.
"""

from tl_neuron_attr.report.attribution import (
    redraw_report,
    report_files,
    report_html,
    write_report,
)
from tl_neuron_attr.report.cards import CARDS
from tl_neuron_attr.report.prompt_set import report_set
from tl_neuron_attr.report.saved import is_saved, read_saved

__all__ = [
    "CARDS",
    "is_saved",
    "read_saved",
    "redraw_report",
    "report_files",
    "report_html",
    "report_set",
    "write_report",
]
