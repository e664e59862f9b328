"""``he2gene predict``: one slide, or many on dask.distributed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Json, records, say, say_json, say_list, say_table, split_names

if TYPE_CHECKING:
    import pandas as pd

    from ..models import HE2Gene

MODEL = "breast-her2st"
#: Columns of the summary of a slide by their names in the output, with their format.
_COLUMNS = {
    "spots": ("spots", ",.0f"),
    "µm/px": ("mpp", ".3g"),
    "on tissue": ("share_on_tissue", ".0%"),
    "like training": ("share_like_training", ".0%"),
    "annotated": ("share_annotated", ".0%"),
}


def predict(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="SpatialData zarr stores, or H&E images (jpg, png, tif, svs, ndpi, scn).", show_default=False
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="csv or tsv file instead of PATHS: a column path; other columns are arguments of hg.tl.predict."
        ),
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="µm per pixel of the full-resolution image.")] = None,
    model: Annotated[str, typer.Option(help="Bundled model or model folder.")] = MODEL,
    out: Annotated[
        Path | None, typer.Option(help="Store to write, for one slide; default: update PATH, or PATH.zarr.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option(help="Folder for the stores of many slides.")] = None,
    image_key: Annotated[str | None, typer.Option(help="Image, if the store has several.")] = None,
    shapes_key: Annotated[str | None, typer.Option(help="Spots, if the store has several.")] = None,
    table_key: Annotated[str | None, typer.Option(help="Table, if the store has several.")] = None,
    coordinate_system: Annotated[
        str | None, typer.Option(help="Coordinate system, if image and spots share several.")
    ] = None,
    key_added: Annotated[str, typer.Option(help="Prefix of all keys that are written.")] = "he2gene",
    genes: Annotated[
        list[str],
        typer.Option(
            callback=split_names,
            help="Genes to predict; default: all that table and model share. Repeatable, or with commas.",
        ),
    ] = [],  # noqa: B006 - typer wants a list
    all_genes: Annotated[bool, typer.Option("--all-genes", help="Predict all model genes, into a new table.")] = False,
    tta: Annotated[
        bool | None,
        typer.Option(help="Average the eight symmetries: slower, slightly better. Default: as in the model card."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Spots per batch. It does not change the result.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    no_image: Annotated[
        bool, typer.Option("--no-image", help="Write OUT without the pixels. It cannot be predicted again.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace another store at OUT, or changes that others saved to PATH meanwhile. For many slides: also "
            "predict finished ones again.",
        ),
    ] = False,
    pitch_um: Annotated[float, typer.Option(help="Distance of the pseudo-spots of a bare image, µm.")] = 100.0,
    tissue_method: Annotated[
        str, typer.Option(help="Tissue mask of a bare image: auto, otsu, felzenszwalb, weka, glass.")
    ] = "auto",
    allow_encoder_source: Annotated[
        bool,
        typer.Option(
            "--allow-encoder-source", help="Allow the card of MODEL to name a repository or folder of its encoder."
        ),
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Address of a dask scheduler, tcp://HOST:8786; default: a local cluster."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers of the local cluster; default: one per GPU, else by cores and memory.")
    ] = None,
    summary: Annotated[Path | None, typer.Option(help="CSV file to write: a row per slide.")] = None,
    as_json: Json = False,
) -> None:
    """Predict stores or bare images. A bare image first gets a tissue mask and a grid of 100 µm pseudo-spots.

    A store is updated in place: only its tables are written. Many slides are predicted in parallel; finished slides are skipped, a
    slide that fails does not stop the others, and the exit status is 1 if one failed.
    """
    from .._core import validate
    from ..models import load
    from ..pp._tissue import METHODS

    validate.one_of(tissue_method, METHODS, "tissue_method")
    validate.in_range(pitch_um, "pitch_um", above=0)
    if genes and all_genes:
        raise ValueError("--genes and --all-genes exclude each other; pass only one of them")
    if bool(paths) == (manifest is not None):
        raise ValueError("either PATHS or --manifest is needed")
    if manifest is not None and manifest.suffix.lower() not in (".csv", ".tsv"):
        raise ValueError(f"--manifest {str(manifest)!r} ends in {manifest.suffix!r}; a .csv or .tsv file is needed")
    options = {
        "image_key": image_key,
        "shapes_key": shapes_key,
        "table_key": table_key,
        "coordinate_system": coordinate_system,
        "mpp": mpp,
        "genes": "all" if all_genes else genes or None,
        "key_added": key_added,
        "tta": tta,
        "batch_size": batch_size,
        "device": device,
    }
    of_image = {"pitch_um": pitch_um, "tissue_method": tissue_method}
    loaded = load(model, allow_encoder_source=allow_encoder_source)
    if paths and len(paths) == 1 and {out_dir, scheduler, workers, summary} == {None}:
        further = {**of_image, "keep_image": not no_image, "overwrite": overwrite}
        _predict_one(paths[0], out, options, further, loaded, as_json=as_json)
        return
    if out is not None and (manifest is not None or len(paths or []) > 1):
        raise ValueError("--out is for one slide; name a folder with --out-dir, or a column `output` in the manifest")
    from .. import cohort

    given: Any = manifest if manifest is not None else paths
    if out is not None:
        import pandas as pd

        given = pd.DataFrame({"path": given, "output": [out]})
    shared: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    with _client(scheduler, workers) as client:
        frame = cohort.predict(
            given,
            client,
            output_dir=out_dir,
            summary=summary,
            overwrite=overwrite,
            keep_images=not no_image,
            n_workers=workers,
            **{**shared, **of_image, "model": loaded},
        )
    _print(frame, summary, as_json=as_json)
    if (frame["status"] == "failed").any():
        raise typer.Exit(1)


def _predict_one(
    path: Path, out: Path | None, options: dict[str, Any], further: dict[str, Any], model: HE2Gene, *, as_json: bool
) -> None:
    import pandas as pd

    from .._core import validate
    from .._core.hints import use_mpp_hint
    from .._core.stores import resolved
    from ..cohort._job import Job, output_of, slide_summary
    from ..cohort._slide import predict_slide

    path = validate.folder_or_file(path, "PATH")
    out = None if out is None else validate.folder_or_file(out, "--out")
    job = Job(path, output_of(path) if out is None else resolved(out), options, **further)
    with use_mpp_hint("give --mpp {mpp}"):
        written = predict_slide(job, model)
    row = {"path": str(path), "output": str(written), "status": "predicted", **slide_summary(job, model)}
    _print(pd.DataFrame([row]), None, as_json=as_json)


def _client(scheduler: str | None, workers: int | None) -> Any:
    from contextlib import nullcontext

    if scheduler is None:
        return nullcontext()
    from .._core import validate

    validate.name(scheduler, "--scheduler")
    if workers is not None:
        raise ValueError("--workers is for a local cluster, but --scheduler has its own workers; pass only one of them")
    from distributed import Client

    try:
        return Client(scheduler)
    except (OSError, ValueError) as error:
        raise OSError(f"--scheduler {scheduler!r} cannot be reached: {error}") from error


def _print(frame: pd.DataFrame, summary: Path | None, *, as_json: bool) -> None:
    rows = records(frame)
    for row in rows:
        for message in filter(None, (row.get("warnings"), row.get("error"))):
            say(f"he2gene: {row['path']}: {message}", err=True)
    if as_json:
        say_json(rows)
        return
    trained_on = any(row["known_sections"] for row in rows)
    shown = [
        {"slide": Path(row["path"]).name, "status": row["status"]}
        | {name: "" if row[key] is None else format(row[key], style) for name, (key, style) in _COLUMNS.items()}
        | {"verdict": row["verdict"] or ""}
        | ({"trained on": row["known_sections"]} if trained_on else {})
        for row in rows
    ]
    if len(rows) > 1:
        say_table(f"{len(rows)} slides", shown)
    else:
        say_list(rows[0]["path"], shown[0])
    for row in rows:
        if row["status"] != "failed":
            say(f"{'Written' if row['status'] == 'predicted' else 'Finished before'}: {row['output']}")
    if len(rows) > 1:
        counts = frame["status"].value_counts()
        say(f"{len(rows)} slides: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    if summary is not None:
        say(f"Written: {summary}")
