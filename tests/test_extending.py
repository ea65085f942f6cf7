"""A thing of a user's own is one class and one YAML file in folders of her own: the examples of CONTRIBUTING.md."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from conftest import MICRO, compose
from data_layouts import disc, save, texture
from ultrarefiner.data.readers import FileReader
from ultrarefiner.runs.plan import Run, plan
from ultrarefiner.runs.start import prepare
from ultrarefiner.segmenter import Segmenter

HOME = Path(__file__).resolve().parents[1]
PHANTOMS = [setting for setting in MICRO if setting.startswith("dataset.")]
SHORT = [
    *(setting for setting in MICRO if setting not in PHANTOMS and "schedule" not in setting),
    *(f"model.schedule.{phase}.epochs=1" for phase in ("coarse", "sam", "e2e")),
]
KINDS = {
    "phase": (["phase=focal"], "phase.gamma=1.0"),
    "model/coarse": (["phase=coarse", "model/coarse=dilated"], "model.coarse.width=8"),
    "model/sam": (["phase=sam", "model/sam=disc_sam"], "model.sam.width=8"),
    "prompt_style": (["phase=sam", "prompt_style=sharp"], "prompt_style.mask.gain=10"),
    "dataset": (["phase=coarse", "dataset=pictures"], "dataset.folds=4"),
    "roi": (["phase=sam", "roi=fixed", "protection=none"], "roi.side=0.4"),
    "gate": (["phase=sam", "gate=fixed"], "gate.share=0.2"),
    "protection": (["phase=e2e", "protection=gentle"], "protection.grad_scale=0.2"),
}
"""How each is chosen, and a key of its own."""
TOGETHER = [override for choice, _ in KINDS.values() for override in choice if not override.startswith("phase=")]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The examples as they are printed, in a folder where Python finds them; and images for the data set."""
    folder = tmp_path_factory.mktemp("own")
    printed = (HOME / "CONTRIBUTING.md").read_text("utf-8")
    for title, text in re.findall(r'```\w+ title="(.+?)"\n(.*?)```', printed, re.DOTALL):
        (folder / title).parent.mkdir(parents=True, exist_ok=True)
        (folder / title).write_text(text, "utf-8")
    for number in range(20):
        save(folder / "data" / "pictures" / f"p{number:03d}.png", texture(number, 64, 64))
        save(folder / "data" / "lesions" / f"p{number:03d}.png", disc(number, 64, 64))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for module in folder.glob("*.py"):
        sys.modules.pop(module.stem, None)
    FileReader.known.pop("pictures", None)


def overrides(own: Path, choice: tuple[str, ...]) -> list[str]:
    return [*SHORT, *([f"data_root={own / 'data'}"] if "dataset=pictures" in choice else PHANTOMS), *choice]


def configured(own: Path, *choice: str) -> Run:
    """The run that a command line with the options of `own` means."""
    return plan(compose(f"hydra.searchpath=[file://{own / 'options'}]", *overrides(own, choice), micro=False))[-1]


@pytest.fixture
def train(own, command):
    """Train with the options of `own`; gives the run's directory."""

    def run(root: Path, *choice: str) -> Path:
        done = command("--config-dir", str(own / "options"), f"output_root={root}", *overrides(own, choice))
        assert done.status == 0, done.err
        return max(root.rglob("summary.json"), key=lambda path: path.stat().st_mtime_ns).parent

    return run


def test_each_example_is_one_class_and_one_file_of_options(own):
    titles = re.findall(r'```\w+ title="(.+?)"', (HOME / "CONTRIBUTING.md").read_text("utf-8"))
    classes = [(own / title).read_text("utf-8") for title in titles if title.endswith(".py")]
    options = [Path(title).parent.relative_to("options").as_posix() for title in titles if title.endswith(".yaml")]
    assert sorted(options) == sorted([*KINDS, "logger"]) and len(classes) == len(options) - 1  # protection: no class
    assert all(len(re.findall(r"^class ", text, re.MULTILINE)) == 1 for text in classes)


