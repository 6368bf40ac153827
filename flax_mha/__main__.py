"""`python -m flax_mha`: the command line."""

import sys

from flax_mha._cli import main

if __name__ == "__main__":
    sys.exit(main())
