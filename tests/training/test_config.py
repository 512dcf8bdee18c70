import dataclasses

import pytest
import yaml

from dynamixer import RECIPES, TrainConfig, UserError


def test_words_change_keys_by_their_type():
    config = TrainConfig().with_words(
        [
            "epochs=3",
            "lr=1e-3",
            "size=none",
            "sizes=[48,64]",
            "data=some=where",
            "model.softmax=false",
            "model.segments=[2,4,4]",
        ]
    )
    assert (config.epochs, config.lr, config.size, config.sizes, config.data) == (
        3,
        0.001,
        None,
        (48, 64),
        "some=where",
    )
    assert config.model_args == {"softmax": False, "segments": [2, 4, 4]}
    assert config.with_words(["clip_grad=none", "sizes=80", "size=64"]).sizes == (80,)
    assert TrainConfig().epochs == 10


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("epoch=3", "unknown key 'epoch': did you mean 'epochs'"),
        ("model_args={}", "unknown key 'model_args'"),
        ("epochs=three", "epochs=three is not a whole number"),
        ("epochs=1.5", "not a whole number"),
        ("lr=fast", "lr=fast is not a number"),
        ("sizes=[48,a]", "list of whole numbers such as"),
        ("sizes=[true]", "list of whole numbers"),
        ("model.segments=[1", "cannot be read"),
        ("lonely", "'lonely' is not a key=value word"),
        ("=3", "not a key=value word"),
        ("epochs=0", "epochs=0 has to be above 0"),
        ("lr=-1", "lr=-1.0 has to be above 0"),
        ("lr=nan", "lr=nan has to be a finite number"),
        ("size=0", "size=0 has to be above 0"),
        ("limit_train=0", "limit_train=0"),
        ("sizes=[0]", "picture sizes"),
        ("holdout=1", "at least 0 and below 1"),
        ("hflip=2", "between 0 and 1"),
        ("scale=0", "share of the picture"),
        ("workers=-1", "at least 0"),
        ("precision=fp8", "fp32 or bf16"),
        ("crop=center", "unknown crop"),
        ("warmup_epochs=10", "leaves nothing of 10 epochs"),
    ],
)
def test_a_mistake_is_one_sentence(word, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainConfig().with_words([word])


def test_recipes_are_frozen_documented_and_survive_yaml():
    for name, recipe in RECIPES.items():
        config = recipe()
        assert recipe.__name__ == name
        assert f"dynamixer train {name}" in recipe.__doc__
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.epochs = 3
        back = TrainConfig(**(values := yaml.safe_load(config.to_yaml())) | {"sizes": tuple(values["sizes"])})
        assert back == config


def test_every_key_has_help():
    assert all(item.metadata["help"] for item in dataclasses.fields(TrainConfig))
