"""Exact sizes: section 3 and section 5 of the specification."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynamixer import count, use_kernel
from dynamixer.layers import MixerLayer
from dynamixer.models.variants import VARIANTS
from dynamixer.ops import reference_mixing


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("dynamixer_s", 26_265_960, 7_302_323_200),
        ("dynamixer_m", 57_128_264, 16_980_561_920),
        ("dynamixer_l", 97_818_088, 27_343_441_920),
    ],
)
def test_the_papers_models_have_exactly_their_size(name, parameters, multiply_adds):
    assert count(timm.create_model(name, device="meta")) == (parameters, multiply_adds)


ROWS = [
    ({"segments": 1}, 25_920_944),
    ({"segments": (2, 4, 4, 4)}, 25_988_712),
    ({"segments": (4, 8, 8, 8)}, 26_081_128),
    ({"segments": (8, 16, 16, 16)}, 26_265_960),
    ({"generator": "static"}, 25_307_496),
    ({"generator": "dense"}, 32_718_184),
    ({"reduced": 1}, 25_704_296),
    ({"reduced": 4}, 27_389_288),
    ({"reduced": 8}, 29_635_944),
    ({"row": False}, 22_919_528),
    ({"column": False}, 22_919_528),
    ({"channel": False}, 23_495_016),
    ({"reweight": False}, 24_034_152),
    ({"shared": True}, 23_478_632),
]


@pytest.mark.parametrize(("options", "parameters"), ROWS, ids=str)
def test_every_ablation_is_one_option_with_exactly_its_parameters(options, parameters):
    assert count(timm.create_model("dynamixer_s", device="meta", **options)).parameters == parameters


def test_dropping_the_softmax_costs_nothing_and_the_static_matrix_its_entries():
    plain = count(timm.create_model("dynamixer_s", device="meta"))
    assert count(timm.create_model("dynamixer_s", device="meta", softmax=False)) == plain
    added = 2 * (4 * 8 * 32**2 + 14 * 16 * 16**2)
    assert count(timm.create_model("dynamixer_s", device="meta", static=True)).parameters == plain.parameters + added


@pytest.mark.parametrize(
    ("name", "most", "size"),
    [("dynamixer_nano", 1_000_000, 32), ("dynamixer_nano_plus", 1_000_000, 32), ("dynamixer_tiny", 6_000_000, 128)],
)
def test_our_small_models_are_small(name, most, size):
    model = timm.create_model(name, device="meta")
    assert count(model).parameters <= most
    assert model.num_classes == 10
    assert VARIANTS[name].img_size == size
    assert count(model).multiply_adds < 600e6
    # The stem's share: at most a tenth of the work, overlapping or not.
    for stem in ("patch", "overlap"):
        model = timm.create_model(name, stem=stem)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.patch_embed(torch.zeros(1, 3, size, size))
        assert counter.get_total_flops() / 2 <= 0.1 * count(model).multiply_adds


def test_the_reference_does_the_same_multiplications():
    model = timm.create_model("dynamixer_nano").eval()
    mixer = model.stages[0].blocks[0].mixer.row
    x = torch.randn(16, 16, 64)
    counts = []
    for run in (
        lambda: mixer(x),
        lambda: reference_mixing(x, mixer.weights(), segments=mixer.segments),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        counts.append(counter.get_total_flops())
    # The reference's generator is a matrix times a vector (mv), which torch's counter does not know.
    S, L, d = mixer.segments, mixer.length, 2
    assert counts[0] == counts[1] + 2 * 16 * S * L * L * L * d


def test_work_grows_with_the_picture_and_the_count_leaves_the_model_as_it_was():
    model = timm.create_model("dynamixer_s", device="meta").train()
    assert count(model, 448).multiply_adds > 4 * count(model).multiply_adds
    assert count(model, (224, 448)).multiply_adds < count(model, 448).multiply_adds
    assert model.training
    larger = timm.create_model("dynamixer_nano", device="meta", img_size=64, in_chans=1)
    assert count(larger) == count(larger, 64)
    larger.set_input_size((32, 64))
    assert count(larger).multiply_adds == count(larger, (32, 64)).multiply_adds


def test_what_kernels_compute_is_counted_too():
    model = timm.create_model("dynamixer_nano", depths=(1, 1), dims=(16, 32), segments=(2, 4))
    plain = count(model)
    use_kernel(model)
    assert count(model) == plain
    assert [m.fused for m in model.modules() if isinstance(m, MixerLayer)] == [True, True]  # and they go on computing


def test_counting_leaves_every_part_in_its_mode():
    model = timm.create_model("dynamixer_nano")
    model.train()
    model.stages[0].eval()
    before = [part.training for part in model.modules()]
    count(model)
    assert [part.training for part in model.modules()] == before
