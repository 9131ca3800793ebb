"""How a figure is made: sizes, peers, clocks, ceilings, checks, and the JSON that keeps it."""
