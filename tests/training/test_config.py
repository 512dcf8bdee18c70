import dataclasses

import pytest
import yaml

from dynamixer import TrainConfig, UserError


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
        ("model_args=3", "are no options: give each as model.NAME=VALUE"),
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
        ("precision=fp8", "one of fp32, bf16, fp16, fp64"),
        ("crop=center", "unknown crop"),
        ("warmup_epochs=10", "leave nothing of 10 epochs"),
        ("epochs=1 cooldown_epochs=1", "leave nothing of 1 epochs"),
        ("lr=2024-13-45", "lr=2024-13-45 cannot be read"),
        ("cooldown_epochs=9", "leave nothing of 10 epochs"),
        ("accumulate=3", "batch_size=128 cannot be cut into accumulate=3"),
        ("ema=1", "ema=1.0 is a decay"),
        ("layer_decay=1.5", "layer_decay=1.5 is a factor"),
        ("compile=maybe", "compile=maybe is not true or false"),
        ("parallel=fsdp", "unknown parallel 'fsdp': it is one of ddp, fsdp2"),
        ("on_bad_image=ignore", "one of stop, skip"),
        ("repeats=0", "repeats=0 has to be above 0"),
        ("distill=2", "distill=2.0 is a share"),
        ("distill=0.9", "of no use without a teacher"),
        ("lr=1e-6", "min_lr=1e-05 is above lr=1e-06"),
        ("warmup_lr=0.1", "warmup_lr=0.1 is above lr=0.001"),
        ("color_jitter=0.4 auto_augment=rand-m9-mstd0.5-inc1", "color_jitter beside auto_augment has no effect"),
    ],
)
def test_a_mistake_is_one_sentence(word, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainConfig().with_words(word.split(" "))


def test_yaml_brings_every_configuration_back():
    config = TrainConfig(sizes=(48, 64), model_args={"softmax": False}, ema=0.99)
    assert TrainConfig().with_values(yaml.safe_load(config.to_yaml())) == config
    assert TrainConfig().with_values({"lr": "1e-3", "epochs": 3.0}).epochs == 3  # as YAML reads them


def test_of_a_key_that_comes_twice_the_later_word_counts():
    assert TrainConfig().with_words(["epochs=3", "model.a=1", "epochs=4", "model.a=2"]).epochs == 4


def test_differences_name_what_changes_the_result_only():
    config = TrainConfig(workers=4, device="cpu", track="none", checkpoint_every=7)
    assert config.differences(TrainConfig()) == []
    assert config.differences(TrainConfig(lr=3.0)) == ["lr (0.001 here, 3.0 there)"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3


def test_every_key_has_help():
    assert all(item.metadata["help"] for item in dataclasses.fields(TrainConfig))


def test_one_epoch_has_a_part_of_one_as_warm_up_or_none():
    assert [TrainConfig(epochs=e, warmup_epochs=w).warmup for e, w in ((1, 0.5), (1, 1.0), (3, 1.0))] == [0.5, 0, 1]
