"""Detectors of reward hacking: their metrics, their state and their alarms."""
