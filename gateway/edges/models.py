"""Which models a tenant may name, and what it means by a name: those that are served, and its own aliases for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvasir.gateway.core.api import ModelInfo
from kvasir.gateway.tenants.directory import Tenant
from kvasir.protocol.errors import BadRequest, PermissionDenied, Unavailable, UnknownModel


def models_of(tenant: Tenant, models: Mapping[str, ModelInfo]) -> dict[str, ModelInfo]:
    """Return those of `models` that `tenant` may use, by all names that it may use for them."""
    mine = {name: info for name, info in models.items() if tenant.may_use(name)}
    aliases = {alias: _target(alias, tenant, models) for alias in tenant.terms.aliases}
    return mine | {alias: info for alias, info in aliases.items() if info is not None}


def find_model(name: str, tenant: Tenant, models: Mapping[str, ModelInfo]) -> ModelInfo:
    """Return what a tenant means by `name`; without one it has to be the only model that the tenant may use.

    An alias stands for the first of its models that has a worker; if none has, for the first that is served at all.

    Raises:
        BadRequest, UnknownModel, PermissionDenied: it means nothing, or what the tenant may not use.
        Unavailable: none of the model's workers has ever come up yet.
    """
    if not name:
        mine = [model for model in models if tenant.may_use(model)]
        if len(mine) != 1:
            raise BadRequest(f"name one of the models you may use: {', '.join(sorted(mine)) or 'none'}", param="model")
        [name] = mine
    info = (_target(name, tenant, models) if name in tenant.terms.aliases else None) or models.get(name)
    if info is None:
        raise unknown_model(name, models_of(tenant, models))
    if not tenant.may_use(info.name):
        raise PermissionDenied(f"tenant {tenant.name} may not use model {name!r}; ask the operator", param="model")
    if not info.fingerprint:
        raise Unavailable(f"model {name!r} is still being loaded; try again in a moment", retry_after_s=2.0)
    return info


def unknown_model(name: str, served: Iterable[str]) -> UnknownModel:
    """Return the error that names the models that there are."""
    names = ", ".join(sorted(served)) or "none yet"
    return UnknownModel(f"model {name[:80]!r} is not served here; served: {names}", param="model")


def _target(alias: str, tenant: Tenant, models: Mapping[str, ModelInfo]) -> ModelInfo | None:
    found = [models[name] for name in tenant.terms.aliases[alias] if name in models and tenant.may_use(name)]
    return next((info for info in found if info.num_workers), found[0] if found else None)
