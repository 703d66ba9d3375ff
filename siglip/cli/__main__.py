"""`python -m siglip.cli` is the same as `siglip`."""

from siglip.cli import main

main()
