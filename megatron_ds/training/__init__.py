"""The only room that introduces rooms to each other."""
