"""What a person or a scheduler starts: the `catalog-embed` command and the configuration behind it."""
