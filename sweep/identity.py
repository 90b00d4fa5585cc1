"""Canonical text of settings, and the short content id made from it.

A permissive fallback (`str(value)`) would give one setting a new id on every run, so whatever has no stable
text is refused.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

ID_LENGTH = 12
"""Hex digits of an id: 48 bits, a collision chance of 2e-7 among 10,000 trials."""


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, finite numbers only.

    >>> canonical_json({"b": 1e-5, "a": [True, None]})
    '{"a":[true,null],"b":1e-05}'

    Raises:
        TypeError: the value, or something inside it, has no stable text (a callable, a set, a path ...).
        ValueError: a number is NaN or infinite.
    """
    _check(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_id(value: Any, length: int = ID_LENGTH) -> str:
    """The first `length` hex digits of the sha256 of the canonical text.

    Raises:
        TypeError: as `canonical_json`.
        ValueError: as `canonical_json`.
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def _check(value: Any, where: str) -> None:
    if value is None or isinstance(value, (bool, int, str)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: only finite numbers have an id")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} of {where} is a {type(key).__name__}; keys must be text")
            _check(item, f"{where}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}, which has no stable text")
