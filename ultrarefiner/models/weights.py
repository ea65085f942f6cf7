"""Checkpoint files: what the publishers offer, fetching them, and reading and writing any of them safely.

Nothing here unpickles code (`weights_only=True`), and every mistake in a file is a `UserError` that names the file.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

from ultrarefiner import files
from ultrarefiner.errors import UserError

log = logging.getLogger(__name__)

SAFETENSORS = ".safetensors"
SILENCE = 60  # seconds without a byte after which a connection counts as lost


@dataclass(frozen=True)
class Release:
    """One file as its publisher offers it: where, how many bytes, and its SHA-256 in hexadecimal (None: not known)."""

    url: str
    size: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The file's name, the last part of its URL."""
        return unquote(urlsplit(self.url).path.rsplit("/", 1)[-1])


# The six hexadecimal digits in Meta's file names begin the MD5, not the SHA-256.
_META = "https://dl.fbaipublicfiles.com/segment_anything/"
_META_2 = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
_HQ = "https://huggingface.co/lkeab/hq-sam/resolve/main/"
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
    "ultrasam": Release(
        "https://s3.unistra.fr/camma_public/github/ultrasam/UltraSam.pth",
        381156023,
        "d7c223dd03f56b0b77cd246aa3edfae651e99f0ee2dde2e8c50eda7b21fa8a0c",
    ),
    "mobilesam": Release(
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        40728226,
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    "sam_hq_vit_tiny": Release(
        _HQ + "sam_hq_vit_tiny.pth", sha256="0f32c075ccdd870ae54db2f7630e7a0878ede5a2b06d05d6fe02c65a82fb7196"
    ),
    "sam_hq_vit_b": Release(_HQ + "sam_hq_vit_b.pth"),
    "sam_hq_vit_l": Release(_HQ + "sam_hq_vit_l.pth"),
    "sam_hq_vit_h": Release(
        _HQ + "sam_hq_vit_h.pth", sha256="a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35"
    ),
    "sam2.1_tiny": Release(
        _META_2 + "sam2.1_hiera_tiny.pt", 156008466, "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"
    ),
    "sam2.1_small": Release(
        _META_2 + "sam2.1_hiera_small.pt", 184416285, "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"
    ),
    "sam2.1_base_plus": Release(
        _META_2 + "sam2.1_hiera_base_plus.pt",
        323606802,
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
    ),
    "sam2.1_large": Release(
        _META_2 + "sam2.1_hiera_large.pt", 898083611, "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"
    ),
    "r50_vit_b16": Release(  # for TransUNet
        "https://storage.googleapis.com/vit_models/imagenet21k/R50%2BViT-B_16.npz",
        461217452,
        "ff009bf39bb4f9198b834cfe46aba2bfdaf730e933ab3e3c4b1edf4226eaafbe",
    ),
}


def check_release(path: Path, release: Release) -> None:
    """Compare a file with its publisher's size and SHA-256; raise `UserError` where it differs."""
    size = path.stat().st_size
    remedy = f"fetch {release.url} again (a file of your own needs another name than {release.name})"
    if release.size is not None and size != release.size:
        kind = "truncated" if size < release.size else "not the publisher's"
        raise UserError(f"{path} is {kind}: {size} bytes instead of {release.size}; {remedy}.")
    if release.sha256 is not None and (digest := files.sha256(path)) != release.sha256:
        raise UserError(f"{path} is damaged: its SHA-256 is {digest} instead of {release.sha256}; {remedy}.")


