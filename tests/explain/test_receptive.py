import math

import numpy as np
import pytest
import timm
import torch

from dynamixer.errors import UserError
from dynamixer.explain import look, receptive, rollout
from dynamixer.explain.receptive import gradient_of, rank_correlation
from small_models import OPTIONS, PICTURES, pictures, small

EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
ONE = {"depths": (1,), "dims": (8,), "segments": (2,)}  # one block on 8x8 tokens


def identity(**options):
    """A network in which every token reads itself only: static matrices without the softmax, set to the identity."""
    model = small(generator="static", softmax=False, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("matrices"):
                parameter.copy_(torch.eye(parameter.shape[-1]).expand_as(parameter))
    return model


def by_hand(seen, image=0):
    """The rollout as a product of matrices over all tokens, built entry by entry: [tokens of the last grid, of the first]."""
    flow, grid = None, None
    for mixing in seen.blocks:
        if flow is not None and mixing.grid != grid:
            flow = downsampled(grid, mixing.grid) @ flow
        grid = mixing.grid
        step = one_block(mixing, image)
        flow = step if flow is None else step @ flow
    return flow


def downsampled(grid, smaller):
    down = np.zeros((smaller[0] * smaller[1], grid[0] * grid[1]))
    for h in range(grid[0]):
        for w in range(grid[1]):
            down[h // 2 * smaller[1] + w // 2, h * grid[1] + w] = 1
    return down / down.sum(1, keepdims=True)


def one_block(mixing, image):
    height, width = mixing.grid
    taken = np.zeros((height, width, height, width))  # [output token, input token]
    for h in range(height):
        for w in range(width):
            taken[h, w, h, w] += 1 + (float(mixing.shares["channel"][image]) if "channel" in mixing.branches else 0)
            for s in range(mixing.segments):
                if mixing.row is not None:
                    weights = mixing.row[image, h, s, w].abs().numpy().astype(float)
                    taken[h, w, h] += float(mixing.shares["row"][image, s]) * weights / weights.sum()
                if mixing.column is not None:
                    weights = mixing.column[image, w, s, h].abs().numpy().astype(float)
                    taken[h, w, :, w] += float(mixing.shares["column"][image, s]) * weights / weights.sum()
    return taken.reshape(height * width, -1) / 2


@EVERY
@pytest.mark.parametrize("size", [PICTURES["larger"], PICTURES["smaller"]])
def test_the_rollout_is_the_product_of_the_blocks(options, size):
    if options.get("shared"):
        size = size[0], size[0]
    seen = look(small(**options), pictures(size))
    every = rollout(seen, image=1)
    expected = by_hand(seen, image=1)
    height, width = seen.blocks[-1].grid
    assert np.abs(every.flatten(0, 1).flatten(1).numpy() - expected).max() < 1e-5
    assert torch.allclose(every.sum((-2, -1)), torch.ones(()), atol=1e-5)
    assert (every >= 0).all()
    for token in ((0, 0), (height - 1, width // 2)):
        assert torch.allclose(rollout(seen, token, image=1), every[token], atol=1e-6)


def test_a_transposed_matrix_is_another_rollout():
    seen = look(small(**ONE), pictures())
    mixing = seen.blocks[0]
    object.__setattr__(mixing, "row", mixing.row.mT)
    turned = rollout(seen).flatten(0, 1).flatten(1).numpy()
    object.__setattr__(mixing, "row", mixing.row.mT)
    assert np.abs(turned - by_hand(seen)).max() > 0.05


def test_in_an_identity_network_a_token_comes_from_itself_alone():
    model = identity(reweight=False, **ONE)  # whose means over all tokens would bring the others in
    found = receptive(model, pictures(count=1), (2, 5))
    alone = torch.zeros(8, 8)
    alone[2, 5] = 1
    assert torch.equal(found.rollout, alone)
    assert torch.equal(found.gradient, alone)
    assert found.rank_correlation == pytest.approx(1)


def test_a_down_sampling_is_read_evenly():
    model, x = identity(reweight=False, img_size=(14, 16)), pictures((14, 16), count=1)
    found = receptive(model, x, (3, 0))  # 7x8 tokens, then 4x4: the last row merges one row
    expected = torch.zeros(7, 8)
    expected[6, :2] = 1 / 2
    assert torch.allclose(found.rollout, expected)
    assert torch.equal(found.gradient > 0, expected > 0)
    inner = rollout(look(model, x), (1, 1))
    assert torch.allclose(inner[2:4, 2:4], torch.full((2, 2), 0.25))
    assert float(inner.sum()) == pytest.approx(1)


def zero_projection(model):
    with torch.no_grad():
        model.stages[0].blocks[0].mixer.row.project.weight.zero_()
    return model


def closed_branch(model):
    """The reweighting gives the row nothing."""
    with torch.no_grad():
        last = model.stages[0].blocks[0].mixer.reweight.fc2
        last.bias.view(-1, 3)[:, 1] = -1e4
    return model


@pytest.mark.parametrize(
    "model",
    [zero_projection(small(reweight=False, **ONE)), closed_branch(small(**ONE)), small(row=False, **ONE)],
    ids=["no projection", "no weight", "no branch"],
)
def test_a_block_without_its_row_reads_its_column_only(model):
    x = pictures(count=1)
    found = receptive(model, x, (3, 6))
    column = torch.zeros(8, 8, dtype=torch.bool)
    column[:, 6] = True
    assert (found.rollout[column] > 0).all()
    assert (found.rollout[~column] == 0).all()
    if model.stages[0].blocks[0].mixer.reweight is None:  # whose means over all tokens would bring the others in
        assert (found.gradient[~column] == 0).all()


def test_a_block_whose_projections_are_zero_passes_tokens_on():
    model = zero_projection(small(reweight=False, **ONE))
    with torch.no_grad():
        for linear in (model.stages[0].blocks[0].mixer.column.project, model.stages[0].blocks[0].mixer.channel):
            linear.weight.zero_()
    found = receptive(model, pictures(count=1), (3, 6))
    assert float(found.rollout[3, 6]) == float(found.rollout.sum()) == 1
    assert torch.equal(found.gradient, found.rollout)


def test_the_gradient_reaches_what_the_matrices_reach_and_no_more():
    model = small(reweight=False, row=False, column=True, **ONE)
    gradient = gradient_of(model, pictures(count=1), (3, 6), block=0)
    assert (gradient[:, 6] > 0).all()
    gradient[:, 6] = 0
    assert (gradient == 0).all()


def test_the_gradient_is_the_size_of_the_jacobian():
    model, x = small(**ONE).double(), pictures(count=1).double()
    stem = model.patch_embed(x).detach()

    def value(tokens):
        return model.stages[0](tokens)[0, 2, 3]

    size = torch.autograd.functional.jacobian(value, stem)[:, 0].square().sum((0, -1)).sqrt()
    found = gradient_of(model, x, (2, 3), block=0, probes=300)
    assert torch.allclose(found.double(), size / size.sum(), rtol=0.2, atol=1e-4)
    assert rank_correlation(gradient_of(model, x, (2, 3), block=0), size) > 0.95


def test_the_model_stays_as_it_is():
    model, x = small(drop_path_rate=0.5).train(), pictures(count=1)
    a, b = receptive(model, x, (1, 2)), receptive(model, x[0], (1, 2))
    assert torch.equal(a.gradient, b.gradient)  # evaluated, and the same directions each time
    assert torch.equal(a.rollout, b.rollout)
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()
    assert torch.equal(receptive(torch.compile(model, backend="eager"), x, (1, 2)).gradient, a.gradient)
    with torch.inference_mode():  # as a server runs it
        assert torch.allclose(receptive(model, x, (1, 2)).rollout, a.rollout, atol=1e-6)


@EVERY
def test_both_answers_exist_for_every_option(options):
    model = small(**options)
    for block in (0, -1):
        found = receptive(model, pictures((20, 20), count=1), (1, 2), block=block)
        first = look(model, pictures((20, 20), count=1)).blocks[0].grid
        assert found.rollout.shape == found.gradient.shape == first
        for answer in (found.rollout, found.gradient):
            assert float(answer.sum()) == pytest.approx(1, abs=1e-5)
        assert -1 <= found.rank_correlation <= 1
        assert found.rank_correlation > 0.25  # not an accident: over 100 tokens chance is about 0.1
        assert "MLPs" in found.left_out


def test_an_earlier_block_sees_less():
    model, x = small(), pictures(count=1)
    early, late = receptive(model, x, (4, 4), block=0), receptive(model, x, (2, 2))
    assert (early.block, late.block) == (0, 2)
    assert int((early.rollout > 0).sum()) == 15  # its row and its column
    assert int((late.rollout > 0).sum()) == 64


def test_ranks_are_spearmans():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    # Two ties: ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4: by the formula of Pearson on the ranks.
    b, c = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.0, 4.0])
    expected = np.corrcoef([1, 2.5, 2.5, 4], [2, 1, 3, 4])[0, 1]
    assert rank_correlation(b, c) == pytest.approx(expected)
    assert math.isnan(rank_correlation(torch.ones(4), c))


def test_mistakes_are_one_sentence():
    model, x = small(), pictures(count=1)
    for call, words in (
        (lambda: receptive(timm.create_model("resnet18"), x, (0, 0)), "this is a ResNet"),
        (lambda: receptive(model, pictures(), (0, 0)), "one picture"),
        (lambda: receptive(model, x, (4, 0)), r"no token \(4, 0\): this grid has 4 rows and 4 columns"),
        (lambda: receptive(model, x, (-1, 0)), "no token"),
        (lambda: receptive(model, x, (0, 0, 0)), "no token"),
        (lambda: receptive(model, x, (0, 0), block=3), "no block 3"),
        (lambda: receptive(model, x, (0, 0), probes=0), "probes=0"),
        (lambda: rollout(look(model, x, weights=False)), "both axes and the weights"),
        (lambda: rollout(look(model, x, axes=["row"])), "both axes and the weights"),
        (lambda: rollout(look(model, x, blocks=[1, 2])), "both axes and the weights"),
    ):
        with pytest.raises(UserError, match=words):
            call()
