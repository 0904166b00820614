"""Launchers: what starts the processes of a shared merge, and the driver that keeps them until it is done."""
