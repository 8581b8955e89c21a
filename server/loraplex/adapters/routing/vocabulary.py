"""Whether two bases turn text into the same token ids."""

from __future__ import annotations

import hashlib

from tokenizers import Tokenizer as Backend


def vocabulary_digest(backend: Backend | None) -> str:
    """SHA-256 in hex over a tokenizer's tokens and their ids, added ones too; empty: there is no tokenizer."""
    if backend is None:
        return ""
    digest = hashlib.sha256()
    for token, token_id in sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]):
        raw = token.encode("utf-8", "surrogatepass")
        digest.update(token_id.to_bytes(8, "little") + len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
