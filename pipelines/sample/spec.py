"""What a sample catalog is made from: its seed, its size, and how much of it changes in a night."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipelines.errors import InputError

# The day of night 0. A constant, so that a catalog never depends on when it was made.
BASE_DAY = datetime(2026, 1, 5, tzinfo=UTC)

MAX_ROWS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """Seed, products at night 0, and the share of rows that each kind of change touches per night."""

    seed: int = 7
    products: int = 5000
    add_rate: float = 0.004
    text_rate: float = 0.006
    price_rate: float = 0.016
    stock_rate: float = 0.004
    tombstone_rate: float = 0.0015
    absence_rate: float = 0.0015

    def __post_init__(self) -> None:
        if not 1 <= self.products <= MAX_ROWS:
            raise InputError(f"sample: products is {self.products}. Choose 1 to {MAX_ROWS:,}.")
        if self.seed < 0:
            raise InputError(f"sample: seed is {self.seed}. Choose 0 or more.")
        rates = (self.add_rate, self.text_rate, self.price_rate, self.stock_rate, self.tombstone_rate, self.absence_rate)
        if min(rates) < 0 or self.text_rate > 1 or sum(rates[2:]) > 1:
            raise InputError(f"sample: rates {rates} are not shares of one. Choose values from 0 to 1, row changes 1 at most together.")

    @property
    def adds(self) -> int:
        """Rows that appear every night: the same number, and at least one unless the rate is zero."""
        return max(1, round(self.products * self.add_rate)) if self.add_rate else 0

    def rows(self, night: int) -> int:
        """Return how many row numbers are in use at this night, deleted ones included."""
        if night < 0:
            raise InputError(f"sample: night is {night}. Night 0 is the first catalog; choose 0 or more.")
        return self.products + night * self.adds


def day(night: int) -> datetime:
    """Return the start of the day on which the changes of this night are made (UTC)."""
    return BASE_DAY + timedelta(days=night)
