"""Whatever a picture's kind, the model gets its pixels; what can't be used is refused with its row and reason."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from drawing import encode, expected, jpeg_claiming, photo, png, webp_canvas
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from gateway.errors import BadInput
from gateway.status import Code
from gateway.steps.image import DecodeImage, DecodeImageParams


def step(**params: Any) -> DecodeImage:
    return DecodeImage(DecodeImageParams(**params), lambda path: b"")


def rows(*pictures: bytes) -> dict[str, Any]:
    column = np.empty((len(pictures), 1), np.object_)
    column[:, 0] = pictures
    return {"image": column}


def decode(*pictures: bytes, **params: Any) -> Any:
    return step(**params)(rows(*pictures))["image"]


def refusal(*pictures: bytes, **params: Any) -> str:
    with pytest.raises(BadInput) as caught:
        decode(*pictures, **params)
    assert caught.value.code is Code.INVALID_ARGUMENT
    return caught.value.text


def levels(got: Any, want: Any) -> float:
    """The largest difference, in pixel values of 0 to 255."""
    return float(np.abs(got - want).max() * 128)


def is_the_same(got: Any, want: Any) -> bool:
    """But for a level or two in one value of a hundred: Pillow takes the part to resize as 32-bit floats."""
    return levels(got, want) <= 2 and float(np.mean(got != want)) < 0.01


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (256, 256), (100, 90), (501, 377), (1023, 777), (40, 160)])
def test_the_short_side_becomes_256_and_the_middle_224_is_taken(size: tuple[int, int]) -> None:
    picture = photo(*size)
    assert is_the_same(decode(encode(picture))[0], expected(picture))


@pytest.mark.parametrize(("width", "height"), [(600, 400), (400, 600), (333, 555), (1200, 300)])
def test_sharp_edges_come_out_as_resizing_the_whole_picture_makes_them(width: int, height: int) -> None:
    """What is clipped between rows and columns depends on which comes first: by up to 20 levels in noise."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))
    assert is_the_same(decode(encode(picture))[0], expected(picture))


def test_a_jpeg_gives_what_plain_decoding_gives() -> None:
    data = encode(photo(800, 600), "JPEG", quality=85)
    with Image.open(io.BytesIO(data)) as plain:
        assert is_the_same(decode(data)[0], expected(plain.convert("RGB")))


GREY = photo().convert("L")
CLEAR = photo().convert("RGBA")
CLEAR.putalpha(Image.linear_gradient("L").resize(CLEAR.size))
SIXTEEN = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
FEW = photo().quantize(64)


def over(colour: str, picture: Image.Image = CLEAR) -> Image.Image:
    under = Image.new("RGB", picture.size, colour)
    under.paste(picture, mask=picture.getchannel("A"))
    return under


