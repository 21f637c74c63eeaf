"""Documents -> contexts: what the language model reads at once, and where the next one begins.

Room   documents, a tokenizer -> each document's tokens between its marks -> contexts, each with
       the cursor of the next one.
How    Packed (causal models): documents are joined and cut every `context` tokens, so a context
       may begin and end inside a document. What is left at the end of an epoch is dropped.
       Windows (encoders such as BERT): each document is cut by itself, and every piece gets its
       own marks, such as [CLS] and [SEP]; the last piece may be shorter.
Beware In a packed context a token also sees the documents that come before its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hf_switch_sae.errors import TextError
from hf_switch_sae.text.documents import Document, Documents
from hf_switch_sae.text.tokenizer import Tokenizer, token_ids

# whichever is reached first: a few long documents, or many short ones
_CHARACTERS_AT_ONCE, _DOCUMENTS_AT_ONCE = 1 << 20, 256


@dataclass(frozen=True)
class Cursor:
    """A point between two contexts of a data set that is read again and again."""

    epoch: int = 0
    document: int = 0
    offset: int = 0
    """Tokens of that document, marks included, that earlier contexts have taken."""
    context: int = 0
    """Contexts so far, over all epochs: this number decides which rank gets the next one."""

    def to_dict(self) -> dict[str, int]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Context:
    """Tokens that the model reads at once."""

    tokens: list[int]
    number: int
    """Its number among all contexts of all epochs."""
    end: Cursor
    """Where the next context begins."""


@dataclass(frozen=True)
class Marks:
    """Token ids around each document (packed) or around each piece of one (windows)."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, boundary: str, tokenizer: Any) -> Marks:
        """The marks that a choice of boundary means for a tokenizer.

        Args:
            boundary: "bos" (before each document), "eos" (after it), "none", the text of a token
                to put after it, or "auto": what the tokenizer itself adds; if it adds nothing, its
                "eos" token, or else its "bos" token.
            tokenizer: a tokenizer of transformers, or None.

        Raises:
            TextError: the tokenizer has no such token.
        """
        if boundary == "none" or (boundary == "auto" and tokenizer is None):
            return cls()
        if tokenizer is None:
            raise TextError(f"boundary={boundary!r} needs the language model's tokenizer.")
        bos = getattr(tokenizer, "bos_token_id", None)
        eos = getattr(tokenizer, "eos_token_id", None)
        # what the tokenizer adds by itself is most likely what the model was trained with
        if boundary == "auto":
            if added := cls._added_by(tokenizer):
                return added
            if bos is None and eos is None:
                return cls()
            boundary = "bos" if eos is None else "eos"
        known = {"bos": bos, "eos": eos}
        found = known[boundary] if boundary in known else tokenizer.get_vocab().get(boundary)
        if found is None:
            raise TextError(
                f"the tokenizer has no token for boundary={boundary!r}; give 'auto', 'bos', 'eos', "
                "'none' or the text of a token it has."
            )
        return cls(before=(found,)) if boundary == "bos" else cls(after=(found,))

    @classmethod
    def _added_by(cls, tokenizer: Any) -> Marks | None:
        """The marks that the tokenizer itself puts around a text; None if it puts none."""
        text = "a"
        (inside,) = token_ids(tokenizer, [text], add_special_tokens=False)
        (whole,) = token_ids(tokenizer, [text], add_special_tokens=True)
        # what stands before and after the text's own tokens is what was added
        added = len(whole) - len(inside)
        for start in range(added + 1) if added > 0 else ():
            if whole[start : start + len(inside)] == inside:
                return cls(tuple(whole[:start]), tuple(whole[start + len(inside) :]))
        return None

    def around(self, tokens: list[int]) -> list[int]:
        """Tokens between the marks; a mark that is already there is not repeated."""
        before, after = list(self.before), list(self.after)
        # documents of token ids may come with their marks
        if before and tokens[: len(before)] == before:
            before = []
        if after and tokens[-len(after) :] == after:
            after = []
        return [*before, *tokens, *after]


