"""The page to look at single images: its functions against the Segmenter, and the page itself in a browser."""

import itertools
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import compose
from data_layouts import save, texture
from dicom_files import ultrasound_region, write_dicom
from ultrarefiner import cli, demo, explore
from ultrarefiner.errors import UserError
from ultrarefiner.explore import Explorer
from ultrarefiner.phases.e2e import E2EPhase
from ultrarefiner.results.measures import measure
from ultrarefiner.runs.build import build_cascade
from ultrarefiner.segmenter import Segmenter

EXAMPLE = cli.HOME / "examples" / "images" / "bus_0018-s.png"
HOSTILE = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def shipped() -> Segmenter:
    return Segmenter.load("shipped", "cpu")


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return Explorer(Segmenter.load("shipped", "cpu"))


@pytest.fixture(scope="module")
def first(explorer):
    return explorer.start(EXAMPLE)


@pytest.fixture(scope="module")
def pointed() -> Explorer:
    """An untrained pair that takes points, with a region of interest."""
    cfg = compose("phase=e2e", "roi=on", "model.prompts.point=true", "model.prompts.negative_point=true")
    return Explorer(Segmenter(build_cascade(cfg, E2EPhase.parts, {}), 64, 64, "cpu"))


def counted(explorer: Explorer, monkeypatch) -> list[int]:
    """Grows with each call of the image encoder."""
    calls: list[int] = []
    encoder = explorer._judged.cascade.refiner.sam.image_encoder
    encode = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda *given, **more: calls.append(1) or encode(*given, **more))
    return calls


def test_the_mask_is_that_of_the_segmenter(shipped, explorer, first):
    found = shipped(EXAMPLE)
    assert first.found.mask.any() and first.found.accepted
    assert np.array_equal(first.found.mask, found.mask)
    assert np.array_equal(first.found.probability, found.probability)
    again = explorer.redraw(first, None)
    assert np.array_equal(again.found.mask, found.mask)
    assert np.array_equal(first.mask(0.5), found.mask)


def test_the_box_is_around_the_lesion(first):
    rows, columns = np.nonzero(first.first.coarse)
    x1, y1, x2, y2 = first.told.box
    assert abs(x1 - columns.min()) < 25 and abs(x2 - columns.max()) < 25
    assert abs(y1 - rows.min()) < 25 and abs(y2 - rows.max()) < 25
    assert first.told.region[0] <= x1 and first.told.region[3] >= y2


def test_a_moved_box_takes_the_mask_with_it(explorer, first):
    height, width = first.found.mask.shape
    for box in ((0.1, 0.55, 0.35, 0.8), (0.65, 0.5, 0.9, 0.8)):
        x1, y1, x2, y2 = (share * side for share, side in zip(box, (width, height) * 2, strict=True))
        moved = explorer.redraw(first, (x1, y1, x2, y2))
        assert moved.replaced and moved.found.mask.any()
        rows, columns = np.nonzero(moved.found.mask)
        assert x1 < columns.mean() < x2 and y1 < rows.mean() < y2
        assert np.allclose(moved.told.box, (x1, y1, x2, y2), atol=0.01)


def test_a_box_that_cuts_the_lesion_cuts_the_mask(explorer, first):
    rows, columns = np.nonzero(first.found.mask)
    middle = float(columns.mean()) + 0.2 * np.ptp(columns)
    cut = explorer.redraw(first, (float(columns.min()), float(rows.min()), float(middle), float(rows.max())))
    assert not cut.replaced
    assert cut.found.mask[:, : int(middle)].sum() > 0.8 * first.found.mask[:, : int(middle)].sum()
    assert not cut.found.mask[:, int(middle) + 25 :].any()


def test_refining_again_does_not_encode_again(explorer, first, monkeypatch):
    explorer.start(EXAMPLE)
    calls = counted(explorer, monkeypatch)
    x1, y1, x2, y2 = first.told.box
    explorer.redraw(first, (x1 - 9, y1, x2, y2 + 7))
    explorer.redraw(first, None)
    assert not calls
    explorer.start(EXAMPLE.with_name("bus_0066-l.png"))
    assert len(calls) == 1


