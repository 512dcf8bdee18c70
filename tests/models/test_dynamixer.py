"""timm's contract, point by point, and pictures of any size."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import create_feature_extractor, group_parameters
from torch.export import Dim, export
from torch.nn import functional as F

import dynamixer
from dynamixer.errors import UserError
from dynamixer.models.variants import VARIANTS
from helpers import error, relative_entropy, sharpen

NAMES = sorted(VARIANTS)


def nano(**options):
    torch.manual_seed(0)
    return sharpen(timm.create_model("dynamixer_nano", **options)).eval()


def small(**options):
    """Two stages of one layer: what is slow to compile."""
    return nano(depths=(1, 1), dims=(16, 32), segments=(2, 4), **options)


def pictures(n=2, height=32, width=32):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_the_weights_used_here_mix_far_from_uniformly():
    model, seen = nano(), []
    for layer in [layer for stage in model.stages for layer in stage.blocks]:
        for mixer in (layer.mixer.row, layer.mixer.column):
            mixer.register_forward_pre_hook(lambda m, given: seen.append(relative_entropy(m.matrices_for(given[0]))))
    model(pictures())
    assert len(seen) == 12
    assert max(seen) < 0.7


def test_importing_registers_the_models_under_the_module_dynamixer():
    code = "import timm; print(timm.is_model('dynamixer_s')); import dynamixer; print(timm.list_models(module='dynamixer'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert printed[:2] == ["False", str(NAMES)]


def test_nano_plus_is_nano_without_the_softmax():
    x, model = pictures(), nano(softmax=False)
    plus = timm.create_model("dynamixer_nano_plus").eval()
    plus.load_state_dict(model.state_dict())
    assert torch.equal(plus(x), model(x))
    plus = timm.create_model("dynamixer_nano_plus", softmax=True).eval()
    plus.load_state_dict(model.state_dict())
    assert (plus(x) - model(x)).abs().max() > 0.1


def test_unknown_options_are_errors():
    with pytest.raises(TypeError, match="qk_scale"):
        timm.create_model("dynamixer_nano", qk_scale=1)


def test_create_model_takes_timms_arguments():
    model = timm.create_model(
        "dynamixer_nano",
        num_classes=7,
        in_chans=4,
        img_size=(40, 24),
        drop_rate=0.5,
        drop_path_rate=0.3,
        global_pool="max",
    )
    assert model(torch.randn(2, 4, 40, 24)).shape == (2, 7)
    assert (model.in_chans, model.num_classes, model.head_drop.p) == (4, 7, 0.5)
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for stage in model.stages for layer in stage.blocks]
    assert rates == pytest.approx([0.06 * i for i in range(6)])  # linear over all blocks, from 0
    assert [(b.mixer.column.length, b.mixer.row.length) for b in model.stages[1].blocks] == [(10, 6)] * 2
    features = model.eval().forward_features(torch.randn(2, 4, 40, 24))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))


@pytest.mark.parametrize(("pool", "classes"), [("", 10), ("avgg", 10), ("avg", -1)])
def test_a_pooling_that_fits_no_classifier_is_refused(pool, classes):
    with pytest.raises(UserError, match=rf"global_pool='{pool}' with {classes} classes: it is one of"):
        timm.create_model("dynamixer_nano").reset_classifier(classes, pool)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_every_pooling_of_timm_works(pool):
    model = timm.create_model("dynamixer_nano", global_pool=pool, num_classes=0 if not pool else 10)
    y = model(pictures())
    assert y.shape == ((2, 10) if pool else (2, 128, 8, 8))
    assert model.head_hidden_size == (256 if pool == "catavgmax" else 128)


def test_the_classifier_can_be_reset_back_and_forth():
    model, x = nano(num_classes=0), pictures()
    hidden = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(model(x), hidden)
    for classes in (10, 0, 1000):
        model.reset_classifier(classes)
        assert model.num_classes == classes
        assert model(x).shape == (2, classes or 128)
        assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), hidden)
    assert model.get_classifier() is model.head
    torch.testing.assert_close(model(x), model.head(hidden))
    model.reset_classifier(5, "max")
    assert torch.equal(
        model.forward_head(model.forward_features(x), pre_logits=True), model.forward_features(x).amax((2, 3))
    )


def test_features_only_gives_nchw_maps_as_feature_info_says():
    model = timm.create_model("dynamixer_s", features_only=True, img_size=56)
    maps = model(pictures(1, 56, 70))
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [192, 384, 384, 384]
    assert model.feature_info.reduction() == [7, 14, 14, 14]
    assert [m.shape[2:] for m in maps] == [(8, 10), (4, 5), (4, 5), (4, 5)]
    shape = {"depths": (1, 1), "dims": (16, 32), "segments": (2, 4), "reduced": 2}
    assert len(timm.create_model("dynamixer_nano", features_only=True, **shape).feature_info) == 2
    with pytest.raises(dynamixer.UserError, match="feature_cls='hook' would give maps as NHWC"):
        timm.create_model("dynamixer_nano", features_only=True, feature_cls="hook")
    two = timm.create_model("dynamixer_nano", features_only=True, out_indices=(0, 1))
    assert [m.shape for m in two(pictures())] == [(2, 64, 16, 16), (2, 128, 8, 8)]


def test_intermediates_are_the_stages_outputs():
    model, x = nano(), pictures()
    seen = {}
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda _, __, y, i=i: seen.update({i: y}))
    final, maps = model.forward_intermediates(x)
    for i, m in enumerate(maps):
        assert torch.equal(m, seen[i].permute(0, 3, 1, 2))
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    nhwc = model.forward_intermediates(x, indices=[0, 2], output_fmt="NHWC", norm=True, intermediates_only=True)
    assert torch.equal(nhwc[0], seen[0])
    assert torch.equal(nhwc[1], model.norm(seen[2]))
    (last,) = model.forward_intermediates(x, indices=1, stop_early=True, intermediates_only=True)
    assert torch.equal(last, maps[-1])
    early, _ = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(early, maps[0])
    with pytest.raises(dynamixer.UserError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruning_keeps_the_maps_and_drops_the_rest():
    model, x = nano(), pictures()
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(pruned.stages) == 2
    for a, b in zip(pruned.forward_intermediates(x, indices=[0, 1], intermediates_only=True), expected, strict=True):
        assert torch.equal(a, b)
    assert pruned(x).shape == (2, 128, 8, 8)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


def test_groups_follow_the_depth():
    model = timm.create_model("dynamixer_nano", device="meta")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    order = [groups[f"stages.{i}.blocks.{j}.norm1.weight"] for i in range(3) for j in range(2)]
    assert order == sorted(set(order))
    assert groups["patch_embed.proj.weight"] < order[0]
    assert groups["head.weight"] > order[-1]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["stages.1.blocks.0.norm1.weight"] == coarse["stages.1.blocks.1.norm1.weight"]
    assert model.no_weight_decay() == set()


def test_gradient_checkpointing_changes_no_value_and_no_gradient():
    results = []
    for enable in (False, True):
        model = nano(drop_path_rate=0.2).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        y = model(pictures())
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_models_are_built_on_the_meta_device_and_in_another_dtype(name):
    with torch.device("meta"):
        inside = timm.create_model(name)
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert {p.device.type for p in inside.parameters()} == {"meta"}
    cfg = model.default_cfg
    size = cfg["input_size"]
    features = model.forward_features(torch.empty(2, *size, device="meta", dtype=torch.bfloat16))
    assert features.shape == (2, model.num_features, *cfg["pool_size"])
    model.reset_classifier(3)
    assert (model.head.weight.device.type, model.head.weight.dtype) == ("meta", torch.bfloat16)


def test_initial_weights_follow_the_paper():
    model = timm.create_model("dynamixer_nano", static=True)
    for name, p in model.named_parameters():
        if "patch_embed" in name or "downsample" in name:
            continue
        if name.endswith(("static", "bias")):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert 0.017 < p.std() < 0.023, name
            assert p.abs().max() <= 2, name


def test_fx_extracts_features_inside_the_stages():
    model, x = nano(), pictures()
    extractor = create_feature_extractor(model, {"stages.1.blocks.0.norm2": "inner", "head": "logits"})
    seen = {}
    model.stages[1].blocks[0].norm2.register_forward_hook(lambda _, __, y: seen.update(inner=y))
    logits = model(x)
    got = extractor(x)
    assert torch.equal(got["inner"], seen["inner"])
    assert torch.equal(got["logits"], logits)


def test_channels_last_input_gives_the_same():
    model, x = nano(), pictures()
    y = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


SIZES = [(2, 32, 32), (3, 40, 24), (1, 33, 31), (2, 16, 50)]


@pytest.mark.parametrize("options", [{}, {"softmax": False, "windows": False}, {"generator": "dense"}], ids=str)
def test_torch_compile_traces_the_whole_graph_for_changing_batches_and_sizes(options):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = small(**options)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for n, height, width in [(2, 40, 24), (3, 33, 31), (4, 64, 50), (5, 32, 32)]:
            x = pictures(n, height, width)
            assert error(compiled(x), model(x)) < 1e-5
    assert len(graphs) == 1


def test_torch_compile_works_under_autocast_at_other_sizes():
    torch.compiler.reset()
    model = small().train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    x = pictures(2, 40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
    y.float().square().mean().backward()
    assert error(y, model(x)) < 0.15
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_torch_compile_with_inductor_gives_the_same_values_and_gradients():
    torch.compiler.reset()
    model = small()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    x = pictures()
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(x)
        y.square().mean().backward()
        grads.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert error(b, a) < 1e-4


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_torch_compile_with_inductor_serves_all_sizes_from_one_graph():
    torch.compiler.reset()
    model = small()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n, height, width in [(2, 40, 24), (3, 33, 31), (4, 64, 50), (5, 32, 32)]:
            x = pictures(n, height, width)
            assert error(compiled(x), model(x)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"softmax": False, "static": True}, {"shared": True}], ids=str)
def test_torch_export_serves_every_batch_and_size(options):
    model = nano(**options)
    dynamic = {0: Dim("batch"), 2: Dim("height", min=8, max=1024), 3: Dim("width", min=8, max=1024)}
    exported = export(model, (pictures(3, 40, 24),), dynamic_shapes=(dynamic,)).module()
    for n, height, width in SIZES:
        x = pictures(n, height, width)
        assert error(exported(x), model(x)) < 1e-5


@pytest.mark.parametrize("options", [{}, {"generator": "dense"}, {"generator": "static"}, {"softmax": False}], ids=str)
@pytest.mark.parametrize("size", [(33, 31), (48, 20), (1, 1), (5, 64)])
def test_any_size_runs_forward_and_backward_from_call_to_call(options, size):
    model = nano(**options)
    native = pictures()
    before = model(native)
    y = model(pictures(2, *size))
    assert y.shape == (2, 10)
    assert y.isfinite().all()
    model.train()(pictures(2, *size)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(model.eval()(native), before)


@pytest.mark.parametrize("options", [{}, {"softmax": False, "static": True}, {"generator": "dense"}], ids=str)
def test_set_input_size_keeps_the_resampled_function_and_trains_on(options):
    model, x = nano(**options, windows=False), pictures(2, 48, 36)
    expected = model(x)
    model.set_input_size((48, 36))
    assert error(model(x), expected) < 1e-5
    assert model.stages[0].blocks[0].mixer.column.length == 24
    assert model.stages[2].blocks[0].mixer.row.length == 9
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(dynamixer.UserError, match="not a picture size"):
        model.set_input_size((0, 32))


ENLARGED = [
    ((24, 24), (32, 32)),
    ((24, 48), (32, 64)),
    ((40, 24), (54, 32)),
    ((16, 100), (32, 200)),
    ((48, 33), (48, 33)),
]


@pytest.mark.parametrize(("size", "scaled"), ENLARGED, ids=str)
def test_enlarging_lets_no_line_have_fewer_tokens_than_native_and_leaves_larger_pictures_alone(size, scaled):
    model, plain, x = nano(enlarge=True), nano(), pictures(2, *size)
    resized = x if size == scaled else F.interpolate(x, scaled, mode="bicubic")
    assert torch.equal(model(x), plain(resized))
    assert size == scaled or error(plain(x), model(x)) > 0.01
    maps, expected = (m.forward_intermediates(y, intermediates_only=True) for m, y in ((model, x), (plain, resized)))
    assert torch.equal(maps[-1], expected[-1])


def test_enlarging_is_exported_with_the_sizes_symbolic():
    model = nano(enlarge=True, depths=(1, 1), dims=(16, 32), segments=(2, 4))
    dynamic = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=8, max=128), 3: Dim("width", min=8, max=128)}
    program = export(model, (pictures(3, 40, 48),), dynamic_shapes=(dynamic,)).module()
    for size, _ in ENLARGED:
        assert error(program(pictures(2, *size)), model(pictures(2, *size))) < 1e-5


def test_a_token_made_of_padding_alone_never_takes_part():
    """33 pixels are 17 tokens of 2 and, halved, 9: what the padding holds cannot be seen, whatever lies in the last patch."""
    model = nano()
    grids = []
    for stage in model.stages:
        stage.blocks[0].mixer.register_forward_pre_hook(lambda _, given: grids.append(tuple(given[0].shape[1:3])))
    features = model.forward_features(pictures(1, 33, 30))
    assert grids == [(17, 15), (9, 8), (9, 8)]
    assert features.shape[2:] == (9, 8)


def test_a_thin_picture_mixes_along_one_line_only():
    model, x = nano(), pictures(1, 2, 32)
    moved = x.clone()
    moved[..., -2:] += 3.0
    before, after = model.forward_features(x), model.forward_features(moved)
    assert (before - after)[..., 0].abs().max() > 1e-4  # the far end is read at the near end


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_a_picture_of_1024_pixels_runs_on_the_small_model_within_memory():
    code = (
        "import resource, timm, torch, dynamixer\n"
        "m = timm.create_model('dynamixer_s').eval()\n"
        "with torch.inference_mode(): y = m(torch.randn(1, 3, 1024, 1024))\n"
        "assert y.isfinite().all()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 8  # GiB


def test_half_precision_errs_little_against_single_precision():
    model, x = nano(), pictures(8)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        automatic = model(x)
    assert error(automatic, expected) < 0.15
    assert (automatic.float().argmax(1) == expected.argmax(1)).float().mean() > 0.8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shared": True, "img_size": (32, 48)}, "square grid"),
        ({"stem": "convs"}, "'patch' or 'overlap'"),
        ({"segments": 7}, "do not divide"),
        ({"depths": (1, 2)}, "an entry for each stage"),
        ({"img_size": 0}, "not a picture size"),
    ],
)
def test_options_without_meaning_are_refused(options, sentence):
    with pytest.raises(dynamixer.UserError, match=sentence):
        timm.create_model("dynamixer_nano", **options)


def test_options_combine():
    for options in ({"stem": "overlap"}, {"shared": True, "static": True}, {"row": False, "softmax": False}):
        model = nano(**options)
        assert model(pictures(2, 33, 40)).isfinite().all()
