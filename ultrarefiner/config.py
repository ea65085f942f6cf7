"""The schema of conf/: one dataclass for each group, so that a typo or a wrong type fails at composition.

A field says all that is known of a setting, see `setting`. The YAML options of a group extend its schema. What is built
by `_target_`, and may be a class of the user's own, is an open dictionary: its keys are the arguments of that class;
one that it does not take is refused when it is built. Imports nothing that is slow."""

from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from ultrarefiner.settings import BRIDGE, COARSE, PRECISIONS, SAM, about, setting


@dataclass
class CoarseSchedule:
    """How Phase 1 trains a coarse network; the defaults are the seed's."""

    epochs: int = 150
    batch_size: int = 24
    lr: float = 0.01
    optimizer: str = "torch.optim.SGD"
    momentum: float | None = 0.9  # null for an optimiser that takes none
    weight_decay: float = 1e-4


@dataclass
class SamSchedule:
    """How long Phase 2 trains."""

    epochs: int = 50
    batch_size: int = 4
    lr: float = 1e-4


@dataclass
class E2ESchedule:
    """How long Phase 3 trains."""

    epochs: int = 100
    batch_size: int = 4
    coarse_lr: float = 1e-6
    sam_lr: float = 1e-5


@dataclass
class Schedules:
    """What a model's size decides about the three phases."""

    coarse: CoarseSchedule = field(default_factory=CoarseSchedule)
    sam: SamSchedule = field(default_factory=SamSchedule)
    e2e: E2ESchedule = field(default_factory=E2ESchedule)


@dataclass
class PromptDefaults:
    """Which prompts a model's SAM family likes best; `prompt_style` takes them from here."""

    mask: bool = True
    point: bool = True
    negative_point: bool = True
    box: bool = True
    box_k: float = 2.5
    temperature: float = 1.0


@dataclass
class RoiDefaults:
    """What a model is best shown of a lesion; `roi=on` takes it from here."""

    expand_ratio: float = setting(0.5, at_least=0)
    """Growth of the lesion's box on every side, of its own size."""
    square: bool = True
    """Show a square of native pixels; false stretches the lesion's own box to a square."""


@dataclass
class TrainedParts:
    """Which parts of SAM Phases 2 and 3 move; LoRA terms always do."""

    image_encoder: Any = False  # n: from the n-th last block to the end
    prompt_encoder: bool = True
    mask_decoder: bool = True


@dataclass
class LoraConfig:
    """Low-rank terms on the attention of SAM's image encoder, see `models.lora.add_lora`."""

    rank: int = setting(0, at_least=0)  # 0 is off
    alpha: float = setting(4.0, above=0)
    blocks: Any = None  # null: all blocks; n: the last n; a list: these
    targets: list[str] = field(default_factory=lambda: ["qkv", "proj"])


@dataclass
class ModelConfig:
    """A pair of networks."""

    name: str = setting(result=False)
    image_size: int = setting(512, of=(SAM,), fits=True, at_least=16, at_most=8192)
    """Side of the frame that crops are taken from, px."""
    coarse_size: int = setting(224, of=(COARSE, SAM), fits=True, at_least=16, at_most=8192)
    """Side of the coarse network's input and output, px."""
    frame: str = setting("pad", result=False, one_of=("pad", "stretch"))
    """pad | stretch: whether roi=off shows SAM the whole image padded to a square, or stretched to one."""
    coarse: dict[str, Any] | None = setting(of=(COARSE,), fits=True)  # null: masks in files take its place
    coarse_weights: str | None = setting(None, of=(COARSE,))
    """Weights to start Phase 1 from: Google's .npz (auto fetches it), or a state_dict."""
    sam: dict[str, Any] = setting(of=(SAM,), fits=True)
    train: TrainedParts = setting(TrainedParts, of=(SAM,))
    lora: LoraConfig = setting(LoraConfig, of=(SAM,), fits=True)
    checkpointing: bool = setting(False, result=False)
    """Recompute the image encoder's activations in the backward pass: less memory, more time, the same result."""
    gradient: str = setting("exact", of=(BRIDGE,), one_of=("exact", "frozen"))
    """exact | frozen: whether the gradient to the coarse mask passes through the image encoder."""
    selection_temperature: float = setting(0.1, of=(SAM,), above=0)
    roi: RoiDefaults = setting(RoiDefaults, result=False)
    prompts: PromptDefaults = setting(PromptDefaults, result=False)
    schedule: Schedules = setting(Schedules, result=False)


