import pytest
import torch

from dynamixer.ops.resample import interpolation, resample_matrix, resample_rows, resample_tokens, windows

LIKE = torch.zeros(())


@pytest.mark.parametrize("length", [1, 2, 7, 32, 147])
def test_equal_lengths_give_the_identity_exactly(length):
    assert torch.equal(interpolation(length, length, like=LIKE), torch.eye(length))


@pytest.mark.parametrize(("source", "target"), [(4, 6), (6, 4), (32, 147), (147, 32), (1, 5), (5, 1)])
def test_rows_are_averages_and_every_token_counts(source, target):
    weight = interpolation(source, target, like=LIKE)
    torch.testing.assert_close(weight.sum(1), torch.ones(target))
    assert (weight >= 0).all()
    assert (weight.sum(0) > 0).all()


def test_a_ramp_stays_a_ramp_away_from_the_ends():
    ramp = torch.arange(8.0)
    finer = interpolation(8, 16, like=LIKE) @ ramp
    torch.testing.assert_close(finer[1:-1].diff(), torch.full((13,), 0.5))


def test_the_picture_upside_down_is_the_matrix_upside_down():
    weight = interpolation(5, 8, like=LIKE)
    torch.testing.assert_close(weight.flip(0, 1), weight)


def test_native_length_is_returned_untouched():
    logits, tokens = torch.randn(2, 5, 5), torch.randn(2, 5, 6)
    assert resample_matrix(logits, 5) is logits
    assert resample_rows(logits, 5) is logits
    assert resample_tokens(tokens, 5) is tokens


@pytest.mark.parametrize(("line", "length"), [(9, 8), (12, 8), (16, 8), (147, 32), (2, 1), (7, 3)])
def test_windows_cover_the_line_and_overlap(line, length):
    at = windows(line, length, like=LIKE)
    assert (at.tokens[0, 0], at.tokens[-1, -1]) == (0, line - 1)
    assert (at.tokens.diff(dim=1) == 1).all()
    starts = at.tokens[:, 0]
    assert (starts.diff() >= 1).all()
    assert (starts.diff() <= max(1, length // 4)).all()
    assert (
        torch.equal(starts, (line - length - starts).flip(0)) or length < 4
    )  # the same from both ends, rounding aside


def test_both_axes_of_a_matrix_are_resampled():
    logits = torch.randn(3, 4, 4)
    weight = interpolation(4, 7, like=LIKE)
    torch.testing.assert_close(resample_matrix(logits, 7), torch.einsum("ai,nij,bj->nab", weight, logits, weight))
    torch.testing.assert_close(resample_rows(logits, 7), torch.einsum("nij,bj->nib", logits, weight))


def test_tokens_are_resampled_along_the_line_only():
    tokens = torch.randn(2, 4, 6)
    weight = interpolation(4, 7, like=LIKE)
    torch.testing.assert_close(resample_tokens(tokens, 7), torch.einsum("ak,nkc->nac", weight, tokens))


def test_double_precision_is_kept():
    weight = interpolation(32, 147, like=torch.zeros((), dtype=torch.float64))
    assert (weight.sum(1) - 1).abs().max() < 1e-15
