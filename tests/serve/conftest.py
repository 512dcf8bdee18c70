import os
import shutil

import pytest

from serve.world import server_here, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("serve") / "small.safetensors")


@pytest.fixture(scope="session")
def here(model):
    """A server in this process, shared by tests that leave it as it was: (address, service)."""
    with server_here(model) as made:
        yield made


@pytest.fixture(scope="session")
def browser():
    """Debian's chromium, without its sandbox for root and without anything that it would ask of the network."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        message = "the page is tested in chromium, which this machine lacks: apt-get install chromium, or set CHROMIUM"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
             "--disable-sync", "--no-first-run"]  # fmt: skip
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=quiet)
        yield made
        made.close()
