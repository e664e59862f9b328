"""``he2gene demo | predict | report | train | evaluate | benchmark | info``: the commands."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .output import Command, Json, records, say, say_evaluation, say_json, say_list, say_table, split_names
from .prediction import MODEL as _MODEL
from .prediction import predict

app = typer.Typer(
    help="Gene expression and pathology annotation from H&E images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # rich markup would read [train] as a style
)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"he2gene_sc {version('he2gene_sc')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command(cls=Command)
def demo(
    section: Annotated[str, typer.Option(help="her2st section; the bundled model was not trained on C5.")] = "C5",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("he2gene-demo"),
    model: Annotated[str, typer.Option(help="Bundled model or model folder.")] = _MODEL,
    as_json: Json = False,
) -> None:
    """Predict a real breast section, compare it with measured expression, and write figures and tables.

    her2st is taken from HE2GENE_DATA_DIR, else from the internet; if neither is available, a synthetic slide is used.
    """
    from ..io._files import check_folder
    from ..models import load
    from .demo import run

    check_folder(out, "--out")
    panels = run(section, out, load(model), partial(say, err=as_json), partial(say_table, err=as_json))
    if as_json:
        say_json({"output": str(out), "panels": records(panels)})


app.command(cls=Command)(predict)


@app.command(cls=Command)
def report(
    stores: Annotated[
        list[Path],
        typer.Argument(
            help="Predicted store; or several, a folder of stores, or the summary of `he2gene predict --summary`."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Page to write, or folder for many slides; default: report.html, reports. Earlier reports are replaced."
        ),
    ] = None,
    genes: Annotated[
        list[str], typer.Option(callback=split_names, help="Genes that are always shown. Repeatable, or with commas.")
    ] = [],  # noqa: B006
    model: Annotated[str | None, typer.Option(help="Model of the prediction, if it is not bundled.")] = None,
    prediction_key: Annotated[str, typer.Option(help="Prefix of the prediction's keys.")] = "he2gene",
    table_key: Annotated[str | None, typer.Option(help="Table, if several were predicted.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file at OUT that is not a report.")] = False,
    as_json: Json = False,
) -> None:
    """Write an HTML report of a predicted slide, with figures included; for many slides, an index and a page each."""
    import matplotlib as mpl

    from .._report.report import report as write

    mpl.use("Agg")
    path = write(
        stores[0] if len(stores) == 1 else stores,
        out,
        genes=genes,
        model=model,
        prediction_key=prediction_key,
        table_key=table_key,
        overwrite=overwrite,
    )
    if as_json:
        say_json({"output": str(path)})
    else:
        say(f"Written: {path}")


@app.command(cls=Command)
def train(
    config: Annotated[Path, typer.Argument(help="TOML file: the sections, and arguments of hg.tl.train.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another model at OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model, deterministically on the CPU.

    The file has a table [train] with arguments of hg.tl.train ([train.preset], [train.keys], [train.genes], [train.classes]
    and [train.card] are tables of their fields) and names the sections: a table [data] with `stores`, a list of SpatialData
    stores with one or more sections each; or with `hbcis`, the folder of that data set, and `patients`, a list,
    "HE2GENE_SPLIT.train" or "HE2GENE_SPLIT.test"; or with `hest`, a folder of HEST-1k, and `ids`, `organ`, `species` or
    `technology`; or a list `sections` of her2st sections. Paths in the file are relative to it.
    """
    from .. import tl
    from .._core import validate
    from .._core.hints import use_mpp_hint
    from ..models._folder import check_place
    from .training_file import read_training_file

    if (check_place(validate.folder_or_file(out, "--out")) / "card.json").exists() and not overwrite:
        raise FileExistsError(f"OUT {str(out)!r} holds a model; --overwrite replaces it after training")
    sections, options = read_training_file(config, out)
    with use_mpp_hint("set mpp = {mpp} in [train.keys]"):
        trained = tl.train(sections, **options)
    from ..training._gradient.fit import is_first_process

    # With several devices, every process reaches this line, with the same model.
    if is_first_process():
        trained.save(out)
        card = trained.card
        if as_json:
            say_json({"output": str(out), "card": json.loads(card.to_json())})
        else:
            say_list(f"{card.name} {card.version}", card.facts())
            say(f"Written: {out}")


