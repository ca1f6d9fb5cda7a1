"""What `kvasir status` says of drafts."""

from __future__ import annotations

from rich.console import Console

from kvasir.cli.status import render_status
from kvasir.protocol.admin_messages import StatusReply
from kvasir.protocol.admin_records import WorkerInfo
from kvasir.protocol.messages import Drafts


def show(*workers: WorkerInfo) -> str:
    console = Console(width=100, record=True)
    console.print(render_status(StatusReply(workers=list(workers))))
    return console.export_text()


def test_drafts_are_summed_up_by_proposer() -> None:
    drafting = [
        WorkerInfo("w0", "demo", "ready", drafts=[Drafts("lookup", 10, 40, 0)]),
        WorkerInfo("w1", "demo", "ready", drafts=[Drafts("model", 5, 10, 10), Drafts("lookup", 10, 40, 20)]),
    ]
    idle = WorkerInfo("w2", "demo", "ready")
    text = show(*drafting, idle)
    assert "drafts (lookup): 80 tokens, 25 % of them held, 2.0 tokens a step where there were any" in text
    assert "drafts (model): 10 tokens, 100 % of them held, 3.0 tokens a step where there were any" in text
    assert "drafts" not in show(idle)
