"""The pictures of docs/serve.md, taken of a running server's page.

python tools/serve_pictures.py page http://127.0.0.1:8000/ docs/images
python tools/serve_pictures.py film http://127.0.0.1:8000/ docs/images/serve-explorer.webp
"""

import argparse
import io
import itertools
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
# Where the mouse goes in the film, as shares of the picture, and where the depth is played through.
PATH = [(0.25, 0.3), (0.4, 0.3), (0.55, 0.32), (0.6, 0.45), (0.6, 0.6), (0.45, 0.7), (0.3, 0.7), (0.45, 0.45)]


def wait(page: Page) -> None:
    page.wait_for_selector(".film button[aria-pressed=true]")
    page.wait_for_selector("input[value=average]:enabled", state="attached", timeout=120_000)
    page.wait_for_timeout(300)


def save(page: Page, path: Path) -> None:
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.thumbnail((1280, 1280), Image.Resampling.LANCZOS)
    picture.save(path, quality=86, method=6)
    print(path, f"{path.stat().st_size:,} bytes")


def hover(page: Page, x: float, y: float) -> None:
    box = page.locator(".picker").first.bounding_box()
    assert box is not None
    page.locator(".picker").first.hover(position={"x": x * box["width"], "y": y * box["height"]})
    page.wait_for_timeout(350)


def pages(browser: Browser, address: str, folder: Path) -> None:
    looks: dict[str, dict[str, Any]] = {
        "light": {"viewport": {"width": 1280, "height": 1180}},
        "two-dark": {"viewport": {"width": 1280, "height": 1180}, "color_scheme": "dark"},
        "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "device_scale_factor": 2},
    }
    for name, options in looks.items():
        page = browser.new_page(**options)
        page.goto(address)
        wait(page)
        if name == "two-dark":
            page.click("#compare")
            page.wait_for_selector(".panel:nth-child(2) .film button")
        if name != "phone":
            hover(page, 0.42, 0.3)
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(150)
        save(page, folder / f"serve-{name}.webp")
        page.close()


def film(browser: Browser, address: str, path: Path) -> None:
    page = browser.new_page(viewport={"width": 620, "height": 1100}, color_scheme="dark")
    page.goto(address)
    wait(page)
    frames: list[tuple[Image.Image, int]] = []

    def take(milliseconds: int) -> None:
        shown = Image.open(io.BytesIO(page.locator(".look").screenshot())).convert("RGB")
        shown.thumbnail((400, 1000), Image.Resampling.LANCZOS)
        frames.append((shown, milliseconds))

    page.evaluate("document.querySelector('.controls').style.visibility = 'hidden'")
    for (x0, y0), (x1, y1) in itertools.pairwise(PATH):
        hover(page, (x0 + x1) / 2, (y0 + y1) / 2)
        take(450)
    for block in range(page.locator(".film button").count()):
        page.locator(".film button").nth(block).click()
        page.wait_for_timeout(350)
        take(700)
    page.close()
    height = min(frame.height for frame, _ in frames)
    still = [frame.crop((0, 0, frame.width, height)) for frame, _ in frames]
    durations = [milliseconds for _, milliseconds in frames]
    still[0].save(path, save_all=True, append_images=still[1:], duration=durations, loop=0, quality=52, method=6)
    print(path, f"{path.stat().st_size:,} bytes, {len(still)} frames")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["page", "film"])
    parser.add_argument("address")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        (pages if given.what == "page" else film)(browser, given.address, given.out)
        browser.close()


if __name__ == "__main__":
    main()
