"""Many pictures: the rows are right, and no kill loses, repeats or changes one."""

import errno
import fcntl
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import dynamixer
import many_kills
from dynamixer import RunError, UserError, predict_many
from dynamixer.data import Preprocessing
from dynamixer.data.unlabelled import open_pictures
from dynamixer.many import parts as parts_module
from dynamixer.many import run as run_module
from dynamixer.models.checkpoint import create_model, save_checkpoint
from helpers import sharpen

ARGS = {"num_classes": 4, "depths": [1, 1], "dims": [16, 32], "segments": [2, 4], "patch_size": 4}
COUNT, BAD = 43, (5, 20, 42)
LONG = os.environ.get("DYNAMIXER_PROMISES") == "long"


def save(path, seed=0):
    model = sharpen(create_model("dynamixer_nano", **ARGS), seed).eval()
    about = {"name": "dynamixer_nano", "args": ARGS, "classes": tuple("abcd"), "trained": {}}
    save_checkpoint(path, model.state_dict(), preprocessing=Preprocessing.of(model), **about)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("many") / "m.safetensors")


def picture(number):
    generator = np.random.default_rng(number)
    small = Image.fromarray(generator.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((40, 36), Image.Resampling.BICUBIC).save(out, "PNG")
    return b"no picture" if number in BAD else out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        (root / f"{number % 3}").mkdir(exist_ok=True)
        (root / f"{number % 3}" / f"{number:02}.png").write_bytes(picture(number))
    return root


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(run_module, "PART", 8)


def run(paths, model, out, **options):
    return predict_many(paths, model, out, **{"batch_size": 4, "device": "cpu", "embeddings": True, **options})


@pytest.fixture(scope="module")
def undisturbed(folder, model, tmp_path_factory):
    """The bytes of both files, of a run of parts of 8."""
    out = tmp_path_factory.mktemp("reference") / "p.parquet"
    before, run_module.PART = run_module.PART, 8
    run(folder, model, out)
    run_module.PART = before
    return out.read_bytes(), out.with_suffix(".bad.jsonl").read_bytes()


def both(out):
    return out.read_bytes(), out.with_suffix(".bad.jsonl").read_bytes()


def test_another_size_is_read_with_the_same_weights(folder, model, tmp_path):
    out = run(folder, model, tmp_path / "p.parquet", size=24).out
    rows = pq.read_table(out, columns=["picture", "probability"]).to_pylist()
    expected = dynamixer.predict([row["picture"] for row in rows], model, device="cpu", size=24).results
    own = dynamixer.predict([row["picture"] for row in rows], model, device="cpu").results
    found = np.array([row["probability"] for row in rows])
    assert np.allclose(found, [one.top[0].probability for one in expected], atol=1e-5)
    assert not np.allclose(found, [one.top[0].probability for one in own], atol=1e-3)


def test_each_picture_has_a_row_with_the_models_answer(folder, model, tmp_path):
    done = run(folder, model, tmp_path / "p.parquet", top=9)
    rows = pq.read_table(done.out)
    names = sorted(map(str, folder.rglob("*.png")))
    bad = [i for i, name in enumerate(names) if int(name[-6:-4]) in BAD]
    good = [i for i in range(COUNT) if i not in bad]
    assert rows["index"].to_pylist() == good
    assert rows["picture"].to_pylist() == [names[i] for i in good]
    assert (done.pictures, done.predicted, done.bad) == (COUNT, COUNT - 3, 3)
    listed = [json.loads(line) for line in done.bad_out.read_text().splitlines()]
    assert [one["index"] for one in listed] == bad
    assert all("is not a picture" in one["reason"] and one["picture"] in one["reason"] for one in listed)

    checkpoint = dynamixer.load(model)
    one_by_one = dynamixer.predict([names[i] for i in good], model, device="cpu", top=4)
    for row, expected in zip(rows.to_pylist(), one_by_one.results, strict=True):
        assert row["top_labels"] == [guess.label for guess in expected.top]
        assert np.allclose(row["top_probabilities"], [guess.probability for guess in expected.top], atol=1e-5)
        assert (row["label"], row["probability"]) == (row["top_labels"][0], row["top_probabilities"][0])
    logits = checkpoint.model.head(torch.tensor(rows["embedding"].to_pylist()))
    assert [("abcd"[i]) for i in logits.argmax(1).tolist()] == rows["label"].to_pylist()
    assert len(set(rows["label"].to_pylist())) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.bad.jsonl", "p.parquet"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_between_any_two_parts_changes_nothing(folder, model, tmp_path, monkeypatch, undisturbed, workers):
    out, real, after = tmp_path / "p.parquet", parts_module.Parts.write, []

    def fail_after_two(self, *args):
        if len(after) % 3 == 2:
            after.append(1)
            raise KeyboardInterrupt
        after.append(1)
        real(self, *args)

    monkeypatch.setattr(parts_module.Parts, "write", fail_after_two)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(folder, model, out, workers=workers)
        assert not out.exists()
    assert len(list((tmp_path / "p.parquet.parts").glob("part-*"))) == 4
    run(folder, model, out, workers=workers)
    assert both(out) == undisturbed
    before = out.stat().st_mtime_ns
    assert run(folder, model, out).predicted == COUNT - 3  # again: nothing to do
    assert out.stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dynamixer.many", "many_kills", "pandas"])  # pandas: pyarrow looks for it
    return context


def killed_and_finished(changes, folder, model, out, processes):
    """Whether a run was killed before the change of the file system with a number, and what another left then is right."""
    options = {"batch_size": 4, "device": "cpu", "embeddings": True}
    child = processes.Process(target=many_kills.die_after, args=(changes, folder, model, out), kwargs=options)
    child.start()
    child.join(200)
    if child.exitcode == 0:
        return False
    assert child.exitcode == -signal.SIGKILL
    expected = both(run(folder, model, out.with_name("reference.parquet")).out)
    run(folder, model, out)
    assert both(out) == expected
    names = [p.name for p in out.parent.iterdir() if "reference" not in p.name]
    assert sorted(names) == ["p.bad.jsonl", "p.parquet"]
    return True


# of a run of two parts: before a part's rename, while the output is written, before and after its rename, while parts are removed
@pytest.mark.parametrize("changes", [2, 5, 9, 11, 12, 14])
def test_kill_9_where_it_matters_changes_no_byte(changes, folder, model, tmp_path, processes):
    assert killed_and_finished(changes, folder / "2", model, tmp_path / "p.parquet", processes)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_kill_9_before_every_change_of_the_file_system_changes_no_byte(folder, model, tmp_path, processes):
    for changes in range(100):
        if not killed_and_finished(changes, folder / "2", model, tmp_path / str(changes) / "p.parquet", processes):
            break
    assert changes >= 15  # the job, its parts, two joined files, their renames, and the removal of all that


@pytest.mark.heavy
@pytest.mark.timeout(5400 if LONG else 900)
def test_kill_9_at_any_time_changes_no_byte(folder, model, tmp_path, processes, undisturbed):
    """DYNAMIXER_PROMISES=long kills 200 times in place of 20.

    An output is finished undisturbed after at most four kills. Without that, kills that all come before the next part is written,
    as they do once the machine is slower than when `whole` was measured, would go on for ever.
    """
    left = 200 if LONG else 20
    generator, options = random.Random(0), {"batch_size": 4, "device": "cpu", "embeddings": True, "workers": 1}

    def ended(out, seconds):
        """The exit code of a run that is killed after so many seconds."""
        child = processes.Process(target=many_kills.run, args=(folder, model, out), kwargs=options)
        child.start()
        child.join(seconds)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join(100)
        return child.exitcode

    for name in ("warm", "first"):  # the first of all starts the fork server
        started = time.monotonic()
        assert ended(tmp_path / name / "p.parquet", 200) == 0
        whole = time.monotonic() - started  # a kill comes anywhere in a run of this machine
    while left:
        out = tmp_path / f"{left}" / "p.parquet"
        for _ in range(min(left, generator.randint(1, 4))):
            code = ended(out, generator.uniform(0, whole))
            assert code in (0, -signal.SIGKILL)
            left -= code != 0
            if code == 0:
                break
        else:
            assert ended(out, 200) == 0
        assert both(out) == undisturbed
        shutil.rmtree(out.parent)


def test_what_belongs_to_another_job_is_refused_and_left_alone(folder, model, tmp_path, monkeypatch):
    out = tmp_path / "p.parquet"
    with monkeypatch.context() as patched:
        real = parts_module.Parts.write

        def once(self, number, rows):
            real(self, number, rows)
            raise KeyboardInterrupt

        patched.setattr(parts_module.Parts, "write", once)
        with pytest.raises(KeyboardInterrupt):
            run(folder, model, out)
    other, fewer = save(tmp_path / "other.safetensors", seed=1), tmp_path / "fewer"
    shutil.copytree(folder / "0", fewer)
    changes = [
        ((folder, other), {}, "another model"),
        ((fewer, model), {}, "other pictures"),
        ((folder, model), {"top": 2}, "another --top"),
        ((folder, model), {"size": 24}, "another --size"),
        ((folder, model), {"embeddings": False}, "another --embeddings"),
        ((folder, model), {"batch_size": 8}, "another --batch-size"),
    ]
    for arguments, options, sentence in changes:
        with pytest.raises(UserError, match=f"was begun with .*{sentence}"):
            run(*arguments, out, **options)
    with (tmp_path / "p.parquet.parts" / "lock").open() as held, monkeypatch.context() as patched:
        patched.setattr(parts_module, "PATIENCE", 0.1)
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work"):
            run(folder, model, out)
    run(folder, model, out)
    for arguments, options, sentence in changes:
        with pytest.raises(UserError, match=f"was made with .*{sentence}"):
            run(*arguments, out, **options)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match="was not written by this command"):
        run(folder, model, tmp_path / "mine.parquet")
    (tmp_path / "x.parquet.parts").mkdir()
    (tmp_path / "x.parquet.parts" / "part-0000000.parquet").touch()
    with pytest.raises(UserError, match="unknown job"):
        run(folder, model, tmp_path / "x.parquet")


