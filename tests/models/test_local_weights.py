"""Encoders from local weights, and behaviour without access to the hub."""

import json
import logging
import socket

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import he2gene_sc as hg
from he2gene_sc.models import EncoderSpec, load_encoder
from he2gene_sc.models._hub import quick_offline
from he2gene_sc.models._network import Preprocess

ARCHITECTURE = "resnet10t"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model(ARCHITECTURE, pretrained=False, num_classes=3).eval()


@pytest.fixture
def folder(network, tmp_path):
    """A folder as timm saves it, with a name that is not an architecture."""
    folder = tmp_path / "weights-of-our-lab"
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors")
    config = {
        "input_size": [3, 64, 64],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.3, 0.2, 0.1],
        "interpolation": "bicubic",
        "license": "mit",
        "classifier": "fc",
    }
    facts = {"architecture": ARCHITECTURE, "num_classes": 3, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def same(encoder, network):
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        pooled = network.global_pool(network.forward_features(x))
        torch.testing.assert_close(encoder(x), pooled)


@pytest.mark.parametrize("write", [lambda p: p, str, lambda p: f"local-dir:{p}"])
def test_a_folder_with_any_name_is_loaded_with_its_input_configuration(folder, network, write):
    encoder, spec = load_encoder(write(folder))
    same(encoder, network)
    assert (spec.name, spec.input_px, spec.license) == ("local-dir:weights-of-our-lab", 64, "mit")
    assert (spec.mean, spec.std, spec.interpolation) == ((0.4, 0.5, 0.6), (0.3, 0.2, 0.1), "bicubic")


@pytest.mark.parametrize("kind", ["file", "folder", "state dict", "wrapped"])
def test_weights_from_a_path_are_loaded_into_the_named_network(folder, network, kind):
    path = folder / "model.safetensors"
    if kind == "folder":
        path = folder
    elif kind != "file":
        path = folder / "trained.pt"
        state = network.state_dict()
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if kind == "wrapped" else state, path)
    encoder, spec = load_encoder(ARCHITECTURE, weights=path)
    same(encoder, network)
    assert spec.name == ARCHITECTURE


def test_weights_of_another_network_raise_with_file_and_tensor(folder):
    with pytest.raises(ValueError, match=r"`weights` .*model\.safetensors' do not fit .*missing \["):
        load_encoder("resnet18", weights=folder)


def test_weights_that_are_not_finite_raise(folder, network):
    state = {k: v.clone() for k, v in network.state_dict().items()}
    state["conv1.0.weight"][0] = float("nan")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"not finite in \['conv1\.0\.weight'\]"):
        load_encoder(folder)


