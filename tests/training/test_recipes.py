import pytest
import timm

from dynamixer import RECIPES, TrainConfig, UserError, count
from dynamixer.training import ABLATIONS, ablate
from dynamixer.training.recipes import recipe

PAPER = {  # spec section 5: parameters of DynaMixer-S with each row's option
    "one_segment": 25_920_944, "width_96": 25_988_712, "width_48": 26_081_128, "width_24": 26_265_960,
    "static": 25_307_496, "dense": 32_718_184, "reduced_1": 25_704_296, "reduced_4": 27_389_288, "reduced_8": 29_635_944,
    "no_row": 22_919_528, "no_column": 22_919_528, "no_channel": 23_495_016, "no_reweighting": 24_034_152,
    "shared": 23_478_632,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_how_they_run(name):
    config = RECIPES[name]()
    assert RECIPES[name].__name__ == name
    assert f"train {name}" in RECIPES[name].__doc__
    assert TrainConfig().with_values(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "lr", "batch", "drop_path"),
    [("imagenet_s", 2e-3, 2048, 0.1), ("imagenet_m", 2e-3, 1024, 0.1), ("imagenet_l", 1e-3, 512, 0.3)],
)
def test_the_imagenet_recipes_are_the_papers(name, lr, batch, drop_path):
    c = RECIPES[name]()
    assert (c.lr, c.batch_size, c.drop_path, c.opt, c.weight_decay) == (lr, batch, drop_path, "adamw", 0.05)
    assert (c.epochs, c.cooldown_epochs, c.warmup_epochs, c.warmup_lr, c.min_lr) == (310, 10, 20, 1e-6, 1e-5)
    assert (c.auto_augment, c.random_erasing, c.label_smoothing) == ("rand-m9-mstd0.5-inc1", 0.25, 0.1)
    assert (c.mixup, c.cutmix, c.ema, c.seed) == (0.8, 1.0, 0.99996, 42)


@pytest.mark.parametrize("row", ABLATIONS)
def test_ablations_are_the_papers_rows_by_their_parameters(row):
    config = ablate(row)
    model = timm.create_model(config.model, device="meta", **config.model_args)
    assert count(model)[0] == PAPER[row]


def test_an_ablation_changes_any_recipe():
    config = recipe("ablate:static:cifar10_nano")
    assert config.model_args == {"generator": "static"}
    assert config.epochs == RECIPES["cifar10_nano"]().epochs
    assert set(PAPER) == set(ABLATIONS)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ablate:statc", "unknown ablation 'statc': did you mean 'static'"),
        ("ablate", "write ablate:ROW"),
        ("ablate:a:b:c", "write ablate:ROW"),
        ("ablate:static:fashion", "unknown recipe 'fashion' to ablate"),
        ("ablate:width_48:cifar10_nano", "segments of 48 channels do not fit dynamixer_nano"),
        ("imagenet", "unknown recipe 'imagenet': did you mean"),
    ],
)
def test_an_unknown_recipe_is_a_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe(name)
