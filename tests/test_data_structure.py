"""What a decoder must not see is found by walking the file; sound files, usual and unusual, pass."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpl_scale.data.encoded.header import UnreadableImage, examine
from mpl_scale.data.encoded.many import KINDS, probe_many
from mpl_scale.data.encoded.probe import probe
from tests.support.bad_files import BAD, GOOD

ONLY_A_DECODER_CAN_TELL = {"cut_after_thumbnail.jpg", "bomb.png"}
OTHER_FORMATS = {"gif_cut.jpg", "webp_cut.jpg", "float.tiff"}


@pytest.mark.parametrize("kind", GOOD)
def test_sound_files_pass(kind: str) -> None:
    content = GOOD[kind]()
    header = probe(content)
    if not header.by_pil:
        assert examine(content).stored == header.stored


@pytest.mark.parametrize("kind", sorted(BAD.keys() - ONLY_A_DECODER_CAN_TELL - OTHER_FORMATS))
def test_damage_is_found_before_decoding(kind: str) -> None:
    with pytest.raises(UnreadableImage, match=BAD[kind][1] or "bits"):
        examine(BAD[kind][0]())


def test_many_at_once_are_what_each_is() -> None:
    """Sound or not, whatever lies beside them; the usual kinds are among them."""
    contents = {name: make() for name, make in GOOD.items()} | {name: make() for name, (make, _) in BAD.items()}
    ends = np.cumsum([len(content) for content in contents.values()])
    data = np.frombuffer(b"".join(contents.values()), np.uint8)
    kinds, sizes = probe_many(data, np.array([0, *ends[:-1]]), ends)
    found = {name: row for row, name in enumerate(contents) if kinds[row]}
    assert found.keys() >= {"grey.jpg", "progressive.jpg", "cmyk.jpg", "png_in_truth.jpg"}
    for name, row in found.items():
        header = probe(contents[name])
        assert (header.label, *header.stored) == (KINDS[kinds[row]], *sizes[row]), name


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(GOOD)), cut=st.integers(0, 4000), place=st.integers(0, 4000), byte=st.integers(0, 255)
)
def test_any_bytes_give_the_documented_error_or_none(kind: str, cut: int, place: int, byte: int) -> None:
    content = bytearray(GOOD[kind]())[: cut + 8]
    content[place % len(content)] = byte
    with contextlib.suppress(UnreadableImage):
        examine(bytes(content))