@dataclass
class PromptStyleConfig:
    """What SAM is told."""

    name: str = MISSING
    _target_: str = "ultrarefiner.refine.prompts.Prompts"
    mask: dict[str, Any] | None = None
    use_mask: bool = MISSING
    point: bool = MISSING
    negative_point: bool = MISSING
    box: bool = MISSING
    box_k: float = setting(above=0)
    temperature: float = setting(above=0, at_most=1)


@dataclass
class LesionRoiConfig:
    """roi=on: SAM looks at the lesion."""

    name: str = setting("on", one_of=("on",))
    _target_: str = "ultrarefiner.refine.roi.LesionRoi"
    expand_ratio: float = setting(at_least=0)
    k: float = setting(2.5, above=0)
    min_size: float = setting(0.1, above=0, at_most=1)
    square: bool = MISSING
    temperature: float = setting(above=0, at_most=1)


@dataclass
class FullFrameConfig:
    """roi=off: SAM looks at the whole frame."""

    name: str = setting("off", one_of=("off",))
    _target_: str = "ultrarefiner.refine.roi.FullFrame.of"
    frame: str = MISSING


@dataclass
class ProtectionConfig:
    """What keeps Phase 3 from harming the coarse network (seed: "TransUNet Protection Options")."""

    name: str = MISSING
    coarse_loss_weight: float = setting(0.5, at_least=0)  # λc
    refined_loss_weight: float = setting(0.5, at_least=0)  # λr
    grad_scale: float = setting(1.0, at_least=0)
    """Factor on the gradient that the refiner sends to the coarse network; 0 cuts it."""
    weight_reg: float = setting(0.0, at_least=0)
    """Weight of Σ(θ − θ₀)², θ₀ the coarse network's weights at the start of the phase."""
    freeze_epochs: int = setting(0, at_least=0)
    """Epochs in which the coarse network does not move."""
    sam_freeze_epochs: int = setting(0, at_least=0)
    """Epochs in which SAM does not move."""
    hold_batchnorm: bool = False
    """Keep the coarse network's batch statistics as they were; a batch of four would let them drift."""
    warn_drop: float = setting(0.005, at_least=0)
    """Warn when the coarse Dice falls below the Phase 1 baseline by more than this."""
    guard: float | None = setting(None, at_least=0)
    """Restore the best coarse weights when the coarse Dice falls below its baseline by more than this; null never."""


@dataclass
class PhaseConfig:
    """What every phase has."""

    name: str = MISSING
    _target_: str = MISSING
    epochs: int = setting(at_least=1, at_most=10**6)
    batch_size: int = setting(at_least=1)
    optimizer: dict[str, Any] = MISSING
    grad_clip: float | None = setting(None, above=0)
    """Largest norm of the gradient; null does not clip."""
    patience: int | None = setting(None, argument=False, at_least=1)
    """End when the validation Dice has not risen for so many epochs; null trains to the end."""
    ema_decay: float | None = setting(None, argument=False, above=0, below=1)
    """Judge, and keep, an exponential moving average of the weights, such as 0.999; null keeps the weights."""
    augment: bool = setting(True, argument=False)
    """Change the training cases as dataset.augment says; false takes them as they are, in this phase."""


@dataclass
class CoarsePhaseConfig(PhaseConfig):
    """Phase 1: the coarse network alone."""

    name: str = "coarse"
    _target_: str = "ultrarefiner.phases.coarse.CoarsePhase"
    lr: float = setting(at_least=0)
    poly_power: float = setting(0.9, at_least=0)
    ce_weight: float = setting(0.5, at_least=0)
    dice_weight: float = setting(0.5, at_least=0)


