"""``python -m peftkernels``, the same as the command ``peftkernels``."""

import sys

from peftkernels.cli.main import console

if __name__ == "__main__":
    sys.exit(console())
