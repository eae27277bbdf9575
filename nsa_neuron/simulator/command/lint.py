"""`nsa lint`: check kernels without running them. Imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from .. import lint
from ..rules.versions import NEWEST, check_version

if TYPE_CHECKING:
    from collections.abc import Sequence

FAILED, UNUSABLE = 1, 2


def lint_main(argv: Sequence[str]) -> int:
    """Carries out `nsa lint`."""
    parser = argparse.ArgumentParser(
        prog="nsa lint",
        description="Check NKI kernels against a version's Python and API, without running them.",
        epilog="`# nsa: ignore[rule]` at the end of a line keeps that rule quiet there.",
    )
    parser.add_argument("paths", nargs="*", metavar="KERNEL.py", help="files or folders")
    parser.add_argument("--ignore", action="append", default=[], metavar="RULE")
    parser.add_argument("--nki", default=NEWEST, help=f"version of NKI (default {NEWEST})")
    parser.add_argument("--strict", action="store_true", help="warnings count as errors")
    parser.add_argument("--rules", action="store_true", help="list the rules and their sources")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    try:
        check_version(args.nki)
    except ValueError as error:
        print(f"nsa lint: {error}", file=sys.stderr)
        return UNUSABLE
    if args.rules:
        print(_rules_json() if args.json else _rules(args.nki))
        return 0
    unknown = sorted(set(args.ignore) - lint.RULES.keys())
    if unknown or not args.paths:
        what = f"no rule is named {unknown[0]!r}" if unknown else "name a file or folder"
        print(f"nsa lint: {what}", file=sys.stderr)
        return UNUSABLE
    try:
        found = [f for f in lint.lint_paths(args.paths, args.nki) if f.rule not in args.ignore]
    except (FileNotFoundError, ValueError) as error:
        print(f"nsa lint: {error}", file=sys.stderr)
        return UNUSABLE
    errors = [f for f in found if f.severity == "error" or args.strict]
    if args.json:
        print(json.dumps([{**asdict(f), "severity": f.severity} for f in found], indent=1))
    else:
        for finding in found:
            print(finding)
        print(f"{len(errors)} errors, {len(found) - len(errors)} warnings")
    return FAILED if errors else 0


def _rules(nki: str) -> str:
    lines = []
    for rule in lint.RULES.values():
        only = "" if nki in rule.versions else f" (NKI {', '.join(rule.versions)} only)"
        lines.append(f"{rule.id:18} {rule.severity:8} {rule.text}{only}  [{rule.source}]")
    return "\n".join(lines)


def _rules_json() -> str:
    return json.dumps([asdict(rule) for rule in lint.RULES.values()], indent=1)
