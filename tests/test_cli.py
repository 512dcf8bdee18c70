"""The commands as a user types them, in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dynamixer
from dynamixer.cli import cli, main
from dynamixer.cli.common import print_result

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "pictures"
SMALL = [
    "model.patch_size=8",
    "model.depths=[1,1]",
    "model.dims=[16,32]",
    "model.segments=[2,4]",
    "lr=5e-3",
    "crop=none",
]
QUICK = [*SMALL, "device=cpu", "epochs=1", "limit_train=256", "warmup_epochs=0"]


def start(*words, **options):
    command = [sys.executable, "-m", "dynamixer", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(autouse=True)
def _signals():
    """`main` installs a handler for SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def call(*words, **options):
    process = start(*words, **options)
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in err, err
    return process.returncode, out, err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    code, stdout, stderr = call("train", "fashion_nano", *QUICK, "epochs=3", "limit_train=2000", "--out", out, "--json")
    assert code == 0, stderr
    return out, json.loads(stdout), stderr


def test_train_prints_one_object_and_talks_on_stderr(run):
    out, result, stderr = run
    assert result["run"] == str(out)
    assert 0 < result["top1"] < 100
    assert result["top5"] >= result["top1"]
    assert "device: cpu" in stderr
    assert "epoch 3/3" in stderr
    assert (out / "best.safetensors").is_file()


def test_eval_reads_the_run_folder(run, tmp_path):
    out, result, _ = run
    code, stdout, _ = call("eval", out, "--data", "fashion-mnist-mini", "--json", "--out", tmp_path / "c.png")
    measured = json.loads(stdout)
    assert code == 0
    assert measured["images"] == 2000
    assert abs(measured["top1"] - result["top1"]) < 12
    assert np.asarray(Image.open(tmp_path / "c.png").convert("L")).std() > 10
    code, stdout, _ = call("eval", out / "last.safetensors", "--data", "fashion-mnist-mini", "--size", 32)
    assert code == 0
    assert stdout.startswith("top-1 ")


def test_predict_gives_probabilities_and_a_sheet(run, tmp_path):
    out, _, _ = run
    code, stdout, stderr = call(
        "predict", EXAMPLES, "--model", out, "--json", "--sheet", tmp_path / "sheet.png", "--top", 3
    )
    found = json.loads(stdout)
    assert code == 0
    assert len(found["results"]) == 10
    assert found["errors"] == []
    for result in found["results"]:
        shares = [guess["probability"] for guess in result["top"]]
        assert len(shares) == 3
        assert shares == sorted(shares, reverse=True)
        assert 0.3 / 10 < sum(shares) <= 1.0001
    right = [Path(r["path"]).stem == r["top"][0]["label"].lower().replace(" ", "-") for r in found["results"]]
    assert sum(right) >= 3  # chance is one
    assert np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).std() > 10
    assert "sheet" in stderr


def test_a_bad_picture_is_reported_and_the_others_are_classified(run, tmp_path):
    out, _, _ = run
    (tmp_path / "broken.png").write_bytes(b"oops")
    code, stdout, stderr = call("predict", EXAMPLES / "bag.png", tmp_path / "broken.png", "--model", out, "--json")
    found = json.loads(stdout)
    assert code == 2
    assert [Path(r["path"]).name for r in found["results"]] == ["bag.png"]
    assert "broken.png is not a picture" in found["errors"][0]
    assert "error: " in stderr


def test_models_lists_sizes():
    code, stdout, _ = call("models", "--json")
    rows = {row["model"]: row for row in json.loads(stdout)["models"]}
    assert code == 0
    assert rows["dynamixer_s"]["parameters"] == 26_265_960
    assert rows["dynamixer_l"]["multiply_adds"] == 27_343_441_920
    assert set(rows) == {f"dynamixer_{size}" for size in ("nano", "nano_plus", "tiny", "s", "m", "l")}
    code, stdout, _ = call("models", "*_s")
    assert "26,265,960" in stdout
    assert "dynamixer_m" not in stdout


def test_a_model_of_a_plug_in_that_cannot_be_counted_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(dynamixer, "plugin_models", ["resnet10t", "not_there"])
    cli.main(["models", "[rn]*", "--json"], standalone_mode=False)
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["models"]
    assert (row["model"], row["parameters"]) == ("resnet10t", 5_435_488)
    assert "not_there cannot be counted: UserError: " in err


