"""Every family the tests know, put through ``check_model``: the table on docs/pages/models.md.

``python tests/family_table.py`` writes it anew; ``test_doctor.py`` holds the page against it.
"""

import re
from pathlib import Path

from conftest import FAMILIES, REFUSED, bridge_of

from tl_neuron_attr import check_model

PAGE = Path(__file__).parents[1] / "docs" / "pages" / "models.md"
HEADER = (
    "| family | class | norm | FFN | heads | status | in float32 | in float64 | certified bounds |"
)
MEASURED = (6, 7)  # columns that differ from machine to machine, if not by much


def family_table(checks=None):
    """The rows of the table, header and all, as Markdown."""
    checks = checked_families() if checks is None else checks
    rows = [_row(family, check) for family, check in checks.items()]
    return "\n".join([HEADER, "|---" * HEADER.count(" | ") + "|---|", *rows])


def checked_families(families=(*FAMILIES, *REFUSED)):
    """What ``check_model`` finds out about a tiny random model of each family."""
    return {family: check_model(bridge_of(family)) for family in families}


def table_of(text):
    """The table in the text of a page, and where it is."""
    start = text.index(HEADER)
    return re.compile(r"(\|.*\n?)+").match(text, start)[0].rstrip("\n")


def _row(family, check):
    if not check.shape:
        (found,) = check.findings
        reason = found.says.partition("not supported: ")[2]
        cells = [family, f"`{check.architecture}`", "", "", "", f"refused: {reason}", "", "", ""]
        return f"| {' | '.join(cells)} |"
    host = {each.name: each for each in check.findings}
    measured = [
        each for each in check.findings if each.error is not None and "nats" not in each.says
    ]
    norm, ffn = re.search(r"(LayerNorm|RMSNorm), (plain|gated)", check.shape).groups()
    parallel = ", parallel" * ("parallel" in check.shape)
    grouped = re.search(r"heads of \d+ \((\d+) for", check.shape)
    heads = "" if grouped is None else "one key-value head" if grouped[1] == "1" else "grouped"
    status = "holds" if check.holds else f"**{check.verdict}**"
    bounds = host["certified bounds"]
    cells = [
        family,
        f"`{check.architecture}`",
        norm,
        f"{ffn}{parallel}",
        heads,
        status,
        f"{max(each.error for each in measured):.0e}",
        f"{max(each.double_error or 0 for each in measured):.0e}",
        "yes" if bounds.status == "ok" else f"no: {bounds.says}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(table_of(page), family_table()), encoding="utf-8")
