"""Image embeddings of a frozen encoder on disk, so that an image that comes again is not encoded again.

``<folder>/<mark of the encoder>/<mark of the image>.npy`` is a float16 array (D,h,w) with its CRC behind it. Both marks
are hashes of content: of the encoder's weights, family and precision, and of the very pixels that the encoder gets,
after all cropping and augmentation. So what has changed is not found, and nothing can be stale. A file is written under
another name and then renamed: processes may share the folder, and a killed one leaves nothing that looks whole.
"""

import contextlib
import errno
import logging
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float16
from torch import Tensor, nn

from ultrarefiner.errors import UserError
from ultrarefiner.models.weights import fingerprint, in_memory_state, tensor_hash

log = logging.getLogger(__name__)

VERSION = 1  # of the file format and of what an encoder computes; a new number leaves all older files behind
CRC_BYTES = 4


class EmbeddingCache:
    """Embeddings rounded to float16, kept on disk as long as there is room.

    The result does not depend on what is there: every image is encoded by itself, and rounded when it is new, too.

    Args:
        folder: of all encoders' embeddings; made when the first is written.
        limit_gb: the most that the folder may take (10⁹ bytes). When it is full, embeddings of other encoders make
            room, the oldest first; where there are none, new images are encoded each time they come.
    """

    def __init__(self, folder: Path, limit_gb: float) -> None:
        self.folder, self.limit_gb = Path(folder), limit_gb
        self._encoder: tuple[object, str] | None = None
        self._complained = False

    def __call__(
        self,
        image: Float[Tensor, "B C S S"],
        encoder: nn.Module,
        kind: str,
        encode: Callable[[Float[Tensor, "1 C S S"]], Any],
    ) -> Float[Tensor, "B D h w"]:
        """The embeddings of images, in the images' dtype.

        Args:
            image: what `encode` takes, without a gradient.
            encoder: the module whose weights `encode` uses.
            kind: what else the embedding depends on: the family, which says how images are normalised.
            encode: computes the embedding of one image.

        Raises:
            UserError: an embedding that float16 cannot hold, or one of several tensors (of SAM-HQ and SAM 2).
        """
        room = self.folder / self._mark(encoder, f"{kind} {_precision(image)}")
        found = [self._one(room, one, encode) for one in image.split(1)]
        return torch.from_numpy(np.stack(found)).to(image)

    def _one(self, room: Path, image: Tensor, encode: Callable[[Tensor], Any]) -> Float16[np.ndarray, "D h w"]:
        path = room / f"{tensor_hash(image)}.npy"
        embedding = _read(path)
        if embedding is None:
            with torch.no_grad():
                encoded = encode(image)
            if not isinstance(encoded, Tensor):
                raise UserError("only SAM's own kind of embedding can be kept; set phase.crops=null.")
            embedding = encoded[0].to(torch.float16).cpu().numpy()
            if not np.isfinite(embedding).all():
                raise UserError("an image's embedding exceeds the range of float16; set phase.crops=null.")
            self._keep(path, embedding)
        return embedding

    def _mark(self, encoder: nn.Module, kind: str) -> str:
        """The hash of all that an embedding follows from, but the image; computed anew when a weight has changed."""
        state = (kind, in_memory_state(encoder))
        if self._encoder is None or self._encoder[0] != state:
            self._encoder = (state, fingerprint(encoder, f"{VERSION} {kind}"))
        return self._encoder[1]

    def _keep(self, path: Path, embedding: Float16[np.ndarray, "D h w"]) -> None:
        """Write an embedding if there is room for it; that there is none must not end the training."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._make_room(path.parent, embedding.nbytes):
                self._complain(f"has reached {self.limit_gb:g} GB (trainer.embeddings_gb)")
                return
            part = path.with_suffix(f".{uuid.uuid4().hex}.part")
            try:
                with part.open("wb") as file:
                    np.save(file, embedding)
                    file.write(_crc(embedding))
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            self._complain("is on a full disk" if full else f"cannot be written ({error.strerror})")

    def _make_room(self, own: Path, wanted: int) -> bool:
        # Looked up each time, as other processes write too; it costs microseconds a file, an encoding seconds.
        sizes = {}
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                sizes[path] = path.stat()
        free = self.limit_gb * 1e9 - sum(status.st_size for status in sizes.values())
        others = sorted(
            (p for p in sizes if p.parent != own and p.suffix == ".npy"), key=lambda p: sizes[p].st_mtime_ns
        )
        while free < wanted and others and self.limit_gb * 1e9 >= wanted:
            oldest = others.pop(0)
            oldest.unlink(missing_ok=True)
            free += sizes[oldest].st_size
        return free >= wanted

    def _complain(self, what: str) -> None:
        if not self._complained:
            log.warning(
                "the embeddings in %s: the cache %s; images that are not in it are encoded anew", self.folder, what
            )
        self._complained = True


def _read(path: Path) -> Float16[np.ndarray, "D h w"] | None:
    """The embedding in a file; None where there is none, or a damaged one."""
    try:
        mapped = np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            file.seek(-CRC_BYTES, 2)
            whole = mapped.dtype == np.float16 and mapped.ndim == 3 and file.read() == _crc(mapped)
    except (OSError, ValueError, EOFError):
        whole = False
    if not whole and path.exists():
        log.warning("%s is damaged and made anew", path)
    return np.array(mapped) if whole else None


def _crc(embedding: np.ndarray) -> bytes:
    return zlib.crc32(np.ascontiguousarray(embedding).data).to_bytes(CRC_BYTES, "little")


def _precision(image: Tensor) -> str:
    device = image.device.type
    return str(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else image.dtype)
