"""The vocabulary: a CLIP byte-pair tokenizer in which every word of the caption grammar is one token.

Words outside the grammar fall back to pieces and single letters, so any prompt can be encoded.
"""

from __future__ import annotations

from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from jobs.tangram.drawings import BACKGROUNDS, CLASSES, COLOURS, TEXTURES

LENGTH = 20  # tokens, with start and end: the longest caption has 16
START, END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption may contain, in a fixed order."""
    grammar = ("a", "an", "the", "of", "on", "in", "with", "and", "photo", "picture", "drawing", "image")
    shapes = [word for name in CLASSES for word in name.split("_")]
    return tuple(dict.fromkeys([*grammar, "background", *COLOURS, *TEXTURES, *BACKGROUNDS, *shapes]))


def new_tokenizer() -> CLIPTokenizer:
    """Bytes, then the pieces that build each word, then start and end (the end must be the highest id)."""
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + _END_OF_WORD for letter in letters)]
    merges = _merges(vocabulary())
    pieces += dict.fromkeys(left + right for left, right in merges)
    vocab = {piece: number for number, piece in enumerate([*dict.fromkeys(pieces), START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merge rules, earliest first, that turn each word into one token.

    A word is cut by the rules so far, and new rules join what is left. Later rules have lower rank, so they
    never undo an earlier word.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + _END_OF_WORD]
        while len(pieces) > 1:
            ranked = [(merges.index(pair), pair) for pair in pairwise(pieces) if pair in merges]
            pair = min(ranked)[1] if ranked else (pieces[0], pieces[1])
            if not ranked:
                merges.append(pair)
            pieces = _joined(pieces, pair)
    return merges


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
