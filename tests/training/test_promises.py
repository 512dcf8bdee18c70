"""What training promises: killed, stopped, out of space, on other numbers of processes, it comes to the same bits.

`make promises` runs these in their long form, with the counts that the table in docs/training.md names.
"""

import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

import dynamixer
from dynamixer import RunError
from dynamixer.training import checkpoint as checkpoint_module
from dynamixer.training.checkpoint import Checkpoints, damage, state_of
from dynamixer.training.world import World

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("DYNAMIXER_PROMISES") == "long"
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = ["model.patch_size=8", "model.depths=[1,1]", "model.dims=[16,32]", "model.segments=[2,4]", "warmup_epochs=0"]
EVERYTHING = [
    "mixup=0.4", "cutmix=0.4", "auto_augment=rand-m9-mstd0.5-inc1", "random_erasing=0.25", "drop_path=0.2", "ema=0.95",
    "crop=pad", "model.drop_rate=0.1",
]  # fmt: skip
WRITES = [
    "checkpoint_every=1", "epochs=2", "limit_train=160", "batch_size=32", "lr=5e-3", "holdout=0.02",
    "track=none", "device=cpu",
]  # fmt: skip


def command(out, *words, processes=0, restarts=0):
    python = [sys.executable, "-m"]
    if processes:
        launcher = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            f"--max-restarts={restarts}",
        ]
        python += [*launcher, "-m"]
    return [*python, "dynamixer", "train", "fashion_nano", *TINY, *WRITES, "--out", str(out), "--json", *words]


def start(out, *words, **options):
    return subprocess.Popen(
        command(out, *words, **options),
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no threads here
    )


def finish(out, *words, **options):
    process = start(out, *words, **options)
    stdout, stderr = process.communicate(timeout=3000 if LONG else 240)
    assert process.returncode == 0, stderr[-3000:]
    return json.loads(stdout), stderr


def final(run):
    """Everything that has to be the same to the bit: weights, averages, optimiser, counters, metrics, the choice of the best."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = [run / "best.safetensors", run / "last.safetensors", run / "metrics.csv", last / "manifest.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} | {
        "last": last.name.split(".")[0]
    }


def words(workers, accumulate, *more):
    return [*EVERYTHING, f"workers={workers}", f"accumulate={accumulate}", *more]


SETTINGS = [(0, 1), (2, 4)]  # workers, accumulate


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of a setting that nobody disturbed."""
    made = {}

    def run(setting):
        if setting not in made:
            made[setting] = tmp_path_factory.mktemp("whole") / "run"
            finish(made[setting], *words(*setting))
        return made[setting]

    return run


def newest(out):
    return max((path.name for path in out.glob("checkpoints/step-*")), default="")


