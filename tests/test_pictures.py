"""Image files to pixels: what they show, whatever their format, and no crash whatever they hold."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.images import png
from wicore.errors import InvalidRequest, TooLarge
from wicore.vision.pixels import Picture, crops, pixels, size_of

KINDS = ["png", "jpg", "webp", "bmp", "gif"]
HALVES = np.zeros((600, 1200, 3), np.uint8)
HALVES[:, :600] = (10, 20, 200)
HALVES[:, 600:] = (200, 20, 10)
"""In BGR: red, then blue."""
PATCHES = np.kron(
    np.random.default_rng(3).integers(0, 256, (6, 9, 3), np.uint8), np.ones((4, 4, 1), np.uint8)
)
"""36 x 24, no two parts alike."""
SMALL = {kind: cv2.imencode(f".{kind}", PATCHES)[1].tobytes() for kind in KINDS}
CMYK = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwAIBgYHBgUIBwcHCQkICgwUDQwLCwwZEhMPFB0aHx4dGhwcICQuJyAiLCMcHCg3KSwwMTQ0NB8n"
    "OT04MjwuMzQy/8AAFAgACAAQBEMRAE0RAFkRAEsRAP/EABUAAQEAAAAAAAAAAAAAAAAAAAcI/8QAFBABAAAAAAAAAAAAAAAAAAAAAP/a"
    "AA4EQwBNAFkASwAAPwA2MJDNavhKnMcv/9k="
)
"""16 x 8, of Pillow, which reads (51, 207, 180) on its left half and (159, 87, 36) on its right one."""


def encoded(kind: str, image: np.ndarray = HALVES) -> bytes:
    done, data = cv2.imencode(f".{kind}", image)
    assert done
    return data.tobytes()


def chunk(name: bytes, content: bytes, length: int | None = None) -> bytes:
    """Of a PNG; its `length` may be a lie."""
    head = struct.pack(">I", len(content) if length is None else length)
    return head + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_file(colours: int, depth: int, rows: np.ndarray, *others: bytes) -> bytes:
    """A PNG of the given type, bits a channel and rows of bytes, with `others` as chunks before IDAT."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    width = rows.shape[1] * 8 // (depth * channels)
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colours, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *others, data, chunk(b"IEND", b"")])


def seen(data: bytes, side: int) -> np.ndarray:
    return pixels(Picture(data), side)


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidRequest) as caught:
        size_of(data, 10**6)
    return caught.value.message


def refused_by_decoder(data: bytes) -> bool:
    size_of(data, 10**6)
    with pytest.raises(InvalidRequest, match="damaged or cut off"):
        seen(data, 8)
    return True


