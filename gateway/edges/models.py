"""Which models a tenant may name: those that are served, and its own aliases for them."""

from __future__ import annotations

from collections.abc import Mapping

from kvasir.gateway.core.api import ModelInfo
from kvasir.gateway.tenants.directory import Tenant


def models_of(tenant: Tenant, models: Mapping[str, ModelInfo]) -> dict[str, ModelInfo]:
    """Return those of `models` that `tenant` may use, by all names that it may use for them."""
    mine = {name: info for name, info in models.items() if tenant.may_use(name)}
    aliases = {alias: _target(alias, tenant, models) for alias in tenant.terms.aliases}
    return mine | {alias: info for alias, info in aliases.items() if info is not None}


def find_model(name: str, tenant: Tenant, models: Mapping[str, ModelInfo]) -> ModelInfo | None:
    """Return what a tenant means by `name`, None if that is nothing. It may be a model that it may not use.

    An alias stands for the first of its models that has a worker; if none has, for the first that is served at all.
    """
    return (_target(name, tenant, models) if name in tenant.terms.aliases else None) or models.get(name)


def _target(alias: str, tenant: Tenant, models: Mapping[str, ModelInfo]) -> ModelInfo | None:
    found = [models[name] for name in tenant.terms.aliases[alias] if name in models and tenant.may_use(name)]
    return next((info for info in found if info.num_workers), found[0] if found else None)
