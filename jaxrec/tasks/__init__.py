"""Objectives, one file each. A task is a frozen dataclass: its fields are its hyper-parameters."""
