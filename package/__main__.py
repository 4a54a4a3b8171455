"""``python -m jensen`` is the command ``jensen``."""

import sys

from jensen.cli import main

if __name__ == "__main__":
    sys.exit(main())
