"""What `scripts/fleet_check.py` is made of: environments and servers of others, a gateway, loads, figures."""
