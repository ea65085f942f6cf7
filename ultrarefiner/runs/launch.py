"""Several processes that train one run together (`trainer=ddp`).

Each of them runs the whole experiment in step with the first one, which alone decides, prints and writes. They come
from SLURM (one task for each) or torchrun, or are started here. What ends one of them ends all, with one sentence.
"""

import contextlib
import datetime
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

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import SLURMEnvironment
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from omegaconf import DictConfig, OmegaConf
from torch.distributed.rendezvous import rendezvous

from ultrarefiner.errors import UserError
from ultrarefiner.ranks import rank

# The first process may wait for another job that builds an earlier phase, and the others for it.
PATIENCE = datetime.timedelta(days=7)
START_PATIENCE = datetime.timedelta(minutes=10)
"""All of them must be there by then."""
FAREWELL_SECONDS = 60
WATCH_SECONDS, GRACE_SECONDS = 5, 120
"""How often a process looks whether another failed, and how long it may take to notice by itself."""
REASON = "ultrarefiner/reason"
"""Where the first process that fails writes why."""


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
                [sys.executable, "-m", "ultrarefiner.runs.worker", str(path)],
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
    """Only the first process speaks."""
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
        torch.set_num_threads(max(1, _cores() // local))
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


def _cores() -> int:
    """How many cores this process may use; where the system does not say (macOS, Windows), how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        first: bytes = store.compare_set(REASON, "", reason)
    except RuntimeError:  # the first process kept the store, and is gone
        return ""
    return first.decode()


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
