"""What an optimizer's state costs in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryReport(Mapping[str, float]):
    """Bytes of optimizer state, computed from shapes and the plan; readable as attributes or as a mapping.

    Attributes:
        exp_avg: First moments; the scales of int8 codes count too.
        exp_avg_sq: Second moments.
        max_exp_avg_sq: Their running maxima, with amsgrad.
        step: Step counts.
        total: All of it: what ``state`` holds.
        monitor: Samples of full second moments that :meth:`SlimAdam.snr_check` needs; kept beside the state.
        adamw_exp_avg_sq: Second moments of ``torch.optim.AdamW`` for the same parameters.
        adamw_total: All of AdamW's state.
        second_moments_saved: Share of AdamW's second-moment elements done without, in 0..1.
        bytes_per_parameter: ``total`` over the number of parameter elements.
    """

    exp_avg: int
    exp_avg_sq: int
    max_exp_avg_sq: int
    step: int
    total: int
    monitor: int
    adamw_exp_avg_sq: int
    adamw_total: int
    second_moments_saved: float
    bytes_per_parameter: float

    def __getitem__(self, key: str) -> float:
        if key not in self:
            raise KeyError(key)
        value: float = getattr(self, key)
        return value

    def __contains__(self, key: object) -> bool:
        return any(field.name == key for field in dataclasses.fields(self))

    def __iter__(self) -> Iterator[str]:
        return iter(field.name for field in dataclasses.fields(self))

    def __len__(self) -> int:
        return len(dataclasses.fields(self))
