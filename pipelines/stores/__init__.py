"""Where a generation lives: one module an engine."""
