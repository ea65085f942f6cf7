"""The schema of conf/: one dataclass for each group, so that a typo or a wrong type fails at composition.

The YAML options of a group extend its schema. Parts that are built by `_target_` and that a user may replace with a
class of her own (a network, a reader, an optimiser) are open dictionaries: their keys are the arguments of that class,
and one that the class does not take is refused when it is built, before anything is trained.

This file imports neither torch nor anything that does: `--help` and completion must be quick.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class CoarseSchedule:
    """How long Phase 1 trains; the defaults are the seed's."""

    epochs: int = 150
    batch_size: int = 24
    lr: float = 0.01


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

    expand_ratio: float = 0.5
    """Growth of the lesion's box on every side, of its own size."""
    square: bool = True
    """Show a square of native pixels; false stretches the lesion's own box to a square."""


@dataclass
class TrainedParts:
    """Which parts of SAM Phases 2 and 3 move; LoRA terms always do."""

    image_encoder: bool = False
    prompt_encoder: bool = True
    mask_decoder: bool = True


@dataclass
class LoraConfig:
    """Low-rank terms on the attention of SAM's image encoder, see `models.lora.add_lora`."""

    rank: int = 0
    """0 is off."""
    alpha: float = 4.0
    blocks: Any = None
    """null: all blocks; n: the last n; a list: these."""
    targets: list[str] = field(default_factory=lambda: ["qkv", "proj"])


@dataclass
class ModelConfig:
    """A pair of networks."""

    name: str = MISSING
    image_size: int = 512
    """Side of the frame that crops are taken from, px."""
    coarse_size: int = 224
    """Side of the coarse network's input and output, px."""
    frame: str = "pad"
    """pad | stretch: whether roi=off shows SAM the whole image padded to a square, or stretched to one."""
    coarse: dict[str, Any] = MISSING
    coarse_weights: str | None = None
    """Weights to start Phase 1 from: Google's .npz, or a state_dict of the published TransUNet."""
    sam: dict[str, Any] = MISSING
    train: TrainedParts = field(default_factory=TrainedParts)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpointing: bool = False
    """Recompute the image encoder's activations in the backward pass: less memory, more time, the same result."""
    gradient: str = "exact"
    """exact | frozen: whether the gradient to the coarse mask passes through the image encoder."""
    cache_embeddings: bool = False
    """Keep the image embeddings on disk, in float16, so that each image is encoded once and not once an epoch. For
    roi=off and a frozen image encoder; and for dataset.augment=null, as an augmented image never comes again."""
    selection_temperature: float = 0.1
    roi: RoiDefaults = field(default_factory=RoiDefaults)
    prompts: PromptDefaults = field(default_factory=PromptDefaults)
    schedule: Schedules = field(default_factory=Schedules)


@dataclass
class PromptStyleConfig:
    """What SAM is told."""

    name: str = MISSING
    _target_: str = "ultrarefiner.refine.prompts.Prompts"
    mask: dict[str, Any] | None = None
    use_mask: bool = True
    point: bool = True
    negative_point: bool = True
    box: bool = True
    box_k: float = 2.5
    temperature: float = 1.0


@dataclass
class LesionRoiConfig:
    """roi=on: SAM looks at the lesion."""

    name: str = "on"
    _target_: str = "ultrarefiner.refine.roi.LesionRoi"
    expand_ratio: float = MISSING
    k: float = 2.5
    min_size: float = 0.1
    square: bool = MISSING
    temperature: float = MISSING


@dataclass
class FullFrameConfig:
    """roi=off: SAM looks at the whole frame."""

    name: str = "off"
    _target_: str = "ultrarefiner.refine.roi.FullFrame.of"
    frame: str = MISSING


@dataclass
class ProtectionConfig:
    """What keeps Phase 3 from harming the coarse network."""

    name: str = MISSING
    _target_: str = "ultrarefiner.phases.protection.Protection"
    coarse_loss_weight: float = 0.5
    refined_loss_weight: float = 0.5
    grad_scale: float = 1.0
    weight_reg: float = 0.0
    freeze_epochs: int = 0
    sam_freeze_epochs: int = 0
    hold_batchnorm: bool = False
    warn_drop: float = 0.005
    guard: float | None = None


@dataclass
class PhaseConfig:
    """What every phase has."""

    name: str = MISSING
    _target_: str = MISSING
    epochs: int = MISSING
    batch_size: int = MISSING
    optimizer: dict[str, Any] = MISSING
    patience: int | None = None
    """End when the validation Dice has not risen for so many epochs; null trains to the end."""
    ema_decay: float | None = None
    """Judge, and keep, an exponential moving average of the weights, such as 0.999; null keeps the weights."""


@dataclass
class CoarsePhaseConfig(PhaseConfig):
    """Phase 1: the coarse network alone."""

    name: str = "coarse"
    _target_: str = "ultrarefiner.phases.coarse.CoarsePhase"
    lr: float = MISSING
    poly_power: float = 0.9
    ce_weight: float = 0.5
    dice_weight: float = 0.5
    grad_clip: float | None = None


