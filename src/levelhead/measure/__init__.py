"""What a head and its loss cost, and whether they are right: gate, timing, memory, rivals, formulas of the costs."""
