"""Run the ledger's random machine for long: a million operations and more, seed after seed.

    python scripts/ledger_soak.py [--operations 1000000] [--seed 1]

Budgets, grants, settlements, kills, a full disk, a clock that jumps: see tests/gateway/ledger/test_ledger_machine.py.
Prints a line per seed; stops at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.gateway.ledger.test_ledger_machine import run_machine

OPERATIONS_PER_SEED = 4_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    done = admitted = killed = 0
    seed = args.seed
    with open(os.devnull, "w") as nowhere:
        while done < args.operations:
            with contextlib.redirect_stderr(nowhere):  # the ledger says when its disk is full, which it often is here
                machine = run_machine(seed, OPERATIONS_PER_SEED)
            done += OPERATIONS_PER_SEED
            admitted += machine.num_admitted
            killed += machine.num_killed
            print(
                f"seed {seed}: {done} operations, {admitted} requests admitted, {killed} kills, nothing wrong",
                flush=True,
            )
            seed += 1


if __name__ == "__main__":
    main()
