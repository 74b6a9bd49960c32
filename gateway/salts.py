"""What keeps tenants apart in caches and sessions: everything named for a tenant is hashed under a salt that never leaves the gateways."""

from __future__ import annotations

import hashlib

from protocol.block_hash import cache_root


class TenantSalts:
    """salt: 32 bytes, of the cluster."""

    def __init__(self, salt: bytes) -> None:
        self._salt = salt

    def cache_root(self, tenant: str, *, fingerprint: bytes, tokenizer_revision: str, cache_salt: str) -> bytes:
        """Start of the prefix hash chains of a tenant's prompts; `cache_salt` keeps some of its own apart."""
        salt = self._of(tenant)
        return cache_root(salt=salt, fingerprint=fingerprint, tokenizer_revision=tokenizer_revision, cache_salt=cache_salt)

    def session(self, tenant: str, name: str) -> str:
        """Of one length, and the same only for the same name of the same tenant; nothing for no name."""
        return hashlib.blake2b(name.encode(), key=self._of(tenant), digest_size=16).hexdigest() if name else ""

    def _of(self, tenant: str) -> bytes:
        return hashlib.blake2b(tenant.encode(), key=self._salt, digest_size=32).digest()
