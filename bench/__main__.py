"""``python -m bench`` in a checkout is ``peftkernels bench``."""

import sys

from peftkernels.cli.main import main
from peftkernels.cli.process import prepare_process

if __name__ == "__main__":
    prepare_process()
    sys.exit(main(["bench", *sys.argv[1:]]))
