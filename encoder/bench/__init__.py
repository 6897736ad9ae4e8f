"""How fast texts become vectors: this encoder against its rivals and against the limit of its own matrix products."""
