import json
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import dynamixer
from dynamixer import UserError
from dynamixer.data import Preprocessing, open_data
from dynamixer.data.loading import Batch
from dynamixer.evaluate import BINS, PRECISIONS, WRONG, Tally, evaluate, match_classes, measure, tally
from dynamixer.models.checkpoint import save_checkpoint


class Answers(torch.nn.Module):
    """Gives the picture's own pixels as logits."""

    def forward(self, x):
        return x[:, 0, 0]


def loader(logits, labels):
    labels = torch.as_tensor(labels)
    return [Batch(logits[i : i + 2, None, None], labels[i : i + 2]) for i in range(0, len(logits), 2)]


def counted(logits, labels, numbers=None, step=7):
    whole = Tally(logits.shape[1])
    numbers = range(len(labels)) if numbers is None else numbers
    for i in range(0, len(labels), step):
        whole.add(logits[i : i + step], labels[i : i + step], numbers[i : i + step])
    return whole


def outputs(n=200, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    return logits, torch.randint(classes, (n,), generator=generator)


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
    assert m.loss == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-5)
    assert m.confusion.sum() == 7
    assert m.confusion[2, 7] == 1
    assert m.confusion[0, 0] == 1


def test_a_missing_picture_is_never_overlooked():
    with pytest.raises(AssertionError, match="8 pictures were asked for and 7 came"):
        measure(Answers(), loader(torch.randn(7, 3), [0] * 7), device=torch.device("cpu"), images=8, classes=3)


def test_the_sums_are_those_of_the_plain_loop_bit_for_bit():
    logits, labels = outputs(n=101, classes=9)
    m = measure(Answers(), loader(logits, labels), device=torch.device("cpu"), images=101, classes=9)
    loss, top1, top5 = 0.0, 0, 0
    for i in range(0, 101, 2):
        some, right = logits[i : i + 2], labels[i : i + 2]
        loss += float(F.cross_entropy(some, right, reduction="sum"))
        hits = some.topk(5, dim=1).indices == right[:, None]
        top1, top5 = top1 + int(hits[:, 0].sum()), top5 + int(hits.any(1).sum())
    assert (m.loss, m.top1, m.top5) == (loss / 101, 100 * top1 / 101, 100 * top5 / 101)
    assert m.summary() == {"top1": m.top1, "top5": m.top5, "loss": m.loss, "ece": m.ece, "images": 101}


def test_the_calibration_error_is_the_definition():
    logits, labels = outputs()
    m = counted(logits, labels).metrics()
    confidence, predicted = logits.softmax(1).max(1)
    ece = 0.0
    for low in np.arange(BINS) / BINS:
        inside = (confidence >= low) & (confidence < low + 1 / BINS)
        if inside.any():
            accuracy = (predicted == labels)[inside].double().mean()
            ece += float(inside.double().mean() * (accuracy - confidence[inside].double().mean()).abs())
    assert m.ece == pytest.approx(100 * ece)
    assert m.ece > 1
    assert m.bins.shape == (BINS, 3)
    assert m.bins.sum(0) == pytest.approx([200, float(confidence.sum()), np.trace(m.confusion)], rel=1e-6)


def test_certainty_is_calibrated_when_it_is_right_and_not_when_it_is_wrong():
    logits, labels = 1000 * torch.eye(3), torch.arange(3)
    right = counted(logits, labels).metrics()
    assert (right.ece, right.wrong) == (0, ())
    assert right.bins[-1].tolist() == [3, 3, 3]
    wrong = counted(logits, (labels + 1) % 3).metrics()
    assert wrong.ece == 100
    assert wrong.wrong == ((0, 1, 0, 1.0), (1, 2, 1, 1.0), (2, 0, 2, 1.0))


def test_the_worst_pictures_are_kept_worst_first_then_by_number():
    logits, labels = outputs()
    logits[[150, 30]] = logits[10].clone()  # ties
    labels[[10, 150, 30]] = (logits[10].argmax() + 1) % 6
    confidence, predicted = logits.softmax(1).max(1)
    every = [
        (i, int(labels[i]), int(predicted[i]), float(confidence[i]))
        for i in range(len(labels))
        if predicted[i] != labels[i]
    ]
    wanted = sorted(every, key=lambda one: (-one[3], one[0]))[:WRONG]
    kept = counted(logits, labels).metrics().wrong
    assert len(kept) == WRONG < len(every)
    assert [one[:3] for one in kept] == [one[:3] for one in wanted]
    assert [one[3] for one in kept] == pytest.approx([one[3] for one in wanted])
    assert all(type(value) in (int, float) for one in kept for value in one)


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_processes_count_together_what_one_counts_alone(parts):
    logits, labels = outputs()
    alone = counted(logits, labels).metrics()
    shares = [np.arange(i, 200, parts) for i in range(parts)]
    sent = [pickle.loads(pickle.dumps(counted(logits[share], labels[share], share))) for share in shares]
    before = sent[0].confusion.copy()
    together = Tally.merged(sent).metrics()
    assert together.summary() == pytest.approx(alone.summary())
    assert (together.top1, together.top5) == (alone.top1, alone.top5)
    assert (together.confusion == alone.confusion).all()
    np.testing.assert_allclose(together.bins, alone.bins)
    assert [one[:3] for one in together.wrong] == [one[:3] for one in alone.wrong]
    assert (sent[0].confusion == before).all()  # merging leaves the parts alone