@dataclass
class SamPhaseConfig(PhaseConfig):
    """Phase 2: SAM on simulated coarse masks."""

    name: str = "sam"
    _target_: str = "ultrarefiner.phases.sam.SamPhase"
    lr: float = MISSING
    bce_weight: float = 1.0
    dice_weight: float = 1.0
    focal_weight: float = 0.5
    change_weight: float = 0.5
    iou_weight: float = 0.1
    good_from: float = 0.6
    grad_clip: float | None = 1.0
    failures: dict[str, Any] = MISSING
    masks_per_image: int = 1
    """So many simulated masks of a training case share one encoded crop, around them all; a step then has batch_size
    cases and batch_size·masks_per_image masks."""
    softness: str | None = None
    """fit: simulated masks are as soft as Phase 1's out-of-fold predictions."""
    real_ratio: float = 0.0
    """Share of the training samples that take a real out-of-fold prediction instead of a simulated mask."""
    parts: int = 4
    """Into how many parts the training cases are cut for that: so many networks are trained as in Phase 1."""
    coarse: Any = None
    """How they are trained; null where none is needed."""


@dataclass
class E2EPhaseConfig(PhaseConfig):
    """Phase 3: both networks."""

    name: str = "e2e"
    _target_: str = "ultrarefiner.phases.e2e.E2EPhase"
    coarse_lr: float = MISSING
    sam_lr: float = MISSING
    ce_weight: float = 0.5
    coarse_dice_weight: float = 0.5
    bce_weight: float = 1.0
    dice_weight: float = 1.0
    grad_clip: float | None = 1.0
    coarse_checkpoint: str | None = None
    sam_checkpoint: str | None = None
    coarse: CoarsePhaseConfig = field(default_factory=CoarsePhaseConfig)
    sam: SamPhaseConfig = field(default_factory=SamPhaseConfig)


@dataclass
class LimitConfig:
    """At most this many cases of each part, whole patients, for short runs; null is all of them."""

    train: int | None = None
    val: int | None = None
    test: int | None = None


@dataclass
class DatasetConfig:
    """Where cases come from and how they are divided."""

    name: str = MISSING
    reader: dict[str, Any] = MISSING
    folds: int = 5
    test_fraction: float = 0.2
    split_seed: int = 0
    """Of the partition; `seed` leaves it alone, so that runs of several seeds are tested on the same cases."""
    include_normal: bool = False
    limit: LimitConfig = field(default_factory=LimitConfig)
    augment: dict[str, Any] | None = field(default_factory=lambda: {"_target_": "ultrarefiner.data.augment.Augment"})
    """Of the training cases, in all three phases; null for none."""
    members: list[str] = field(default_factory=list)
    """dataset=combined: the names of the data sets."""
    without: list[int] | None = None
    """[part, parts]: train without one of several parts of the training cases (for out-of-fold predictions)."""


@dataclass
class TrainerConfig:
    """How the machine is used; nothing here changes what is computed, except the precision."""

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"
    """One of Lightning's; auto: bf16-mixed on a GPU that has it, else 32-true."""
    num_workers: int = 0
    accumulate: int = 1
    deterministic: bool = True
    compile: bool = False
    """Compile the coarse network and SAM's image encoder (`torch.compile`): minutes at the start, faster steps."""
    budget_minutes: float | None = None
    """Save and stop after so much time; the same command continues."""
    save_minutes: float = 15.0
    """Save inside an epoch when nothing was saved for so long; the end of an epoch is always saved."""
    embeddings_gb: float = 10.0
    """The most that model.cache_embeddings may take on disk, of all runs that share output_root."""
    progress_bar: bool = True


@dataclass
class Config:
    """One experiment."""

    model: ModelConfig = MISSING
    prompt_style: PromptStyleConfig = MISSING
    roi: Any = MISSING
    gate: Any = MISSING
    phase: Any = MISSING
    protection: ProtectionConfig = MISSING
    dataset: DatasetConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: dict[str, Any] = field(default_factory=dict)
    fold: int = 0
    seed: int = 0
    data_root: str | None = None
    output_root: str = "outputs"
    upstream: str = "build"


@dataclass
class PrepareConfig:
    """A look at a dataset before training."""

    dataset: DatasetConfig = MISSING
    model: ModelConfig = MISSING
    data_root: str | None = None
    output_root: str = "outputs"
    seed: int = 0
    failures: int = 0
    """How many simulated coarse masks to write."""
    failures_out: str = "failures"
    simulator: dict[str, Any] = MISSING


def register() -> None:
    """Make the schemas known to Hydra under the name `schema` of their groups."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="schema_prepare", node=PrepareConfig)
    for group, name, node in (
        ("model", "schema", ModelConfig),
        ("prompt_style", "schema", PromptStyleConfig),
        ("roi", "schema_on", LesionRoiConfig),
        ("roi", "schema_off", FullFrameConfig),
        ("protection", "schema", ProtectionConfig),
        ("phase", "schema_coarse", CoarsePhaseConfig),
        ("phase", "schema_sam", SamPhaseConfig),
        ("phase", "schema_e2e", E2EPhaseConfig),
        ("dataset", "schema", DatasetConfig),
        ("trainer", "schema", TrainerConfig),
    ):
        store.store(group=group, name=name, node=node)
