import sys
import time
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynamixer.errors import UserError
from dynamixer.training.trackers import EXTRAS, check_trackers, open_trackers

CONFIG = {"lr": 0.1, "sizes": (48, 64), "size": None}


@pytest.fixture
def without(monkeypatch):
    """Makes modules look as if they were not installed."""

    def remove(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return remove


@pytest.fixture
def fake(monkeypatch):
    """A module of that name which records what it is asked for; `fail` names functions that raise."""

    def put(name, fail=(), found=()):
        module, calls = types.ModuleType(name), []

        def function(kind):
            def call(*args, **kwargs):
                calls.append((kind, args, kwargs))
                if name != "wandb":
                    sys.stdout.write(f"{name} talks on stdout")
                if kind in fail:
                    raise ConnectionError(f"{name} is\n away")
                return answers.get(kind)

            return call

        run = types.SimpleNamespace(log=function("run.log"), finish=function("run.finish"))
        answers = {
            "init": run,
            "set_experiment": types.SimpleNamespace(experiment_id="7"),
            "search_runs": [types.SimpleNamespace(info=types.SimpleNamespace(run_id=one)) for one in found],
        }
        for kind in ("init", "log", "finish", "set_experiment", "search_runs", "start_run", "log_params",
                     "log_metrics", "end_run"):  # fmt: skip
            setattr(module, kind, function(kind))
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return put


def used(names, run, rows, identity="0123456789abcdef"):
    trackers = open_trackers(names, run=run, config=CONFIG, identity=identity)
    for step, row in rows:
        trackers.epoch(row, step)
    trackers.close()


def scalars(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_holds_the_figures_and_a_resumed_run_overwrites_later_ones(tmp_path):
    used("tensorboard", tmp_path, [(i, {"loss": 10.0 - i, "top1": 10 * i, "none": None}) for i in range(1, 6)])
    folder = tmp_path / "tensorboard"
    assert scalars(folder, "loss") == [(i, 10.0 - i) for i in range(1, 6)]
    assert scalars(folder, "top1") == [(i, 10.0 * i) for i in range(1, 6)]
    time.sleep(1.1)  # the files are read in the order of their names, which hold seconds
    used("tensorboard", tmp_path, [(4, {"loss": 0.25})])
    assert scalars(folder, "loss") == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 0.25)]
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "top1"}
    said = events.Tensors("config/text_summary")
    assert [one.step for one in said] == [1, 4]
    assert b"lr: 0.1" in said[0].tensor_proto.string_val[0]


def test_tensorboard_leaves_nothing_before_the_first_epoch(tmp_path):
    open_trackers("tensorboard", run=tmp_path / "run", config=CONFIG, identity="0").close()
    assert not (tmp_path / "run").exists()


def test_figures_can_be_read_while_the_run_goes_on(tmp_path):
    trackers = open_trackers("auto", run=tmp_path, config=CONFIG, identity="0")
    trackers.epoch({"loss": 1.5}, 1)
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 1.5)]
    trackers.close()
    trackers.close()


def test_wandb_takes_up_the_run_of_the_identity(tmp_path, fake):
    calls = fake("wandb")
    used("wandb", tmp_path / "first", [(1, {"loss": 2.0, "none": None})])
    used("wandb", tmp_path / "first", [])
    used("wandb", tmp_path / "first", [], identity="another")
    (_, _, first), (_, _, again), (_, _, other) = [call for call in calls if call[0] == "init"]
    assert first == again | {"id": first["id"]}
    assert first | {"id": 0} == {
        "project": "dynamixer", "name": "first", "id": 0, "resume": "allow", "config": CONFIG
    }  # fmt: skip
    assert first["id"] == again["id"] != other["id"]
    assert calls[1:3] == [("run.log", ({"loss": 2.0},), {"step": 1}), ("run.finish", (), {})]


