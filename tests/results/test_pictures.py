"""The pictures of a run: right curves from ragged files, true colours and proportions, harmless names."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, binary_erosion

from ultrarefiner.results import drawing, pictures
from ultrarefiner.results.pictures import (
    Overlay,
    curves,
    overlay,
    overlay_sheet,
    pick_most_harmed,
    pick_worst_median_best,
)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def read(path: Path) -> np.ndarray:
    """RGB, (H, W, 3); fails where there is no picture."""
    return cv2.imread(str(path))[:, :, ::-1].astype(int)


def amount(picture: np.ndarray, colour: str) -> int:
    """How many pixels have nearly this colour."""
    rgb = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return int((np.abs(picture - rgb).max(-1) < 25).sum())


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


FULL = """epoch,step,train/loss,val/coarse/dice,val/refined/dice,lr/coarse,lr/sam
0,3,1.5,,,1e-6,1e-5
0,3,,0.81,0.83,,
1,6,1.2,,,5e-7,5e-6
1,6,,0.82,nan,,
2,9,1.1,,,0.0,0.0
2,9,,0.83,0.88,,
"""


# -- curves


def test_curves_show_coarse_refined_and_baseline(tmp_path):
    metrics, out = write(tmp_path / "metrics.csv", FULL), tmp_path / "curves.png"
    curves(metrics, out)
    without = read(out)
    assert amount(without, drawing.ORANGE) > 50 and amount(without, drawing.BLUE) > 50
    curves(metrics, out, baseline={"coarse": 0.8, "refined": 0.83})
    both = read(out)
    assert amount(both, drawing.ORANGE) > amount(without, drawing.ORANGE) + 50
    assert amount(both, drawing.BLUE) > amount(without, drawing.BLUE) + 50
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == ["curves.png"]


def test_blanks_and_nan_are_skipped_and_not_drawn_as_zero(tmp_path):
    columns = pictures._read_columns(write(tmp_path / "metrics.csv", FULL))
    assert columns["val/refined/dice"] == ([1, 3], [0.83, 0.88])
    assert columns["train/loss"] == ([1, 2, 3], [1.5, 1.2, 1.1])
    assert "epoch" not in columns and "step" not in columns


@pytest.mark.parametrize(
    "text",
    [
        "",
        "epoch,step\n",
        "epoch,step,train/loss\n0,1,\n",
        "epoch,step,train/loss\n0,1,0.5\n",
        "step,val/coarse/dice\n1,0.5\n2,0.6\n",
        "epoch,val/refined/dice,lr\n0,nan,0.0\n1,inf,0.0\n",
        "epoch,step,train/loss,lr/coarse\n0,1,0.5,0.01\n1,2,0.",  # cut off
        "epoch,train/loss\n0,0.5,surplus,fields\n1,abc\n2,0.4\n",
    ],
)
def test_curves_take_any_csv(tmp_path, text):
    out = tmp_path / "curves.png"
    curves(write(tmp_path / "metrics.csv", text), out, baseline={"coarse": float("nan")})
    assert min(read(out).shape[:2]) > 100


def test_panels_without_data_are_left_out(tmp_path):
    def width(text: str) -> int:
        curves(write(tmp_path / "metrics.csv", text), tmp_path / "c.png")
        return read(tmp_path / "c.png").shape[1]

    assert width(FULL) == pytest.approx(3 * width("epoch,train/loss\n0,1.0\n"), abs=3)


def test_a_failed_drawing_leaves_the_old_picture(tmp_path, monkeypatch):
    metrics, out = write(tmp_path / "metrics.csv", FULL), tmp_path / "curves.png"
    curves(metrics, out)
    before = out.read_bytes()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def fail(*_args, **_more):
        raise MemoryError

    monkeypatch.setattr(FigureCanvasAgg, "print_png", fail)
    with pytest.raises(MemoryError):
        curves(metrics, out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures as they are when they are written."""
    written: list = []
    save = drawing.save
    monkeypatch.setattr(pictures, "save", lambda drawn, out: written.append(drawn) or save(drawn, out))
    return written


def test_epochs_are_counted_from_1_as_on_the_terminal(tmp_path, figures):
    text = "epoch,train/loss,val/loss,val/coarse/dice\n" + "".join(f"{e},1,2,0.{e + 1}\n" for e in range(6))
    curves(write(tmp_path / "m.csv", text), tmp_path / "c.png", best_epoch=3, freeze_epochs=2)
    loss, dice = figures[0].axes
    lines = {line.get_label(): list(line.get_xdata()) for line in loss.lines}
    assert lines == {"train/loss": [1, 2, 3, 4, 5, 6], "val/loss": [1, 2, 3, 4, 5, 6], "best epoch 4": [4, 4]}
    best = dict(zip(*dice.lines[0].get_data(), strict=True))[4]
    assert best == 0.4  # the Dice of the epoch that metrics.csv calls 3
    for axes in (loss, dice):
        assert axes.patches[0].get_label() == "frozen until epoch 2"
        assert (axes.patches[0].get_x(), axes.patches[0].get_width()) == (0.5, 2)  # between epochs 2 and 3
        assert axes.get_xlim() == (0.5, 6.5)


