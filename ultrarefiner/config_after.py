"""The schema of the commands after training, see `config`."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ultrarefiner.config import DatasetConfig
from ultrarefiner.settings import setting


@dataclass
class EvaluateConfig:
    """How good masks are."""

    dataset: DatasetConfig = MISSING
    data_root: str | None = None
    output_root: str = "outputs"
    checkpoint: str | None = None
    predictions: str | None = None
    fold: int | None = setting(None, at_least=0)
    """null: the fold that the checkpoint was trained in."""
    split: str = setting("test", one_of=("test", "val", "train", "all"))
    output: str | None = None
    allow_seen: bool = False
    spacing: float | None = setting(None, above=0)
    tolerances: list[float] = field(default_factory=list)
    tolerances_mm: list[float] = field(default_factory=list)
    batch_size: int = setting(4, at_least=1)
    device: str = "auto"
    pictures: bool = True


@dataclass
class ReportConfig:
    """What came out of several runs, as a page."""

    runs: str = "outputs"
    output: str = "report"
    list: bool = False
    title: str = "UltraRefiner"
    pictures: int = setting(300, at_least=0)
    gallery: int = setting(6, at_least=1)


def register() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema_evaluate", node=EvaluateConfig)
    store.store(name="schema_report", node=ReportConfig)
