"""``hg.tl.domain_preservation``: do predicted clusters keep the annotated domains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ..._core import validate
from ..._core.duplicates import check_duplicate_sections, warn_of_copy
from ..._core.expression import Scale
from ..._core.keys import OWN_TABLE, Keys, check_key
from ..._core.ownership import check_free
from ..._core.predictions import prediction_of
from ..._core.results import write_result
from ..._core.slide import mean_colours
from ..._core.spots import get_table, read_spots, spots_of
from ...stats import MIN_OVERLAP
from . import inputs
from .clusters import CLUSTERINGS, around, cluster, embed, explained, medoid
from .scores import BLIND, Labels, Section, codes_of, moran_agreement, score

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

_VERB = "domain_preservation"
#: Colours of clusters that match no domain, and of domains without colours in ``uns``.
_PALETTE = [
    "#d62728",
    "#2ca02c",
    "#1f77b4",
    "#ffdd57",
    "#9467bd",
    "#ff7f0e",
    "#17becf",
    "#e377c2",
    "#8c564b",
    "#bcbd22",
]
_UNMATCHED = ["#7f7f7f", "#b0b0b0", "#505050", "#d0d0d0", "#303030"]


def domain_preservation(
    data: SpatialData | AnnData,
    domain_key: str,
    *,
    layer: str | None = "he2gene",
    measured: str | None = None,
    n_domains: int | Literal["match"] = "match",
    n_seeds: int = 10,
    n_perms: int = 999,
    sample_key: str = "patient",
    section_key: str = "section",
    clustering: Literal["leiden", "kmeans"] = "leiden",
    genes: Sequence[str] | None = None,
    layer_scale: Scale = "auto",
    measured_scale: Scale = "auto",
    table_key: str | None = None,
    key_added: str = "he2gene_domains",
    seed: int = 0,
) -> None:
    """Test whether clusters of predicted and of measured expression keep the annotated spatial domains.

    Predicted and measured expression of the same genes go through one pipeline: log expression, 20 principal components
    (scanpy), 15 neighbours, Leiden at the resolution that gives as many clusters as there are domains (or k-means).
    Clusters are compared with the domains and with each other, beside references that know less or more: random
    features, the depth of a spot, its mean colour, its coordinates, and the labels of the annotation head, where a missing label
    is one more. The adjusted Rand index is tested against domains shifted over the tissue
    (:func:`he2gene_sc.stats.shift_test`), since shuffled labels lose their spatial autocorrelation and make chance agreement
    look significant. A second p-value tests whether the prediction keeps the domains better than each of depth, colour and
    coordinates, which see no gene.

    Parameters
    ----------
    data
        Object or table, with or without an image.
    domain_key
        Column of ``obs`` with the domains. Spots without a label are clustered, not scored; domains of fewer than 3
        spots in a section have no part in it. Labels that were chosen with the expression in hand
        (``obs["annotation"]`` of her2st outside the annotated sections) favour the expression.
    layer
        Layer of predicted log expression; ``None``: measured expression alone is clustered.
    measured
        Layer of measured counts; ``None``: ``X``. A table that predict made holds nothing measured.
    n_domains
        Clusters to make; ``"match"``: as many as a section has domains.
    n_seeds
        Seeds of the clustering. Their SD says how far the clustering is arbitrary, not how other tissue would do.
    n_perms
        Most shifts to test with. The distinct admissible ones are often fewer: then all are used.
    sample_key
        Column of ``obs`` with the patient, the statistical unit. A table without the default column is of one patient. Patients
        are never clustered together. Sections are scored one by one; the table's lines of section
        ``"all"`` are means over samples, each the mean of its sections, with the SD over samples and no p-value.
    section_key
        Column of ``obs`` with the section. Without the default column the shapes elements are the sections.
    clustering
        ``"leiden"`` or ``"kmeans"``.
    genes
        Used on both sides. Default: the genes that the model card calls reliable; where ``var`` does not tell, the 2,000
        of highest variance in measured log expression.
    layer_scale, measured_scale
        ``"counts"`` or ``"log"``, where looking at the values would refuse them.
    table_key
        Which table, where there are several.
    key_added
        Prefix of what is written.
    seed
        First seed of the clusterings; also of random features, drawn shifts and squidpy's permutations.

    Returns
    -------
    None
        Writes ``.obs["{key_added}_predicted"]`` and ``.obs["{key_added}_measured"]``: clusters of the seed that agrees
        best with the others, named after the domain that they match one to one (``"~name"``) or ``"unmatched i"``,
        colours in ``.uns``; and ``.uns[key_added]``: parameters, genes, and the table that
        :func:`he2gene_sc.get.domains` returns. See :func:`he2gene_sc.pl.domains` for the picture.

    Warns
    -----
    UserWarning
        If domains of too few spots are left out, a section with fewer than two domains is skipped, another number of
        clusters comes out (a graph of neighbours in more parts than domains), fewer than 20 shifts are
        admissible, so that no p-value can be below .05, or none, as where spots stand on no lattice: there is no p-value.

    Raises
    ------
    TypeError
        If ``data`` is neither SpatialData nor AnnData.
    ValueError
        If a column, layer or gene is missing; values are not what they should be; no section has two domains; spots are
        there twice; a parameter is out of range; or ``key_added`` would write over what is not ours.

    Notes
    -----
    The null: the domains are stationary and know nothing of the expression. Tissue whose domains and expression both
    follow the outline of the section (a core and a rim) violates it. Clusters of coordinates do not show a rim; ``pval_better`` does:
    it asks also for more than the part of the prediction that colour, or place with the distance from the middle, explains.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((8, 8), mpp=2.0)
    >>> hg.tl.domain_preservation(sdata, "pathologist", layer=None, n_seeds=2)
    >>> table = hg.get.domains(sdata, score="ari")
    >>> bool(table.set_index("labels")["mean"]["measured"] > 0.5)
    True
    """
    validate.arguments(domain_preservation, locals())
    _check(n_domains, n_seeds, n_perms, clustering, key_added)
    spots = read_spots(
        get_table(data, table_key, layer=layer),
        domain_key,
        "domain_key",
        layer=layer,
        sample_key=sample_key,
        section_key=section_key,
    )
    (table,) = spots.tables
    has_measured = OWN_TABLE not in table.uns
    if layer is None and not has_measured:
        raise ValueError("`layer` is None, but the table was made by hg.tl.predict: nothing in it was measured")
    xy, where = spots_of(table), inputs.sections(spots)
    codes, names = inputs.domains(spots, domain_key, where)
    written = [
        f"{key_added}_{name}" for name, there in (("predicted", layer is not None), ("measured", has_measured)) if there
    ]
    check_free(table, _VERB, key_added, obs=written, uns=[f"{name}_colors" for name in written])
    used, predicted, counted = inputs.genes(
        table, genes, layer, measured, layer_scale=layer_scale, measured_scale=measured_scale, has_measured=has_measured
    )
    if predicted is not None and counted is not None:
        warn_of_copy(predicted, counted, layer)
    _check_varies(where, {"layer": predicted, "measured": counted})
    check_duplicate_sections(
        spots
        if counted is None
        else replace(spots, layer=measured, scale="log" if measured_scale == "log" else "counts")
    )
    depth = inputs.depth(table, measured, measured_scale) if has_measured else None
    prediction = prediction_of(table, layer)
    colour = mean_colours(data, table, prediction)
    given = {"predicted": predicted, "measured": counted, "depth": depth, "mean colour": colour}
    spaces = {name: values for name, values in given.items() if values is not None}
    annotation = table.obs.get(Keys(prediction or layer or "he2gene").annotation)

    how = _Clustering(n_domains, list(range(seed, seed + n_seeds)), n_perms, clustering)
    found = {name: pd.Series(None, index=table.obs_names, dtype=object) for name in written}
    rows: list[dict] = []
    for (sample, section), members in where.groupby(["sample", "section"], sort=False).indices.items():
        scored = _score_section(xy, codes, spaces, annotation, how, members=members, section=section)
        if scored is None:
            continue
        lines, kept, clusters = scored
        rows += [{"sample": sample, "section": section, **line} for line in lines]
        for name, labels in clusters.items():
            found[f"{key_added}_{name}"].iloc[kept] = _named(codes[kept], labels, names)
    if not rows:
        raise ValueError(f"`domain_key` {domain_key!r}: no section has spots of two domains whose expression is known")
    columns, colours = _columns(table, domain_key, found, names)
    write_result(
        table,
        _VERB,
        key_added,
        params={
            "domain_key": domain_key,
            "layer": layer,
            "measured": measured,
            "n_domains": n_domains,
            "n_seeds": n_seeds,
            "n_perms": n_perms,
            "sample_key": sample_key,
            "section_key": section_key,
            "clustering": clustering,
            "seed": seed,
            "min_overlap": MIN_OVERLAP,
        },
        facts={"genes": np.array(used), "table": _with_summary(pd.DataFrame(rows))},
        obs=columns,
        uns=colours,
    )


def _check_varies(where: pd.DataFrame, given: Mapping[str, np.ndarray | None]) -> None:
    """Refuse a section whose spots all have the same expression, before any is clustered."""
    for parameter, values in given.items():
        for (_, section), rows in where.groupby(["sample", "section"], sort=False).indices.items():
            block = None if values is None else values[rows]
            if block is None or not (known := np.isfinite(block).all(axis=1)).any():
                continue
            if known.sum() > 1 and not np.ptp(block[known], axis=0).any():
                what = (
                    "has no counts of the chosen genes"
                    if not block[known].any()
                    else "has the same values at all spots"
                )
                raise ValueError(
                    f"`{parameter}`: section {section!r} {what}, so there is nothing to cluster; leave the section out, or "
                    "name a layer that was measured there"
                )


def _check(n_domains: Any, n_seeds: int, n_perms: int, clustering: str, key_added: str) -> None:
    check_key(key_added, "key_added")
    if n_domains != "match" and not (validate.is_whole(n_domains) and n_domains >= 2):
        raise ValueError(f"`n_domains` is {n_domains!r}; 'match' or a whole number from 2 is needed")
    for name, value in (("n_seeds", n_seeds), ("n_perms", n_perms)):
        validate.whole_number(value, name)
    validate.one_of(clustering, CLUSTERINGS, "clustering")


@dataclass(frozen=True)
class _Clustering:
    """How spots are clustered, and domains shifted."""

    n_domains: int | Literal["match"]
    seeds: list[int]
    n_perms: int
    method: str


def _score_section(
    xy: np.ndarray,
    codes: np.ndarray,
    spaces: Mapping[str, np.ndarray],
    annotation: pd.Series | None,
    how: _Clustering,
    *,
    members: np.ndarray,
    section: str,
) -> tuple[list[dict[str, Any]], np.ndarray, dict[str, np.ndarray]] | None:
    """Lines of the table, the spots that were clustered, and the clusters that are kept of them."""
    from ...stats import admissible_shifts

    seeds, clustering = how.seeds, how.method
    # A spot outside the image has no colour, but may have been measured.
    needed = [spaces[name][members] for name in spaces if name not in BLIND]
    known = np.all([np.isfinite(values).all(axis=1) for values in needed], axis=0)
    spots = members[known]
    labelled = codes[spots] >= 0
    n = len(np.unique(codes[spots][labelled])) if how.n_domains == "match" else int(how.n_domains)
    if len(np.unique(codes[spots][labelled])) < 2:
        warnings.warn(f"section {section!r} has fewer than two domains and is skipped", UserWarning, stacklevel=3)
        return None
    if n >= len(spots):
        raise ValueError(f"`n_domains` is {n}, section {section!r} has {len(spots)} spots; fewer clusters are needed")
    shifts = admissible_shifts(xy[spots][labelled], n_max=how.n_perms, seed=seeds[0])
    if not len(shifts):
        warnings.warn(
            f"section {section!r}: no shift leaves {MIN_OVERLAP:.0%} of the labelled spots on one another (the positions are not a lattice, "
            "too few, or too many in between have no label): no p-value",
            UserWarning,
            stacklevel=3,
        )
    elif len(shifts) < 20:
        warnings.warn(
            f"section {section!r} allows {len(shifts)} shifts: no p-value can be below {1 / (len(shifts) + 1):.2g}",
            UserWarning,
            stacklevel=3,
        )
    kinds = []
    for name in ("predicted", "measured"):
        if name in spaces:
            features = embed(spaces[name][spots])
            kinds.append(Labels(name, cluster(features, n, seeds, clustering), features))
    for name, values in [(name, xy if name == "coordinates" else spaces.get(name)) for name in BLIND]:
        if values is not None and np.isfinite(values[spots]).all():
            x = _standardised(values[spots])
            part = explained(around(x) if name == "coordinates" else x, kinds[0].features)
            parts = None if part is None else cluster(part, n, seeds, clustering)
            kinds.append(Labels(name, cluster(x, n, seeds, clustering), parts=parts))
    noise = [np.random.default_rng(s).standard_normal((len(spots), 20)) for s in seeds]
    kinds.append(
        Labels("random features", [cluster(x, n, [s], clustering)[0] for x, s in zip(noise, seeds, strict=True)])
    )
    if annotation is not None and annotation.iloc[spots].notna().any():
        head = codes_of(pd.Categorical(annotation.iloc[spots]).codes)
        kinds.append(Labels("annotation head", [head], trained_on_labels=True))
    others = [k.name for k in kinds if not k.trained_on_labels and any(len(np.unique(x)) != n for x in k.labelings)]
    if others:
        warnings.warn(
            f"section {section!r}: {clustering} gives another number of clusters than {n} of: {', '.join(others)}",
            UserWarning,
            stacklevel=3,
        )
    lines = list(score(Section(xy[spots], codes[spots], shifts, seeds[0]), kinds))
    if "predicted" in spaces and "measured" in spaces:
        lines.append(moran_agreement(xy[spots], spaces["predicted"][spots], spaces["measured"][spots]))
    kept = {k.name: k.labelings[medoid(k.labelings)] for k in kinds if k.name in ("predicted", "measured")}
    return lines, spots, kept


def _standardised(values: np.ndarray) -> np.ndarray:
    """One scale for all axes: distances on the tissue, and between colours, keep their proportions."""
    centred = values - values.mean(0)
    return centred / (centred.std() or 1)


def _named(codes: np.ndarray, clusters: np.ndarray, names: list[str]) -> np.ndarray:
    """Name of each spot's cluster: of the domain that it matches, marked, else a number."""
    from ...stats import match

    labelled = codes >= 0
    matched = np.full(clusters.max() + 1, -1)
    of_labelled = match(codes[labelled], clusters[labelled])
    matched[: len(of_labelled)] = of_labelled
    rest = iter(range(1, len(matched) + 1))
    called = [f"~{names[domain]}" if domain >= 0 else f"unmatched {next(rest)}" for domain in matched]
    return np.array(called, object)[clusters]


