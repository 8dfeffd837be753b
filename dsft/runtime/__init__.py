"""Ranks and what they share: discovery, the process group, collectives, seeds, signals, files, locks."""