def test_pickled_objects_in_a_file_of_weights_raise_and_do_not_run(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"conv1.0.weight": Trap()}, folder / "pytorch_model.bin")
    for call in (lambda: load_encoder(folder), lambda: load_encoder(ARCHITECTURE, weights=folder)):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin' holds more than tensors"):
            call()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "does not state an `architecture`"),
        ('{"model_type": "dinov2"}', "it is a configuration of transformers"),
        ('{"architecture": "no_such_net"}', "which timm does not know"),
        ('{"architecture": "resnet10t", "model_args": {"colour": 1}}', "`model_args` that do not fit"),
        ('{"architecture": "resnet10t", "pretrained_cfg": {"mean": "x"}}', "does not describe the input"),
    ],
)
def test_a_damaged_configuration_raises_with_its_file(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        load_encoder(folder)


def test_errors_of_incomplete_paths_say_what_is_missing(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        load_encoder("local-dir:nowhere")
    with pytest.raises(ValueError, match="file of weights, which does not say which network.*weights=FILE"):
        load_encoder(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no config\.json.*weights=FOLDER"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="holds no weights"):
        load_encoder(ARCHITECTURE, weights=tmp_path)
    with pytest.raises(ValueError, match="gone.pt' does not exist; name a file of weights, or a folder"):
        load_encoder(ARCHITECTURE, weights=tmp_path / "gone.pt")
    with pytest.raises(ValueError, match="`weights` need an encoder given by name"):
        load_encoder(folder, weights=folder)


def test_a_gated_encoder_loads_local_weights_without_the_hub(monkeypatch, tmp_path):
    asked = []

    def create_model(name, **options):
        asked.append((name, options["pretrained"]))
        raise OSError("enough")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(OSError, match="enough"):
        load_encoder("uni2-h", weights=tmp_path)
    assert asked == [("vit_giant_patch14_224", False)]


# The hub cannot be reached


@pytest.fixture
def offline(monkeypatch):
    def refused(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("name", ["resnet50", "uni2-h", "hf-hub:someone/net"])
def test_offline_the_client_of_the_hub_does_not_retry(offline, monkeypatch, tmp_path, name):
    import time

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits to try again"))
    with pytest.raises(RuntimeError, match="could not be fetched.*HF_HOME.*efficientnet-lite0"):
        load_encoder(name)
    assert constants.HF_HUB_OFFLINE is False


def test_online_the_hub_is_used(monkeypatch):
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with server, quick_offline():
        assert constants.HF_HUB_OFFLINE is False


# How a patch is resized


def test_a_patch_is_resized_with_the_interpolation_of_the_specification():
    patches = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = {
        mode: Preprocess(EncoderSpec("mine", input_px=32, interpolation=mode))(patches)
        for mode in ("bilinear", "bicubic")
    }
    for mode, found in made.items():
        expected = torch.nn.functional.interpolate(patches.float(), size=(32, 32), mode=mode, antialias=True)
        spec = EncoderSpec("mine")
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
        # The uint8 kernel rounds between its two passes.
        assert (found - (expected.clamp(0, 255) / 255 - mean) / std).abs().mean() < 0.01
    assert not torch.allclose(made["bilinear"], made["bicubic"], atol=0.05)


def test_an_invalid_interpolation_or_scale_raises():
    with pytest.raises(ValueError, match="`interpolation`.*'nearest'"):
        EncoderSpec("mine", interpolation="nearest")
    for mpp in (0, -0.5, float("nan"), (), "0.5"):
        with pytest.raises(ValueError, match="`mpp`"):
            EncoderSpec("mine", mpp=mpp)


def test_windows_at_another_scale_than_in_training_give_a_warning():
    from he2gene_sc.models._encoders.scale import warn_of_scale

    with pytest.warns(UserWarning, match="trained at 0.5 µm/px. `windows_um` of 200, 400 .*Windows of 112 µm"):
        warn_of_scale(EncoderSpec("mine", mpp=0.5), (100.0, 200.0, 400.0))


@pytest.mark.filterwarnings("error")
def test_windows_at_the_scale_of_the_encoder_give_no_warning():
    from he2gene_sc.models._encoders.scale import warn_of_scale

    warn_of_scale(EncoderSpec("mine", mpp=(0.25, 0.5, 1.0)), (56.0, 112.0, 224.0))
    warn_of_scale(EncoderSpec("mine"), (100.0, 400.0))


def test_default_windows_and_tiles_match_the_scale_of_the_encoder():
    from he2gene_sc.models._encoders.scale import default_windows, tiles_of, warn_of_scale

    usual, mixed = EncoderSpec("mine", mpp=0.5), EncoderSpec("mine", mpp=(0.25, 0.5, 1.0, 2.0))
    assert default_windows(usual) == default_windows(mixed) == (112.0, 224.0)
    assert tiles_of(usual, (112.0, 224.0, 448.0)) == tiles_of(usual, (100.0, 200.0, 400.0)) == (1, 2, 4)
    # An encoder that was also trained at 1 µm/px needs no tiles for 224 µm.
    assert tiles_of(mixed, (112.0, 224.0)) is None
    assert default_windows(EncoderSpec("mine")) is tiles_of(EncoderSpec("mine"), (100.0, 400.0)) is None
    with pytest.warns(UserWarning, match="`windows_um` of 3e\\+03 show it 1.67"):
        warn_of_scale(usual, (112.0, 3000.0), tiles_of(usual, (112.0, 3000.0)))


@pytest.mark.filterwarnings("error")
def test_tiles_at_the_scale_of_the_encoder_give_no_warning():
    from he2gene_sc.models._encoders.scale import warn_of_scale

    warn_of_scale(EncoderSpec("mine", mpp=0.5), (100.0, 200.0, 400.0), (1, 2, 4))


def test_a_model_on_local_weights_runs_with_them_and_names_them_if_missing(folder, tiny_model, tmp_path):
    from dataclasses import replace

    from he2gene_sc.models._encoders.load import encoder_sha256
    from he2gene_sc.models._encoders.registry import input_facts

    encoder, spec = load_encoder(folder)
    facts = {"name": spec.name, "license": spec.license, "sha256": encoder_sha256(encoder), **input_facts(spec)}
    model = hg.models.HE2Gene(replace(tiny_model.card, encoder=facts), tiny_model.genes, tiny_model.tensors)
    saved = model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="encoder='local-dir:FOLDER'"):
        _ = hg.models.load(saved).network
    network = hg.models.load(saved, encoder=folder).network
    assert network.extractor.preprocess.interpolation == "bicubic"


def test_loading_local_weights_logs_nothing(folder, caplog):
    with caplog.at_level(logging.WARNING):
        load_encoder(folder)
    assert not caplog.records
