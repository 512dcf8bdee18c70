"""What a picture is refused for, and what is not refused."""

import time

import pytest

from dynamixer.data.decode import decode
from dynamixer.serve.limits import open_picture
from dynamixer.serve.settings import Refused, Settings
from serve.world import hostile, legitimate, picture, png_header

LIMITS = Settings().limits


def test_every_hostile_picture_is_refused_at_once():
    made = hostile()
    assert len(made) >= 300
    accepted, slow = [], []
    for name, encoded in made:
        start = time.thread_time()  # other work on the machine does not count
        try:
            open_picture(encoded, LIMITS)
            accepted.append(name)
        except Refused as error:
            assert error.status in (413, 415, 422), name
            assert error.sentence.endswith("."), name
        if time.thread_time() - start > 0.9:
            slow.append(name)
    assert (accepted, slow) == ([], [])


@pytest.mark.parametrize(("name", "encoded"), legitimate(), ids=[name for name, _ in legitimate()])
def test_photographs_are_decoded_as_offline(name, encoded):
    assert open_picture(encoded, LIMITS).tobytes() == decode(encoded).tobytes()


@pytest.mark.parametrize(
    ("encoded", "status", "words"),
    [
        (b"", 422, "empty"),
        (b"GIF89a", 415, "JPEG, PNG, WebP and BMP"),
        (png_header(9_000, 9_000), 413, "at most 16,000 a side and 40,000,000 in all"),
        (picture(0)[:-2], 422, "ends before the picture does"),
        (picture(0) + b"<?php", 422, "5 bytes follow the end of the picture"),
    ],
)
def test_a_refusal_says_why(encoded, status, words):
    with pytest.raises(Refused, match=words) as caught:
        open_picture(encoded, LIMITS)
    assert caught.value.status == status
