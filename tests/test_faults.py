"""Faults at random moments of a training: nothing finished is lost, and the rerun heals or says what to delete.

One moment of each here; `ULTRAREFINER_FAULTS="10 e2e"` tries ten, in a training of all three phases.
"""

import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import MICRO
from data_layouts import write_folder, write_table
from faults import FAULTS, train
from reruns import GROUP, assert_same_run, server
from ultrarefiner.errors import UserError
from ultrarefiner.results.tables import read_result

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="mounts file systems, and takes them away"),
    pytest.mark.xdist_group(GROUP),
]
MOMENTS, PHASE = os.environ.get("ULTRAREFINER_FAULTS", "1 coarse").split()
SETTINGS = [
    *(text for text in MICRO if "reader" not in text),
    *(f"model.schedule.{phase}.batch_size=4" for phase in ("coarse", "sam", "e2e")),
    "dataset=folder",
    f"phase={PHASE}",
    "trainer.num_workers=1",
]


class Ended(NamedTuple):
    """How a command ended: its exit status, and its errors."""

    status: int
    errors: list[str]


def run(folder: Path, log: Path, *strike, timeout: float = 300) -> tuple[Ended, list[int]]:
    """The command in a folder, with a fault or with none; and how many moments there were."""
    fault, at, seed = strike or (None, 0, 0)
    given = [*SETTINGS, f"data_root={folder}/data", f"output_root={folder}/out"]
    moments = server.Array("i", 2)
    process = server.Process(target=train, args=(given, log, folder, fault, moments, at, seed))
    process.start()
    process.join(timeout)
    hung = process.exitcode is None
    process.kill()
    process.join()
    said = log.read_text()
    assert not hung, f"it hangs: {said}"
    assert "Traceback" not in said, said
    return Ended(process.exitcode, [line for line in said.splitlines() if line.startswith("error: ")]), moments[:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a training without a fault, and how many moments it has."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_folder(folder / "data", 20)
    rows = [[f"case_{number}", number, "benign"] for number in range(20)]
    write_table(folder / "data" / "table.csv", ["id", "patient", "label"], rows)
    ended, moments = run(folder, folder / "log")
    assert ended == Ended(0, [])
    return folder, moments


def finished(folder: Path) -> set[Path]:
    """The runs whose result is there."""
    whole = set()
    for path in (folder / "out").rglob("summary.json"):
        try:
            read_result(path.parent)
        except UserError:
            continue
        whole.add(path.parent.relative_to(folder))
    return whole


@pytest.mark.parametrize("number", range(int(MOMENTS)))
@pytest.mark.parametrize("fault", FAULTS)
def test_the_rerun_heals_or_says_what_to_delete(fault, number, undisturbed, tmp_path):
    whole, moments = undisturbed
    draw = random.Random(f"{fault} {number}")
    kind, folder = FAULTS[fault], tmp_path / "run"
    try:
        kind.place(folder)
    except PermissionError as error:
        pytest.skip(str(error))
    try:
        shutil.copytree(whole / "data", folder / "data")
        (folder / "out").mkdir()
        os.sync()  # the data are older than the fault
        at = draw.randint(1, moments[kind.worker])
        struck, _ = run(folder, tmp_path / "struck", fault, at, draw.random())
        # The cache is built through memory maps; who cuts such a file kills the process that fills it.
        killed = struck.status in {"killed": [-signal.SIGKILL], "a file is cut": [-signal.SIGBUS]}.get(fault, [])
        if not killed:
            assert struck.status == len(struck.errors) <= 1
        kind.mend(folder)
        had = finished(folder)
        healed, _ = run(folder, tmp_path / "healed")
        deleted = []
        while healed.status and len(deleted) < 3:
            (sentence,) = healed.errors
            place = re.search(r"delete (\S+?)[,;.]?(?: |$)", sentence)
            assert place, sentence
            deleted.append(place[1])
            shutil.rmtree(place[1]) if Path(place[1]).is_dir() else Path(place[1]).unlink()
            healed, _ = run(folder, tmp_path / "healed")
        print(f"\nFAULT {fault} | {at} | {struck.status} {struck.errors} | {healed.status} deleted {deleted}")
        assert healed.status == 0 and had <= finished(folder)
        for directory in finished(whole):
            assert_same_run(folder / directory, whole / directory)
    finally:
        while os.path.ismount(folder):
            os.system(f"umount -l {folder}")
