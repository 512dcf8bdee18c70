"""The page in a real browser. Screenshots stay in build/screenshots (or DYNAMIXER_SCREENSHOTS), to be looked at."""

import base64
import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

import dynamixer
from dynamixer.data.decode import decode
from dynamixer.explain import look
from dynamixer.serve import classifier
from serve.world import picture, server_here, write_model

SCREENSHOTS = Path(os.environ.get("DYNAMIXER_SCREENSHOTS", Path(__file__).parents[2] / "build" / "screenshots"))
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
AVERAGE = "input[value=average]:enabled"


@contextmanager
def opened(browser, address, *, viewport=DESKTOP, errors=(), **options):
    """The page with its first picture; in the end, nothing may have gone wrong or have been asked of another host."""
    context = browser.new_context(viewport=viewport, **options)
    context.set_default_timeout(20_000)
    page = context.new_page()
    wrong, asked = [], []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    try:
        yield page
    finally:
        context.close()
    assert [text for text in wrong if not any(known in text for known in errors)] == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def ready(page, number=1):
    """Wait until a panel shows a picture."""
    page.wait_for_selector(f".panel:nth-child({number}) .top li")
    page.wait_for_selector(f".panel:nth-child({number}) .film button[aria-pressed=true]", state="attached")


def drawn(page):
    """Wait until what changed before is drawn: the page draws in the next frame."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")


def shot(page, name, **options):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(150)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", **options)


def caption(page, number=1):
    return page.inner_text(f".panel:nth-child({number}) .caption")


def accessible(page):
    """WCAG 2.2 A and AA by axe: what it finds wrong."""
    from axe_playwright_python.sync_playwright import Axe  # noqa: PLC0415

    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": rules}})
    return [(v["id"], [node["html"][:90] for node in v["nodes"][:3]]) for v in found.response["violations"]]


def point(page, i, j, grid, number=1):
    """Move the mouse to the middle of a token."""
    picker = page.locator(f".panel:nth-child({number}) .picker")
    picker.scroll_into_view_if_needed()
    box = picker.bounding_box()
    at = {"x": (j + 0.5) * box["width"] / grid[1], "y": (i + 0.5) * box["height"] / grid[0]}
    picker.hover(position=at)
    drawn(page)


def pixels(page, selector):
    return page.locator(selector).evaluate("canvas => canvas.toDataURL()")


def test_at_first_sight(browser, here):
    address, service = here
    with opened(browser, address) as page:
        ready(page)
        page.wait_for_selector(AVERAGE, state="attached")
        expected = service.classifier._infer([service.classifier._prepare(service.samples[0].encoded, False).tensor])[0]
        shown = page.locator(".top li").all_inner_texts()
        top = sorted(zip(expected, service.classifier.classes, strict=True), reverse=True)[:5]
        assert [re.sub(r"\s+", " ", text) for text in shown] == [f"{name} {100 * p:.1f} %" for p, name in top]
        assert page.locator(".samples button").count() == 8
        assert "64 × 64 px" in page.inner_text("#about")
        assert accessible(page) == []
        shot(page, "desktop-light", full_page=True)


def test_what_is_shown_is_what_the_model_did(browser, here, model):
    """Best token and its weight, for several tokens, blocks and segments, against matrices taken here."""
    address, service = here
    checkpoint = dynamixer.load(model)
    x = checkpoint.preprocessing(decode(service.samples[2].encoded))[None]
    blocks = look(checkpoint.model, x).blocks
    with opened(browser, address) as page:
        ready(page)
        page.click(".samples li:nth-child(3) button")
        page.wait_for_selector(".samples li:nth-child(3) button[aria-pressed=true]")
        for block, segment, i, j in ((0, 0, 2, 5), (1, 2, 7, 0), (2, 3, 3, 1), (2, 0, 0, 0)):
            page.locator("#block").fill(str(block))
            page.locator("#segment").fill(str(segment))
            grid = blocks[block].grid
            point(page, i, j, grid)
            along = {}
            for name, axis, line, output in (
                ("row", blocks[block].row[0], i, j),
                ("column", blocks[block].column[0], j, i),
            ):
                weights = axis[line].mean(0) if segment == 0 else axis[line, segment - 1]
                best = int(weights[output].argmax())
                along[name] = best + 1, round(100 * float(weights[output, best]))
            text = caption(page).replace("\xa0", " ")
            assert f"Token in row {i + 1}, column {j + 1} of {grid[0]} × {grid[1]}." in text
            row, column = along["row"], along["column"]
            found = re.search(
                r"Its row reads most from column (\d+) \((\d+) %\).*Its column reads most from row (\d+) \((\d+) %\)",
                text,
            )
            assert found, text
            got = [int(number) for number in found.groups()]
            assert (got[0], got[2]) == (row[0], column[0])
            assert abs(got[1] - row[1]) <= 1 and abs(got[3] - column[1]) <= 1  # noqa: PT018


def test_the_average_and_the_difference(browser, here):
    with opened(browser, here[0]) as page:
        ready(page)
        page.wait_for_selector(AVERAGE, state="attached")
        assert re.search(r"\d+\xa0% of it lies elsewhere than on average", caption(page))
        seen = {pixels(page, ".picture")}
        for name in ("average", "difference"):
            page.locator(f"label:has(input[value={name}])").click()
            drawn(page)
            seen.add(pixels(page, ".picture"))
            if name == "difference":
                assert re.search(r"differs most at column \d+ \([+−]\d+", caption(page))
                assert "This picture minus the average over 8 pictures" in page.inner_text("#show-text")
                shot(page, "difference", full_page=True)
        assert len(seen) == 3
        page.click(".samples li:nth-child(5) button")
        page.wait_for_selector(".samples li:nth-child(5) button[aria-pressed=true]")
        page.locator("label:has(input[value=average])").click()
        drawn(page)
        best = caption(page)
        page.click(".samples li:nth-child(6) button")
        page.wait_for_selector(".samples li:nth-child(6) button[aria-pressed=true]")
        drawn(page)
        assert caption(page) == best  # the average is that of no picture


def test_sliders_play_and_keyboard(browser, here):
    with opened(browser, here[0]) as page:
        ready(page)
        page.locator("#block").fill("2")
        page.wait_for_selector(".film button:nth-child(3)[aria-pressed=true]")
        assert page.inner_text("#block-text") == "3 of 3 · 4 × 4 tokens"
        page.locator("#segment").fill("4")
        page.locator("#block").fill("0")
        page.wait_for_selector(".film button:nth-child(1)[aria-pressed=true]")
        assert page.inner_text("#segment-text") == "2 of 2"  # as many as this block has
        page.click("#play")
        for number in (2, 3):
            page.wait_for_selector(f".film button:nth-child({number})[aria-pressed=true]")
        page.wait_for_selector("#play[aria-pressed=false]")
        page.click(".film button:nth-child(2)")
        page.focus(".picker")
        page.mouse.move(2, 2)
        page.keyboard.press("Home")
        for key in ["ArrowUp"] * 9 + ["ArrowRight", "ArrowRight", "ArrowDown"]:
            page.keyboard.press(key)
        drawn(page)
        assert "Token in row 2, column 3 of 8 × 8" in caption(page)
        page.keyboard.press("PageDown")
        drawn(page)
        assert "Token in row 1, column 2 of 4 × 4" in caption(page)
        page.wait_for_selector("#spoken:has-text('Token in row 1, column 2')", state="attached")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('.film') !== null")


def test_a_click_holds_the_token(browser, here):
    with opened(browser, here[0]) as page:
        ready(page)
        point(page, 1, 1, (8, 8))
        page.mouse.down()
        page.mouse.up()
        point(page, 6, 6, (8, 8))
        drawn(page)
        assert "row 2, column 2" in caption(page)
        page.mouse.down()
        page.mouse.up()
        drawn(page)
        assert "row 7, column 7" in caption(page)


def test_two_pictures_side_by_side_in_the_dark(browser, here, tmp_path):
    address, service = here
    (tmp_path / "mine.jpg").write_bytes(encoded := picture(33))
    with opened(browser, address, color_scheme="dark") as page:
        ready(page)
        page.wait_for_selector(AVERAGE, state="attached")
        page.click("#compare")
        ready(page, 2)
        page.set_input_files(".panel:nth-child(2) input[type=file]", tmp_path / "mine.jpg")
        expected = service.classifier._infer([service.classifier._prepare(encoded, False).tensor])[0]
        best = service.classifier.classes[expected.index(max(expected))]
        page.wait_for_selector(f".panel:nth-child(2) .top li:first-child:has-text('{best}')")
        page.wait_for_selector(".panel:nth-child(2) .samples:not(:has([aria-pressed=true]))")
        point(page, 4, 2, (8, 8), number=2)
        drawn(page)
        first, second = caption(page, 1), caption(page, 2)
        assert first.startswith("Token in row 5, column 3")
        assert second.startswith("Token in row 5, column 3")
        assert first != second
        left, right = (page.locator(f".panel:nth-child({n})").bounding_box() for n in (1, 2))
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] < right["x"]
        assert accessible(page) == []
        shot(page, "two-dark", full_page=True)
        page.click("#compare")
        assert page.locator(".panel").count() == 1


def test_a_phone(browser, here):
    with opened(browser, here[0], viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2) as page:
        ready(page)
        page.wait_for_selector(AVERAGE, state="attached")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        box = page.locator(".picker").bounding_box()
        page.touchscreen.tap(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.1)
        drawn(page)
        assert "Token in row 1, column 6" in caption(page)
        small = page.locator("button:visible").evaluate_all(
            "list => list.filter(b => b.getBoundingClientRect().height < 40).length"
        )
        assert small == 0
        assert accessible(page) == []
        shot(page, "phone")
        page.click("#compare")
        ready(page, 2)
        first, second = (page.locator(f".panel:nth-child({n})").bounding_box() for n in (1, 2))
        assert second["y"] > first["y"] + first["height"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def drop(page, *files):
    encoded = [base64.b64encode(content).decode() for content in files]
    made = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const data of files) transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "x"));
            return transfer;
        }""",
        encoded,
    )
    page.dispatch_event(".panel", "drop", {"dataTransfer": made})


