"""The queue: stopped, killed, gone on with, with failing runs. Most tests with children that take no time, one with real ones."""

import contextlib
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from dynamixer import UserError
from dynamixer.data.sources import open_data
from dynamixer.study import queue
from dynamixer.study.jobs import Place, place_of
from dynamixer.study.queue import _all_of, held, study
from dynamixer.study.results import Results
from dynamixer.study.rows import Run, config_of, runs
from dynamixer.training.config import values_of

ROOT = Path(__file__).parents[2]
WANTED = [Run("cifar10", row, seed) for seed in (0, 1) for row in ("dynamic", "static", "dense")]
EMBEDDED = "fashion-mnist-mini"
TINY = [
    "model.patch_size=8", "model.depths=[1,1]", "model.dims=[16,32]", "model.segments=[2,4]", "limit_train=128",
    "batch_size=32", "warmup_epochs=0", "kernel=off", "holdout=0.02",
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "CHILD", (str(Path(__file__).with_name("fake_child.py")),))
    monkeypatch.setattr(queue, "POLL", 0.02)
    return Place(tmp_path / "work", {"cifar10": EMBEDDED}, {"cifar10": EMBEDDED})


def go(place, results, wanted=WANTED, *, minutes=1, side_by_side=2, words=()):
    return study(place, results, wanted, minutes=minutes, side_by_side=side_by_side, words=words)


def lines(results, name="runs"):
    return list(csv.DictReader((results / f"{name}.csv").read_text().splitlines()))


