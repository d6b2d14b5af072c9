"""Meshes, shardings and jobs of several processes."""