def _columns(
    table: AnnData, domain_key: str, found: Mapping[str, pd.Series], names: list[str]
) -> tuple[dict[str, pd.Categorical], dict[str, np.ndarray]]:
    """Categorical columns in the order of the domains, and their colours."""
    column = table.obs[domain_key]
    known = table.uns.get(f"{domain_key}_colors")
    colours = {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(names)}
    if known is not None and isinstance(column.dtype, pd.CategoricalDtype) and len(known) == len(column.cat.categories):
        colours |= {str(name): str(colour) for name, colour in zip(column.cat.categories, known, strict=True)}
    columns, written = {}, {}
    for key, values in found.items():
        present = set(values.dropna())
        order = [f"~{name}" for name in names if f"~{name}" in present]
        others = sorted(present - set(order), key=lambda name: int(name.rsplit(" ", 1)[1]))
        columns[key] = pd.Categorical(values, categories=order + others)
        written[f"{key}_colors"] = np.array(
            [colours[name[1:]] for name in order] + [_UNMATCHED[i % len(_UNMATCHED)] for i in range(len(others))]
        )
    return columns, written


def _with_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the means over samples, where there are several sections."""
    if rows["section"].nunique() < 2:
        return rows
    by = ["labels", "against", "score", "trained_on_labels"]
    samples = rows.groupby(["sample", *by], sort=False)["mean"].mean().reset_index()
    summary = samples.groupby(by, sort=False)["mean"].agg(["mean", "std", "count"]).reset_index()
    summary = summary.rename(columns={"std": "sd", "count": "n_samples"}).assign(sample="all", section="all")
    whole = pd.concat([rows.assign(n_samples=1), summary], ignore_index=True)
    return whole.fillna({"n_seeds": 0, "n_shifts": 0}).astype({"n_seeds": int, "n_shifts": int})
