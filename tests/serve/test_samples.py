"""Which pictures the page offers."""

from dynamixer.data.decode import Limits
from dynamixer.data.sources import EMBEDDED, open_data
from dynamixer.serve.samples import AVERAGED, find_samples


def test_clothes_for_a_model_of_clothes_and_photographs_for_others():
    clothes = open_data(EMBEDDED).test
    found = find_samples(None, Limits(), clothes.classes)
    assert [sample.name for sample in found[:10]] == list(clothes.classes)
    assert len(found) == AVERAGED
    photographs = find_samples(None, Limits(), ("tench", "church"))
    assert {"cat", "palace"} < {sample.name for sample in photographs}
    assert len(photographs) == 8
    small = find_samples(
        None, Limits(file_bytes=10_000), ("tench", "church")
    )  # the page could not send the photographs
    assert [sample.name for sample in small[:10]] == list(clothes.classes)