# --- formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_read_in_red_green_blue(kind: str) -> None:
    data = encoded(kind)
    assert size_of(data, 10**7) == (1200, 600)
    square = seen(data, 56)
    assert (square.shape, square.dtype) == ((56, 56, 3), np.uint8)
    assert np.abs(square[28, 10].astype(int) - (200, 20, 10)).max() < 40
    assert np.abs(square[28, 45].astype(int) - (10, 20, 200)).max() < 40


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_an_image_of_the_asked_size_keeps_every_level(kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    assert (seen(encoded(kind, image), 56) == image[..., ::-1]).all()


def test_grey_is_every_colour_alike() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    for data in (png_file(0, 8, grey), encoded("jpg", grey)):
        square = seen(data, 8)
        assert (square == square[..., :1]).all()
        assert np.abs(square[..., 0].astype(int) - grey).max() < 12
    assert seen(png_file(0, 1, np.full((8, 1), 0b10000001, np.uint8)), 8)[3, :, 0].tolist() == [
        255,
        *[0] * 6,
        255,
    ]


def test_a_palette_gives_its_colours_where_it_is_transparent_too() -> None:
    palette = chunk(b"PLTE", bytes([250, 0, 0, 0, 240, 0, 0, 0, 230]))
    rows = np.array([[0, 1, 2]] * 3, np.uint8)
    for more in ([palette], [palette, chunk(b"tRNS", bytes([0, 128, 255]))]):
        assert seen(png_file(3, 8, rows, *more), 3)[1].tolist() == [[250, 0, 0], [0, 240, 0], [0, 0, 230]]


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_alpha_is_dropped_not_blended(kind: str) -> None:
    image = np.full((8, 8, 4), (30, 60, 90, 100), np.uint8)
    parameters = [cv2.IMWRITE_WEBP_QUALITY, 101] if kind == "webp" else []  # over 100: lossless
    data = cv2.imencode(f".{kind}", image, parameters)[1].tobytes()
    assert seen(data, 8)[4, 4].tolist() == [90, 60, 30]


def test_of_16_bits_the_upper_8_are_seen() -> None:
    levels = (np.arange(16, dtype=">u2").reshape(4, 4) * 4096 + 255).astype(">u2")
    assert (seen(png_file(0, 16, levels.view(np.uint8)), 4)[..., 0] == levels >> 8).all()
    assert (seen(png_file(2, 16, np.repeat(levels, 3, 1).view(np.uint8)), 4)[..., 2] == levels >> 8).all()


def test_cmyk_is_seen_as_its_ink_looks() -> None:
    square = seen(CMYK, 8).astype(int)
    assert np.abs(square[4, 1] - (51, 207, 180)).max() < 3
    assert np.abs(square[4, 6] - (159, 87, 36)).max() < 3


def test_an_animation_shows_its_first_frame() -> None:
    first = SMALL["gif"]
    frames = first[:-1] + first[first.index(b"\x2c", 13 + 3 * 2 ** ((first[10] & 7) + 1)) : -1] + b";"
    assert (seen(frames, 24) == seen(first, 24)).all()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"II*\0" + bytes(60), "a TIFF"),
        (b"\0\0\0\x20ftypavif" + bytes(60), "an AVIF"),
        (b"\0\0\0\x18ftypheic" + bytes(60), "a HEIC"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"RIFF\0\0\0\0WAVEfmt ", "not an image that can be read"),
        (b"", "not an image that can be read"),
    ],
)
def test_other_formats_are_refused_by_name(data: bytes, name: str) -> None:
    assert refusal(data) == f"{name}: send a PNG, JPEG, WebP, GIF or BMP"


# --- orientation --------------------------------------------------------------------------------------

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    0: lambda image: image,
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image, 1),
    9: lambda image: image,
}
"""By EXIF's orientation; 0 and 9 are none."""


def exif(orientation: int, order: str) -> bytes:
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    entries = [(0x0100, 3, 1, 7), (0x0112, 3, 1, orientation)]
    body = b"".join(struct.pack(f"{order}HHIHxx", *entry) for entry in entries)
    return head + struct.pack(f"{order}IH", 8, len(entries)) + body + bytes(4)


def with_exif(kind: str, data: bytes, content: bytes) -> bytes:
    if kind == "jpg":
        content = b"Exif\0\0" + content
        return data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(content)) + content + data[2:]
    if kind == "png":
        end = data.rindex(b"IEND") - 4
        return data[:end] + chunk(b"eXIf", content) + data[end:]
    odd = b"XMP " + struct.pack("<I", 1) + b"x\0"
    chunks = canvas(36, 24, flags=12) + data[12:] + odd + b"EXIF" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def canvas(width: int, height: int, flags: int = 0) -> bytes:
    """A WebP's VP8X chunk."""
    sides = ((side - 1).to_bytes(3, "little") for side in (width, height))
    return b"VP8X" + struct.pack("<II", 10, flags) + b"".join(sides)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_exif_turns_an_image_once(kind: str, orientation: int, order: str) -> None:
    stored = cv2.imdecode(np.frombuffer(SMALL[kind], np.uint8), cv2.IMREAD_COLOR)
    upright = np.ascontiguousarray(UPRIGHT[orientation](stored))
    turned = with_exif(kind, SMALL[kind], exif(orientation, order))
    assert size_of(turned, 10**6) == upright.shape[1::-1]
    assert (seen(turned, 16) == seen(encoded("png", upright), 16)).all()


