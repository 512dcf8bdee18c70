"""The tables of results: what is written is read back, and nothing else is."""

import pytest

from dynamixer import UserError
from dynamixer.study.results import Results
from dynamixer.study.rows import Run

RUN = Run("cifar10", "static", 1)
LINE = {
    "protocol": "abc", "epochs": 3, "parameters": 5, "val_top1": 60.25, "test_top1": 61.5, "test_loss": 1.0, "hours": 0.5,
    "threads": 1, "cpu": "EPYC, of sorts", "torch": "2.11", "commit": "",
}  # fmt: skip


def test_what_is_added_is_read_back(tmp_path):
    results = Results(tmp_path)
    results.add(RUN, {"runs": [LINE], "sizes": [{"size": 24, "top1": 50.5}, {"size": 28, "top1": 55.0}]})
    again = Results(tmp_path)
    assert again.tops("cifar10", "static") == {1: 61.5}
    assert again.of("runs", "cifar10", "static")[0] | LINE == again.of("runs", "cifar10", "static")[0]
    assert [line["top1"] for line in again.of("sizes", "cifar10", "static")] == [50.5, 55.0]
    assert again.has(RUN, "runs")
    assert not again.has(Run("cifar10", "static", 1, 30), "runs")


def test_a_run_added_again_replaces_itself_and_the_order_is_always_the_same(tmp_path):
    one, other = Results(tmp_path / "one"), Results(tmp_path / "other")
    for run in (RUN, Run("cifar10", "dense", 2), Run("cifar10", "static", 0)):
        one.add(run, {"runs": [LINE]})
    for run in (Run("cifar10", "static", 0), RUN, Run("cifar10", "dense", 2)):
        other.add(run, {"runs": [LINE | {"test_top1": 1.0}]})
        other.add(run, {"runs": [LINE]})
    assert (tmp_path / "one/runs.csv").read_bytes() == (tmp_path / "other/runs.csv").read_bytes()


def test_two_that_add_at_once_lose_nothing(tmp_path):
    one, other = Results(tmp_path), Results(tmp_path)
    one.add(RUN, {"runs": [LINE]})
    other.add(Run("cifar10", "dense", 2), {"runs": [LINE]})
    assert len(Results(tmp_path).lines["runs"]) == 2


def test_parts_without_their_run_do_not_count(tmp_path):
    """They are left where a queue was killed between two files."""
    results = Results(tmp_path)
    results.add(RUN, {"sizes": [{"size": 24, "top1": 50.5}]})
    assert results.of("sizes", "cifar10", "static") == []
    results.add(RUN, {"runs": [LINE], "sizes": [{"size": 24, "top1": 51.5}]})
    assert [line["top1"] for line in Results(tmp_path).of("sizes", "cifar10", "static")] == [51.5]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "dataset,row\n", "", "\x00", '"'])
def test_a_file_that_is_not_of_the_study_is_a_sentence(tmp_path, text):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(UserError, match=r"runs.csv is not a table of the study's results"):
        Results(tmp_path)


def test_a_row_that_does_not_exist_is_a_sentence(tmp_path):
    Results(tmp_path).add(RUN, {"runs": [LINE]})
    path = tmp_path / "runs.csv"
    path.write_text(path.read_text().replace("static", "magic"))
    with pytest.raises(UserError, match="known rows are expected"):
        Results(tmp_path)
