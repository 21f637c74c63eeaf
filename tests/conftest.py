"""What every test starts from: one thread, a fixed seed, no network, no progress bars.

Beware importing a transformers model imports triton, after which TRITON_INTERPRET is read no more:
       so the environment is set before anything else is imported.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # test_hub.py runs the client in subprocesses of its own
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

import hypothesis
import pytest
import torch
import transformers as tf
from helpers import texts
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
hypothesis.settings.register_profile(
    "repository", deadline=None, derandomize=True, database=None, max_examples=40
)
hypothesis.settings.load_profile("repository")


@pytest.fixture
def tokenizer() -> tf.PreTrainedTokenizerFast:
    return texts.word_tokenizer()


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype behind"
