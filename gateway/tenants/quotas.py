"""KV floors and caps of tenants: sizes as they are typed, the blocks they come to, and whether all of them fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from kvasir.gateway.tenants.directory import Tenant
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.messages import Quota

_KV_SIZE = re.compile(r"[0-9]{1,12}|[0-9]{1,3}(\.[0-9]{1,4})?%")


def check_kv_size(text: str, what: str) -> str:
    """Return `text` as it is kept if it is a number of blocks, a share, or nothing ("", "none", for a floor "0").

    Raises:
        BadRequest: it is none of these.
    """
    text = text.strip().replace(" ", "")
    if text in ("", "none"):
        return ""
    if re.fullmatch(r"0+(\.0+)?%?", text):
        if what == "kv_cap":
            raise BadRequest(
                "a kv_cap of 0 would let nothing run; give none to lift it, or disable the tenant", param=what
            )
        return ""
    if not _KV_SIZE.fullmatch(text) or (text.endswith("%") and float(text[:-1]) > 100):
        raise BadRequest(f"{what} {text[:40]!r} is no size; give blocks (512), a share (20%) or none", param=what)
    return text


def kv_blocks(text: str, num_blocks: int) -> int:
    """Return how many of a pool's `num_blocks` a floor or cap that is not "" stands for, rounded down."""
    if text.endswith("%"):
        return int(float(text[:-1]) * num_blocks / 100)
    return int(text)


def kv_quotas(tenants: Iterable[Tenant], num_blocks: int) -> dict[str, Quota]:
    """Return the floors and caps by tenant id, in blocks of a pool of `num_blocks`; a cap is at least one."""
    return {
        tenant.id: Quota(
            kv_blocks(tenant.kv_floor, num_blocks) if tenant.kv_floor else 0,
            max(1, kv_blocks(tenant.kv_cap, num_blocks)) if tenant.kv_cap else None,
        )
        for tenant in tenants
        if tenant.kv_floor or tenant.kv_cap
    }


def check_kv_quotas(
    tenants: Iterable[Tenant], pools: Mapping[str, int], pinned: Mapping[str, int] | None = None
) -> None:
    """Check that all floors can be kept at once, beside what is pinned, in every pool, and as shares in any.

    `pools`: blocks by worker id; `pinned`: how many of them are pinned (None: nowhere any).

    Raises:
        BadRequest: they cannot; says which and by how much. Or a tenant's floor is above its cap.
    """
    tenants = [tenant for tenant in tenants if tenant.kv_floor or tenant.kv_cap]
    share = sum(float(tenant.kv_floor[:-1]) for tenant in tenants if tenant.kv_floor.endswith("%"))
    if share > 100:
        raise BadRequest(
            f"KV floors of {share:g} % in all do not fit: at most 100 % can be promised; lower another tenant's first",
            param="kv_floor",
        )
    for worker_id, num_blocks in pools.items():
        quotas = kv_quotas(tenants, num_blocks)
        for tenant in tenants:
            quota = quotas[tenant.id]
            if quota.cap is not None and quota.floor > quota.cap:
                raise BadRequest(
                    f"tenant {tenant.name}: the KV floor {tenant.kv_floor} is above the cap {tenant.kv_cap} "
                    f"({quota.floor} and {quota.cap} of the {num_blocks} blocks of worker {worker_id})",
                    param="kv_cap",
                )
        total, num_pinned = sum(quota.floor for quota in quotas.values()), (pinned or {}).get(worker_id, 0)
        if total + num_pinned > num_blocks:
            beside = f" and {num_pinned} pinned blocks" if num_pinned else ""
            raise BadRequest(
                f"KV floors of {total} blocks in all{beside} do not fit worker {worker_id}, which has {num_blocks}; "
                f"lower another tenant's first{', or unpin a prefix' if num_pinned else ''}",
                param="kv_floor",
            )
