"""Products with packed weights. `reference` is the definition that every other kernel is checked against."""
