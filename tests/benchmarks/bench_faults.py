"""What becomes of odd and damaged inputs: ``python tests/benchmarks/bench_faults.py [--only TEXT] [--list KIND]``.

Each of the inputs of ``tests/helpers/odd`` is run once. An input is *right* (answered as clean input is), *stated* (answered, with a
warning), *refused* (a named error before any work, nothing changed), or a failure: *wrong in silence*, *data lost*, *raw error*,
*late error*, *refused needlessly*.
"""

import argparse
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ["MPLBACKEND"] = "Agg"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.odd import everything, outcome  # noqa: E402 - found by the path above
from tests.helpers.odd.harness import BAD, GOOD  # noqa: E402


def main() -> None:
    """Print the failures, and a table of counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="inputs whose name contains this")
    parser.add_argument("--list", default="", dest="listed", help="print inputs of this outcome too")
    parser.add_argument("--every", type=int, default=1, help="only each n-th input")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for odd in [odd for odd in everything() if options.only in odd.name][:: options.every]:
        try:
            kind, said = outcome(odd)
        except Exception as error:  # noqa: BLE001 - one input that cannot be made must not stop the rest
            kind, said = "not run", f"{type(error).__name__}: {error}"
        where = " ".join(odd.name.split(" / ")[0].split("(")[0].split()[:3])
        counts[where][kind] += 1
        if kind in (*BAD, "not run") or kind == options.listed:
            print(f"{kind:<18} {odd.name}: {' '.join(said.split())[:220]}", flush=True)
    kinds = [*GOOD, *BAD, "not run"]
    print(f"\n| where | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for where, found in counts.items():
        print(f"| {where} | {' | '.join(str(found[kind]) for kind in kinds)} |")
    total = sum(counts.values(), Counter())
    print(f"| all {sum(total.values()):,} | {' | '.join(f'**{total[kind]}**' for kind in kinds)} |")


if __name__ == "__main__":
    main()