@pytest.mark.parametrize("more", [{}, {"best_epoch": -1}, {"best_epoch": 1}, {"freeze_epochs": 5}])
def test_no_mark_where_there_is_no_such_epoch(tmp_path, figures, more):
    curves(write(tmp_path / "m.csv", "epoch,train/loss\n0,1\n"), tmp_path / "c.png", **more)
    (axes,) = figures[0].axes
    assert len(axes.lines) == 1 and not axes.patches
    assert [tick for tick in axes.get_xticks() if 0.5 <= tick <= 1.5] == [1]


# -- the sheet of overlays


def case(height: int = 60, width: int = 80, **changes) -> Overlay:
    image = np.full((height, width), 90, np.uint8)
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    return Overlay("id", image, mask, np.roll(mask, 4, 1), mask, "Dice coarse 0.80  refined 1.00")._replace(**changes)


def test_each_mask_is_drawn_in_its_colour(tmp_path):
    out = tmp_path / "overlays.png"
    overlay_sheet([case()], out)
    picture = read(out)[40:]  # below the coloured headings
    drawn = {name: amount(picture, drawing.COLOURS[name]) for name in ("truth", "coarse", "refined")}
    assert min(drawn.values()) > 100
    overlay_sheet([case(coarse=None)], out)
    assert amount(read(out)[40:], drawing.ORANGE) == 0


def test_plain_tuples_and_float_images_look_the_same(tmp_path):
    overlay_sheet([case()], tmp_path / "a.png")
    overlay_sheet([tuple(case(image=np.full((60, 80), 90 / 255)))], tmp_path / "b.png")
    assert (read(tmp_path / "a.png") == read(tmp_path / "b.png")).all()


