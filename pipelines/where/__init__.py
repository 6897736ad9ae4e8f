"""Filters that a person or a program writes: `brand = 'Acme' and price < 80`, or `(col("brand") == "Acme") & (col("price") < 80)`.

Both become a tree of typed comparisons, and the tree an Arrow expression: nothing of it reaches an engine as text.

Nulls are as in SQL: a row whose value is missing passes no comparison, so `brand != 'Acme'`, `brand not in ('Acme')`
and `not (brand = 'Acme')` all leave out products without a brand. `is null` and `is not null` ask for them; `or_null()`
behind a test lets them pass it; `nulls="keep"` keeps every row that the filter, for want of a value, does not decide.
"""

from pipelines.where.builder import Column, Expression, col
from pipelines.where.parser import parse_where
from pipelines.where.tree import MAX_CHARS, MAX_CHECKS, MAX_DEPTH, MAX_LISTED, MAX_WEIGHT, Check, Filter, Group, Nulls

__all__ = [
    "MAX_CHARS",
    "MAX_CHECKS",
    "MAX_DEPTH",
    "MAX_LISTED",
    "MAX_WEIGHT",
    "Check",
    "Column",
    "Expression",
    "Filter",
    "Group",
    "Nulls",
    "col",
    "parse_where",
]
