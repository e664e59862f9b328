"""Output of ``he2gene benchmark``: the table as CSV and markdown, and a figure."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_PATIENTS_DISJOINT = "patients disjoint, 8 folds, 250 genes, labels smoothed 3 × 3, those of the test too"
#: Mean Pearson correlation per gene as published, by data and protocol; protocols differ by more than the methods do.
PUBLISHED = {
    "her2st": {
        _PATIENTS_DISJOINT: (
            "ST-Net 0.194, HisToGene 0.168, Hist2ST 0.118, EGN 0.197, BLEEP 0.151, TRIPLEX 0.314, Gene-DML 0.331"
        ),
        "one section held out, its siblings in training, 785 genes": (
            "ST-Net 0.056, HisToGene 0.084, Hist2ST 0.144, THItoGene 0.173, BLEEP 0.187, mclSTExp 0.230, CHRep 0.273"
        ),
    },
    "hbcis": {
        _PATIENTS_DISJOINT: "ST-Net 0.116, HisToGene 0.100, EGN 0.111, BLEEP 0.095, TRIPLEX 0.206, Gene-DML 0.237",
    },
}
_RELIABLE = "called reliable"
#: Units that are held out, those of a new patient first.
_UNITS = {
    "patient": "Patients held out (a new patient)",
    "section": "Sections held out, others of the patient in training (a known patient)",
}


def write(table: pd.DataFrame, data: str, out: Path, command: str) -> list[Path]:
    """Write ``benchmark.csv``, ``benchmark.md`` (with the command) and ``benchmark.png`` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"benchmark.{kind}" for kind in ("csv", "md", "png")]
    table.to_csv(files[0], index=False, float_format="%.4f")
    files[1].write_text(markdown(table, data, command), encoding="utf-8")
    figure(table, files[2])
    return files


def markdown(table: pd.DataFrame, data: str, command: str) -> str:
    """Return tables per section, their limits, and published figures with their protocol."""
    units = []
    for unit in _units(table):
        part = table[table["folds"] == unit]
        panels = [
            (f"{name.capitalize()} (on a new patient)", _reliable(rows))
            if name == _RELIABLE
            else (name.capitalize(), _panel(rows))
            for name, rows in part.groupby("panel", sort=False)
        ]
        unreliable = sorted(set(part["section"]) - set(part.loc[part["panel"] == _RELIABLE, "section"]))
        units.append((_UNITS[unit], panels, unreliable))
    n_sections = table.drop_duplicates("section").groupby("patient").size()
    environment = Environment(
        loader=PackageLoader("he2gene_sc", "benchmark"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.md.j2").render(
        data=data,
        command=command,
        units=units,
        patients=sorted(n_sections.index),
        alone=n_sections.index[n_sections == 1].tolist(),
        published=list(PUBLISHED.get(data, {}).items()),
    )


def _units(table: pd.DataFrame) -> list[str]:
    return [unit for unit in _UNITS if unit in set(table["folds"])]


def _panel(rows: pd.DataFrame) -> list[list[str]]:
    first = rows.drop_duplicates("section").set_index("section")
    sections = list(first.index)
    lines = [["", *(f"{name} ({first.loc[name, 'patient']})" for name in sections), "median skill"]]
    for predictor, group in rows.groupby("predictor", sort=False):
        cells = dict.fromkeys(sections, "was trained on")
        for row in group.itertuples():
            with_interval = f"{row.pearson:.3f} ({row.low:.2f} to {row.high:.2f})"
            cells[row.section] = "–" if pd.isna(row.pearson) else with_interval
        lines.append([predictor, *cells.values(), f"{group['skill'].median():.3f}"])
    return [*lines, ["noise ceiling", *(f"{ceiling:.3f}" for ceiling in first["ceiling"]), ""]]


def _reliable(rows: pd.DataFrame) -> list[list[str]]:
    lines = [["", "section", "genes called reliable", "mean Pearson", "share above 0.1"]]
    for row in rows.itertuples():
        lines.append([row.predictor, row.section, f"{row.n_genes:,}", f"{row.pearson:.3f}", f"{row.above:.0%}"])
    return lines


def figure(table: pd.DataFrame, path: Path) -> None:
    """Draw a panel for each kind of fold: a row per predictor, a dot per section, and the noise ceiling behind."""
    shown = table[(table["panel"] == table["panel"].iloc[0]) & table["pearson"].notna()]
    units = _units(shown)
    predictors = list(dict.fromkeys(shown["predictor"]))[::-1]
    fig = Figure(figsize=(4.5 * len(units) + 2.5, 0.45 * len(predictors) + 1.6), layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(1, len(units), sharey=True, squeeze=False)[0]
    colours = {patient: f"C{i}" for i, patient in enumerate(dict.fromkeys(shown["patient"]))}
    for ax, unit in zip(panels, units, strict=True):
        part = shown[shown["folds"] == unit]
        ax.axvspan(part["ceiling"].min(), part["ceiling"].max(), color="0.9", zorder=0)
        for patient, rows in part.groupby("patient", sort=False):
            ax.plot(
                rows["pearson"],
                [predictors.index(name) for name in rows["predictor"]],
                "o",
                color=colours[patient],
                alpha=0.8,
                label=f"a section of patient {patient}",
            )
        ax.axvline(0, color="0.6", linewidth=0.8)
        ax.set(
            title=f"{unit}s held out",
            xlabel=f"mean Pearson, {shown['panel'].iloc[0]} genes",
            yticks=range(len(predictors)),
        )
        ax.set_yticklabels(predictors)
    panels[0].legend(loc="lower right", fontsize="small", title="grey: noise ceiling", title_fontsize="small")
    fig.savefig(path, dpi=120)
