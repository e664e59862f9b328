"""Output of ``he2gene benchmark``: the table as CSV and markdown, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

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
#: Fewest patients for conclusions about patients in general.
_MIN_PATIENTS = 8


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
    lines = [f"# Benchmark: {data}", "", f"Made by `{command}`.", "", *_introduction()]
    for unit in _units(table):
        part = table[table["folds"] == unit]
        lines += ["", f"## {_UNITS[unit]}"]
        for panel, rows in part.groupby("panel", sort=False):
            lines += [
                "",
                f"### {panel[:1].upper()}{panel[1:]}{' (on a new patient)' if panel == _RELIABLE else ''}",
                "",
                *(_reliable(rows) if panel == _RELIABLE else _panel(rows)),
            ]
        if none := sorted(set(part["section"]) - set(part.loc[part["panel"] == _RELIABLE, "section"])):
            lines += ["", f"No gene is called reliable on a new patient in {', '.join(none)}."]
    lines += ["", "## What cannot be concluded", "", *_limits(table)]
    if data in PUBLISHED:
        lines += [
            "",
            "## Published figures",
            "",
            "Mean Pearson per gene, each under its own protocol. Comparable only within a row, and not with the tables above.",
            "",
            "| protocol | figures |",
            "|---|---|",
            *(_row(entry) for entry in PUBLISHED[data].items()),
        ]
    return "\n".join(lines) + "\n"


def _units(table: pd.DataFrame) -> list[str]:
    return [unit for unit in _UNITS if unit in set(table["folds"])]


def _introduction() -> list[str]:
    return [
        "Mean Pearson correlation per gene over the spots of the held-out section, on unsmoothed counts as natural log of "
        "(1 + counts per 10,000). A constant gene counts as 0. Brackets: 95 % of a bootstrap over 800 µm blocks of the section, which "
        "does not cover other sections or patients. Genes are chosen on the training sections of the fold. *Skill* is the share of the "
        "squared error of the training mean that a predictor removes, median over genes; below 0 it is worse than that mean. The "
        "*noise ceiling* is the correlation of a perfect prediction with these counts.",
        "",
        "![Mean Pearson of each predictor, one dot per held-out section](benchmark.png)",
    ]


def _panel(rows: pd.DataFrame) -> list[str]:
    sections = list(dict.fromkeys(rows["section"]))
    first = rows.drop_duplicates("section").set_index("section")
    head = ["", *(f"{name} ({first.loc[name, 'patient']})" for name in sections), "median skill"]
    lines = [_row(head), _row(["---"] * len(head))]
    for predictor, group in rows.groupby("predictor", sort=False):
        by_section = group.set_index("section")
        cells = [
            _with_interval(by_section.loc[name]) if name in by_section.index else "was trained on" for name in sections
        ]
        lines.append(_row([predictor, *cells, f"{group['skill'].median():.3f}"]))
    lines.append(_row(["noise ceiling", *(f"{first.loc[name, 'ceiling']:.3f}" for name in sections), ""]))
    return lines


def _reliable(rows: pd.DataFrame) -> list[str]:
    lines = [_row(["", "section", "genes called reliable", "mean Pearson", "share above 0.1"]), _row(["---"] * 5)]
    for row in rows.itertuples():
        lines.append(_row([row.predictor, row.section, f"{row.n_genes:,}", f"{row.pearson:.3f}", f"{row.above:.0%}"]))
    return lines


def _with_interval(row: pd.Series) -> str:
    if pd.isna(row["pearson"]):
        return "–"
    return f"{row['pearson']:.3f} ({row['low']:.2f} to {row['high']:.2f})"


def _limits(table: pd.DataFrame) -> list[str]:
    patients = sorted(set(table["patient"]))
    lines = [
        "- *Sections held out* is evidence about another section of a patient with measured sections, not about a new patient."
    ]
    if len(patients) == 1:
        lines.append(f"- All sections are of patient {patients[0]}: there is no evidence about any other.")
    elif len(patients) < _MIN_PATIENTS:
        lines.append(
            f"- The sections come from {len(patients)} patients ({', '.join(patients)}), so *Patients held out* has {len(patients)} "
            "folds. They are too few for a mean or an interval over patients, and say nothing about patients in general."
        )
    n_sections = table.drop_duplicates("section").groupby("patient").size()
    if alone := n_sections.index[n_sections == 1].tolist():
        lines.append(
            f"- One section only: patient {', '.join(alone)}. Held out as a section, it is a new patient, and both figures agree."
        )
    if {"A", "C"} <= set(patients):
        lines.append(
            "- The images of patient A are reduced copies, five times coarser (3.2 against 0.69 µm/px). Held out, A is a new patient "
            "and a new resolution."
        )
    return [
        *lines,
        "- *Class mean* and *total counts* use data that an image does not contain: the true label of each held-out spot, and "
        "its depth. They are references, not competitors.",
        "- The features of the ridges are standardised over all training sections together, a handicap if the stains of the "
        "training patients differ. Trained on sections of one patient, the ridges predict its other sections better.",
        "- Penalties and panels are chosen within the training sections of a fold. The recipe of the preset `default` was "
        "chosen on these sections (see Experiments), so its metrics are optimistic.",
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def figure(table: pd.DataFrame, path: Path) -> None:
    """Draw a panel for each kind of fold: a row per predictor, a dot per section, and the noise ceiling behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
