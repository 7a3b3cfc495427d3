"""Bounds of the log evidence: functions of K log weights, with one class per file."""
