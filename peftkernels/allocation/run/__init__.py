"""Allocators, and what they consist of: settings, masks, the schedule, saved states and snapshots."""
