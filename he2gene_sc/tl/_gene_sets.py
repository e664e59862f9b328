"""Gene sets from a table, a mapping or a GMT file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.genes import find_genes


def import_decoupler(verb: str) -> Any:
    """Import decoupler, an optional dependency."""
    try:
        import decoupler
    except ImportError as error:
        raise ImportError(f"{verb} needs decoupler: pip install 'he2gene_sc[enrichment]'") from error
    return decoupler


def read_net(net: Any) -> pd.DataFrame:
    """Read gene sets into the table that decoupler uses: ``source``, ``target`` and, if given, ``weight``."""
    if not isinstance(net, Mapping | pd.DataFrame):
        path = Path(net).expanduser() if isinstance(net, str | Path) else None
        if path is None or not path.is_file():
            raise ValueError(
                f"`net`: file {str(net)!r} does not exist; a DataFrame, a GMT file or a mapping of sets to genes is needed"
            )
        net = _read_gmt(path)
    if isinstance(net, Mapping):
        weighted = any(isinstance(genes, Mapping) for genes in net.values())
        sets = {
            name: genes if isinstance(genes, Mapping) else dict.fromkeys(validate.names(genes, "net", one=True), 1.0)
            for name, genes in net.items()
        }
        rows = [(name, gene, weight) for name, genes in sets.items() for gene, weight in genes.items()]
        net = pd.DataFrame(rows, columns=["source", "target", "weight"])
        net = net if weighted else net.drop(columns="weight")
    if missing := [name for name in ("source", "target") if name not in net]:
        raise ValueError(f"`net` has no column {missing[0]!r}; 'source' (the set) and 'target' (the gene) are needed")
    if (twice := net.columns[net.columns.duplicated()].intersection(["source", "target", "weight"])).size:
        raise ValueError(f"`net` has two columns {twice[0]!r}; rename or drop one")
    net = net[[name for name in ("source", "target", "weight") if name in net]].dropna(subset=["source", "target"])
    net = net.assign(**{name: net[name].astype(object).map(lambda text: str(text).strip()) for name in net.columns[:2]})
    net = net.drop_duplicates()
    weights = pd.to_numeric(net["weight"], errors="coerce") if "weight" in net else pd.Series(1.0, net.index)
    if not np.isfinite(weights).all():
        raise ValueError("`net`: 'weight' is not a finite number in some rows; leave these rows or the column out")
    # Factor loadings list every gene, most with weight 0.
    net = net[weights != 0]
    if net.empty and len(weights):
        raise ValueError(
            "`net`: 'weight' is 0 in all rows; give the genes of a set nonzero weights, or leave the column out"
        )
    duplicated = net.duplicated(["source", "target"])
    if duplicated.any():
        source, target = net.loc[duplicated, ["source", "target"]].iloc[0]
        raise ValueError(
            f"`net` names gene {target!r} twice in set {source!r}, with different weights; keep one row of each gene"
        )
    return net.reset_index(drop=True)


def _read_gmt(path: Path) -> dict[str, list[str]]:
    """Read a GMT file, split at tabs only: names of sets may contain spaces, and the description may be empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`net`: {str(path)!r} is compressed, or its text is not UTF-8 ({error})") from None
    lines = [line.split("\t") for line in text.splitlines() if line.strip()]
    if not lines or any(len(line) < 3 for line in lines):
        raise ValueError(
            f"`net`: {str(path)!r} is not a GMT file; each line must have a name, a description and genes, separated by tabs"
        )
    sets: dict[str, list[str]] = {}
    for name, _, *parts in lines:
        # Enrichr appends weights after a comma.
        genes = [gene for part in parts if (gene := part.partition(",")[0].strip())]
        if set(sets.setdefault(name.strip(), genes)) != set(genes):
            raise ValueError(
                f"`net`: {str(path)!r} has two sets called {name.strip()!r}, with different genes; rename one, or leave it out"
            )
    return sets


def name_genes(net: pd.DataFrame, genes: pd.Index) -> str:
    """Name some genes of the sets and of the data, for errors about sets without genes."""
    targets = net["target"].unique()
    return f"the sets name genes such as {list(targets[:3])}, the data {list(genes[:3])}"


def select_sets(net: pd.DataFrame, genes: pd.Index, least: int) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Return the sets with at least ``least`` of the genes, but not all of them, and the number of genes of every set."""
    renamed = rename_targets(net, genes)
    weights = weights_by_set(renamed[renamed["target"].isin(genes)])
    sizes = {name: len(weights.get(name, ())) for name in net["source"].unique()}
    return {name: weights[name] for name, n in sizes.items() if least <= n < len(genes)}, sizes


def weights_by_set(net: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return the weights of the genes of each set, in the order of the net; 1 if it has no weights."""
    weights = net["weight"].astype(float) if "weight" in net else pd.Series(1.0, index=net.index)
    return {
        str(name): dict(zip(rows["target"].astype(str), weights[rows.index], strict=True))
        for name, rows in net.groupby("source", sort=False)
    }


def membership(sets: Mapping[str, Mapping[str, float]], genes: pd.Index) -> np.ndarray:
    """Return the weights ``(g, sets)`` of genes in sets, 0 for genes outside a set."""
    rows = {gene: row for row, gene in enumerate(genes)}
    matrix = np.zeros((len(genes), len(sets)))
    for column, weights in enumerate(sets.values()):
        members = [gene for gene in weights if gene in rows]
        matrix[[rows[gene] for gene in members], column] = [weights[gene] for gene in members]
    return matrix


def rename_targets(net: pd.DataFrame, genes: pd.Index) -> pd.DataFrame:
    """Rename targets to the names in ``genes`` if HGNC has changed their symbol."""
    targets = pd.Index(net["target"].unique())
    positions = find_genes(targets, genes)
    names = {target: genes[position] for target, position in zip(targets, positions, strict=True) if position >= 0}
    renamed = net.assign(target=net["target"].map(lambda target: names.get(target, target)))
    return renamed.drop_duplicates(["source", "target"])
