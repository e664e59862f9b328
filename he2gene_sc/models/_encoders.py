"""Encoder registry: the networks that turn a patch into features, and where their weights come from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WEIGHTS = Path(__file__).parent / "weights"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderSpec:
    """What has to be known of an encoder before its weights are there.

    Attributes
    ----------
    name
        Name in this registry, or any timm name.
    timm_name
        What ``timm.create_model`` is given.
    license
        Licence of the weights.
    gated
        Whether the hub asks for an accepted licence and a token.
    input_px
        Side of the input, pixels.
    mpp
        µm per pixel that it was trained at; ``None`` where it has never seen tissue.
    mean, std
        Normalisation of the channels after scaling to 0..1.
    weights
        File beside this module that holds the weights; ``None``: they come from timm's hub.
    """

    name: str
    timm_name: str
    license: str
    gated: bool
    input_px: int
    mpp: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights: str | None = None


#: Encoders known by name. Any other timm name works too, with what timm says of it.
ENCODERS: dict[str, EncoderSpec] = {
    spec.name: spec
    for spec in (
        EncoderSpec(
            name="efficientnet-lite0",
            timm_name="tf_efficientnet_lite0",
            license="Apache-2.0",
            gated=False,
            input_px=224,
            mpp=None,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            weights="efficientnet_lite0.safetensors",
        ),
        EncoderSpec(
            name="resnet50",
            timm_name="resnet50.tv_in1k",
            license="BSD-3-Clause",
            gated=False,
            input_px=224,
            mpp=None,
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
        ),
        EncoderSpec(
            name="densenet121",
            timm_name="densenet121.tv_in1k",
            license="BSD-3-Clause",
            gated=False,
            input_px=224,
            mpp=None,
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
        ),
    )
}


def load_encoder(name: str, *, pretrained: bool = True) -> tuple[torch.nn.Module, EncoderSpec]:
    """Build an encoder with its weights, in evaluation mode on the CPU, float32.

    Parameters
    ----------
    name
        A name in :data:`ENCODERS` or any timm name.
    pretrained
        Whether its weights are read; without, the architecture alone is built and nothing is fetched.

    Returns
    -------
    torch.nn.Module
        ``(b, 3, input_px, input_px)`` to ``(b, n_features)``.
    EncoderSpec
        What is known of it.

    Raises
    ------
    ValueError
        If neither the registry nor timm knows the name.
    RuntimeError
        If the weights are not on this machine and cannot be fetched.
    """
    import timm

    spec = ENCODERS.get(name)
    from_hub = name.startswith(("hf-hub:", "hf_hub:"))
    if spec is None and not from_hub and not timm.is_model(name.split(":", 1)[-1].split("/")[-1].split(".")[0]):
        raise ValueError(f"encoder {name!r} is unknown; valid: {sorted(ENCODERS)} or any name of timm.list_models()")
    if not pretrained:
        encoder = timm.create_model(spec.timm_name if spec else name, pretrained=False, num_classes=0)
        return encoder.eval(), spec or _spec_from_timm(name, encoder)
    if spec is not None and spec.weights is not None:
        encoder = timm.create_model(spec.timm_name, pretrained=False, num_classes=0)
        encoder.load_state_dict(_read_weights(_WEIGHTS / spec.weights))
        return encoder.eval(), spec
    try:
        encoder = timm.create_model(spec.timm_name if spec else name, pretrained=True, num_classes=0)
    except Exception as error:  # timm, the hub client and its transport each raise their own types
        raise RuntimeError(
            f"the weights of encoder {name!r} are not on this machine and could not be fetched ({error}). "
            "Connect once so that timm can cache them (gated ones also need `huggingface-cli login`), "
            "or use 'efficientnet-lite0', whose weights are in this package"
        ) from error
    if spec is None:
        spec = _spec_from_timm(name, encoder)
    return encoder.eval(), spec


def _spec_from_timm(name: str, encoder: torch.nn.Module) -> EncoderSpec:
    config = encoder.pretrained_cfg
    return EncoderSpec(
        name=name,
        timm_name=name,
        license=str(config.get("license") or "unknown"),
        gated=False,
        input_px=int(config["input_size"][-1]),
        mpp=None,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read safetensors to float32, with the counters that an evaluation never reads left as they are."""
    from safetensors.torch import load_file

    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}


def encoder_sha256(encoder: torch.nn.Module) -> str:
    """Hash the weights of an encoder, whatever file or hub they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
