"""Schedules for the weight of the KL term."""
