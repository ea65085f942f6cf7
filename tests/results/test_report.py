"""A report: what its tables say is what independent formulas say, and what its page shows is text."""

import csv
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from scipy import stats

from made_runs import HOSTILE, masks, patients, write_evaluation, write_run
from ultrarefiner import report as command
from ultrarefiner.errors import UserError
from ultrarefiner.files import read_csv, write_csv
from ultrarefiner.results import report
from ultrarefiner.results.found import runs_in
from ultrarefiner.results.gathered import gather


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def scores(fold: int, seed: int, which: str) -> list[float]:
    drawn = [masks(case, seed) for case in patients(fold)]
    return [dice(one[which], one["truth"]) for one in drawn]


def by_patient(values) -> np.ndarray:
    return np.asarray(values).reshape(-1, 2).mean(1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two folds of one setting, and one of another."""
    runs = tmp_path_factory.mktemp("runs")
    write_run(runs, "fold=0", "seed=1")
    write_run(runs, "fold=1", "seed=1")
    write_run(runs, "fold=0", "seed=2", "phase.coarse_lr=0.5")
    return runs


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The report of these runs."""
    out = tmp_path_factory.mktemp("report")
    report.write(runs, out, "T", 10, 3)
    return out


@pytest.fixture
def three(runs, tmp_path):
    """A copy of the runs."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


@pytest.fixture
def call(execute):
    """Run the command inside this process."""
    return partial(execute, command.main)


def test_settings_over_folds(written):
    rows = {(r["setting"], r["mask"], r["metric"]): r for r in table(written / "settings.csv")}
    names = {setting for setting, _, _ in rows}
    assert names == {f"e2e · phantom · tiny phase.coarse_lr={rate}" for rate in ("0.5", "1e-05")}
    two = rows["e2e · phantom · tiny phase.coarse_lr=1e-05", "refined", "dice"]
    means = [np.mean(scores(fold, 1, "refined")) for fold in (0, 1)]
    assert two["runs"] == "2" and two["cases"] == "24"
    np.testing.assert_allclose([float(two["mean"]), float(two["sd"])], [np.mean(means), np.std(means, ddof=1)])
    every = scores(0, 1, "refined") + scores(1, 1, "refined")
    np.testing.assert_allclose([float(two["case_mean"]), float(two["case_median"])], [np.mean(every), np.median(every)])
    assert float(two["case_low"]) < np.mean(every) < float(two["case_high"])


def test_differences_are_tested_over_patients_and_corrected(written):
    rows = table(written / "changes.csv")
    assert {row["metric"] for row in rows} == {"Dice", "HD95 (px)"} and len(rows) == 4
    both = next(row for row in rows if row["metric"] == "Dice" and row["cases"] == "24")
    change = [np.subtract(scores(fold, 1, "refined"), scores(fold, 1, "coarse")) for fold in (0, 1)]
    every = np.concatenate(change)
    np.testing.assert_allclose(float(both["mean"]), every.mean())
    np.testing.assert_allclose(float(both["p"]), stats.wilcoxon(by_patient(every)).pvalue)
    np.testing.assert_allclose(float(both["better"]), (every > 0.01).mean())
    p = sorted(float(row["p"]) for row in rows)
    expected = np.minimum(np.maximum.accumulate([value * (4 - i) for i, value in enumerate(p)]), 1)  # Holm 1979
    np.testing.assert_allclose(sorted(float(row["p_holm"]) for row in rows), expected)


def test_one_setting_against_another_on_the_cases_they_share(written):
    (row,) = table(written / "comparisons.csv")
    assert (
        "1e-05 (refined)" in row["setting"]
        and "0.5 (refined)" in row["minus"]
        and row["cases"] == "12"
        and row["left_out"] == "12"
    )
    change = np.subtract(scores(0, 1, "refined"), scores(0, 2, "refined"))
    np.testing.assert_allclose(float(row["mean"]), change.mean())
    np.testing.assert_allclose(float(row["p"]), stats.wilcoxon(by_patient(change)).pvalue)


def test_simulated_masks_compare_with_nothing(tmp_path):
    write_run(tmp_path, "phase=sam", "seed=1")
    write_run(tmp_path, "phase=e2e", "seed=1")
    tables = {one.name: one for one in report.tables_of(gather(tmp_path)[1])}
    assert "comparisons" not in tables and len(tables["changes"].rows) == 4


def test_an_evaluation_adds_to_its_run(three, tmp_path):
    run = next(path for path in three.glob("*fold0-seed1*"))
    content = write_evaluation(run / "evaluation" / "own", patients(0), 1)
    write_evaluation(run / "evaluation" / "other", patients(7, 6, "busi"), 1, split="all")
    groups = {(g.setting.rpartition(" ")[2], g.data): g for g in gather(three)[1]}
    assert {data for _, data in groups} == {"phantom", "busi (all, fold 0)"} and len(groups) == 3
    own = next(g for g in groups.values() if len(g.results) == 2)
    assert own.masks == ["coarse", "refined", "accepted"] and "device" in own.columns and len(own.rows) == 24
    tables = {one.name: one for one in report.tables_of(list(groups.values()))}
    found = [row for row in tables["breakdown"].rows if row["by"] == "device" and row["mask"] == "coarse"]
    assert {row["group"] for row in found} == {"A", "B"}
    expected = [scores(0, 1, "coarse")[i::2] for i in (0, 1)]
    mine = [row for row in found if row["cases"] == 6]
    np.testing.assert_allclose([row["mean"] for row in mine], [np.mean(some) for some in expected])
    lesions = next(r for r in tables["lesions"].rows if r["mask"] == "coarse" and r["tested on"] == "phantom")
    assert lesions["images"] == 12 and 0 < lesions["ECE"] < 0.2
    assert content["masks"]["coarse"]["calibration"]["ece"] == pytest.approx(lesions["ECE"])


def test_masks_of_another_tool_stand_beside_the_runs(three, tmp_path):
    write_evaluation(three / "tool", patients(0), 3, predictions="/else/nnunet")
    groups = gather(three)[1]
    assert "masks of nnunet" in {g.setting for g in groups}
    pairs = [row for row in report.between(groups).rows if "nnunet" in row["setting"] + row["minus"]]
    assert len(pairs) == 2 and {row["cases"] for row in pairs} == {12}
    change = np.subtract(scores(0, 3, "refined"), scores(0, 2, "refined"))
    assert any(abs(abs(row["mean"]) - abs(change.mean())) < 1e-12 for row in pairs)


def test_a_pair_without_its_run_is_named_by_its_folder_or_its_file(tmp_path):
    for place, name in (("/else/pair/sam.safetensors", "pair"), ("/else/copied.ckpt", "copied.ckpt")):
        write_evaluation(tmp_path / name, patients(0), 3, checkpoint=place)
    assert {group.setting for group in gather(tmp_path)[1]} == {"pair", "copied.ckpt"}
    report.write(tmp_path, tmp_path / "out", "T", 10, 3)
    assert "2 results below" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def named(folder: Path) -> list[tuple[str, str, int]]:
    """The setting, the data and the number of results of each group."""
    return sorted((g.setting.partition("tiny ")[2] or g.setting, g.data, len(g.results)) for g in gather(folder)[1])


def test_images_without_a_lesion_are_counted_apart_in_older_folders_too(tmp_path):
    write_evaluation(tmp_path / "tool", patients(0), 3, predictions="/else/nnunet")
    first, *rest = read_csv(tmp_path / "tool" / "cases.csv")
    write_csv(tmp_path / "tool" / "cases.csv", [first | {"lesion_px": 0, "coarse_dice": 0, "coarse_px": 9}, *rest])
    tables = {one.name: one.rows for one in report.tables_of(gather(tmp_path)[1])}
    (dice,) = (r for r in tables["settings"] if (r["mask"], r["metric"]) == ("coarse", "dice"))
    assert dice["cases"] == 11 and dice["case_mean"] == pytest.approx(np.mean(scores(0, 3, "coarse")[1:]))
    assert {row["cases"] for row in tables["changes"]} == {11}
    assert all(row["images"] == 12 for row in tables["lesions"])


def test_tools_of_one_name_are_no_runs_of_one_setting(tmp_path):
    for tool, seed in (("A", 1), ("B", 2)):
        write_evaluation(tmp_path / "runs" / tool, patients(0), seed, predictions=f"/else/{tool}/pred")
    assert named(tmp_path / "runs") == [(f"masks of {tool}/pred", "phantom", 1) for tool in "AB"]
    (row,) = report.between(gather(tmp_path / "runs")[1]).rows
    change = np.subtract(scores(0, 2, "refined"), scores(0, 1, "refined"))
    assert row["mean"] == pytest.approx(change.mean())


def test_trainings_that_lie_elsewhere_are_no_runs_of_one_setting(tmp_path):
    for seed in (1, 2):
        file = f"/else/fold0-seed{seed}/checkpoints/best.ckpt"
        write_evaluation(tmp_path / str(seed), patients(0), seed, checkpoint=file)
    write_evaluation(tmp_path / "3", patients(0), 1, checkpoint=file, predictions="/else/pred")
    write_evaluation(tmp_path / "4", patients(1), 1, checkpoint=file, fold=1)
    names = ("fold0-seed1", "fold0-seed2", "fold0-seed2 (4)", "fold0-seed2, masks of pred")
    assert named(tmp_path) == [(name, "phantom", 1) for name in names]


def test_one_pair_in_several_ways_is_several_settings(three):
    """Drawn otherwise than the training does, it adds nothing to the run's own results."""
    run = next(path for path in three.glob("*fold0-seed1*"))
    ways = {"a": {}, "flips": {"tta": "flips"}, "each": {"lesions": "each"}, "none": {"safety": {"min_dice": None}}}
    for seed, (name, way) in enumerate(ways.items(), 1):
        settings = {"tta": None, "lesions": "together", "safety": {"min_dice": 0.5}} | way
        write_evaluation(run / "evaluation" / name, patients(0), seed, settings=settings)
    settings["safety"] = {"min_dice": 0.5}
    write_evaluation(run / "evaluation" / "z", patients(0), 9, settings=settings)
    own = "phase.coarse_lr=1e-05"
    ways = ("tta=flips", "lesions=each", "safety.min_dice=None", "safety.min_dice=0.5")
    several = [(f"{own} {way}", "phantom", 1) for way in ways]
    assert named(three) == sorted([(own, "phantom", 2), ("phase.coarse_lr=0.5", "phantom", 1), *several])


def test_other_data_of_the_same_name_are_told_apart(three):
    """Other cases, other lesions under the same names, and another fingerprint; the run's own rows stay."""
    run = next(path for path in three.glob("*fold0-seed1*"))
    before = next(r.rows for g in gather(three)[1] for r in g.results if r.run.directory == run)
    other = [*patients(0)[:11], *patients(7, 1)]
    write_evaluation(run / "evaluation" / "ids", other, 1, data_root="/else/ids")
    write_evaluation(run / "evaluation" / "lesions", patients(0), 1, data_root="/else/lesions")
    rows = read_csv(run / "evaluation" / "lesions" / "cases.csv")
    write_csv(run / "evaluation" / "lesions" / "cases.csv", [row | {"lesion_px": 7} for row in rows])
    about = {"trained_on": "one", "settings": {"data": "other"}, "data_root": "/else/images"}
    write_evaluation(run / "evaluation" / "images", patients(0), 1, **about)
    data = {data for _, data, _ in named(three)}
    assert data == {"phantom", *(f"phantom (test, fold 0, {name})" for name in ("ids", "lesions", "images"))}
    after = next(r.rows for g in gather(three)[1] for r in g.results if r.run.directory == run and r.own)
    assert after == before


def test_a_case_of_several_runs_is_one_case_of_the_lesions_too(tmp_path):
    for fold, seed in ((0, 1), (0, 2), (0, 3), (1, 1)):
        run = write_run(tmp_path, f"fold={fold}", f"seed={seed}")
        write_evaluation(run / "evaluation", patients(fold), seed, fold=fold)
    (row,) = (row for row in report.found_lesions(gather(tmp_path)[1]).rows if row["mask"] == "coarse")
    assert (row["images"], row["lesions"]) == (24, 24)
    dice = np.mean([scores(0, seed, "coarse") for seed in (1, 2, 3)], axis=0)
    assert row["dice"] == pytest.approx(np.mean([*dice, *scores(1, 1, "coarse")]), abs=1e-4)


def test_the_list_tells_how_far_and_how_good(tmp_path, call):
    write_run(tmp_path, "fold=0", name="done")
    stopped = write_run(tmp_path, "fold=1", name="stopped", finished=False)
    epochs = read_csv(stopped / "metrics.csv")
    write_csv(stopped / "metrics.csv", [row | {"val/coarse/dice": 0.9} for row in epochs])
    running = write_run(tmp_path, "fold=2", name="running", finished=False)
    broken = write_run(tmp_path, "fold=3", name="broken")
    (broken / "summary.json").write_text('{"a":')
    (write_run(tmp_path, "fold=4", name="mangled") / "config.yaml").write_text("a: [")
    with FileLock(running / ".lock"):
        found = {run.directory.name: run for run in runs_in(tmp_path)}
        status, out, _ = call("list", f"runs={tmp_path}")
    kinds = {name: run.status.partition(":")[0] for name, run in found.items()}
    assert kinds == {"done": "finished", "stopped": "interrupted", "running": "running"} | dict.fromkeys(
        ("broken", "mangled"), "damaged"
    )
    assert (found["done"].epochs, found["done"].best) == (3, 0.72) and found["done"].score("refined") > 0.5
    assert found["stopped"].best == 0.72  # of the refined mask, though the coarse one was better
    assert status == 0 and "1 finished" in out and "2 damaged" in out and "1 running" in out
    assert not (tmp_path / "report").exists()
    lines = [line for line in out.splitlines() if "protection_roi_off" in line or line.startswith("done")]
    assert len(lines) == 1 and "finished" in lines[0] and "3/" in lines[0]  # in a pipe a line for each run


def test_images_without_a_patient_are_no_patients(tmp_path, call):
    some = patients(0)
    write_run(tmp_path, "seed=1", cases=[replace(case, patient=None) for case in some])
    write_run(tmp_path, "seed=2", cases=[replace(case, patient=None) if case is some[0] else case for case in some])
    write_run(tmp_path, "seed=3", cases=some)
    for seed, words in ((1, "patients not named"), (2, "6 patients, 1 cases without"), (3, "6 patients")):
        run = next(tmp_path.glob(f"*seed{seed}*"))
        assert call(f"runs={run}", f"output={tmp_path / str(seed)}").status == 0
        html = (tmp_path / str(seed) / "index.html").read_text()
        assert f"on 12 images ({words})" in html and f"<dd>12 ({words})</dd>" in html
        assert f"test 12 images ({words})" in html  # the checklist


def test_two_lines_of_a_chart_never_look_alike(tmp_path, call):
    for seed in range(5):
        write_run(tmp_path / "runs", f"seed={seed}", f"phase.coarse_lr=1e-{seed + 2}")
    assert call(f"runs={tmp_path / 'runs'}", f"output={tmp_path / 'out'}").status == 0
    html = (tmp_path / "out" / "index.html").read_text()
    chart = next(part for part in html.split("<figure") if "Validation Dice while training" in part)
    for kind in ("line", "key"):
        looks = re.findall(rf'class="({kind} [^"]*)"', chart)
        assert len(looks) == 10 == len(set(looks))


def test_settings_are_named_by_options_first(tmp_path):
    write_run(tmp_path, "roi=on", name="a")
    write_run(tmp_path, "roi=off", "protection=roi_on", name="b")
    write_run(tmp_path, "roi=off", "protection=roi_on", "phase.epochs=7", name="c")
    named = {run.directory.name: run.setting for run in runs_in(tmp_path)}
    assert named["a"] == "e2e · phantom · tiny roi=on"
    assert named["b"].startswith("e2e · phantom · tiny roi=off phase.epochs=") and "expand" not in named["b"]
    assert named["c"] == "e2e · phantom · tiny roi=off phase.epochs=7"


class Elements(HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_hostile_names_stay_text_and_nothing_is_fetched(tmp_path):
    cases = patients(0, ids=HOSTILE)
    run = write_run(tmp_path / "runs", "seed=1", name="<script>alert(2)<!--", cases=cases)
    write_evaluation(run / "evaluation", cases, 1)
    write_run(tmp_path / "runs", "seed=1", "fold=1", "dataset.name='<script>alert(3)<!--'", name="&lt;b")
    report.write(tmp_path / "runs", tmp_path / "out", "<script>alert(4)</script>", 10, 3)
    html = (tmp_path / "out" / "index.html").read_text()
    page = Elements(html)
    assert [a.get("type", "") for tag, a in page.found if tag == "script"] == ["application/json", ""]
    assert not [a for _, a in page.found if any(name.startswith("on") for name in a)]
    assert {tag for tag, _ in page.found} & {"iframe", "link", "object", "embed", "base", "b"} == set()
    for _, attributes in page.found:
        for name in ("src", "href"):
            assert re.match(r"(data:image/|#|$)", attributes.get(name) or ""), attributes
    assert "@import" not in html and "url(" not in html
    for name in HOSTILE:
        assert name in page.text
    assert "49" not in [cell["id"] for cell in table(tmp_path / "out" / "cases.csv")]
    assert r"\textless{}script" in (tmp_path / "out" / "settings.tex").read_text()
    assert set(re.findall(r".<script", (tmp_path / "out" / "settings.md").read_text())) == {"\\<script"}


def test_the_page_is_filled_from_the_runs(written):
    text = Elements((written / "index.html").read_text()).text
    assert "Fold 0".lower() in text.lower() and "torch 2" in text and "commit" in text
    assert "12 images (6 patients)" in text and "for the authors" in text
    assert "phase.coarse_lr" in text  # among the settings that differ
    assert "Not a fair test" not in text


def test_pictures_are_limited_and_shared(tmp_path):
    run = write_run(tmp_path / "runs", "seed=1", name="run")
    write_evaluation(run / "evaluation", patients(0), 1)
    for most in (0, 5, 100):
        report.write(tmp_path / "runs", tmp_path / "out", "T", most, 3)
        html = (tmp_path / "out" / "index.html").read_text()
        assert html.count("data:image/jpeg") == min(most, 12) and html.count("<symbol") == 12


def test_mistakes_are_one_sentence(tmp_path, call):
    for arguments, said in (
        ([f"runs={tmp_path / 'no'}"], "is no folder"),
        ([f"runs={tmp_path}"], "no finished run"),
        (["gallery=0"], "gallery must be 1 or more"),
        (["galery=1"], "did you mean gallery"),
    ):
        status, _, err = call(*arguments)
        assert status == 1 and said in err and len(err.strip().splitlines()) == 1
    with pytest.raises(UserError):
        gather(tmp_path)


def test_help_imports_no_torch():
    code = "import sys; from ultrarefiner import report; report.main(); sys.exit('torch' in sys.modules)"
    for arguments in (["--help"], ["--cfg", "job"], ["list", "runs=."]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
