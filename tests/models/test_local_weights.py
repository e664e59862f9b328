"""Encoders from weights on this machine, and what happens where the hub cannot be reached."""

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
def place(network, tmp_path):
    """A folder as timm saves it, whose name is not that of an architecture."""
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
def test_a_folder_of_any_name_is_loaded_with_what_it_says_of_its_input(place, network, write):
    encoder, spec = load_encoder(write(place))
    same(encoder, network)
    assert (spec.name, spec.input_px, spec.license) == ("local-dir:weights-of-our-lab", 64, "mit")
    assert (spec.mean, spec.std, spec.interpolation) == ((0.4, 0.5, 0.6), (0.3, 0.2, 0.1), "bicubic")


@pytest.mark.parametrize("kind", ["file", "folder", "state dict", "wrapped"])
def test_weights_from_a_path_go_into_the_network_that_is_named(place, network, kind):
    path = place / "model.safetensors"
    if kind == "folder":
        path = place
    elif kind != "file":
        path = place / "trained.pt"
        state = network.state_dict()
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if kind == "wrapped" else state, path)
    encoder, spec = load_encoder(ARCHITECTURE, weights=path)
    same(encoder, network)
    assert spec.name == ARCHITECTURE


def test_weights_of_another_network_are_refused_by_file_and_tensor(place):
    with pytest.raises(ValueError, match=r"`weights` .*model\.safetensors' do not fit .*missing \["):
        load_encoder("resnet18", weights=place)


def test_weights_that_are_not_finite_are_refused(place, network):
    state = {k: v.clone() for k, v in network.state_dict().items()}
    state["conv1.0.weight"][0] = float("nan")
    save_file(state, place / "model.safetensors")
    with pytest.raises(ValueError, match=r"not finite in \['conv1\.0\.weight'\]"):
        load_encoder(place)


