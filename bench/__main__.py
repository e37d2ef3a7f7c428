"""``python -m bench`` in a checkout is ``peftkernels bench``."""

import sys

from peftkernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
