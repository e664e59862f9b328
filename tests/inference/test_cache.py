import errno
import hashlib
import logging
import multiprocessing
import shutil
import tempfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from he2gene_sc.image import PatchReader, Pyramid
from he2gene_sc.inference import Encoder, Part, _cache, cached_features, encode
from he2gene_sc.models import EncoderSpec
from he2gene_sc.models._encoders.load import encoder_sha256
from he2gene_sc.models._network import SYMMETRIES, FeatureExtractor
from tests.helpers.toy_sections import Power

CPU = torch.device("cpu")
CENTRES = np.random.default_rng(3).integers(0, 81, (17, 2)) * 2.0
SPEC = EncoderSpec("tiny", input_px=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(1, 256, (3, 160, 160), dtype=np.uint8)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Runs:
    """Calls ``cached_features``, and counts the spots that were encoded."""

    def __init__(self, folder, image):
        self.folder, self.image, self.encoded = folder, image, 0

    def __call__(
        self,
        *,
        image=None,
        centres=CENTRES,
        windows=(32.0, 64.0),
        mpp=1.0,
        batch_size=8,
        encoder=None,
        spec=SPEC,
        symmetries=SYMMETRIES[:2],
        dtype=torch.float32,
        **options,
    ):
        encoder = network() if encoder is None else encoder
        extractor = FeatureExtractor(encoder, spec)
        extractor.register_forward_hook(self._count)
        image = self.image if image is None else image
        self.reader = PatchReader(
            Pyramid.single(image), centres, mpp, windows_um=windows, input_px=spec.input_px, batch_size=batch_size
        )
        self.extractor = extractor
        self.encoded = 0
        how = Encoder(encoder_sha256(encoder), symmetries, CPU, dtype)
        return cached_features(Part(extractor, self.reader), how, self.folder, **options)

    def _count(self, module, inputs, output):
        self.encoded += len(output)

    @property
    def hit(self):
        return self.encoded == 0

    @property
    def files(self):
        return sorted(p for p in self.folder.iterdir())


@pytest.fixture
def runs(tmp_path, image):
    return Runs(tmp_path / "cache", image)


def encode_uncached(runs, symmetries=SYMMETRIES[:2]):
    out = {}
    with torch.inference_mode():
        for batch, part in encode(runs.extractor, runs.reader, device=CPU, dtype=torch.float32, symmetries=symmetries):
            out.update(zip(batch.index.tolist(), part.numpy(), strict=True))
    return np.stack([out[i] for i in range(len(out))])


def test_cached_features_equal_the_output_of_the_encoder_bit_for_bit_in_the_order_of_the_spots(runs):
    found = runs()
    assert found.shape == (17, 2, 30)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, encode_uncached(runs))
    assert np.ptp(found, axis=0).max() > 0