@dataclass
class SamPhaseConfig(PhaseConfig):
    """Phase 2: SAM on simulated coarse masks, or on real ones."""

    name: str = "sam"
    _target_: str = "ultrarefiner.phases.sam.SamPhase"
    lr: float = setting(at_least=0)
    bce_weight: float = setting(1.0, at_least=0)
    dice_weight: float = setting(1.0, at_least=0)
    focal_weight: float = setting(0.5, at_least=0)
    change_weight: float = setting(0.5, at_least=0)
    iou_weight: float = setting(0.1, at_least=0)
    good_from: float = setting(0.6, at_least=0, below=1)
    """Coarse Dice from which on a change costs."""
    grad_clip: float | None = setting(1.0, above=0)
    failures: dict[str, Any] = setting(argument=False)
    """What simulates the coarse masks."""
    masks_per_image: int = setting(1, argument=False, at_least=1)
    """So many simulated masks of a training case share one crop; a step has batch_size·masks_per_image masks."""
    crops: int | None = setting(None, argument=False, at_least=1)
    """So many augmented crops of each training case take turns over the epochs; their embeddings are kept on disk."""
    masks: str | None = setting(None, argument=False)
    """A folder of coarse masks, see `data.mask_files`; null simulates new ones in every epoch."""
    softness: str | None = setting(None, argument=False, one_of=(None, "fit"))
    """fit: simulated masks are as soft as Phase 1's out-of-fold predictions."""
    bins: str | None = setting(None, argument=False, one_of=(None, "fit"))
    """fit: simulated masks are as good and as bad as Phase 1's out-of-fold predictions; null: as failures.bins says."""
    real_ratio: float = setting(0.0, argument=False, at_least=0, at_most=1)
    """Share of the training samples that take a real out-of-fold prediction instead of a simulated mask. Above 0, all
    validation and test cases take a real one as well: they then choose and measure what Phase 3 starts from."""
    parts: int = setting(4, argument=False, at_least=2)
    """Into how many parts the training cases are cut for that: so many networks are trained as in Phase 1."""
    early_epochs: int | None = setting(None, argument=False, at_least=1)
    """Let these networks see all training cases, but stop them after so many epochs; Phase 1's predicts the others."""
    coarse: Any = setting(None, argument=False)  # how they are trained; null where none is needed


@dataclass
class E2EPhaseConfig(PhaseConfig):
    """Phase 3: both networks."""

    name: str = "e2e"
    _target_: str = "ultrarefiner.phases.e2e.E2EPhase"
    coarse_lr: float = setting(at_least=0)
    sam_lr: float = setting(at_least=0)
    ce_weight: float = setting(0.5, at_least=0)
    coarse_dice_weight: float = setting(0.5, at_least=0)
    bce_weight: float = setting(1.0, at_least=0)
    dice_weight: float = setting(1.0, at_least=0)
    grad_clip: float | None = setting(1.0, above=0)
    coarse_checkpoint: str | None = setting(None, argument=False)
    sam_checkpoint: str | None = setting(None, argument=False)
    crops: int | None = setting(None, argument=False, at_least=1)
    """As in Phase 2; with roi=off only, as else the crop follows the coarse network."""
    coarse: CoarsePhaseConfig = setting(CoarsePhaseConfig, argument=False)
    sam: SamPhaseConfig = setting(SamPhaseConfig, argument=False)


@dataclass
class LimitConfig:
    """At most this many cases of each part, whole patients, for short runs; null is all of them."""

    train: int | None = setting(None, at_least=1)
    val: int | None = setting(None, at_least=1)
    test: int | None = setting(None, at_least=1)


@dataclass
class DatasetConfig:
    """Where cases come from and how they are divided."""

    name: str = MISSING
    reader: dict[str, Any] = MISSING
    folds: int = setting(5, at_least=2)
    test_fraction: float = setting(0.2, above=0, below=1)
    split_seed: int = setting(0, at_least=0, below=2**32)
    """Of the partition; `seed` leaves it alone, so that runs of several seeds are tested on the same cases."""
    include_normal: bool = False
    limit: LimitConfig = field(default_factory=LimitConfig)
    augment: dict[str, Any] | None = field(default_factory=lambda: {"_target_": "ultrarefiner.data.augment.Augment"})
    """Of the training cases, in all phases whose `augment` is true; null for none."""
    members: list[str] = field(default_factory=list)
    """dataset=combined: the names of the data sets."""
    without: list[int] | None = None
    """[part, parts]: train without one of several parts of the training cases (for out-of-fold predictions)."""


