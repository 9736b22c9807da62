"""`python -m sophia` is the command `sophia`."""

import sys

from sophia.cli import main

sys.exit(main())
