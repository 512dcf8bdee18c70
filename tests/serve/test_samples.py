"""Which pictures the page offers."""

from PIL import Image

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


def test_pictures_that_the_server_does_not_accept_do_not_take_the_place_of_others(tmp_path):
    for number in range(AVERAGED + 1):
        Image.new("RGB", (4, 4)).save(tmp_path / f"a{number:03}.tif")
    Image.new("RGB", (4, 4)).save(tmp_path / "z.png")
    assert [sample.name for sample in find_samples(tmp_path, Limits(), ())] == ["z"]


def test_hidden_folders_are_left_out(tmp_path):
    for folder in (".thumbnails/large", "holiday"):
        (tmp_path / ".photos" / folder).mkdir(parents=True)  # the folder that was asked for may be hidden itself
        Image.new("RGB", (4, 4)).save(tmp_path / ".photos" / folder / f"{folder.strip('.')[:5]}.png")
    assert [sample.name for sample in find_samples(tmp_path / ".photos", Limits(), ())] == ["holid"]
