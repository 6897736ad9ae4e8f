"""A shop that does not exist: its catalog, what changes in it every night, and queries with derived grades."""
