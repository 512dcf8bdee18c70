import numpy as np
import pytest
import torch

from dynamixer.errors import UserError
from dynamixer.explain import average, look
from small_models import OPTIONS, pictures, small


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_means_and_variances_are_those_of_all_pictures_together(options):
    model, x = small(**options), pictures(count=7)
    found = average(model, x.split(3))
    assert found.pictures == 7
    for block, mixing in zip(found.blocks, look(model, x).blocks, strict=True):
        assert (block.block, block.name, block.grid) == (mixing.block, mixing.name, mixing.grid)
        for axis in ("row", "column"):
            matrices, moved = mixing.matrices(axis), block.of(axis)
            assert (moved is None) == (matrices is None)
            if moved is None:
                continue
            p = matrices.double().numpy()
            assert np.abs(moved.mean.numpy() - p.mean(0)).max() < 1e-5
            fixed, variance = np.square(p.mean(0) - p.mean(0).mean(-1, keepdims=True)).mean(), p.var(0, ddof=1).mean()
            if mixing.content:
                assert moved.variance == pytest.approx(variance, rel=1e-4)
                assert moved.change == pytest.approx(np.sqrt(variance) * p.shape[-1], rel=1e-4)
                assert moved.dynamic == pytest.approx(min(1, variance / (p.var(0).mean() + fixed)), rel=1e-4)
                assert 0.05 < moved.dynamic <= 1
            else:
                assert (moved.variance, moved.change, moved.dynamic) == (0, 0, 0)
            assert moved.entropy == pytest.approx(float(mixing.entropy(axis).mean()), rel=1e-5)
        if mixing.branch_weights is None:
            assert block.branch_weights is None
        else:
            assert torch.allclose(block.branch_weights, mixing.branch_weights.mean(0), atol=1e-6)


def test_the_same_picture_again_changes_nothing():
    model, x = small(), pictures(count=1)
    for block in average(model, [x, x.expand(3, -1, -1, -1)]).blocks:
        assert block.row.dynamic < 1e-6
        assert block.row.change < 1e-3


def test_matrices_that_differ_from_even_by_content_alone_are_wholly_dynamic():
    model = small(depths=(1,), dims=(8,), segments=(2,), softmax=False)
    with torch.no_grad():
        model.stages[0].blocks[0].mixer.row.generate.bias.zero_()
        model.stages[0].blocks[0].mixer.row.reduce.bias.zero_()
    x = pictures(count=64)
    (block,) = average(model, [x, -x], weights=False).blocks
    assert block.row.dynamic > 0.9
    assert block.branch_weights is None


def test_few_pictures_do_not_make_it_less():
    model, x = small(), pictures(count=64)
    many = average(model, [x], weights=False).blocks[0].row.dynamic
    pairs = [average(model, [pair], weights=False).blocks[0].row.dynamic for pair in x.split(2)]
    assert abs(np.mean(pairs) - many) < 0.1 * many  # divided by N, pairs would give about half


def test_chosen_blocks_only():
    found = average(small(), [pictures()], blocks=[-1])
    assert [block.block for block in found.blocks] == [2]


def test_mistakes_are_one_sentence():
    model = small()
    for batches, words in (
        ([], "needs two or more; there are 0"),
        ([pictures(count=1)], "needs two or more; there is 1"),
        ([pictures(), pictures((20, 20))], r"\(16, 16\) and of \(20, 20\)"),
    ):
        with pytest.raises(UserError, match=words):
            average(model, batches)
