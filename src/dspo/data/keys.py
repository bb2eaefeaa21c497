"""Keyed randomness: every draw depends on what it is for, never on its place in a batch or the number of processes."""

import hashlib
import json

import numpy as np


def keyed_seed(seed: int, purpose: str, *parts: object) -> int:
    """63-bit seed from sha256 of the JSON list ``[seed, purpose, *parts]``; parts enter by their ``str``."""
    key = json.dumps([seed, purpose, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def keyed_rng(seed: int, purpose: str, *parts: object) -> np.random.Generator:
    return np.random.default_rng(keyed_seed(seed, purpose, *parts))


def keyed_uniform(seed: int, purpose: str, *parts: object) -> float:
    """Uniform number in [0, 1) with 53 random bits."""
    return (keyed_seed(seed, purpose, *parts) >> 10) / 2**53


def prompt_id(text: str) -> str:
    """First 16 hexadecimal digits of sha256 of the prompt's UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
