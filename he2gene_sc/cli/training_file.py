"""Read and check the TOML files of ``he2gene train`` and ``he2gene benchmark --options``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .._core import validate
from .._core.validate import suggest
from ..models._schema import explain
from ..tl._train.options import PRESETS, CardText, Classes, DefaultRecipe, GeneSelection, PaperRecipe, SectionKeys

if TYPE_CHECKING:
    from spatialdata import SpatialData

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Data(_Strict):
    stores: Texts | None = None
    hbcis: Text | None = None
    patients: Text | Texts | None = None
    sections: Texts | None = None
    hest: Text | None = None
    ids: Text | Texts | None = None
    organ: Text | Texts | None = None
    species: Text | Texts | None = None
    technology: Text | Texts | None = None


#: Sources of sections, with their type and the fields that select sections.
_SOURCES = {
    "stores": ("a list of SpatialData stores", ()),
    "hbcis": ("a folder", ("patients", "sections")),
    "hest": ("a folder", ("ids", "organ", "species", "technology")),
}
#: Parts of the split that may be named instead of a list.
_PARTS = {"patients": ("train", "test"), "ids": ("hest_train", "hest_test", "hest_her2st")}


class _File(_Strict):
    sections: Texts | None = None
    data: _Data | None = None
    train: dict[str, Any] = {}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file."""
    path = validate.folder_or_file(path, "path")
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is a folder, or does not exist; name a TOML file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not a TOML file: {error}") from error


def read_training_file(path: Path, out: Path) -> tuple[Iterable[SpatialData], dict[str, Any]]:
    """Read a training file; return the sections, read one at a time, and the arguments of :func:`he2gene_sc.tl.train`."""
    path = path.expanduser()
    try:
        found = _File.model_validate(read_toml(path))
    except ValidationError as error:
        raise ValueError(f"{path.name} is not valid: {explain(error)}") from error
    if (found.sections is None) == (found.data is None):
        raise ValueError(f"{path.name}: either a list `sections` or a table [data] is needed, besides a table [train]")
    options = found.train
    recipe, genes = (options[name] if isinstance(options.get(name), dict) else {} for name in ("preset", "genes"))
    if isinstance(genes.get("programmes"), str):
        genes["programmes"] = _place(genes["programmes"], path)
    for table, name in ((options, "cache"), (recipe, "checkpoint_dir")):
        if name not in table:
            continue
        if not isinstance(table[name], str) or not table[name].strip():
            raise ValueError(f"{path.name}: [train] `{name}` is {table[name]!r}; the path of a folder is needed")
        table[name] = _place(table[name], path).resolve()
        if table[name].is_relative_to(out.expanduser().resolve()):
            raise ValueError(
                f"{path.name}: [train] `{name}` {str(table[name])!r} lies in OUT {str(out)!r}, which may only hold the model; choose "
                "another folder"
            )
    return _sections(found, path), train_options(options, f"{path.name}: [train]")


def _place(text: str, file: Path) -> Path:
    """Return a path in a training file, which is relative to the file."""
    return file.resolve().parent / Path(text).expanduser()


def train_options(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert a table to checked arguments of :func:`he2gene_sc.tl.train`, and its tables to dataclasses."""
    from inspect import signature

    from ..tl._train.train import train

    if "sdatas" in options:
        raise ValueError(f"{where} `sdatas` is not an option; name the sections in `sections` or [data]")
    preset = options.get("preset", {})
    paper = isinstance(preset, dict) and preset.get("name", "default") != "default"
    tables: dict[str, Any] = {"preset": PaperRecipe if paper else DefaultRecipe, "keys": SectionKeys}
    tables |= {"classes": Classes, "genes": GeneSelection, "card": CardText}
    valid = list(signature(train).parameters)
    found, at = dict(options), where
    try:
        for name in found.keys() - set(valid):
            owners = [table for table, kind in tables.items() if name in _fields(kind)]
            hint = f"; it is a field of the table `{owners[0]}`" if owners else suggest(name, valid)
            raise ValueError(f"`{name}` is not an argument of hg.tl.train{hint}")
        validate.arguments(train, found)
        for table, kind in tables.items():
            if isinstance(given := found.get(table), dict):
                at = f"{where[:-1]}.{table}]"
                found[table] = _make_dataclass(kind, given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{at} {error}") from error
    return found


def _make_dataclass(kind: Any, table: Mapping[str, Any]) -> Any:
    given = {name: value for name, value in table.items() if kind is not DefaultRecipe or name != "name"}
    if unknown := sorted(given.keys() - set(_fields(kind))):
        paper = kind is DefaultRecipe and unknown[0] in _fields(PaperRecipe)
        hint = f"; it needs `name`, one of {list(PRESETS[1:])}" if paper else suggest(unknown[0], _fields(kind))
        raise ValueError(f"`{unknown[0]}` is not a field, valid: {_fields(kind)}{hint}")
    return kind(**given)


def _fields(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def _sections(found: _File, path: Path) -> Iterable[SpatialData]:
    from .. import datasets

    data = found.data
    if data is None:
        validate.all_different(found.sections or [], f"{path.name}: sections")
        return (datasets.her2st(section) for section in found.sections or [])
    given = data.model_dump(exclude_none=True)
    if "stores" in given and len(given) > 1:
        raise ValueError(f"{path.name}: [data] `stores` does not go with other fields; remove them")
    sources = [name for name in _SOURCES if name in given]
    if len(sources) != 1:
        listed = " or ".join(f"`{name}`, {what}" for name, (what, _) in _SOURCES.items())
        problem = f"names {sources}; one of them is needed" if sources else f"lacks {listed}"
        raise ValueError(f"{path.name}: [data] {problem}")
    (source,) = sources
    place, valid = given.pop(source), _SOURCES[source][1]
    if others := sorted(given.keys() - set(valid)):
        raise ValueError(
            f"{path.name}: [data] {others} do not go with `{source}`, which takes {list(valid)}; remove them"
        )
    if source == "stores":
        return _stores(place, path)
    for name, parts in _PARTS.items():
        if isinstance(value := given.get(name), str):
            split = {f"HE2GENE_SPLIT.{part}": getattr(datasets.HE2GENE_SPLIT, part) for part in parts}
            try:
                given[name] = split[validate.one_of(value, split, name)]
            except ValueError as error:
                raise ValueError(f"{path.name}: [data] {error}; or pass a list of {name}") from error
    return getattr(datasets, source)(_place(place, path), **given)


def _stores(stores: list[str], path: Path) -> Iterable[SpatialData]:
    from ..io._open import open_store
    from ..io._save import is_store

    places = [_place(store, path) for store in stores]
    validate.all_different([str(place.resolve()) for place in places], f"{path.name}: [data] stores", "stores")
    if absent := [str(place) for place in places if not place.is_dir() or not is_store(place)]:
        raise ValueError(f"{path.name}: [data] `stores` {absent} are not SpatialData stores")
    return (open_store(place, "`stores`") for place in places)
