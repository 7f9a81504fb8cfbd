"""Runs beside each other and beside references."""
