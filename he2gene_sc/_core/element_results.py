"""Write elements into a SpatialData object: check first, replace as a whole, record in ``sdata.attrs``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .elements import he2gene_attrs
from .keys import ATTRS, check_key
from .signatures import element_digest, is_element_unchanged

if TYPE_CHECKING:
    from spatialdata import SpatialData

#: ``sdata.attrs[ATTRS][_WRITTEN][kind][name]``: digest of the element that we wrote.
_WRITTEN = "written"


def check_element_free(sdata: SpatialData, verb: str, kind: str, name: str) -> None:
    """Raise, before any work, if an element of this name exists that ``verb`` did not write."""
    check_key(name, "key_added")
    facts = he2gene_attrs(sdata)
    for other_kind, other, _ in sdata.gen_elements():
        if other.lower() != name.lower():
            continue
        where = f"`key_added`: {other_kind}[{other!r}] exists"
        if other != name:
            raise ValueError(f"{where}, which differs from {name!r} only in case; choose another name")
        written = facts.get(_WRITTEN, {}).get(kind, {})
        # Version 0.6.0 only recorded the names of grids.
        if other_kind != kind or (name not in written and not (kind == "shapes" and name in facts.get("grids", []))):
            raise ValueError(
                f"{where} and was not written by {verb}; choose another name, or delete it first: del "
                f"sdata.{other_kind}[{name!r}]"
            )
        if name in written and not is_element_unchanged(getattr(sdata, kind)[name], written[name]):
            raise ValueError(
                f"{where} and was changed after {verb} wrote it; keep it under another name, or delete it first: del "
                f"sdata.{kind}[{name!r}]"
            )


def write_element(
    sdata: SpatialData, kind: str, name: str, element: Any, facts: Mapping[str, Any] | None = None
) -> None:
    """Set an element, record it in ``sdata.attrs`` together with ``facts``; all or nothing."""
    before = he2gene_attrs(sdata)
    written = {**before.get(_WRITTEN, {})}
    written[kind] = {**written.get(kind, {}), name: element_digest(element)}
    with replaced_element(sdata, kind, name, element):
        sdata.attrs[ATTRS] = {**before, **(facts or {}), _WRITTEN: written}


@contextmanager
def replaced_element(sdata: SpatialData, kind: str, name: str, element: Any) -> Iterator[None]:
    """Set an element, replacing one of the same name; undo it if the block raises, also on Ctrl-C."""
    elements = getattr(sdata, kind)
    before, attrs = dict(elements.items()), dict(sdata.attrs)
    try:
        if name in elements:
            del elements[name]
        elements[name] = element
        yield
    except BaseException:
        with warnings.catch_warnings(action="ignore"):
            if name in elements and elements[name] is not before.get(name):
                del elements[name]
            if name in before and name not in elements:
                elements[name] = before[name]
        sdata.attrs.clear()
        sdata.attrs.update(attrs)
        raise


def is_as_written(attrs: Mapping[str, Any], kind: str, name: str, element: Any) -> bool:
    """Whether labels or shapes are unchanged since one of our functions wrote them, by the record in ``attrs``."""
    written = attrs.get(ATTRS, {}).get(_WRITTEN, {}).get(kind, {})
    return name in written and is_element_unchanged(element, written[name])


def copy_tables(sdata: SpatialData) -> SpatialData:
    """Return an object that shares all elements except the tables, which are copied."""
    import spatialdata as sd

    elements: dict[str, Any] = {name: element for _, name, element in sdata.gen_spatial_elements()}
    tables = {name: table.copy() for name, table in sdata.tables.items()}
    return sd.SpatialData.init_from_elements({**elements, **tables}, attrs=dict(sdata.attrs))
