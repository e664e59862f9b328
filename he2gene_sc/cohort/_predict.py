"""``hg.cohort.predict``: predict many slides on dask.distributed, one per task."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import uuid
import warnings
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .._core import validate
from .._core.hints import use_mpp_hint
from .._core.logs import warn
from .._core.stores import resolved
from .._settings import settings
from ..io._files import check_new_file, put_file
from ._cluster import check_client, local_client, workers_here
from ._job import METRICS, Job, find_finished, slide_summary
from ._manifest import LABELS, SEPARATORS, read_jobs
from ._slide import predict_slide

if TYPE_CHECKING:
    from distributed import Client

    from ..models import HE2Gene

#: Predict one slide at a time in a process, however many threads its worker has.
_SLIDE_LOCK = threading.Lock()


def predict(
    paths: str | Path | Iterable[str | Path] | pd.DataFrame,
    client: Client | None = None,
    *,
    output_dir: str | Path | None = None,
    summary: str | Path | None = None,
    overwrite: bool = False,
    keep_images: bool = True,
    n_workers: int | None = None,
    show_progress_bar: bool | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Predict many slides on dask.distributed, one per task, and return a table with a row per slide.

    Each slide is read, predicted by :func:`he2gene_sc.tl.predict` and saved. A slide whose store already holds the prediction of
    the same model with the same parameters is skipped, so repeating the call predicts only missing slides. If a slide fails, its
    error is in the table, and the others continue.

    Parameters
    ----------
    paths
        SpatialData stores and H&E images, or a manifest: a DataFrame, or the path of a csv or tsv file, with a column ``path`` and
        a row per slide. Other columns are arguments of :func:`he2gene_sc.tl.predict` (``mpp``, ``image_key``, ``genes``, …);
        ``output``, the store to write; ``patient`` and ``section``, which are written to ``obs``; ``pitch_um`` and
        ``tissue_method``. An empty cell means the default. Paths in a file are relative to the file.
    client
        Client of a running cluster whose workers can access the same files. Default: a local cluster with one worker per GPU;
        without a GPU, as many single-threaded workers as cores and memory allow. A script then has to call this function
        below ``if __name__ == "__main__":``.
    output_dir
        Folder for the stores. Default: a store is updated in place, and the store of an image is written beside it.
    summary
        File for the table, .csv or .tsv. It is written after each slide, so it has the finished slides if the run is interrupted.
        A summary of an earlier run is replaced; any other file raises an error.
    overwrite
        Whether to predict finished slides again, to replace other stores at the outputs, and to replace changes that other
        processes have saved to a slide meanwhile.
    keep_images
        Whether to copy the pixels into new stores. Without them, the stores cannot be predicted again.
    n_workers
        Number of workers of the local cluster.
    show_progress_bar
        Default ``hg.settings.show_progress_bar``.
    **options
        Arguments of :func:`he2gene_sc.tl.predict` for all slides, and ``pitch_um`` (100) and ``tissue_method`` (``"auto"``) for
        bare images. A cell of the manifest overrides them.

    Returns
    -------
    pandas.DataFrame
        One row per slide, in the order of ``paths``: ``path``, ``output``, ``status`` (``"predicted"``, ``"skipped"``, ``"failed"``, or
        ``"not run"`` in the file of an interrupted run), ``spots``, ``mpp`` (missing if regions differ), ``share_on_tissue``,
        ``share_like_training``, ``share_annotated`` (spots with a predicted class), ``verdict``, ``known_sections`` (training sections
        that the slide was recognised as, so metrics on it are optimistic), ``seconds``, ``warnings``, ``error``; and ``patient`` and
        ``section``, if given.

    Raises
    ------
    ValueError, TypeError
        If a column or an argument is unknown or invalid, two slides have the same output, ``summary`` is another kind of file, or
        ``client`` cannot be used. No slide is predicted then.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> frame = hg.cohort.predict("slides.csv", summary="summary.csv", show_progress_bar=False)
    >>> failed = frame[frame["status"] == "failed"]
    """
    validate.arguments(predict, {name: value for name, value in locals().items() if name != "options"})
    from tqdm.auto import tqdm

    if n_workers is not None:
        validate.whole_number(n_workers, "n_workers")
    check_client(client, n_workers)
    jobs, names = read_jobs(
        paths, options, output_dir=output_dir, keep_images=keep_images, overwrite=overwrite, is_local=client is None
    )
    table = _Summary(jobs, None if summary is None else validate.folder_or_file(summary, "summary"))
    table.check_place(paths)
    models = _load(names)
    table.begin()
    todo = {}
    for number, (job, model) in enumerate(zip(jobs, models, strict=True)):
        found = find_finished(job, model)
        if found is not None:
            table.add(number, {"status": "skipped", **found})
        else:
            todo[number] = (job, model)
    shown = settings.show_progress_bar if show_progress_bar is None else show_progress_bar
    done = len(jobs) - len(todo)
    with tqdm(total=len(jobs), initial=done, unit="slide", desc="predict", disable=not shown) as bar:
        if todo:
            device = str(options.get("device") or settings.device)
            with contextlib.closing(_predicted(client, todo, n_workers, device)) as rows:
                for number, row in rows:
                    table.add(number, row)
                    failed = sum(row["status"] == "failed" for row in table.rows)
                    bar.set_postfix(spots=sum(row.get("spots", 0) for row in table.rows), failed=failed)
                    bar.update()
    return table.frame()


