"""One picture in every encoding has to come out the same; what cannot be used has to say so."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dynamixer.data import BadImage, Limits, decode


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def ramp(mode="RGB"):
    """24x16 pixels, different at each corner, so that a rotation or a flip shows."""
    y, x = np.mgrid[:16, :24]
    return Image.fromarray(np.stack([x * 10, y * 15, (x + y) * 6], -1).astype(np.uint8)).convert(mode)


def pixels(picture):
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    upright = ramp()
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if undo is None else upright.transpose(undo)
    got = decode(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(pixels(got), pixels(upright))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_come_out_the_same(kind):
    assert np.array_equal(pixels(decode(encoded(ramp(), kind))), pixels(ramp()))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95, "subsampling": 0}), ("WEBP", {"quality": 98})])
def test_lossy_formats_come_out_nearly_the_same(kind, options):
    assert np.abs(pixels(decode(encoded(ramp(), kind, **options))) - pixels(ramp())).mean() < 4


def test_cmyk_is_converted():
    got = pixels(decode(encoded(ramp().convert("CMYK"), "JPEG", quality=95, subsampling=0)))
    assert np.abs(got - pixels(ramp())).mean() < 6


def test_grey_becomes_three_equal_channels():
    got = pixels(decode(encoded(ramp("L"))))
    assert np.array_equal(got[..., 0], np.asarray(ramp("L")))
    assert (got == got[..., :1]).all()


def test_sixteen_bits_are_scaled_to_eight():
    grey = np.asarray(ramp("L"))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(pixels(decode(encoded(wide, kind)))[..., 0], grey)


def test_floats_are_scaled_to_eight_bits():
    values = np.linspace(0, 1, 24 * 16, dtype=np.float32).reshape(16, 24)
    got = pixels(decode(encoded(Image.fromarray(values), "TIFF")))
    assert (got.min(), got.max()) == (0, 255)


def test_a_palette_is_resolved():
    palette = ramp().quantize(16)
    assert np.array_equal(pixels(decode(encoded(palette))), pixels(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(mode):
    picture = ramp().convert(mode)
    picture.putalpha(Image.fromarray(np.where(np.mgrid[:16, :24][1] < 12, 0, 255).astype(np.uint8)))
    got = pixels(decode(encoded(picture)))
    assert (got[:, :12] == 255).all()
    assert np.array_equal(got[:, 12:], pixels(picture.convert("RGB"))[:, 12:])


def test_a_transparent_palette_lies_over_white():
    palette = ramp().quantize(16)
    got = pixels(decode(encoded(palette, "PNG", transparency=palette.getpixel((0, 0)))))
    assert (got[0, 0] == 255).all()


def test_a_transparent_colour_lies_over_white():
    picture = Image.new("RGB", (4, 4), (1, 2, 3))
    assert (pixels(decode(encoded(picture, "PNG", transparency=(1, 2, 3)))) == 255).all()


def test_what_is_no_regular_file_is_refused():
    with pytest.raises(BadImage, match="not a file"):
        decode("/dev/zero")


def test_of_an_animation_the_first_frame_is_taken():
    frames = [ramp("P"), ramp("P").transpose(Image.Transpose.ROTATE_180)]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(pixels(decode(moving)), pixels(decode(encoded(frames[0], "GIF"))))


def bomb(width, height):
    """A PNG whose header promises more pixels than the file has."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "zero bytes"),
        (b"not a picture at all", "not a picture of a known format"),
        (encoded(ramp(), "JPEG")[:200], "cannot be decoded"),
        (encoded(ramp(), "PNG")[:70], "cannot be decoded"),
        (bomb(60_000, 60_000), r"(60000x60000 pixels; at most|more pixels than)"),
        (bomb(40_000, 10), "40000x10 pixels; at most 30,000 a side"),
        (bomb(20, 20), "cannot be decoded"),
        (bomb(2000, 10), "one side may be at most 100 times the other"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_reason(data, sentence):
    with pytest.raises(BadImage, match=f"^it.jpg .*{sentence}"):
        decode(data, name="it.jpg")


def test_limits_hold_before_decoding(tmp_path):
    data = encoded(ramp())
    with pytest.raises(BadImage, match=r"bytes; at most 10 are accepted"):
        decode(data, limits=Limits(file_bytes=10))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BadImage, match=r"^[^ ]*a.png has .* bytes; at most 10"):
        decode(tmp_path / "a.png", limits=Limits(file_bytes=10))
    with pytest.raises(BadImage, match="24x16 pixels"):
        decode(data, limits=Limits(pixels=100))