def test_output_that_lies_among_its_pictures_is_not_read(model, tmp_path, undisturbed, folder):
    rows = [{"bytes": picture(number)} for number in range(6)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "in.parquet")
    out = tmp_path / "p.parquet"
    (tmp_path / "p.parquet.parts").mkdir()
    (tmp_path / "p.parquet.parts/part-0000000.parquet").touch()
    with pytest.raises(UserError, match="parts of an unknown job"):  # and not: has no column of pictures
        run(tmp_path, model, out)
    shutil.rmtree(tmp_path / "p.parquet.parts")
    done = run(tmp_path, model, out)
    assert run(tmp_path, model, out).to_dict() == done.to_dict()
    assert done.pictures == 6


def test_a_mistake_leaves_nothing_that_forbids_the_next_try(folder, model, tmp_path, monkeypatch, undisturbed):
    out = tmp_path / "p.parquet"
    with pytest.raises(UserError):
        run(folder, model, out, size=100_000)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "_compute", lambda *_: (_ for _ in ()).throw(RuntimeError("can't allocate memory")))
        with pytest.raises(RuntimeError):
            run(folder, model, out, batch_size=7)
    assert list(tmp_path.iterdir()) == []
    run(folder, model, out)
    assert both(out) == undisturbed


def test_who_waited_for_a_lock_takes_up_what_the_other_left(folder, model, tmp_path, monkeypatch, undisturbed):
    """The other has finished meanwhile, and has removed the file that both would lock."""
    out = tmp_path / "p.parquet"
    parts, real, asked = tmp_path / "p.parquet.parts", parts_module.locked, []
    parts.mkdir()
    held = (parts / "lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)

    def finished_meanwhile(file, patience):
        asked.append(file)
        if not out.exists():
            out.write_bytes(undisturbed[0])
            out.with_suffix(".bad.jsonl").write_bytes(undisturbed[1])
            shutil.rmtree(parts)
            held.close()
        return real(file, patience)

    monkeypatch.setattr(parts_module, "locked", finished_meanwhile)
    monkeypatch.setattr(run_module, "_compute", lambda *_: pytest.fail("all was done"))
    assert run(folder, model, out).predicted == COUNT - 3
    assert len(asked) == 2
    assert both(out) == undisturbed
    assert not parts.exists()


def test_a_lock_that_a_killed_process_left_to_its_workers_is_waited_for(folder, model, tmp_path, undisturbed):
    out = tmp_path / "p.parquet"
    (tmp_path / "p.parquet.parts").mkdir()
    with (tmp_path / "p.parquet.parts" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        orphan = threading.Timer(0.5, held.close)
        orphan.start()
        run(folder, model, out)
        orphan.join()
    assert both(out) == undisturbed


def test_a_touched_picture_is_another_input(folder, model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    run(copy, model, tmp_path / "p.parquet")
    os.utime(next(copy.rglob("*.png")), ns=(1, 1))
    with pytest.raises(UserError, match="other pictures"):
        run(copy, model, tmp_path / "p.parquet")


def test_parquet_tar_and_patterns_give_the_rows_of_the_same_pictures(folder, model, tmp_path):
    files = sorted(folder.rglob("*.png"), key=os.fsencode)
    encoded = [file.read_bytes() for file in files]
    (tmp_path / "in").mkdir()
    column = pa.array([{"bytes": e, "path": None} for e in encoded])
    pq.write_table(pa.table({"other": range(COUNT), "image": column}), tmp_path / "in" / "a.parquet", row_group_size=7)
    with tarfile.open(tmp_path / "b.tar", "w") as shard:
        for i, content in enumerate(encoded):
            for name, data in ((f"x/{i:03}.left.png", content), (f"x/{i:03}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    by_folder = pq.read_table(run(folder, model, tmp_path / "1.parquet").out)
    for number, where in enumerate(([tmp_path / "in"], [tmp_path / "b.tar"], [str(folder / "*" / "*.png")])):
        done = run(where, model, tmp_path / f"{number + 2}.parquet")
        rows = pq.read_table(done.out)
        assert rows.drop_columns(["picture"]).equals(by_folder.drop_columns(["picture"]))
        assert done.bad == 3
    everything = run([folder, tmp_path / "b.tar", tmp_path / "in"], model, tmp_path / "9.parquet")
    assert everything.pictures == 3 * COUNT
    titles = pq.read_table(everything.out)["picture"].to_pylist()
    assert len({*titles}) == len(titles) == 3 * (COUNT - 3)
    assert f"{tmp_path}/b.tar: x/000.left.png" in titles
    assert f"{tmp_path}/in/a.parquet row 0" in titles


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere", "p.parquet", {}), "no file or folder nowhere"),
        (("*.jpg", "p.parquet", {}), "matches"),
        (("empty", "p.parquet", {}), "has no pictures"),
        (("labels.parquet", "p.parquet", {}), "no column of encoded pictures"),
        (("text.tar", "p.parquet", {}), "not a whole tar file"),
        (("packed.tar.gz", "p.parquet", {}), "is compressed"),
        (("good", "p.csv", {}), r"end in .parquet"),
        (("good", "p.parquet", {"top": 0}), "above 0"),
        (("good", "p.parquet", {"engine": "rai"}), "did you mean 'ray'"),
    ],
)
def test_what_cannot_be_predicted_is_one_sentence(arguments, sentence, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "good" / "a.png").write_bytes(picture(0))
    pq.write_table(pa.table({"label": [1]}), "labels.parquet")
    (tmp_path / "text.tar").write_text("words")
    (tmp_path / "packed.tar.gz").write_bytes(b"\x1f\x8b" + bytes(60))
    before = sorted(p.name for p in tmp_path.iterdir())
    path, out, options = arguments
    with pytest.raises(UserError, match=sentence):
        run(path, model, out, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_on_two_nodes_leaves_the_same_bytes(folder, model, tmp_path, undisturbed):
    import ray  # noqa: PLC0415
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        started = time.monotonic()
        done = run(folder, model, tmp_path / "p.parquet", engine="ray")
        assert both(done.out) == undisturbed, f"after {time.monotonic() - started:.0f} s"
    finally:
        ray.shutdown()
        cluster.shutdown()
        torch.set_num_threads(before)


def test_pictures_that_change_meanwhile_are_no_bad_pictures(folder, model, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "in")
    first = sorted((tmp_path / "in").rglob("*.png"))[0]
    write = parts_module.Parts.write
    monkeypatch.setattr(parts_module.Parts, "write", lambda self, *a: (first.write_bytes(b"other"), write(self, *a)))
    with pytest.raises(RunError, match="were changed while they were read"):
        run(tmp_path / "in", model, tmp_path / "p.parquet")
    assert not (tmp_path / "p.parquet").exists()


def test_pictures_that_were_gone_for_a_while_are_read_when_it_starts_again(folder, model, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "in")
    out, aside = tmp_path / "p.parquet", tmp_path / "aside"
    opened = run_module._compute

    def gone(*words):
        (tmp_path / "in").rename(aside)
        yield from opened(*words)

    with monkeypatch.context() as broken:
        broken.setattr(run_module, "_compute", gone)
        with pytest.raises(RunError, match="was there and is gone: start again"):
            run(tmp_path / "in", model, out)
    aside.rename(tmp_path / "in")
    assert run(tmp_path / "in", model, out).bad == len(BAD)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_of_the_machine_is_no_bad_picture(folder, model, tmp_path, monkeypatch, number, workers):
    def exhausted(self):
        raise OSError(number, os.strerror(number))

    out = tmp_path / "p.parquet"
    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", exhausted)
        with pytest.raises(RunError, match=rf"^[^\n]*cannot be read: {os.strerror(number)}; start again[^\n]*$"):
            run(folder, model, out, workers=workers)
    assert run(folder, model, out).bad == len(BAD)


def test_pictures_may_have_two_sides(folder, model, tmp_path):
    out = tmp_path / "p.parquet"
    first = run(folder, model, out, size=(24, 40))
    assert run(folder, model, out, size=(24, 40)) == first
    with pytest.raises(UserError, match="another --size"):
        run(folder, model, out, size=(40, 24))


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    pictures = []
    for colour in ("red", "blue"):
        Image.new("RGB", (9, 9), colour).save(tmp_path / "a.png")
        table = pa.table({"image": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}]})
        pq.write_table(table, tmp_path / "x.parquet")
        pictures.append(open_pictures([tmp_path / "x.parquet"])[0].picture(0).getpixel((0, 0)))
    assert pictures == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("pattern", ["", "*"])
def test_what_is_left_out_of_a_folder_of_shards_is_said_and_compressed_ones_are_refused(tmp_path, capsys, pattern):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    (tmp_path / "a.png").unlink()
    (tmp_path / "notes.txt").touch()
    assert len(open_pictures([tmp_path / pattern])[0]) == 1
    assert "left out what is not a picture: 1 in " in capsys.readouterr().err
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(UserError, match=r"is compressed, .* unpack it with gunzip"):
        open_pictures([tmp_path / pattern])


def test_a_node_without_the_pictures_says_so(folder, model, tmp_path):
    from dynamixer.many.on_ray import Worker, some  # noqa: PLC0415

    files = sorted(folder.rglob("*.png"))
    assert some([*files, folder / "gone"]) == files
    with pytest.raises(UserError, match="is not on this node"):
        Worker(None, [*files, folder / "gone"], str(model), None, "cpu", 1)
