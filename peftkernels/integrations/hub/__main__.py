"""The command that writes the package in the layout of kernels on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from peftkernels.integrations.hub.folder import assemble


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m peftkernels.integrations.hub",
        description="Write the package in the layout of kernels on the Hugging Face Hub.",
    )
    parser.add_argument("folder", type=Path, help="where to; must be empty or not be there")
    folder = parser.parse_args(arguments).folder
    try:
        print(assemble(folder))
    except (FileNotFoundError, FileExistsError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
