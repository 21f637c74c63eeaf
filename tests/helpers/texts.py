"""A few texts and a tokenizer of their words, for what records or describes text."""

import transformers as tf

TEXTS = ["the ship sailed", "", "the old ship sailed across the sea to the old harbour", "ship"]


def word_tokenizer() -> tf.PreTrainedTokenizerFast:
    """A word a token, and a first token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "the", "ship", "sailed", "across", "sea", "to", "old", "harbour"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>")
