"""`python -m jobs.cli` is `catalog-embed`."""

from jobs.cli import main

main()