MODES = {
    "png rgb": (encode(photo()), photo(), 2),
    "png grey": (encode(GREY), GREY.convert("RGB"), 2),
    "png grey, 16 bits": (encode(SIXTEEN), GREY.convert("RGB"), 2),
    "png palette": (encode(FEW), FEW.convert("RGB"), 2),
    "png two colours": (encode(GREY.convert("1")), GREY.convert("1").convert("RGB"), 2),
    "png alpha": (encode(CLEAR), over("white"), 2),
    "png grey and alpha": (encode(CLEAR.convert("LA")), over("white", CLEAR.convert("LA").convert("RGBA")), 2),
    "png palette, one see-through": (encode(FEW, transparency=0), None, 2),
    "png rgb, one see-through": (encode(photo(), transparency=(0, 0, 0)), photo(), 3),
    "jpeg rgb": (encode(photo(), "JPEG", quality=95), photo(), 12),
    "jpeg progressive": (encode(photo(), "JPEG", quality=95, progressive=True), photo(), 12),
    "jpeg grey": (encode(GREY, "JPEG", quality=95), GREY.convert("RGB"), 12),
    "jpeg cmyk": (encode(photo().convert("CMYK"), "JPEG", quality=95), photo(), 12),
    "webp lossless": (encode(photo(), "WEBP", lossless=True), photo(), 2),
    "webp lossy": (encode(photo(), "WEBP", quality=95), photo(), 24),
    "webp alpha": (encode(CLEAR, "WEBP", lossless=True, exact=True), over("white"), 2),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_comes_out_as_rgb_over_white(name: str) -> None:
    data, picture, tolerance = MODES[name]
    if picture is None:
        picture = over("white", FEW_CLEAR)
    assert levels(decode(data)[0], expected(picture)) <= tolerance


def _few_clear() -> Image.Image:
    see_through = FEW.copy()
    see_through.info["transparency"] = 0
    return see_through.convert("RGBA")


FEW_CLEAR = _few_clear()


def test_a_16_bit_grey_picture_may_have_a_see_through_value() -> None:
    data = encode(SIXTEEN, transparency=0)
    want = np.where(np.asarray(SIXTEEN) == 0, 255, np.asarray(GREY))
    assert levels(decode(data)[0], expected(Image.fromarray(want.astype(np.uint8)).convert("RGB"))) <= 2


def test_transparent_parts_may_show_black() -> None:
    assert levels(decode(encode(CLEAR), background="black")[0], expected(over("black"))) <= 2


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, *TURNS, 9])
def test_a_picture_is_turned_as_its_exif_says(orientation: int, form: str) -> None:
    upright = photo(321, 243)  # odd sizes: a margin that was rounded before turning would show
    stored = upright.transpose(TURNS[orientation]) if orientation in TURNS else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[form]
    data = encode(stored, form, exif=exif, **options)
    assert levels(decode(data)[0], expected(upright)) <= (6 if form == "JPEG" else 2)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "black")]
    for form in ("WEBP", "PNG"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encode(frames[0], form, save_all=True, append_images=frames[1:], duration=100, **options)
        assert np.all(decode(data) == 1.0), form


def test_the_batch_is_one_array_in_the_order_of_its_rows() -> None:
    pictures = [photo(300 + 20 * n, 250) for n in range(3)]
    made = decode(*map(encode, pictures))
    assert made.shape == (3, 3, 224, 224)
    assert made.dtype == np.float32
    assert all(is_the_same(row, expected(picture)) for row, picture in zip(made, pictures, strict=True))


def test_channels_may_come_last() -> None:
    data = encode(photo())
    assert np.array_equal(decode(data, layout="NHWC"), decode(data).transpose(0, 2, 3, 1))


def test_values_are_scaled_per_channel() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data = encode(photo())
    pixels = decode(data) * 128 + 127
    want = (pixels / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert np.allclose(decode(data, scale=1 / 255, mean=mean, std=std), want, atol=1e-6)


def test_no_rows_give_no_rows() -> None:
    assert decode().shape == (0, 3, 224, 224)


@pytest.mark.parametrize("size", [(2048, 1536), (1537, 2049), (4200, 1111)])
def test_a_draft_is_close_to_the_exact_result(size: tuple[int, int]) -> None:
    """Also where the smaller size has a fraction, which libjpeg rounds up."""
    data = encode(photo(*size), "JPEG", quality=90)
    assert 0 < levels(decode(data), decode(data, draft=False)) < 6


def test_a_small_jpeg_is_decoded_whole() -> None:
    data = encode(photo(1023, 1023), "JPEG")
    assert np.array_equal(decode(data), decode(data, draft=False))


def test_a_long_thin_picture_costs_no_more_than_its_middle() -> None:
    picture = Image.new("RGB", (50_000, 3), "red")
    picture.paste("blue", (20_000, 0, 30_000, 3))
    made = decode(encode(picture))
    assert made.shape == (1, 3, 224, 224)
    assert np.all(made[0, 2] == 1.0)  # blue: the middle


PHOTO_PNG, PHOTO_JPEG, PHOTO_WEBP = encode(photo()), encode(photo(), "JPEG"), encode(photo(), "WEBP")
REFUSED = {
    "empty": (b"", "empty"),
    "text": (b"hello, world", "not a JPEG, PNG or WebP picture; it starts with b'hello, w'"),
    "gif": (encode(photo(), "GIF"), "not a JPEG, PNG or WebP picture; it starts with b'GIF87a@\\x01'"),
    "tiff": (
        encode(photo(), "TIFF"),
        "not a JPEG, PNG or WebP picture; it starts with b'II*\\x00\\x08\\x00\\x00\\x00'",
    ),
    "a signature alone": (b"\x89PNG\r\n\x1a\n", "the PNG header is damaged or incomplete"),
    "a jpeg's first bytes": (PHOTO_JPEG[:100], "the JPEG header is damaged or incomplete"),
    "a jpeg of markers only": (b"\xff\xd8" + b"\xff" * 100_000, "the JPEG header is damaged or incomplete"),
    "a jpeg of empty segments": (b"\xff\xd8" + b"\xff\xe0\0\2" * 10_001, "more than 10000 segments"),
    "a jpeg of a frame and empty segments": (
        PHOTO_JPEG[: PHOTO_JPEG.index(b"\xff\xda")] + b"\xff\xe0\0\2" * 10_001,
        "more than 10000 segments",
    ),
    "a png of empty chunks": (png(1, 1, *[(b"tEXt", b"")] * 10_001), "more than 10000 chunks"),
    "a webp's first bytes": (PHOTO_WEBP[:20], "the WebP header is damaged or incomplete"),
    "half a png": (PHOTO_PNG[: len(PHOTO_PNG) // 2], "the PNG data is damaged or incomplete"),
    "half a jpeg": (PHOTO_JPEG[: len(PHOTO_JPEG) // 2], "the JPEG data is damaged or incomplete"),
    "half a webp": (PHOTO_WEBP[: len(PHOTO_WEBP) // 2], "the WebP data is damaged or incomplete"),
    "no pixels": (png(0, 10), "the PNG header says 0x10 pixels"),
    "png bomb": (png(50_000, 50_000), "50000x50000 = 2500000000 pixels; at most 52428800 are allowed"),
    "jpeg bomb": (jpeg_claiming(65_500, 65_500), "65500x65500 = 4290250000 pixels; at most 52428800 are allowed"),
    "webp bomb": (webp_canvas(16_384, 16_384), "16384x16384 = 268435456 pixels; at most 52428800 are allowed"),
    "text bomb": (
        png(1, 1, (b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000)))),
        "the PNG data is damaged or incomplete",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_that_cannot_be_used_is_refused_with_its_row_and_reason(name: str) -> None:
    data, reason = REFUSED[name]
    assert refusal(PHOTO_PNG, data) == f"input 'image', row 1: {reason}"


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encode(photo(64, 64), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_up_to_100_scans_passes() -> None:
    """Each scan goes over all pixels again, and takes next to no bytes."""
    assert decode(scans(100)).shape == (1, 3, 224, 224)
    assert refusal(scans(101)) == "input 'image', row 0: more than 100 scans"


def test_what_is_appended_to_a_photo_is_not_looked_at() -> None:
    """Phones put a short film there."""
    assert np.array_equal(decode(PHOTO_JPEG + b"\xff\xda\0\2" * 1000), decode(PHOTO_JPEG))


def test_pictures_of_up_to_max_pixels_pass() -> None:
    data = encode(photo(100, 80))
    assert decode(data, max_pixels=8000).shape[0] == 1
    assert refusal(data, max_pixels=7999) == "input 'image', row 0: 100x80 = 8000 pixels; at most 7999 are allowed"


def test_pictures_of_up_to_max_bytes_pass() -> None:
    size = len(PHOTO_PNG)
    assert decode(PHOTO_PNG, max_bytes=size).shape[0] == 1
    assert refusal(PHOTO_PNG, max_bytes=size - 1) == (
        f"input 'image', row 0: {size} bytes; at most {size - 1} are allowed"
    )


def test_every_row_is_checked_before_the_first_is_decoded() -> None:
    assert "row 1" in refusal(PHOTO_PNG[:500], png(50_000, 50_000))


PLAIN = encode(photo(), "JPEG", quality=95)
EXIFS = {
    "cut": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
    "empty": b"Exif\0\0",
    "of no byte order": b"Exif\0\0XX*\0\x08\0\0\0\x01\0",
    "beginning outside": b"Exif\0\0II*\0\xff\xff\xff\xff\x01\0",
    "of another type": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0\x06\0\0\0",
    "made to be copied again and again": b"Exif\0\0II*\0\x08\0\0\0\x00\x14"
    + b"".join(struct.pack("<HHII", tag, 7, 60_000, 8) for tag in range(5120)),
}


@pytest.mark.parametrize("name", EXIFS)
def test_exif_that_cannot_be_understood_is_left_alone(name: str) -> None:
    data = encode(photo(), "JPEG", quality=95, exif=EXIFS[name])
    assert np.array_equal(decode(data), decode(PLAIN))


def test_exif_may_be_big_endian() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0"
    stored = photo(256, 256)
    turned = decode(encode(stored, "JPEG", quality=95, exif=exif))
    assert np.array_equal(turned, decode(encode(stored, "JPEG", quality=95))[:, :, ::-1, ::-1])


def test_a_colour_profile_changes_nothing() -> None:
    data = encode(photo(), "JPEG", quality=95, icc_profile=bytes(200_000))  # four segments of it
    assert np.array_equal(decode(data), decode(PLAIN))


def test_of_several_pictures_in_a_jpeg_the_first_counts() -> None:
    data = encode(photo(), "MPO", save_all=True, append_images=[Image.new("RGB", (320, 240))], quality=95)
    assert np.array_equal(decode(data), decode(PLAIN))


def test_pillow_warns_nobody() -> None:
    """Pillow warns from 89 million pixels on; a limit above that cannot be set."""
    with pytest.raises(ValidationError):
        DecodeImageParams(max_pixels=100_000_000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        broken = png(2, 2, (b"acTL", bytes(8)), idat=zlib.compress(bytes(14)))
        assert decode(broken).shape == (1, 3, 224, 224)
    assert not caught


def test_rows_may_be_made_on_several_threads() -> None:
    pictures = [encode(photo(300 + 7 * n, 260), form) for n in range(4) for form in ("JPEG", "PNG", "WEBP")]
    work, tensors = step(), rows(*pictures)
    out = work.allocate(len(pictures))
    threads = [
        threading.Thread(target=work.fill, args=(tensors, out, range(start, start + 3)))
        for start in range(0, len(pictures), 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(out["image"], decode(*pictures))


@pytest.mark.parametrize("params", [{"size": 300}, {"std": 0}, {"std": (1, 0, 1)}, {"mean": (1, 2)}, {"sise": 224}])
def test_impossible_parameters_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DecodeImageParams(**params)


SEEDS = [encode(photo(40, 30), form) for form in ("JPEG", "PNG", "WEBP")] + [
    encode(FEW.resize((20, 20))),
    encode(
        photo(20, 20), "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    ),
]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
    keep=st.floats(0, 1),
)
def test_damaged_pictures_are_decoded_or_refused_and_nothing_else(
    seed: bytes, edits: list[tuple[float, int]], keep: float
) -> None:
    data = bytearray(seed)
    for where, value in edits:
        data[int(where * (len(data) - 1))] = value
    try:
        made = decode(bytes(data[: int(len(data) * (1 - keep**4))]), size=16, resize=16, max_pixels=10_000)
    except BadInput as refused:
        text = refused.text
    else:
        assert made.shape == (1, 3, 16, 16)
        return
    assert text.startswith("input 'image', row 0: ")
