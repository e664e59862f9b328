"""Schema of a model card: every field with its type."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from ._embedding import Context
from ._encoders.registry import Interpolation
from ._stain import N_STAIN

ExpressionScale = Literal["natural log of (1 + counts per 10,000)"]
EXPRESSION_SCALE: ExpressionScale = "natural log of (1 + counts per 10,000)"
#: Most faults that one error lists.
_MAX_LISTED = 3
_HEX_COLOUR = re.compile(r"#[0-9a-fA-F]{6}([0-9a-fA-F]{2})?")


def _needed(is_valid: Callable[[Any], object], message: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not is_valid(value):
            raise ValueError(message)
        return value

    return AfterValidator(check)


def _is_colour(text: str) -> bool:
    from matplotlib.colors import is_color_like

    return bool(_HEX_COLOUR.fullmatch(text)) or is_color_like(text)


Text = Annotated[str, _needed(str.strip, "a text that is not blank is needed")]
Sha256 = Annotated[str, _needed(re.compile("[0-9a-f]{64}").fullmatch, "64 hexadecimal digits are needed")]
Colour = Annotated[str, _needed(_is_colour, "a colour such as '#2ca02c' is needed")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]
NotNegative = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Three = Annotated[list[Number], Field(min_length=3, max_length=3)]
Two = Annotated[list[Number], Field(min_length=2, max_length=2)]


#: Names by which pydantic calls the branches of a union.
_BRANCHES = ("float", "int", "bool", "str", "constrained-float", "constrained-int", "list", "none", "0.6", "0.7")
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        Context(**dict(self))
        return self


class _Intervals(_Strict):
    unit: Literal["patient", "section"]
    n_groups: Annotated[int, Field(ge=0)]
    levels: Annotated[
        list[Share],
        Field(min_length=1),
        _needed(lambda levels: sorted(set(levels)) == levels, "ascending levels are needed"),
    ]
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


class _Training(_Strict, extra="allow"):
    sections: dict[str, dict[str, Any]] = {}


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


def _check_classes(names: list[str]) -> list[str]:
    check_class_names(names)
    return names


class Card(_Strict):
    """Fields of ``card.json``; :class:`he2gene_sc.models.ModelCard` describes them."""

    name: Text
    version: Text
    description: str
    encoder: _Encoder
    windows_um: Annotated[list[Positive], Field(min_length=1)]
    classes: Annotated[list[Text], AfterValidator(_check_classes)]
    class_colors: list[Colour]
    n_genes: Count
    n_latent: Count
    training: _Training
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
    if lacking := sorted({"genes.csv", "weights.safetensors"} - card.files.keys()):
        raise ValueError(f"`model`: {where}: `files` lacks the SHA-256 of {lacking}. Fetch the folder again")
    for name, entries, of, needed in (
        ("class_colors", card.class_colors, "classes", card.classes),
        ("encoder.tiles", card.encoder.tiles, "windows_um", card.windows_um),
    ):
        if entries is not None and len(entries) != len(needed):
            raise ValueError(
                f"`model`: {where}: `{name}` has {len(entries)} entries for {len(needed)} `{of}`; one for each is needed"
            )
    for name, facts in card.training.sections.items():
        if "image" in facts:
            try:
                _Image.model_validate(facts["image"])
            except ValidationError as error:
                raise ValueError(
                    f"`model`: {where}: `training.sections.{name}.image` is not valid: {explain(error)}. Fetch the folder again"
                ) from error
    fine = card.context is not None and card.context.fine_below_mpp is not None
    own = None if card.annotation is None else card.annotation.context
    if (own is not None and own.fine_below_mpp is not None) or (
        fine and (card.n_latent % 2 or (card.classes and own is None))
    ):
        raise ValueError(
            f"`model`: {where}: `context.fine_below_mpp` needs an even `n_latent`, and an annotation whose own `context` is without "
            "`fine_below_mpp`. Fetch the folder again"
        )


def explain(error: ValidationError) -> str:
    """List the fields that pydantic rejected, with the value found and what is valid."""
    # pydantic reports every branch of a union.
    faults: dict[str, Any] = {}
    for fault in error.errors(include_url=False):
        place = [
            str(part) for part in fault["loc"] if not (isinstance(part, str) and ("[" in part or part in _BRANCHES))
        ]
        faults.setdefault(".".join(place), fault)
    missing = [name for name, fault in faults.items() if fault["type"] == "missing"]
    messages = [f"lacks {missing}"] if missing else []
    for name, fault in faults.items():
        if fault["type"] == "extra_forbidden":
            messages.append(f"`{name}` is not a field that this version knows")
        elif fault["type"] != "missing":
            found = repr(fault["input"])
            needed = fault["msg"].removeprefix("Value error, ").replace("Input should ", "it must ")
            needed = re.sub(r" or instance of \w+", "", needed)
            messages.append(f"`{name}` is {found if len(found) <= 60 else f'{found[:57]}…'}: {needed}")
    more = f"; and {len(messages) - _MAX_LISTED} more" if len(messages) > _MAX_LISTED else ""
    return "; ".join(messages[:_MAX_LISTED]) + more