def kill_somewhere(process, out, how, rng):
    """kill -9 at any time, some time after a new checkpoint, or while one is being written; returns whether it still ran."""
    seen, writing = newest(out), out / "checkpoints" / ".writing"
    wait = {"any time": rng.uniform(2, 8), "after a step": rng.uniform(0, 0.8), "inside a write": 0}[how]
    while how != "any time" and newest(out) == seen and process.poll() is None:
        time.sleep(0.002)
    deadline = time.perf_counter() + wait
    while time.perf_counter() < deadline or (how == "inside a write" and not writing.exists()):
        if process.poll() is not None:
            process.communicate()
            return False
        time.sleep(0.0002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


@pytest.mark.timeout(7200 if LONG else 1200)
@pytest.mark.parametrize("setting", SETTINGS, ids="workers={0[0]}-accumulate={0[0]}".format)
def test_kill_9_at_any_moment_loses_not_a_bit(whole, setting, tmp_path):
    moments = ["after a step", "any time", "inside a write", "after a step", "after a step"]
    kills, done, inside, rng, run = (50 if LONG else 4), 0, 0, random.Random(0), 0
    while done < kills:
        out = tmp_path / f"run{run}"
        run += 1
        for _ in range(min(5, kills - done)):  # several kills in one run, and within one epoch
            if not kill_somewhere(start(out, *words(*setting)), out, moments[done % 5], rng):
                break
            within = (out / "checkpoints" / ".writing").exists()
            if moments[done % 5] == "inside a write" and not within:
                continue  # the rename was faster: this one does not count
            done += 1
            inside += within
        finish(out, *words(*setting))
        assert final(out) == final(whole(setting))
        assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
        shutil.rmtree(out)
    assert inside >= max(1, kills // 5), "too few kills hit a checkpoint that was being written"


STOPS = [(signal.SIGTERM, 143, SETTINGS[1]), (signal.SIGINT, 130, SETTINGS[1])]  # with workers, which hear it too


@pytest.mark.timeout(3600 if LONG else 600)
@pytest.mark.parametrize(("number", "code", "setting"), STOPS, ids=["SIGTERM", "SIGINT"])
def test_a_signal_leaves_a_checkpoint_within_30_seconds(whole, tmp_path, number, code, setting):
    rng = random.Random(number)
    for attempt in range(10 if LONG else 1):
        out = tmp_path / f"run{attempt}"
        process = start(out, *words(*setting, "checkpoint_every=3"))
        while not newest(out):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4) if LONG else 0)  # without: in the step after the checkpoint
        began = time.perf_counter()
        os.killpg(process.pid, number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == code, stderr
        assert "Traceback" not in stderr
        assert time.perf_counter() - began < 30
        stopped = re.search(r"stopped after step (\d+), with a checkpoint", stderr)
        assert newest(out) == f"step-{int(stopped[1]):08d}"
        _, stderr = finish(out, *words(*setting, "checkpoint_every=3"))
        assert f"resuming after step {stopped[1]}," in stderr
        assert sum(int(row["pictures"]) for row in table(out / "timing.csv")) == 320
        assert final(out) == final(whole(setting))


def test_the_same_configuration_twice_is_the_same_to_the_bit(whole, tmp_path):
    finish(tmp_path / "run", *words(1, 1))  # with another number of workers
    assert final(tmp_path / "run") == final(whole(SETTINGS[0]))


def test_a_finished_run_is_known_at_once_and_nothing_is_decoded(whole):
    out = whole(SETTINGS[0])
    before = final(out)
    result, stderr = finish(out, *words(*SETTINGS[0]))
    assert result["data_wait"] is None
    assert result["steps"] == 10
    assert "resuming after step 10" in stderr
    assert final(out) == before


@pytest.fixture
def saved(tmp_path):
    generator = torch.Generator().manual_seed(0)
    checkpoints = Checkpoints(tmp_path, World(torch.device("cpu")), sharded=False)
    for step in (1, 2, 3):
        tensors = {
            name: torch.randn(64, 3, generator=generator) for name in ("model.a", "ema.a", "optimizer.0.exp_avg")
        }
        checkpoints.save(step, tensors, {"state": {"step": step}})
    return checkpoints


def test_the_last_two_checkpoints_are_kept_without_pickle(saved):
    assert [path.name for path in saved.steps()] == ["step-00000003", "step-00000002"]
    for path in saved.steps():
        assert {p.name for p in path.iterdir()} == {"manifest.json", "state.json", "tensors.safetensors"}
        for file in path.iterdir():
            assert b"pickle" not in file.read_bytes()
            assert not file.read_bytes().startswith((b"\x80", b"PK"))


def test_every_damage_is_found_and_the_checkpoint_before_is_used(saved, capsys):
    rng, newest, older = random.Random(1), *saved.steps()
    whole = {path: path.read_bytes() for path in newest.iterdir()}
    assert damage(newest) is None
    for trial in range(1000):
        path = rng.choice(sorted(whole))
        content = bytearray(whole[path])
        if trial % 2:
            path.write_bytes(content[: rng.randrange(len(content))])
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        assert damage(newest) is not None, path
        path.write_bytes(whole[path])
    assert damage(newest) is None
    path.unlink()
    assert saved.latest() == older
    assert "step-00000003 is damaged" in capsys.readouterr().err
    assert saved.steps() == [older]


def test_a_checkpoint_that_cannot_be_looked_at_is_not_thrown_away(saved, monkeypatch):
    def no_more(_):
        raise OSError(errno.EMFILE, "Too many open files")

    before = saved.steps()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_manifest", no_more)
        with pytest.raises(
            RunError, match="step-00000003 could not be looked at: Too many open files; it stays as it is"
        ):
            saved.latest()
    assert saved.steps() == before
    assert saved.latest() == before[0]


@pytest.mark.parametrize("fault", ["none", "rename"])
def test_a_step_that_is_saved_again_keeps_its_first_checkpoint_until_the_second_is_there(saved, monkeypatch, fault):
    before = saved.steps()
    with monkeypatch.context() as patch:
        if fault == "rename":
            patch.setattr(os, "rename", lambda *paths: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
            with pytest.raises(RunError, match="no space left"):
                saved.save(3, {"model.a": torch.ones(3)}, {"again": True})
    if fault == "rename":
        assert saved.steps() == before
        assert saved.latest() == before[0]
        return
    for again in (1, 2):
        saved.save(3, {"model.a": torch.ones(3)}, {"again": again})
        assert saved.latest().name == f"step-00000003.{again}"
        assert state_of(saved.latest()) == {"again": again}
        assert len(saved.steps()) == 2
    saved.save(4, {"model.a": torch.ones(3)}, {})
    assert saved.latest().name == "step-00000004"


def test_if_all_are_damaged_nothing_is_touched(saved):
    for path in saved.steps():
        (path / "state.json").write_text("{}")
    with pytest.raises(RunError, match=r"every checkpoint in .* is damaged \(step-00000003: .*; step-00000002"):
        saved.latest()
    assert len(saved.steps()) == 2


POINTS = {"open": 4, "fsync": 5, "rename": 1, "mkdir": 1, "save_file": 1}  # how often each is called in one save
ERRORS = (errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS, errno.EDQUOT)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize(("call", "at"), [(call, at) for call, count in POINTS.items() for at in range(count)])
def test_a_fault_while_saving_keeps_the_checkpoint_before(saved, monkeypatch, call, at, number):
    owner = {"open": Path, "mkdir": Path, "save_file": safetensors.torch}.get(call, os)
    real, calls = getattr(owner, call), []

    def faulty(*args, **options):
        calls.append(call)
        if len(calls) == at + 1:
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    before = [(path.name, damage(path)) for path in saved.steps()]
    monkeypatch.setattr(owner, call, faulty)
    with pytest.raises(RunError, match=r"a checkpoint could not be written to \S+: .+; the one before stays"):
        saved.save(4, {"model.a": torch.ones(3)}, {"state": {}})
    monkeypatch.undo()
    assert [(path.name, damage(path)) for path in saved.steps()][-2:] == before
    assert damage(saved.latest()) is None


def test_what_is_not_finite_is_never_saved(saved):
    with pytest.raises(RunError, match=r"model.a are not finite"):
        saved.save(4, {"model.a": torch.tensor([1.0, math.nan])}, {"state": {}})
    assert len(saved.steps()) == 2


def test_no_space_on_the_disk_keeps_the_last_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        process = start(disk / "run")
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 1, stderr
        assert re.search(r"error: a checkpoint could not be written to \S+: .*[Nn]o space left", stderr), stderr
        assert "Traceback" not in stderr
        assert [damage(path) for path in (disk / "run" / "checkpoints").glob("step-*")] == [None, None]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.timeout(3600 if LONG else 600)
@pytest.mark.parametrize("attempt", range(10 if LONG else 1))
def test_torchrun_recovers_a_killed_worker(two_processes, tmp_path, attempt):
    out = tmp_path / "run"
    process = start(out, processes=2, restarts=3)
    kill_a_worker(process, out, random.Random(attempt))
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr[-3000:]
    assert "resuming after step" in stderr
    assert final(out) == final(two_processes)


def kill_a_worker(process, out, rng):
    """kill -9 one of the two workers once there is a checkpoint and before the run is through."""
    while not list(out.glob("checkpoints/step-*")):
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    time.sleep(rng.uniform(0, 0.2))
    os.kill(rng.choice(sorted(children(process.pid))), signal.SIGKILL)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    finish(out, processes=2)
    return out


@pytest.mark.timeout(3600 if LONG else 600)
def test_the_number_of_processes_changes_neither_order_nor_loss(tmp_path):
    """World size 2, 1, 2 against 1 throughout: the same pictures in each step, losses within 1e-5 relative, in fp64."""
    # One step an epoch: metrics.csv then has the loss of every step.
    steps = ["precision=fp64", "limit_train=32", "batch_size=32", "epochs=200" if LONG else "epochs=12", "lr=1e-3"]
    finish(tmp_path / "one", *steps)
    stopped, phases = tmp_path / "changing", [2, 1, 2]
    for processes in phases[:-1]:
        process = start(stopped, *steps, processes=processes if processes > 1 else 0)
        goal = int(newest(stopped).partition("-")[2] or 0) + (60 if LONG else 4)
        while int(newest(stopped).partition("-")[2] or 0) < goal:
            time.sleep(0.005)
            assert process.poll() is None, process.stderr.read()
        kill_all(process)
    _, stderr = finish(stopped, *steps, processes=2)
    assert "resuming after step" in stderr
    one, changing = (table(run / "metrics.csv") for run in (tmp_path / "one", stopped))
    assert len(one) == len(changing) == (200 if LONG else 12)
    for a, b in zip(one, changing, strict=True):
        for key in ("train_loss", "val_loss"):
            assert math.isclose(float(a[key]), float(b[key]), rel_tol=1e-5)
        assert a["train_top1"] == b["train_top1"]
    assert table(stopped / "timing.csv")[-1]["processes"] == "2"


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:  # the parent
                found.append(int(stat.parent.name))
    return found


def kill_all(process):
    """kill -9 torchrun and its workers, which live in sessions of their own."""
    for pid in [process.pid, *children(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.heavy
def test_shards_resume_on_another_number_of_processes(tmp_path):
    """fsdp2: two processes write, one goes on; the weights are those of a run with ddp, and no file is a pickle."""
    out, wanted = tmp_path / "run", ["precision=fp64", "ema=0.9", "parallel=fsdp2"]
    process = start(out, *wanted, processes=2)
    while not list(out.glob("checkpoints/step-*")):
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    kill_all(process)
    shards = sorted(p.name for p in sorted(out.glob("checkpoints/step-*"))[-1].iterdir())
    assert shards[1:3] == [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    _, stderr = finish(out, *wanted)
    assert "resuming after step" in stderr
    finish(tmp_path / "plain", *wanted[:2])
    a, b = (dynamixer.load(run / "last.safetensors").model.state_dict() for run in (out, tmp_path / "plain"))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-6
    for path in (out / "checkpoints").rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors")


@pytest.mark.heavy
def test_three_processes_and_running_means_resume_to_the_bit(tmp_path):
    """Sums of three depend on their order, and running means on the process that saw the pictures."""
    wanted = ["model=test_resnet", "ema=0.9", "size=32", "crop=pad", "warmup_epochs=0"]
    base = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        "-m",
        "dynamixer",
        "train",
    ]
    base += [*WRITES, *wanted, "batch_size=30"]

    def launch(out):
        return subprocess.Popen(
            [*base, "--out", str(out)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    whole = launch(tmp_path / "whole")
    assert whole.wait(240) == 0, whole.communicate()[1][-3000:]
    whole.communicate()
    broken = launch(tmp_path / "broken")
    while newest(tmp_path / "broken") < "step-00000003":
        time.sleep(0.002)
        assert broken.poll() is None, broken.stderr.read()
    kill_all(broken)
    again = launch(tmp_path / "broken")
    _, stderr = again.communicate(timeout=3000 if LONG else 240)
    assert again.returncode == 0, stderr[-3000:]
    assert "resuming after step" in stderr
    assert final(tmp_path / "broken") == final(tmp_path / "whole")


@pytest.mark.heavy
def test_two_hosts_meet_by_torchruns_rendezvous(tmp_path):
    """Two network namespaces with an address each stand for two hosts."""
    log = subprocess.run(
        ["bash", str(ROOT / "tools/two_hosts.sh"), str(tmp_path / "run")], env=ENV | {"PYTHON": sys.executable},
        capture_output=True, text=True, timeout=3000 if LONG else 240, check=False,
    )  # fmt: skip
    if log.returncode == 77:
        pytest.skip(f"two hosts cannot be played here: {log.stderr.strip()}")
    assert log.returncode == 0, log.stderr[-3000:]
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2
    assert (tmp_path / "run/last.safetensors").is_file()


def test_of_many_checkpoints_of_one_step_the_last_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, World(torch.device("cpu")), sharded=False)
    for number in range(12):
        checkpoints.save(7, {"model.a": torch.full((1,), float(number))}, {"state": {"step": 7}})
    assert [path.name for path in checkpoints.steps()] == ["step-00000007.11", "step-00000007.10"]


@pytest.mark.timeout(300)
def test_a_signal_to_two_processes_ends_both_with_a_checkpoint(two_processes, tmp_path):
    out = tmp_path / "run"
    process = start(out, processes=2)
    while not list(out.glob("checkpoints/step-*")):
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0, stderr
    finish(out, processes=2)
    assert final(out) == final(two_processes)


@pytest.mark.timeout(300)
def test_a_picture_that_one_of_two_processes_cannot_read_ends_both(tmp_path):
    for number in range(32):
        place = tmp_path / "data" / ("cat", "dog")[number % 2] / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number * 7, 9, 9)).save(place)
    place.write_bytes(b"broken")
    words = ["--data", tmp_path / "data", "holdout=0", "limit_train=none", "batch_size=8", "repeats=1"]
    process = start(tmp_path / "run", *map(str, words), processes=2)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "31.png is not a picture" in stderr
