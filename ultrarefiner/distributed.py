"""Several processes that train one run together (`trainer=ddp`).

Each of them runs the whole experiment in step with the first one, which alone decides, prints and writes. They come
from SLURM (one task for each) or torchrun, or are started here. What ends one of them ends all, with one sentence. In
one process everything here does nothing.
"""

import contextlib
import datetime
import inspect
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.layer_sync import LayerSync
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ultrarefiner.errors import UserError

T = TypeVar("T")
# The first process may wait for another job that builds an earlier phase, and the others for it.
PATIENCE = datetime.timedelta(days=7)
START_PATIENCE = datetime.timedelta(minutes=10)
"""All of them must be there by then."""
FAREWELL_SECONDS = 60
WATCH_SECONDS, GRACE_SECONDS = 5, 120
"""How often a process looks whether another failed, and how long it may take to notice by itself."""
REASON = "ultrarefiner/reason"
"""Where the first process that fails writes why."""


def rank() -> int:
    """The number of this process; 0 is the first."""
    return dist.get_rank() if _together() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def agreed(value: T) -> T:
    """The first process's value, in all of them; they wait for each other here."""
    if not _together():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def one_says(*flags: bool) -> list[bool]:
    """For each flag whether it is set in any process, in all of them; they wait for each other here."""
    if not _together():
        return list(flags)
    box = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return [bool(flag) for flag in box]


def gather(rows: list[T]) -> list[T]:
    """The rows of all processes, in each of them."""
    if not _together():
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


@contextlib.contextmanager
def processes(cfg: DictConfig) -> Iterator[None]:
    """Have `trainer.devices` × `trainer.num_nodes` processes inside the block.

    Args:
        cfg: the composed configuration; processes that are started here run it too.

    Raises:
        UserError: a batch cannot be divided among them; SLURM started another number; several machines were asked for
            and nothing started them; or another process failed.
    """
    local, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    _check_tasks(local, nodes)
    if local * nodes == 1:
        yield
        return
    for key in ("phase", "phase.coarse", "phase.sam"):
        batch = OmegaConf.select(cfg, f"{key}.batch_size", default=0)
        if batch % (local * nodes):
            raise UserError(f"{key}.batch_size={batch} cannot be divided among {local * nodes} processes")
    place = _place(local, nodes)
    with contextlib.ExitStack() as stack:
        if place is None:
            if nodes > 1:
                raise UserError(
                    f"trainer.num_nodes={nodes}: start the processes with hydra/launcher=slurm, srun or torchrun"
                )
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "WORLD_SIZE": str(local)}
            place |= {"NODE_RANK": "0", "LOCAL_RANK": "0", "RANK": "0"}
            stack.enter_context(_others(cfg, place, local))
        stack.enter_context(_environment(place))
        if int(place["RANK"]) > 0:
            stack.enter_context(_silence())
        stack.enter_context(_group(cfg, int(place["LOCAL_RANK"]), local))
        yield


def main() -> None:
    """A process that was started here: the experiment of a configuration file."""
    from ultrarefiner.experiment import run

    cfg = OmegaConf.load(sys.argv[1])
    assert isinstance(cfg, DictConfig)
    try:
        with processes(cfg):
            run(cfg)
    except (UserError, KeyboardInterrupt, SystemExit):
        sys.exit(1)  # the first process says why


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _check_tasks(local: int, nodes: int) -> None:
    """Refuse what would be several experiments in one directory, or one that waits for ever."""
    started = (int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)), int(os.environ.get("SLURM_STEP_NUM_NODES", 1)))
    if started[0] > 1 and started != (local * nodes, nodes):
        raise UserError(
            f"SLURM started {started[0]} processes on {started[1]} nodes for trainer.devices={local} and "
            f"trainer.num_nodes={nodes}: make hydra.launcher.tasks_per_node and hydra.launcher.nodes the same"
        )


