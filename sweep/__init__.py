"""Massive supervised fine-tuning sweeps on Ray: one YAML in, Parquet tables out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sweep.api import Sweep

__all__ = ["Sweep"]


def __getattr__(name: str) -> Any:
    """`sweep.Sweep`, imported when it is used: `analysis` needs `sweep.schema` alone."""
    if name == "Sweep":
        from sweep.api import Sweep

        return Sweep
    raise AttributeError(name)
