"""What tests of activations share: documents, a tokenizer, and the rows said plainly."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from helpers import tiny
from hf_switch_sae import residuals
from hf_switch_sae.activations.settings import ActivationSettings

LENGTHS = (9, 40, 1, 3, 26, 0, 12, 5, 33, 2, 2, 18, 64, 7, 21, 50, 11)
DOCUMENTS = [x.tolist() for x in tiny.prompts(*LENGTHS)]
CONTEXT = 16
SETTINGS: dict[str, Any] = {"context": CONTEXT, "tokens_per_pass": 64, "outlier_factor": None}
WORDS = ["<pad>", "<s>", "</s>", "the", "ship", "sailed", "across", "sea", "to", "old", "harbour"]


def settings(**changes: Any) -> ActivationSettings:
    return ActivationSettings(**{**SETTINGS, **changes})


def tokenizer(template: str = "$A", **tokens: str) -> tf.PreTrainedTokenizerFast:
    """Words; the template says which marks it adds of its own accord."""
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [(mark, WORDS.index(mark)) for mark in ("<s>", "</s>")]
    plain.post_processor = processors.TemplateProcessing(template, None, marks)
    return tf.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", **tokens)


def plain_rows(
    lm: nn.Module, contexts: Sequence[Sequence[int]], at: int | str = 2, skip_first: bool = True
) -> Tensor:
    """[rows, d]: the stream of each context by itself, in order."""
    found = []
    with torch.no_grad(), residuals(lm, [at]) as read:
        for tokens in contexts:
            (stream,) = read(input_ids=torch.tensor([list(tokens)])).values()
            found.append(stream[0, int(skip_first) :])
    return torch.cat(found)


def in_order(rows: Tensor) -> Tensor:
    """Rows sorted by a sum over each, so that sets of rows compare."""
    weights = torch.linspace(1, 2, rows.shape[1], dtype=torch.float64)
    return rows[(rows.double() @ weights).argsort()]
