"""``hg.tl.concordance``: do predicted biomarkers match the measured ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ..._core import validate
from ..._core.duplicates import warn_of_copied_spots
from ..._core.expression import Scale
from ..._core.keys import check_key
from ..._core.ownership import check_free
from ..._core.predictions import prediction_of
from ..._core.results import write_to_all
from ..._core.spots import SpotData, is_many, read_spots
from . import blind
from .compare import adjusted, compare, method_for, named_groups
from .design import Design
from .methods import METHODS
from .pool import check_replicates, labelled_spots
from .provenance import circularity, measured_part, reliable_genes
from .sums import depth_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Scores that a prediction is compared with the references by.
_COMPARED = ("spearman", "sign_agreement", "sign_agreement_significant", "auroc")


def concordance(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    groupby: str,
    *,
    groups: str | Sequence[str] | None = None,
    reference: str | float = "rest",
    layer: str = "he2gene",
    layer_scale: Scale = "auto",
    measured: str | None = None,
    measured_scale: Scale = "auto",
    sample_key: str = "patient",
    section_key: str = "section",
    method: Literal["auto", "pseudobulk", "mixed", "spatial", "wilcoxon"] = "auto",
    k: Sequence[int] = (10, 20, 50, 100, 200),
    fdr: float = 0.05,
    min_mean: float = 0.05,
    table_key: str | None = None,
    key_added: str = "he2gene_concordance",
) -> pd.DataFrame | None:
    """Compare the biomarkers of predicted with those of measured expression, at the same spots and by the same test.

    Beside the prediction stand references that know no gene: the mean of each gene times the depth of a spot, its colour, or
    its place between the groups.

    Parameters
    ----------
    data, groupby, groups, reference, layer, layer_scale, sample_key, section_key, method, table_key
        As for :func:`he2gene_sc.tl.biomarkers`.
    measured, measured_scale
        What was measured at the same spots: layer, ``None`` is ``X`` (raw counts), and its scale. Spots without counts
        there are left out, of both.
    k
        Lengths of the lists of top genes that are compared.
    fdr
        Below this adjusted p-value a measured gene counts as significant.
    min_mean
        Genes that biomarkers would test in what was measured are compared; see there.
    key_added
        Where in ``uns`` it is written.

    Returns
    -------
    ``None`` for one object, the table for several. Written to the table, or to the table of every object:

    ``.uns["he2gene_concordance"]``
        ``"table"``: DataFrame, a row a group and set of genes (``"reliable"``, ``"all"``) and ``predictor``, see
        :func:`he2gene_sc.get.concordance`; ``"genes"``: both tests gene by gene; ``"params"``.

    Raises
    ------
    ValueError
        As for biomarkers; if nothing was measured; if predicted and measured are the same layer.

    Notes
    -----
    Prediction and measurement are of the same spots, so they also agree in differences that arose by chance: where the groups do not
    differ, the scores of all genes are above 1/2 and 0 all the same. A warning names groups without a significant measured gene.

    A reference has one number a spot, so all its effects of a group have one sign. The prediction is tested as biomarkers are,
    adjusted for depth where it holds logarithms; the references are not adjusted. Colour needs objects with images.

    Measured effects are noisy themselves, so the agreement of a perfect prediction is below 1. If the model was trained on
    these sections, the agreement is too good.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((5, 5), seed=i) for i in range(4)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    ...     hg.tl.predict(slide, show_progress_bar=False)
    >>> hg.tl.concordance(slides, "pathologist", groups="tumour", k=(5,))["genes"].unique().tolist()
    ['reliable', 'all']
    """
    validate.arguments(concordance, locals())
    check_key(key_added, "key_added")
    if layer is None or layer == measured:
        raise ValueError(f"`layer` and `measured` are both {layer!r}; a predicted and a measured one are needed")
    if method == "ppi":
        raise ValueError("`method` 'ppi' mixes predicted and measured; name another")
    lengths = [validate.whole_number(length, "k") for length in np.ravel(np.array(k, object))]
    groups, reference = named_groups(groups, reference)
    design = Design(min_mean=min_mean)
    # Read twice: names and values, then colours.
    data = list(data) if isinstance(data, Iterator) else data
    spots = read_spots(
        data, groupby, "groupby", layer=layer, table_key=table_key, sample_key=sample_key, section_key=section_key
    )
    for table in spots.tables:
        check_free(table, "concordance", key_added)
    tables = spots.tables
    spots = labelled_spots(spots, groupby, layer_scale=layer_scale)
    known, seen = measured_part(spots, measured, measured_scale)
    if not seen.any():
        raise ValueError("`measured` holds no counts at any labelled spot; there is nothing to compare with")
    spots = spots.take(seen)
    warn_of_copied_spots(spots, known, stacklevel=3)
    chosen = method_for(method, spots)
    if chosen.samples:
        check_replicates(spots, sample_key)
    depth = depth_of(spots, "auto") if chosen.depth else None
    run: dict[str, Any] = {"groups": groups, "reference": reference, "depth": depth}
    # Counts are summed; what was predicted has none.
    found, _ = compare(known, design=design, chosen=method_for(method, known), **run)
    with warnings.catch_warnings():
        # Said once, of the measured.
        warnings.simplefilter("ignore", UserWarning)
        predicted, _ = compare(spots, design=Design(min_mean=-np.inf), chosen=chosen, **run)
    if chosen.caution:
        warnings.warn(chosen.caution, UserWarning, stacklevel=2)
    genes = _beside(predicted, found)
    reliable = reliable_genes(tables, layer)
    genes["reliable"] = True if reliable is None else reliable.reindex(genes["names"]).to_numpy(bool)
    table = _scores(genes, lengths, fdr)
    _warn_of_chance(table)
    table["predictor"] = layer
    references = _references(data, tables, known, layer, genes, reference, lengths, fdr)
    table = pd.concat([table, *(_against(table, rows) for rows in references)], ignore_index=True)
    table["method"] = METHODS[chosen.name].label
    table["circular"] = any(circularity(tables, groupby, values) for values in (layer, measured))
    params = {
        "groupby": groupby,
        "reference": reference,
        "layer": layer,
        "prediction": prediction_of(tables[0], layer),
        "measured": "X" if measured is None else measured,
        "sample_key": sample_key,
        "method": chosen.name,
        "fdr": fdr,
        "min_mean": min_mean,
        "k": lengths,
    }
    write_to_all(tables, "concordance", key_added, params=params, facts={"table": table, "genes": genes})
    return table.copy() if is_many(data) else None


def _warn_of_chance(table: pd.DataFrame) -> None:
    """Warn of groups in which no measured gene differs: what agrees there is chance that both share."""
    of_all = table[table["genes"] == "all"]
    none = of_all.loc[of_all["n_significant"] == 0, "group"].tolist()
    if none:
        warnings.warn(
            f"`groupby`: no measured gene is significant in {validate.format_list(map(repr, none))}; spearman and sign_agreement are there "
            "of differences that may be chance, which prediction and measurement share since they are of the same spots, and are not "
            "evidence of biomarkers",
            UserWarning,
            stacklevel=3,
        )


def _references(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    tables: tuple[AnnData, ...],
    known: SpotData,
    layer: str,
    genes: pd.DataFrame,
    reference: str,
    k: Sequence[int],
    fdr: float,
) -> Iterator[pd.DataFrame]:
    """Scores of predictions that know no gene: the mean of each gene times a number of the spot."""
    by_spot = blind.fields(data, tables, known, prediction_of(tables[0], layer) or layer)
    found = blind.effects(known, by_spot, list(dict.fromkeys(genes["group"])), reference)
    mean = genes["names"].map(blind.mean_expression(known)).to_numpy(float)
    for name in found.index:
        effect = mean * genes["group"].map(found.loc[name]).to_numpy(float)
        rows = _scores(genes.assign(effect_size_predicted=effect, scores_predicted=effect), k, fdr)
        yield rows.assign(predictor=name)


def _against(prediction: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a reference, with the prediction's score minus its own, on the same genes."""
    return rows.assign(**{f"{score}_difference": prediction[score] - rows[score] for score in _COMPARED})


