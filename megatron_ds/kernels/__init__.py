"""One table of operations, each with a plain reference, chosen once at start."""
