"""Damaged image files by the thousand: `python -m fuzzing COUNT SEED`.

Real encodings of eight formats, each mutated by a seeded draw: bits flipped, bytes replaced,
lengths and sizes set to extremes, pieces cut out, repeated, swapped or spliced in from another
file. Runs in a process of its own, so that a crash of a codec is seen as what it is; prints one
line of JSON: images, reasons and, each with the case that led to it, everything else.
"""

from __future__ import annotations

import faulthandler
import io
import json
import sys
from collections import Counter

import numpy as np
from PIL import Image

MAX_PIXELS = 1_000_000
EXTREMES = [b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00"]


def make_seeds() -> list[bytes]:
    """Small files of every format, mode and compression that is decoded."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8))
    smooth = Image.fromarray(np.linspace(0, 255, 20 * 24 * 3).astype(np.uint8).reshape(20, 24, 3))
    deep = Image.fromarray(rng.integers(0, 65536, (20, 24)).astype(np.uint16))
    alpha = colour.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    wanted = [
        (colour, "JPEG", {"quality": 80, "exif": exif}),
        (smooth, "JPEG", {"progressive": True}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour.convert("L"), "JPEG", {}),
        (colour, "PNG", {"exif": exif}),
        (deep, "PNG", {}),
        (alpha, "PNG", {}),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (colour.convert("1"), "PNG", {}),
        (smooth, "WEBP", {"quality": 50}),
        (alpha, "WEBP", {"lossless": True}),
        (colour.convert("P"), "GIF", {"save_all": True, "append_images": [smooth.convert("P")]}),
        (colour, "BMP", {}),
        (colour.convert("P"), "BMP", {}),
        (colour.convert("1"), "BMP", {}),
        *((smooth, "TIFF", {"compression": name})
          for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        (deep, "TIFF", {}),
        (colour.convert("1"), "TIFF", {"compression": "group4"}),
        (colour, "PPM", {}),
        (smooth.convert("L"), "PPM", {}),
    ]  # fmt: skip
    seeds = []
    for image, format, options in wanted:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        seeds.append(buffer.getvalue())
    return seeds


def mutate(seeds: list[bytes], rng: np.random.Generator) -> bytes:
    """One damaged file."""
    raw = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(1 + rng.geometric(0.5)):
        # The structure of a file stands at its beginning: a third of all damage is done there.
        reach = min(len(raw), 64) if rng.random() < 0.33 else len(raw)
        at = int(rng.integers(reach)) if reach else 0
        kind = rng.integers(7)
        if kind == 0 and raw:
            raw[at] ^= 1 << rng.integers(8)
        elif kind == 1 and raw:
            raw[at] = rng.integers(256)
        elif kind == 2:
            extreme = EXTREMES[rng.integers(len(EXTREMES))][: rng.integers(1, 5)]
            raw[at : at + len(extreme)] = extreme
        elif kind == 3:
            del raw[at : at + int(rng.geometric(0.05))]
        elif kind == 4:
            piece = raw[at : at + int(rng.geometric(0.05))]
            raw[at:at] = piece * int(rng.integers(1, 4))
        elif kind == 5:
            other = seeds[rng.integers(len(seeds))]
            start = int(rng.integers(len(other)))
            raw[at : at + 16] = other[start : start + int(rng.geometric(0.02))]
        else:
            del raw[int(rng.integers(len(raw) + 1)) :]
    return bytes(raw)


def fuzz(count: int, seed: int) -> dict[str, object]:
    """Decode `count` damaged files; what is neither an image nor a reason is listed."""
    from cdp.errors import DataError
    from cdp.images.decode import decode_image

    seeds = make_seeds()
    outcomes: Counter[str] = Counter()
    others = []
    for case in range(count):
        data = mutate(seeds, np.random.default_rng([seed, case]))
        try:
            image = decode_image(data, max_pixels=MAX_PIXELS, min_px=1)
            whole = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            if not whole or image.shape[0] * image.shape[1] > MAX_PIXELS:
                others.append([case, f"{image.dtype} {image.shape}"])
            outcomes["images"] += 1
        except DataError as error:
            if not 0 < len(str(error)) <= 160 or "\n" in str(error):
                others.append([case, f"a reason of {len(str(error))} characters"])
            outcomes[f"reason: {str(error).partition(':')[0]}"] += 1
        except BaseException as error:
            others.append([case, f"{type(error).__name__}: {error}"[:200]])
    return {"count": count, "outcomes": dict(outcomes), "others": others}


if __name__ == "__main__":
    faulthandler.enable()
    print(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]))))
