"""Local dask clusters for predicting slides, and checks of a given client."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .._core import logs, validate
from .._core.memory import memory_of_machine

if TYPE_CHECKING:
    from distributed import Client, Worker

#: Expected memory of a worker: torch, scverse and a slide.
_WORKER_BYTES = 3 * 1024**3
#: Loggers of dask that report starting and stopping workers; errors of slides are in the table.
_LOGGERS = ("distributed", "distributed.client", "tornado.application", "asyncio")
#: Variables for the threads of a worker. numba sets those of OpenMP anew, and with them those of torch.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def check_client(client: Any, n_workers: int | None) -> None:
    """Raise if a client is invalid, closed or asynchronous, or if ``n_workers`` is given beside it."""
    if client is None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(
                "hg.cohort.predict was called while a worker process imported the script: put the call below "
                "`if __name__ == '__main__':`"
            )
        return
    validate.running_client(client)
    if n_workers is not None:
        raise ValueError("`n_workers` is for a local cluster, but `client` has its own workers; pass only one of them")


def workers_here(n_slides: int, n_workers: int | None, device: str) -> list[dict[str, str]]:
    """Return the environment of each local worker, with the cores divided between them.

    The default is one worker per GPU; without a GPU, as many as cores, memory and slides allow.
    """
    import torch
    from dask.system import CPU_COUNT

    cores = CPU_COUNT or 1
    gpus = []
    if device in ("auto", "cuda"):
        visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        n = torch.cuda.device_count()
        gpus = visible[:n] or [str(i) for i in range(n)]
    if n_workers is None:
        room = min(cores, memory_of_machine() // _WORKER_BYTES)
        n_workers = len(gpus) or (room if device in ("auto", "cpu") and not torch.backends.mps.is_available() else 1)
    n_workers = max(1, min(n_workers, n_slides))
    threads = dict.fromkeys(_THREADS, str(max(1, cores // n_workers)))
    return [{**threads, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})} for i in range(n_workers)]


@contextmanager
def local_client(environments: list[dict[str, str]], *, alone: bool = False) -> Iterator[Client]:
    """Start a local cluster with a process for each environment and one task at a time; stop it afterwards.

    With ``alone``, dask neither pauses nor kills a worker for its memory use.
    """
    import dask
    from distributed import Client, Nanny, Scheduler
    from distributed.deploy.spec import SpecCluster

    # dask accepts a logging level, but declares a bool.
    silent: Any = logging.CRITICAL
    common = {
        "host": "127.0.0.1",
        "nthreads": 1,
        "dashboard": False,
        "preload": [__name__],
        "silence_logs": silent,
        "memory_limit": memory_of_machine() // len(environments),
    }
    workers = {i: {"cls": Nanny, "options": {**common, "env": dict(env)}} for i, env in enumerate(environments)}
    # Try a slide on at most two workers, so that a slide that kills its worker does not kill all.
    options = {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0", "allowed_failures": 1}
    scheduler = {"cls": Scheduler, "options": options}
    unlimited = {"distributed.worker.memory.pause": False, "distributed.worker.memory.terminate": False}
    with logs.silence(*_LOGGERS, level=logging.CRITICAL + 1), dask.config.set(unlimited if alone else {}):
        cluster = SpecCluster(workers=workers, scheduler=scheduler, silence_logs=silent)
        try:
            with Client(cluster) as client:
                yield client
        except BaseException:
            # On Ctrl-C, do not wait for slides in progress.
            for nanny in cluster.workers.values():
                nanny.auto_restart = False
                with suppress(ProcessLookupError, TypeError):  # the process has not started, or has ended
                    os.kill(nanny.pid, signal.SIGKILL)
            raise
        finally:
            with suppress(TimeoutError):
                cluster.close()


def dask_setup(worker: Worker) -> None:
    """Ignore Ctrl-C in a worker of a local cluster; the process that started it stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