@dataclass
class TrainerConfig:
    """How the machine is used; nothing here changes what is computed, except precision and accumulation."""

    accelerator: str = setting("auto", result=False)
    devices: int = setting(1, result=False, at_least=1)
    num_nodes: int = setting(1, result=False, at_least=1)
    strategy: str = setting("auto", result=False)
    precision: str = setting("auto", one_of=PRECISIONS)
    """auto: bf16-mixed where it is faster, see `precision.fastest`, else 32-true."""
    num_workers: int = setting(0, result=False, at_least=0, at_most=512)
    accumulate: int = setting(1, at_least=1)
    deterministic: bool = setting(True, result=False)
    compile: bool = setting(False, result=False)
    """Compile the coarse network and SAM's image encoder (`torch.compile`): minutes at the start, faster steps."""
    budget_minutes: float | None = setting(None, result=False, above=0)
    """Save and stop after so much time; the same command continues."""
    save_minutes: float = setting(15.0, result=False, at_least=0)
    """Save inside an epoch when nothing was saved for so long (0: after each step); its end is always saved."""
    embeddings_gb: float = setting(10.0, result=False, at_least=0)
    """The most that phase.crops may take on disk, of all runs that share output_root."""
    progress_bar: bool = setting(True, result=False)


@dataclass
class Config:
    """One experiment."""

    model: ModelConfig = MISSING
    prompt_style: PromptStyleConfig = setting(of=(SAM,), fits=True)
    roi: Any = setting(of=(SAM,), fits=True)
    gate: Any = setting(of=(SAM,), fits=True)
    phase: Any = MISSING
    protection: ProtectionConfig = setting(of=(BRIDGE,))
    dataset: DatasetConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: dict[str, Any] = setting(dict, result=False)
    fold: int = setting(0, at_least=0)
    seed: int = setting(0, at_least=0, below=2**32)
    data_root: str | None = setting(None, result=False)
    output_root: str = setting("outputs", result=False)
    allow_seen: bool = setting(False, result=False)
    """Measure weights that are given by path also on test cases that they have seen; every table then says so."""
    upstream: str = setting("build", result=False, one_of=("build", "require"))


@dataclass
class PrepareConfig:
    """A look at a dataset before training."""

    dataset: DatasetConfig = MISSING
    model: ModelConfig = MISSING
    data_root: str | None = None
    output_root: str = "outputs"
    weights: list[str] = field(default_factory=list)


@dataclass
class SimulateConfig(PrepareConfig):
    """Simulated coarse masks as files."""

    simulator: dict[str, Any] = MISSING
    fold: int = setting(0, at_least=0)
    seed: int = setting(0, at_least=0, below=2**32)
    part: str = setting("train", one_of=("train", "val", "test"))
    """Whose cases; test cases only where it is said."""
    samples: int = setting(1000, at_least=1)
    output: str = "masks"


def register() -> None:
    """Make the schemas known to Hydra under the name `schema` of their groups."""
    store = ConfigStore.instance()
    # A phase of a user's own has keys of its own besides those of every phase; its class refuses the misspelt ones.
    any_phase = OmegaConf.structured(PhaseConfig, flags={"struct": False})
    store.store(name="schema", node=Config)
    store.store(name="schema_prepare", node=PrepareConfig)
    store.store(name="schema_simulate", node=SimulateConfig)
    for group, name, node in (
        ("model", "schema", ModelConfig),
        ("prompt_style", "schema", PromptStyleConfig),
        ("roi", "schema_on", LesionRoiConfig),
        ("roi", "schema_off", FullFrameConfig),
        ("protection", "schema", ProtectionConfig),
        ("phase", "schema", any_phase),
        ("phase", "schema_coarse", CoarsePhaseConfig),
        ("phase", "schema_sam", SamPhaseConfig),
        ("phase", "schema_e2e", E2EPhaseConfig),
        ("dataset", "schema", DatasetConfig),
        ("trainer", "schema", TrainerConfig),
    ):
        store.store(group=group, name=name, node=node)


def not_arguments() -> frozenset[str]:
    """Keys of a phase that are no arguments of its class."""
    schemas: tuple[type[PhaseConfig], ...] = (PhaseConfig, *PhaseConfig.__subclasses__())
    known = (one for schema in schemas for one in fields(schema))
    return frozenset({"name", *(one.name for one in known if not about(one).argument)})
