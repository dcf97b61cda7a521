"""`python -m pipeline`."""

import gc

# What imports make stays, and looking for garbage in it again and again takes a seventh of the start of a stage.
gc.set_threshold(100_000)

from pipeline.cli import main  # noqa: E402 (after the threshold)

main()
