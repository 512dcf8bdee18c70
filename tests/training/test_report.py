import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from dynamixer.errors import RunError
from dynamixer.training.report import write_report

EMPTY = {"summary": {}, "config": {}, "rows": [], "figures": []}


class Page(HTMLParser):
    """What a browser would find: tags in order, words, and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.words.append(data.strip())

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def png(colour):
    out = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(out, format="PNG")
    return out.getvalue()


def written(tmp_path, **changes):
    path = tmp_path / "run" / "report.html"
    write_report(path, title=changes.pop("title", "a run"), **(EMPTY | changes))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return page, text


def test_the_page_says_everything_it_is_given(tmp_path):
    page, _ = written(
        tmp_path,
        title="nano on fashion",
        summary={"top-1": "91.2 %", "loss": 0.25312, "parameters": 3212345, "time": None},
        config={"lr": 0.001, "sizes": (48, 64), "model_args": {"softmax": False}, "limit_train": 100000, "size": None},
        rows=[{"epoch": 1, "train_loss": 2.30259}, {"epoch": 2, "train_loss": None, "val_top1": 50.0}],
        figures=[("Curves", "by epoch", png("red")), ("Sheet", "", png("blue"))],
    )
    dash = "\N{EN DASH}"
    body = [word for word in page.words if "{ --paper" not in word]
    assert body == [
        "nano on fashion", "nano on fashion",
        "top-1", "91.2 %", "loss", "0.2531", "parameters", "3,212,345", "time", dash,
        "Curves", "by epoch", "Sheet",
        "Epochs", "epoch", "train_loss", "val_top1", "1", "2.303", dash, "2", dash, "50",
        "Configuration", "lr", "0.001", "sizes", "[48, 64]", "model_args", '{"softmax": false}',
        "limit_train", "100000", "size", dash,
    ]  # fmt: skip
    images = page.all("img")
    assert [image["alt"] for image in images] == ["Curves: by epoch", "Sheet"]
    for image, colour in zip(images, [(255, 0, 0), (0, 0, 255)], strict=True):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data, validate=True))).getpixel((0, 0)) == colour


def test_the_page_stands_alone(tmp_path):
    page, text = written(tmp_path, figures=[("a", "b", png("red"))], rows=[{"epoch": 1}])
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "embed", "a"})
    assert not re.search(r"https?:|url\(|@import|//", re.sub(r"base64,[^\"]*", "", text))
    addresses = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data") if key in a]
    assert all(address.startswith("data:") for address in addresses)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in text
    (box,) = [a for a in page.all("div") if a.get("class") == "box"]
    assert box["tabindex"] == "0"


def test_nothing_of_what_is_given_becomes_html(tmp_path):
    evil = "<script>alert('\"x\"')</script>&amp;"
    plain, _ = written(
        tmp_path,
        title="t",
        summary={"s": "s"},
        config={"c": ["c"]},
        rows=[{"r": "r"}],
        figures=[("f", "f", png("red"))],
    )
    page, _ = written(
        tmp_path,
        title=evil,
        summary={evil: evil},
        config={evil: [evil]},
        rows=[{evil: evil}],
        figures=[(evil, evil, png("red"))],
    )
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.words.count(evil) == 9  # title, summary, figure and rows: twice each; key of the config
    assert page.all("img")[0]["alt"] == f"{evil}: {evil}"


def test_names_with_broken_bytes_are_written(tmp_path):
    page, _ = written(tmp_path, config={"data": "photos/\udcff"})
    assert "photos/?" in page.words


def test_sections_without_content_are_left_out(tmp_path):
    page, _ = written(tmp_path)
    assert [tag for tag, _ in page.tags if tag in ("section", "table", "dl", "h2")] == []


def test_the_page_is_whole_or_the_one_before(tmp_path, monkeypatch):
    written(tmp_path, title="before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RunError, match="no space left"):
        write_report(tmp_path / "run" / "report.html", title="after", **EMPTY)
    assert "before" in (tmp_path / "run" / "report.html").read_text()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.html"]
