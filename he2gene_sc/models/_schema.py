"""Schema of a model card: every field with its type."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from ._embedding import Context
from ._encoders.registry import Interpolation
from ._stain import N_STAIN

ExpressionScale = Literal["natural log of (1 + counts per 10,000)"]
EXPRESSION_SCALE: ExpressionScale = "natural log of (1 + counts per 10,000)"
#: Most faults that one error lists.
_MAX_LISTED = 3
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEX_COLOUR = re.compile(r"#[0-9a-fA-F]{6}([0-9a-fA-F]{2})?")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("a text that is not blank is needed")
    return text


def _sha256(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ValueError("64 hexadecimal digits are needed")
    return text


def _colour(text: str) -> str:
    from matplotlib.colors import is_color_like

    if not _HEX_COLOUR.fullmatch(text) and not is_color_like(text):
        raise ValueError("a colour such as '#2ca02c' is needed")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
Colour = Annotated[str, AfterValidator(_colour)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]
NotNegative = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Three = Annotated[list[Number], Field(min_length=3, max_length=3)]
Two = Annotated[list[Number], Field(min_length=2, max_length=2)]


#: Default of a field that may be absent, but not null.
_ABSENT: Any = None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Encoder(_Strict):
    name: Text
    license: str
    sha256: Sha256
    input_px: Count
    mean: Three = _ABSENT
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)] = _ABSENT
    stages: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = _ABSENT
    output: Annotated[list[Number], Field(min_length=1)] = _ABSENT
    mpp: Positive | list[Positive] = _ABSENT
    interpolation: Interpolation = _ABSENT
    tiles: Annotated[list[Count], Field(min_length=1)] = _ABSENT


class _Context(_Strict):
    rings_um: list[Two]
    weights: list[Number]
    prior_spots: NotNegative | None
    fine_below_mpp: Positive = _ABSENT


class _Intervals(_Strict):
    unit: Literal["patient", "section"]
    n_groups: Annotated[int, Field(ge=0)]
    levels: Annotated[list[Share], Field(min_length=1)]
    max_coverage: Share
    spots: dict[str, Annotated[int, Field(ge=0)]]


class _Stain(_Strict):
    middle: Annotated[list[Number], Field(min_length=N_STAIN, max_length=N_STAIN)]
    half: Annotated[list[Positive], Field(min_length=N_STAIN, max_length=N_STAIN)]


class _Guard(_Strict):
    distance: Positive
    rest: Positive
    octaves: Positive
    mpp: Positive
    known: NotNegative = _ABSENT
    stain: _Stain = _ABSENT


class _Guard06(_Strict):
    distance: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    far: Positive
    octaves: Positive
    spread: Number
    variation: Two


def _guard_version(guard: object) -> str:
    return "0.6" if isinstance(guard, dict) and {"far", "spread", "variation"} & guard.keys() else "0.7"


_AnyGuard = Annotated[Annotated[_Guard, Tag("0.7")] | Annotated[_Guard06, Tag("0.6")], Discriminator(_guard_version)]


class _Image(_Strict):
    shape: Annotated[list[Count], Field(min_length=2, max_length=2)]
    sha256: Sha256
    spots: Annotated[list[Number], Field(min_length=4, max_length=4)]


class _Annotation(_Strict):
    context: _Context


class _Programme(_Strict):
    genes: Annotated[dict[Text, Number], Field(min_length=1)]
    pearson: Number | None
    pearson_low: Number | None
    pearson_high: Number | None
    pearson_given_depth: Number | None
    ceiling: Number | None
    depth: Number | None
    colour: Number | None
    coordinates: Number | None
    reliable: bool


class _Programmes(_Strict):
    n_patients: Count
    sets: Annotated[dict[Text, _Programme], Field(min_length=1)]


class Card(_Strict):
    """Fields of ``card.json``; :class:`he2gene_sc.models.ModelCard` describes them."""

    name: Text
    version: Text
    description: str
    encoder: _Encoder
    windows_um: Annotated[list[Positive], Field(min_length=1)]
    classes: list[Text]
    class_colors: list[Colour]
    n_genes: Count
    n_latent: Count
    training: dict[str, Any]
    metrics: dict[str, Any]
    reliable_rule: str
    intended_use: str
    limitations: list[str]
    license: str
    files: dict[str, Sha256]
    expression_scale: ExpressionScale
    fusion: Literal["concat", "mean"]
    context: _Context | None
    tta: bool
    intervals: _Intervals | None
    guard: _AnyGuard | None
    annotation: _Annotation | None
    programmes: _Programmes | None
    schema_version: int


def check_card(data: dict[str, Any], where: str) -> None:
    """Check the fields of a card; ``where`` names the file in errors."""
    try:
        card = Card.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"`model`: {where} is not valid: {explain(error)}. Fetch the folder again") from error
    lacking = sorted({"genes.csv", "weights.safetensors"} - card.files.keys())
    if lacking:
        raise ValueError(f"`model`: {where}: `files` lacks the SHA-256 of {lacking}. Fetch the folder again")
    for name, entries, of, needed in (
        ("class_colors", card.class_colors, "classes", card.classes),
        ("encoder.tiles", card.encoder.tiles, "windows_um", card.windows_um),
    ):
        if entries is not None and len(entries) != len(needed):
            raise ValueError(
                f"`model`: {where}: `{name}` has {len(entries)} entries for {len(needed)} `{of}`; one for each is needed"
            )
    for name, context in (
        ("context", data["context"]),
        ("annotation.context", (data["annotation"] or {}).get("context")),
    ):
        if context is not None:
            try:
                Context(**context)
            except ValueError as error:
                raise ValueError(f"`model`: {where}: `{name}`: {error}") from error
    fine = card.context is not None and card.context.fine_below_mpp is not None
    own = None if card.annotation is None else card.annotation.context
    if (own is not None and own.fine_below_mpp is not None) or (
        fine and (card.n_latent % 2 or (card.classes and own is None))
    ):
        raise ValueError(
            f"`model`: {where}: `context.fine_below_mpp` needs an even `n_latent`, and an annotation whose own `context` is without "
            "`fine_below_mpp`. Fetch the folder again"
        )
    if card.intervals is not None and sorted(set(card.intervals.levels)) != card.intervals.levels:
        raise ValueError(f"`model`: {where}: `intervals.levels` must ascend")
    sections = card.training.get("sections", {})
    if not isinstance(sections, dict) or not all(isinstance(facts, dict) for facts in sections.values()):
        raise ValueError(f"`model`: {where}: `training.sections` must map each section to its facts")
    for name, facts in sections.items():
        if "image" in facts:
            try:
                _Image.model_validate(facts["image"])
            except ValidationError as error:
                raise ValueError(
                    f"`model`: {where}: `training.sections.{name}.image` is not valid: {explain(error)}. Fetch the folder again"
                ) from error


def check_class_names(names: Iterable[str], what: str = "class") -> None:
    """Raise if names of classes cannot be columns of one table in a zarr store."""
    seen: dict[str, str] = {}
    for name in names:
        text = isinstance(name, str) and bool(name.strip())
        if not text or not name.isprintable() or "/" in name or name.startswith("__") or name in {".", ".."}:
            raise ValueError(
                f"{what} name {name!r} cannot be stored: it must be a text without '/' and line breaks, not starting '__'"
            )
        if name.lower() in seen:
            raise ValueError(
                f"{what} names {seen[name.lower()]!r} and {name!r} differ only in case: merge or rename one"
            )
        seen[name.lower()] = name


def explain(error: ValidationError) -> str:
    """List the fields that pydantic rejected, with the value found and what is valid."""
    found = error.errors(include_url=False)
    # pydantic reports every branch of a union.
    unique = {_field(fault["loc"]): fault for fault in reversed(found)}
    faults = [unique[name] for name in reversed(unique)]
    missing = [_field(fault["loc"]) for fault in faults if fault["type"] == "missing"]
    messages = [f"lacks {missing}"] if missing else []
    for fault in faults:
        if fault["type"] == "extra_forbidden":
            messages.append(f"`{_field(fault['loc'])}` is not a field that this version knows")
        elif fault["type"] != "missing":
            messages.append(f"`{_field(fault['loc'])}` is {_short(fault['input'])}: {_valid(fault['msg'])}")
    more = f"; and {len(messages) - _MAX_LISTED} more" if len(messages) > _MAX_LISTED else ""
    return "; ".join(messages[:_MAX_LISTED]) + more


def _field(place: tuple[int | str, ...]) -> str:
    """Join names and positions, without pydantic's names for branches of a union."""
    named = [str(part) for part in place if not (isinstance(part, str) and ("[" in part or part in _BRANCHES))]
    return ".".join(named)


#: Names by which pydantic calls the branches of a union.
_BRANCHES = ("float", "int", "bool", "str", "constrained-float", "constrained-int", "list", "none", "0.6", "0.7")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _valid(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message.replace("Input should be ", "it must be ").replace("Input should have ", "it must have ")
