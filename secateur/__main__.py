"""`python -m secateur` is the command `secateur`."""

from secateur.cli import main

main()