def test_paths_that_are_no_file_are_named(tmp_path):
    with pytest.raises(BadImage, match=r"gone.png does not exist"):
        decode(tmp_path / "gone.png")
    with pytest.raises(BadImage, match=r"^[^ ]* is not a file but a folder"):
        decode(tmp_path)
    (tmp_path / "a.png").write_bytes(encoded(ramp()))
    assert np.array_equal(pixels(decode(tmp_path / "a.png")), pixels(ramp()))


def scene(height, width):
    """Soft colours and a bright corner, which JPEG keeps and a wrong turn moves."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    values = np.stack([x * 200, y * 200, 120 + 60 * np.sin(9 * x + 5 * y)], -1)
    values[: height // 4, : width // 4] += 50
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("at_least", "scale"),
    [((190, 290), 1), ((100, 150), 2), ((90, 40), 2), ((50, 75), 4), ((26, 38), 4), ((25, 37), 8), ((1, 1), 8)],
)
def test_a_jpeg_is_decoded_as_small_as_will_do(orientation, at_least, scale):
    stored = scene(200, 300) if orientation < 5 else scene(300, 200)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", quality=95, exif=exif)
    whole, small = decode(data), decode(data, at_least=at_least)
    assert whole.size == (300, 200)
    assert small.size == (-(-300 // scale), -(-200 // scale))
    assert small.height >= at_least[0]
    assert small.width >= at_least[1]
    resized = whole.resize(small.size, Image.Resampling.BOX)
    assert np.abs(pixels(small) - pixels(resized)).mean() < 3


def test_a_small_jpeg_is_not_made_larger_and_other_formats_stay():
    data = encoded(scene(40, 60), "JPEG")
    assert np.array_equal(pixels(decode(data, at_least=(500, 500))), pixels(decode(data)))
    for kind in ("PNG", "WEBP", "BMP", "GIF", "TIFF"):
        data = encoded(scene(40, 60), kind)
        assert np.array_equal(pixels(decode(data, at_least=(5, 5))), pixels(decode(data)))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_modes_are_decoded_smaller_too(mode):
    data = encoded(scene(160, 160).convert(mode), "JPEG", quality=95)
    small = decode(data, at_least=(40, 40))
    assert small.size == (40, 40)
    assert np.abs(pixels(small) - pixels(decode(data).resize((40, 40), Image.Resampling.BOX))).mean() < 3


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"no picture", "not-a-picture"),
        (encoded(scene(90, 90), "JPEG")[:-300], "truncated"),
        (encoded(ramp(), "PNG")[:70], "truncated"),
        (bomb(2000, 10), "absurd-size"),
        (bomb(60_000, 60_000), "absurd-size"),
    ],
)
def test_the_kind_of_a_bad_picture(data, kind):
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.kind == kind
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.kind, str(again)) == (kind, str(caught.value))
    with pytest.raises(BadImage) as caught:
        decode("/no/where.png")
    assert caught.value.kind == "unreadable"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_give_a_picture_or_a_sentence_never_another_error(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    whole = bytearray(encoded(ramp(), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(whole)))
    try:
        assert decode(bytes(whole[:cut])).mode == "RGB"
    except BadImage as error:
        assert str(error).startswith("the picture ")


def test_a_transparent_sixteen_bit_grey_lies_over_white():
    grey = np.full((4, 4), 9, np.uint16)
    grey[0] = 40000
    got = pixels(decode(encoded(Image.fromarray(grey), "PNG", transparency=9)))
    assert (got[1:] == 255).all()
    assert (got[0] == round(40000 / 257)).all()