@app.command(cls=Command)
def benchmark(
    data: Annotated[str, typer.Option(help="her2st or hbcis.")] = "her2st",
    root: Annotated[Path | None, typer.Option(help="Folder of HBCIS; her2st is taken from HE2GENE_DATA_DIR.")] = None,
    model: Annotated[
        list[str],
        typer.Option(
            help="Preset of hg.tl.train, trained in each fold, or a model, scored on sections it was not trained on. Repeatable."
        ),
    ] = ["default"],  # noqa: B006 - typer wants a list
    folds: Annotated[
        list[str],
        typer.Option(help="Unit that is held out: section, patient. Repeatable; default: both if possible."),
    ] = [],  # noqa: B006
    section: Annotated[list[str], typer.Option(help="Sections to use; default: all with an image. Repeatable.")] = [],  # noqa: B006
    options: Annotated[
        Path | None, typer.Option(help="TOML: a table for each preset, with arguments of hg.tl.train.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder to cache the features of the encoder.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for benchmark.csv, .md and .png.")] = Path("he2gene-benchmark"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Cross-validate presets and baselines by section or patient of a data set; write table and figure."""
    from ..io._files import check_folder, check_own_files
    from .training_file import read_toml, train_options

    check_folder(out, "--out")
    others = [out / f"benchmark.{kind}" for kind in ("md", "png")]
    check_own_files(out / "benchmark.csv", "folds,section,patient,predictor,", "--out", others)
    if cache is not None:
        check_folder(cache, "--cache")
    if data not in ("her2st", "hbcis"):
        raise ValueError(f"--data is {data!r}, valid: ['her2st', 'hbcis']")
    # Heavy imports, after the checks.
    from ..benchmark import cross_validation
    from ..benchmark import report as benchmark_report

    if data == "her2st":
        source = cross_validation.her2st(section)
    elif root is None:
        raise ValueError("--data hbcis needs --root, the unpacked folder of Mendeley Data 29ntw7sh4r")
    else:
        source = cross_validation.hbcis(root, section)
    units = folds or ["section"] + ["patient"] * (len(set(source.patients.values())) > 1)
    tables, file = ({}, "") if options is None else (read_toml(options), options.name)
    if unread := sorted(tables.keys() - set(model)):
        raise ValueError(f"--options has tables {unread} that are not among --model {model}")
    settings = {}
    for preset, given in tables.items():
        where = f"{file}: [{preset}]"
        recipe = given.get("preset", {}) if isinstance(given, dict) else None
        if not isinstance(recipe, dict):
            raise ValueError(
                f"{where} is {given!r}; a table is needed, whose `preset` is a table of the fields to change"
            )
        genes = given.get("genes", {})
        genes = {"missing_genes_are_zero": True} | (genes if isinstance(genes, dict) else {"genes": genes})
        settings[preset] = train_options({**given, "preset": {"name": preset, **recipe}, "genes": genes}, where)
    echo = partial(say, err=True)
    table = cross_validation.run(source, model, units, cache=cache, options=settings, device=device, echo=echo)
    shown = {"data": [data], "model": model, "folds": units, "section": section, "options": [file] * bool(file)}
    words = [f"--{name} {value}" for name, values in shown.items() for value in values]
    written = benchmark_report.write(table, data, out, " ".join(["he2gene benchmark", *words]))
    if as_json:
        say_json(records(table))
        return
    for (unit, panel), part in table.groupby(["folds", "panel"], sort=False):
        means = part.groupby("predictor", sort=False)["pearson"].mean().dropna()
        say_list(f"{unit}s held out, {panel}: mean Pearson", {name: f"{mean:.3f}" for name, mean in means.items()})
    for path in written:
        say(f"Written: {path}")


@app.command(cls=Command)
def evaluate(
    path: Annotated[Path, typer.Argument(help="SpatialData zarr store with predicted and measured expression.")],
    out: Annotated[
        Path | None, typer.Option(help="CSV file to write: metrics of each gene. An earlier one is replaced.")
    ] = None,
    layer: Annotated[
        str, typer.Option(help="Layer to evaluate: that of the prediction, or an adapted one.")
    ] = "he2gene",
    prediction_key: Annotated[str, typer.Option(help="Prefix of the prediction's keys.")] = "he2gene",
    genes: Annotated[
        list[str],
        typer.Option(callback=split_names, help="Genes to evaluate; default: all. Repeatable, or with commas."),
    ] = [],  # noqa: B006
    measured: Annotated[str | None, typer.Option(help="Layer of raw counts; default: X.")] = None,
    measured_scale: Annotated[str, typer.Option(help="auto, counts, log.")] = "auto",
    annotation_key: Annotated[
        str | None, typer.Option(help="Column of obs with labels, to evaluate the annotation.")
    ] = None,
    sample_key: Annotated[str, typer.Option(help="Column of obs with the patient.")] = "patient",
    section_key: Annotated[str, typer.Option(help="Column of obs with the section.")] = "section",
    model: Annotated[str | None, typer.Option(help="Model of the prediction, if it is not bundled.")] = None,
    table_key: Annotated[str | None, typer.Option(help="Table, if several were predicted.")] = None,
    as_json: Json = False,
) -> None:
    """Compare a prediction and baselines with measured expression; print the summary. The store is not changed."""
    from .. import get, tl
    from .._core import validate
    from ..io._files import check_new_file, check_own_files
    from ..io._open import open_store

    if out is not None:
        if validate.folder_or_file(out, "--out").is_dir():
            raise ValueError(f"--out {str(out)!r} is a folder; name a CSV file, {str(out / 'genes.csv')!r} for example")
        check_new_file(out, "--out", overwrite=True)
        check_own_files(out, "gene,scope,section,predictor,", "--out")
    sdata = open_store(path)
    tl.evaluate(
        sdata,
        layer=layer,
        genes=genes or None,
        prediction_key=prediction_key,
        measured=measured,
        measured_scale=measured_scale,  # type: ignore[arg-type]  # evaluate checks it
        annotation_key=annotation_key,
        sample_key=sample_key,
        section_key=section_key,
        model=model,
        table_key=table_key,
    )
    if out is not None:
        get.evaluation(sdata, "genes", table_key=table_key).to_csv(out, index=False, float_format="%.5g")
    if as_json:
        tables = ["summary", "predictors", "left_out"] + ["annotation", "classes"] * (annotation_key is not None)
        found = {name: get.evaluation(sdata, name, table_key=table_key, dropna=False) for name in tables}  # type: ignore[arg-type]
        say_json({name: records(table) for name, table in found.items()})
        return
    say_evaluation(sdata, table_key, annotation=annotation_key is not None)
    if out is not None:
        say(f"Written: {out}")


@app.command(cls=Command)
def info(
    model: Annotated[str, typer.Argument(help="Bundled model or model folder.")] = _MODEL, as_json: Json = False
) -> None:
    """Print the card of a model."""
    from ..models import load

    card = load(model).card
    say(card.to_json() if as_json else card.to_markdown())


def main() -> None:
    """Run the command line; print user errors as one line, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Raised by packages that are compiled on first import.
        warnings.filterwarnings("ignore", category=SyntaxWarning)
        warnings.filterwarnings("ignore", message="zarr v3 autosharding")
        # Print only the message of a warning, not its line of code.
        warnings.showwarning = lambda message, *_, **__: print(f"he2gene: {message}", file=sys.stderr)
        try:
            app()
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
            print(f"he2gene: {error}", file=sys.stderr)
            sys.exit(1)