def test_all_is_done_and_written_down(place, tmp_path):
    results = tmp_path / "results"
    outcome = go(place, results)
    assert (outcome.done, outcome.left, outcome.failed, outcome.finished) == (6, 0, [], 6)
    assert outcome.without == ["--imagenette", "--corrupted"]
    first = lines(results)[0]
    assert (first["dataset"], first["row"], first["seed"], first["share"]) == ("cifar10", "dense", "0", "100")
    assert (first["epochs"], first["parameters"], first["test_top1"], first["test_loss"]) == ("3", "7", "60.5", "1.0")
    assert (first["val_top1"], first["hours"], first["torch"]) == ("50.667", "0.03", "2")
    assert first["threads"] == str(max(1, queue.cores() // 2))
    assert len(lines(results, "epochs")) == 18
    assert {line["row"] for line in lines(results, "sizes")} == {"dynamic", "static"}
    assert {line["row"] for line in lines(results, "depth")} == {"dynamic", "dense"}  # static matrices do not change
    assert not list(place.work.glob("*/checkpoints"))
    assert go(place, results).done == 0


def test_the_order_is_the_one_asked_for(place, tmp_path, monkeypatch):
    started = []
    start = queue.Queue._start
    monkeypatch.setattr(queue.Queue, "_start", lambda self, job: (started.append(job.run), start(self, job)))
    go(place, tmp_path / "results", side_by_side=1)
    assert list(dict.fromkeys(started)) == WANTED


def test_when_the_time_is_over_all_is_kept(place, tmp_path, monkeypatch):
    undisturbed, results = tmp_path / "undisturbed", tmp_path / "results"
    go(Place(tmp_path / "other", place.train, place.test), undisturbed)
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    legs = 0
    while (outcome := go(place, results, minutes=1.5 / 60)).left:
        legs += 1
        assert outcome.text().startswith(
            f"{outcome.done} runs done now, {outcome.finished} in all, {outcome.left} left"
        )
        assert "The same command goes on." in outcome.text()
        assert legs < 40
    assert legs
    for name in ("runs.csv", "epochs.csv", "sizes.csv", "depth.csv"):
        assert (results / name).read_bytes() == (undisturbed / name).read_bytes()


def test_no_time_is_a_look_at_what_is_left(place, tmp_path):
    outcome = go(place, tmp_path / "results", runs(), minutes=0)
    assert (outcome.done, outcome.left) == (0, len([run for run in runs() if run.dataset == "cifar10"]))
    assert not list(place.work.glob("cifar10*"))


def test_a_run_that_fails_is_named_and_the_rest_goes_on(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAILING", "static-seed1")
    results = tmp_path / "results"
    outcome = go(place, results)
    assert (outcome.done, outcome.failed, outcome.left) == (5, ["cifar10-static-seed1"], 0)
    assert (
        "cifar10-static-seed1 failed with exit code 1: error: cifar10-static-seed1 cannot be trained"
        in capsys.readouterr().err
    )
    monkeypatch.setenv("FAKE_FAILING", "nothing")
    assert go(place, results).done == 1  # what failed is tried again


def test_a_failing_run_ends_the_command_with_1(place, tmp_path, monkeypatch, capsys):
    from dynamixer.cli import main  # noqa: PLC0415

    monkeypatch.setenv("FAKE_FAILING", "seed0")
    words = ["--cifar10", EMBEDDED, "--work", str(place.work), "--results", str(tmp_path / "results"), "--json"]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", *words, "--only", "cifar10-static-seed[01]"])
    signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert json.loads(said.out)["failed"] == ["cifar10-static-seed0"]
    assert said.err.endswith("error: 1 runs failed: cifar10-static-seed0.\n")


def test_runs_on_imagenette_alone_want_no_other_pictures(place, tmp_path, capsys):
    from dynamixer.cli import main  # noqa: PLC0415

    before = signal.getsignal(signal.SIGTERM)
    words = ["--imagenette", EMBEDDED, "--work", str(place.work), "--results", str(tmp_path / "results"), "--json"]
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "--cifar10", "nowhere", *words, "--only", "imagenette-static-seed0"])
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["done"] == 1


def test_what_can_still_be_measured_is(place, tmp_path):
    corrupted = Place(place.work, place.train, place.test, tmp_path)
    results = tmp_path / "results"
    go(place, results)
    (place.work / "cifar10-dynamic-seed0/last.safetensors").unlink()
    outcome = go(corrupted, results)
    assert (outcome.done, outcome.lost) == (3, ["cifar10-dynamic-seed0"])  # dense is not in that part of the table
    assert "the weights are gone: cifar10-dynamic-seed0" in outcome.text()
    assert {(line["row"], line["seed"]) for line in lines(results, "corrupted")} == {
        ("dynamic", "1"), ("static", "0"), ("static", "1"),
    }  # fmt: skip


def test_results_of_another_protocol_are_refused(place, tmp_path):
    go(place, tmp_path / "results", WANTED[:1])
    before = (tmp_path / "results/runs.csv").read_bytes()
    with pytest.raises(
        UserError, match=r"holds 1 results of another protocol, such as cifar10-dynamic-seed0: give the KEY=VALUE words"
    ):
        go(place, tmp_path / "results", WANTED[:1], words=["lr=0.5"])
    assert (tmp_path / "results/runs.csv").read_bytes() == before
    assert go(place, tmp_path / "results", WANTED[:1], words=["workers=1"]).done == 0  # no result depends on it


def test_other_pictures_are_another_study(place, tmp_path):
    go(place, tmp_path / "results", WANTED[:1])
    note = tmp_path / "results/data.json"
    known = json.loads(note.read_text())
    assert known.keys() == {"cifar10", "cifar10, test"}
    for pictures in known:
        note.write_text(json.dumps(known | {pictures: "others"}))
        with pytest.raises(UserError, match=f"holds results of other pictures of {pictures}, or"):
            go(place, tmp_path / "results")
    note.write_text(json.dumps(known))
    assert go(place, tmp_path / "results").done == 5
    shutil.rmtree(tmp_path / "results")
    corrupted = Place(place.work, place.train, place.test, tmp_path)
    (tmp_path / "fog-1.parquet").write_bytes(b"as first made")
    go(corrupted, tmp_path / "results", WANTED[:1])
    (tmp_path / "fog-1.parquet").write_bytes(b"made of others")
    with pytest.raises(UserError, match="holds results of other pictures of cifar10, corrupted, or"):
        go(corrupted, tmp_path / "results")


def test_a_second_queue_is_refused(place, tmp_path):
    with held(place.work), pytest.raises(UserError, match="another queue is at work"):
        go(place, tmp_path / "results")
    assert go(place, tmp_path / "results").done == 6


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        ({"cifar10": "nowhere/at/all"}, "no file or folder"),
        ({"cifar10": "{train}"}, "has no test pictures"),
        ({"cifar10": "{folder}"}, "has no test pictures"),  # but train.parquet, which is no test
    ],
)
def test_pictures_that_are_not_there_are_a_sentence(tmp_path, folders, sentence):
    shipped = ROOT / "src/dynamixer/data/fashion/train.parquet"
    shutil.copy(shipped, tmp_path / "train.parquet")
    named = {k: v.replace("{train}", str(shipped)).replace("{folder}", str(tmp_path)) for k, v in folders.items()}
    with pytest.raises(UserError, match=sentence):
        place_of(named, tmp_path, None)


