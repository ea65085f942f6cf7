"""Images that show the same frame twice: found by a perceptual hash, confirmed by correlation.

Two frames are near-duplicates if their hashes differ in at most ``MAX_HAMMING`` of 63 bits and their thumbnails
correlate by at least ``MIN_CORRELATION``. Measured: among the 1.1 million pairs of different patients in BUS-BRA the
correlation reaches 0.86 at most; the repeated frames among 30 images of BUSI lie between 0.95 and 0.999.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, Int, UInt8
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ultrarefiner.data.images import to_square

SIGNATURE_SIZE = 64
MAX_HAMMING = 20
MIN_CORRELATION = 0.93
_BLOCK = 2048  # images; a block of products takes 16 MB
_ROUNDING = 1e-4  # of products in float32


@dataclass(frozen=True)
class Pair:
    """Positions of two images, and the correlation of their thumbnails in [-1, 1]."""

    first: int
    second: int
    correlation: float


def signature(image: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "64 64"]:
    """The thumbnail by which an image is recognised."""
    return to_square(image, SIGNATURE_SIZE)


def near_duplicates(signatures: UInt8[np.ndarray, "N 64 64"]) -> list[Pair]:
    """All pairs of near-duplicates, ``first`` < ``second``, in order. An image without any structure is like no other.

    Every pair is looked at, but by 64 numbers: with p the lowest frequencies of a normalised thumbnail and r the length
    of all the others, the correlation of two is at most p·p' + r·r' (Cauchy and Schwarz). Of BUS-BRA's pairs one in
    13 000 comes that near and is compared in full. Blocks of products keep the memory the same for any number.
    """
    bounds = np.array([_bounding(thumbnail) for thumbnail in signatures], dtype=np.float32)
    found: list[Pair] = []
    for start in range(0, len(bounds), _BLOCK):
        for other in range(start, len(bounds), _BLOCK):
            near = bounds[start : start + _BLOCK] @ bounds[other : other + _BLOCK].T >= MIN_CORRELATION - _ROUNDING
            firsts, seconds = np.divmod(np.flatnonzero(near), near.shape[1])
            ordered = np.flatnonzero(firsts + start < seconds + other)
            for chunk in (ordered[place : place + _BLOCK] for place in range(0, len(ordered), _BLOCK)):
                found += _confirmed(signatures, firsts[chunk] + start, seconds[chunk] + other)
    return sorted(found, key=lambda pair: (pair.first, pair.second))


def _bounding(thumbnail: UInt8[np.ndarray, "64 64"]) -> Float32[np.ndarray, " 64"]:
    """(p, r) of `near_duplicates`; all zero without structure."""
    centred = thumbnail.astype(np.float32) - thumbnail.mean(dtype=np.float32)
    length = float(np.linalg.norm(centred))
    if length < 1e-3:
        return np.zeros(64, dtype=np.float32)
    low = cv2.dct(centred)[:8, :8].ravel()[1:] / length  # the transform is orthonormal
    return np.append(low, np.float32(max(1 - float(low @ low), 0) ** 0.5))


def _confirmed(
    signatures: UInt8[np.ndarray, "N 64 64"], firsts: Int[np.ndarray, " M"], seconds: Int[np.ndarray, " M"]
) -> list[Pair]:
    """Those of some pairs that are near-duplicates."""
    involved, places = np.unique(np.concatenate([firsts, seconds]), return_inverse=True)
    flat = signatures[involved].reshape(len(involved), -1).astype(np.float32)
    hashes = np.array([perceptual_hash(signatures[position]) for position in involved])
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    pairs = []
    for first, second, one, other in zip(firsts, seconds, places[: len(firsts)], places[len(firsts) :], strict=True):
        correlation = float(flat[one] @ flat[other])
        differing = (hashes.shape[1] - hashes[one] @ hashes[other]) / 2
        if correlation >= MIN_CORRELATION and differing <= MAX_HAMMING:
            pairs.append(Pair(int(first), int(second), correlation))
    return pairs


def perceptual_hash(thumbnail: UInt8[np.ndarray, "64 64"]) -> Float32[np.ndarray, " 63"]:
    """±1 for each of the 63 lowest frequencies: above or below their median (pHash)."""
    low = cv2.dct(thumbnail.astype(np.float32))[:8, :8].ravel()[1:]
    return np.where(low > np.median(low), 1, -1).astype(np.float32)


def components(count: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """The group of each of ``count`` things, things that are linked over any path being one group.

    A group is named by its first member, so the answer does not depend on the order of ``links``.
    """
    ends = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), dtype=bool), (ends[:, 0], ends[:, 1])), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    first = np.unique(labels, return_index=True)[1]
    named: list[int] = first[labels].tolist()
    return named
