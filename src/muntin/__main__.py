"""`python -m muntin` is `muntin`."""

from muntin.cli import main

main()
