"""The commands: their options, one call, and what they print."""
