"""`dynamixer explain` as a user types it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynamixer.cli import main
from dynamixer.explain import report
from small_models import BAG, EXAMPLES, saved


@pytest.fixture(autouse=True)
def _signals():
    """`main` installs a handler for SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_one_object_on_stdout_and_everything_else_on_stderr(tmp_path):
    model = saved(tmp_path)
    words = ["explain", BAG, "--model", model, "--json", "--token", "5,6", "--blocks=-1", "--device", "cpu"]
    command = [sys.executable, "-m", "dynamixer", *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "device: cpu" in done.stderr
    assert found["token"] == [5, 6]
    assert found["files"][-1] == os.path.join("explain-bag", "report.html")
    assert (tmp_path / found["files"][-1]).is_file()
    assert [Path(f).name for f in found["files"] if "token" in f] == ["token-02.png"]
    assert found["receptive"]["block"] == 2
    assert found["pictures"] == 0


def called(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return ended.value.code, out, err


def test_the_text_says_the_same_in_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "write_page", lambda folder, *_: [str(folder / "report.html")])
    model = saved(tmp_path, softmax=False)
    code, out, _ = called(capsys, "explain", BAG, "--model", model, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0
    lines = out.splitlines()
    assert lines[1].startswith("token 4,4: rank correlation of rollout and gradient 0.")
    assert "no softmax" in lines[2]
    assert lines[3].split() == ["block", "grid", "entropy", "entropy", "weight", "weight", "weight"]
    assert lines[4].split() == ["row", "column", "column", "row", "channel"]
    assert [line.split()[:2] for line in lines[5:8]] == [["0", "8x8"], ["1", "4x4"], ["2", "4x4"]]
    assert lines[-1].endswith("report.html")
    code, out, _ = called(
        capsys, "explain", BAG, "--model", model, "--pictures", EXAMPLES, "--limit", 4, "--device", "cpu"
    )
    assert code == 0
    assert out.splitlines()[3].split()[-4:] == ["dynamic", "dynamic", "change", "change"]
    assert out.splitlines()[8] == "measured over 4 pictures, 0 could not be read"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "MODEL", "--token", "3"], "'3' is not 2 whole numbers"),
        (["--model", "MODEL", "--token", "a,b"], "'a,b' is not 2 whole numbers"),
        (["--model", "MODEL", "--token", "99,0"], "there is no token (99, 0)"),
        (["--model", "MODEL", "--blocks", "one"], "'one' is not whole numbers"),
        (["--model", "MODEL", "--blocks", "9"], "there is no block 9"),
        (["--model", "MODEL", "--limit", "1"], "1 is not in the range"),
    ],
)
def test_a_mistake_is_one_sentence_and_ends_with_2(tmp_path, capsys, words, said):
    words = [saved(tmp_path) if word == "MODEL" else word for word in words]
    code, out, err = called(capsys, "explain", BAG, "--out", tmp_path / "out", *words)
    assert code == 2
    assert out == ""
    assert said in err


def test_a_full_disk_ends_with_1(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    model = saved(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    code, _, err = called(capsys, "explain", BAG, "--model", model, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 1
    assert "there is no space left on the disk" in err
    assert not list((tmp_path / "out").iterdir())


def test_help_names_every_picture(capsys):
    code, out, _ = called(capsys, "explain", "--help")
    assert code == 0
    for name in ("picture", "receptive", "token-NN", "matrices-NN", "branches", "entropy", "dynamic"):
        assert f"{name}.png" in out
    assert "Exit codes: 0 done" in out