@pytest.mark.parametrize("kind", KINDS)
def test_each_fits_by_itself_and_its_keys_define_the_result(kind, own):
    choice, key = KINDS[kind]
    runs = [configured(own, *choice, *more) for more in ([], [], [key])]
    assert runs[0].directory == runs[1].directory != runs[2].directory
    built = prepare(runs[2]).phase
    arrived = {
        "phase": lambda: built.loss.focal.gamma == 1,
        "model/coarse": lambda: built.cascade.coarse[0].out_channels == 8,
        "model/sam": lambda: built.cascade.refiner.sam.iou_head.in_features == 8,
        "prompt_style": lambda: built.cascade.refiner.prompts.mask.gain == 10,
        "dataset": lambda: runs[2].data.folds == 4,
        "roi": lambda: built.cascade.refiner.roi.side == 0.4,
        "gate": lambda: built.cascade.gate.share == 0.2,
        "protection": lambda: built.cascade.grad_scale == 0.2,
    }
    assert arrived[kind]()


def test_the_prompt_style_in_the_readme_works_as_it_is_printed(own):
    section = (HOME / "README.md").read_text("utf-8").split("### Adding a prompt style")[1].split("\n## ")[0]
    module, option = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("python", "yaml"))
    (own / "mine.py").write_text(module, "utf-8")
    (own / "options" / "prompt_style" / "printed.yaml").write_text(option, "utf-8")
    prompts = prepare(configured(own, "phase=sam", "prompt_style=printed")).phase.cascade.refiner.prompts
    assert prompts(torch.full((1, 1, 8, 8), 0.75), 16).masks.unique().tolist() == [10.0]


def test_all_train_together_and_the_result_can_be_used(own, train, tmp_path):
    directory = train(tmp_path, "phase=e2e", *TOGETHER, "logger=[csv,lines]")
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["epochs"] == 1 and math.isfinite(summary["test"]["refined"]["dice"]) and summary["baseline"]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert any("val/refined/dice" in line for line in lines)

    segment = Segmenter.load(directory, "cpu")
    assert (segment.cascade.refiner.prompts.mask.gain, segment.cascade.gate.share) == (20.0, 0.5)
    assert segment(texture(3, 64, 64)).mask.shape == (64, 64)

    # What was written of the coarse network for use elsewhere starts another run.
    file = f"phase.coarse_checkpoint={directory}/checkpoints/best_coarse.pth"
    begun = prepare(configured(own, "phase=e2e", *TOGETHER, file)).phase.cascade.coarse.state_dict()
    trained = segment.cascade.coarse.state_dict()
    assert begun.keys() == trained.keys() and all(torch.equal(begun[name], trained[name]) for name in trained)


def test_a_phase_of_its_own_may_start_from_phase_1(own, train, tmp_path):
    later = own / "options" / "phase" / "later.yaml"
    later.write_text(
        "defaults: [focal, /phase@coarse: coarse, _self_]\nname: later\nlr: 0.0\ncoarse_checkpoint: null\n"
    )
    directory = train(tmp_path, "phase=later", "model/coarse=dilated")
    first = next(tmp_path.glob("phantom/tiny/coarse/*/checkpoints/best_coarse.pth"))
    after, before = (torch.load(p, weights_only=True) for p in (directory / "checkpoints" / "best_coarse.pth", first))
    assert before and all(torch.equal(after[name], value) for name, value in before.items())


def test_a_phase_of_its_own_may_do_what_phase_2_does_and_more(own):
    (own / "more.py").write_text(
        "from ultrarefiner.phases.sam import SamPhase\n\n\n"
        "class More(SamPhase):\n"
        "    def __init__(self, cascade, *, own, **known):\n"
        "        super().__init__(cascade, **known)\n"
        "        self.own = own\n"
    )
    option = "defaults: [schema, sam, _self_]\nname: more\n_target_: more.More\nown: 3\n"
    (own / "options" / "phase" / "more.yaml").write_text(option)
    run = configured(own, "phase=more", "phase.own=4", "phase.bce_weight=2")
    built = prepare(run).phase
    assert (built.own, built.bce_weight) == (4, 2) and run.data.simulator is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("phase.epochs=0", "phase.epochs must be between 1 and 1000000, got 0"),
        ("phase.patience=long", "phase.patience=long"),
        ("phase.gama=1", "'gama'"),
    ],
)
def test_a_mistake_in_a_phase_of_its_own_is_one_sentence(given, words, own, command, tmp_path):
    done = command("--config-dir", str(own / "options"), f"output_root={tmp_path}", *MICRO, "phase=focal", given)
    assert done.status == 1 and words in done.err and len(done.err.strip().splitlines()) == 1, done.err
    assert not list(tmp_path.rglob("*.ckpt"))