def cache_folder() -> Path:
    """Where fetched files are kept: $ULTRAREFINER_CACHE, or the folder ultrarefiner/ among the user's caches."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ultrarefiner"
    return Path(os.environ.get("ULTRAREFINER_CACHE") or usual).expanduser()


def fetch(name: str, folder: str | Path | None = None, releases: Mapping[str, Release] = RELEASES) -> Path:
    """The path of a published file, which is fetched unless the right one lies there already.

    An attempt that is cut off goes on where it stopped, in this call and in the next one. The file gets its own name
    only when it is complete and its size and SHA-256 are right, as far as they are known. Processes that ask for the
    same file wait for the one that fetches it.

    Args:
        name: a key of `releases`.
        folder: where it is kept, made if missing; None is `cache_folder()`.
        releases: where each file is; any URL that `urllib` opens, `file://` included.

    Raises:
        UserError: unknown name, no connection, a folder that cannot be written, or a file that is not what its
            publisher describes.
    """
    if name not in releases:
        raise UserError(f"no published file is known by the name '{name}'; choose one of {', '.join(releases)}.")
    release, folder = releases[name], cache_folder() if folder is None else Path(folder).expanduser()
    target, part = folder / release.name, folder / f"{release.name}.part"
    if target.is_file():
        check_release(target, release)
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{release.name}.lock"):
            if not target.is_file():
                _receive(release, part, target)
                try:
                    check_release(part, release)
                except UserError:
                    part.unlink()  # to go on behind it would be of no use
                    raise
                part.replace(target)
    except OSError as error:
        raise UserError(
            f"the folder {folder} for fetched weights cannot be written ({error.strerror}); set ULTRAREFINER_CACHE to "
            "another one."
        ) from error
    return target


def _receive(release: Release, part: Path, target: Path) -> None:
    """Fetch into `part`, behind what is there; a lost connection is taken up again as long as each brings something."""
    log.info("fetching %s into %s", release.url, target.parent)
    while True:
        had = part.stat().st_size if part.exists() else 0
        try:
            if had == release.size:
                return
            missing = _receive_once(release, part, had)
        except (OSError, HTTPException) as error:
            if isinstance(error, HTTPError) and error.code == 416 and had:  # there is nothing behind what we have
                part.unlink()
                continue
            missing, reason = True, str(error)
        else:
            reason = "the connection was lost"
        if not missing:
            return
        if (part.stat().st_size if part.exists() else 0) <= had:
            raise UserError(
                f"{release.url} could not be fetched ({reason}). Without a connection, fetch it elsewhere and put it "
                f"at {target}, or give its path; what has been fetched so far is kept."
            )


def _receive_once(release: Release, part: Path, had: int) -> bool:
    """One connection; whether something is missing at its end."""
    wanted = {"User-Agent": "ultrarefiner", **({"Range": f"bytes={had}-"} if had else {})}
    with urlopen(Request(release.url, headers=wanted), timeout=SILENCE) as source:
        had = had if getattr(source, "status", None) == 206 else 0  # else it sends all of it again
        length = source.headers["Content-Length"]
        total = None if length is None else had + int(length)
        title = {"desc": release.name, "unit": "B", "unit_scale": True, "disable": None}  # None: on a terminal only
        with part.open("ab" if had else "wb") as file, tqdm(total=total, initial=had, **title) as bar:
            while block := source.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            return total is not None and file.tell() < total


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's weights as a plain name → tensor dictionary, in float32, on the CPU.

    Accepts a .safetensors file, a plain state_dict, or one under the key "state_dict" or "model"; a prefix that all
    names share before `image_encoder.` and so on ("module.", "sam.") is taken off. A file that bears a publisher's name
    must be the publisher's file.

    Raises:
        UserError: missing, truncated or unsafe file, no weights inside, NaN or infinity among them.
    """
    path = Path(path).expanduser()
    for release in RELEASES.values():
        if path.name == release.name and path.is_file():
            check_release(path, release)
    content = _read_safetensors(path)[0] if path.suffix == SAFETENSORS else files.load(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no weights: expected a state_dict, plain or under 'state_dict' or 'model'.")
    state = {name: value.float() if value.is_floating_point() else value for name, value in _widened(content)}
    require_finite(state, path)
    return _without_prefix(state)


def narrowed(state: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Weights in fewer bits, as `write_state_dict` takes and `read_state_dict` gives them back.

    Args:
        state: name → tensor; float32 is narrowed, anything else stays.
        bits: 32, 16 (float16), or 8: matrices and convolutions of at least 64 inputs in whole numbers with a scale for
            each output, half of its largest weight's 127th at most wrong; the rest in float16.

    Raises:
        UserError: a weight is too large for float16.
    """
    narrow: dict[str, Tensor] = {}
    for name, value in state.items():
        if bits == 32 or value.dtype != torch.float32:
            narrow[name] = value
        elif bits == 8 and value.ndim > 1 and value[0].numel() >= 64:
            scale = value.abs().amax(tuple(range(1, value.ndim)), keepdim=True).clamp_min(1e-12) / 127
            narrow |= {name: (value / scale).round().to(torch.int8), name + _SCALE: scale}
        elif value.numel() and float(value.abs().max()) > torch.finfo(torch.float16).max:
            raise UserError(f"the weight {name} is too large for 16 bits; set bits=32")
        else:
            narrow[name] = value.half()
    return narrow


_SCALE = ".scale_of_8_bits"


def _widened(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        scale = state.get(name + _SCALE)
        if not name.endswith(_SCALE):
            yield name, value if scale is None else value * scale


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a .safetensors file says beside its weights; any other file says nothing.

    Raises:
        UserError: missing or damaged file.
    """
    path = Path(path).expanduser()
    return _read_safetensors(path, weights=False)[1] if path.suffix == SAFETENSORS else {}


def write_state_dict(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write weights, atomically, as safetensors where the path ends so; else as PyTorch does, without the metadata.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if path.suffix != SAFETENSORS:
        files.save(plain, path)
        return
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with files.replacing(path) as part:  # that format knows no two names for one tensor
        try:
            save_file({name: value.clone() for name, value in plain.items()}, part, {"format": "pt", **metadata})
        except SafetensorError as error:  # a full disk, for instance
            raise OSError(0, str(error)) from error


def _read_safetensors(path: Path, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if weights else []
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise UserError(f"the checkpoint {path} does not exist; give the path of a weights file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read, it is truncated or damaged; copy or make it again") from error


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
    tensors = (*module.parameters(), *module.buffers())
    # What was made in inference mode counts no versions.
    return [(one.data_ptr(), 0 if one.is_inference() else one._version, one.dtype) for one in tensors]


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


def tensor_hash(tensor: Tensor) -> str:
    """The hash of dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=20)
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(module: nn.Module, *more: str) -> str:
    """The hash of all weights and buffers of a network, and of what else is said."""
    named = [*more, *(f"{name} {tensor_hash(value)}" for name, value in module.state_dict().items())]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:32]