def test_a_tally_comes_back_from_json():
    whole = counted(*outputs())
    back = Tally.from_dict(json.loads(json.dumps(whole.to_dict()))).metrics()
    wanted = whole.metrics()
    assert back.summary() == wanted.summary()
    assert back.wrong == wanted.wrong
    assert (back.confusion == wanted.confusion).all()
    assert (back.bins == wanted.bins).all()


def test_outputs_that_overflowed_are_counted_without_confidence():
    m = counted(torch.full((2, 3), torch.nan), torch.tensor([1, 2])).metrics()
    assert np.isnan(m.loss)
    assert m.bins[0].tolist() == [2, 0, 0]
    assert [one[3] for one in m.wrong] == [0, 0]


def test_pictures_have_the_numbers_that_are_given():
    logits, labels = outputs(n=6)
    wrong = (logits.argmax(1) + 1) % 6
    kwargs = {"device": torch.device("cpu"), "images": 6, "classes": 6}
    default = measure(Answers(), loader(logits, wrong), **kwargs)
    assert sorted(one[0] for one in default.wrong) == [0, 1, 2, 3, 4, 5]
    given = measure(Answers(), loader(logits, wrong), **kwargs, numbers=[9, 8, 7, 6, 5, 4])
    assert [one[0] for one in given.wrong] == [9 - one[0] for one in default.wrong]
    with pytest.raises(AssertionError, match="2 pictures came for 1 numbers"):
        measure(Answers(), loader(logits, labels), **kwargs, numbers=[1, 2, 3])


def test_a_tally_can_be_stopped_after_a_batch():
    logits, labels = outputs(n=8)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 2

    kwargs = {"device": torch.device("cpu"), "images": 8, "classes": 6}
    assert tally(Answers(), loader(logits, labels), **kwargs, stop=stop) is None
    assert len(asked) == 2
    whole = tally(Answers(), loader(logits, labels), **kwargs, stop=lambda: False)
    assert whole.images == 8


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_says_nearly_the_same(precision):
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, x):
            seen.append(x.dtype)
            out = super().forward(x[:, 0, 0])
            seen.append(out.dtype)
            return out

    logits, labels = outputs(n=20)
    model = Model(6, 6)
    exact = F.cross_entropy(F.linear(logits.double(), model.weight.double(), model.bias.double()), labels)
    model = model.double() if precision == "fp64" else model
    kwargs = {"device": torch.device("cpu"), "images": 20, "classes": 6}
    m = measure(model, loader(logits, labels), **kwargs, precision=precision)
    given = torch.float64 if precision == "fp64" else torch.float32
    inside = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[precision]
    assert set(seen[::2]) == {given}
    assert set(seen[1::2]) == {inside}
    assert m.loss == pytest.approx(
        float(exact.detach()), rel={"bf16": 1e-2, "fp16": 1e-3, "fp32": 1e-6, "fp64": 1e-14}[precision]
    )


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


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"batch_size": 0}])
def test_options_without_meaning_are_refused(options):
    with pytest.raises(dynamixer.UserError, match="precision="):
        dynamixer.evaluate("x", "fashion-mnist-mini", **options)


def test_a_picture_that_cannot_be_read_stops_it_or_is_counted_out_loud(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 20), (i * 20, 9, 9)).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data/dog/1.png").write_bytes(b"broken")
    made = timm.create_model("test_resnet", num_classes=2)
    about = {"name": "test_resnet", "args": {"num_classes": 2}, "classes": ("cat", "dog"), "trained": {}}
    preprocessing = Preprocessing.of(made).at(32)
    save_checkpoint(tmp_path / "m.safetensors", made.state_dict(), preprocessing=preprocessing, **about)
    options = {"model": tmp_path / "m.safetensors", "data": tmp_path / "data", "device": "cpu"}
    with pytest.raises(UserError, match=r"dog/1\.png is not a picture"):
        evaluate(**options)
    result = evaluate(**options, on_bad_image="skip")
    assert (result["images"], result["skipped"]) == (5, 1)
    assert capsys.readouterr().err.count("measured without it: ") == 1
