"""Headers of images where they lie, read without more of them than needed, in about 10 microseconds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from mpl_scale.data.encoded.header import Buffer, Header, UnreadableImage, examine
from mpl_scale.data.encoded.other_formats import pil_decode, pil_header

T = TypeVar("T")
_HEAD_BYTES = 1 << 16
_TAIL_BYTES = 1 << 12
_MOST_TRIED = 1 << 28  # pixels of a file that looks damaged: PIL is not asked to unpack more than that to find out
_PAM = re.compile(rb"P7\nWIDTH (\d{1,9})\nHEIGHT (\d{1,9})\nDEPTH (\d{1,9})\nMAXVAL 255\nENDHDR\n")
_FOR_DALI = (b"\x89PNG", b"\xff\xd8\xff", b"P6")


class DecodeError(RuntimeError):
    """DALI gave up on a batch, and with that on its whole graph.

    position: of the image that DALI names, in some batch that was in flight; None: it names none.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        named = re.search(r"sample #(\d+)", message)
        self.position = int(named.group(1)) if named else None


def probe(encoded: Buffer) -> Header:
    """The header of an image in any format that is read; of PNG, JPEG and PPM only what is at the ends is checked.

    Raises:
        UnreadableImage: neither DALI nor PIL would decode it, as far as its ends tell.
    """
    if not encoded or bytes(encoded[:4]).startswith(_FOR_DALI):
        try:
            return examine(encoded, inside=False)
        except UnreadableImage as reason:
            return by_pil(encoded, reason)
    return pil_header(encoded)


def by_pil(encoded: Buffer, reason: UnreadableImage) -> Header:
    """The header of what DALI is not given, if PIL decodes it; otherwise the reason is raised."""
    try:
        header = pil_header(encoded)
        if header.height * header.width > _MOST_TRIED:
            raise reason
        pil_decode(encoded)
    except UnreadableImage:
        raise reason from None
    return header


def for_dali(encoded: np.ndarray, *, max_pixels: int, by_pil: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """What DALI is given for an image, uint8 [bytes], and the height and width it decodes to.

    The file itself where it is sound and of a kind that DALI decodes; otherwise PIL's pixels, as a PPM file.

    Args:
        encoded: the file, uint8 [bytes].
        max_pixels: larger images are refused, before they are decoded.
        by_pil: PIL decodes it, whatever it is.

    Raises:
        UnreadableImage: neither would decode it, as far as the header tells, or PIL does not.
    """
    content, reason = encoded.data, None
    try:
        header = examine(content)
    except UnreadableImage as error:
        # What our own walk has found says more than PIL does, but of formats that are PIL's alone.
        reason = error if not len(content) or bytes(content[:4]).startswith(_FOR_DALI) else None
        by_pil, header = True, _or_raise(pil_header, content, reason)
    if header.height * header.width > max_pixels:
        raise UnreadableImage(
            f"{header.height} x {header.width} pixels are more than mpl_scale.data.max_pixels = {max_pixels}, "
            "which may be raised"
        )
    if not by_pil:
        return encoded, header.decoded
    pixels = _or_raise(pil_decode, content, reason)
    height, width, _ = pixels.shape
    return np.frombuffer(ppm(pixels.tobytes(), height=height, width=width), np.uint8), (height, width)


def _or_raise(read: Callable[[Buffer], T], content: Buffer, reason: UnreadableImage | None) -> T:
    try:
        return read(content)
    except UnreadableImage as error:
        raise reason or error from None


def ppm(pixels: bytes, *, height: int, width: int) -> bytes:
    """RGB pixels [H, W, 3] as a binary PPM file: what a decoder reads without changing a value."""
    return b"P6\n%d %d\n255\n" % (width, height) + pixels


def pam(pixels: bytes, *, height: int, width: int, channels: int) -> bytes:
    """Pixels [H, W, C] as a PAM file (Netpbm's P7)."""
    return b"P7\nWIDTH %d\nHEIGHT %d\nDEPTH %d\nMAXVAL 255\nENDHDR\n" % (width, height, channels) + pixels


def pam_pixels(encoded: np.ndarray, *, channels: int) -> np.ndarray | None:
    """The pixels of a file of `pam`, uint8 [H, W, channels]; None: 3 are wanted, which image files have.

    Raises UnreadableImage: the file has another number of channels, or another length.
    """
    found = _PAM.match(encoded.data)
    if channels == 3 and found is None:
        return None
    if found is None:
        raise UnreadableImage(
            f"mpl_scale.model.in_chans = {channels} takes source arrays, uint8 [N, H, W, {channels}], and this is an "
            "image of 1 or 3 channels; set in_chans to 3 or 1"
        )
    width, height, depth = map(int, found.groups())
    if depth != channels:
        raise UnreadableImage(
            f"pixels of {depth} channels; set mpl_scale.model.in_chans = {depth}, and mean and std to {depth} values"
        )
    pixels = encoded[found.end() :]
    if channels == 3 or len(pixels) != height * width * depth:
        raise UnreadableImage("a PAM file; convert it to PNG")
    return pixels.reshape(height, width, depth)


def probe_file(path: str | bytes) -> Header:
    """The same for a file, reading no more of it than needed.

    Raises:
        UnreadableImage: as `probe`, or the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not hold the run
        try:
            return probe_at(descriptor, offset=0, length=os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror}") from error


def probe_at(descriptor: int, *, offset: int, length: int) -> Header:
    """The same for the bytes [offset, offset + length) of an open file.

    Raises:
        UnreadableImage: as `probe`, or the bytes cannot be read.
    """
    try:
        head = os.pread(descriptor, min(length, _HEAD_BYTES), offset)
        if length > _HEAD_BYTES and head.startswith(_FOR_DALI):
            tail = os.pread(descriptor, _TAIL_BYTES, offset + length - _TAIL_BYTES)
            try:
                return examine(head, tail=tail, length=length, inside=False)
            except UnreadableImage:
                pass  # its dimensions may follow long metadata, or its end come before other data
        return probe(head if length <= _HEAD_BYTES else os.pread(descriptor, length, offset))
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror}") from error


def unreadable_error(reasons: Mapping[str, str], *, count: int | None = None) -> ValueError:
    """The error for unreadable files, from the reason of each path; count: how many there are, where not all given."""
    count = len(reasons) if count is None else count
    listed = [f"{path}: {reason}" for path, reason in list(reasons.items())[:5]]
    if count > len(listed):
        listed.append(f"and {count - len(listed)} more")
    return ValueError(f"{count} unreadable image(s), delete or replace each: {'; '.join(listed)}")
