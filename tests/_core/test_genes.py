import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import he2gene_sc as hg
from he2gene_sc._core.genes import (
    columns_of,
    current_symbols,
    find_genes,
    match_genes,
    match_names,
    previous_symbols,
)
from he2gene_sc.tl._train.names import common_names
from tests.helpers.patients import pool

RENAMED = {"SEPT2": "SEPTIN2", "H2AFZ": "H2AZ1", "MARCH7": "MARCHF7", "H1F0": "H1-0", "ATP5B": "ATP5F1B"}


def test_each_previous_symbol_belongs_to_one_gene():
    table = previous_symbols()
    assert {old: table[old] for old in RENAMED} == RENAMED
    # Current symbols are not read as previous symbols.
    assert not set(table) & set(table.values())
    assert current_symbols(["SEPT2", "SEPTIN2", "ERBB2", "no gene"]).tolist() == [
        "SEPTIN2",
        "SEPTIN2",
        "ERBB2",
        "no gene",
    ]


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_genes_are_found_by_either_symbol(old, new):
    assert find_genes([old], ["ERBB2", new]).tolist() == [1]
    assert find_genes([new], ["ERBB2", old]).tolist() == [1]


def test_a_current_symbol_has_priority_over_a_previous_one():
    assert find_genes(["SEPT2", "SEPTIN2"], ["SEPTIN2"]).tolist() == [-1, 0]
    assert find_genes(["SEPTIN2"], ["SEPT2", "SEPTIN2"]).tolist() == [1]
    assert find_genes(["SEPT2", "SEPTIN2"], ["SEPTIN2"], one_to_one=False).tolist() == [0, 0]


def test_genes_without_a_name_or_an_id_are_not_matched():
    names = pd.Index(["", "ENSG01.3", "B", "ENSG02"])
    found, renamed = match_names(names, pd.Index(["A", "B", "C", "D"]), ["ENSG01", "", "ENSG02", "ENSG02"])
    assert (found.tolist(), renamed) == ([-1, 0, 1, -1], {})


def test_two_previous_symbols_of_one_gene_are_ambiguous():
    assert find_genes(["NEDD5", "SEPT2"], ["SEPTIN2"]).tolist() == [-1, -1]
    assert find_genes(["SEPTIN2"], ["NEDD5", "SEPT2"]).tolist() == [-1]


def test_the_first_of_duplicated_names_is_found():
    assert find_genes(["B", "A"], ["A", "B", "B"]).tolist() == [1, 0]


def test_a_table_with_new_symbols_is_matched_to_a_model_with_old_ones(caplog):
    model = hg.models.load()
    old = [gene for gene in RENAMED if gene in model.genes.index]
    assert len(old) >= 3
    names = [*model.genes.index[:50].difference(list(RENAMED)), *(RENAMED[gene] for gene in old), "no gene"]
    table = AnnData(np.ones((2, len(names))), var=pd.DataFrame(index=names))
    caplog.set_level("INFO")
    found = match_genes(model, table, None, None)
    assert found.renamed == {RENAMED[gene]: gene for gene in old}
    assert set(old) <= set(model.genes.index[found.positions])
    assert f"{len(old)} of them by another symbol that HGNC lists" in caplog.text
    # Both names can be used.
    for asked in (old[0], RENAMED[old[0]]):
        only = match_genes(model, table, [asked], None)
        assert table.var_names[only.columns].tolist() == [RENAMED[old[0]]]


def test_a_gene_that_a_table_lists_under_both_names_is_predicted_once():
    model = hg.models.load()
    names = [*model.genes.index[:20].difference(["SEPT2"]), "SEPT2", "SEPTIN2"]
    found = match_genes(model, AnnData(np.ones((2, len(names))), var=pd.DataFrame(index=names)), None, None)
    assert not found.renamed
    assert names.index("SEPTIN2") not in found.columns


def test_columns_are_named_by_index_by_symbol_or_by_another_symbol():
    var = pd.DataFrame({"symbol": ["ERBB2", "SEPTIN2", "TWICE", "TWICE", None]}, index=[f"ENSG{i}" for i in range(5)])
    table = AnnData(np.ones((2, 5)), var=var)
    asked = ["ENSG0", "ERBB2", "SEPT2", "SEPTIN2", "TWICE", "no", ""]
    assert columns_of(table, asked, "symbol").tolist() == [0, 0, 1, 1, -1, -1, -1]
    assert columns_of(table, asked, None).tolist() == [0, -1, -1, -1, -1, -1, -1]


def test_plots_and_tables_use_the_gene_symbols_of_predict(tiny_model):
    sdata = hg.datasets.toy((4, 4), mpp=2.0)
    table = sdata["table"]
    table.var["symbol"] = table.var_names.to_numpy(object)
    table.var_names = [f"ENSG{i:011d}" for i in range(table.n_vars)]
    hg.tl.predict(sdata, model=tiny_model, gene_symbols="symbol")
    gene = table.var["symbol"][hg.get.genes(sdata)[0]]
    ax = hg.pl.spatial(sdata, gene, measured=False)
    assert gene in ax.get_title()
    with pytest.raises(ValueError, match=r"`genes` \['no'\] were not predicted"):
        hg.pl.spatial(sdata, ["no"])


def test_objects_of_different_annotations_share_renamed_genes():
    slides = [hg.datasets.toy((6, 6), seed=seed)["table"] for seed in range(2)]
    for i, (table, name) in enumerate(zip(slides, ("SEPT2", "SEPTIN2"), strict=True)):
        table.obs["patient"] = f"P{i}"
        table.var_names = [name, *table.var_names[1:]]
    for join in ("inner", "outer"):
        pooled = pool(slides, "pathologist", layer=None, join=join)
        assert "SEPT2" in pooled.genes
        assert "SEPTIN2" not in pooled.genes
        values = pooled.values(np.ones(len(pooled.labels), bool), pd.Index(["SEPT2"]))
        assert (values > 0).any()


def test_sections_of_different_annotations_are_trained_on_one_name():
    lists = {"a": pd.Index(["SEPT2", "ERBB2", "H2AFZ"]), "b": pd.Index(["SEPTIN2", "ERBB2", "H2AFZ"])}
    assert common_names(lists) == {"SEPT2": "SEPTIN2"}
    assert common_names({"a": lists["a"]}) == {}
    assert common_names(lists | {"c": pd.Index(["SEPT2", "SEPTIN2"])}) == {}