def test_mlflow_starts_a_run_with_a_tag(tmp_path, fake):
    calls = fake("mlflow")
    used("mlflow", tmp_path / "first", [(1, {"loss": 2.0})])
    search = calls[1][2]
    identity = search["filter_string"].split("'")[1]
    assert identity == "0123456789abcdef"
    assert calls == [
        ("set_experiment", ("dynamixer",), {}),
        ("search_runs", (), {
            "experiment_ids": ["7"], "filter_string": f"tags.`dynamixer.run` = '{identity}'", "max_results": 1,
            "output_format": "list",
        }),
        ("start_run", (), {"run_name": "first", "tags": {"dynamixer.run": identity}}),
        ("log_params", (CONFIG,), {}),
        ("log_metrics", ({"loss": 2.0},), {"step": 1}),
        ("end_run", (), {}),
    ]  # fmt: skip


def test_mlflow_finds_the_run_again_by_its_tag(tmp_path, fake):
    calls = fake("mlflow", found=["abc"])
    used("mlflow", tmp_path / "first", [])
    assert [call for call in calls if call[0] in ("start_run", "log_params")] == [("start_run", (), {"run_id": "abc"})]


def test_trackio_takes_up_the_run_by_a_name_of_its_own(tmp_path, fake):
    calls = fake("trackio")
    used("trackio", tmp_path / "first", [(3, {"loss": 2.0})])
    used("trackio", tmp_path / "first", [], identity="another")
    (_, _, first), log, finish, (_, _, other), _ = calls
    assert first["name"].startswith("first-")
    assert first["name"] != other["name"]
    assert first | {"name": 0} == {"project": "dynamixer", "name": 0, "resume": "allow", "config": CONFIG}
    assert log == ("log", ({"loss": 2.0},), {"step": 3})
    assert finish == ("finish", (), {})


@pytest.mark.parametrize("fail", ["init", "run.log", "run.finish"])
def test_a_tracker_that_fails_is_warned_of_once_and_left_out(tmp_path, fake, capsys, fail):
    fake("trackio")
    calls = fake("wandb", fail=[fail])
    used("wandb,trackio,tensorboard", tmp_path, [(1, {"loss": 2.0}), (2, {"loss": 1.0})])
    out, err = capsys.readouterr()
    assert out == ""  # stdout is for results
    assert err.count("warning: ") == 1
    assert "warning: wandb failed and is left out from here on: ConnectionError: wandb is away" in err
    assert [call[0] for call in calls].count(fail) == 1
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 2.0), (2, 1.0)]


def test_a_disk_that_cannot_be_written_does_not_stop_training(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    used("tensorboard", tmp_path, [(1, {"loss": 2.0}), (2, {"loss": 1.0})])
    assert capsys.readouterr().err.count("warning: tensorboard failed") == 1


def test_auto_is_tensorboard_where_it_is_installed(without):
    assert check_trackers("auto") == ["tensorboard"]
    assert check_trackers("none") == []
    without("tensorboard")
    assert check_trackers("auto") == []


def test_names_are_in_order_and_once(fake):
    fake("wandb")
    assert check_trackers("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tensorbord", "unknown tracker 'tensorbord': did you mean 'tensorboard'"),
        ("tensorboard,wandbb", "unknown tracker 'wandbb': did you mean 'wandb'"),
        ("aut", "did you mean 'auto'"),
        ("tensorboard,none", "unknown tracker 'none': known: mlflow, tensorboard, trackio, wandb"),
        ("", "unknown tracker ''"),
        ("tensorboard,", "unknown tracker ''"),
    ],
)
def test_an_unknown_tracker_is_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        check_trackers(names)
    with pytest.raises(UserError, match=message):
        open_trackers(names, run=tmp_path, config={}, identity="0")


@pytest.mark.parametrize("name", EXTRAS)
def test_a_tracker_that_is_not_installed_says_how_to(without, name):
    without(name)
    with pytest.raises(UserError) as error:
        check_trackers(name)
    assert str(error.value).startswith(f"{name} is not installed: pip install '{name}>=")


def test_the_folder_that_wandb_leaves_is_not_wandb(tmp_path, monkeypatch):
    (tmp_path / "trackername").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EXTRAS, "trackername", "x")
    with pytest.raises(UserError, match="trackername is not installed"):
        check_trackers("trackername")
