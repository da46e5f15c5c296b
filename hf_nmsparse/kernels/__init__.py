"""Products of a dense input with a packed N:M weight."""
