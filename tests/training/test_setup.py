"""What a run needs before its first step."""

from dataclasses import replace

import pytest
import torch

import dynamixer
from dynamixer import RECIPES, TrainConfig, UserError
from dynamixer.models.checkpoint import save_checkpoint
from dynamixer.training.objective import make_task
from dynamixer.training.setup import build_network
from small_models import saved


def network(path, classes, **keys):
    return build_network(TrainConfig(model="", weights=str(path), **keys), classes).model.eval()


def test_trained_weights_keep_a_classifier_of_the_same_classes_in_the_order_of_the_data(tmp_path):
    path, x = saved(tmp_path), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        trained = dynamixer.load(path).model(x)
        assert torch.equal(network(path, "abc")(x), trained)
        assert torch.equal(network(path, "bca")(x), trained[:, [1, 2, 0]])


@pytest.mark.parametrize("classes", ["abd", "xyz", "abcd"])
def test_the_classifier_of_other_classes_is_made_anew_however_many_there_are(tmp_path, classes, capsys):
    path, x = saved(tmp_path), torch.randn(2, 3, 16, 16)
    made, trained = network(path, classes), dynamixer.load(path).model
    assert len(made.head.weight) == len(classes)
    assert not torch.equal(made.head.weight[0], trained.head.weight[0])
    assert f"the {len(classes)} classes are others than those of the weights" in capsys.readouterr().err
    with torch.no_grad():
        assert torch.equal(made.forward_features(x), trained.forward_features(x))


@pytest.mark.parametrize("drop_path", [0.0, 0.2])
def test_stochastic_depth_is_the_recipes_not_that_of_the_weights(tmp_path, drop_path):
    run = dynamixer.train(
        TrainConfig(
            model_args={"depths": [1, 1], "dims": [8, 16], "segments": [2, 4]}, epochs=1, limit_train=32, batch_size=16,
            drop_path=0.1, device="cpu", track="none", warmup_epochs=0,
        ),
        tmp_path / "run",
    ).run  # fmt: skip
    classes = dynamixer.load(run).classes
    made = build_network(TrainConfig(model="", weights=str(run), drop_path=drop_path), classes)
    rates = [part.drop_prob for part in made.model.modules() if type(part).__name__ == "DropPath"]
    assert max(rates, default=0) == pytest.approx(drop_path)
    assert made.args.get("drop_path_rate", 0) == drop_path


def test_what_a_teacher_is_told_of_the_pictures_is_how_those_of_the_weights_are_normalised(tmp_path):
    found = dynamixer.load(saved(tmp_path))
    read = replace(found.preprocessing, mean=(0.1, 0.2, 0.3), std=(0.7, 0.8, 0.9))
    about = {"name": found.name, "args": found.args, "classes": found.classes, "trained": {}}
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, found.model.state_dict(), preprocessing=read, **about)
    config = TrainConfig(model="", weights=str(other), teacher=str(found.path))
    made = build_network(config, "abc")
    task = make_task(config, made.model, tuple("abc"), [(16, 16)], torch.device("cpu"))
    assert task.student_mean.flatten().tolist() == pytest.approx(read.mean)
    assert task.student_std.flatten().tolist() == pytest.approx(read.std)
    assert task.teacher.mean_kd.flatten().tolist() == pytest.approx(found.preprocessing.mean)


def test_a_model_that_asserts_that_it_cannot_recompute_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="pit_ti_224 has no gradient checkpointing"):
        build_network(TrainConfig(model="pit_ti_224", grad_checkpointing=True), "abc")


def test_fine_tuning_asks_for_weights():
    with pytest.raises(UserError, match="give weights=RUN, a run folder or checkpoint"):
        build_network(RECIPES["finetune"](), "abc")
