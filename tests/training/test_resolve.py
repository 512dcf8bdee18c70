"""Where values come from, and sixty mistakes that are refused before any work."""

import json

import pytest
import yaml

from dynamixer import UserError
from dynamixer.cli import _guarded, cli
from dynamixer.training import RECIPES, TrainConfig
from dynamixer.training.resolve import resolve, show


def test_later_sources_win_and_are_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nlr: 1e-3\nmodel.softmax: false\n")
    config, origins = resolve("cifar10_nano", file=file, data="x.parquet", words=["epochs=9", "model.windows=false"])
    assert (config.epochs, config.lr, config.batch_size, config.data) == (9, 1e-3, 128, "x.parquet")
    assert config.model_args == {"softmax": False, "windows": False}
    assert origins["epochs"] == "command line"
    assert origins["lr"] == f"file {file}"
    assert origins["drop_path"] == "recipe cifar10_nano"
    assert origins["data"] == "--data"
    assert origins["seed"] == "default"
    assert f"# softmax: file {file}, windows: command line" in show(config, origins)
    assert "# patch_size: recipe fashion_nano, softmax: command line" in show(
        *resolve("fashion_nano", words=["model.softmax=true"])
    )


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_shown_is_yaml_that_gives_the_configuration_back(name):
    config, origins = resolve(name, words=["model.softmax=false"])
    text = show(config, origins)
    assert TrainConfig().with_values(yaml.safe_load(text)) == config
    assert all("  # " in line for line in text.splitlines())


def test_print_config_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "finetune", "weights=x", "--print-config"]
    assert _guarded(lambda: cli.main([*words, "--json"], standalone_mode=False)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["weights"] == {"value": "x", "from": "command line"}
    assert printed["layer_decay"] == {"value": 0.75, "from": "recipe finetune"}
    assert _guarded(lambda: cli.main(words, standalone_mode=False)) == 0
    assert "layer_decay: 0.75" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


FILES = {
    "list.yaml": "- 1\n- 2\n", "broken.yaml": "epochs: [1\n", "unknown.yaml": "epoch: 3\n", "type.yaml": "epochs: many\n",
    "code.yaml": "model: !!python/object/apply:os.system ['true']\n", "empty.yaml": "", "number.yaml": "3: 4\n",
    "classpath.yaml": "opt: torch.optim.SGD\n",
    "date.yaml": "data: 2024-02-30\n",
}  # fmt: skip
MUTATIONS = [
    "epoch=3", "epochs=0", "epochs=-1", "epochs=1e99", "epochs=three", "epochs=", "epochs=2.5", "epochs=[3]", "epochs=true",
    "batchsize=3", "batch_size=0", "batch_size=x", "lr=", "lr=nan", "lr=-inf", "lr=1e-3e", "lr=[1]", "min_lr=-1", "warmup_lr=-1",
    "warmup_epochs=99", "cooldown_epochs=99", "layer_decay=0", "weight_decay=-1", "clip_grad=0", "label_smoothing=1",
    "drop_path=1", "mixup=-1", "ema=0", "ema=2", "distill=-1", "temperature=0", "crop=zoom", "scale=0", "hflip=1.5",
    "auto_augment=randd", "random_erasing=-1", "repeats=0", "holdout=1", "limit_train=0", "on_bad_image=maybe", "patience=-1",
    "precision=int4", "compile=si", "parallel=mpi", "seed=-1", "seed=1.5", "workers=-2", "checkpoint_every=0", "track=wandbb",
    "device=tpu", "opt=adamwow", "opt=bnbadamw8bit", "model=dynamixer_nanoo", "model.softmx=false", "model.generator=statc",
    "model.depths=[1,1]",
    "model.img_size=64", "sizes=[0]", "sizes=[a]", "size=-3", "accumulate=5", "weights=nowhere", "teacher=nowhere", "lonely",
    "ablate:nothing", "patience=3 holdout=0", "accumulate=64 mixup=0.5", "scale=0.5", "--config nothing.yaml",
    "model.generator=static model.reduced=8", "ema_warmup=true", "warmup_lr=1e-5 warmup_epochs=0",
    "--resume sometimes", "--bogus", *(f"--config {name}" for name in FILES if name != "empty.yaml"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_refused_before_any_work(tmp_path, monkeypatch, capsys, mutation):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    before = sorted(p.name for p in tmp_path.iterdir())
    first = [] if mutation.startswith(("ablate", "lonely")) else ["fashion_nano"]
    words = ["train", *first, *mutation.split(" "), "--out", "run"]
    assert _guarded(lambda: cli.main(words, standalone_mode=False)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.lower().startswith("error: ")
    assert len(last) > 25
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_there_are_sixty():
    assert len(set(MUTATIONS)) >= 60


@pytest.mark.parametrize("words", [["model_args=3", "model.softmax=false"], ["model_args={1: 2}"]])
def test_options_of_the_model_that_are_none_are_a_sentence(words):
    with pytest.raises(UserError, match=r"are no options: give each as model\.NAME=VALUE"):
        resolve(words=words)