def test_a_crop_is_one_of_the_upright_image() -> None:
    upright = np.ascontiguousarray(HALVES.swapaxes(0, 1))  # 600 x 1200: red above, then blue
    turned = with_exif("png", encoded("png"), exif(5, "<"))
    parts = crops(*size_of(turned, 10**6))
    assert len(parts) == 2
    for part in parts:
        assert (pixels(Picture(turned, part), 8) == pixels(Picture(encoded("png", upright), part), 8)).all()


@pytest.mark.parametrize(
    "content", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", exif(6, "<")[:20], b"XX" + exif(6, "<")]
)
def test_exif_that_makes_no_sense_turns_nothing(content: bytes) -> None:
    for kind in ("png", "jpg"):
        data = with_exif(kind, SMALL[kind], content)
        assert (seen(data, 16) == seen(SMALL[kind], 16)).all()


def test_of_several_exif_segments_the_first_counts() -> None:
    turned = with_exif("jpg", with_exif("jpg", SMALL["jpg"], exif(3, "<")), exif(6, "<"))
    assert size_of(turned, 10**6) == (24, 36)


# --- damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_is_refused(kind: str) -> None:
    data = SMALL[kind]
    for kept in (20, len(data) // 2, len(data) - 12, len(data) - 1):
        with pytest.raises(InvalidRequest, match="send the whole file"):
            seen(data[:kept], 8)


@given(
    kind=st.sampled_from(KINDS),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    kept=st.none() | st.integers(0, 2000),
)
def test_a_damaged_file_is_an_image_or_refused(
    kind: str, changes: list[tuple[int, int]], kept: int | None
) -> None:
    data = bytearray(SMALL[kind])
    for at, value in changes:
        data[at % len(data)] = value
    damaged = bytes(data[:kept])
    try:
        width, height = size_of(damaged, 10**6)
    except (InvalidRequest, TooLarge):
        return
    decoded = cv2.imdecode(np.frombuffer(damaged, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is None or decoded.shape == (height, width, 3)
    try:
        assert seen(damaged, 8).shape == (8, 8, 3)
    except InvalidRequest:
        return


def test_a_chunk_longer_than_its_file_is_refused_by_the_header() -> None:
    lie = chunk(b"tEXt", b"", length=2**31 - 1)
    assert "cut off" in refusal(png_file(0, 8, np.zeros((8, 8), np.uint8), lie))
    assert "cut off" in refusal(SMALL["png"][:-1])


def test_memory_never_shows_where_a_frame_is_damaged() -> None:
    """OpenCV, given an animated PNG whose data is damaged, leaves the rest of the frame as it found it."""
    frame = struct.pack(">IIIIIHHBB", 0, 64, 64, 0, 0, 1, 10, 0, 0)
    animation = chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", frame)
    rows = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    data = bytearray(png_file(0, 8, rows, *animation))
    assert seen(bytes(data), 64).shape == (64, 64, 3)
    data[data.index(b"IDAT") + 4] ^= 0x55
    assert refused_by_decoder(bytes(data))


def test_a_webp_is_in_a_riff() -> None:
    assert "a WebP that is damaged" in refusal(b"II*\0" + SMALL["webp"][4:])


def test_a_file_of_countless_empty_parts_is_refused() -> None:
    segments = b"\xff\xfe\0\2" * 20_000
    assert "damaged" in refusal(SMALL["jpg"][:2] + segments + SMALL["jpg"][2:])
    chunks = chunk(b"tEXt", b"") * 110_000
    assert "damaged" in refusal(png_file(0, 8, np.zeros((8, 8), np.uint8), chunks))


# --- size ---------------------------------------------------------------------------------------------


def test_the_limit_of_pixels_is_that_of_the_header() -> None:
    assert size_of(png(20, 30), 600) == (20, 30)
    with pytest.raises(TooLarge):
        size_of(png(20, 30), 599)
    for data in (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b""),
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(9),
        b"RIFF\0\0\0\0WEBP" + canvas(2**24, 2**24),
    ):
        with pytest.raises(TooLarge):
            size_of(data, 10**8)


def test_an_image_of_no_pixels_is_refused() -> None:
    assert "a GIF of 0 x 5 pixels" in refusal(b"GIF89a" + struct.pack("<HH", 0, 5) + bytes(9))


def test_rows_of_a_bitmap_may_stand_from_the_top() -> None:
    data = bytearray(SMALL["bmp"])
    data[22:26] = struct.pack("<i", -24)
    assert size_of(bytes(data), 10**6) == (36, 24)
    assert (seen(bytes(data), 36) == seen(encoded("bmp", PATCHES[::-1]), 36)).all()


def test_a_bitmap_may_have_the_oldest_header() -> None:
    core = struct.pack("<IHHHH", 12, 36, 24, 1, 24)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 26) + core + SMALL["bmp"][54:]
    assert size_of(data, 10**6) == (36, 24)
    assert (seen(data, 36) == seen(SMALL["bmp"], 36)).all()


def test_a_file_that_says_two_sizes_is_refused() -> None:
    jpeg = SMALL["jpg"]
    frame = jpeg.index(b"\xff\xc0")
    other = bytearray(jpeg[frame : frame + 19])
    other[5:9] = struct.pack(">HH", 4000, 4000)
    assert refused_by_decoder(jpeg[:frame] + jpeg[frame : frame + 19] + bytes(other) + jpeg[frame + 19 :])
    webp = SMALL["webp"]
    for width, height in ((12, 12), (360, 240)):
        chunks = canvas(width, height) + webp[12:]
        assert refused_by_decoder(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks)
    gif = SMALL["gif"]
    assert refused_by_decoder(gif[:6] + struct.pack("<HH", 10, 10) + gif[10:])


def test_what_decodes_to_another_size_than_was_said_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.zeros((24, 37, 3), np.uint8))
    assert refused_by_decoder(SMALL["png"])