@pytest.mark.parametrize(
    "command",
    [[], ["data", "verify"], *([name] for name in cli.commands)],
)
def test_every_command_explains_itself(command):
    code, stdout, _ = call(*command, "--help")
    assert code == 0
    assert re.search("Exit codes: 0 (done|stopped)", stdout)
    if command == ["train"]:
        assert "fashion_nano" in stdout
        assert "label_smoothing=0.1" in stdout


def test_a_number_that_is_none_is_null_in_json(capsys):
    print_result(True, {"loss": float("nan"), "rows": [{"a": float("inf")}, (1.5, 2)], "text": "NaN"}, "")
    assert capsys.readouterr().out == '{"loss": null, "rows": [{"a": null}, [1.5, 2]], "text": "NaN"}\n'


def test_data_verify_finds_what_is_wrong(tmp_path):
    for split, seed in (("train", 0), ("test", 2)):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / "flowers" / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9), (seed + i, 0, 0)).save(tmp_path / "flowers" / split / name / "a.png")
    code, stdout, _ = call("data", "verify", "flowers", cwd=tmp_path)
    assert code == 0
    assert stdout == "4 pictures: 0 errors, 0 notes\nmanifest: flowers-manifest.jsonl\n"
    assert len((tmp_path / "flowers-manifest.jsonl").read_text().splitlines()) == 4

    train = tmp_path / "flowers" / "train" / "cat"
    Image.new("CMYK", (9, 9)).save(train / "ink.jpg")
    Image.effect_noise((99, 99), 50).save(train / "noise.png")
    (train / "cut.png").write_bytes((train / "noise.png").read_bytes()[:3000])
    (train / "empty.png").touch()
    (train / "page.png").write_text("<html>")
    (train / "named.jpg").write_bytes((train / "a.png").read_bytes())
    (tmp_path / "flowers" / "test" / "dog" / "leak.png").write_bytes((train / "noise.png").read_bytes())
    code, stdout, _ = call("data", "verify", "flowers", "--json", "--out", "m.jsonl", "--workers", "1", cwd=tmp_path)
    found = json.loads(stdout)
    assert code == 1
    assert found["findings"] == {
        "cmyk": 1, "duplicate": 1, "empty": 1, "in-two-splits": 1, "not-a-picture": 1, "truncated": 1, "wrong-suffix": 1,
    }  # fmt: skip
    assert (found["pictures"], found["errors"], found["notes"], found["manifest"]) == (11, 4, 3, "m.jsonl")
    assert found["examples"]["in-two-splits"] == ["flowers/test/dog/leak.png"]
    code, stdout, _ = call("data", "verify", "flowers", cwd=tmp_path)
    assert code == 1
    assert "error truncated             1  " in stdout
    assert "flowers/train/cat/cut.png\n" in stdout


def test_without_a_model_the_one_that_ships_answers_and_is_named():
    code, stdout, stderr = call("predict", ROOT / "src/dynamixer/serve/photos/palace.jpg", "--json")
    assert code == 0
    (result,) = json.loads(stdout)["results"]
    assert {guess["label"] for guess in result["top"]} < set(dynamixer.load("dynamixer_tiny").classes)
    assert "model: dynamixer_tiny, whose weights ship, which knows tench, English springer" in stderr


