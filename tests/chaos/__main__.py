"""`python -m tests.chaos`: one run, with a table at the end; exit code 1 when something did not hold."""

from __future__ import annotations

import argparse
import random
import sys

from tests.chaos import breaks
from tests.chaos.faults import KINDS
from tests.chaos.harness import Plan, Report, run

_SHOWN = 40


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--faults", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=570, help="bound on the whole run")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", nargs="+", default=(), choices=KINDS, help="only these kinds of faults")
    parser.add_argument(
        "--break", dest="broken", choices=breaks.NAMES, help="take a guarantee out: must fail"
    )
    plan = Plan(**vars(parser.parse_args()))
    print(f"{plan.jobs} jobs, {plan.faults} faults, seed {plan.seed}", flush=True)
    report = run(plan, lambda line: print(line, flush=True))
    print(table(report))
    return 1 if report.verdict.violations else 0


def table(report: Report) -> str:
    """The counts, then the violations."""
    lines = []
    for heading, counts in report.sections.items():
        lines.append(
            f"\n{heading} ({counts.total()})" if heading in ("faults", "jobs by door") else f"\n{heading}"
        )
        lines += [f"  {count:7d}  {name}" for name, count in sorted(counts.items())]
    pauses = ", ".join(f"{name} {pause:.1f} s" for name, pause in report.longest_pauses_s.items())
    lines.append(f"\nlongest pause that a client saw: {pauses}")
    violations = report.verdict.violations
    lines += [f"VIOLATION {what}" for what in violations[:_SHOWN]]
    if len(violations) > _SHOWN:
        lines.append(f"... and {len(violations) - _SHOWN} more")
    lines.append(
        f"seed {report.plan.seed}, {report.seconds:.0f} s: "
        + (f"{len(violations)} violations" if violations else "everything held")
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
