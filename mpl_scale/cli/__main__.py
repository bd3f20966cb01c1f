"""`python -m mpl_scale.cli`: the command line where the script `mpl-scale` is not installed."""

import sys

from mpl_scale.cli import main

if __name__ == "__main__":
    sys.exit(main())
