"""``python -m bench.gpu_check``: every section in turn, one JSON, a short table, and what failed first."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

#: the issue's own limit is nine minutes; the rest is for Python to start and end in
MINUTES = 8.5
#: what every section imports; tests and ranks need more
NEEDED = ("torch", "triton", "msgspec", "numpy", "psutil", "safetensors", "tokenizers", "jinja2")


def main() -> int:
    """0 when every section passed or was skipped, 1 when one failed or ran out of time, 2 for a machine that cannot
    run it."""
    arguments = _arguments()
    if arguments.dry_run:
        # read by Triton when its kernels are made, so before anything imports them
        os.environ["TRITON_INTERPRET"] = "1"
    console = Console(highlight=False)
    missing = _missing(dry=arguments.dry_run)
    if missing:
        console.print(f"gpu_check cannot run here: {missing}", style="red", soft_wrap=True)
        return 2
    from bench.gpu_check.report import Report, show_row, show_summary
    from bench.gpu_check.section import Setting, run_section
    from bench.gpu_check.sections import MORE, SECTIONS, device_of

    known = {section.name: section for section in (*SECTIONS, *MORE)}
    unknown = [name for name in arguments.only if name not in known]
    if unknown:
        console.print(f"--only {escape(', '.join(unknown))}: the sections are {', '.join(known)}", style="red")
        return 2
    setting = Setting(device_of(arguments.dry_run), arguments.dry_run, time.monotonic() + arguments.minutes * 60)
    report = Report(["python", "-m", "bench.gpu_check", *sys.argv[1:]], setting)
    chosen = [known[name] for name in arguments.only] or list(SECTIONS)
    try:
        for section in chosen:
            console.print(f"[bold]{section.name}")
            report.outcomes.append(run_section(section, setting, lambda row: show_row(console, row)))
            report.write(arguments.out)  # after each section: a machine that goes away leaves what was found
    except KeyboardInterrupt:
        console.print("interrupted", style="red")
    show_summary(console, report, planned=[section.name for section in chosen])
    if arguments.out is not None:
        report.write(arguments.out)
        console.print(f"written to {escape(str(arguments.out))}")
    return 0 if report.passed(len(chosen)) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="go through every section on a CPU at tiny sizes")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="these sections alone")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"end within this time (default {MINUTES})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON; none is written without it")
    arguments = parser.parse_args()
    if not 0 < arguments.minutes <= 60:
        parser.error(f"--minutes {arguments.minutes}: allowed are more than 0, at most 60")
    if arguments.out is not None and not arguments.out.parent.is_dir():
        parser.error(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
    return arguments


def _missing(*, dry: bool) -> str:
    """What this machine lacks, "" when nothing."""
    from importlib.util import find_spec

    packages = [name for name in NEEDED if find_spec(name) is None]
    if packages:
        return f"the packages {', '.join(packages)} are not installed"
    import torch

    if not dry and not torch.cuda.is_available():
        return "torch sees no CUDA device; --dry-run goes through the motions on a CPU"
    if not dry and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: kernels would run in the interpreter"
    return ""


if __name__ == "__main__":
    sys.exit(main())