@dataclass(frozen=True)
class Packer:
    """Cuts a data set into contexts; see the module's header.

    Args:
        documents: texts or token ids.
        tokenizer: not needed for token ids.
        context: tokens per context: exactly so many if packed, at most so many in windows.
        marks: put around each document, or around each window.
        windows: cut each document by itself.
    """

    documents: Documents
    tokenizer: Tokenizer | None
    context: int
    marks: Marks
    windows: bool = False

    def contexts(self, start: Cursor | None = None, epochs: int | None = None) -> Iterator[Context]:
        """The contexts that follow a cursor.

        Args:
            start: where to begin; by default at the first document. Documents before it are not
                tokenized.
            epochs: stop before this epoch, counted from 0; never by default.

        Raises:
            TextError: an epoch holds no context, or there are texts but no tokenizer.
        """
        at = start or Cursor()
        while epochs is None or at.epoch < epochs:
            found = None
            for found in self._epoch(at):
                yield found
            # a resume may stand right at an epoch's end, where it is no error to find nothing
            if found is None and (at.document, at.offset) == (0, 0):
                raise TextError(self._why_empty())
            count = at.context if found is None else found.end.context
            at = Cursor(at.epoch + 1, context=count)

    def _epoch(self, at: Cursor) -> Iterator[Context]:
        return self._windows(at) if self.windows else self._packed(at)

    def _packed(self, at: Cursor) -> Iterator[Context]:
        left: list[int] = []  # tokens that do not fill a context yet
        number = at.context
        for document, tokens in self._tokenized(at.document):
            # an empty document would be nothing but marks
            tokens = self.marks.around(tokens) if tokens else tokens
            left += tokens[at.offset if document == at.document else 0 :]
            begin = 0
            while len(left) - begin >= self.context:
                chosen = left[begin : begin + self.context]
                begin, number = begin + self.context, number + 1
                # contexts are given out as soon as they are full, so what is left belongs to this
                # document, and tells how far into it the context reaches
                offset = len(tokens) - (len(left) - begin)
                yield Context(chosen, number - 1, _cursor(at, document, offset, tokens, number))
            left = left[begin:]

    def _windows(self, at: Cursor) -> Iterator[Context]:
        size = self.context - len(self.marks.before) - len(self.marks.after)
        number = at.context
        for document, tokens in self._tokenized(at.document):
            first = at.offset if document == at.document else 0
            for start in range(first, len(tokens), size):
                number += 1
                end = _cursor(at, document, start + size, tokens, number)
                yield Context(self.marks.around(tokens[start : start + size]), number - 1, end)

    def _tokenized(self, first: int) -> Iterator[tuple[int, list[int]]]:
        """Number and tokens, without marks, of each document, beginning with document `first`."""
        for some in _in_chunks(each for each in self.documents if each.number >= first):
            texts = [document.text for document in some if isinstance(document.text, str)]
            encoded = iter(token_ids(self.tokenizer, texts, False) if texts else [])
            for document in some:
                is_text = isinstance(document.text, str)
                yield document.number, next(encoded) if is_text else list(document.text)  # type: ignore[arg-type]

    def _why_empty(self) -> str:
        documents = tokens = 0
        for _, found in self._tokenized(0):
            documents += 1
            tokens += len(self.marks.around(found)) if found else 0
        if not documents:
            return "the data set is empty: there is no document to train on."
        if not tokens:
            return f"the data set's {documents} documents are all empty."
        return (
            f"the data set's {documents} documents have {tokens} tokens together, fewer than one "
            f"context of {self.context}: give more text or a smaller context."
        )


def _cursor(at: Cursor, document: int, offset: int, tokens: list[int], number: int) -> Cursor:
    """The cursor at an offset in a document, or at the next document if this one is used up."""
    if offset < len(tokens):
        return Cursor(at.epoch, document, offset, number)
    return Cursor(at.epoch, document + 1, 0, number)


def _in_chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Several documents at a time: tokenizers are much faster on many texts than on one."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.size
        if size >= _CHARACTERS_AT_ONCE or len(chunk) >= _DOCUMENTS_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
