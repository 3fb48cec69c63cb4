"""Every supported family put through ``check_model``: the second table on docs/pages/models.md.

``python tests/doctor_table.py`` writes it anew; ``test_doctor.py`` holds the page against it.
"""

import re

from conftest import SUPPORTED, bridge_of
from family_table import NAMES, PAGE

from tl_neuron_attr import check_model

HEADER = "| family | status | in float32 | in float64 | certified bounds |"
MEASURED = (2, 3)  # columns that differ from machine to machine, if not by much


def doctor_table(checks=None):
    """The rows of the table, header and all, as Markdown."""
    checks = checked_families() if checks is None else checks
    rows = [_row(family, check) for family, check in checks.items()]
    return "\n".join([HEADER, "|---" * HEADER.count(" | ") + "|---|", *rows])


def checked_families(families=tuple(SUPPORTED)):
    """What ``check_model`` finds out about a tiny random model of each family."""
    return {family: check_model(bridge_of(family)) for family in families}


def table_of(text):
    """The table in the text of a page, and where it is."""
    start = text.index(HEADER)
    return re.compile(r"(\|.*\n?)+").match(text, start)[0].rstrip("\n")


def _row(family, check):
    host = {each.name: each for each in check.findings}
    measured = [
        each for each in check.findings if each.error is not None and "nats" not in each.says
    ]
    bounds = host["certified bounds"]
    cells = [
        NAMES[family],
        "holds" if check.holds else f"**{check.verdict}**",
        f"{max(each.error for each in measured):.0e}",
        "not checked"
        if check.why_no_double
        else f"{max(each.double_error for each in measured if each.double_error is not None):.0e}",
        "yes" if bounds.status == "ok" else "for the best alone",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(table_of(page), doctor_table()), encoding="utf-8")
