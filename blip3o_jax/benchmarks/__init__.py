"""Measurements, one file a bench; each prints what it measured, where and how."""
