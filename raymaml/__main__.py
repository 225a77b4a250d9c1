"""``python -m raymaml``: the same as the ``raymaml`` command."""

from raymaml.cli import main

main()
