"""models/weights.py, `fetch`: files by name from a server of our own, with all that goes wrong on the way."""

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from conftest import compose
from ultrarefiner import prepare
from ultrarefiner.errors import UserError
from ultrarefiner.models import sam as sam_module
from ultrarefiner.models import weights
from ultrarefiner.models.sam import load_sam
from ultrarefiner.models.sam_families import FAMILIES
from ultrarefiner.models.weights import RELEASES, Release, cache_folder, fetch
from ultrarefiner.runs import plan as plan_module

CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Sends `content`; each answer breaks off after the next number of bytes in `breaks`, if there is one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.breaks = CONTENT, True, list[int]()
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights/the%2Bfile.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(self.server.content):
            self.send_error(416)
            return
        rest = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.breaks.pop(0)] if self.server.breaks else rest)
        self.close_connection = True

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def release(server: Server, size: int | None = len(CONTENT), sha256: str | None = SHA256) -> dict[str, Release]:
    return {"mine": Release(server.url, size, sha256)}


def test_a_file_is_fetched_once(server, tmp_path):
    folder = tmp_path / "a" / "b"
    path = fetch("mine", folder, release(server))
    assert path == folder / "the+file.pth" and path.read_bytes() == CONTENT
    assert fetch("mine", folder, release(server)) == path and server.asked == [None]
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"the\+file.pth is truncated: 2999999 bytes instead of 3000000"):
        fetch("mine", folder, release(server))


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_lost_connection_is_taken_up_again(server, tmp_path, size):
    server.breaks = [1_000_000, 500_000]
    path = fetch("mine", tmp_path, release(server, size))
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    server.ranges, server.breaks = False, [1_000_000]
    assert fetch("mine", tmp_path, release(server)).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-"]


def test_the_next_call_goes_on_where_the_last_one_ended(server, tmp_path):
    server.breaks = [1_000_000, 0]
    with pytest.raises(UserError, match=f"the connection was lost.*put it at {tmp_path}/the.file.pth.*kept"):
        fetch("mine", tmp_path, release(server))
    assert not (tmp_path / "the+file.pth").exists()
    assert fetch("mine", tmp_path, release(server)).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=1000000-"]


def test_all_bytes_are_there_and_only_the_name_is_missing(server, tmp_path):
    """The process died between the last byte and the renaming; or what is there is longer than the file."""
    for size, expected in ((len(CONTENT), []), (None, ["bytes=3000000-", None])):
        server.asked = []
        (tmp_path / "the+file.pth.part").write_bytes(CONTENT)
        fetch("mine", tmp_path, release(server, size)).unlink()
        assert server.asked == expected
    (tmp_path / "the+file.pth.part").write_bytes(CONTENT + b"more")
    assert fetch("mine", tmp_path, release(server)).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "message"),
    [(CONTENT[:-1] + b"x", "SHA-256"), (CONTENT[:-5], "truncated"), (CONTENT + b"x", "not the publisher's")],
    ids=["changed", "cut", "longer"],
)
def test_another_file_than_the_publisher_describes(server, tmp_path, content, message):
    server.content = content
    with pytest.raises(UserError, match=message):
        fetch("mine", tmp_path, release(server))
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}
    server.content = CONTENT
    assert fetch("mine", tmp_path, release(server)).read_bytes() == CONTENT  # nothing of it is left


def test_without_a_connection(server, tmp_path):
    gone = {"mine": Release("http://127.0.0.1:9/weights.pth", 10)}
    with pytest.raises(UserError, match=r"could not be fetched .*refused.*put it at .*weights\.pth"):
        fetch("mine", tmp_path, gone)
    missing = {"mine": Release(Path("/nowhere/weights.pth").as_uri())}
    with pytest.raises(UserError, match="could not be fetched"):
        fetch("mine", tmp_path, missing)
    (tmp_path / "weights.pth").write_bytes(b"0123456789")  # as the message advises
    assert fetch("mine", tmp_path, gone) == tmp_path / "weights.pth"


