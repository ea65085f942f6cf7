"""Evaluation of any function from a batch to masks, and what the room of results may know."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import ultrarefiner.results
from ultrarefiner.results import metrics
from ultrarefiner.results.evaluation import evaluate


def test_rows_are_in_order_and_know_the_size_of_the_lesion():
    truth = np.zeros((40, 60), bool)
    truth[10:20, 10:30] = True
    logits = torch.where(torch.from_numpy(np.roll(truth, 2, 1)), 5.0, -5.0)[None, None]
    batches = [
        {"index": torch.tensor([index]), "native_mask": [mask]}
        for index, mask in ((1, truth), (0, np.zeros_like(truth)))
    ]
    rows = evaluate(lambda batch: {"coarse": logits}, batches)
    assert [(row["index"], row["lesion_px"]) for row in rows] == [(0, 0), (1, 200)]
    assert rows[1]["coarse_dice"] == pytest.approx(0.9)
    assert {f"coarse_{name}" for name in (*metrics.METRICS, "px")} == rows[0].keys() - {"index", "lesion_px"}


def test_normal_images_are_scored_apart():
    """Empty masks everywhere find no lesion: a Dice of 0, not of a third because a third of the images is normal."""
    truth = np.zeros((40, 60), bool)
    truth[10:20, 10:30] = True
    batches = [
        {"index": torch.tensor([i]), "native_mask": [truth if i < 2 else np.zeros_like(truth)]} for i in range(3)
    ]
    nothing, all_of_it = torch.full((1, 1, 40, 60), -5.0), torch.full((1, 1, 40, 60), 5.0)
    rows = evaluate(lambda batch: {"coarse": nothing, "refined": all_of_it}, batches)
    assert metrics.mean_scores(rows, "coarse")["dice"] == 0
    assert metrics.mean_scores(rows, "refined")["dice"] == pytest.approx(2 * 200 / (200 + 2400))
    assert np.isnan(rows[2]["coarse_dice"]) and (rows[2]["coarse_px"], rows[2]["refined_px"]) == (0, 2400)
    assert metrics.summarise(rows, "coarse")["normal"]["clean"] == 1
    assert metrics.summarise(rows, "refined")["normal"]["false_positive"] == 1


def test_results_know_neither_phases_nor_runs():
    for path in Path(ultrarefiner.results.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.startswith(("ultrarefiner.phases", "ultrarefiner.runs"))], path
