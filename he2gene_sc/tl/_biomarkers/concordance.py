"""``hg.tl.concordance``: agreement of predicted and measured biomarkers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ... import stats
from ..._core import validate
from ..._core.duplicates import warn_of_copied_spots
from ..._core.elements import is_object
from ..._core.expression import Scale
from ..._core.keys import check_key
from ..._core.labelled import check_replicates, depth_of, labelled_spots, measured_part
from ..._core.logs import warn
from ..._core.ownership import check_free
from ..._core.predictions import prediction_of
from ..._core.provenance import are_reliable, circularity
from ..._core.results import write_result
from ..._core.spots import SpotData, read_spots
from .._paired import warn_of_training_sections
from . import reference_fields
from .compare import NO_DEPTH, adjust_pvalues, compare, group_names, method_for
from .design import Design

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Scores by which a prediction is compared with the references.
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
    """Compare the biomarkers of predicted and of measured expression, at the same spots and by the same test.

    Gene-independent references are scored too: the mean of each gene times the depth of a spot, its colour, or its
    position between the groups.

    Parameters
    ----------
    data, groupby, groups, reference, layer, layer_scale, sample_key, section_key, method, table_key
        As for :func:`he2gene_sc.tl.biomarkers`.
    measured, measured_scale
        Measured values of the same spots: layer, ``None`` is ``X`` (raw counts), and its scale. Spots without counts
        there are left out of both tests.
    k
        Lengths of the lists of top genes to compare.
    fdr
        Measured genes with a smaller adjusted p-value are significant.
    min_mean
        Compare the genes that biomarkers would test in the measured values with this threshold.
    key_added
        Key in ``uns`` for the results.

    Returns
    -------
    ``None`` for one object, the table for several. Written to the table, or to the table of every object:

    ``.uns["he2gene_concordance"]``
        ``"table"``: DataFrame, one row per group, set of genes (``"reliable"``, ``"all"``) and ``predictor``, see
        :func:`he2gene_sc.get.concordance`; ``"genes"``: both tests of every gene; ``"params"``.

    Raises
    ------
    ValueError
        As for biomarkers; if nothing was measured; if predicted and measured are the same layer; if no gene has a p-value in both.

    Notes
    -----
    Prediction and measurement are of the same spots, so they share differences that arose by chance. Even if the groups do not
    differ, the scores of all genes are above 1/2 and 0. A warning names groups without a significant measured gene.

    A reference has one number per spot, so all its effects in a group have the same sign. The prediction is tested like
    biomarkers, adjusted for depth if it holds logarithms; the references are not adjusted. Depth is the total of the measured counts,
    or of ``X`` if ``measured`` holds logarithms. Colour needs objects with images.

    Measured effects are noisy too, so the agreement of a perfect prediction is below 1. If the model was trained on
    these sections, the agreement is too high; a warning names them, if known.

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
        raise ValueError(f"`layer` and `measured` are both {layer!r}; name a predicted and a measured layer")
    if method == "ppi":
        raise ValueError("`method` 'ppi' mixes predicted and measured values; name another method")
    lengths = [validate.whole_number(length, "k") for length in np.ravel(np.array(k, object))]
    groups, reference = group_names(groups, reference)
    design = Design(min_mean=min_mean)
    # The objects are read twice: names and values, then colours.
    data = list(data) if isinstance(data, Iterator) else data
    spots = read_spots(
        data, groupby, "groupby", layer=layer, table_key=table_key, sample_key=sample_key, section_key=section_key
    )
    for table in spots.tables:
        check_free(table, "concordance", key_added)
    tables = spots.tables
    warn_of_training_sections(spots, "data", "the agreement is too high")
    spots = labelled_spots(spots, groupby, layer_scale=layer_scale)
    known, seen = measured_part(spots, measured, measured_scale)
    if not seen.any():
        raise ValueError("`measured` holds no counts at any labelled spot; name a layer with measured counts")
    spots = spots.take(seen)
    warn_of_copied_spots(spots, known)
    chosen = method_for(method, spots, design)
    if chosen.samples:
        check_replicates(spots, sample_key)
    # Measured counts are summed; predictions have no counts, so their method may differ.
    chosen_measured = method_for(method, known, design)
    depth = depth_of(known, "auto")
    run: dict[str, Any] = {"groups": groups, "reference": reference, "depth": depth}
    tested, _ = compare(known, design=design, chosen=chosen_measured, **run)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        # The test of the measured values has already named the groups that are left out.
        predicted, _ = compare(spots, design=Design(min_mean=-np.inf), chosen=chosen, **run)
    genes = _merge_tests(predicted, tested)
    lost = sorted(set(tested["group"]) - set(genes["group"]))
    nothing = f"`layer` {layer!r}: no gene has a p-value both as predicted and as measured in {validate.format_list(map(repr, lost))}"
    if genes.empty:
        raise ValueError(f"{nothing}; name layers that vary, or lower `min_mean`")
    messages = [chosen.caution] if chosen.caution else []
    if depth is None and (chosen.depth or chosen_measured.depth):
        messages.append(NO_DEPTH)
    if doubts := predicted.attrs["doubts"]:
        messages.append(f"`layer` {layer!r}, {validate.format_list(doubts, 1)}")
    if lost:
        messages.append(f"{nothing}; these groups are left out")
    for message in messages:
        warn(message)
    genes["reliable"] = are_reliable(genes["names"], tables, layer)
    table = _scores(genes, lengths, fdr)
    none = table.loc[(table["genes"] == "all") & (table["n_significant"] == 0), "group"].tolist()
    if none:
        warn(
            f"`groupby`: no measured gene is significant in {validate.format_list(map(repr, none))}. Prediction and measurement share "
            "chance differences there, since they are of the same spots, so spearman and sign_agreement are not evidence of biomarkers "
            "in these groups"
        )
    table["predictor"] = layer
    fields = reference_fields.fields(data, tables, known, layer)
    references = list(_references(known, fields, genes, reference, lengths, fdr))
    for rows in references:
        # Scores of the prediction minus those of the reference on the same genes.
        for score in _COMPARED:
            rows[f"{score}_difference"] = table[score] - rows[score]
    table = pd.concat([table, *references], ignore_index=True)
    table["method"] = chosen.label
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
    write_result(tables, "concordance", key_added, params=params, facts={"table": table, "genes": genes})
    return None if is_object(data) else table.copy()


