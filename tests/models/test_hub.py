import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

import he2gene_sc as hg

FILES = {"card.json", "genes.csv", "weights.safetensors", "README.md"}


def hub_error(kind, status=None):
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub said no")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.fixture
def hub(monkeypatch, tiny_model, tmp_path):
    """A hub that serves one model and records requests."""
    source = tiny_model.save(tmp_path / "source")
    (source / "malware.py").write_text("boom")
    requests = []

    def snapshot_download(repository, *, revision, allow_patterns):
        requests.append((repository, revision))
        target = tmp_path / "cache" / "0123abcd"
        target.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            shutil.copy(source / name, target / name)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(requests=requests, source=source, cache=tmp_path / "cache" / "0123abcd")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://my-lab/he2gene-lung", ("my-lab/he2gene-lung", None)),
        ("hf://my-lab/he2gene-lung@v1.2", ("my-lab/he2gene-lung", "v1.2")),
        ("hf://Lab/model_1@refs/pr/3", ("Lab/model_1", "refs/pr/3")),
    ],
)
def test_a_model_on_the_hub_is_requested_by_repository_and_revision(hub, tiny_model, address, expected):
    found = hg.models.load(address)
    assert hub.requests == [expected]
    assert found.card.name == tiny_model.card.name
    assert {p.name for p in hub.cache.iterdir()} == FILES


@pytest.mark.parametrize(
    "address", ["hf://", "hf://x", "hf://a/b/c", "hf://a/b@", "hf:///b", "hf://../b", "hf://a/b c", "hf://a/b@../../x"]
)
def test_an_invalid_address_raises_with_an_example(hub, address):
    with pytest.raises(ValueError, match="such as 'hf://my-lab/he2gene-lung@v1'"):
        hg.models.load(address)
    assert hub.requests == []


def test_a_fetched_folder_is_checked_like_a_local_one(hub):
    weights = hub.source / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="'hf://a/b': .*altered or truncated"):
        hg.models.load("hf://a/b")


def test_a_repository_without_a_model_raises(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ValueError, match="'hf://a/b': .*incomplete.*card.json"):
        hg.models.load("hf://a/b")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (hub_error(errors.GatedRepoError, 403), RuntimeError, r"is gated.*huggingface\.co/a/b.*hf auth login"),
        (
            hub_error(errors.RepositoryNotFoundError, 404),
            ValueError,
            r"https://huggingface\.co/a/b at revision 'v9' does not exist or is private",
        ),
        (hub_error(errors.RevisionNotFoundError, 404), ValueError, "at revision 'v9'"),
        (hub_error(errors.LocalEntryNotFoundError), RuntimeError, "not on this machine.*HF_HOME"),
        (errors.OfflineModeIsEnabled("offline"), RuntimeError, "not on this machine.*offline"),
        (OSError("no route to host"), RuntimeError, "no route to host"),
        (errors.HFValidationError("bad repo id"), ValueError, "bad repo id"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(monkeypatch, error, kind, message):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(kind, match=message) as raised:
        hg.models.load("hf://a/b@v9")
    assert raised.value.__cause__ is error


def test_an_unknown_name_mentions_the_hub():
    with pytest.raises(ValueError, match="hf://owner/name"):
        hg.models.load("no-such-model")


def test_without_a_revision_the_commit_is_logged_and_kept(hub, caplog):
    model = hg.models.load("hf://a/b")
    assert model.source == "hf://a/b@0123abcd"
    assert "using 'hf://a/b@0123abcd'" in caplog.text


def test_with_a_revision_the_commit_is_kept_and_nothing_is_logged(hub, caplog):
    assert hg.models.load("hf://a/b@v1").source == "hf://a/b@0123abcd"
    assert not caplog.records
