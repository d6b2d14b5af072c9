"""The real files of SmolLM2 and Gemma 3, fetched once per machine, and a tiny tokenizer.

Gemma's terms have to be accepted: TCA4REC_ACCEPT_TERMS=gemma, or its tests are skipped.

Lets the tests of this folder import the script that made their goldens.
"""

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tca4rec_jax.data.downloads import DownloadError, TermsError, fetch_file

sys.path.insert(0, str(Path(__file__).parents[1] / "goldens"))


@pytest.fixture(scope="session")
def smollm2_path():
    try:
        return fetch_file("smollm2-135m-instruct")
    except DownloadError as error:
        pytest.skip(f"SmolLM2 is not cached and could not be fetched: {error}")


@pytest.fixture(scope="session")
def gemma_path():
    try:
        return fetch_file("gemma-3-270m")
    except (DownloadError, TermsError) as error:
        pytest.skip(f"Gemma 3 is not cached and could not be fetched: {error}")


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of 29 tokens without merges, put together as load_tokenizer does."""
    names = ["<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