def _references(
    known: SpotData,
    by_spot: dict[str, np.ndarray],
    genes: pd.DataFrame,
    reference: str,
    k: Sequence[int],
    fdr: float,
) -> Iterator[pd.DataFrame]:
    """Scores of the gene-independent references: the mean of each gene times a number of the spot."""
    effects = reference_fields.effects(known, by_spot, list(dict.fromkeys(genes["group"])), reference)
    mean = genes["names"].map(reference_fields.mean_expression(known)).to_numpy(float)
    for name in effects.index:
        effect = mean * genes["group"].map(effects.loc[name]).to_numpy(float)
        rows = _scores(genes.assign(effect_size_predicted=effect, scores_predicted=effect), k, fdr)
        yield rows.assign(predictor=name)


def _merge_tests(predicted: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Both tests of the genes that were tested in both, one row per group and gene."""
    columns = ["group", "names", "effect_size", "scores", "pvals_adj"]
    both = adjust_pvalues(measured)[[*columns, "n_samples", "n_spots"]].merge(
        adjust_pvalues(predicted)[columns],
        on=["group", "names"],
        suffixes=("_measured", "_predicted"),
        validate="one_to_one",
    )
    return both.dropna().reset_index(drop=True)


def _scores(genes: pd.DataFrame, k: Sequence[int], fdr: float) -> pd.DataFrame:
    rows = []
    for group, tests in genes.groupby("group", sort=False):
        for name, part in (("reliable", tests[tests["reliable"]]), ("all", tests)):
            significant = (part["pvals_adj_measured"] < fdr).to_numpy()
            scores = stats.ranking_agreement(
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
                    "n_samples": int(tests["n_samples"].iloc[0]),
                    "n_spots": int(tests["n_spots"].iloc[0]),
                    **scores,
                }
            )
    return pd.DataFrame(rows)
