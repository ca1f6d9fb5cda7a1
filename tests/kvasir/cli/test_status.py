"""What `kvasir status` says of drafts."""

from __future__ import annotations

from rich.console import Console

from kvasir.cli.status import render_status
from kvasir.protocol.admin_messages import StatusReply
from kvasir.protocol.admin_records import WorkerInfo


def show(*workers: WorkerInfo) -> str:
    console = Console(width=100, record=True)
    console.print(render_status(StatusReply(workers=list(workers))))
    return console.export_text()


def test_drafts_are_summed_up_by_proposer() -> None:
    drafting = [
        WorkerInfo(f"w{n}", "demo", "ready", proposer="lookup", num_draft_runs=10, num_drafted=40, num_accepted=20 * n)
        for n in (0, 1)
    ]
    idle = WorkerInfo("w2", "demo", "ready", proposer="other")
    text = show(*drafting, idle)
    assert "drafts (lookup): 80 tokens, 25 % of them held, 2.0 tokens a step where there were any" in text
    assert "other" not in text and "drafts" not in show(idle)
