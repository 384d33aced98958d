"""``python -m carvae`` is the command ``carvae``."""

from carvae.cli import main

main()
