import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import dynamixer
from dynamixer.data import open_data
from dynamixer.data.preprocess import collate
from dynamixer.evaluate import match_classes, measure


class Answers(torch.nn.Module):
    """Gives the picture's own pixels as logits."""

    def forward(self, x):
        return x[:, 0, 0]


def loader(logits, labels):
    data = [(row.view(1, 1, -1), label) for row, label in zip(logits, labels, strict=True)]
    return DataLoader(data, batch_size=2, collate_fn=collate)


def test_accuracies_loss_and_confusion_are_counted():
    logits = torch.randn(7, 8)
    labels = [0, 1, 2, 3, 4, 5, 6]
    logits[0, 0], logits[1, 1] = 9, 9  # right
    logits[2, 7], logits[2, 2] = 9, 8  # second
    logits[3] = torch.tensor([9, 8, 7, -9, 6, 5, 4, 3.0])  # last
    m = measure(Answers(), loader(logits, labels), device=torch.device("cpu"), images=7, classes=8)
    order = logits.argsort(dim=1, descending=True)
    ranks = [order[i].tolist().index(label) for i, label in enumerate(labels)]
    assert m.top1 == pytest.approx(100 * np.mean([r == 0 for r in ranks]))
    assert m.top5 == pytest.approx(100 * np.mean([r < 5 for r in ranks]))
    assert m.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-5)
    assert m.confusion.sum() == 7
    assert m.confusion[2, 7] == 1
    assert m.confusion[0, 0] == 1


def test_a_missing_picture_is_never_overlooked():
    with pytest.raises(AssertionError, match="8 pictures were asked for and 7 came"):
        measure(Answers(), loader(torch.randn(7, 3), [0] * 7), device=torch.device("cpu"), images=8, classes=3)


class Known:
    path = "model"

    def __init__(self, classes):
        self.classes = classes


def test_classes_are_matched_by_name():
    source = open_data("fashion-mnist-mini").test
    names, before = source.classes, source.labels.copy()
    turned = match_classes(source, Known(("extra", *reversed(names))))
    assert [turned.classes[i] for i in turned.labels] == [names[i] for i in before]
    with pytest.raises(dynamixer.UserError, match="has 1 classes that model was not trained on, such as 'bag'"):
        match_classes(open_data("fashion-mnist-mini").test, Known(tuple(n for n in names if n != "bag")))


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"batch_size": 0}])
def test_options_without_meaning_are_refused(options):
    with pytest.raises(dynamixer.UserError):
        dynamixer.evaluate("x", "fashion-mnist-mini", **options)
