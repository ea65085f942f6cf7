"""Checkpoint files: what the publishers offer, fetching them, and reading any of them safely.

Nothing here unpickles code (`weights_only=True`), and every mistake in a file is a `UserError` that names the file.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch
from torch import Tensor

from ultrarefiner import files
from ultrarefiner.errors import UserError

BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Release:
    """One file as its publisher offers it: where, how many bytes, and its SHA-256 in hexadecimal."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's name, the last part of its URL."""
        return urlsplit(self.url).path.rsplit("/", 1)[-1]


# The six hexadecimal digits in Meta's file names begin the MD5, not the SHA-256.
_META = "https://dl.fbaipublicfiles.com/segment_anything/"
RELEASES: dict[str, Release] = {
    "vit_b": Release(
        _META + "sam_vit_b_01ec64.pth", 375042383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "vit_l": Release(
        _META + "sam_vit_l_0b3195.pth", 1249524607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "vit_h": Release(
        _META + "sam_vit_h_4b8939.pth", 2564550879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
    "medsam": Release(
        "https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
        375049145,
        "34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74",
    ),
}


def check_release(path: Path, release: Release) -> None:
    """Compare a file with its publisher's size and SHA-256; raise `UserError` where it differs."""
    size = path.stat().st_size
    remedy = f"fetch {release.url} again (a file of your own needs another name than {release.name})"
    if size != release.size:
        kind = "truncated" if size < release.size else "not the publisher's"
        raise UserError(f"{path} is {kind}: {size} bytes instead of {release.size}; {remedy}.")
    digest = file_sha256(path)
    if digest != release.sha256:
        raise UserError(f"{path} is damaged: its SHA-256 is {digest} instead of {release.sha256}; {remedy}.")


def file_sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def download_checkpoint(family: str, folder: str | Path, releases: Mapping[str, Release] = RELEASES) -> Path:
    """Fetch a family's published weights into a folder, unless the right file lies there already.

    The file appears under its own name only when it is complete and its size and SHA-256 are right.

    Args:
        family: a key of `releases`.
        folder: made if it is missing.
        releases: where each family's file is; any URL that `urllib` opens, `file://` included.

    Raises:
        UserError: unknown family, no connection, or a file that is not what the publisher describes.
    """
    if family not in releases:
        raise UserError(f"no published file is known for the family '{family}'; choose one of {', '.join(releases)}.")
    release = releases[family]
    folder = Path(folder).expanduser()
    target = folder / release.name
    if target.exists():
        check_release(target, release)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as room:
        part = Path(room) / release.name
        try:
            with urlopen(release.url, timeout=60) as source, part.open("wb") as file:
                while block := source.read(BLOCK):
                    file.write(block)
        except (URLError, OSError) as error:
            raise UserError(f"{release.url} could not be fetched into {folder}: {error}.") from error
        check_release(part, release)
        part.replace(target)
    return target


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's weights as a plain name → tensor dictionary, in float32, on the CPU.

    Accepts a plain state_dict, or one under the key "state_dict" or "model"; a prefix that all names share before
    `image_encoder.` and so on ("module.", "sam.") is taken off. A file that bears a publisher's name must be the
    publisher's file.

    Raises:
        UserError: missing, truncated or unsafe file, no weights inside, NaN or infinity among them.
    """
    path = Path(path).expanduser()
    for release in RELEASES.values():
        if path.name == release.name and path.is_file():
            check_release(path, release)
    content = files.load(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no weights: expected a state_dict, plain or under 'state_dict' or 'model'.")
    state = {name: value.float() if value.is_floating_point() else value for name, value in content.items()}
    require_finite(state, path)
    return _without_prefix(state)


def require_finite(state: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse weights with NaN or infinity among them: `UserError` with the file and the first such name."""
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(
                f"{where} holds NaN or infinite weights in '{name}'; its training diverged, use another file."
            )


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    marks = [name.find("image_encoder.") for name in state if "image_encoder." in name]
    if not marks or min(marks) == 0:
        return state
    prefix = next(name[: marks[0]] for name in state if "image_encoder." in name)
    if not all(name.startswith(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): value for name, value in state.items()}


def in_memory_state(module: torch.nn.Module) -> list[tuple[int, int, torch.dtype]]:
    """A value that changes when a parameter or buffer is replaced or written to, without a look at the numbers."""
    return [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in (*module.parameters(), *module.buffers())]


def load_strictly(module: torch.nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put weights into a module; every name and shape must match, else `UserError` with the first few that do not.

    Args:
        module: may lie on the meta device, its parameters are replaced.
        state: name → tensor.
        where: the file, for the message.
    """
    expected = {name: value.shape for name, value in module.state_dict().items()}
    missing = [name for name in expected if name not in state]
    surplus = [name for name in state if name not in expected]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    problems = [
        f"{title}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for title, names in (("missing", missing), ("left over", surplus), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise UserError(f"{where} does not fit this model; {'; '.join(problems)}.")
    module.load_state_dict(state, assign=True)
