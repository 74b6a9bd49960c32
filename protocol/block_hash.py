"""The one prefix hash chain: gateway, router and workers compute the same names for the same tokens.

    root = keyed BLAKE2b(tenant salt; model fingerprint, tokenizer revision, adapter, cache_salt)
    h_0  = xxh3_128(root    ‖ uint32-LE tokens[0:16])
    h_i  = xxh3_128(h_{i-1} ‖ uint32-LE tokens[16i:16i+16])

A worker whose KV block holds more tokens than a hash block names it by the hash at its end. A hash never decides alone:
token ids are compared before a block is shared, handed off or pulled.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

import xxhash

HASH_BLOCK_SIZE_TOKENS = 16  # one cluster constant; a worker's block size is a multiple of it
HASH_SIZE_BYTES = 16


def cache_root(*, salt: bytes, fingerprint: bytes, tokenizer_revision: str = "", adapter: str = "", cache_salt: str = "") -> bytes:
    """Start of a chain, 16 bytes.

    Made by the gateway; `salt` (at most 64 bytes) never leaves it, so tenants cannot guess each other's blocks.
    """
    h = hashlib.blake2b(key=salt, digest_size=HASH_SIZE_BYTES)
    for part in (fingerprint, tokenizer_revision.encode(), adapter.encode(), cache_salt.encode()):
        h.update(len(part).to_bytes(4, "little"))
        h.update(part)
    return h.digest()


def block_hashes(parent: bytes, tokens: Sequence[int] | array[int]) -> list[bytes]:
    """Names of the full hash blocks of `tokens`, continuing after `parent` (the root, or the hash of the block before).

    A last partial block has no name.
    """
    raw = _little_endian(tokens)
    step = HASH_BLOCK_SIZE_TOKENS * 4
    hashes = []
    digest = xxhash.xxh3_128_digest
    for start in range(0, len(raw) - step + 1, step):
        parent = digest(parent + raw[start : start + step])
        hashes.append(parent)
    return hashes


def _little_endian(tokens: Sequence[int] | array[int]) -> bytes:
    buffer = tokens if isinstance(tokens, array) else array("I", tokens)
    if sys.byteorder == "big":
        buffer = buffer[:]
        buffer.byteswap()
    return buffer.tobytes()
