"""Who am I, whom do I talk to: axes, collectives, parameter splits, random streams, wires between stages."""
