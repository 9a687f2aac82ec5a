"""`python -m lorsa_utils` is the `lorsa` command."""

import sys

from lorsa_utils.kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
