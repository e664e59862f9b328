"""``hg.datasets.breast_markers``: marker genes of breast tumours from the literature."""

from __future__ import annotations

import pandas as pd

from .._core import validate
from ._toy import PLANTED

#: Source and genes of each set.
_SETS = {
    # Parker et al., J Clin Oncol 2009 (PAM50); grouped as in Nielsen et al., Clin Cancer Res 2010.
    "luminal": ("Parker 2009", "ESR1 PGR FOXA1 MLPH NAT1 SLC39A6 MAPT BCL2 GPR160 CXXC5 BAG1"),
    "HER2-enriched": ("Parker 2009", "ERBB2 GRB7 FGFR4 TMEM45B"),
    "basal-like": ("Parker 2009", "KRT5 KRT14 KRT17 FOXC1 MIA CDH3 SFRP1 PHGDH EGFR"),
    "proliferation": ("Nielsen 2010", "BIRC5 CCNB1 CDC20 NUF2 CEP55 NDC80 MKI67 PTTG1 RRM2 TYMS UBE2C"),
    # Kauraniemi and Kallioniemi, Endocr Relat Cancer 2006: the smallest region of amplification at 17q12.
    "ERBB2 amplicon": ("Kauraniemi 2006", "PPP1R1B STARD3 TCAP PNMT PGAP3 ERBB2 MIEN1 GRB7 IKZF3"),
    # Sorlie et al., PNAS 2001: the cluster of luminal epithelium and the oestrogen receptor.
    "luminal epithelium": ("Sorlie 2001", "ESR1 GATA3 XBP1 TFF3 FOXA1 SLC39A6"),
    # Danaher et al., J Immunother Cancer 2017, table 1; KIAA0125 is FAM30A today.
    "B cells": ("Danaher 2017", "BLK CD19 FCRL2 MS4A1 FAM30A TNFRSF17 TCL1A SPIB PNOC"),
    "T cells": ("Danaher 2017", "CD6 CD3D CD3E SH2D1A TRAT1 CD3G"),
    "cytotoxic cells": ("Danaher 2017", "PRF1 GZMA GZMB NKG7 GZMH KLRK1 KLRB1 KLRD1 CTSW GNLY"),
}


def breast_markers() -> pd.DataFrame:
    """Return small gene sets of breast tumours from the literature, as an example for :func:`he2gene_sc.tl.enrichment`.

    Returns
    -------
    pandas.DataFrame
        Columns ``source`` (the set), ``target`` (gene symbol) and ``reference``.

    Notes
    -----
    Parker et al., Supervised risk predictor of breast cancer based on intrinsic subtypes, J Clin Oncol 2009, 27:1160,
    the PAM50 genes high in a subtype; Nielsen et al., A comparison of PAM50 intrinsic subtyping with
    immunohistochemistry and clinical prognostic factors in tamoxifen-treated estrogen receptor-positive breast cancer,
    Clin Cancer Res 2010, 16:5222, its eleven genes of proliferation; Kauraniemi and Kallioniemi, Activation of multiple
    cancer-associated genes at the ERBB2 amplicon in breast cancer, Endocr Relat Cancer 2006, 13:39; Sorlie et
    al., Gene expression patterns of breast carcinomas distinguish tumor subclasses with clinical implications, PNAS 2001,
    98:10869, genes of its luminal cluster; Danaher et al., Gene expression markers of Tumor Infiltrating Leukocytes,
    J Immunother Cancer 2017, 5:18, its B, T and cytotoxic cells. Symbols are the current ones. The sets are examples, not a
    classifier: for subtypes, use PAM50 itself.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sorted(hg.datasets.breast_markers().query("source == 'HER2-enriched'")["target"])
    ['ERBB2', 'FGFR4', 'GRB7', 'TMEM45B']
    """
    validate.arguments(breast_markers, locals())
    return pd.DataFrame(
        [(name, gene, source) for name, (source, genes) in _SETS.items() for gene in genes.split()],
        columns=["source", "target", "reference"],
    )


def toy_diseases() -> pd.DataFrame:
    """Return a small gene–disease network of the genes of :func:`he2gene_sc.datasets.toy`, for examples and tests.

    Returns
    -------
    pandas.DataFrame
        Columns ``source`` (an invented disease) and ``target`` (gene symbol), for :func:`he2gene_sc.tl.enrichment` and
        :func:`he2gene_sc.tl.programmes`.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> hg.datasets.toy_diseases()["source"].unique().tolist()
    ['carcinoma (toy)', 'fibrosis (toy)', 'lipodystrophy (toy)']
    """
    validate.arguments(toy_diseases, locals())
    names = {"carcinoma (toy)": "tumour", "fibrosis (toy)": "stroma", "lipodystrophy (toy)": "adipose"}
    return pd.DataFrame(
        [(name, gene) for name, planted in names.items() for gene in PLANTED[planted]], columns=["source", "target"]
    )