def _load(names: list[Any]) -> list[HE2Gene]:
    from ..models import load

    keys = [name if isinstance(name, str | Path) else id(name) for name in names]
    loaded = {key: load(name) for key, name in dict(zip(keys, names, strict=True)).items()}
    return [loaded[key] for key in keys]


def _predicted(
    client: Client | None, todo: dict[int, tuple[Job, HE2Gene]], n_workers: int | None, device: str
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Predict the slides on a given or a local cluster; yield the row of each when it is done."""
    killed: list[int] = []
    given = None if client is None else contextlib.nullcontext(client)
    with given or local_client(workers_here(len(todo), n_workers, device)) as cluster:
        yield from _results(cluster, todo, killed)
    if killed:
        # A worker may have died from another slide: try each of these slides again, alone and (locally) with all memory.
        with given or local_client(workers_here(1, 1, device), alone=True) as cluster:
            for number in killed:
                yield from _results(cluster, {number: todo[number]})


class _Summary:
    """Table of the slides, and the file that it is written to."""

    def __init__(self, jobs: list[Job], path: Path | None) -> None:
        self.jobs = jobs
        self.path = path
        self.lost = False  # whether the file could not be written
        self.labels = sorted({name for job in jobs for name in job.labels})
        texts = dict.fromkeys((*self.labels, "verdict", "known_sections", "warnings", "error"), "")
        self.rows: list[dict[str, Any]] = [
            {"path": str(job.path), "output": str(job.output), "status": "not run", **texts, **job.labels}
            for job in jobs
        ]

    def check_place(self, slides: Any) -> None:
        """Raise if the path is not a table, or if another file would be lost."""
        path = self.path
        if path is None:
            return
        if path.suffix.lower() not in SEPARATORS:
            raise ValueError(
                f"`summary` {str(path)!r} ends in {path.suffix!r}; a table to write is needed, .csv or .tsv: "
                "summary='summary.csv', on the command line: `he2gene predict SLIDES --summary summary.csv`"
            )
        check_new_file(path, "summary", overwrite=True)
        inputs = [slides] if isinstance(slides, str | Path) else []
        inputs += [place for job in self.jobs for place in (job.path, job.output)]
        if resolved(path) in {resolved(place) for place in inputs}:
            raise ValueError(
                f"`summary` {str(path)!r} is the manifest, or a slide; name another file: summary='summary.csv' "
                "(--summary summary.csv)"
            )
        if path.exists() and not _is_summary(path):
            raise ValueError(
                f"`summary` {str(path)!r} exists and is not a summary of slides, so it is not replaced: name a new file, or "
                "remove it"
            )

    def begin(self) -> None:
        """Write the file with all slides as not run; raise if it cannot be written."""
        try:
            self.write()
        except OSError as error:
            raise OSError(f"`summary` {str(self.path)!r} cannot be written ({error}); name another file") from error

    def add(self, number: int, row: dict[str, Any]) -> None:
        self.rows[number].update(row)
        try:
            self.write()
            self.lost = False
        except OSError as error:
            # Predicting goes on if the table cannot be written.
            if not self.lost:
                warn(
                    f"`summary` {str(self.path)!r} cannot be written any more ({error}): it lacks finished slides. The table "
                    "that hg.cohort.predict returns has them"
                )
            self.lost = True

    def frame(self) -> pd.DataFrame:
        frame = pd.DataFrame(self.rows, columns=_columns(self.labels))
        return frame.assign(spots=frame["spots"].astype("Int64"))

    def write(self) -> None:
        if self.path is not None:
            sep = SEPARATORS[self.path.suffix.lower()]
            put_file(self.path, self.frame().to_csv(sep=sep, index=False, float_format="%.6g").encode())


def _columns(labels: Iterable[str]) -> list[str]:
    return ["path", "output", *labels, "status", *METRICS, "seconds", "warnings", "error"]


def _is_summary(path: Path) -> bool:
    """Whether a file starts with the columns of a summary, or is empty."""
    if not path.is_file():
        return False
    if not path.stat().st_size:
        return True  # an empty file, as tempfile or touch make it: nothing is lost
    with path.open("rb") as file:
        header = file.readline(4096).decode("utf-8", "replace").rstrip("\r\n")
    columns = header.split(SEPARATORS[path.suffix.lower()])
    expected = _columns(name for name in LABELS if name in columns)
    # Earlier versions wrote no `known_sections`.
    return columns in (expected, [name for name in expected if name != "known_sections"])


# --- Tasks -----------------------------------------------------------------------------------------------------------


def _results(
    client: Client, todo: dict[int, tuple[Job, HE2Gene]], killed: list[int] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Predict the slides; yield the row of each when it is done. Slides whose workers died are added to ``killed``, if given."""
    from distributed import KilledWorker, as_completed

    from ..inference import send

    session = {name: getattr(settings, name) for name in ("device", "memory_limit", "n_readers")}
    # Each model is sent once.
    models = {id(model): model for _, model in todo.values()}
    sent = {key: send(client, model) for key, model in models.items()}
    futures = {}
    for number, (job, model) in todo.items():
        key = f"predict-{job.output.name}-{uuid.uuid4().hex}"
        futures[client.submit(run, job, sent[id(model)], session, pure=False, key=key)] = number
    try:
        for future in as_completed(futures):
            number = futures[future]
            error = future.exception() if future.status == "error" else None
            is_killed = isinstance(error, KilledWorker)
            if is_killed and killed is not None:
                killed.append(number)
                continue
            if future.status == "finished":
                row = future.result()
            elif is_killed:
                row = _failed(
                    "the worker died each time it predicted this slide, perhaps from lack of memory: use fewer workers, or check "
                    f"their logs ({error})"
                )
            else:
                row = _failed(f"the task was {future.status}" if error is None else f"{type(error).__name__}: {error}")
            yield number, row
    finally:
        client.cancel(list(futures))


def _failed(error: str) -> dict[str, Any]:
    return {"status": "failed", "error": error, "seconds": math.nan}


def run(job: Job, model: HE2Gene, session: dict[str, Any]) -> dict[str, Any]:
    """Predict one slide in a worker; return its row of the table."""
    import dask
    from distributed import get_worker

    # Compute dask arrays of a slide in its worker: new tasks would wait behind other slides.
    own = dask.config.set(scheduler="threads", num_workers=get_worker().state.nthreads)
    hint = use_mpp_hint("pass mpp={mpp} (--mpp {mpp}), or add a column `mpp` to the manifest")
    quiet = _settings({**session, "show_progress_bar": False})
    with _SLIDE_LOCK, own, hint, warnings.catch_warnings(record=True) as caught, quiet:
        warnings.simplefilter("default")
        began = time.perf_counter()
        try:
            # A worker that died may have saved the slide before.
            found = find_finished(job, model)
            if found is None:
                predict_slide(job, model)
                row = {"status": "predicted", **slide_summary(job, model)}
            else:
                row = {"status": "skipped", **found}
        except Exception as error:  # noqa: BLE001 - the other slides go on after any error
            # Another process may have predicted the same slide meanwhile.
            found = find_finished(job, model)
            row = _failed(f"{type(error).__name__}: {error}") if found is None else {"status": "skipped", **found}
        messages = dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning)
        return {**row, "seconds": round(time.perf_counter() - began, 3), "warnings": " | ".join(messages)}


@contextlib.contextmanager
def _settings(session: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(settings, name) for name in session}
    try:
        for name, value in session.items():
            setattr(settings, name, value)
        yield
    finally:
        vars(settings).update(before)
