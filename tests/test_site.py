"""The site of docs/: built strictly, whole, and without a request to others."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest
from sphinx.util.inventory import InventoryFile

import dynamixer
import dynamixer.cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
STRICT = ("-W", "-n", "--keep-going", "-q")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", *STRICT, "-d", folder / "doctrees", DOCS, folder / "html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / "html"


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors it has."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors, self.text = [], [], set(), path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs["id"]} if "id" in attrs else set()
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        elif tag in ("img", "script", "source") and "src" in attrs:
            self.loads.append(attrs["src"])
        elif tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "search", "index"):
            self.loads.append(attrs["href"])


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_make_docs_is_as_strict_as_this():
    (line,) = re.findall(r"^docs:.*\n\t(.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(STRICT) - {"-q", "--keep-going"} <= set(line.split())
    assert line.endswith("docs build/site")


def test_no_link_and_no_picture_leads_nowhere(pages):
    dead = []
    for path, page in pages.items():
        for target in page.links + page.loads:
            parts = urlsplit(target)
            if parts.scheme in ("http", "https"):
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchored = not parts.fragment or to.suffix != ".html" or parts.fragment in pages[to].anchors
            if parts.scheme or not to.is_file() or not anchored:
                dead.append(f"{path.name}: {target}")
    assert not dead
    assert sum(len(page.links) for page in pages.values()) > 500  # it does look at something


def test_nothing_is_loaded_from_elsewhere(pages):
    assert not [url for page in pages.values() for url in page.loads if urlsplit(url).netloc]


def test_every_public_name_has_an_entry(site):
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    documented = {name for kind in inventory.data if kind.startswith("py:") for name in inventory.data[kind]}
    assert not {f"dynamixer.{name}" for name in dynamixer.__all__} - documented


def commands(group, *words):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *words, name)
        else:
            yield " ".join((*words, name)), command


def test_every_command_and_option_is_shown(site):
    page = Page(site / "commands.html")
    for words, command in commands(dynamixer.cli.cli):
        assert f"dynamixer {words}" in page.text
        start = page.text.index(f"Usage: dynamixer {words} ")
        shown = page.text[start : page.text.index("Exit codes", start)]
        assert all(name in shown for option in command.params for name in option.opts if name.startswith("--"))


def test_every_page_is_in_the_navigation(site, pages):
    sidebar = pages[site / "index.html"].text.split("sidebar-tree")[1].split("</aside>")[0]
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix(".html").as_posix()
        assert f'href="{name}"' in sidebar or name == "index.html", name