def test_the_second_call_encodes_nothing_and_returns_the_same_features(runs):
    first = runs()
    assert not runs.hit
    done = []
    second = runs(progress=done.append)
    assert runs.hit
    assert done == [17]
    np.testing.assert_array_equal(first, second)
    assert isinstance(second, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        second[0] = 1
    assert len(runs.files) == 1


def test_progress_counts_every_spot(runs):
    done = []
    runs(progress=done.append)
    assert sum(done) == 17
    assert len(done) == 3


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_batch_size_is_not_part_of_the_key(runs, batch_size):
    first = runs()
    np.testing.assert_array_equal(runs(batch_size=batch_size), first)
    assert runs.hit


def changed_pixel(image):
    image = image.copy()
    x, y = CENTRES[0].astype(int)
    image[0, min(y, 159), min(x, 159)] ^= 1
    return image


@pytest.mark.parametrize(
    "change",
    [
        {"centres": CENTRES[:-1]},
        {"centres": CENTRES + [[2.0, 0.0]]},
        {"centres": CENTRES[::-1]},
        {"windows": (32.0, 48.0)},
        {"windows": (64.0, 32.0)},
        {"windows": (32.0,)},
        {"windows": (64.0, 128.0), "mpp": 2.0},
        {"encoder": network(1)},
        {"encoder": nn.Sequential(*network()[:1], nn.Tanh(), *network()[2:])},
        {"spec": replace(SPEC, input_px=40)},
        {"spec": replace(SPEC, mean=(0.5, 0.5, 0.4))},
        {"spec": replace(SPEC, std=(0.5, 0.5, 0.4))},
        {"symmetries": SYMMETRIES[:1]},
        {"symmetries": (SYMMETRIES[1], SYMMETRIES[0])},
        {"symmetries": ((0, False), (0, True))},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda change: "-".join(change),
)
def test_every_change_of_a_feature_changes_the_key(runs, change):
    runs()
    runs(**change)
    assert not runs.hit
    assert len(runs.files) == 2
    runs(**change)
    assert runs.hit
    runs()
    assert runs.hit


def test_networks_with_the_same_weights_but_other_outputs_have_different_keys(runs):
    one = np.array(runs(encoder=Power(network(), 1.0)))
    other = np.array(runs(encoder=Power(network(), 0.25)))
    assert not runs.hit
    np.testing.assert_allclose(other[..., :12], one[..., :12] ** 0.25, rtol=1e-5)
    runs(encoder=Power(network(), 1.0))
    assert runs.hit


def test_features_with_another_layout_have_another_key(runs):
    runs()
    keys = set()
    for fusion in ("concat", "mean"):
        runs.extractor.fusion = fusion
        how = Encoder("hash", SYMMETRIES[:1], CPU, torch.float32)
        keys.add(_cache._key(Part(runs.extractor, runs.reader), how, "pixels"))
    assert len(keys) == 2


def test_one_changed_pixel_changes_the_key(runs, image):
    runs()
    runs(image=changed_pixel(image))
    assert not runs.hit


def test_files_of_another_format_version_are_not_read(runs, monkeypatch):
    runs()
    monkeypatch.setattr(_cache, "_VERSION", _cache._VERSION + 1)
    runs()
    assert not runs.hit


def test_spots_in_another_order_get_their_own_features(runs):
    order = np.random.default_rng(1).permutation(len(CENTRES))
    np.testing.assert_allclose(runs(centres=CENTRES[order]), runs()[order], atol=1e-5)


@pytest.mark.parametrize("damage", ["truncate", "empty", "header", "middle", "end", "longer"])
def test_a_damaged_file_is_detected_and_computed_again(runs, damage, caplog):
    expected = np.array(runs())
    (path,) = runs.files
    data = bytearray(path.read_bytes())
    match damage:
        case "truncate":
            data = data[: len(data) // 2]
        case "empty":
            data = b""
        case "header":
            data[20] ^= 1
        case "middle":
            data[len(data) // 2] ^= 1
        case "end":
            data[-1] ^= 1
        case "longer":
            data += b"x"
    path.unlink()
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "he2gene_sc"):
        found = runs()
    assert "damaged" in caplog.text
    assert not runs.hit
    np.testing.assert_array_equal(found, expected)
    runs()
    assert runs.hit


def test_files_are_ordinary_npy_files(runs):
    found = runs()
    (path,) = runs.files
    np.testing.assert_array_equal(np.load(path), found)
    data = path.read_bytes()
    assert hashlib.sha256(data[:-32]).digest() == data[-32:]


def test_an_interrupted_run_leaves_no_file(runs):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs(progress=stop)
    assert runs.files == []
    runs()
    assert not runs.hit


def test_files_of_a_killed_run_are_ignored(runs, monkeypatch):
    # After SIGKILL no `finally` is executed.
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        runs(progress=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.undo()
    assert [p.suffix for p in runs.files] == [".part"]
    runs()
    assert not runs.hit
    assert sorted(p.suffix for p in runs.files) == [".npy", ".part"]


def compute(folder, image, barrier, out):
    torch.set_num_threads(1)
    barrier.wait()
    found = Runs(folder, image)()
    out.put(hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest())


@pytest.mark.slow
def test_parallel_runs_do_not_disturb_each_other(runs, image):
    context = multiprocessing.get_context("spawn")
    barrier, out = context.Barrier(2), context.Queue()
    workers = [context.Process(target=compute, args=(runs.folder, image, barrier, out)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = {out.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(found) == 1
    assert len(runs.files) == 1
    runs()
    assert runs.hit


def test_a_mapped_file_stays_readable_after_its_replacement(runs):
    first = runs()
    expected = np.array(first)
    (path,) = runs.files
    shutil.copy(path, path.with_suffix(".bak"))
    path.with_suffix(".bak").replace(path)
    np.testing.assert_array_equal(first, expected)


def test_a_full_disk_raises_before_encoding_with_the_folder_and_the_bytes(runs, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 100, 0))
    with pytest.raises(OSError, match=r"full: the features take 4,112 bytes.*cache") as raised:
        runs()
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(runs.folder)
    assert runs.encoded == 1
    assert runs.files == []


def test_a_disk_that_fills_up_during_writing_leaves_no_file(runs, monkeypatch):
    write = _cache._write

    def full(stream, data):
        if stream.tell() > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(stream, data)

    monkeypatch.setattr(_cache, "_write", full)
    with pytest.raises(OSError, match="the disk is full") as raised:
        runs()
    assert raised.value.errno == errno.ENOSPC
    assert runs.files == []


def test_a_read_only_folder_is_read_and_named_in_the_error_of_writing(runs, monkeypatch):
    runs()

    def mkstemp(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    runs()
    assert runs.hit
    with pytest.raises(PermissionError, match=r"cannot be written \(Permission denied\).*cache"):
        runs(symmetries=SYMMETRIES[:1])
    assert runs.encoded == 1


def test_a_folder_that_is_a_file_raises(runs):
    runs.folder.write_text("not a folder")
    with pytest.raises(OSError, match="cannot be written"):
        runs()
    assert runs.folder.read_text() == "not a folder"


def test_folders_are_created_and_the_home_folder_is_expanded(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    runs.folder = Path("~/deep/er")
    runs()
    assert len(list((tmp_path / "deep" / "er").iterdir())) == 1


def test_no_spots_give_an_empty_array_and_no_file(runs):
    found = runs(centres=np.empty((0, 2)))
    assert found.shape == (0, 2, 30)
    assert not runs.folder.exists()


def test_memory_is_bounded_by_a_batch(runs, monkeypatch):
    largest = []
    write = _cache._write

    def record(stream, data):
        largest.append(len(data))
        write(stream, data)

    monkeypatch.setattr(_cache, "_write", record)
    found = runs()
    assert max(largest) == found[0].nbytes