def test_markers_without_content_stand_anywhere_in_a_jpegs_header() -> None:
    data = SMALL["jpg"][:2] + b"\xff\x01" + with_exif("jpg", SMALL["jpg"], exif(6, ">"))[2:]
    assert size_of(data, 10**6) == (24, 36)


def test_a_lossy_webp_has_a_scale_that_none_applies() -> None:
    data = cv2.imencode(".webp", PATCHES, [cv2.IMWRITE_WEBP_QUALITY, 80])[1].tobytes()
    assert data[12:16] == b"VP8 "
    assert size_of(data, 10**6) == (36, 24)
    scaled = data[:27] + bytes([data[27] | 0x40]) + data[28:]
    assert size_of(scaled, 10**6) == (36, 24)
    assert (seen(scaled, 24) == seen(data, 24)).all()


# --- pan and scan -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "boxes"),
    [
        (1200, 600, [(0, 0, 600, 600), (600, 0, 600, 600)]),
        (600, 1200, [(0, 0, 600, 600), (0, 600, 600, 600)]),
        (614, 512, []),
        (615, 512, [(0, 0, 308, 512), (308, 0, 307, 512)]),
        (1000, 300, [(0, 0, 334, 300), (334, 0, 334, 300), (668, 0, 332, 300)]),
        (1023, 300, [(0, 0, 341, 300), (341, 0, 341, 300), (682, 0, 341, 300)]),
        (2600, 512, [(0, 0, 650, 512), (650, 0, 650, 512), (1300, 0, 650, 512), (1950, 0, 650, 512)]),
        (767, 256, [(0, 0, 384, 256), (384, 0, 383, 256)]),
        (511, 426, []),
        (2000, 255, []),
        (700, 1001, [(0, 0, 700, 501), (0, 501, 700, 500)]),
        (600, 600, []),
    ],
)
def test_crops_are_those_of_gemmas_processor(width: int, height: int, boxes: list[tuple[int, ...]]) -> None:
    assert crops(width, height) == boxes


def test_crops_of_a_wide_image_show_its_parts() -> None:
    data = encoded("png")
    left, right = (Picture(data, crop) for crop in crops(1200, 600))
    assert pixels(left, 56).reshape(-1, 3).mean(0).round().tolist() == [200, 20, 10]
    assert pixels(right, 56).reshape(-1, 3).mean(0).round().tolist() == [10, 20, 200]
    assert len({left.digest, right.digest, Picture(data).digest}) == 3
