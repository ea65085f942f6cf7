"""The Checklist for Artificial Intelligence in Medical Imaging (CLAIM, 2024 update: Tejani et al., Radiology: AI 2024).

What runs know is filled in; the rest is for the authors. The items are in our own words.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ultrarefiner.files import read_csv
from ultrarefiner.results import statistics
from ultrarefiner.results.found import Found
from ultrarefiner.results.gathered import Group


def filled(runs: Sequence[Found], groups: Sequence[Group]) -> list[dict[str, str]]:
    """The items: "item", "section", "asks", and as "answer" what is known, or a blank."""
    known = _of_groups(groups) | (_of_runs(runs) if runs else {})
    items = read_csv(Path(__file__).with_name("claim.csv"))
    return [item | {"answer": known.get(item["answer"], "")} for item in items]


def _of_groups(groups: Sequence[Group]) -> dict[str, str]:
    own = {result.data for group in groups for result in group.results if "(" not in result.data}
    other = {group.data for group in groups} - own
    by = {column for group in groups for column in statistics.breakdowns(group.rows, group.columns)}
    measured = "Dice, IoU, HD95 and ASSD of each image at its native size"
    if any("coarse_nsd_2px" in group.rows[0] for group in groups):
        measured += "; NSD, precision, recall, boundary IoU; lesions found, false positives per image; ECE, Brier score"
    return {
        "technique": "Deep learning: a segmentation network, and a Segment Anything model that redraws its masks",
        "goal": "Segmentation of lesions in breast ultrasound",
        "missing": "An image without its mask ends the run; nothing is imputed",
        "metrics": f"{measured}. Empty masks as Metrics Reloaded advises",
        "statistics": "95 % intervals by a bootstrap that draws whole patients; Wilcoxon's signed-rank test over "
        "patients; Holm's correction for several comparisons",
        "robustness": f"Broken down by {_and(by)}" if by else "",
        "internal": f"Test cases of {_and(own)}" if own else "",
        "external": _and(other),
        "performance": "Tables of settings and changes",
        "failures": "Galleries of the worst and the most damaged cases",
        "ensemble": "None",
    }


def _of_runs(runs: Sequence[Found]) -> dict[str, str]:
    configs, data = [run.config for run in runs], [run.summary["data"] for run in runs]
    left_out = {len(one["left_out"]) for one in data}
    versions = {f"{name} {v}" for run in runs for name, v in run.summary["environment"]["packages"].items()}
    limited = [
        part for part in ("train", "val", "test") if any(c["dataset"]["limit"][part] is not None for c in configs)
    ]
    return {
        "sources": _and(one["dataset"] for one in data),
        "exclusion": f"Images without a lesion {'kept' if data[0]['without_lesion']['used'] else 'left out'}; "
        f"{_and(left_out)} files left out, each with its reason in summary.json",
        "preprocessing": _each(
            f"Grey values in [0, 1]; {c['model']['coarse_size']} px for the coarse network, "
            f"{c['model']['image_size']} px for the frame that SAM's crops come from"
            for c in configs
        ),
        "subsets": f"At most so many cases: dataset.limit of {_and(limited)}" if limited else "All cases were used",
        "partitions": _each(
            f"{one['dataset']}: {one['folds']} folds, the publisher's where there are any, else drawn with "
            f"dataset.split_seed={c['dataset']['split_seed']}; each run has the list in folds.csv"
            for one, c in zip(data, configs, strict=True)
        ),
        "disjoint": "Patients, and images that are near-duplicates; checked before each training",
        "size": _each(f"Fold {one['fold']}: {_count(one['test'])}" for one in data),
        "model": _each(
            f"{c['model']['name']}: {_class(c['model']['coarse'])}, "
            f"then {c['model']['sam'].get('family', c['model']['sam']['_target_'])}; ROI {c['roi']['name']}, "
            f"prompts {c['prompt_style']['name']}, gate {c['gate']['name']}"
            for c in configs
        ),
        "software": _and(versions),
        "initial": _each(
            f"Coarse network: {c['model']['coarse_weights'] or 'as its class says'}; SAM: "
            f"{c['model']['sam'].get('checkpoint') or 'published weights of its family'}"
            for c in configs
        ),
        "training": _each(
            f"{c['phase']['name']}: {c['phase']['epochs']} epochs, batches of {c['phase']['batch_size']}, "
            f"{_class(c['phase']['optimizer'])}, seed {c['seed']}; augmentation "
            f"{'on' if c['dataset']['augment'] else 'off'}. All settings: config.yaml"
            for c in configs
        ),
        "chosen": "The epoch with the highest Dice on the validation cases",
        "numbers": _each(
            f"Fold {one['fold']}: " + "; ".join(f"{part} {_count(one[part])}" for part in ("train", "val", "test"))
            for one in data
        ),
        "characteristics": _each(
            f"Fold {one['fold']}: "
            + "; ".join(
                f"{part} {_and(f'{n} {k}' for k, n in one[part]['classes'].items())}"
                for part in ("train", "val", "test")
            )
            for one in data
        ),
        "availability": _each(f"Software: commit {run.summary['environment'].get('commit')}" for run in runs),
    }


def _class(node: dict[str, Any] | None) -> str:
    return node["_target_"].rpartition(".")[2] if node else "masks in files"


def _count(part: dict[str, Any]) -> str:
    return f"{part['cases']} images of {part['patients']} patients"


def _each(texts: Iterable[str]) -> str:
    """Each text once."""
    return ". ".join(dict.fromkeys(texts))


def _and(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, dict.fromkeys(names))))