def first_panel(picture: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height and width of the leftmost image of a sheet with one row; `case` images have a grey of 90."""
    grey = np.abs(picture - 90).max(-1) <= 1
    rows = np.flatnonzero(grey.mean(1) > 0.3)
    left = np.flatnonzero(grey[rows].mean(0) > 0.9)[0]
    width = np.flatnonzero(~grey[rows[0], left:])[0]
    return int(rows[0]), int(left), len(rows), int(width)


def test_contour_of_a_mask_is_where_the_mask_is(tmp_path):
    mask = np.zeros((100, 100), bool)
    mask[20:40, 50:90] = True
    overlay_sheet([case(100, 100, truth=mask, coarse=None, refined=None)], tmp_path / "o.png")
    picture = read(tmp_path / "o.png")
    top, left, height, width = first_panel(picture)
    left += round(width + pictures._GAP * drawing.DPI)  # the panel of the truth
    green = np.argwhere(np.abs(picture - (0, 158, 115)).max(-1) < 25)
    green = green[green[:, 0] > top] - (top, left)  # not the heading
    found = [*(green.min(0) / (height, width)), *((green.max(0) + 1) / (height, width))]
    assert found == pytest.approx([0.20, 0.50, 0.40, 0.90], abs=0.015)


@pytest.mark.parametrize("shape", [(60, 120), (120, 60), (64, 64)])
def test_proportions_are_kept(tmp_path, shape):
    overlay_sheet([case(*shape, coarse=None, refined=None)], tmp_path / "o.png")
    _, _, height, width = first_panel(read(tmp_path / "o.png"))
    assert width / height == pytest.approx(shape[1] / shape[0], rel=0.02)


def test_columns_without_masks_are_left_out(tmp_path):
    def width(**changes) -> int:
        overlay_sheet([case(**changes)], tmp_path / "o.png")
        return read(tmp_path / "o.png").shape[1]

    assert width() > width(refined=None) > width(coarse=None, refined=None)


@pytest.fixture(scope="module")
def ordinary_shape(tmp_path_factory) -> tuple[int, ...]:
    out = tmp_path_factory.mktemp("sheet") / "o.png"
    overlay_sheet([case()], out)
    return read(out).shape


@pytest.mark.parametrize(
    "name", ["$x", "a$b$c", r"$\frac{$", "two\nlines", "tab\tand\x00nul", "{%s}", "病例 7", "é" * 300, ""]
)
def test_no_name_can_break_the_sheet(tmp_path, ordinary_shape, name):
    overlay_sheet([case(title=name, caption=name)], tmp_path / "o.png")
    assert read(tmp_path / "o.png").shape == ordinary_shape


def test_empty_full_and_border_masks(tmp_path):
    empty, full = np.zeros((60, 80), bool), np.ones((60, 80), bool)
    overlay_sheet([case(truth=empty, coarse=full, refined=empty)], tmp_path / "o.png")
    picture = read(tmp_path / "o.png")[40:]
    assert amount(picture, drawing.ORANGE) > 100
    assert amount(picture, drawing.GREEN) == 0
    overlay_sheet([], tmp_path / "none.png")
    assert read(tmp_path / "none.png").size > 0


def test_rows_of_different_shapes(tmp_path):
    overlay_sheet([case(40, 80), case(80, 40, refined=None), case(300, 20), case(1, 50)], tmp_path / "o.png")
    assert read(tmp_path / "o.png").shape[0] > 500


def test_rows_can_be_labelled(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    written: list[str] = []
    text = Figure.text
    monkeypatch.setattr(Figure, "text", lambda self, x, y, s, **more: (written.append(s), text(self, x, y, s, **more)))
    overlay_sheet([case(), case()], tmp_path / "o.png", labels=["most harmed", "best"])
    assert {"most harmed", "best"} <= set(written) and "worst" not in written
    written.clear()
    overlay_sheet([case(), case()], tmp_path / "o.png")
    assert {"worst", "best"} <= set(written)
    with pytest.raises(ValueError):
        overlay_sheet([case(), case()], tmp_path / "o.png", labels=["one label for two rows"])


# -- a single image


BOXES = st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(1, 30), st.integers(1, 40))


@given(BOXES)
@settings(deadline=None)
def test_an_outline_runs_over_the_outermost_pixels(box):
    y, x, height, width = box
    mask = np.zeros((60, 80), bool)
    mask[y : y + height, x : x + width] = True
    strength = overlay(np.zeros(mask.shape, np.uint8), None, mask)[:, :, 2] / int(drawing.BLUE[5:], 16)
    edge = mask & ~binary_erosion(mask, np.ones((3, 3)))
    assert strength[edge].min() > 0.75
    assert not strength[~binary_dilation(edge, np.ones((3, 3)), iterations=2)].any()


def test_slanted_outlines_are_smooth_and_stay_at_the_edge():
    y, x = np.mgrid[:200, :300]
    mask = (x - 150) ** 2 / 80**2 + (y - 100) ** 2 / 50**2 < 1
    drawn = overlay(np.zeros(mask.shape, np.uint8), mask, None)
    strength = drawn.max(-1) / 230
    assert ((strength > 0.1) & (strength < 0.9)).sum() > 100
    near = binary_dilation(mask, iterations=2) & ~binary_erosion(mask, iterations=3)
    assert not drawn[~near].any()


def test_an_overlay_keeps_size_and_image_and_takes_any_kind_of_it():
    image = np.random.default_rng(0).integers(0, 200, (60, 80), np.uint8)
    mask = case().truth
    drawn = overlay(image, mask, np.roll(mask, 5, 1), np.roll(mask, 9, 0))
    assert drawn.dtype == np.uint8 and drawn.shape == (60, 80, 3)
    dark = overlay(image // 9, mask, np.roll(mask, 5, 1), np.roll(mask, 9, 0)).astype(int)
    assert all(amount(dark, drawing.COLOURS[name]) > 10 for name in ("truth", "coarse", "refined"))
    untouched = (drawn == image[:, :, None]).all(-1)
    assert untouched[:10].all() and untouched.mean() > 0.8
    before = image.copy()
    rgb = np.dstack([image] * 3)
    for same in (rgb, image / 255, np.asfortranarray(rgb)):
        assert (overlay(same, mask, np.roll(mask, 5, 1), np.roll(mask, 9, 0)) == drawn).all()
    assert (image == before).all() and (rgb == before[:, :, None]).all()
    nothing = np.zeros_like(mask)
    assert (overlay(image, nothing, None, nothing) == rgb).all()


# -- which cases


def test_the_most_harmed_come_first_and_nobody_else():
    before, after = [0.9, 0.8, 0.7, 0.6, 0.5], [0.85, 0.9, 0.2, 0.6, float("nan")]
    assert pick_most_harmed(before, after, 3) == [2, 0]
    assert pick_most_harmed(before, after, 1) == [2] and pick_most_harmed([], [], 2) == []


def test_worst_median_and_best():
    values = [0.5, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2, 0.6, 0.4]
    assert [values[i] for i in pick_worst_median_best(values, 1)] == [0.1, 0.5, 0.9]
    assert [values[i] for i in pick_worst_median_best(values, 2)] == [0.1, 0.2, 0.4, 0.5, 0.8, 0.9]


@pytest.mark.parametrize("count", range(1, 30))
def test_the_middle_lies_in_the_middle_and_nothing_twice(count):
    values = np.random.default_rng(count).random(count)
    for n_each in (1, 2, 3):
        chosen = pick_worst_median_best(list(values), n_each)
        assert len(chosen) == len(set(chosen)) == min(count, 3 * n_each)
        assert list(values[chosen]) == sorted(values[chosen])
        assert min(values) in values[chosen] and max(values) in values[chosen]
        middle = values[chosen][n_each : 2 * n_each]
        if count > 3 * n_each:
            assert abs((values < middle[0]).sum() - (values > middle[-1]).sum()) <= 1


def test_values_without_rank_are_left_out():
    assert pick_worst_median_best([float("nan"), 0.2, float("inf"), 0.1], 2) == [3, 1]
    assert pick_worst_median_best([], 2) == pick_worst_median_best([float("nan")], 2) == []


@pytest.mark.parametrize(("count", "expected"), [(1, "m"), (2, "wb"), (3, "wmb"), (4, "wmmb"), (6, "wwmmbb")])
def test_labels_say_which_is_which(count, expected):
    assert "".join(label[0] for label in pictures.rank_labels(count)) == expected
