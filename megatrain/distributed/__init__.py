"""Ranks, mesh, collectives, and layers split over tensor ranks."""
