"""Loading a damaged model folder raises an error that names the file."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import he2gene_sc as hg
from he2gene_sc.models import HE2Gene, load
from he2gene_sc.models._card import SCHEMA_VERSION, ModelCard
from he2gene_sc.stats import TAILS

CONTEXT = {"rings_um": [[50.0, 353.0]], "weights": [0.7], "prior_spots": 20.0}
GUARD = {"distance": [1.0, 1.0], "far": 0.5, "octaves": 0.5, "spread": -0.4, "variation": [-1.0, 1.0]}


@pytest.fixture(scope="module")
def full(tiny_model):
    """A model with all optional parts of a folder."""
    from dataclasses import replace

    f, g, c = len(tiny_model.tensors["latent.mean"]), len(tiny_model.genes), len(tiny_model.card.classes)
    tensors = tiny_model.tensors | {
        "latent.mixing": np.ones((10, 5), np.float16),
        "guard.projection": np.ones((f, 3), np.float16),
        "guard.bank": np.ones((7, 3 + 18), np.float16),
        "guard.size": np.ones(9, np.float32),
        "intervals.quantiles": np.ones((1 + c, 4, g), np.float16),
        "intervals.groups": np.ones((1 + c, g), np.int16),
        "intervals.spread": np.ones((2, g), np.float32),
        "intervals.detected": np.ones((4, g), np.float16),
        "intervals.detected_groups": np.ones(g, np.int16),
        "intervals.level_quantiles": np.ones((2, 3, len(TAILS), g), np.float16),
        "intervals.level_groups": np.ones((3, g), np.int16),
        "intervals.level_edges": np.ones((1, g), np.float32),
    }
    facts = {
        "unit": "section",
        "n_groups": 5,
        "levels": [0.5, 0.8, 0.9, 1.0],
        "max_coverage": 0.98,
        "spots": {"all": 9},
    }
    card = replace(tiny_model.card, context=CONTEXT, guard=GUARD, intervals=facts)
    return HE2Gene(card, tiny_model.genes, tensors)


@pytest.fixture
def folder(full, tmp_path):
    return full.save(tmp_path / "tiny")


def sign(folder, name):
    """Update the hash in the card after a change of a file."""
    card = json.loads((folder / "card.json").read_text())
    card["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "card.json").write_text(json.dumps(card))


def change_card(folder, path, value):
    card = json.loads((folder / "card.json").read_text())
    *parents, last = path.split(".")
    part = card
    for name in parents:
        part = part[name]
    if value is ABSENT:
        del part[last]
    else:
        part[last] = value
    (folder / "card.json").write_text(json.dumps(card))


def change_genes(folder, change):
    lines = [line.split(",") for line in (folder / "genes.csv").read_text().splitlines()]
    change(lines)
    (folder / "genes.csv").write_text("\n".join(",".join(line) for line in lines) + "\n")
    sign(folder, "genes.csv")


def change_tensor(folder, name, change):
    tensors = load_file(folder / "weights.safetensors")
    values = change(tensors.pop(name))
    save_file(tensors if values is None else tensors | {name: values}, folder / "weights.safetensors")
    sign(folder, "weights.safetensors")


ABSENT = object()
FIELDS = [name for name in ModelCard.__dataclass_fields__ if name != "schema_version"]
FIELDS += ["encoder.name", "encoder.license", "encoder.sha256", "encoder.input_px"]
FIELDS += [f"context.{name}" for name in CONTEXT] + [f"guard.{name}" for name in GUARD]
FIELDS += [f"intervals.{name}" for name in ("unit", "n_groups", "levels", "max_coverage", "spots")]
MAY_BE_NULL = {"annotation", "context", "guard", "intervals", "programmes", "context.prior_spots"}
TENSORS = [
    "annotation.bias",
    "annotation.weight",
    "colour.bias",
    "colour.genes",
    "colour.weight",
    "genes.bias",
    "genes.weight",
    "guard.bank",
    "guard.projection",
    "guard.size",
    "intervals.detected",
    "intervals.detected_groups",
    "intervals.groups",
    "intervals.level_edges",
    "intervals.level_groups",
    "intervals.level_quantiles",
    "intervals.quantiles",
    "intervals.spread",
    "latent.mean",
    "latent.mixing",
    "latent.projection",
    "latent.scale",
]


def test_a_folder_with_all_parts_is_read_as_it_was_saved(full, folder):
    found = load(folder)
    assert found.tensors.keys() == full.tensors.keys() == set(TENSORS)
    assert (found.card.guard, found.card.context) == (full.card.guard, full.card.context)


# card.json


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_or_a_field_of_another_type_is_named(folder, field):
    text = (folder / "card.json").read_text()
    for value in (ABSENT, None, {"a": [None]}, [{}], True, -1.5):
        if (value is None and field in MAY_BE_NULL) or (value is True and field == "tta"):
            continue
        if (field == "guard.spread" and value == -1.5) or (field in ("training", "metrics", "files") and value == {}):
            continue
        if field in ("training", "metrics") and value == {"a": [None]}:
            continue
        (folder / "card.json").write_text(text)
        change_card(folder, field, value)
        with pytest.raises(ValueError, match=r"card\.json") as raised:
            load(folder)
        assert field.split(".")[-1] in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("colour", "red"),
        ("encoder.colour", "red"),
        ("guard.colour", 1.0),
        ("n_genes", "40"),
        ("n_genes", 40.0),
        ("name", " "),
        ("windows_um", []),
        ("windows_um", [100.0, 0.0]),
        ("windows_um", [100.0, float("nan")]),
        ("windows_um", ["100", "200"]),
        ("classes", ["a", "a", "b"]),
        ("classes", ["a", "", "b"]),
        ("class_colors", ["#000000"]),
        ("class_colors", ["#000000", "#000000", "no colour"]),
        ("expression_scale", "counts"),
        ("encoder.sha256", "0123"),
        ("encoder.mean", None),
        ("encoder.mean", [0.5, 0.5]),
        ("encoder.std", [0.5, 0.5, 0.0]),
        ("encoder.stages", [-1]),
        ("encoder.interpolation", "nearest"),
        ("encoder.mpp", "0.5"),
        ("encoder.tiles", [1]),
        ("encoder.tiles", [0, 1]),
        ("context.rings_um", [[300.0, 50.0]]),
        ("context.weights", []),
        ("context.fine_below_mpp", 0.0),
        ("context", {"rings_um": [], "weights": [], "prior_spots": 20.0, "fine_below_mpp": 1.5}),
        ("context", CONTEXT | {"fine_below_mpp": 1.5}),  # `n_latent` is odd
        ("annotation", {"context": CONTEXT | {"fine_below_mpp": 1.5}}),
        ("intervals.unit", "spot"),
        ("intervals.levels", [0.9, 0.5, 0.8, 1.0]),
        ("training.sections", ["A1"]),
        ("files.genes.csv", ABSENT),
    ],
)
def test_an_invalid_value_of_the_card_is_named(folder, field, value):
    if field == "files.genes.csv":
        card = json.loads((folder / "card.json").read_text())
        del card["files"]["genes.csv"]
        (folder / "card.json").write_text(json.dumps(card))
    else:
        change_card(folder, field, value)
    with pytest.raises(ValueError, match=r"card\.json"):
        load(folder)


@pytest.mark.parametrize(
    "data", [b"\xff\xfe" + b"x" * 50, b"{" * 99_999, b"[" * 99_999, b"\x00", b'{"schema_version": true}']
)
def test_a_card_that_is_not_a_json_text_raises(folder, data):
    (folder / "card.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"card\.json"):
        load(folder)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["card.json", "genes.csv", "weights.safetensors"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_truncated_file_raises(folder, name, part, signed):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(part * len(data))])
    if signed and name != "card.json":
        sign(folder, name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99, 10**30])
def test_the_error_of_a_newer_schema_gives_the_command_to_upgrade(folder, version):
    change_card(folder, "schema_version", version)
    with pytest.raises(ValueError, match="pip install -U he2gene_sc"):
        load(folder)


# genes.csv


def set_cell(column, value):
    def change(lines):
        lines[3][lines[0].index(column)] = value

    return change


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("reliable", cell) for cell in ("nan", "", "1", "yes", "False ", "None")),
        ("variable", "0"),
        *(("gene", cell) for cell in ("", " ", " ERBB2", "A\tB")),
        ("group", "other"),
        ("group", ""),
        ("ensembl_id", "ENSG 1"),
        *(("pcc", cell) for cell in ("nan", "inf", "-inf", "1e999", "x", "1.5", "0,5", "1_0", "True")),
        *((column, "x") for column in ("mean", "pcc_low", "skill")),
    ],
)
def test_an_invalid_cell_of_the_gene_table_is_named_by_its_column(folder, column, value):
    change_genes(folder, set_cell(column, value))
    with pytest.raises(ValueError, match=r"genes\.csv"):
        load(folder)


@pytest.mark.parametrize(
    "column", ["gene", "ensembl_id", "group", "variable", "mean", "pcc", "pcc_low", "skill", "reliable"]
)
def test_a_missing_column_of_the_gene_table_is_named(folder, column):
    def drop(lines):
        at = lines[0].index(column)
        for line in lines:
            del line[at]

    change_genes(folder, drop)
    with pytest.raises(ValueError, match=rf"genes\.csv lacks \['{column}'\]"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines.append(lines[-1]),
        lambda lines: lines[2].__setitem__(0, lines[1][0]),
        lambda lines: lines.pop(),
        lambda lines: lines[2].append("1"),
        lambda lines: lines[2].pop(),
        lambda lines: lines.insert(2, []),
        lambda lines: [line.append("1") for line in lines],
        lambda lines: [line.append(line[0]) for line in lines],
        lambda lines: lines.clear(),
        lambda lines: lines.__delitem__(slice(1, None)),
    ],
)
def test_a_gene_table_with_other_rows_or_columns_raises(folder, change):
    change_genes(folder, change)
    with pytest.raises(ValueError, match=r"genes\.csv"):
        load(folder)


def test_rows_in_another_order_than_the_weights_raise(full, tmp_path):
    bias = np.linspace(0.1, 3, len(full.genes), dtype=np.float32)
    model = HE2Gene(full.card, full.genes.assign(mean=bias.astype(float)), full.tensors | {"genes.bias": bias})
    folder = model.save(tmp_path / "model")
    assert load(folder).genes.index.equals(full.genes.index)

    def swap(lines):
        lines[1], lines[3] = lines[3], lines[1]

    change_genes(folder, swap)
    with pytest.raises(
        ValueError,
        match=r"model/genes.csv: the means of 2 genes are exchanged, such as .*another order than the weights",
    ):
        load(folder)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"\xef\xbb\xbfgene,group\n", b'gene,"\n'])
def test_a_gene_table_that_is_not_a_csv_text_raises(folder, data):
    (folder / "genes.csv").write_bytes(data)
    sign(folder, "genes.csv")
    with pytest.raises(ValueError, match=r"genes\.csv"):
        load(folder)


# weights.safetensors


def not_a_number(values):
    values = values.copy()
    values.flat[-1] = np.nan
    return values


DAMAGES = {
    "missing": lambda values: None,
    "one short": lambda values: values[:-1].copy(),
    "one short in columns": lambda values: values[..., :-1].copy(),
    "one too many": lambda values: np.concatenate([values, values[:1]]),
    "another axis": lambda values: values[None].copy(),
    "NaN": not_a_number,
    "infinite": lambda values: np.where(np.arange(values.size).reshape(values.shape) == 0, np.inf, values),
    "truth": lambda values: values > 0,
    "complex": lambda values: values.astype(np.complex64),
}
#: Valid changes: quantiles may be infinite, and the bank may have any number of spots.
HARMLESS = {
    ("intervals.quantiles", "infinite"),
    ("intervals.detected", "infinite"),
    ("intervals.level_quantiles", "infinite"),
    ("guard.bank", "one short"),
    ("guard.bank", "one too many"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_does_not_fit_the_card_raises(folder, name, damage):
    values = load_file(folder / "weights.safetensors")[name]
    if (name, damage) in HARMLESS:
        pytest.skip("a valid change")
    if values.dtype.kind == "i" and damage in ("NaN", "infinite"):
        change_tensor(folder, name, lambda values: values.astype(np.float32))
    elif name in ("intervals.quantiles", "intervals.detected", "intervals.level_quantiles") and damage == "NaN":
        change_tensor(folder, name, lambda values: np.full_like(values, np.nan))
    else:
        change_tensor(folder, name, DAMAGES[damage])
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load(folder)


@pytest.mark.parametrize("name", ["surprise", "genes", "latent.more"])
def test_an_unknown_tensor_is_named(folder, name):
    save_file(
        load_file(folder / "weights.safetensors") | {name: np.zeros(3, np.float32)}, folder / "weights.safetensors"
    )
    sign(folder, "weights.safetensors")
    with pytest.raises(ValueError, match=rf"weights\.safetensors holds \['{name}'\]"):
        load(folder)


def test_a_pickle_instead_of_weights_raises_and_does_not_run(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"genes.weight": Trap()}, folder / "weights.safetensors")
    sign(folder, "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a safetensors file"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_finite_cannot_be_saved_or_used(full, tmp_path):
    tensors = full.tensors | {"genes.weight": np.full_like(full.tensors["genes.weight"], np.nan)}
    model = HE2Gene(full.card, full.genes, tensors)
    with pytest.raises(ValueError, match="'genes.weight' holds .* not finite"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="not finite"):
        hg.tl.predict(hg.datasets.toy((2, 2), mpp=4.0), model=model)


# Encoders that a card names


@pytest.mark.parametrize(
    "name", ["hf-hub:someone/net", "hf_hub:someone/net@v1", "local-dir:/etc", "/etc", "a/b", "C:\\net"]
)
def test_a_card_may_not_name_the_source_of_its_encoder_without_consent(folder, monkeypatch, name):
    import timm

    def create_model(*_, **__):
        raise AssertionError("timm was called")

    monkeypatch.setattr(timm, "create_model", create_model)
    change_card(folder, "encoder.name", name)
    with pytest.raises(ValueError, match="allow_encoder_source=True"):
        _ = load(folder).network


def test_with_consent_the_encoder_is_fetched_from_the_source_on_the_card(folder, monkeypatch):
    import timm

    requests = []

    def create_model(name, **_):
        requests.append(name)
        raise OSError("enough")

    monkeypatch.setattr(timm, "create_model", create_model)
    change_card(folder, "encoder.name", "hf-hub:someone/net")
    with pytest.raises(RuntimeError, match="enough"):
        _ = load(folder, allow_encoder_source=True).network
    assert requests == ["hf-hub:someone/net"]


def test_the_command_line_reports_a_damaged_folder_without_a_traceback(folder, monkeypatch, capsys):
    from he2gene_sc.cli import app as cli

    change_card(folder, "n_genes", "many")
    monkeypatch.setattr("sys.argv", ["he2gene", "info", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capsys.readouterr()
    assert ended.value.code == 1
    assert output.err.startswith("he2gene: `model`: tiny/card.json is not valid: `n_genes` is 'many'")
    assert "Traceback" not in output.err + output.out
