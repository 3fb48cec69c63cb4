"""Draw the page of figures: python docs/figures.py

Runs the code of pages/views.md, block by block, and writes the image that stands below a block:
the figure its last expression is, as headless Chromium draws it 700 pixels wide. Needs playwright
and a Chromium (``CHROMIUM`` names it; by default /usr/bin/chromium), and Pillow.
"""

import ast
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import plotly.graph_objects as go
from PIL import Image
from playwright.sync_api import Page, sync_playwright

PAGE = Path(__file__).parent / "pages" / "views.md"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
WIDTH = 700
COLOURS = 96


def blocks(text: str) -> list[tuple[str, str | None]]:
    """The code of each block, and the image that stands below it, if one does."""
    fences = re.finditer(r"```python\n(.*?)```\n(?:\n!\[[^\]]*\]\((\S+)\))?", text, re.DOTALL)
    return [(match[1], match[2]) for match in fences]


def run(code: str, namespace: dict) -> object:
    """What the last expression of ``code`` is."""
    tree = ast.parse(code)
    *first, last = tree.body
    if not isinstance(last, ast.Expr):
        exec(code, namespace)
        return None
    exec(compile(ast.Module(first, []), PAGE.name, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), PAGE.name, "eval"), namespace)


def drawn(browser: Page, figure: go.Figure, width: int = WIDTH) -> bytes:
    """``figure`` as a PNG of few colours."""
    browser.set_viewport_size({"width": width, "height": int(figure.to_dict()["layout"]["height"])})
    config = {"displayModeBar": False}
    browser.set_content(figure.to_html(include_plotlyjs=True, config=config, default_width=width))
    browser.add_style_tag(content="body { margin: 0 }")
    browser.wait_for_selector(".main-svg")
    shot = Image.open(io.BytesIO(browser.screenshot(full_page=False))).convert("RGB")
    small = io.BytesIO()
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    wanted = sys.argv[1:]
    namespace: dict = {"__name__": "page"}
    with sync_playwright() as tools, tempfile.TemporaryDirectory() as scratch:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        browser = chromium.new_page()
        os.chdir(scratch)
        for code, image in blocks(PAGE.read_text(encoding="utf-8")):
            found = run(code, namespace)
            if image is None or (wanted and not any(word in image for word in wanted)):
                continue
            if not isinstance(found, go.Figure):
                raise SystemExit(f"{image} is not below a figure")
            path = PAGE.parent / image
            path.write_bytes(drawn(browser, found))
            print(f"{image}: {path.stat().st_size / 1024:.0f} kB")
        chromium.close()


if __name__ == "__main__":
    main()
