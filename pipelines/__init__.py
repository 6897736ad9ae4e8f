"""Catalog in, generation out: sources, normalising, the plan, the store and the publish log."""
