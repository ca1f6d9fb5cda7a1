"""The tree of a prefix cache's runs, found by parent and first hash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from kvasir.cache.block_pool import IntegrityError
from kvasir.cache.run import Key, Run
from kvasir.protocol.prefix import HASH_BYTES


class RunTree:
    """All runs that are resident. Every operation but `by_depth` and the check is O(1), and a slice of what it cuts.

    Only the first block of a run can be found. A walk from the root needs no other, and an index of all blocks would
    cost more than all the rest together.
    """

    def __init__(self) -> None:
        self._runs: dict[Key, Run] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    def find(self, above: Run | bytes, digest: bytes) -> Run | None:
        """Return the run below `above` (the root hash at the beginning of a chain) whose first block has the hash
        `digest`. Only a comparison of what it holds says whether it is the run that was looked for."""
        return self._runs.get((above, digest))

    def add(self, run: Run) -> None:
        self._runs[run.key] = run
        if run.parent is not None:
            run.parent.num_children += 1

    def remove(self, run: Run) -> None:
        """Take out `run`, a leaf that is not empty yet."""
        del self._runs[run.key]
        if run.parent is not None:
            run.parent.num_children -= 1

    def split(self, run: Run, num_blocks: int) -> Run:
        """Cut `run` behind its first `num_blocks` blocks and return the run of those, its parent from now on."""
        head = run.cut(num_blocks)
        self._runs[head.key] = head
        self._runs[run.key] = run
        return head

    def by_depth(self) -> list[Run]:
        """Return all runs, parents before their children."""
        return sorted(self._runs.values(), key=lambda run: run.start)

    def check_integrity(self, references: Mapping[Run, int], block_bytes: int) -> None:
        """Check every run by itself, against its parent and children, and against `references`, which lists how often
        each is referenced. `block_bytes` of token ids are one block.

        Raises:
            IntegrityError: with the first contradiction found.
        """
        runs = set(self._runs.values())
        num_children = Counter(run.parent for run in runs)
        if not references.keys() <= runs:
            raise IntegrityError("a table references what is not resident")
        for key, run in self._runs.items():
            name = f"the run of block {run.block_ids[0]}" if run.block_ids else "a run"
            if run.key != key:
                raise IntegrityError(f"{name} is indexed under a key that is not its own")
            if not run.block_ids or (len(run.hashes), len(run.tokens)) != (
                len(run) * HASH_BYTES,
                len(run) * block_bytes,
            ):
                raise IntegrityError(f"{name} has {len(run)} blocks, but other hashes or tokens")
            if run.parent is not None and run.parent not in runs:
                raise IntegrityError(f"{name} has outlived its parent")
            if run.start != (run.parent.end if run.parent is not None else 0):
                raise IntegrityError(f"{name} begins at {run.start}, where its parent does not end")
            if run.num_children != num_children[run]:
                raise IntegrityError(f"{name} counts {run.num_children} children, it has {num_children[run]}")
            if run.ref_count != references.get(run, 0):
                raise IntegrityError(f"{name} has ref count {run.ref_count} but {references.get(run, 0)} references")
