"""Seeds that mean the same on every machine, in every process order. Standard library only."""

import hashlib


def seed_of(*key: object) -> int:
    """A 63-bit seed from any values, for example (run seed, record id, prompt style, sample number)."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