def test_objects_in_a_file_of_weights_are_refused_and_do_not_run(place, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (place / "model.safetensors").unlink()
    torch.save({"conv1.0.weight": Trap()}, place / "pytorch_model.bin")
    for call in (lambda: load_encoder(place), lambda: load_encoder(ARCHITECTURE, weights=place)):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin' holds more than tensors"):
            call()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "does not state an `architecture`"),
        ('{"model_type": "dinov2"}', "it is of transformers"),
        ('{"architecture": "no_such_net"}', "which timm does not know"),
        ('{"architecture": "resnet10t", "model_args": {"colour": 1}}', "`model_args` that do not fit"),
        ('{"architecture": "resnet10t", "pretrained_cfg": {"mean": "x"}}', "does not describe the input"),
    ],
)
def test_a_damaged_configuration_is_refused_by_file(place, text, message):
    (place / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        load_encoder(place)


def test_what_a_path_lacks_is_said(place, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        load_encoder("local-dir:nowhere")
    with pytest.raises(ValueError, match="file of weights, which does not say which network.*weights=FILE"):
        load_encoder(place / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no config\.json.*weights=FOLDER"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="holds no weights"):
        load_encoder(ARCHITECTURE, weights=tmp_path)
    with pytest.raises(ValueError, match="there is no file or folder"):
        load_encoder(ARCHITECTURE, weights=tmp_path / "gone.pt")
    with pytest.raises(ValueError, match="`weights` are for an encoder that is named"):
        load_encoder(place, weights=place)


def test_a_gated_encoder_takes_weights_from_a_file_without_asking_the_hub(monkeypatch, tmp_path):
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
def test_without_a_network_the_hubs_client_does_not_try_again_and_again(offline, monkeypatch, tmp_path, name):
    import time

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits to try again"))
    with pytest.raises(RuntimeError, match="could not be fetched.*HF_HOME.*efficientnet-lite0"):
        load_encoder(name)
    assert constants.HF_HUB_OFFLINE is False


def test_with_a_network_the_hub_is_asked(monkeypatch):
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with server, quick_offline():
        assert constants.HF_HUB_OFFLINE is False


# How a patch is resized


def test_a_patch_is_resized_as_the_specification_says():
    patches = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = {
        how: Preprocess(EncoderSpec("mine", input_px=32, interpolation=how))(patches) for how in ("bilinear", "bicubic")
    }
    for how, found in made.items():
        expected = torch.nn.functional.interpolate(patches.float(), size=(32, 32), mode=how, antialias=True)
        spec = EncoderSpec("mine")
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
        # Between its two passes the kernel for uint8 rounds.
        assert (found - (expected.clamp(0, 255) / 255 - mean) / std).abs().mean() < 0.01
    assert not torch.allclose(made["bilinear"], made["bicubic"], atol=0.05)


def test_a_specification_with_another_interpolation_or_scale_is_refused():
    with pytest.raises(ValueError, match="`interpolation`.*'nearest'"):
        EncoderSpec("mine", interpolation="nearest")
    for mpp in (0, -0.5, float("nan"), (), "0.5"):
        with pytest.raises(ValueError, match="`mpp`"):
            EncoderSpec("mine", mpp=mpp)


def test_windows_at_another_scale_than_the_encoder_was_trained_at_are_warned_of():
    from he2gene_sc.models._encoders.scale import warn_of_scale

    with pytest.warns(UserWarning, match="trained at 0.5 µm/px. `windows_um` of 200, 400 .*Windows of 112 µm"):
        warn_of_scale(EncoderSpec("mine", mpp=0.5), (100.0, 200.0, 400.0))


@pytest.mark.filterwarnings("error")
def test_windows_at_the_scale_of_the_encoder_are_not_warned_of():
    from he2gene_sc.models._encoders.scale import warn_of_scale

    warn_of_scale(EncoderSpec("mine", mpp=(0.25, 0.5, 1.0)), (56.0, 112.0, 224.0))
    warn_of_scale(EncoderSpec("mine"), (100.0, 400.0))


def test_an_encoder_that_knows_its_scale_has_windows_and_tiles_at_it():
    from he2gene_sc.models._encoders.scale import own_windows, tiles_of, warn_of_scale

    usual, mixed = EncoderSpec("mine", mpp=0.5), EncoderSpec("mine", mpp=(0.25, 0.5, 1.0, 2.0))
    assert own_windows(usual) == own_windows(mixed) == (112.0, 224.0)
    assert tiles_of(usual, (112.0, 224.0, 448.0)) == tiles_of(usual, (100.0, 200.0, 400.0)) == (1, 2, 4)
    # What has seen 1 µm/px as well takes 224 µm whole.
    assert tiles_of(mixed, (112.0, 224.0)) is None
    assert own_windows(EncoderSpec("mine")) is tiles_of(EncoderSpec("mine"), (100.0, 400.0)) is None
    with pytest.warns(UserWarning, match="`windows_um` of 3e\\+03 show it 1.67"):
        warn_of_scale(usual, (112.0, 3000.0), tiles_of(usual, (112.0, 3000.0)))


@pytest.mark.filterwarnings("error")
def test_tiles_at_the_scale_of_the_encoder_are_not_warned_of():
    from he2gene_sc.models._encoders.scale import warn_of_scale

    warn_of_scale(EncoderSpec("mine", mpp=0.5), (100.0, 200.0, 400.0), (1, 2, 4))


def test_a_model_on_local_weights_says_to_supply_them_and_runs_with_them(place, tiny_model, tmp_path):
    from dataclasses import replace

    from he2gene_sc.models._encoders.load import encoder_sha256
    from he2gene_sc.models._encoders.registry import input_facts

    encoder, spec = load_encoder(place)
    facts = {"name": spec.name, "license": spec.license, "sha256": encoder_sha256(encoder), **input_facts(spec)}
    model = hg.models.HE2Gene(replace(tiny_model.card, encoder=facts), tiny_model.genes, tiny_model.tensors)
    saved = model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="encoder='local-dir:FOLDER'"):
        _ = hg.models.load(saved).network
    network = hg.models.load(saved, encoder=place).network
    assert network.extractor.preprocess.interpolation == "bicubic"


def test_the_log_is_silent_about_local_weights(place, caplog):
    with caplog.at_level(logging.WARNING):
        load_encoder(place)
    assert not caplog.records
