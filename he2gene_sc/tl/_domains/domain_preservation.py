"""``hg.tl.domain_preservation``: agreement of expression clusters with annotated domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ... import stats
from ..._core import validate
from ..._core.duplicates import check_duplicate_sections, check_duplicate_spots, warn_of_copy
from ..._core.expression import Scale
from ..._core.keys import OWN_TABLE, Keys, check_key
from ..._core.labelled import domain_codes, paired_layers
from ..._core.logs import warn
from ..._core.names import stored_colours
from ..._core.ownership import check_free
from ..._core.predictions import prediction_of
from ..._core.results import write_result
from ..._core.slide import mean_colours
from ..._core.spots import get_table, read_spots, spots_of, unique_section_names
from .clusters import CLUSTERINGS, cluster, embed, explained_part, medoid, position_features
from .scores import GENE_INDEPENDENT, Labels, codes_of, moran_agreement, score

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

_VERB = "domain_preservation"
#: Colours of domains without colours in ``uns``; below, colours of clusters that match no domain.
_PALETTE = (
    *("#d62728", "#2ca02c", "#1f77b4", "#ffdd57", "#9467bd"),
    *("#ff7f0e", "#17becf", "#e377c2", "#8c564b", "#bcbd22"),
)
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
    """Test whether clusters of predicted and of measured expression preserve the annotated spatial domains.

    Predicted and measured expression of the same genes go through one pipeline: log expression, 20 principal components
    (scanpy), 15 neighbours, Leiden with as many clusters as domains (or k-means). Clusters are compared with the domains
    and with each other. References are scored in the same way: random features, the depth of a spot, its mean colour, its
    coordinates, and the labels of the annotation head (missing labels count as one more label). The adjusted Rand index is
    tested against domains shifted over the tissue (:func:`he2gene_sc.stats.shift_test`): shuffled labels lose their
    spatial autocorrelation, and chance agreement would appear significant. A second p-value tests whether the prediction
    preserves the domains better than each of depth, colour and coordinates, which do not depend on genes.

    Parameters
    ----------
    data
        Object or table, with or without an image.
    domain_key
        Column of ``obs`` with the domains. Spots without a label are clustered but not scored; domains with fewer than 3
        spots in a section are left out there. Labels that were chosen from the expression
        (``obs["annotation"]`` of her2st outside the annotated sections) favour the expression.
    layer
        Layer of predicted log expression; ``None``: only measured expression is clustered.
    measured
        Layer of measured counts; ``None``: ``X``. A table made by predict has no measured values.
    n_domains
        Number of clusters; ``"match"``: number of domains of the section.
    n_seeds
        Number of seeds of the clustering. The SD over seeds is the variation of the clustering, not of other tissue.
    n_perms
        Largest number of shifts for the test. If fewer distinct shifts are admissible, all are used.
    sample_key
        Column of ``obs`` with the patient, the statistical unit. A table without the default column counts as one patient.
        Patients are never clustered together. Sections are scored one by one; rows of section ``"all"`` are means over samples
        (each the mean of its sections), with the SD over samples and no p-value.
    section_key
        Column of ``obs`` with the section. Without the default column the shapes elements are the sections.
    clustering
        ``"leiden"`` or ``"kmeans"``.
    genes
        Genes for both predicted and measured expression. Default: the genes that the model card calls reliable; without this
        column in ``var``, the 2,000 genes of highest variance in measured log expression.
    layer_scale, measured_scale
        ``"counts"`` or ``"log"``: scale of the values, if it is not recognised.
    table_key
        Table to use if an object holds several.
    key_added
        Prefix of the keys that are written.
    seed
        First seed of the clusterings; also of random features, drawn shifts and squidpy's permutations.

    Returns
    -------
    None
        Writes ``.obs["{key_added}_predicted"]`` and ``.obs["{key_added}_measured"]``: clusters of the seed that agrees
        best with the others, named after the domain that they match one to one (``"~name"``) or ``"unmatched i"``,
        colours in ``.uns``; and ``.uns[key_added]``: parameters, genes, and the table of
        :func:`he2gene_sc.get.domains`. Plot with :func:`he2gene_sc.pl.domains`.

    Warns
    -----
    UserWarning
        If domains with too few spots are left out; a section with fewer than two domains is skipped; the number of
        clusters differs from the requested one (the graph of neighbours has more components than domains); or fewer than 20
        shifts are admissible, so that no p-value can be below .05. Without any shift, for example for spots that are not on
        a lattice, there is no p-value.

    Raises
    ------
    TypeError
        If ``data`` is neither SpatialData nor AnnData.
    ValueError
        If a column, layer or gene is missing; values are not valid; no section has two domains; spots are
        duplicated; a parameter is out of range; or ``key_added`` would overwrite other results.

    Notes
    -----
    Null hypothesis: the domains are stationary and independent of the expression. Tissue whose domains and expression both
    follow the outline of the section (a core and a rim) violates it. Clusters of coordinates do not show a rim. ``pval_better``
    accounts for it: the prediction must also be better than the part of it that colour, or position with the distance from the
    centre, explains.

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
    check_key(key_added, "key_added")
    if n_domains != "match" and not (validate.is_whole(n_domains) and n_domains >= 2):
        raise ValueError(f"`n_domains` is {n_domains!r}; it must be 'match' or a whole number of at least 2")
    validate.whole_number(n_seeds, "n_seeds")
    validate.whole_number(n_perms, "n_perms")
    validate.one_of(clustering, CLUSTERINGS, "clustering")
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
        raise ValueError(
            "`layer` is None, but the table was made by hg.tl.predict and has no measured values; name a layer"
        )
    written = [
        f"{key_added}_{name}" for name, there in (("predicted", layer is not None), ("measured", has_measured)) if there
    ]
    check_free(table, _VERB, key_added, obs=written, uns=[f"{name}_colors" for name in written])
    validate.all_different(table.obs_names, "data", "obs_names")
    xy = spots_of(table)
    check_duplicate_spots(spots)
    where = pd.DataFrame({"sample": spots.samples, "section": unique_section_names(spots.sections, spots.samples)})
    codes, names = domain_codes(spots, domain_key, where)
    used, predicted, counted, depth = paired_layers(
        spots, genes, measured, layer_scale=layer_scale, measured_scale=measured_scale, has_measured=has_measured
    )
    if predicted is not None and counted is not None:
        warn_of_copy(predicted, counted, layer)
    scale: Literal["counts", "log"] = "log" if measured_scale == "log" else "counts"
    check_duplicate_sections(spots if counted is None else replace(spots, layer=measured, scale=scale))
    _check_varies(where, {"layer": predicted, "measured": counted})
    colour = mean_colours(data, table, layer)
    given = {"predicted": predicted, "measured": counted, "depth": depth, "mean colour": colour}
    spaces = {name: values for name, values in given.items() if values is not None}
    annotation = table.obs.get(Keys(prediction_of(table, layer) or layer or "he2gene").annotation)
    settings = _Settings(n_domains, list(range(seed, seed + n_seeds)), n_perms, clustering)
    cluster_names = {name: pd.Series(None, index=table.obs_names, dtype=object) for name in written}
    rows: list[dict] = []
    for (sample, section), members in where.groupby(["sample", "section"], sort=False).indices.items():
        scored = _score_section(xy, codes, spaces, annotation, settings, members=members, section=section)
        if scored is None:
            continue
        lines, kept, clusters = scored
        rows += [{"sample": sample, "section": section, **line} for line in lines]
        for name, labels in clusters.items():
            cluster_names[f"{key_added}_{name}"].iloc[kept] = _name_clusters(codes[kept], labels, names)
    if not rows:
        raise ValueError(f"`domain_key` {domain_key!r}: no section has spots of two domains with known expression")
    columns, colours = _columns(table, domain_key, cluster_names, names)
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
            "min_overlap": stats.MIN_OVERLAP,
        },
        facts={"genes": np.array(used), "table": _add_summary(pd.DataFrame(rows))},
        obs=columns,
        uns=colours,
    )