def _place(local: int, nodes: int) -> dict[str, str] | None:
    """Where this process stands among all, in torchrun's words; None if it is alone so far."""
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) == local * nodes and "LOCAL_RANK" in env:
        return {key: env[key] for key in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK", "RANK")} | {
            "NODE_RANK": env.get("NODE_RANK", env.get("GROUP_RANK", "0"))
        }
    # Of the step: a batch script that starts nothing with srun is one process, whatever it reserved.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) == local * nodes:
        first = SLURMEnvironment.resolve_root_node_address(env["SLURM_JOB_NODELIST"]) if nodes > 1 else "127.0.0.1"
        return {
            "MASTER_ADDR": first,
            "MASTER_PORT": str(15000 + int(env["SLURM_JOB_ID"]) % 10000),
            "WORLD_SIZE": str(local * nodes),
            "NODE_RANK": env["SLURM_NODEID"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "RANK": env["SLURM_PROCID"],
        }
    return None


@contextlib.contextmanager
def _others(cfg: DictConfig, place: dict[str, str], count: int) -> Iterator[None]:
    """Start the other processes; they end with the block."""
    content = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    content.trainer.progress_bar = False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        OmegaConf.save(content, path)
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "ultrarefiner.distributed", str(path)],
                env=os.environ | place | {"LOCAL_RANK": str(number), "RANK": str(number)},
            )
            for number in range(1, count)
        ]
        try:
            yield
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(FAREWELL_SECONDS)
        finally:
            for process in started:
                process.kill()  # nothing of theirs is worth saving
                process.wait()


@contextlib.contextmanager
def _environment(place: dict[str, str]) -> Iterator[None]:
    """What Lightning reads of its place: with LOCAL_RANK set it starts no processes itself."""
    before = {key: os.environ.get(key) for key in place}
    os.environ.update(place)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What the first process says is said."""
    logging.disable(logging.WARNING)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _group(cfg: DictConfig, local_rank: int, local: int) -> Iterator[None]:
    """Connect the processes before Lightning would: they agree on what to do long before they train."""
    on_gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if on_gpu:
        if torch.cuda.device_count() < local:
            raise UserError(f"trainer.devices={local}, and this machine shows {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    try:
        store, number, count = next(rendezvous("env://", timeout=START_PATIENCE))
    except (dist.DistError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the processes do not find each other at {where}: {str(error).splitlines()[0]}") from error
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=number, world_size=count, timeout=PATIENCE
    )
    try:
        with _one_fate(store):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _one_fate(store: dist.Store) -> Iterator[None]:
    """What ends one process ends all.

    Raises:
        UserError: another process failed, with what it said; in all but the first process, whatever happens.
    """
    over = threading.Event()
    threading.Thread(target=_watch, args=(store, over), daemon=True).start()
    try:
        yield
    except Exception as error:
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error)))
        if isinstance(error, UserError):
            reason = str(error)
        elif lost:
            reason = "the connection to another process was lost: it was killed (out of memory?), or its machine died"
        else:
            reason = f"process {rank()} failed with {type(error).__name__}: {' '.join(str(error).split())}"
            if rank() > 0:
                traceback.print_exception(error)
        reason = _first(store, reason) or reason
        if rank() == 0 and not lost:
            raise
        raise UserError(reason) from error
    except BaseException:  # interrupted
        _first(store, f"process {rank()} was interrupted")
        raise
    finally:
        over.set()


_LOST = re.compile("gloo|NCCL|Connection (closed|reset)")


def _first(store: dist.Store, reason: str) -> str:
    """Say why this process ends, unless another one said so before; what the first one said."""
    try:
        return store.compare_set(REASON, "", reason).decode()
    except RuntimeError:  # the first process kept the store, and is gone
        return ""


def _watch(store: dist.Store, over: threading.Event) -> None:
    """End a process that waits for one that failed where nothing tells it: in a lock, in collectives of a GPU."""
    while not over.wait(WATCH_SECONDS):
        try:
            reason = store.get(REASON).decode() if store.check([REASON]) else ""
        except RuntimeError:
            reason = "the first process is gone"
        if reason and not over.wait(GRACE_SECONDS):
            print(f"error: {reason}", file=sys.stderr, flush=True)
            os._exit(1)


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
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SharedBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """The counterpart of `apply`."""
        for module in model.modules():
            if type(module) is SharedBatchNorm:
                module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        return model


class SharedBatchNorm(nn.BatchNorm2d):
    """`torch.nn.SyncBatchNorm` for CPUs too; all processes have batches of the same size."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B,C,H,W)."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[1] * size()
        mean = _Sum.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _Sum.apply((centred**2).sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * count / max(count - 1, 1), share)
        scale = (variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        shift = 0 if self.bias is None else self.bias[:, None, None]
        return (centred * scale[:, None, None] + shift).to(x.dtype)


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


if __name__ == "__main__":
    main()