def _beside(predicted: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Both tests of the genes that both have, a row a group and gene."""
    columns = ["group", "names", "effect_size", "scores", "pvals_adj"]
    both = adjusted(measured)[[*columns, "n_samples", "n_spots"]].merge(
        adjusted(predicted)[columns], on=["group", "names"], suffixes=("_measured", "_predicted"), validate="one_to_one"
    )
    return both.dropna().reset_index(drop=True)


def _scores(genes: pd.DataFrame, k: Sequence[int], fdr: float) -> pd.DataFrame:
    from ...stats import ranking_agreement

    rows = []
    for group, of_group in genes.groupby("group", sort=False):
        for name, part in (("reliable", of_group[of_group["reliable"]]), ("all", of_group)):
            significant = (part["pvals_adj_measured"] < fdr).to_numpy()
            scores = ranking_agreement(
                part["effect_size_predicted"],
                part["effect_size_measured"],
                significant,
                predicted_scores=part["scores_predicted"],
                measured_scores=part["scores_measured"],
                k=k,
            )
            rows.append(
                {
                    "group": group,
                    "genes": name,
                    "n_genes": len(part),
                    "n_significant": int(significant.sum()),
                    "n_samples": int(of_group["n_samples"].iloc[0]),
                    "n_spots": int(of_group["n_spots"].iloc[0]),
                    **scores,
                }
            )
    return pd.DataFrame(rows)