def _check_varies(where: pd.DataFrame, given: Mapping[str, np.ndarray | None]) -> None:
    """Raise if all spots of a section have the same expression, before any section is clustered."""
    for parameter, values in given.items():
        for (_, section), rows in where.groupby(["sample", "section"], sort=False).indices.items():
            block = np.empty((0, 0)) if values is None else values[rows]
            block = block[np.isfinite(block).all(axis=1)]
            if len(block) > 1 and not np.ptp(block, axis=0).any():
                what = "has the same values at all spots" if block.any() else "has no counts of the chosen genes"
                raise ValueError(
                    f"`{parameter}`: section {section!r} {what} and cannot be clustered; leave the section out, or "
                    "name a layer that was measured there"
                )


@dataclass(frozen=True)
class _Settings:
    """Settings of the clustering and of the shift test."""

    n_domains: int | Literal["match"]
    seeds: list[int]
    n_perms: int
    method: str


def _score_section(
    xy: np.ndarray,
    codes: np.ndarray,
    spaces: Mapping[str, np.ndarray],
    annotation: pd.Series | None,
    settings: _Settings,
    *,
    members: np.ndarray,
    section: str,
) -> tuple[list[dict[str, Any]], np.ndarray, dict[str, np.ndarray]] | None:
    """Rows of the table, the clustered spots, and their representative clusters; ``None`` if the section is skipped."""
    seeds, clustering = settings.seeds, settings.method
    spaces = {**spaces, "coordinates": xy}
    # A spot outside the image has no colour, but may have measured values.
    needed = [spaces[name][members] for name in spaces if name not in GENE_INDEPENDENT]
    known = np.all([np.isfinite(values).all(axis=1) for values in needed], axis=0)
    spots = members[known]
    labelled = codes[spots] >= 0
    n_found = len(np.unique(codes[spots][labelled]))
    if n_found < 2:
        warn(f"section {section!r} has fewer than two domains and is skipped")
        return None
    n = n_found if settings.n_domains == "match" else int(settings.n_domains)
    if n >= len(spots):
        raise ValueError(f"`n_domains` is {n}, but section {section!r} has {len(spots)} spots; pass a smaller number")
    shifts = stats.admissible_shifts(xy[spots][labelled], n_max=settings.n_perms, seed=seeds[0])
    if len(shifts) < 20:
        warn(
            f"section {section!r} has only {len(shifts)} admissible shifts: no p-value can be below {1 / (len(shifts) + 1):.2g}"
            if len(shifts)
            else f"No p-value for section {section!r}: no shift keeps {stats.MIN_OVERLAP:.0%} of the labelled spots on other spots. Likely "
            "reasons: no lattice, few spots, many unlabelled spots."
        )
    kinds = []
    for name in ("predicted", "measured"):
        if name in spaces:
            features = embed(spaces[name][spots])
            kinds.append(Labels(name, cluster(features, n, seeds, clustering), features))
    for name in GENE_INDEPENDENT:
        if name in spaces and np.isfinite(x := spaces[name][spots]).all():
            # Scale all axes by one number, so that distances on the tissue and between colours keep their proportions.
            x = x - x.mean(0)
            x = x / (x.std() or 1)
            part = explained_part(position_features(x) if name == "coordinates" else x, kinds[0].features)
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
        warn(
            f"section {section!r}: {clustering} could not produce exactly {n} clusters for {', '.join(others)}; the closest number is used"
            + ("; use clustering='kmeans' for the exact number" if clustering == "leiden" else "")
        )
    lines = list(score(xy[spots], codes[spots], shifts, seeds[0], kinds))
    if "predicted" in spaces and "measured" in spaces:
        lines.append(moran_agreement(xy[spots], spaces["predicted"][spots], spaces["measured"][spots]))
    kept = {k.name: k.labelings[medoid(k.labelings)] for k in kinds if k.name in ("predicted", "measured")}
    return lines, spots, kept


