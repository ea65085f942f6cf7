"""Several processes that train one run together (`trainer=ddp`).

Each of them runs the whole experiment in step with the first one, which alone decides, prints and writes. They come
from SLURM (one task for each) or torchrun, or are started here. In one process everything here does nothing.
"""

import contextlib
import datetime
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.strategies import DDPStrategy, Strategy

from ultrarefiner.errors import UserError

T = TypeVar("T")
# The first process may wait for another job that builds an earlier phase, and the others for it.
PATIENCE = datetime.timedelta(days=7)
FAREWELL_SECONDS = 60


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
        UserError: a batch cannot be divided among them, or several machines were asked for and nothing started them.
    """
    local, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
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
    except (UserError, KeyboardInterrupt):
        sys.exit(1)  # the first process says why


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _place(local: int, nodes: int) -> dict[str, str] | None:
    """Where this process stands among all, in torchrun's words; None if it is alone so far."""
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) == local * nodes and "LOCAL_RANK" in env:
        return {key: env[key] for key in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK", "RANK")} | {
            "NODE_RANK": env.get("NODE_RANK", env.get("GROUP_RANK", "0"))
        }
    if int(env.get("SLURM_NTASKS", 1)) == local * nodes and "SLURM_PROCID" in env:
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
        torch.cuda.set_device(local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def strategy(name: str, idle_parts: bool) -> str | Strategy:
    """For Lightning's trainer: `trainer.strategy`, where several processes train together one that averages gradients.

    Args:
        name: a name of Lightning's; "ddp" or "auto" for the usual one.
        idle_parts: whether some parameters get no gradient in some steps, which costs a look at the graph.
    """
    if size() > 1 and name in ("auto", "ddp"):
        return DDPStrategy(find_unused_parameters=idle_parts)
    return name


def environment() -> LightningEnvironment:
    """For Lightning's trainer: the place of this process as `processes` set it.

    Without it Lightning finds SLURM by itself and requeues jobs, which submitit does already.
    """
    return LightningEnvironment()


if __name__ == "__main__":
    main()