def test_dropped_files_and_what_is_wrong_with_them(browser, model):
    with (
        server_here(model, max_bytes=60_000) as (address, service),
        opened(browser, address, errors=["Failed to load resource"]) as page,
    ):
        ready(page)
        before = page.inner_text(".top")
        for content, words in (
            (b"hello", "The picture is in none of the formats that are accepted"),
            (picture(3)[:900], "The picture is damaged"),
            (bytes(70_000), "The file has 70,000 bytes; at most 60,000 are accepted"),
        ):
            drop(page, content)
            page.wait_for_selector(f".panel .error:has-text('{words}')")
            assert page.inner_text(".top") == before  # the last good picture stays
        assert accessible(page) == []
        shot(page, "error", full_page=True)
        drop(page)
        page.wait_for_selector(".panel .error:has-text('is not a file')")
        drop(page, encoded := picture(8))
        page.wait_for_selector(".panel .error", state="hidden")
        expected = service.classifier._infer([service.classifier._prepare(encoded, False).tensor])[0]
        page.wait_for_selector(f".top li:first-child:has-text('{100 * max(expected):.1f} %')")
        service.not_ready = "the model is warming up."
        drop(page, picture(9))
        page.wait_for_selector(".panel .error:has-text('The model is warming up.')")
        page.route("**/v1/mixing*", lambda route: route.abort())
        drop(page, picture(9))
        page.wait_for_selector(".panel .error:has-text('The server did not answer')")


