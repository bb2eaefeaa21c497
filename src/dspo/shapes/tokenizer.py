"""A real CLIP tokenizer with a small vocabulary: every word of the grammar is one token, any other text is bytes."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from dspo.shapes import grammar

CONTEXT_LENGTH = 24  # the longest prompt of the grammar has 18 tokens with start and end
START, END = "<|startoftext|>", "<|endoftext|>"


def new_tokenizer(more_words: Iterable[str] = ()) -> CLIPTokenizer:
    """Byte-level BPE over the grammar's words and ``more_words``. Start and end have the highest ids: CLIP pools by
    argmax."""
    phrases = (grammar.SHAPES, grammar.COLOURS, grammar.SIZES, grammar.PATTERNS, grammar.RELATIONS, grammar.POSITIONS)
    words = {word for phrase in phrases for text in phrase for word in text.split()} | {"a", "on", "background"}
    words |= set(more_words)
    merges = learn_merges(sorted(words))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{character}</w>" for character in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH, pad_token=END)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token; the most frequent pair first, ties in alphabetical order.

    Written here because the tokenizers library breaks ties by hash order, so that its result changes from run to run.
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for parts in split for pair in pairwise(parts)):
        pair = min(counts, key=lambda p: (-counts[p], p))
        merges.append(pair)
        split = [_merge(parts, pair) for parts in split]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
