"""What can go wrong around a training, at a moment of one's choice.

A moment is a number: of the Nth time that the process opens, renames or removes a file below a folder, or, for what
befalls a loader's worker, of the Nth sample that a worker makes. So a seed repeats a fault to the file.
"""

import ctypes
import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

MEGABYTE = 1 << 20
ENDS_EXT4 = 0x8004587D  # the ioctl EXT4_IOC_SHUTDOWN: from then on all of the file system is an input/output error
WITHOUT_SAVING = 2  # its argument: what is not on the disk yet is lost
MAY_IGNORE_MODES = 0b110  # the capabilities DAC_OVERRIDE and DAC_READ_SEARCH


class Fault(NamedTuple):
    """One kind of fault.

    Attributes:
        strike: what happens, in the training's process; it is given the folder and random numbers.
        place: make the folder what the fault needs, before the training.
        mend: undo it, after the training.
        worker: it befalls a worker.
    """

    strike: Callable[[Path, random.Random], object]
    place: Callable[[Path], object] = lambda folder: folder.mkdir(exist_ok=True)
    mend: Callable[[Path], object] = lambda folder: None
    worker: bool = False


def mounted(*options: str) -> None:
    """Run mount.

    Raises:
        PermissionError: this machine does not let us.
    """
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        raise PermissionError("only root may mount a file system")


def _small_disk(folder: Path) -> None:
    folder.mkdir()
    mounted("-t", "tmpfs", "-o", "size=64m", "none", str(folder))


def _fill(folder: Path, draw: random.Random) -> None:
    """Leave between nothing and a megabyte."""
    state = os.statvfs(folder)
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - draw.randint(0, MEGABYTE))


def _disk(folder: Path) -> None:
    """A file system of its own in a file; it outlives that it is taken away."""
    image = folder.with_suffix(".ext4")
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(96 * MEGABYTE)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
    folder.mkdir(exist_ok=True)
    mounted("-o", "loop", str(image), str(folder))


def _lose(folder: Path, draw: random.Random) -> None:
    """What a network file system looks like whose server is gone."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.ioctl(handle, ENDS_EXT4, WITHOUT_SAVING.to_bytes(4, sys.byteorder))
    os.close(handle)


def _take_away(folder: Path, draw: random.Random) -> None:
    """What is open stays so; the folder is empty for everybody else."""
    subprocess.run(["umount", "-l", folder], check=True)


def _again(folder: Path) -> None:
    while os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)
    _disk(folder)


def _chmod(folder: Path, mode: int) -> None:
    for path in [folder / "out", *(path for path in (folder / "out").rglob("*") if path.is_dir())]:
        path.chmod(mode)


def _forbid(folder: Path, draw: random.Random) -> None:
    _chmod(folder, 0o555)
    if not os.getuid():  # root would not care
        libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capget(header, sets)
        sets[0] &= ~MAY_IGNORE_MODES
        libc.capset(header, sets)


def _kill(folder: Path, draw: random.Random) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _any_file(folder: Path, draw: random.Random) -> Path | None:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return draw.choice(found) if found else None


def _remove(folder: Path, draw: random.Random) -> None:
    if path := _any_file(folder / "out", draw):
        path.unlink()


def _cut(folder: Path, draw: random.Random) -> None:
    if path := _any_file(folder / "out", draw):
        os.truncate(path, draw.randint(0, path.stat().st_size))


def _remove_data(folder: Path, draw: random.Random) -> None:
    (folder / "data").rename(folder / "elsewhere")


def _bring_data(folder: Path) -> None:
    if (folder / "elsewhere").exists():
        (folder / "elsewhere").rename(folder / "data")


def _change_data(folder: Path, draw: random.Random) -> None:
    """Another case's mask, and not even at once."""
    shutil.copytree(folder / "data", folder / "elsewhere")
    one, other = draw.sample(sorted((folder / "data" / "masks").iterdir()), 2)
    one.write_bytes(other.read_bytes()[:-20])
    shutil.copy(other, one)


def _restore_data(folder: Path) -> None:
    if (folder / "elsewhere").exists():
        shutil.rmtree(folder / "data")
        (folder / "elsewhere").rename(folder / "data")


def _exhaust(folder: Path, draw: random.Random) -> None:
    """A worker that may have 64 MB more, and wants 4 GB."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MEGABYTE, -1))
    torch.zeros(1 << 30)


FAULTS = {
    "full disk": Fault(_fill, _small_disk, lambda folder: (folder / "filler").unlink(missing_ok=True)),
    "read-only folder": Fault(_forbid, mend=lambda folder: _chmod(folder, 0o755)),
    "killed": Fault(_kill),
    "mount lost": Fault(_lose, _disk, _again),
    "mount taken away": Fault(_take_away, _disk, _again),
    "data vanish": Fault(_remove_data, mend=_bring_data),
    "data change": Fault(_change_data, mend=_restore_data),
    "a file vanishes": Fault(_remove),
    "a file is cut": Fault(_cut),
    "no memory in a worker": Fault(_exhaust, worker=True),
    "a worker is killed": Fault(_kill, worker=True),
}


def train(arguments: list[str], log: Path, folder: Path, fault: str | None, moments: Any, at: int, seed: int) -> None:
    """The command, in a process that may be lost, with a fault at one moment; what it says goes into a file.

    Args:
        arguments: of the command.
        log: the file.
        folder: that is watched.
        fault: which one; None only counts.
        moments: two shared integers, in which the moments of the process and of its workers are counted.
        at: the moment of the fault.
        seed: of its random numbers.
    """
    from ultrarefiner import train as command
    from ultrarefiner.data.dataset import Cases

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main, striking = os.getpid(), False

    def moment(worker: bool) -> None:
        nonlocal striking
        if striking:
            return
        with moments.get_lock():
            moments[worker] += 1
            reached = moments[worker] == at
        if fault is not None and reached and FAULTS[fault].worker == worker:
            striking = True
            FAULTS[fault].strike(folder, random.Random(seed))
            striking = False

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and os.getpid() == main:
            path = given[0]
            if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(f"{folder}/"):
                moment(worker=False)

    read = Cases.__getitem__

    def read_one(self: Cases, key: Any) -> dict[str, Any]:
        if os.getpid() != main:
            moment(worker=True)
        return read(self, key)

    Cases.__getitem__ = read_one  # type: ignore[method-assign]
    sys.addaudithook(watch)
    torch.set_num_threads(1)
    sys.argv = ["ultrarefiner-train", *arguments]
    command.main()
