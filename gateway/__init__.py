"""One Trio process: edges, tenants, router, worker links. Never torch."""
