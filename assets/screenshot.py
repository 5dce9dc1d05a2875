"""The README's picture of the app: the comparison on a desktop, the chat on a phone in the dark.

  make app            # in another terminal
  .venv/bin/python assets/screenshot.py [http://127.0.0.1:7860]

Needs Chromium (Debian: apt-get install chromium) and requirements-dev.txt.
"""

import shutil
import sys
from pathlib import Path

from PIL import Image, ImageOps
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
QUESTION = "What are the benefits of exercise?"
MOST_SECONDS = 300  # of an answer


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        desktop = browser.new_page(viewport={"width": 1160, "height": 720})
        desktop.set_default_timeout(MOST_SECONDS * 1000)
        desktop.goto(url)
        desktop.get_by_role("button", name="Parameters").click()
        desktop.get_by_label("Seed").fill("0")
        desktop.get_by_role("button", name="Parameters").click()
        desktop.get_by_role("tab", name="Compare").click()
        desktop.locator("#compare").click()
        desktop.wait_for_function(
            "[...document.querySelectorAll('.note')].filter(n => n.innerText.includes('seed')).length == 2"
        )
        desktop.evaluate("scrollTo(0, 0)")
        desktop.wait_for_timeout(500)
        desktop.screenshot(path=HERE / "app.png")
        phone = browser.new_page(viewport={"width": 360, "height": 720}, color_scheme="dark")
        phone.set_default_timeout(MOST_SECONDS * 1000)
        phone.goto(url)
        phone.get_by_text(QUESTION).click()
        phone.wait_for_function("[...document.querySelectorAll('#chat .note')].some(n => n.innerText.includes('seed'))")
        phone.wait_for_timeout(500)
        phone.screenshot(path=HERE / "phone.png")
        browser.close()
    left, right = (Image.open(HERE / name).convert("RGB") for name in ("app.png", "phone.png"))
    right = ImageOps.expand(right.resize((right.width - 24, right.height - 48)), (12, 24), "white")  # a gap around the phone
    both = Image.new("RGB", (left.width + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    both.save(HERE / "app.png", optimize=True)
    (HERE / "phone.png").unlink()


if __name__ == "__main__":
    main()
