"""A mkdocs hook: ```math blocks of the pages -> MathML, when the site is built.

A reader's browser draws MathML by itself, so that no script is fetched; GitHub draws the same
blocks from the page's source. A command that is not understood ends the build.
"""

import re
from typing import Any

from latex2mathml.converter import convert


def mathml(latex: str) -> str:
    """One equation as a MathML element.

    Raises:
        ValueError: For a command that would stand in the page as its own name.
    """
    element = convert(latex, display="block").replace(r"\_", "_")  # escaped for GitHub's sake
    unknown = re.findall(r"\\[A-Za-z]+", element)
    if unknown:
        raise ValueError(f"no MathML for {unknown[0]} in {latex!r}")
    return element


def fence(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """What stands in the page for a ```math block."""
    return f'<div class="equation">{mathml(source.strip())}</div>'


def on_config(config: Any) -> Any:
    """Tell the extension of fenced blocks whom to ask for ```math."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "equation", "format": fence}]
    return config