def test_a_pair_without_points_says_so(explorer, first):
    assert "litemedsam" in explorer.refuses_points and "trained without points" in explorer.refuses_points
    with pytest.raises(UserError, match="trained without points"):
        explorer.redraw(first, None, ((10.0, 10.0, True),))


def test_points_are_told_and_the_region_holds_them(pointed, tmp_path, monkeypatch):
    save(tmp_path / "a.png", texture(1, 90, 120))
    begun = pointed.start(tmp_path / "a.png")
    assert not pointed.refuses_points
    calls = counted(pointed, monkeypatch)
    width, height = begun.found.mask.shape[1], begun.found.mask.shape[0]
    points = ((3.0, 4.0, True), (width - 3.0, height - 2.0, False))
    more = pointed.redraw(begun, None, points)
    assert np.allclose(more.told.points[-len(points) :], points, atol=0.01)  # after those that the pair computes
    x1, y1, x2, y2 = more.told.region
    assert x1 <= 3 and y1 <= 4 and x2 >= width - 3 and y2 >= height - 2
    before = len(calls)
    pointed.redraw(begun, None, (points[0], (width - 9.0, height - 8.0, True)))
    assert len(calls) <= before + 1


def test_a_higher_threshold_gives_a_smaller_mask(first):
    masks = [first.mask(threshold) for threshold in (0.05, 0.3, 0.5, 0.7, 0.95)]
    assert all((larger >= smaller).all() for larger, smaller in itertools.pairwise(masks))
    assert masks[0].sum() > masks[-1].sum()


