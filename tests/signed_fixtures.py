"""A signed bundle, its keys and those of a stranger."""

import shutil
from pathlib import Path

import pytest
from signatures import Keys, new_keys, signed_bundle

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.signing.trust import Trust


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("keys"), "ci")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture(scope="module")
def signed(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed bundle that tests leave as it is."""
    return signed_bundle(tmp_path_factory.mktemp("signed") / "digits", keys)


@pytest.fixture
def copy(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "digits"))


def refused(path: Path, trust: Trust, expected: str | None = None) -> None:
    with pytest.raises(InputError, match=expected) as error:
        open_bundle(path, trust)
    assert "\n" not in str(error.value)
