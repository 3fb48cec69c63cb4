"""The picture on the page "Reading a report": the bundled model's report in an installed Chromium.

python docs/report_screenshot.py [--chromium PATH]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tl_neuron_attr import attribute, load_model

PICTURE = Path(__file__).parent / "pages" / "images" / "report.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    chromium = parser.parse_args().chromium
    result = attribute(load_model("tiny-facts"), "The capital of France is")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        place = result.report(Path(folder) / "france.html")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 760})
        page.goto(place.as_uri())
        page.locator("#strip button").nth(4).click()
        page.locator("#f-heads").scroll_into_view_if_needed()
        page.wait_for_selector("#f-heads .main-svg", state="attached")
        page.evaluate("scrollTo(0, 0)")
        page.locator("#attn").scroll_into_view_if_needed()
        page.locator("table[data-drawn=attn] tbody tr").first.click()
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