def test_where_files_are_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ULTRAREFINER_CACHE", raising=False)
    assert cache_folder() == tmp_path / "ultrarefiner"
    monkeypatch.setenv("ULTRAREFINER_CACHE", str(tmp_path / "mine"))
    assert fetch("mine", releases=release(server)).parent == tmp_path / "mine"
    (tmp_path / "file").write_text("no folder")
    for folder in ("file", "file/below"):
        monkeypatch.setenv("ULTRAREFINER_CACHE", str(tmp_path / folder))
        with pytest.raises(UserError, match=f"{folder} for fetched weights cannot be written.*ULTRAREFINER_CACHE"):
            fetch("mine", releases=release(server))
    with pytest.raises(UserError, match="no published file is known by the name 'yours'; choose one of mine"):
        fetch("yours", releases=release(server))


def test_those_who_ask_at_the_same_time_wait_for_one(server, tmp_path):
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: fetch("mine", tmp_path, release(server)), range(4)))
    assert len(set(paths)) == 1 and server.asked == [None] and paths[0].read_bytes() == CONTENT


def test_auto_is_the_publishers_file(server, tmp_path, monkeypatch):
    torch.save(load_sam("tiny", seed=5).state_dict(), tmp_path / "weights.pth")
    server.content = (tmp_path / "weights.pth").read_bytes()
    known = {"tiny": Release(server.url, len(server.content))}
    monkeypatch.setattr(weights, "RELEASES", known)
    monkeypatch.setattr(sam_module, "RELEASES", known)
    monkeypatch.setattr(sam_module, "fetch", lambda name: fetch(name, tmp_path / "cache", known))
    loaded, expected = (load_sam("tiny", "auto"), load_sam("tiny", seed=5))
    assert torch.equal(loaded.mask_decoder.iou_token.weight, expected.mask_decoder.iou_token.weight)
    assert load_sam("litemedsam", "auto").family == "litemedsam"  # in its package: nothing is fetched
    assert len(server.asked) == 1


def test_auto_and_a_path_are_the_same_run(server, tmp_path, monkeypatch):
    """For TransUNet and SAM: the file's content defines the run. Three runs ask, once it is fetched."""
    known = {"mine": Release(server.url, len(CONTENT))}
    monkeypatch.setattr(plan_module, "RELEASES", known | {"tiny": None})
    monkeypatch.setattr(plan_module, "RELEASES_OF", {"tiny": "mine"})
    monkeypatch.setattr(plan_module, "fetch", lambda name: fetch("mine", tmp_path / "cache", known))

    def directories(weights, checkpoint):
        given = [f"model.coarse_weights={weights}", f"model.sam.checkpoint={checkpoint}"]
        return [str(run.directory) for run in plan_module.plan(compose(f"output_root={tmp_path}", *given))]

    path = tmp_path / "cache" / "the+file.pth"
    fetched = directories("auto", "auto")
    assert fetched == directories(path, path) and len(set(fetched)) == 3 and len(server.asked) == 1
    assert set(fetched).isdisjoint(directories("null", "null"))
    path.write_bytes(CONTENT[::-1])
    assert set(fetched).isdisjoint(directories("auto", "auto"))
    with pytest.raises(UserError, match="coarse_weights=auto: no file is known for this network"):
        plan_module.plan(compose("model/coarse=lite", "phase=coarse", "model.coarse_weights=auto"))


def test_prepare_fetches_ahead(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ULTRAREFINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(RELEASES, "medsam", Release(server.url, len(CONTENT), SHA256))
    monkeypatch.setattr("sys.argv", ["prepare", "weights=[medsam]", f"output_root={tmp_path}/out"])
    prepare.main()
    GlobalHydra.instance().clear()
    assert capsys.readouterr().out == f"{tmp_path}/cache/the+file.pth\n" and not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.argv", ["prepare", "weights=[medsam,samwise]"])
    with pytest.raises(SystemExit, match=r"error: .* 'samwise'; choose one of .*medsam"):
        prepare.main()
    GlobalHydra.instance().clear()
    assert len(server.asked) == 1


def test_every_family_that_needs_a_file_has_one_to_fetch():
    needing = {name for name, kind in FAMILIES.items() if kind.needs_file and kind.bundled is None}
    assert needing | {"r50_vit_b16"} == RELEASES.keys()
    assert RELEASES["r50_vit_b16"].name == "R50+ViT-B_16.npz"
    names = [known.name for known in RELEASES.values()]
    assert len(set(names)) == len(names) and all(known.url.startswith("https://") for known in RELEASES.values())
    assert all(known.sha256 is None or len(bytes.fromhex(known.sha256)) == 32 for known in RELEASES.values())
