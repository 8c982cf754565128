"""``python -m mta_ds``: the same as the command ``mta-ds``."""

from mta_ds.cli import main

main()
