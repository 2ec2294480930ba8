"""`python -m popmtl`."""

import sys

from popmtl.cli import main

sys.exit(main())
