"""What a command asks of its own process, before other libraries are imported. Not for a process that is the user's."""

from __future__ import annotations

import io
import os
import sys


def prepare_process() -> None:
    """Let this process look nothing up on the network, load no quantisation library, and print to any console.

    - Hugging Face's libraries work from the disk alone and draw no progress bars.
    - bitsandbytes, which peft imports where it is installed, downloads kernels when it is imported and prints two
      paragraphs where it cannot. No command of ours quantises a model: peft and transformers find it not installed.
    - Characters that standard output cannot encode are written as escapes, as Python does on standard error.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    # None makes an import fail, and `find_spec`, by which libraries ask for each other, find nothing.
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