def test_the_version_is_the_packages():
    assert dynamixer.__version__ in call("--version")[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "fashion_nan"], "unknown recipe 'fashion_nan': did you mean 'fashion_nano'?"),
        (["train", "epoch=3"], "unknown key 'epoch': did you mean 'epochs'?"),
        (["train", "model=dynamixer_x"], "unknown model 'dynamixer_x': did you mean"),
        (["train", "device=tpu"], "unknown device 'tpu'"),
        (["train", "device=xpu" if torch.cuda.is_available() else "device=cuda"], "device that torch can use"),
        (["train", "--data", "nowhere"], "no file or folder nowhere"),
        (["eval", "nowhere", "--data", "fashion-mnist-mini"], "there is no nowhere"),
        (["eval", "dynamixer_s", "--data", "fashion-mnist-mini"], "dynamixer_tiny, none for dynamixer_s: train it"),
        (["predict", "x.png", "--model", "nowhere"], "there is no nowhere"),
        (["predict", "x.png", "--model", str(ROOT / "README.md")], "not a whole safetensors file"),
        (["predict"], "Missing argument"),
        (
            ["predict", "x.png", "--size", "96x"],
            "'96x' is no size in pixels, such as 160, or 96x160 for height and width",
        ),
        (["eval", "x", "--data", "y", "--size", "0"], "'0' is no size in pixels"),
        (["explain", "x.png", "--limit", "3"], "--limit says how --pictures are read: give those too"),
        (["bench", "--ways", "--no-fast"], "--ways has no use for --no-fast"),
        (["bench", "--train-batch", "2", "--no-train"], "--train-batch has no use for --no-train"),
        (["data", "verify", "nowhere"], "no file or folder nowhere"),
        (["data", "verify"], "Missing argument"),
        (["data", "verfy"], "No such command 'verfy'"),
        (["models", "dynamixer_xx"], "no model matches"),
        (["reproduce", "--pages", "docs", "--results", "nowhere"], "nowhere has no results (runs.csv)"),
        (["trian"], "No such command 'trian'"),
        (["predict", "x.png", "--model", "y", "--sheet", "sheet.jpg"], "has to end in .png"),
        (["predict", "x.png", "--model", "y", "--embeddings"], "go with --out"),
        (["predict", "x.png", "--model", "y", "--hub", "me/y"], "give one of them"),
        (["predict", "x.png", "--model", "y", "--out", "p.csv"], "end in .parquet"),
        (["predict", "x.png", "--hub", "me"], "has to be hf-hub:OWNER/NAME"),
        (["export", "nowhere"], "there is no nowhere"),
        (["export", "x", "--format", "hub", "--int8"], "--int8 has no meaning for --format hub"),
        (["export", "x", "--int8"], "give format=openvino"),
        (["push", "x", "me"], "has to be OWNER/NAME"),
        (["eval", "x", "--data", "y", "--out", "z"], "has to end in .png"),
        (["eval", "x" * 300, "--data", "y"], "name too long"),
        (["eval", "x", "--data", "y", "--sizee", "3"], "No such option"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert sentence in printed.err
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


def test_classes_that_do_not_match_are_refused(run, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "a.png")
    code, _, stderr = call("eval", run[0], "--data", tmp_path)
    assert code == 2
    assert "has 2 classes that" in stderr
    assert "'cat'" in stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_with_its_exit_code(number, code, tmp_path):
    # A suite that was itself started in the background hands SIGINT down as ignored.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = start("train", *SMALL, "epochs=500", "--out", tmp_path / "run", **heard)
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "metrics.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert dynamixer.load(tmp_path / "run").trained["epoch"] >= 1
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_a_full_disk_is_a_sentence_exit_code_1_and_no_half_file(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        code, stdout, stderr = call("train", *QUICK, "--out", disk / "run", "--json")
        assert code == 1
        assert stdout == ""
        assert "could not be written" in stderr
        assert "space" in stderr
        assert {p.name for p in (disk / "run").iterdir()} <= {"config.yaml", "environment.json", "last.safetensors"}
        for whole in (disk / "run").glob("*.safetensors"):
            dynamixer.load(whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_closed_pipe_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamixer", "models", "*_nano"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "Traceback" not in stderr


def test_many_pictures_and_exports_from_the_command_line(run, tmp_path):
    out, _, _ = run
    rows = tmp_path / "p.parquet"
    code, stdout, stderr = call("predict", EXAMPLES, "--model", out, "--out", rows, "--embeddings", "--json")
    assert (code, json.loads(stdout)["predicted"]) == (0, 10), stderr
    nearest = [
        sys.executable,
        ROOT / "examples/nearest.py",
        rows,
        tmp_path / "n.png",
        *sorted(EXAMPLES.glob("*.png"))[:2],
    ]
    subprocess.run(nearest, check=True)
    assert np.asarray(Image.open(tmp_path / "n.png").convert("L")).std() > 10
    for kind, name in (("hub", "h"), ("pt2", "m.pt2")):
        code, stdout, stderr = call("export", out, "--format", kind, "--out", tmp_path / name, "--json")
        assert (code, isinstance(json.loads(stdout), dict)) == (0, True), stderr
        assert (tmp_path / name).exists()
