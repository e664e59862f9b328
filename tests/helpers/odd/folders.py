"""Odd model folders: damaged cards, gene tables and weights with valid hashes."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import he2gene_sc as hg
from tests.helpers.odd.harness import Odd, labelled, tiny
from tests.helpers.odd.verbs import VERBS, clean

ODD_VALUES: dict[str, Any] = {
    "null": None,
    "a number": 7,
    "a negative number": -1,
    "a text": "odd",
    "an empty text": "",
    "a list": [1, "b"],
    "an object": {"a": 1},
    "true": True,
    "a huge number": 1e308,
}
ODD_TENSORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "is one short": lambda values: values[:-1],
    "has an axis more": lambda values: values[None],
    "is empty": lambda values: values[:0],
    "is NaN": lambda values: np.full(values.shape, np.nan, np.float32),
    "is infinite": lambda values: np.full(values.shape, np.inf, np.float32),
    "is whole numbers": lambda values: np.round(values).astype(np.int64),
    "is texts": lambda values: np.frombuffer(values.tobytes(), np.uint8),
}
#: Odd but valid changes: another model with a valid hash.
MEANT = {
    "tta of the card is true",
    "gene of a gene is '-1'",
    "gene of a gene is 'nan'",
    "gene of a gene is 'odd'",
    "gene of a gene is '1e999'",
    "ensembl_id of a gene is ''",
    "mean of a gene is ''",
    "pcc of a gene is ''",
    "pcc of a gene is '-1'",
}
COLUMNS = ("gene", "ensembl_id", "group", "variable", "mean", "pcc", "pcc_low", "ceiling", "skill", "reliable")
TENSORS = (
    "latent.mean",
    "latent.scale",
    "latent.projection",
    "latent.mixing",
    "genes.weight",
    "genes.bias",
    "annotation.weight",
    "annotation.bias",
    "colour.weight",
    "colour.bias",
    "colour.genes",
    "intervals.quantiles",
    "intervals.spread",
    "guard.bank",
    "guard.size",
)
#: Fields that do not affect results, so any text is right.
FREE = {
    "description",
    "intended_use",
    "limitations",
    "reliable_rule",
    "license",
    "training",
    "metrics",
    "version",
    "name",
}


@cache
def _saved() -> dict[str, bytes]:
    place = Path(mkdtemp(prefix="he2gene-odd-")) / "model"
    tiny()[1].save(place)
    return {path.name: path.read_bytes() for path in place.iterdir()}


def _folder() -> Path:
    place = Path(mkdtemp(prefix="he2gene-odd-")) / "model"
    place.mkdir()
    for name, content in _saved().items():
        (place / name).write_bytes(content)
    return place


def _weights(place: Path) -> Path:
    (found,) = place.glob("*.safetensors")
    return found


def _refit(place: Path, name: str, before: bytes) -> None:
    """Update the hash on the card for a changed file."""
    card = place / "card.json"
    old, new = (hashlib.sha256(content).hexdigest() for content in (before, (place / name).read_bytes()))
    card.write_text(card.read_text().replace(old, new))


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(hg.models.ModelCard)]


def _card(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        card = json.loads((place / "card.json").read_text())
        change(card)
        (place / "card.json").write_text(json.dumps(card))

    return apply


def _tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        path = _weights(place)
        before = path.read_bytes()
        tensors = load_file(path)
        change(tensors)
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
        _refit(place, path.name, before)

    return apply


def _genes(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        path = place / "genes.csv"
        before = path.read_bytes()
        path.write_text("\n".join(change(before.decode().rstrip("\n").split("\n"))) + "\n")
        _refit(place, path.name, before)

    return apply


def _cell(column: str, value: str) -> Callable[[list[str]], list[str]]:
    def change(lines: list[str]) -> list[str]:
        position = lines[0].split(",").index(column)
        cells = lines[-1].split(",")
        cells[position] = value
        return [*lines[:-1], ",".join(cells)]

    return change


def _without(column: str) -> Callable[[list[str]], list[str]]:
    def change(lines: list[str]) -> list[str]:
        position = lines[0].split(",").index(column)
        return [",".join(c for i, c in enumerate(line.split(",")) if i != position) for line in lines]

    return change


FILES: dict[str, Callable[[Path], Any]] = {
    "the card is gone": lambda p: (p / "card.json").unlink(),
    "the genes are gone": lambda p: (p / "genes.csv").unlink(),
    "the weights are gone": lambda p: _weights(p).unlink(),
    "the card is empty": lambda p: (p / "card.json").write_text(""),
    "the card is bytes": lambda p: (p / "card.json").write_bytes(b"\xff\xfe" + b"x" * 50),
    "the card is a list": lambda p: (p / "card.json").write_text("[]"),
    "the card is cut": lambda p: (p / "card.json").write_bytes(_saved()["card.json"][:300]),
    "the genes are cut": lambda p: (p / "genes.csv").write_bytes(_saved()["genes.csv"][:300]),
    "the weights are cut": lambda p: _weights(p).write_bytes(_weights(p).read_bytes()[:300]),
    "the weights are a pickle": lambda p: _weights(p).write_bytes(b"\x80\x04K\x01."),
    "the weights are changed by a bit": lambda p: _flip(_weights(p)),
    "the genes are a folder": lambda p: ((p / "genes.csv").unlink(), (p / "genes.csv").mkdir()),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def _odd(what: str, change: Callable[[Path], Any], answered: bool = True) -> Odd:
    def make() -> tuple[Callable[[], Any], list[Any], Any]:
        expected = clean("predict") if answered else None
        place = _folder()
        change(place)
        sdata = labelled(0)

        def call() -> Any:
            model = hg.models.load(place, encoder=tiny()[0])
            returned = hg.tl.predict(sdata, model=model, show_progress_bar=False)
            return expected if what in MEANT else VERBS["predict"].read([sdata], returned)

        return call, [place, sdata], expected

    return Odd(f"model folder / {what}", make)


def odd_inputs() -> Iterator[Odd]:
    """Yield folders with changed fields, cells and tensors. Unused parts may be odd if the prediction does not change."""
    for what, change in FILES.items():
        yield _odd(what, change, answered=False)
    for field in _fields():
        yield _odd(f"the card lacks {field}", _card(lambda card, f=field: card.pop(f)))
        for what, value in ODD_VALUES.items():
            yield _odd(f"{field} of the card is {what}", _card(lambda card, f=field, v=value: card.update({f: v})))
    for column in COLUMNS:
        yield _odd(f"the genes lack {column}", _genes(_without(column)))
        for value in ("", "nan", "odd", "-1", "1e999"):
            yield _odd(f"{column} of a gene is {value!r}", _genes(_cell(column, value)))
    yield _odd("a gene stands twice", _genes(lambda lines: [*lines[:-1], lines[-2]]))
    yield _odd("a gene is missing", _genes(lambda lines: lines[:-1]))
    yield _odd("a gene too many", _genes(lambda lines: [*lines, lines[-1].replace(lines[-1].split(",")[0], "MORE", 1)]))
    for name in TENSORS:
        yield _odd(f"{name} is missing", _tensors(lambda t, n=name: t.pop(n)))
        for what, change in ODD_TENSORS.items():
            yield _odd(f"{name} {what}", _tensors(lambda t, n=name, c=change: t.update({n: c(t[n])})))
