"""The page of `ultrarefiner.demo`. Importing this needs Gradio."""

import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ultrarefiner import explore
from ultrarefiner.data.scans import safe_names
from ultrarefiner.errors import UserError
from ultrarefiner.explore import Exploration, Explorer, Point

BOX, INSIDE, OUTSIDE = "a corner of the box", "a point in the lesion", "a point outside it"
SIDES = ("left", "top", "right", "bottom")
STYLE = """
.gradio-container { max-width: 80rem !important; margin: 0 auto !important; }
.measured { border-collapse: collapse; } .measured :is(th, td) { text-align: left; vertical-align: top;
  padding: .25rem .9rem .25rem 0; }
@media (max-width: 45rem) {
  .row { flex-direction: column !important; }
  .row > * { min-width: 0 !important; width: 100% !important; }
  .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
  :is(.gallery-item, .thumbnail-item) { min-width: 0 !important; width: 100% !important; }
}
.problem { border-left: .3rem solid #b34700; padding: .4rem .8rem; overflow-wrap: anywhere; }
"""
THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]  # none is fetched
).set(  # Gradio's small grey text and its white on orange have too little contrast
    body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
    button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800", button_primary_background_fill_hover_dark="*primary_800",
)  # fmt: skip
NAMES = """() => {
  const mend = () => {
    for (const element of document.querySelectorAll("button[aria-label], input[aria-label]")) {
      const seen = element.innerText.trim();
      if (seen && !element.ariaLabel.includes(seen)) element.ariaLabel = `${seen} (${element.ariaLabel})`;
    }
    for (const element of document.querySelectorAll("div[aria-label]:not([role])")) element.role = "group";
    for (const image of document.querySelectorAll("button:has(.caption-label) img")) image.alt = "";
  };
  new MutationObserver(mend).observe(document.body, {childList: true, subtree: true});
  mend();
}"""  # a screen reader's names of Gradio's own widgets are not what one reads there
INTRODUCTION = """# UltraRefiner
A coarse network finds the lesion in a breast-ultrasound image (orange), SAM redraws its boundary (blue). Everything
stays on this computer. For research: this is no medical device and must not decide on a patient."""


