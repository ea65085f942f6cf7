"""Finished runs and evaluations written to disk without a training, for the tests of reports."""

import json
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from conftest import compose
from ultrarefiner.data.cases import Case, people
from ultrarefiner.files import write_csv
from ultrarefiner.results import metrics
from ultrarefiner.results.assessment import Assessment, Drawn

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</script><b>", "a'&amp;{{ 7*7 }}", "=cmd()")


def disc(x: float, y: float, radius: float, height: int = 48, width: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def patients(fold: int, count: int = 12, dataset: str = "phantom", ids: tuple[str, ...] = ()) -> list[Case]:
    """Cases of a fold's test part, two of each patient."""
    names = [*ids, *(f"case {fold}-{i}" for i in range(len(ids), count))]
    return [
        Case(name, dataset, f"p{fold}-{i // 2}", ("benign", "malignant")[i % 3 == 0], about=(("device", "AB"[i % 2]),))
        for i, name in enumerate(names)
    ]


def masks(case: Case, seed: int) -> dict[str, np.ndarray]:
    """Truth, coarse and refined mask of a case; another seed, other predictions."""
    rng = np.random.default_rng([abs(hash_of(case.id)), 0])
    x, y, radius = 20 + 24 * rng.random(), 16 + 16 * rng.random(), 5 + 8 * rng.random()
    other = np.random.default_rng([abs(hash_of(case.id)), seed, 1])
    (dx, dy), (ex, ey) = other.normal(0, 2, (2, 2))
    return {
        "truth": disc(x, y, radius),
        "coarse": disc(x + dx, y + dy, radius),
        "refined": disc(x + ex, y + ey, radius),
    }


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[-6:], "big")


def write_run(
    root: Path, *overrides: str, name: str = "", cases: list[Case] | None = None, finished: bool = True
) -> Path:
    """A run's directory; its masks follow from the seed in its configuration."""
    cfg = compose(f"output_root={root}", *overrides)
    directory = root / (name or f"{cfg.phase.name}-fold{cfg.fold}-seed{cfg.seed}-{len(list(root.glob('*')))}")
    (directory / "checkpoints").mkdir(parents=True)
    (directory / ".lock").touch()
    OmegaConf.save(cfg, directory / "config.yaml", resolve=True)
    epochs = [
        {"epoch": e, "step": e, "train/loss": 1 / (e + 1), "val/coarse/dice": 0.7 + 0.01 * e, "val/refined/dice": 0.72}
        for e in range(3)
    ]
    write_csv(directory / "metrics.csv", epochs)
    if not finished:
        return directory
    rows = []
    for case in patients(cfg.fold) if cases is None else cases:
        drawn = masks(case, cfg.seed)
        row = {"id": case.id, "patient": case.patient, "dataset": case.dataset, "label": case.label}
        row["lesion_px"] = int(drawn["truth"].sum())
        for which in ("coarse", "refined"):
            scores = metrics.overlap(drawn[which], drawn["truth"]) | metrics.surface(drawn[which], drawn["truth"])
            row |= {f"{which}_{metric}": value for metric, value in scores.items()}
        rows.append(row)
    write_csv(directory / "cases.csv", rows)
    part = {"cases": len(rows), "classes": {"benign": 8, "malignant": 4}} | people(
        [(row["dataset"], row["patient"]) for row in rows]
    )
    summary = {
        "title": "made",
        "baseline": None,
        "test": {which: metrics.mean_scores(rows, which) for which in ("coarse", "refined")},
        "best_epoch": 2,
        "epochs": 3,
        "seen": None,
        "data": {"dataset": cfg.dataset.name, "fold": cfg.fold, "folds": 5, "train": part, "val": part, "test": part}
        | {"without_lesion": {"cases": 1, "used": False}, "left_out": []},
        "environment": {"python": "3", "platform": "here", "commit": "abc", "packages": {"torch": "2"}},
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def write_evaluation(folder: Path, cases: list[Case], seed: int, **about) -> dict:
    """An evaluation of the same masks."""
    made = Assessment(folder, {"seed": seed})
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (48, 64), dtype=np.uint8)
    for case in cases:
        drawn = masks(case, seed)
        truth = drawn.pop("truth")
        prob = np.where(drawn["coarse"], 0.9, 0.1)
        made.add(case, image, truth, Drawn({**drawn, "accepted": drawn["refined"]}, {"coarse": prob}, {"rejected": ""}))
    given = {"title": "made", "checkpoint": None, "predictions": None, "dataset": cases[0].dataset, "fold": 0}
    return made.finish(cases, given | {"split": "test", "seen": None} | about, lambda case: image)
