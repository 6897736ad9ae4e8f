"""Raw source batches in, products and rejected rows out. `products` is where it comes together; the others know one kind of value each."""

from pipelines.normalize.products import Normalized, NormalizeOptions, normalize

__all__ = ["NormalizeOptions", "Normalized", "normalize"]
