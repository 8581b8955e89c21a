"""SOURCE strings: what they may name, and every way out of the allowed directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loraplex.adapters.reading.source import (
    CONFIG_FILE,
    TENSOR_FILE,
    AdapterDir,
    AdapterSources,
    any_directory,
    read_small_file,
)
from loraplex.config import AdaptersConfig
from loraplex.errors import InvalidAdapter, InvalidRequest, NotFound, NotPermitted, UnsupportedFeature


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """allowed/fr and allowed/deep/de inside, outside/secret beside."""
    for name in ("allowed/fr", "allowed/deep/de", "outside/secret"):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        (directory / CONFIG_FILE).write_text(f'{{"from": "{name}"}}')
    return tmp_path


@pytest.fixture
def sources(home: Path) -> AdapterSources:
    return AdapterSources([home / "nothing-here", home / "allowed"])


def text_of(directory: AdapterDir, file: str = CONFIG_FILE) -> str:
    return read_small_file(directory, file, 1 << 20).decode()


@pytest.mark.parametrize(
    "form", ["{root}/allowed/fr", "file://{root}/allowed/fr", "file://localhost{root}/allowed/fr", "fr"]
)
def test_forms_of_a_source(home: Path, sources: AdapterSources, form: str) -> None:
    found = sources.resolve(form.format(root=home))
    assert found.path == home / "allowed/fr"
    assert "allowed/fr" in text_of(found)


def test_relative_sources_may_be_nested_and_dotted(home: Path, sources: AdapterSources) -> None:
    assert sources.resolve("deep/de").path == home / "allowed/deep/de"
    assert sources.resolve("deep/../fr/.").path == home / "allowed/fr"
    assert sources.resolve("file://" + str(home) + "/allowed/deep/%64e").path == home / "allowed/deep/de"


@pytest.mark.parametrize(
    "source",
    ["{root}/outside/secret", "../outside/secret", "fr/../../outside/secret", "file://{root}/outside/secret", "/",
     "{root}/outside/does-not-exist", "file://{root}/allowed/%2e%2e/outside/secret", "/etc"],
)  # fmt: skip
def test_outside_is_not_permitted_whether_it_exists_or_not(home: Path, sources: AdapterSources, source: str) -> None:
    with pytest.raises(NotPermitted) as caught:
        sources.resolve(source.format(root=home))
    assert "outside the allowed directories" in str(caught.value)
    assert str(home / "allowed") in str(caught.value)


def test_links_out_are_not_permitted(home: Path, sources: AdapterSources) -> None:
    (home / "allowed/link").symlink_to(home / "outside/secret")
    (home / "allowed/loop").symlink_to(home / "allowed/loop")
    for source in ("link", str(home / "allowed/link"), "loop"):
        with pytest.raises(NotPermitted):
            sources.resolve(source)


def test_links_that_stay_inside_are_followed(home: Path, sources: AdapterSources) -> None:
    (home / "allowed/alias").symlink_to("fr")
    (home / "allowed/deep/de" / TENSOR_FILE).symlink_to(home / "allowed/fr" / CONFIG_FILE)
    assert sources.resolve("alias").path == home / "allowed/fr"
    assert "allowed/fr" in text_of(sources.resolve("deep/de"), TENSOR_FILE)


def test_a_file_that_links_out_is_not_permitted(home: Path, sources: AdapterSources) -> None:
    (home / "allowed/fr" / TENSOR_FILE).symlink_to(home / "outside/secret" / CONFIG_FILE)
    with pytest.raises(NotPermitted, match=rf"fr/{TENSOR_FILE} is a link that leads out"):
        text_of(sources.resolve("fr"), TENSOR_FILE)


def test_a_directory_swapped_for_a_link_after_it_was_resolved(home: Path, sources: AdapterSources) -> None:
    found = sources.resolve("fr")
    (home / "allowed/fr").rename(home / "allowed/old")
    (home / "allowed/fr").symlink_to(home / "outside/secret")
    with pytest.raises(NotPermitted):
        text_of(found)


def test_sources_named_on_the_command_line_are_allowed_as_they_are(home: Path) -> None:
    secret = home / "outside/secret"
    (secret / TENSOR_FILE).symlink_to(home / "allowed/fr" / CONFIG_FILE)
    config = AdaptersConfig(adapter_dirs=(str(home / "allowed"),), preload=(("s", str(secret)), ("h", "hf://org/x")))
    sources = AdapterSources.from_config(config)
    assert "allowed/fr" in text_of(sources.resolve(str(secret)), TENSOR_FILE)
    assert sources.resolve("fr").path == home / "allowed/fr"
    with pytest.raises(NotPermitted):
        sources.resolve(str(home / "outside"))


def test_without_allowed_directories_the_message_says_how_to_allow_one(home: Path) -> None:
    with pytest.raises(NotPermitted, match="start the server with --adapter-dir"):
        AdapterSources([]).resolve(str(home / "allowed/fr"))


def test_missing_and_not_a_directory(home: Path, sources: AdapterSources) -> None:
    with pytest.raises(NotFound, match="'absent' does not exist"):
        sources.resolve("absent")
    (home / "allowed/file").write_text("x")
    with pytest.raises(InvalidAdapter, match="not a directory"):
        sources.resolve("file")


@pytest.mark.parametrize("source", ["hf://org/repo@main", "s3://bucket/x", "https://host/x", "file://otherhost/x"])
def test_schemes_that_are_not_read(sources: AdapterSources, source: str) -> None:
    with pytest.raises(UnsupportedFeature, match=source.split(":")[0] + "://"):
        sources.resolve(source)


@pytest.mark.parametrize("source", ["fr.tar", "fr.tar.gz", "fr.TGZ", "fr.zip"])
def test_archives_are_not_read(sources: AdapterSources, source: str) -> None:
    with pytest.raises(UnsupportedFeature, match="archives are not read"):
        sources.resolve(source)


@pytest.mark.parametrize("source", ["", "fr\0", "fr\n", "x" * 5000])
def test_malformed_sources(sources: AdapterSources, source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sources.resolve(source)
    assert caught.value.field == "source"


def test_overlong_components_are_refused(sources: AdapterSources) -> None:
    with pytest.raises((NotFound, NotPermitted)):
        sources.resolve("x" * 3000)


def test_missing_files_are_named(home: Path) -> None:
    directory = any_directory(str(home / "allowed/fr"))
    with pytest.raises(InvalidAdapter, match=rf"fr/{TENSOR_FILE} is missing$"):
        text_of(directory, TENSOR_FILE)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_never_read(home: Path, name: str) -> None:
    (home / "allowed/fr" / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(InvalidAdapter) as caught:
        text_of(any_directory(str(home / "allowed/fr")), TENSOR_FILE)
    for part in (TENSOR_FILE, name, "pickle", "never read", "save_pretrained"):
        assert part in str(caught.value)


def test_size_limit_names_the_file(home: Path) -> None:
    directory = any_directory(str(home / "allowed/fr"))
    size = len(text_of(directory))
    assert read_small_file(directory, CONFIG_FILE, size)
    with pytest.raises(InvalidAdapter, match=f"{CONFIG_FILE} is larger than {size - 1} bytes"):
        read_small_file(directory, CONFIG_FILE, size - 1)


def test_pipes_and_directories_in_place_of_files_do_not_hang(home: Path) -> None:
    directory = any_directory(str(home / "allowed/fr"))
    os.mkfifo(home / "allowed/fr" / TENSOR_FILE)
    with pytest.raises(InvalidAdapter, match="not a regular file"):
        text_of(directory, TENSOR_FILE)
    (home / "allowed/deep" / TENSOR_FILE).mkdir()
    with pytest.raises(InvalidAdapter, match="not a regular file"):
        text_of(any_directory(str(home / "allowed/deep")), TENSOR_FILE)
