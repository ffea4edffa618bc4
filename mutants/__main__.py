"""Plants faults in a copy of the sources, one at a time, and checks that the tests named for each notice it.

    python -m mutants                     all of them (more than an hour)
    python -m mutants --quick             the small part that CI plants (two minutes)
    python -m mutants --only sm90         those with this text in the name of their list, mutant or file
    python -m mutants --only cpu/ffn --only cpu/gemm --list

Exit code 1: a mutant survived, its tests fail without it, or its text is not in its file exactly once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from .copy import ROOT, Copy, NotRun
from .lists import load
from .mutant import Mutant, Tests


class Trial:
    """Tries mutants one after the other in a copy; `failures` lists those that were not killed, with the reason."""

    def __init__(self, copy: Copy):
        self.copy = copy
        self.failures: list[str] = []
        self._unchanged: dict[Tests, str] = {}  # why tests are unusable, "" if they pass on the unchanged sources

    def run(self, name: str, mutant: Mutant) -> str:
        """Tries one mutant; returns the outcome as text."""
        try:
            outcome = self._judge(mutant.tests) or self._plant(mutant)
        except NotRun as error:
            outcome = str(error)
        if not outcome.startswith("killed"):
            self.failures.append(f"{name}: {outcome}")
        return outcome

    def _judge(self, tests: Tests) -> str:
        if tests not in self._unchanged:
            failed = [attempt.how for attempt in tests.attempts(self.copy) if attempt.noticed]
            self._unchanged[tests] = f"its tests fail without it too ({', '.join(failed)})" if failed else ""
        return self._unchanged[tests]

    def _plant(self, mutant: Mutant) -> str:
        text = mutant.planted((self.copy.source / mutant.file).read_text())
        with self.copy.changed(mutant.file, text):
            for attempt in mutant.tests.attempts(self.copy):
                if attempt.noticed:
                    return f"killed ({attempt.how})"
        return "survived"


def misplaced(mutants: dict[str, Mutant], root: Path) -> list[str]:
    """Messages about mutants whose text is not in their file exactly once, or which change nothing."""
    wrong = []
    for name, mutant in mutants.items():
        try:
            text = (root / mutant.file).read_text()
            if mutant.planted(text) == text:
                wrong.append(f"{name}: changes nothing")
        except (LookupError, OSError) as error:
            wrong.append(f"{name}: {error}")
    return wrong


def choose(quick: bool, only: list[str]) -> dict[str, Mutant]:
    """The mutants to try, by list and name."""
    everything = [(f"{of}: {mutant.name}", mutant) for of, mutants in load().items() for mutant in mutants]
    return {
        name: mutant
        for name, mutant in everything
        if (mutant.quick or not quick) and (not only or any(part in name or part in mutant.file for part in only))
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="part of a list, a name or a file")
    parser.add_argument("--quick", action="store_true", help="only the part that CI plants")
    parser.add_argument("--list", action="store_true", help="print the mutants and plant nothing")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants", help="for the copy and its builds")
    arguments = parser.parse_args()
    chosen = choose(arguments.quick, arguments.only)
    if arguments.list:
        print(*(f"{name}  [{mutant.file}]" for name, mutant in chosen.items()), sep="\n")
    wrong = misplaced(chosen, ROOT)
    if arguments.list or wrong or not chosen:
        print(*(wrong if chosen else ["no mutant has that in its name"]), sep="\n", file=sys.stderr)
        return 1 if wrong or not chosen else 0
    copy = Copy(arguments.folder)
    copy.refresh()
    trial = Trial(copy)
    with tqdm(chosen.items(), desc="mutants", unit="mutant", disable=None) as bar:
        for name, mutant in bar:
            bar.write(f"{name}: {trial.run(name, mutant)}", file=sys.stdout)
    print(f"{len(chosen) - len(trial.failures)} of {len(chosen)} mutants killed")
    print(*trial.failures, sep="\n", file=sys.stderr, end="\n" if trial.failures else "")
    return 1 if trial.failures else 0


if __name__ == "__main__":
    sys.exit(main())