def _name_clusters(codes: np.ndarray, clusters: np.ndarray, names: list[str]) -> np.ndarray:
    """Cluster name of each spot: ``"~name"`` of the matched domain, else ``"unmatched i"``."""
    labelled = codes >= 0
    matched = np.full(clusters.max() + 1, -1)
    pairs = stats.match(codes[labelled], clusters[labelled])
    matched[: len(pairs)] = pairs
    numbers = iter(range(1, len(matched) + 1))
    cluster_names = [f"~{names[domain]}" if domain >= 0 else f"unmatched {next(numbers)}" for domain in matched]
    return np.array(cluster_names, object)[clusters]


def _columns(
    table: AnnData, domain_key: str, cluster_names: Mapping[str, pd.Series], names: list[str]
) -> tuple[dict[str, pd.Categorical], dict[str, np.ndarray]]:
    """Categorical columns in the order of the domains, and their colours."""
    colours = {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(names)} | stored_colours(table, domain_key)
    columns, written = {}, {}
    for key, values in cluster_names.items():
        present = set(values.dropna())
        order = [f"~{name}" for name in names if f"~{name}" in present]
        others = sorted(present - set(order), key=lambda name: int(name.rsplit(" ", 1)[1]))
        columns[key] = pd.Categorical(values, categories=order + others)
        written[f"{key}_colors"] = np.array(
            [colours[name[1:]] for name in order] + [_UNMATCHED[i % len(_UNMATCHED)] for i in range(len(others))]
        )
    return columns, written


def _add_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the means over samples if there are several sections."""
    if rows["section"].nunique() < 2:
        return rows
    columns = ["labels", "against", "score", "trained_on_labels"]
    samples = rows.groupby(["sample", *columns], sort=False)["mean"].mean().reset_index()
    summary = samples.groupby(columns, sort=False)["mean"].agg(["mean", "std", "count"]).reset_index()
    summary = summary.rename(columns={"std": "sd", "count": "n_samples"}).assign(sample="all", section="all")
    whole = pd.concat([rows.assign(n_samples=1), summary], ignore_index=True)
    return whole.fillna({"n_seeds": 0, "n_shifts": 0}).astype({"n_seeds": int, "n_shifts": int})
