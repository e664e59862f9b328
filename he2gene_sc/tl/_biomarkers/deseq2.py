"""DESeq2 on sums of counts, with PyDESeq2."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import pandas as pd

from ...stats import CountSums, SampleTest


def deseq2(sums: CountSums, *, level: float, lfc: float) -> SampleTest:
    """Run PyDESeq2 with the design ``~ sample + group``; effects are natural logarithms."""
    dds_class, stats_class = import_pydeseq2()
    n, g = sums.counts.shape[1:]
    names = [f"{side}{i}" for side in ("group", "reference") for i in range(n)]
    rows = pd.DataFrame({"side": ["group"] * n + ["reference"] * n, "sample": [f"s{i}" for i in range(n)] * 2}, names)
    counts = pd.DataFrame(np.rint(sums.counts).astype(int).reshape(2 * n, g), names, [str(i) for i in range(g)])
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        fitted = dds_class(counts=counts, metadata=rows, design="~ sample + side", quiet=True, n_cpus=1)
        fitted.deseq2()
        null = {"alt_hypothesis": "greaterAbs", "lfc_null": lfc} if lfc else {}
        tests = stats_class(
            fitted, contrast=["side", "group", "reference"], independent_filter=False, quiet=True, n_cpus=1, **null
        )
        tests.summary()
    table = tests.results_df.loc[counts.columns]
    from scipy import stats

    effect, error = (table[name].to_numpy(float) * np.log(2) for name in ("log2FoldChange", "lfcSE"))
    half = stats.norm.ppf(0.5 + level / 2) * error
    return SampleTest(
        effect,
        effect - half,
        effect + half,
        table["stat"].to_numpy(float),
        table["pvalue"].to_numpy(float),
        np.full(g, np.inf),
    )


def import_pydeseq2() -> tuple[type, type]:
    """Import PyDESeq2, an optional dependency."""
    try:
        from pydeseq2.dds import DeseqDataSet
        from pydeseq2.ds import DeseqStats
    except ImportError as error:
        raise ImportError(
            "`method` 'deseq2' needs PyDESeq2, which is not installed; pip install 'he2gene_sc[deseq2]'"
        ) from error
    return DeseqDataSet, DeseqStats
