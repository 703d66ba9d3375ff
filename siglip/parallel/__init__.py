"""Devices and hosts: the mesh, where each parameter lives, the torus behind it, and how processes find each other."""
