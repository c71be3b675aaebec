"""What strangers send: damaged bytes for hypothesis, pictures that are bombs, and how calibration data are read.

`DAM_FUZZ_CASES` sets the number of cases per property; `make faults` runs 10,000 and more in all.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mergekit_dam.config import ModelSettings
from mergekit_dam.io.calibration import load_calibration
from mergekit_dam.io.columns import Kind

CASES = int(os.environ.get("DAM_FUZZ_CASES", "150"))
fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def edited(draw: st.DrawFn, original: bytes) -> bytes:
    """Cut, flipped, doubled or overwritten bytes; half of the edits hit the header."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([8, 8 + struct.unpack("<Q", original[:8])[0], len(original)]))
        at = draw(st.integers(0, max(0, min(end, len(data)) - 1)))
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "drop"]))
        if not data:
            break
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at] = draw(st.sampled_from([0, 0x7F, 0xFF, ord("{"), ord('"'), ord("9")]))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        else:
            del data[at : at + draw(st.integers(1, 8))]
    return bytes(data)


def png(width: int, height: int) -> bytes:
    """One bit per pixel, all black: a few kB for gigapixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def load(path: Path, kind: Kind = "text", num: int = 4, **entries: Any) -> list[Any]:
    """Up to `num` samples of calibration data, as learning reads them; `entries` are other settings of the model."""
    found = load_calibration(
        ModelSettings(calibration=str(path), **entries), kind, num_samples=num, seed=0, task="task"
    )
    return list(found.samples)
