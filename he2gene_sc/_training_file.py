"""Training files of ``he2gene train`` and ``he2gene benchmark --options``: read, and checked field by field."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ._core import validate
from .models._schema import explain

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


class _File(_Strict):
    sections: Texts | None = None
    data: _Data | None = None
    train: dict[str, Any] = {}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    ValueError
        If it is not one.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not a TOML file: {error}") from error


def read_training_file(path: Path, out: Path) -> tuple[Iterable[SpatialData], dict[str, Any]]:
    """Read a training file: sections, read one by one, and the arguments of :func:`he2gene_sc.tl.train`.

    Raises
    ------
    ValueError
        If it is not TOML, or a field is missing, unknown or of another type; the message names the file and the field.
    """
    try:
        found = _File.model_validate(read_toml(path))
    except ValidationError as error:
        raise ValueError(f"{path.name} is not valid: {explain(error)}") from error
    if (found.sections is None) == (found.data is None):
        raise ValueError(f"{path.name}: either a list `sections` or a table [data] is needed, beside a table [train]")
    options = check_options(found.train, f"{path.name}: [train]")
    for folder in options.keys() & {"cache", "checkpoint_dir"}:
        options[folder] = _folder(options[folder], folder, path, out)
    return _sections(found, path), options


def check_options(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check names and plain types of arguments of :func:`he2gene_sc.tl.train`; ``where`` begins the error.

    Raises
    ------
    ValueError
        If one is unknown, or of another type.
    """
    from inspect import Parameter, signature

    from .tl._train import train
    from .tl._train_input import check_fit_options

    named = {name for name, p in signature(train).parameters.items() if p.kind is not Parameter.VAR_KEYWORD}
    if "sdatas" in options:
        raise ValueError(f"{where} `sdatas` is not an option; name the sections in `sections` or [data]")
    try:
        validate.arguments(train, options)
        further = {name: value for name, value in options.items() if name not in named}
        check_fit_options(options.get("preset", "default"), further)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} {error}") from error
    return dict(options)


def _folder(value: Any, name: str, path: Path, out: Path) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{path.name}: [train] `{name}` is {value!r}; the path of a folder is needed")
    folder = (path.resolve().parent / Path(value).expanduser()).resolve()
    if folder.is_relative_to(out.expanduser().resolve()):
        raise ValueError(
            f"{path.name}: [train] `{name}` {str(folder)!r} lies in OUT {str(out)!r}, which holds the model alone; choose "
            "another folder"
        )
    return folder


def _sections(found: _File, path: Path) -> Iterable[SpatialData]:
    from . import datasets

    data = found.data
    if data is None:
        return (datasets.her2st(section) for section in found.sections or [])
    if data.stores is not None:
        if data.model_dump(exclude_none=True).keys() != {"stores"}:
            raise ValueError(f"{path.name}: [data] `stores` stands alone; remove the other fields")
        return _stores(data.stores, path)
    if data.hbcis is None:
        raise ValueError(f"{path.name}: [data] lacks `stores`, a list of SpatialData stores, or `hbcis`, a folder")
    patients = data.patients
    if isinstance(patients, str):
        split = {f"HE2GENE_SPLIT.{part}": getattr(datasets.HE2GENE_SPLIT, part) for part in ("train", "test")}
        try:
            patients = split[validate.one_of(patients, split, "patients")]
        except ValueError as error:
            raise ValueError(f"{path.name}: [data] {error}; or give a list of patients") from error
    return datasets.hbcis(
        path.resolve().parent / Path(data.hbcis).expanduser(), patients=patients, sections=data.sections
    )


def _stores(stores: list[str], path: Path) -> Iterable[SpatialData]:
    from .io._open import open_store
    from .io._save import is_store

    places = [path.resolve().parent / Path(store).expanduser() for store in stores]
    absent = [str(place) for place in places if not place.is_dir() or not is_store(place)]
    if absent:
        raise ValueError(f"{path.name}: [data] `stores` {absent} are not SpatialData stores")
    return (open_store(place, "`stores`") for place in places)