ODD = {
    "static": ({"generator": "static"}, "trained and fixed"),
    "no softmax": ({"softmax": False}, "no softmax"),
    "columns": ({"row": False}, "columns only"),
    "rectangle": ({"img_size": (48, 80), "column": False, "reweight": False}, "rows only"),
    "overhanging": ({"img_size": 60, "enlarge": True, "stem": "overlap"}, ""),
    "other": ("resnet10t", "not a DynaMixer"),
}


def test_a_model_with_too_many_weights_for_a_page_shows_its_classes_on_a_phone_too(browser, model, monkeypatch):
    monkeypatch.setattr(classifier, "MOST_NUMBERS", 100)
    with server_here(model) as (address, _), opened(browser, address, viewport=PHONE) as page:
        page.wait_for_selector(".top li")
        assert "too many for one page" in page.inner_text("#notes")
        for hidden in ("#controls", "#lead", ".film", ".row-bars", ".caption"):
            assert not page.locator(hidden).is_visible()
        assert page.locator(".picture").bounding_box()["width"] > 200
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.wait_for_selector("#spoken:has-text('percent')", state="attached")
        shot(page, "too-many-weights", full_page=True)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ODD)
def test_models_of_any_kind(browser, tmp_path, kind):
    options, note = ODD[kind]
    path = tmp_path / "model.safetensors"
    path = write_model(path, options) if isinstance(options, str) else write_model(path, **options)
    with server_here(path) as (address, _), opened(browser, address) as page:
        page.wait_for_selector(".top li")
        assert note in (page.inner_text("#notes") if note else "")
        if kind == "other":
            assert not page.locator(".film").is_visible()
            shot(page, "other-model", full_page=True)
            return
        ready(page)
        page.wait_for_selector(AVERAGE, state="attached")
        for name in ("difference", "average", "picture"):
            page.locator(f"label:has(input[value={name}])").click()
        box = page.locator(".picker").bounding_box()
        grid = {"rectangle": (6, 10)}.get(kind, (8, 8))
        page.locator(".picker").hover(position={"x": box["width"] - 2, "y": box["height"] - 2})
        drawn(page)
        assert f"Token in row {grid[0]}, column {grid[1]} of {grid[0]} × {grid[1]}" in caption(page)
        if kind == "static":
            assert "0\xa0% of it lies elsewhere" in caption(page)
        if kind == "no softmax":
            assert re.search(r"\([−]?\d\.\d\d\)", caption(page))
            assert accessible(page) == []
        if kind == "columns":
            assert "Its row is not mixed by this model." in caption(page)
        if kind == "rectangle":
            assert not page.locator(".branches").is_visible()
            assert abs(box["width"] / box["height"] - 80 / 48) < 0.02
        page.focus(".picker")
        page.keyboard.press("End")
        for key in ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowRight"]:
            page.keyboard.press(key)
        drawn(page)
        assert f"Token in row {grid[0]}, column {grid[1]}" in caption(page)
        shot(page, f"model-{kind.replace(' ', '-')}", full_page=True)
