"""What Lightning's trainer is told about several processes: how gradients and batch statistics are shared."""

import inspect
import logging
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment
from pytorch_lightning.plugins.layer_sync import LayerSync
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ultrarefiner.ranks import rank, size

log = logging.getLogger(__name__)


def strategy(name: str, idle_parts: bool) -> str | Strategy:
    """For Lightning's trainer: `trainer.strategy`, where several processes train together one that averages gradients.

    Args:
        name: a name of Lightning's; "ddp" or "auto" for the usual one.
        idle_parts: whether some parameters get no gradient in some steps, which costs a look at the graph.
    """
    if size() > 1 and name in ("auto", "ddp"):
        # Buffers are batch statistics, which `SharedStatistics` makes the same, and constants. To send them in every
        # forward pass would hang at the end of a validation in which one process has a batch more than another.
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        sent = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.15
        options: dict[str, Any] = {"find_unused_parameters": idle_parts, sent: False}
        return DDPStrategy(**options)
    return name


def plugins() -> list[Any]:
    """For Lightning's trainer: the place of this process as `processes` set it, and batch statistics over all of them.

    Without the first Lightning finds SLURM by itself and requeues jobs, which submitit does already.
    """
    return [LightningEnvironment(), *([SharedStatistics()] if size() > 1 else [])]


class SharedStatistics(LayerSync):
    """Batch normalisation over the samples of all processes: together they compute what one process computes."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Exchange the layers' forward function; the parameters stay the optimiser's own."""
        from timm.layers.norm_act import BatchNormAct2d  # in most of timm's backbones; ends with an activation

        # By the forward function, which subclasses inherit.
        known = {_BatchNorm.forward: SharedBatchNorm, BatchNormAct2d.forward: _SharedBatchNormAct}
        alone = set()
        for module in model.modules():
            kind: Any = type(module)
            if issubclass(kind, _BatchNorm) and not issubclass(kind, SharedBatchNorm | nn.SyncBatchNorm):
                if kind.forward in known:
                    module.__class__ = _shared(kind, known[kind.forward])
                else:
                    alone.add(kind.__name__)
        if alone and rank() == 0:
            log.warning(
                "each process normalises over its own samples in layers of class %s, which have a forward function of "
                "their own: the result is not that of one process",
                ", ".join(sorted(alone)),
            )
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """The counterpart of `apply`."""
        for module in model.modules():
            if isinstance(module, SharedBatchNorm):
                module.__class__ = type(module).__bases__[1]
        return model


class SharedBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm` for CPUs too; all processes have batches of the same size."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B,C,...)."""
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        others = [axis for axis in range(x.dim()) if axis != 1]
        channels = [-1, *([1] * (x.dim() - 2))]
        count = x.numel() // x.shape[1] * size()
        mean: Tensor = _Sum.apply(wide.sum(others)) / count
        centred = wide - mean.view(channels)
        variance: Tensor = _Sum.apply((centred**2).sum(others)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / max(count - 1, 1), share)
        scale = (variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        shift = 0 if self.bias is None else self.bias.view(channels)
        return (centred * scale.view(channels) + shift).to(x.dtype)


class _SharedBatchNormAct(SharedBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)  # in evaluation timm's own, to the end
        return self.act(self.drop(x)) if self.training else x  # type: ignore[operator]


@cache
def _shared(kind: type[_BatchNorm], how: type[SharedBatchNorm]) -> type[_BatchNorm]:
    """That kind of layer, normalised over all processes."""
    return type(f"Shared{kind.__name__}", (how, kind), {})


class _Sum(torch.autograd.Function):
    """The sum over all processes. The loss is the sum of theirs, so its gradient is the sum of theirs too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        total = gradient[0].clone()
        dist.all_reduce(total)
        return total