def test_measures_in_px_and_mm(first, explorer, tmp_path):
    (row, *_) = explore.rows(first, pixel=0.1)
    expected = measure(explore.separate(first.found.mask)[0], (0.1, 0.1))
    assert float(row["longest_mm"]) == pytest.approx(expected["longest"], abs=1e-3)
    assert explore.rows(first)[0]["longest_mm"] == "" and "no size in mm" in explore.measured(first)
    pixels = np.asarray(Image.open(EXAMPLE).convert("L"))
    region = ultrasound_region((0, 0, pixels.shape[1] - 1, pixels.shape[0] - 1), (0.02, 0.02))
    write_dicom(tmp_path / "scan.dcm", pixels, SequenceOfUltrasoundRegions=[region])
    row = explore.rows(explorer.start(tmp_path / "scan.dcm"), pixel=9.0)[0]
    assert float(row["longest_mm"]) == pytest.approx(0.2 * float(row["longest_px"]), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.png", b"", "empty.png is empty"),
        ("text.png", b"no image", "text.png cannot be read"),
        ("notes.txt", b"no image", "notes.txt holds no image"),
        ("cut.png", EXAMPLE.read_bytes()[:3000], "cut.png cannot be read"),
        (HOSTILE, b"no image", f"{HOSTILE} cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(explorer, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        explorer.start(tmp_path / name)
    assert words in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_a_box_without_extent_is_one_sentence(explorer, first):
    with pytest.raises(UserError, match="2 px wide"):
        explorer.redraw(first, (50.0, 50.0, 50.5, 90.0))


def test_the_report_is_whole_and_a_hostile_name_stays_text(explorer, tmp_path):
    shutil.copy(EXAMPLE, tmp_path / HOSTILE)
    now = explorer.start(tmp_path / HOSTILE)
    html = explore.report(now, 0.5, 0.1, "<script>alert(2)</script>")
    assert "<script" not in html and "<img src=x" not in html and "&lt;img src=x onerror" in html
    assert not re.search(r"""(src|href)=(?!["']?data:)""", html.replace("&lt;img src=x", ""))
    assert html.count("data:image/png;base64,") == 2 and "mm²" in html


def test_the_callbacks_of_the_page(explorer, first, tmp_path):
    pytest.importorskip("gradio")
    from ultrarefiner.explore_page import BOX, Page

    page, view = Page(explorer, "a pair", tmp_path), (0.5, ("coarse", "refined"), None)
    now, picture, problem, measures, mask, report, *sides, _ = page.open(EXAMPLE, 0, *view)
    assert np.array_equal(np.asarray(Image.open(mask)) > 0, first.found.mask) and problem == ""
    assert picture.shape[:2] == first.found.mask.shape and "lesion" in measures and Path(report).is_file()
    assert [side["value"] for side in sides] == [round(side) for side in first.told.box]
    corner, *rest = page.click(now, (20, 200), BOX, None, *view)
    assert "opposite corner" in rest[2]
    cleared, moved, *_ = page.click(rest[0], (90, 260), BOX, corner, *view)
    assert cleared is None and moved.box == (20.5, 200.5, 90.5, 260.5)
    (tmp_path / HOSTILE).write_bytes(b"no image")
    said = page.open(tmp_path / HOSTILE, 0, *view)[2]
    assert "&lt;img src=x" in said and "<img" not in said
    assert len(page.open(EXAMPLE, 0, *view)) == len(page.open(tmp_path / HOSTILE, 0, *view))
    assert "Drop an image first" in page.redraw(None, None, (), *view)[2]


def test_help_imports_no_torch():
    code = (
        "import sys; from ultrarefiner import demo\n"
        "try: demo.main()\n"
        "finally: sys.stderr.write('torch' if {'torch', 'gradio'} & set(sys.modules) else 'clean')"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.stderr.endswith("clean") and done.returncode == 0, done.stderr
    shown = set(re.findall(r"(\w+)=", demo.help_text()))
    assert set(vars(demo.DemoConfig())) <= shown | {"safety"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ultrarefiner.demo", "open=false", *arguments]


def test_a_port_in_use_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(command(f"port={port}"), capture_output=True, text=True)
    assert done.returncode == 1 and f"port={port}" in done.stderr and "give another port" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_gradio_it_says_how_to_install_it(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('not here')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from ultrarefiner import demo; demo.main()"
    done = subprocess.run([sys.executable, "-c", code, "port=17861"], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'ultrarefiner[demo]'" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def address():
    """The page of a running command."""
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(command(f"port={port}", "device=cpu"))
    for _ in range(1200):
        assert process.poll() is None
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.25)
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.wait(60)


def faults(page) -> list[list[str]]:
    """What axe finds wrong in the accessibility of the page, once it has come to rest."""
    script = "axe.run().then(found => found.violations.map(v => [v.id, ...v.nodes.map(n => n.html)]))"
    until = time.monotonic() + 30  # Gradio puts parts of the page in after the first ones can be clicked
    while (found := page.evaluate(script)) and time.monotonic() < until:
        page.wait_for_timeout(500)
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("page")  # one server for all
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("size", "scheme"), [((390, 844), "dark"), ((1280, 900), "light")])
def test_the_page_in_a_browser(address, browser, axe, size, scheme, tmp_path):
    wrong: list[str] = []
    context = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(r.url))
    page.goto(address)
    example = page.get_by_role("button", name=re.compile("bus_0018|Thumbnail 1")).first
    example.wait_for()
    page.evaluate(axe)
    assert not faults(page)
    example.click()
    page.locator("#picture img").wait_for()
    page.get_by_text("One lesion").wait_for()
    assert not faults(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    before = page.locator("#picture img").get_attribute("src")
    picture = page.locator("#picture img")
    area = picture.bounding_box()
    for x, y in ((0.2, 0.55), (0.45, 0.85)):
        picture.click(position={"x": x * area["width"], "y": y * area["height"]})
        page.wait_for_timeout(300)
        if y < 0.6:
            page.get_by_text("opposite corner").wait_for()
    page.get_by_text("redrawn as you have set it").wait_for()
    assert page.locator("#picture img").get_attribute("src") != before
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    (tmp_path / "bad.png").write_text("no image")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "bad.png")
    page.get_by_role("alert").filter(has_text="bad.png cannot be read").wait_for()
    context.close()
    assert not wrong, wrong
