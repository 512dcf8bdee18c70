"""What the page says where a token is asked for, where a proxy answers, and where answers come late."""

import contextlib
from dataclasses import replace

from playwright.sync_api import Error

from serve.test_page import accessible, drop, opened, ready
from serve.world import picture, server_here


def give(page, token):
    page.fill("#token-value", token)
    page.keyboard.press("Enter")


def test_a_token_is_asked_for_on_the_page(browser, model):
    with (
        server_here(model, token="a long enough secret") as (address, _),
        opened(browser, address, errors=["401"]) as page,
    ):
        page.wait_for_selector("#token-value")
        assert not page.is_visible("#token-error")
        assert not page.is_visible("text=API description")  # no link carries the token
        assert accessible(page) == []
        give(page, "wrong")
        page.wait_for_selector("#token-error:has-text('This is not the token that the server asks for.')")
        assert accessible(page) == []
        give(page, "№ 1, but no token")
        page.wait_for_selector("#token-error:has-text('letters that cannot be sent')")
        assert page.evaluate("sessionStorage.getItem('token')") is None
        give(page, "a long enough secret")
        ready(page)
        page.reload()
        ready(page)
        assert not page.is_visible("#token")
        assert not page.is_visible("text=API description")


def test_another_token_is_asked_for_later(browser, model):
    with (
        server_here(model, token="a long enough secret") as (address, service),
        opened(browser, address, errors=["401"]) as page,
    ):
        page.wait_for_selector("#token-value")
        give(page, "a long enough secret")
        ready(page)
        service.guard.settings = replace(service.settings, token="quite another secret")
        page.click(".samples li:nth-child(3) button")
        page.wait_for_selector("#token-error:has-text('This is not the token')")
        assert not page.is_visible(".panel .error")
        give(page, "quite another secret")
        page.wait_for_selector("#token", state="hidden")
        ready(page)
        page.click("#compare")
        ready(page, 2)  # pressed once, done once
        assert page.locator(".panel").count() == 2


def test_what_a_proxy_answers_is_told_by_its_number(browser, here):
    with opened(browser, here[0], errors=["Failed to load resource"]) as page:
        ready(page)
        assert page.is_visible("text=API description")
        for status, kind, body in (
            (413, "text/html", "<h1>no</h1>"),
            (502, "application/json", '{"detail": "no"}'),
            (504, "application/json", "null"),
        ):
            answer = {"status": status, "content_type": kind, "body": body}
            page.route("**/v1/mixing*", lambda route, _, answer=answer: route.fulfill(**answer))
            drop(page, picture(9))
            page.wait_for_selector(f".panel .error:has-text('The server answered {status}.')")


def test_a_sample_that_arrives_late_does_not_replace_the_next(browser, here):
    with opened(browser, here[0]) as page:
        ready(page)
        held = []

        def hold(route):
            held.append(route)

        page.route("**/v1/samples/1", hold)
        page.click(".samples li:nth-child(2) button")
        while not held:
            page.wait_for_timeout(20)
        page.click(".samples li:nth-child(3) button")
        page.wait_for_selector(".samples li:nth-child(3) button[aria-pressed=true]")
        with contextlib.suppress(Error):  # the page does not wait for it any more
            held[0].continue_()
        page.wait_for_timeout(500)
        assert page.get_attribute(".samples li:nth-child(3) button", "aria-pressed") == "true"
        assert page.get_attribute(".panel", "aria-busy") is None
