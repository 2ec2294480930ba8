"""`python -m popmtl`."""

import sys

from popmtl import modules

modules.look_in("")  # before anything is imported that a file of the current folder could stand in for

from popmtl.cli import main  # noqa: E402

sys.exit(main())