class Page:
    """What happens on the page, as functions from its values to its values.

    Args:
        explorer: the networks.
        model: what they are called.
        folder: for the files to download.
        examples: images to choose from.
    """

    def __init__(self, explorer: Explorer, model: str, folder: Path, examples: Sequence[Path] = ()) -> None:
        self.explorer, self.model, self.folder, self.examples = explorer, model, folder, examples

    def show(
        self,
        now: Exploration | None,
        threshold: float,
        layers: Sequence[str],
        pixel: float | None,
        corner: Point | None = None,
    ) -> tuple[Any, ...]:
        """Picture, problem, measures, mask file and report file of what was found."""
        if now is None:
            return None, "", "", None, None
        pixel = pixel if pixel and pixel > 0 else None
        mask, report = (self._file(now, end) for end in ("mask.png", "report.html"))
        mask.write_bytes(explore.mask_png(now, threshold))
        report.write_text(explore.report(now, threshold, pixel, self.model), encoding="utf-8", errors="replace")
        picture = explore.picture(now, threshold, tuple(layers), corner)
        problem = "" if corner is None else "Now click on the opposite corner of the box."
        return picture, problem, explore.measured(now, threshold, pixel), str(mask), str(report)

    def open(self, path: str | Path, frame: int = 0, *view: Any) -> tuple[Any, ...]:
        """A new image; its state, what `show` gives, the sides of the box, and the slider of frames."""
        try:
            now = self.explorer.start(Path(path), frame)
        except UserError as error:
            return (*self._problem(error), gr.skip())
        chosen = gr.update(value=now.frame + 1, maximum=max(2, now.frames), visible=now.frames > 1)
        return now, *self.show(now, *view), *self._sides(now), chosen

    def redraw(
        self, now: Exploration | None, box: Sequence[float] | None, points: tuple[Point, ...], *view: Any
    ) -> tuple[Any, ...]:
        """The same image with a box and points; as `open` gives it, without the frames."""
        if now is None:
            return self._problem(UserError("Drop an image first, or take an example."))
        try:
            given = None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
            now = self.explorer.redraw(now, given, points)
        except UserError as error:
            return self._problem(error)
        return now, *self.show(now, *view), *self._sides(now)

    def click(
        self, now: Exploration, at: Sequence[float], what: str, corner: Point | None, *view: Any
    ) -> tuple[Any, ...]:
        """A click on the picture at x, y px; the corner of a box that is begun, and as `redraw`."""
        x, y = at[0] + 0.5, at[1] + 0.5
        if what != BOX:
            return None, *self.redraw(now, now.box, (*now.points, (x, y, what == INSIDE)), *view)
        if corner is None:
            corner = (x, y, True)
            threshold, layers, pixel = view
            return corner, now, *self.show(now, threshold, layers, pixel, corner), *self._sides(now)
        return None, *self.redraw(now, (corner[0], corner[1], x, y), now.points, *view)

    def _problem(self, error: UserError) -> tuple[Any, ...]:
        text = escape(str(error)).translate({ord(sign): f"&#{ord(sign)};" for sign in "$`{"})  # gr.HTML is a template
        said = f'<p class="problem" role="alert">{text}</p>'
        return (gr.skip(), gr.skip(), said, *[gr.skip()] * 3, *[gr.skip()] * 4)

    def _sides(self, now: Exploration) -> list[Any]:
        """The sliders of the box: that which SAM was told, or the whole image."""
        height, width = now.found.mask.shape
        box = now.box or now.told.box or (0, 0, width, height)
        return [gr.update(value=round(x), maximum=m) for x, m in zip(box, (width, height) * 2, strict=True)]

    def _file(self, now: Exploration, end: str) -> Path:
        name = safe_names([now.path.name])[0]
        return Path(tempfile.mkdtemp(dir=self.folder)) / f"{name}_{end}"

    def build(self) -> gr.Blocks:
        """The page."""
        blocks = gr.Blocks(title="UltraRefiner", analytics_enabled=False)
        with blocks:
            now, corner = gr.State(), gr.State()
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                upload = gr.File(label="Drop an image: PNG, JPEG, TIFF, BMP or DICOM", height=150, scale=1)
                pictures = [(str(path), path.stem) for path in self.examples]
                gallery = gr.Gallery(
                    pictures, label="or take an example", columns=6, height=150, scale=2, visible=bool(pictures),
                    allow_preview=False, buttons=[], interactive=False, object_fit="cover",
                )  # fmt: skip
            problem = gr.HTML()
            with gr.Row():
                with gr.Column(scale=3):
                    picture = gr.Image(
                        label="Result", type="numpy", format="png", interactive=False, buttons=["fullscreen"],
                        elem_id="picture", alt_text="The image with outlines of the masks that were found",
                    )  # fmt: skip
                    frame = gr.Slider(1, 2, 1, step=1, label="Frame", visible=False)
                    layers = gr.CheckboxGroup(explore.LAYERS, value=list(explore.LAYERS[:4]), label="Show")
                with gr.Column(scale=2):
                    measures = gr.HTML()
                    threshold = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Threshold of the probability")
                    pixel = gr.Number(label="Pixel size in mm, where the file does not say it", value=None, minimum=0)
                    with gr.Group(visible=not self.explorer.refuses_box):
                        choices = [BOX] if self.explorer.refuses_points else [BOX, INSIDE, OUTSIDE]
                        what = gr.Radio(choices, value=BOX, label="A click on the image sets")
                        sides: list[gr.Slider] = []
                        for two in (SIDES[:2], SIDES[2:]):  # with three beside each other their ends are cut off
                            with gr.Row():
                                sides += [gr.Slider(0, 1000, 0, step=1, label=side, min_width=150) for side in two]
                        with gr.Row():
                            again = gr.Button("Refine again", variant="primary", min_width=100)
                            reset = gr.Button("Start over", min_width=100)
                    gr.Markdown(self.explorer.refuses_points)
                    with gr.Row():
                        mask = gr.DownloadButton("Mask (PNG)", min_width=100)
                        report = gr.DownloadButton("Report (HTML)", min_width=100)

            shown, view = [picture, problem, measures, mask, report], [threshold, layers, pixel]
            redrawn = [now, *shown, *sides]

            def opened(path: str | None, *view: Any) -> tuple[Any, ...]:
                return (gr.skip(),) * (len(redrawn) + 1) if path is None else self.open(path, 0, *view)

            def taken(event: gr.SelectData, *view: Any) -> tuple[Any, ...]:
                return self.open(self.examples[event.index], 0, *view)

            def moved(now: Exploration | None, number: float, *view: Any) -> tuple[Any, ...]:
                assert now is not None
                return self.open(now.path, int(number) - 1, *view)

            def boxed(now: Exploration | None, x1: float, y1: float, x2: float, y2: float, *view: Any) -> Any:
                return self.redraw(now, (x1, y1, x2, y2), now.points if now else (), *view)

            def clicked(event: gr.SelectData, now: Exploration, what: str, corner: Any, *view: Any) -> tuple[Any, ...]:
                return self.click(now, event.index, what, corner, *view)

            upload.upload(opened, [upload, *view], [*redrawn, frame])
            gallery.select(taken, view, [*redrawn, frame])
            frame.release(moved, [now, frame, *view], [*redrawn, frame])
            picture.select(clicked, [now, what, corner, *view], [corner, *redrawn])
            gr.on(
                [again.click, *(side.release for side in sides)], boxed, [now, *sides, *view], redrawn,
                trigger_mode="always_last",
            )  # fmt: skip
            reset.click(lambda now, *view: self.redraw(now, None, (), *view), [now, *view], redrawn)
            gr.on([threshold.change, layers.change, pixel.change], self.show, [now, *view], shown,
                  trigger_mode="always_last", show_progress="hidden")  # fmt: skip
        return blocks
