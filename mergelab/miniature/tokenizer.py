"""Make the miniature's tokenizer: BERT's WordPiece, over the words that the grammars use.

Words of the grammars are one token each. Any other word is split into letters, so that only characters outside the
alphabet below are unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_PUNCTUATION = ".,'!?;:-()\"$%"
MAX_LENGTH = 64


def vocabulary(texts: Iterable[str]) -> list[str]:
    """List special tokens, characters, their continuations, and the words of ``texts`` in alphabetical order."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalise, split = BertNormalizer(), BertPreTokenizer()
    words: set[str] = set()
    for text in texts:
        words.update(word for word, _ in split.pre_tokenize_str(normalise.normalize_str(text)))
    first = [*SPECIAL, *_PUNCTUATION, *_ALPHABET, *(f"##{letter}" for letter in _ALPHABET)]
    return first + sorted(words.difference(first))


def make_wordpiece(words: list[str]) -> Tokenizer:
    """Make the WordPiece tokenizer with the vocabulary ``words``, in their order."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save_wordpiece(tokenizer: Tokenizer, words: list[str], folder: Path) -> None:
    """Write the files from which ``AutoTokenizer`` of transformers 4.57 and 5 loads ``tokenizer``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    config = {
        "added_tokens_decoder": {
            str(number): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for number, token in enumerate(SPECIAL)
        },
        "clean_up_tokenization_spaces": False,
        "do_lower_case": True,
        "model_max_length": MAX_LENGTH,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
        **named,
    }
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    _write(folder / "special_tokens_map.json", json.dumps(named, indent=2, sort_keys=True) + "\n")
    _write(folder / "vocab.txt", "".join(f"{word}\n" for word in words))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
