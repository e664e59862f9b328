"""``hg.tl.enrichment``: enrichment of gene sets in the biomarkers, with decoupler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from ..._core import validate
from ..._core.elements import is_object
from ..._core.keys import check_key
from ..._core.logs import warn
from ..._core.ownership import check_free
from ..._core.results import find_results, write_result
from ...get._results import biomarkers as get_biomarkers
from .._gene_sets import import_decoupler, membership, name_genes, read_net, rename_targets, weights_by_set

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Fewest samples for a test over samples.
_MIN_SAMPLES = 3


def enrichment(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData] | pd.DataFrame,
    net: pd.DataFrame | str | Path | Mapping[str, Sequence[str]],
    *,
    group: str | Sequence[str] | None = None,
    statistic: str = "scores",
    method: str = "ulm",
    tmin: int = 5,
    key: str = "he2gene_biomarkers",
    table_key: str | None = None,
    key_added: str = "he2gene_enrichment",
    **kwargs: Any,
) -> pd.DataFrame | None:
    """Score gene sets by the biomarker statistics of their genes, with decoupler.

    Parameters
    ----------
    data
        Objects with results of :func:`he2gene_sc.tl.biomarkers`, or its DataFrame. The DataFrame has no effects of samples, so
        ``pvals_adj_samples`` are NaN.
    net
        DataFrame with columns ``source`` and ``target`` (and ``weight``, if the method uses one), a GMT file, or a mapping of
        sets to genes. Genes of diseases are gene sets too, see Notes.
    group
        Group or groups of the biomarkers; default: all.
    statistic
        Column of the biomarkers to use.
    method
        Name of a method in ``decoupler.mt``.
    tmin
        Fewest tested genes of a set; smaller sets are left out.
    key
        ``key_added`` of the biomarkers.
    table_key
        Table to use if an object holds several.
    key_added
        Key in ``uns`` for the results.
    **kwargs
        Passed to the method.

    Returns
    -------
    ``None`` for one object, the results for several or a DataFrame. Written to ``.uns["he2gene_enrichment"]``:
    ``"results"``, see :func:`he2gene_sc.get.enrichment`, and ``"params"``.

    Raises
    ------
    ImportError
        If decoupler is missing: ``pip install 'he2gene_sc[enrichment]'``.
    ValueError
        If there are no biomarkers, or too few genes of the sets were tested.

    Notes
    -----
    decoupler's ``ulm`` (Badia-i-Mompel et al., Bioinform Adv 2022) assumes independent genes. Genes of a set are
    co-expressed, so its ``pvals_adj`` are too small: use them to rank sets, not as error rates. ``pvals_adj_samples`` are valid for
    co-expressed genes too. They test, in every sample, the mean effect of the set minus that of all genes (each gene divided by its
    root mean square; only genes that every sample has), by a t test over at least 3 samples, adjusted by Benjamini and Hochberg over
    the sets of a group. Covariates are not used. Both compare a set with the average gene: if many genes are higher in a group, a
    set without differences is below average.

    The background is the tested genes, also for ``method="ora"``; ``n_bg=`` changes it. ``ora`` of decoupler 2.2 selects all genes
    except the ``n_up`` lowest: for the top 50 of 1,000 tested genes pass ``n_up=950``.

    **Genes of diseases** come from a GMT file (for example from Enrichr), or, with network access, from OmniPath:
    ``decoupler.op.resource("DisGeNet").rename(columns={"disease": "source", "genesymbol": "target"})``.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((6, 6), seed=i) for i in range(4)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    >>> markers = hg.tl.biomarkers(slides, "pathologist", layer=None)
    >>> found = hg.tl.enrichment(markers, hg.datasets.toy_diseases(), group="tumour")
    >>> found["source"].iloc[0]
    'carcinoma (toy)'
    """
    validate.arguments(enrichment, locals())
    decoupler = import_decoupler("hg.tl.enrichment")
    check_key(key_added, "key_added")
    validate.key_in(method, sorted(decoupler.mt.show()["name"]), "method", what="a method of decoupler")
    is_frame = isinstance(data, pd.DataFrame)
    several = is_frame or not is_object(data)
    data = list(data) if several and not is_frame else data
    targets = [] if is_frame else find_results(data, "biomarkers", key, table_key)
    for table in targets:
        check_free(table, "enrichment", key_added)
    frame: Any = data if is_frame else get_biomarkers(data, key=key, table_key=table_key)
    missing = [name for name in ("group", "names", statistic) if name not in frame]
    if missing:
        raise ValueError(
            f"`{'data' if missing[0] != statistic else 'statistic'}`: the biomarkers have no {missing[0]!r}"
        )
    tested = frame["group"].dropna().unique().tolist()
    if not tested:
        raise ValueError("`data`: the biomarkers have no row with a group; pass the result of hg.tl.biomarkers")
    if group is not None:
        wanted = [group] if isinstance(group, str) else list(group)
        if not wanted:
            raise ValueError(f"`group` is empty; name some of {tested}, or None for all")
        validate.all_in(wanted, tested, "group", "was not tested")
        frame = frame[frame["group"].isin(wanted)]
    sets = read_net(net)
    results = pd.concat(
        [
            _scores(part, name, sets, statistic, getattr(decoupler.mt, method), tmin, kwargs)
            for name, part in frame.groupby("group", sort=False)
        ],
        ignore_index=True,
    )
    results["pvals_adj_samples"] = _test_over_samples(results, frame, sets, targets[0].uns[key] if targets else None)
    results["method"] = method
    if method == "ora" and "n_up" not in kwargs:
        warn(
            "`method` 'ora': without `n_up` decoupler 2.2 selects the upper 95 % of the genes, not the top 5 %; pass n_up=, the number "
            "of genes that are not selected"
        )
    circular = frame.groupby("group")["circular"].any() if "circular" in frame else pd.Series(dtype=bool)
    results["circular"] = results["group"].map(circular).fillna(False).astype(bool)
    if results["circular"].any():
        warn(
            "the biomarkers are circular, so their statistics and those of the gene sets are too large; see hg.tl.biomarkers for "
            "labels that are valid"
        )
    params = {
        "key": key,
        "statistic": statistic,
        "method": method,
        "tmin": tmin,
        "n_sets": int(sets["source"].nunique()),
    }
    write_result(targets, "enrichment", key_added, params=params, facts={"results": results})
    return results.copy() if several else None


def _scores(
    part: pd.DataFrame, group: str, net: pd.DataFrame, statistic: str, method: Any, tmin: int, kwargs: dict[str, Any]
) -> pd.DataFrame:
    """Score the sets in one group, best first."""
    values = part.dropna(subset=[statistic]).set_index("names")[statistic].astype(float)
    if values.index.has_duplicates:
        raise ValueError(
            f"`data`: gene {values.index[values.index.duplicated()][0]!r} occurs twice in group {group!r}; keep one row per gene"
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"`data`: {statistic!r} is infinite for {values.index[~np.isfinite(values)][0]!r} in group {group!r}"
        )
    if values.nunique() < 2:
        raise ValueError(
            f"`data`: {statistic!r} is the same for all genes of group {group!r}, so sets cannot be ranked"
        )
    net = rename_targets(net, values.index)
    sizes = net[net["target"].isin(values.index)].groupby("source").size()
    # A set with every tested gene has no background.
    net = net[~net["source"].isin(sizes.index[sizes >= len(values)])]
    sizes = sizes[sizes < len(values)]
    if not (sizes >= tmin).any():
        raise ValueError(
            f"`net`: no set has {tmin} of the {len(values)} genes tested in {group!r}, the largest has "
            f"{int(sizes.max()) if len(sizes) else 0}; check the names ({name_genes(net, values.index)}), or lower `tmin`"
        )
    if method.name == "ora":
        # decoupler assumes a background of 20,000 genes, but only these were tested.
        kwargs = {"n_bg": len(values)} | kwargs
    found = method(data=values.to_frame(group).T, net=net, tmin=tmin, **kwargs)
    scores, pvalues = found if isinstance(found, tuple) else (found, None)
    out = pd.DataFrame(
        {
            "group": group,
            "source": scores.columns.astype(str),
            "score": scores.loc[group].to_numpy(float),
            "pvals_adj": np.nan if pvalues is None else pvalues.loc[group, scores.columns].to_numpy(float),
            "n_targets": sizes.reindex(scores.columns).to_numpy(int),
        }
    )
    return out.sort_values("score", ascending=False, kind="stable")


def _test_over_samples(
    results: pd.DataFrame, frame: pd.DataFrame, net: pd.DataFrame, record: Mapping[str, Any] | None
) -> pd.Series:
    """Test the sets with samples as the unit: adjusted p-values, NaN for fewer than three samples with effects."""
    out = pd.Series(np.nan, index=results.index)
    if record is None:
        return out
    groups = pd.DataFrame(record["samples"])["group"].to_numpy(object)
    genes, by_sample = pd.Index(record["genes"]).astype(str), np.asarray(record["sample_effects"], float)
    for group, rows in results.groupby("group", sort=False):
        effects = by_sample[groups == group]
        size = np.sqrt(np.square(effects).mean(axis=0))
        # Root mean square, not SD: a gene whose spread is small by chance would get a large weight and a large t.
        effects = effects / np.where(size > 0, size, 1)
        known = np.isfinite(effects).all(axis=0) & genes.isin(frame.loc[frame["group"] == group, "names"])
        if len(effects) < _MIN_SAMPLES or known.sum() < 2:
            continue
        effects, tested = effects[:, known], genes[known]
        sets = weights_by_set(rename_targets(net[net["source"].isin(rows["source"])], tested))
        weights = membership({name: sets.get(name, {}) for name in rows["source"]}, tested)
        pvals = stats.ttest_1samp(effects @ (weights - weights.mean(axis=0)), 0.0).pvalue
        there = np.isfinite(pvals)
        out.loc[rows.index[there]] = stats.false_discovery_control(pvals[there])
    return out