def test_folders_of_class_folders_are_trained_on_and_tested_by_their_split(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "in" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (9, 9)).save(tmp_path / "in" / split / name / f"{number}.png")
    found = place_of({"imagenette": str(tmp_path / "in")}, tmp_path, None)
    assert len(open_data(found.train["imagenette"]).train) == 6
    assert open_data(found.train["imagenette"]).val is None  # nothing of the test is looked at before
    assert len(open_data(found.test["imagenette"]).for_evaluation()[1]) == 4


def test_an_incomplete_folder_of_corrupted_pictures_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"has no gaussian_noise-1.parquet: benchmarks/corrupt.py makes"):
        place_of({"cifar10": EMBEDDED}, tmp_path, tmp_path)


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):  # before the file is opened, or as it is read
        return False


def test_a_child_ends_with_its_queue(tmp_path):
    child = ROOT / "src/dynamixer/study/child.py"
    inner = f"import os, runpy, time; runpy.run_path({str(child)!r})['follow'](os.getppid())\n"
    inner += "print(os.getpid(), flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {inner!r}], start_new_session=True)"
    process = subprocess.Popen([sys.executable, "-S", "-c", outer], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(pid)


def states(folder):
    """Times of change of what is in a folder, where something may be moved meanwhile."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime
    return found


def reproduce(work, results, *words):
    command = [
        sys.executable,
        "-m",
        "dynamixer",
        "reproduce",
        "--cifar10",
        EMBEDDED,
        "--only",
        "cifar10-stati*[cn]-seed0",
    ]
    command += ["--work", str(work), "--results", str(results), "--jobs", "2", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_killed_stopped_and_gone_on_with_gives_the_results_of_an_undisturbed_one(tmp_path):
    words = [*TINY, "epochs=5", "checkpoint_every=1"]
    undisturbed = reproduce(tmp_path / "work", tmp_path / "results", *words)
    _, said = undisturbed.communicate(timeout=400)
    assert undisturbed.returncode == 0, said

    work, results = tmp_path / "disturbed", tmp_path / "results of disturbed"
    killed = reproduce(work, results, *words)
    end = time.monotonic() + 200
    while not list(work.glob("*/checkpoints/step-*")) and time.monotonic() < end:
        time.sleep(0.2)
    killed.kill()  # -9
    killed.communicate()
    assert not (results / "runs.csv").exists()
    end = time.monotonic() + 20
    before = None
    while before != (before := states(work)):  # its children end
        assert time.monotonic() < end
        time.sleep(2)

    stopped = reproduce(work, results, *words, "--minutes", "0.1")  # that may be before or after a run is done
    _, said = stopped.communicate(timeout=200)
    assert stopped.returncode == 0, said
    resumed = reproduce(work, results, *words)
    _, said = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, said
    assert any("resuming after step" in log.read_text() for log in work.glob("*.log"))

    for name in ("epochs.csv", "sizes.csv"):
        assert (results / name).read_bytes() == (tmp_path / "results" / name).read_bytes()
    one, other = (Results(folder).lines["runs"] for folder in (results, tmp_path / "results"))
    assert [line | {"hours": 0} for line in one] == [line | {"hours": 0} for line in other]
    assert len(one) == 2


def test_a_run_in_several_legs_names_all_that_computed_it():
    about = {"cpu": "new", "threads": 1, "earlier": [{"cpu": "old", "threads": 1}, {"threads": 1}]}
    assert (_all_of(about, "cpu"), _all_of(about, "threads"), _all_of(about, "torch")) == ("old +  + new", "1", "")


@pytest.mark.parametrize("word", ["seed=5", "data=elsewhere", "track=none"])
def test_what_the_study_sets_for_each_run_cannot_be_set_for_all(word):
    with pytest.raises(UserError, match="the study sets it for each"):
        config_of(WANTED[0], "", values_of([word]))


@pytest.mark.parametrize(
    "words", [["--summary", "epochs=3"], ["--times", "--table", "1"], ["--pages", ".", "--only", "x"]]
)
def test_what_is_of_runs_is_refused_where_none_are_run(words, capsys):
    from dynamixer.cli import main  # noqa: PLC0415

    with pytest.raises(SystemExit) as end:
        main(["reproduce", *words])
    assert end.value.code == 2
    assert "take none of them" in capsys.readouterr().err


def test_the_tables_of_any_results_can_be_printed(place, tmp_path, capsys):
    from dynamixer.cli import main  # noqa: PLC0415

    go(place, tmp_path / "results", words=["lr=0.5"])  # another training than the page's
    with pytest.raises(SystemExit) as end:
        main(["reproduce", "--summary", "--results", str(tmp_path / "results")])
    assert not end.value.code
    told = capsys.readouterr().out
    assert "| dynamic |" in told
    assert "hours" not in told
    assert "![" not in told
