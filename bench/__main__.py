"""``python -m bench``, from the root of the repository."""

import sys

from bench.command import main
from peftkernels.cli.process import prepare_process

if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
